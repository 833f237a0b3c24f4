"""Small runs of every module that can be stopped anywhere and go on: what test_resume.py and its two ranks compare."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger

from lit_rlhf import (
    DPO,
    PPO,
    RLOO,
    SFT,
    AtomicCheckpointIO,
    PairwiseDataModule,
    PairwiseReward,
    PromptDataModule,
    Sampling,
    Schedule,
    SFTDataModule,
)
from lit_rlhf.callbacks import Throughput

WORDS = "the cat sat on a mat and then it ate my hat".split()
STEPS = 12


def words(start: int, n: int) -> str:
    return " ".join(WORDS[(start * 5 + i * i) % len(WORDS)] for i in range(n))


ROWS = [{"prompt": words(i, 3 + i % 5), "label": words(i + 1, 1 + i % 6)} for i in range(16)]
PAIRS = [{"prompt": words(i, 3 + i % 5), "chosen": words(i, 1 + i % 6), "rejected": words(i + 2, 2 + i % 3)} for i in range(16)]


class Lines(Logger):
    """Keeps every number that is logged, under (step, name), but for how fast the run was: `perf/…` depends on the machine."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[int, str], float] = {}

    name, version = "lines", 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics, step=None) -> None:
        self.found |= {(step, name): float(value) for name, value in metrics.items() if not name.startswith("perf/")}


class Stop(Exception):
    """The interruption."""


class Interrupt(Callback):
    """Raises in the n-th micro-batch (from 0): before its forward, after its backward, or when it has ended; a checkpoint is saved then."""

    def __init__(self, at: int, moment: str, path: Path) -> None:
        self.at, self.moment, self.path, self.seen = at, moment, path, -1

    def _check(self, moment: str) -> None:
        if self.seen == self.at and self.moment == moment:
            raise Stop

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.seen += 1
        self._check("start")

    def on_after_backward(self, trainer, module) -> None:
        self._check("backward")

    def on_train_batch_end(self, *args: Any) -> None:
        self._check("end")

    def on_exception(self, trainer, module, exception) -> None:
        trainer.save_checkpoint(self.path)


@dataclass
class Run:
    """What a run left behind."""

    weights: torch.Tensor
    optimizer: torch.Tensor
    lines: dict[tuple[int, str], float]
    texts: list[str]
    counters: list[float]
    folder: Path = field(default=Path())

    def same(self, other: "Run", since: int) -> str:
        """What differs from `other` after step `since`; empty where nothing does."""
        late = {key: value for key, value in other.lines.items() if key[0] > since}
        wrong = [key for key, value in late.items() if self.lines.get(key) != value]
        numbers = f"metrics {[(key, self.lines.get(key), late[key]) for key in wrong[:3]]}"
        parts = {
            "weights": torch.equal(self.weights, other.weights),
            "optimizer": torch.equal(self.optimizer, other.optimizer),
            numbers: not wrong and (bool(late) or since >= STEPS - 1),
            "texts": since == STEPS or (self.texts == other.texts and len(self.texts) > 0),
            "counters": self.counters == other.counters,
        }
        return ", ".join(name for name, fine in parts.items() if not fine)


def pieces(stage: str, sft_dir: str, reward_dir: str) -> tuple[L.LightningModule, L.LightningDataModule]:
    adam = {"optimizer": lambda params: torch.optim.AdamW(params, lr=0.01), "scheduler": Schedule("linear", warmup_steps=2)}
    sampling = Sampling(8, 1.0)
    if stage == "sft":
        return SFT(sft_dir, sampling=sampling, dropout=True, **adam), SFTDataModule(ROWS, val_data=ROWS[:4], batch_size=4)
    if stage == "reward":
        return PairwiseReward(sft_dir, **adam), PairwiseDataModule(PAIRS, val_data=PAIRS[:4], batch_size=4)
    if stage == "dpo":
        return DPO(sft_dir, sft_coef=0.1, **adam), PairwiseDataModule(PAIRS, val_data=PAIRS[:4], batch_size=4)
    if stage == "rloo":
        rloo = {"batch_size": 8, "responses_per_prompt": 1, "minibatches": 2, "epochs": 2, "kl_target": 1.0, "kl_horizon": 100}
        return (
            RLOO(sft_dir, reward_model=reward_dir, sampling=sampling, **rloo, **adam),
            PromptDataModule(ROWS, val_data=ROWS[:4], max_prompt_tokens=64, val_batch_size=4),
        )
    ppo = {"batch_size": 8, "responses_per_prompt": 2, "minibatches": 2, "ppo_epochs": 2, "kl_target": 1.0, "kl_horizon": 100}
    return (
        PPO(sft_dir, reward_model=reward_dir, scale_scores=True, sampling=sampling, **ppo, **adam),
        PromptDataModule(ROWS, val_data=ROWS[:4], max_prompt_tokens=64, val_batch_size=4),
    )


def run(
    stage: str, dirs: tuple[str, str], ckpt: Path | None = None, stop: Callback | None = None, folder: Path | None = None, **kwargs: Any
) -> Run:
    """Twelve optimiser steps of a stage (three epochs of four; PPO and RLOO: three iterations of four), from `ckpt` on if given."""
    module, data = pieces(stage, *dirs)
    folder, lines = folder or Path(tempfile.mkdtemp()), Lines()
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    plain = {"accelerator": "cpu", "devices": 1, "max_steps": STEPS}
    trainer = L.Trainer(
        **(plain | quiet | kwargs), logger=lines, callbacks=[keep, Throughput(), *([stop] if stop else [])], plugins=[AtomicCheckpointIO()],
        default_root_dir=folder,
    )  # fmt: skip
    try:
        trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    except Stop:
        pass
    state = trainer.optimizers[0].state_dict()["state"] if trainer.optimizers else {}
    numbers = [t.detach() for _, entry in sorted(state.items()) for _, t in sorted(entry.items())]
    return Run(
        weights=flat([p.detach() for p in module.parameters()]),
        optimizer=flat(numbers) if numbers else torch.zeros(0),
        lines=lines.found,
        texts=[row["response"] for row in module.samples],
        counters=[float(getattr(module, name)) for name in ("iteration", "position", "episodes", "kl_coef") if hasattr(module, name)]
        + [trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else 0.0],
        folder=folder,
    )


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    """One vector of them, pieces of sharded tensors as this rank has them."""
    return torch.cat([(t.to_local() if hasattr(t, "to_local") else t).flatten().double() for t in tensors])
