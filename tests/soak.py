"""Runs PPO of the quickstart's size for a long time and says whether its memory or its time per iteration grows.

    python tests/soak.py OUT SECONDS RESULT.json      OUT: a folder in which `lit-rlhf quickstart --out OUT` has run

Slopes are of means over 20 equal blocks of iterations, the first tenth of the run left out, with 95% intervals (t, 18 degrees of freedom).
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lit_rlhf import cli
from lit_rlhf.quickstart.run import stage_command

BLOCKS, T95 = 20, 2.101


class Watch(Callback):
    """Notes resident memory and the clock at the end of each iteration; ends the run when its time is up."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.monotonic(), seconds
        self.rows: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer, module, *rest) -> None:
        if module.position == module.items:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.rows.append((time.monotonic() - self.start, pages * os.sysconf("SC_PAGE_SIZE") / 2**20))
            trainer.should_stop = self.rows[-1][0] > self.seconds


def slope(values: list[float]) -> dict[str, float]:
    """Growth per 1,000 iterations: least squares over the block means, with the half width of its 95% interval."""
    size = len(values) // BLOCKS
    y = [sum(values[i * size : (i + 1) * size]) / size for i in range(BLOCKS)]
    x = [(i + 0.5) * size / 1000 for i in range(BLOCKS)]
    mx, my = sum(x) / BLOCKS, sum(y) / BLOCKS
    sxx = sum((a - mx) ** 2 for a in x)
    b = sum((a - mx) * (c - my) for a, c in zip(x, y, strict=True)) / sxx
    residual = sum((c - my - b * (a - mx)) ** 2 for a, c in zip(x, y, strict=True)) / (BLOCKS - 2)
    return {"per_1000_iterations": b, "interval": T95 * (residual / sxx) ** 0.5, "mean": my, "first_block": y[0], "last_block": y[-1]}


def soak(out: Path, seconds: float) -> dict:
    """The whole run, with a checkpoint every 50 steps and a validation every 100 iterations."""
    folder = tempfile.mkdtemp(dir=os.environ.get("TMPDIR"))
    more = [
        "--trainer.max_epochs=1000000",
        "--trainer.check_val_every_n_epoch=100",
        "--model.optimizer.lr=1e-6",
        "--trainer.enable_progress_bar=false",
    ]
    more += [f"--trainer.default_root_dir={folder}", "--trainer.enable_checkpointing=true", "--model.batch_size=32"]
    torch.set_num_threads(1)
    made = cli.build([*stage_command("ppo", out, 0), *more])
    watch = Watch(seconds)
    made.trainer.callbacks = [watch, *(c for c in made.trainer.callbacks if type(c).__name__ not in ("ExportHF", "ModelCheckpoint"))]
    made.trainer.callbacks.append(ModelCheckpoint(folder, every_n_train_steps=50))
    made.trainer.fit(made.model, datamodule=made.datamodule)
    rows = watch.rows[len(watch.rows) // 10 :]
    times = [b[0] - a[0] for a, b in zip(rows, rows[1:], strict=False)]
    return {
        "iterations": len(watch.rows),
        "seconds": round(watch.rows[-1][0]),
        "resident_MiB": slope([m for _, m in rows]),
        "seconds_per_iteration": slope(times),
    }


if __name__ == "__main__":
    result = soak(Path(sys.argv[1]), float(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
