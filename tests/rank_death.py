"""One rank of a DDP run of a reward model whose second rank kills itself in its sixth step. Usage: rank_death.py RANKS SFT_DIR FOLDER"""

import os
import signal
import sys
import tempfile
from pathlib import Path

import datasets
import torch
from lightning.pytorch.callbacks import Callback
from resume_run import run
from strategy_zoo import strategy


class Die(Callback):
    def on_train_batch_start(self, trainer, *rest) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = cache
        run("reward", (sys.argv[2], ""), stop=Die(), folder=Path(sys.argv[3]), devices=2, strategy=strategy("ddp"))
