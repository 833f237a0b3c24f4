"""Throughput: how fast a run is, where its time goes, and how much of the device it uses."""

import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lit_rlhf.networks import CausalPolicy, ScalarModel
from lit_rlhf.perf import Clock, Passed, Tally, Work, backward_work, forward_work, peak_flops, peak_memory


class Throughput(Callback):
    """Logs `perf/…`: seconds, tokens a second, padding, operations a second, MFU and peak memory (tutorials/metrics.md).

    Once an iteration for a module that has iterations (PPO), else the means of each `log_every_n_steps` optimiser steps. All figures are of
    rank 0 and its device, so that no rank waits for another because of them. The latest stand in `last`.
    """

    def __init__(self) -> None:
        self.last: dict[str, float] = {}
        self.clock = Clock()
        self.networks: dict[str, CausalPolicy | ScalarModel] = {}
        self.work: dict[str, tuple[Work, Work]] = {}
        self.peak: float | None = None
        self._step, self._logged, self._since = 0, 0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.networks = {name: m for name, m in pl_module.named_modules() if isinstance(m, CausalPolicy | ScalarModel)}
        self.work = {name: (forward_work(network), backward_work(network)) for name, network in self.networks.items()}
        tallies = {name: Tally() for name in self.networks}
        for name, network in self.networks.items():
            network.tally = tallies[name]
        self.clock = getattr(pl_module, "clock", None) or Clock()
        self.clock.start(tallies)
        self.peak = peak_of(trainer, next(iter(pl_module.parameters())).dtype)
        self._step = self._logged = trainer.global_step
        self._since = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.clock.begin("update")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.clock.begin()
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        iteration = getattr(pl_module, "steps_per_iteration", None)
        every = iteration or trainer.log_every_n_steps
        if not stepped or not every or self._step % every:
            return
        self.last = self._figures(trainer, pl_module, 1 if iteration else self._step - self._logged)
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.log_metrics(self.last, step=self._step - 1)
        self.clock.clear()
        self._logged, self._since = self._step, time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.running = False
        for network in self.networks.values():
            network.tally = None

    def _figures(self, trainer: Trainer, module: LightningModule, units: int) -> dict[str, float]:
        """What is logged, by name; `units`: the steps or iterations since the last time."""
        found = {"wall_seconds": (time.perf_counter() - self._since) / units}
        for phase, seconds in self.clock.seconds.items():
            passed = {name: p for (when, name), p in self.clock.passed.items() if when == phase}
            found[f"{phase}_seconds"] = seconds / units
            found[f"{phase}_tokens_per_second"] = tokens_of(phase, passed, module, trainer.world_size) / seconds
            everything = sum(passed.values(), Passed())
            if phase != "sampling" and everything.size:
                operations = sum(self.work[name][0].of(p) + (phase == "update") * self.work[name][1].of(p) for name, p in passed.items())
                found[f"{phase}_padding"] = 1 - everything.tokens / everything.size
                found[f"{phase}_flops_per_second"] = operations / seconds
        if self.peak is not None and "update_flops_per_second" in found:
            found["update_mfu"] = found["update_flops_per_second"] / self.peak
        if (memory := peak_memory()) is not None:
            found[f"peak_{memory[0]}_gib"] = memory[1] / 2**30
        return {f"perf/{name}": value for name, value in found.items()}


def tokens_of(phase: str, passed: dict[str, Passed], module: Any, world: int) -> float:
    """One rank's tokens in a phase: sampled ones, those of the responses and their prompts, or those of the rows learnt from."""
    if phase == "update":
        return next((p.tokens for p in passed.values() if p.tokens), 0)
    batch = module.experience.batch  # of all ranks
    return float(batch.response_mask.sum() + (phase == "scoring") * batch.prompt_mask.sum()) / world


def peak_of(trainer: Trainer, weights: torch.dtype) -> float | None:
    """Operations a second that the run's device can do at most in the run's precision; None on a CPU and on a GPU that is not known."""
    device, precision = trainer.strategy.root_device, str(trainer.precision)
    if device.type != "cuda":
        return None
    computed = torch.bfloat16 if precision.startswith("bf16") else torch.float16 if precision.startswith("16") else weights
    return peak_flops(torch.cuda.get_device_name(device), computed)
