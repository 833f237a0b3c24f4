"""Texts with rewards, trlX's `samples` and `rewards`, as rows that SFTDataModule reads."""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lit_rlhf.data.table import Table
from lit_rlhf.data.tokenise import Encoder

COLUMN = "reward"


def rewarded_rows(samples: Sequence[str | Sequence[str]], rewards: Sequence[float], tokenizer: Any) -> list[dict[str, Any]]:
    """Rows {prompt, response, reward} for `SFTDataModule`, of samples that are texts or (prompt, response) pairs.

    The prompt of a text alone is the token that generation from nothing begins with, as in `PromptDataModule(None)`.
    Raises ValueError where there are not as many rewards as samples.
    """
    if len(samples) != len(rewards):
        raise ValueError(f"{len(samples)} samples and {len(rewards)} rewards: give one reward for each sample")
    start = tokenizer.convert_ids_to_tokens(Encoder(tokenizer).start[0])
    pairs = [(start, sample) if isinstance(sample, str) else tuple(sample) for sample in samples]
    return [{"prompt": p, "response": r, COLUMN: float(reward)} for (p, r), reward in zip(pairs, rewards, strict=True)]


def reward_moments(table: Table) -> tuple[float, float]:
    """Mean and standard deviation (of n - 1) of the rewards of a table's rows; 1 where they are all the same."""
    found = [json.loads(columns).get(COLUMN) for columns in table.rows.select(table.index)["columns"]]
    rewards = as_rewards(found, table.name)
    spread = float(np.std(rewards, ddof=1)) if len(rewards) > 1 else 0.0
    return float(np.mean(rewards)), spread or 1.0


def as_rewards(values: Sequence[Any], where: str) -> list[float]:
    """A batch's or table's "reward" column as numbers; ValueError naming the row where one is missing or not finite."""
    rewards = []
    for i, value in enumerate(values):
        try:
            number = math.nan if isinstance(value, bool) or value is None else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f'{where}, row {i + 1} of those used: "{COLUMN}" is {value!r}; each row needs a finite number there')
        rewards.append(number)
    return rewards
