"""RewardReport: what a reward model is worth on the pairs of `validate` or `test`, as report.html and report.json."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lit_rlhf.batch import Batch
from lit_rlhf.directories import load_config
from lit_rlhf.report.reward import ScoredPairs, reward_report
from lit_rlhf.report.tensorboard import add_report


class RewardReport(Callback):
    """Writes report.html and report.json into `dirpath` (default: `trainer.default_root_dir`) after each validation or test.

    The command line adds it to `validate` and `test` of a PairwiseReward. The module's `validation_step` and `test_step` return
    {"scores": (N,)}; the pairs of all ranks are gathered. Figures and tables go to TensorBoard too, under report/.

    write: False leaves the files; what was measured is then in `pairs`, on rank 0.
    """

    def __init__(self, dirpath: str | None = None, write: bool = True) -> None:
        self.dirpath, self.write = dirpath, write
        self.parts: list[ScoredPairs] = []
        self.pairs: ScoredPairs | None = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.parts = []

        if trainer.state.fn != TrainerFn.FITTING and trainer.global_step == 0 and trainer.ckpt_path is None and headless(pl_module):
            rank_zero_warn(
                f"{pl_module.model} has no reward head, so the scores are those of a new one unless you trained it in this process: give "
                "the directory that the reward stage exported (--model.model runs/…/reward/hf), or a checkpoint (--ckpt_path)"
            )

    on_test_start = on_validation_start

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking:
            self.parts.append(scored_pairs(batch, outputs["scores"], pl_module.tokenizer))

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, "validation")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, "test")

    def _finish(self, trainer: Trainer, split: str) -> None:
        gathered = [self.parts]
        if dist.is_available() and dist.is_initialized():
            gathered = [[] for _ in range(trainer.world_size)]
            dist.all_gather_object(gathered, self.parts)
        parts, self.parts = [part for rank in gathered for part in rank], []
        if not parts or not trainer.is_global_zero:
            return
        self.pairs = join(parts)
        if not self.write:
            return
        model = getattr(trainer.lightning_module, "model", "")
        steps = f", after {trainer.global_step} optimiser steps of this run" if trainer.global_step else ""
        report = reward_report(join(parts), "Reward model", f"{model}, {split} pairs{steps}.")
        path = report.write(Path(self.dirpath or trainer.default_root_dir))
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_image"):
                add_report(logger.experiment, report, trainer.global_step)
        accuracy = report.data["accuracy"]
        rank_zero_info(
            f"accuracy {accuracy.mean:.3f} ({accuracy.low:.3f} to {accuracy.high:.3f}) on {report.data['pairs']:,} pairs: {path}"
        )


def headless(module: LightningModule) -> bool:
    """Whether the directory that the module starts from is a language model's."""
    named = load_config(module.model, **module.source).architectures or [""]
    return not str(named[0]).endswith("ForSequenceClassification")


def scored_pairs(batch: Batch, scores: torch.Tensor, tokenizer: Any) -> ScoredPairs:
    """The pairs of a batch with the scores (N,) of its responses, on the CPU."""
    if batch.pairs is None:
        raise ValueError("RewardReport: the batch has no pairs; use it with PairwiseDataModule")
    ids = [row[mask].tolist() for row, mask in zip(batch.response_ids, batch.response_mask, strict=True)]
    texts = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    pairs = batch.pairs.cpu()
    first, second = pairs.unbind(1)
    owner = batch.prompt_of.cpu()[first].tolist()
    target = torch.ones(len(pairs)) if batch.target is None else batch.target.cpu()
    lengths = batch.response_mask.sum(1).cpu()
    columns = {name: [values[m] for m in owner] for name, values in batch.columns.items() if name != "prompt"}
    prompts = [batch.columns["prompt"][m] for m in owner]
    return ScoredPairs(
        prompts,
        [texts[i] for i in first.tolist()],
        [texts[i] for i in second.tolist()],
        scores.detach().float().cpu()[pairs],
        lengths[pairs],
        target,
        columns,
    )


def join(parts: list[ScoredPairs]) -> ScoredPairs:
    """All the pairs in one; a column that a part lacks is None there."""
    names = dict.fromkeys(name for part in parts for name in part.columns)
    columns = {name: [v for part in parts for v in part.columns.get(name, [None] * len(part.prompts))] for name in names}
    texts = [[text for part in parts for text in getattr(part, name)] for name in ("prompts", "chosen", "rejected")]
    tensors = [torch.cat([getattr(part, name) for part in parts]) for name in ("scores", "lengths", "target")]
    return ScoredPairs(*texts, *tensors, columns)
