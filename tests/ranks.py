"""Starts and awaits the ranks of a run, with the variables that torchrun sets."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import lit_rlhf


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(ranks: int, arguments: list[str], script: Path) -> list[subprocess.Popen]:
    """The processes of a run, with the variables that torchrun sets."""
    port = free_port()
    plain = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(lit_rlhf.__file__).parents[1])}
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


def finish(processes: list[subprocess.Popen], seconds: float = 600) -> None:
    """Waits for all of them; an AssertionError with the end of its stderr for one that failed, and none stays behind."""
    try:
        for process in processes:
            _, errors = process.communicate(timeout=seconds)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
