"""RewardParts: every part of a composed reward by itself."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class RewardParts(Callback):
    """Logs the means of a rollout's parts as `rollout/part/<name>` once an iteration, for a reward that has `listeners` (lit_rlhf.rewards).

    The latest stand in `last`. Raises ValueError where the module's reward has no parts.
    """

    def __init__(self) -> None:
        self.last: dict[str, float] = {}
        self._heard: list[dict[str, Tensor]] = []
        self._reward: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reward = getattr(getattr(pl_module, "scorer", None), "fn", None)
        if not hasattr(self._reward, "listeners"):
            raise ValueError("RewardParts: the reward has no parts; give a reward_fn of lit_rlhf.rewards, or leave the callback out")
        self._reward.listeners.append(self._heard.append)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._heard.clear()  # of a validation; the rollout, if any, comes now

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not self._heard:
            return
        # Where the reference's score is the baseline, the second call is of the references.
        calls = self._heard[:1] if getattr(pl_module, "reward_baseline", None) == "reference" else self._heard
        found = {name: torch.cat([call[name].double().cpu() for call in calls]) for name in calls[0]}
        sums = torch.tensor([[scores.sum(), len(scores)] for scores in found.values()], dtype=torch.float64, device=pl_module.device)
        sums = trainer.strategy.reduce(sums, reduce_op="sum")
        self.last = {f"rollout/part/{name}": float(total / count) for name, (total, count) in zip(found, sums, strict=True)}
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.log_metrics(self.last, step=max(trainer.global_step - 1, 0))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reward.listeners.clear()
