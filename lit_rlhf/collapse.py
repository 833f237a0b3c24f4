"""Notices a policy that has collapsed: responses that are empty, all the same, repeat themselves, or no longer end."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NGRAM = 3
SIGNS = {
    "empty_rate": "of the responses are empty",
    "same_rate": "of the responses are one and the same text",
    "repetition": "of the responses' 3-grams repeat an earlier one of the same response",
    "endless_rate": "of the responses never end",
}


def signs(texts: Sequence[str], ids: Tensor, mask: Tensor, finished: Tensor) -> dict[str, float]:
    """What a rollout looks like, each number between 0 (healthy) and 1.

    Shapes: ids and mask (N, R), finished (N,). empty_rate: responses without a visible character; same_rate: the share of the commonest
    text; repetition: the share of 3-grams that the response has had before; endless_rate: responses cut at max_new_tokens.
    """
    plain = [text.strip() for text in texts]
    grams = repeats = 0
    for row, kept in zip(ids.tolist(), mask.sum(1).tolist(), strict=True):
        seen = [tuple(row[i : i + NGRAM]) for i in range(kept - NGRAM + 1)]
        grams, repeats = grams + len(seen), repeats + len(seen) - len(set(seen))
    return {
        "empty_rate": sum(not text for text in plain) / len(plain),
        "same_rate": max(plain.count(text) for text in set(plain)) / len(plain) if len(plain) > 1 else 0.0,
        "repetition": repeats / max(grams, 1),
        "endless_rate": 1 - float(finished.float().mean()),
    }


class CollapseWatch:
    """Counts the iterations in a row in which one sign stood at 0.9 or more, having been under 0.5 at the run's first iteration.

    A task whose responses are short and alike from the start (a label, say), or never end by design, is therefore no collapse.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.first: dict[str, float] = {}
        self.count = dict.fromkeys(SIGNS, 0)

    def __call__(self, found: dict[str, float], iteration: int) -> None:
        """Takes one iteration's signs; RuntimeError once one has stood for `patience` iterations."""
        self.first = self.first or dict(found)
        for name, value in found.items():
            self.count[name] = self.count[name] + 1 if value >= 0.9 and self.first[name] < 0.5 else 0
        worst = max(self.count, key=lambda name: self.count[name])
        if self.patience is not None and self.count[worst] >= self.patience:
            begun = iteration - self.count[worst] + 1
            raise RuntimeError(
                f"iteration {iteration}: the policy has collapsed: {found[worst]:.0%} {SIGNS[worst]} (first iteration "
                f"{self.first[worst]:.0%}), since iteration {begun}. Go on from a checkpoint of before iteration {begun} with a higher "
                "kl_coef, a lower learning rate, or a reward without that loophole; collapse_patience: null switches this check off"
            )

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"first": dict(self.first), "count": dict(self.count)}

    def load(self, state: dict[str, Any]) -> None:
        self.first, self.count = dict(state["first"]), dict(state["count"])


def sign_stats(found: dict[str, float]) -> dict[str, Tensor]:
    """The signs as the statistics that are logged; `endless_rate` is 1 - eos_rate, which is there already."""
    return {name: torch.tensor(value) for name, value in found.items() if name != "endless_rate"}
