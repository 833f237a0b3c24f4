"""Which overlay fits: tries a job on one device, on several, split over them and over several nodes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from lit_rlhf.planning.job import PRECISIONS, Job
from lit_rlhf.planning.shells import Source
from lit_rlhf.planning.simulate import Memory

NODES = (2, 4, 8)
OVERLAYS = {
    "single": "no overlay",
    "ddp": "configs/strategy/ddp.yaml",
    "fsdp": "configs/strategy/fsdp.yaml",
}


@dataclass(frozen=True)
class Trial:
    """A job on certain devices and what it takes there; memory is None where its batch cannot be split so far."""

    job: Job
    memory: Memory | None
    limit: float | None
    """Bytes that tensors may take, None where no device memory was given."""

    @property
    def fits(self) -> bool | None:
        if self.memory is None:
            return False
        return None if self.limit is None else self.memory.peak <= self.limit

    @property
    def overlay(self) -> str:
        name = OVERLAYS[self.job.strategy]
        if self.job.nodes > 1 and self.job.strategy == "ddp":
            return "configs/strategy/multinode.yaml"
        return f"{name} with num_nodes: {self.job.nodes}" if self.job.nodes > 1 else name


class Trials:
    """Simulates jobs, each only once."""

    def __init__(self, simulate: Callable[[Job, dict[str, Source]], Memory], sources: dict[str, Source], limit: float | None) -> None:
        self.simulate, self.sources, self.limit = simulate, sources, limit
        self._known: dict[Any, Memory] = {}

    def __call__(self, job: Job) -> Trial:
        if not job.splits:
            return Trial(job, None, self.limit)
        key = (job.strategy, job.precision, job.devices, job.nodes, job.accumulate)
        if key not in self._known:
            self._known[key] = self.simulate(job, self.sources)
        return Trial(job, self._known[key], self.limit)

    def smallest_accumulate(self, job: Job) -> Trial:
        """The job with its own accumulate_grad_batches, else with the smallest doubling of it that fits, else with one prompt a time."""
        most = max(job.prompts_per_step // job.world, 1)
        trial = self(replace(job, accumulate=min(job.accumulate, most)))
        if trial.fits is not False or trial.memory is None or trial.job.accumulate == most:
            return trial
        last = self(replace(job, accumulate=most))
        if not last.fits:
            return last
        while trial.job.accumulate * 2 < most:
            trial = self(replace(job, accumulate=trial.job.accumulate * 2))
            if trial.fits:
                return trial
        return last


def overlays(job: Job, trials: Trials) -> Iterator[Trial]:
    """No overlay, DDP and FSDP2 on the job's own devices, then on more nodes until one fits; in bf16-true where none does."""
    found = False
    for precision in dict.fromkeys((job.precision, "bf16-true")):
        for trial in _strategies(replace(job, precision=precision), trials):
            yield trial
            found = found or trial.fits is not False
        if found:
            return


def _strategies(job: Job, trials: Trials) -> Iterator[Trial]:
    """Every strategy, node by node until one fits; DDP no further where what lasts is too much, since it is the same on all nodes."""
    alone = trials.smallest_accumulate(replace(job, strategy="single", devices=1, nodes=1))
    yield alone
    if job.world == 1:
        return
    whole = alone
    for nodes in sorted({job.nodes, *(n for n in NODES if n > job.nodes)}):
        tried = []
        if whole.memory is None or whole.limit is None or whole.memory.lasting <= whole.limit:
            whole = trials.smallest_accumulate(replace(job, strategy="ddp", nodes=nodes))
            tried.append(whole)
        tried.append(trials.smallest_accumulate(replace(job, strategy="fsdp", nodes=nodes)))
        yield from tried
        if any(trial.fits is not False for trial in tried):
            return


def table(job: Job, trials: Trials) -> Iterator[Trial]:
    """Every strategy in every precision, with the job's own devices and accumulate_grad_batches."""
    for precision in dict.fromkeys(PRECISIONS.values()):
        yield trials(replace(job, precision=precision, strategy="single", devices=1, nodes=1))
        for strategy in ("ddp", "fsdp") if job.world > 1 else ():
            yield trials(replace(job, precision=precision, strategy=strategy))
