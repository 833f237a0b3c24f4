"""The measuring itself, the same on both sides: clocks, memory, the matrix-product peak. Needs torch alone."""

import functools
import gc
import hashlib
import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from job import Job

PACKAGES = ("torch", "transformers", "lightning", "trl", "accelerate", "datasets", "tokenizers")


class Clock:
    """Seconds between marks, and seconds within named phases."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.cpu: list[tuple[float, float]] = []
        self.phases: defaultdict[str, list[float]] = defaultdict(list)
        self.calls: defaultdict[str, int] = defaultdict(int)

    def mark(self) -> None:
        """The end of a step (the first mark is the beginning of all)."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())
        self.cpu.append((machine_cpu(), time.process_time()))
        for seconds in self.phases.values():
            seconds.append(0.0)

    def others_cpu(self, first: int) -> float | None:
        """Processor seconds a second that other processes took (or the host kept) from mark `first` on."""
        if len(self.marks) < first + 2 or not self.cpu[0][0]:
            return None
        machine, own = (self.cpu[-1][i] - self.cpu[first][i] for i in (0, 1))
        return round((machine - own) / (self.marks[-1] - self.marks[first]), 3)

    def steps(self) -> list[float]:
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]

    def watch(self, owner: Any, name: str, phase: str) -> None:
        """From now on the calls of owner.name add up under `phase`; nothing happens where there is no such function."""
        if not hasattr(owner, name):
            return
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                self._add(phase, time.perf_counter() - begin)

        setattr(owner, name, timed)

    def _add(self, phase: str, seconds: float) -> None:
        found = self.phases[phase]
        while len(found) < max(len(self.marks), 1):
            found.append(0.0)
        found[-1] += seconds
        self.calls[phase] += 1

    def phase_steps(self, phase: str) -> list[float]:
        """Seconds of that phase in each step (between mark i and mark i + 1)."""
        found, steps = self.phases[phase], len(self.marks) - 1
        return (found + [0.0] * steps)[:steps]


def watch_gc(clock: Clock) -> None:
    """Times explicit gc.collect() calls under "gc"."""
    clock.watch(gc, "collect", "gc")


def machine_cpu() -> float:
    """Processor seconds that this machine has been busy since it started, time kept by its host included; 0 where it does not say."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return 0.0
    user, nice, system, _, _, irq, soft, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def memory() -> dict[str, float]:
    """This process's resident memory and its peak, MiB (on a GPU: torch's)."""
    if torch.cuda.is_available():
        return {"rss": torch.cuda.memory_allocated() / 2**20, "peak": torch.cuda.max_memory_allocated() / 2**20}
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) / 1024 for name, key in (("rss", "VmRSS"), ("peak", "VmHWM"))}


def reset_peak() -> float:
    """Lowers the recorded peak to what is in use now; returns that, MiB."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return memory()["rss"]


@torch.no_grad()
def move(model: torch.nn.Module, by: float, seed: int) -> torch.nn.Module:
    """Adds normal noise to every weight, the same in both environments: a policy that differs from its reference."""
    generator = torch.Generator().manual_seed(seed)
    for _, weight in sorted(model.named_parameters()):
        weight.add_(by * torch.randn(weight.shape, generator=generator))
    return model


def matmul_peak(dtype: torch.dtype, size: int = 4096, tries: int = 6) -> float:
    """The best of `tries` square matrix products, in GFLOP/s: what this process's threads can do at most."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in "ab")
    best = 0.0
    for _ in range(tries + 2):
        begin = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - begin) / 1e9)
    return best


def set_threads(job: Job) -> None:
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)


def hash_ids(rows: Sequence[Sequence[int]]) -> str:
    """A short hash of these rows of token ids, whatever their order."""
    return hashlib.sha256(json.dumps(sorted(list(map(int, row)) for row in rows)).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def result(job: Job, side: str, clock: Clock, loaded: float, units: int, **more: Any) -> dict[str, Any]:
    """The figures of one process: per timed step, warm-up left out. `units`: rows, pairs or responses of one step."""
    seconds = clock.steps()[job.warm_up :]
    timed, count = range(job.warm_up, job.warm_up + len(seconds)), max(len(seconds), 1)
    peak = memory()["peak"]
    return {
        "side": side,
        "stage": job.stage,
        "precision": job.precision,
        "rows": job.data,
        "batch": job.batch,
        "responses": job.responses,
        "units": units,
        "seconds": [round(s, 4) for s in seconds],
        "seconds_per_step": sum(seconds) / count,
        "units_per_second": units * len(seconds) / (sum(seconds) or 1),
        "phases": {name: sum(clock.phase_steps(name)[i] for i in timed) / count for name in list(clock.phases)},
        "others_cpu": clock.others_cpu(job.warm_up),
        "warm_up_seconds": [round(s, 3) for s in clock.steps()[: job.warm_up]],
        "loaded_mib": round(loaded),
        "peak_mib": round(peak),
        "growth_mib": round(peak - loaded),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    } | more


def emit(job: Job, found: dict[str, Any]) -> None:
    """One JSON line on the terminal, and the file that was asked for."""
    print(json.dumps(found))
    if job.out is not None:
        job.out.write_text(json.dumps(found))


def profiled(job: Job, run: Callable[[], Any]) -> None:
    """Runs it, under torch's profiler where a profile was asked for."""
    if job.profile is None:
        run()
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    job.profile.write_text(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=60))
