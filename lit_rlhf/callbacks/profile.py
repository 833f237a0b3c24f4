"""Profile: a torch profile of a few optimiser steps, or of one PPO iteration, as a trace and as a table."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.profiler import ProfilerActivity, profile

ROWS = 40  # of the table


class Profile(Callback):
    """Records `steps` optimiser steps after the first `skip`, on rank 0; of PPO whole iterations, rollouts included.

    What happens between steps (data, validation, checkpoints) is in it. Writes `trace.json.gz` (open it at https://ui.perfetto.dev) and
    `table.txt`, the operators that took most time of their own. With `Throughput` the phases stand in the
    trace as spans: sampling, scoring, update.

    Args:
        dirpath: where the two files go; default `profile` in `trainer.default_root_dir`.
        memory: also record what each operator allocates.
        stacks: also record the Python lines that called it.
    """

    def __init__(self, dirpath: str | None = None, skip: int = 2, steps: int = 2, memory: bool = False, stacks: bool = False) -> None:
        if skip < 0 or steps < 1:
            raise ValueError(f"Profile: skip must be at least 0 and steps at least 1, got {skip} and {steps}")
        self.dirpath, self.skip, self.steps, self.memory, self.stacks = dirpath, skip, steps, memory, stacks
        self.profiler: profile | None = None
        self._first, self._done = 0, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first, self._done = trainer.global_step, not trainer.is_global_zero
        if self.skip == 0:
            self._start(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.profiler is None and not self._done and self._reached(trainer, pl_module, self.skip):
            self._start(trainer)
        elif self.profiler is not None and self._reached(trainer, pl_module, self.steps):
            self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.profiler is not None:
            self._write(trainer)  # the run was shorter
        elif not self._done:
            rank_zero_info(f"Profile: nothing was recorded, since the run ended within its first {self.skip} steps")

    def _reached(self, trainer: Trainer, module: Any, steps: int) -> bool:
        """Whether so many steps have been made since the last mark, and the module stands between two of its iterations."""
        border = trainer.global_step % getattr(module, "steps_per_iteration", 1) == 0
        return trainer.global_step - self._first >= steps and border

    def _start(self, trainer: Trainer) -> None:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self._first = trainer.global_step
        self.profiler = profile(activities=activities, profile_memory=self.memory, with_stack=self.stacks, record_shapes=True)
        self.profiler.start()

    def _write(self, trainer: Trainer) -> None:
        recorded, self.profiler, self._done = self.profiler, None, True
        assert recorded is not None
        recorded.stop()
        folder = Path(self.dirpath or Path(trainer.default_root_dir) / "profile")
        folder.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(folder / "trace.json.gz"))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        table = recorded.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=ROWS)
        (folder / "table.txt").write_text(table + "\n", encoding="utf-8")
        made = trainer.global_step - self._first
        rank_zero_info(f"Profile: {made} step{'s' * (made > 1)} in {folder}: trace.json.gz for https://ui.perfetto.dev, table.txt")
