"""LeanProgressBar: Lightning's bar with the two or three numbers that matter, and a line now and then where no terminal is."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

SECONDS = 30.0  # between two lines in a log file
NUMBERS = ("train/loss", "train/accuracy", "rollout/score", "rollout/kl", "val/rouge_mean", "val/accuracy", "val/score")


class LeanProgressBar(TQDMProgressBar):
    """Shows the first three of NUMBERS that the run has logged; those that a module of your own logs with `prog_bar=True` if it logs none.

    In a log file a line is written every 30 seconds, in place of a bar that redraws itself.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate if sys.stderr.isatty() else 0)
        self._last = time.monotonic()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        known = [name for name in NUMBERS if name in trainer.callback_metrics][:3]
        if known:
            return {name: f"{float(trainer.callback_metrics[name]):.4g}" for name in known}
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        if not self.is_enabled and trainer.is_global_zero and time.monotonic() - self._last >= SECONDS:
            self._last = time.monotonic()
            total = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
            shown = "  ".join(f"{name} {value}" for name, value in self.get_metrics(trainer, pl_module).items())
            print(f"epoch {trainer.current_epoch}  step {trainer.global_step}{total}  {shown}", file=sys.stderr)
