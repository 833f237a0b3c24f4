"""Evaluation: what modules that write a response for every prompt log of them at validation and test."""

from typing import Any

import torch
from torch import nn
from torchmetrics import MeanMetric

from lit_rlhf.metrics import Rouge
from lit_rlhf.modules.common import reset_metrics


class Evaluation(nn.Module):
    """Means of `names` over the rows that have them, and ROUGE over those with a reference; over all ranks.

    Args:
        names: entries of a row (score, length, …) or whatever is put into `means` by hand.
    """

    def __init__(self, names: tuple[str, ...], rouge_tokenizer: Any) -> None:
        super().__init__()
        self.means, self.rouge = nn.ModuleDict({name: MeanMetric() for name in names}), Rouge(tokenizer=rouge_tokenizer)

    def add(self, module: Any, rows: list[dict[str, Any]], batch_idx: int) -> None:
        """One batch's rows; they become `module.samples`, after those of the batches before."""
        module.samples = rows if batch_idx == 0 else module.samples + rows
        for name, metric in self.means.items():
            if name in rows[0]:
                metric.update(torch.tensor([float(row[name]) for row in rows], device=module.device))
        scored = [row for row in rows if row.get("reference") is not None]
        self.rouge.update([row["response"] for row in scored], [row["reference"] for row in scored])

    def report(self, module: Any) -> None:
        """Logs everything as val/… or test/… and begins anew; for `on_validation_epoch_end` and `on_test_epoch_end`."""
        stage = "test" if module.trainer.testing else "val"
        values = {name: metric.compute() for name, metric in self.means.items() if metric.update_called} | self.rouge.compute()
        module.log_dict({f"{stage}/{name}": value for name, value in values.items()})
        reset_metrics(*self.means.values(), self.rouge)
