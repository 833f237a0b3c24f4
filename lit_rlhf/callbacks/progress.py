"""LeanProgressBar: Lightning's bar without its version number, and a line now and then where no terminal is."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

SECONDS = 30.0  # between two lines in a log file


class LeanProgressBar(TQDMProgressBar):
    """Shows what the module logs with `prog_bar=True`; in a log file, one line every 30 seconds instead of a bar that redraws itself."""

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate if sys.stderr.isatty() else 0)
        self._last = time.monotonic()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        if not self.is_enabled and trainer.is_global_zero and time.monotonic() - self._last >= SECONDS:
            self._last = time.monotonic()
            shown = "  ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.get_metrics(trainer, pl_module).items()
            )
            total = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
            print(f"epoch {trainer.current_epoch}  step {trainer.global_step}{total}  {shown}", file=sys.stderr)
