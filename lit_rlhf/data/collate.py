"""Rows of token ids to a Batch."""

import json
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from lit_rlhf.batch import Batch


def collate(rows: Sequence[dict[str, Any]], *, prompt_loss: bool = False) -> Batch:
    """One Batch of these rows: M = len(rows) prompts, their N responses in order, their Q pairs as (preferred, other) response rows.

    With `prompt_loss` every prompt token but the first counts in the language-model loss, else only those of earlier assistant turns. Rows
    without a target or margin get 1 and 0 where another row has one.
    """
    responses = [ids for row in rows for ids in row["responses"]]
    prompt_of = [m for m, row in enumerate(rows) for _ in row["responses"]]
    firsts = [0, *accumulate(len(row["responses"]) for row in rows)][:-1]
    batch = Batch.of([row["prompt_ids"] for row in rows], responses, prompt_of, columns=_columns(rows))
    if prompt_loss:
        batch.prompt_loss_mask = batch.prompt_mask.clone()
        batch.prompt_loss_mask[:, 0] = False
    elif any(row["prompt_loss"] for row in rows):
        batch.prompt_loss_mask = torch.zeros_like(batch.prompt_mask)
        for m, row in enumerate(rows):
            batch.prompt_loss_mask[m, row["prompt_loss"]] = True
    pairs = [(first + i, first + j) for first, row in zip(firsts, rows, strict=True) for i, j in row["pairs"]]
    if pairs:
        batch.pairs = torch.tensor(pairs, dtype=torch.long)
        batch.target = _per_pair(rows, "target", 1.0)
        batch.margin = _per_pair(rows, "margin", 0.0)
    return batch


def _per_pair(rows: Sequence[dict[str, Any]], name: str, default: float) -> torch.Tensor | None:
    """(Q,) float32, or None where no row has the field."""
    if not any(row[name] for row in rows):
        return None
    return torch.tensor([x for row in rows for x in (row[name] or [default] * len(row["pairs"]))], dtype=torch.float32)


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """One list per column, None where a row lacks it; "prompt" and "reference" are ours."""
    parsed = [json.loads(row["columns"]) for row in rows]
    names = dict.fromkeys(name for columns in parsed for name in columns)
    out = {name: [columns.get(name) for columns in parsed] for name in names}
    out["prompt"] = [row["prompt"] for row in rows]
    if any(row["reference"] is not None for row in rows):
        out["reference"] = [row["reference"] for row in rows]
    return out
