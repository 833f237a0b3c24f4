"""Learning-rate schedules that YAML can name, the number of optimiser steps of a fit, and fused optimisers."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each optimiser step as a share of the optimiser's own: Schedule(...)(optimizer, total_steps) -> LambdaLR.

    Step s of 0..U-1 (U = total_steps, W = warmup_steps) takes lr * (s + 1) / (W + 1) while s < W, and from there on, with the progress
    p = (s - W) / (U - W): constant 1; linear final + (1 - final) * (1 - p); cosine final + (1 - final) * (1 + cos(pi p)) / 2.
    Linear without warm-up is SFD's lr * (1 - (u - 1) / U) for update u = 1..U (ppo.py:575).

    final: the share that is reached after the last step, 0 to 1 (constant ignores it). warmup_steps: optimiser steps.
    Errors: ValueError for a negative warm-up or a final outside 0..1; a warm-up longer than the run only warns (fast_dev_run).
    """

    shape: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.shape not in ("constant", "linear", "cosine"):
            raise ValueError(f"shape is {self.shape!r}; give constant, linear or cosine")
        if self.warmup_steps < 0 or not 0 <= self.final <= 1:
            raise ValueError(f"warmup_steps is {self.warmup_steps} and final {self.final}; give 0 or more steps and a share from 0 to 1")

    def share(self, step: int, total_steps: int) -> float:
        """The share of the learning rate that step 0..total_steps-1 takes."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = min((step - self.warmup_steps) / max(total_steps - self.warmup_steps, 1), 1.0)
        decayed = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[self.shape]
        return decayed if self.shape == "constant" else self.final + (1 - self.final) * decayed

    def __call__(self, optimizer: Optimizer, total_steps: int) -> LambdaLR:
        if 0 < total_steps <= self.warmup_steps:
            warnings.warn(f"warmup_steps={self.warmup_steps} reaches past the run's {total_steps} optimiser steps", stacklevel=2)
        # A function and not the instance: LambdaLR puts a callable object's attributes into the checkpoint, but no function.
        return LambdaLR(optimizer, lambda step: self.share(step, total_steps))


# What a module's `scheduler` argument takes; the second half would be `-> LRScheduler`, but jsonargparse then asks for a subclass of it.
LRSchedule = Schedule | Callable[[Optimizer, int], Any]


def fix_max_steps(trainer: L.Trainer) -> int:
    """The optimiser steps of this fit, which from now on ends by `max_steps` alone; call it in configure_optimizers.

    Steps = the smaller of max_steps and max_epochs * ceil(batches per epoch / accumulate_grad_batches). The Trainer's limit in epochs
    is lifted, because Lightning 2.6.6 runs extra steps after a second resume when it counts epochs, and none when it counts steps.
    A fit without any step (max_epochs=0, limit_train_batches=0) keeps its limits.
    Errors: ValueError when neither limit says where the run ends.
    """
    if trainer.max_epochs == 0 or trainer.limit_train_batches == 0 or trainer.max_steps == 0:
        return 0
    total = trainer.estimated_stepping_batches
    if total == math.inf or total < 0:
        raise ValueError(
            f"no end in sight: max_steps={trainer.max_steps}, max_epochs={trainer.max_epochs}, "
            f"{trainer.num_training_batches} batches per epoch. Set trainer.max_steps, or max_epochs with a loader that has a length."
        )
    trainer.fit_loop.epoch_loop.max_steps = int(total)
    trainer.fit_loop.max_epochs = -1
    return int(total)


FUSED = (torch.optim.AdamW, torch.optim.Adam)  # not SGD, whose fused step has no rule for sharded weights
FUSED_ON = ("cpu", "cuda")


def fuse(optimizer: Optimizer) -> Optimizer:
    """Lets torch's own Adam and AdamW update each weight in one pass (`fused`) unless the user chose how; only rounding differs.

    On a CPU a step of AdamW takes a quarter of the time. It is set on the groups and not in the constructor, which would also announce
    support for gradient scaling, with which Lightning refuses to clip gradients.
    """
    groups = optimizer.param_groups
    if type(optimizer) not in FUSED or any(group.get(name) is not None for group in groups for name in ("fused", "foreach")):
        return optimizer
    flags = ("capturable", "differentiable")
    if any(group.get(name) for group in groups for name in flags):
        return optimizer
    if all(p.is_floating_point() and p.device.type in FUSED_ON for group in groups for p in group["params"]):
        for group in groups:
            group["fused"] = True
    return optimizer
