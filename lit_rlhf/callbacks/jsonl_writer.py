"""JSONLWriter: what `predict` returns, as one JSON object per line."""

import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info


class JSONLWriter(Callback):
    """Writes every dict of `predict_step`'s lists to `path` (default: predictions.jsonl in `trainer.default_root_dir`).

    The lines stand in the order of the data set, by the batch's `rows`; of other batches in the order of batches and ranks.
    The lines of all ranks are gathered and the file replaces an older one when it is complete.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self.lines: list[tuple[tuple[int, ...], str]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.lines = []

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        rows = _rows(batch, len(outputs))
        for i, item in enumerate(outputs):
            place = (rows[i], i) if rows else (batch_idx, trainer.global_rank, i)
            self.lines.append(((dataloader_idx, *place), json.dumps(item, ensure_ascii=False, default=_plain)))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        gathered = [self.lines]
        if dist.is_available() and dist.is_initialized():
            gathered = [[] for _ in range(trainer.world_size)]
            dist.all_gather_object(gathered, self.lines)
        if not trainer.is_global_zero:
            return
        path = Path(self.path or Path(trainer.default_root_dir) / "predictions.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = sorted(line for part in gathered for line in part)
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_text("".join(text + "\n" for _, text in lines), encoding="utf-8", errors="replace")
        os.replace(temporary, path)
        rank_zero_info(f"wrote {len(lines)} lines to {path}")


def _rows(batch: Any, count: int) -> list[int]:
    """The row of the data set for each of `count` predictions, one per prompt or one per response; [] where the batch does not say."""
    rows = getattr(batch, "rows", None) or []
    if rows and count == batch.num_responses != len(rows):
        return [rows[m] for m in batch.prompt_of.tolist()]
    return rows if len(rows) == count else []


def _plain(value: Any) -> Any:
    """Tensors and NumPy values as numbers or lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a prediction holds a {type(value).__name__}, which JSON cannot; predict_step returns plain values")
