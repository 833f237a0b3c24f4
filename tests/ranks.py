"""Starts and awaits the ranks of a run, with the variables that torchrun sets."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lit_rlhf


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(ranks: int, arguments: list[str], script: Path) -> list[subprocess.Popen]:
    """The processes of a run, with the variables that torchrun sets."""
    port = free_port()
    plain = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": str(Path(lit_rlhf.__file__).parents[1]),
    }
    plain.pop("PL_GLOBAL_SEED", None)
    made = []
    for rank in range(ranks):
        names = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        extra = {k: str(v) for k, v in (names | {"TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": 0}).items()} if ranks > 1 else {}
        made.append(
            subprocess.Popen([sys.executable, str(script), str(ranks), *arguments], env=plain | extra, stderr=subprocess.PIPE, text=True)
        )
    return made


class Died(AssertionError):
    """A rank ended by a signal, or ranks waited for each other: nothing that Python raised."""


def finish(processes: list[subprocess.Popen], seconds: float = 600) -> None:
    """Waits for all of them, and none stays behind.

    Raises AssertionError with the end of its stderr for one that failed, Died where one was ended by a signal or they took too long.
    """
    try:
        for process in processes:
            _, errors = process.communicate(timeout=seconds)
            if process.returncode != 0:
                ends = [other.wait(timeout=30) for other in processes]
                raise (Died if min(ends) < 0 else AssertionError)(f"exit codes {ends}; {errors[-3000:]}")
    except subprocess.TimeoutExpired as late:
        raise Died(f"not done after {late.timeout:.0f} s") from late
    finally:
        for process in processes:
            process.kill()


def finish_or_again(begin: Callable[[], list[subprocess.Popen]], seconds: float) -> None:
    """`finish`, and where a rank Died once more from the beginning.

    With many FSDP2 runs in one process over gloo (torch 2.13) a rank now and then ends without a Python error in the gathering of a
    checkpoint's weights (the kernel's log: a segfault of the thread pt_gloo_runloop in malloc), or spins there: three times in some thirty
    tries, after 6 to 11 runs. Who corrupts the heap is not known; a user has one run a process. What ranks compare is not tried twice.
    """
    try:
        finish(begin(), seconds)
    except Died as error:
        print(f"\na rank died and all were started again: {error}")
        finish(begin(), seconds)
