"""Rewards made of several: ensembles of reward models, weighted sums of models and functions, and rules; each is a `reward_fn`.

    reward_fn:
      class_path: lit_rlhf.rewards.WeightedRewards
      init_args:
        parts: {quality: runs/local/reward/hf, shouting: my_rules.shouts}
        weights: {shouting: -2.0}

They load reward models at their first call, each rank on its own device, and tell their `listeners` the parts of every call (the callback
RewardParts logs them). PPO takes no_eos_score and value_init from a `reward_model` only: with these say both yourself.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.functional import lower_bound, preference_spread, spread, weighted_sum
from lit_rlhf.pretrained import check_source
from lit_rlhf.scorers import imported, is_import_path, load_scorer
from lit_rlhf.scoring import check_reward_fn

Listener = Callable[[dict[str, Tensor]], None]


class RewardEnsemble:
    """The mean score of several reward models minus a multiple of their spread (`functional.lower_bound`).

    Train the models alike, on the same choices, with different seeds (the head and the order of rows differ) or from different SFT runs:
    what they have in common they learnt from the choices, and a policy that exploits one of them meets the others.

    Args:
        models: two or more directories or hub names; each subtracts its own `reward_mean`.
        spread_coef: how many standard deviations are subtracted; 0 is the mean.
        dtype: of the weights.
    """

    def __init__(self, models: Sequence[str], spread_coef: float = 1.0, dtype: str = "float32") -> None:
        if isinstance(models, str) or len(models) < 2:
            raise ValueError(f"an ensemble needs two or more reward models, got {models!r}")
        if spread_coef < 0:
            raise ValueError(f"spread_coef must be 0 or more, got {spread_coef}: below 0 it would reward what the models disagree about")
        self.models, self.spread_coef, self.dtype = [check_source(model) for model in models], spread_coef, dtype
        self.listeners: list[Listener] = []
        self._scorers: list[nn.Module] = []

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        """One number per response."""
        found = self.scores(prompts, responses)
        for tell in self.listeners:
            tell({"mean": found.mean(0), "spread": spread(found)} | {f"model{i}": row for i, row in enumerate(found)})
        return lower_bound(found, self.spread_coef).tolist()

    def scores(self, prompts: list[str], responses: list[str]) -> Tensor:
        """Each model's scores, (K, N) float32."""
        if not self._scorers:
            self._scorers = [load_scorer(model, dtype=self.dtype).to(own_device()) for model in self.models]
        return torch.stack([scorer(prompts, responses, {}).float() for scorer in self._scorers])

    def disputed(self, rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
        """The `count` rows (prompt, responses: two of them) whose order the models disagree about most, each with its `spread`.

        They are what people should be asked next: label them, add them to the comparisons, train the models again.
        Raises ValueError for a row that has not two responses.
        """
        odd = next((i for i, row in enumerate(rows) if len(row["responses"]) != 2), None)
        if odd is not None:
            raise ValueError(f"row {odd} has {len(rows[odd]['responses'])} responses; a pair to be labelled has two")
        prompts = [row["prompt"] for row in rows]
        first, second = (self.scores(prompts, [row["responses"][i] for row in rows]) for i in (0, 1))
        found = preference_spread(first, second)
        order = found.argsort(descending=True, stable=True)[:count].tolist()
        return [dict(rows[i]) | {"spread": float(found[i])} for i in order]


class WeightedRewards:
    """A weighted sum of reward models and reward functions.

    Rules (Glaese et al. 2022, Sparrow) are parts like any other: functions that give 1, or a probability, where a response breaks the
    rule, with a weight below 0 (`Rule`, or `PipelineReward` for a classifier).

    Args:
        parts: name -> a reward model's directory or hub name, a reward function or its import path.
        weights: name -> factor, 1 where none is given.
    """

    def __init__(self, parts: dict[str, str | Callable[..., Any]], weights: dict[str, float] | None = None) -> None:
        if not parts:
            raise ValueError("parts is empty: give at least one reward by name")
        if unknown := sorted(set(weights or {}) - set(parts)):
            raise ValueError(f"weights has {', '.join(unknown)}, which is no part (parts: {', '.join(parts)})")
        self.weights = dict(weights or {})
        self.parts: dict[str, Any] = {}
        for name, part in parts.items():
            if isinstance(part, str) and not is_import_path(part):
                self.parts[name] = check_source(part)
            else:
                self.parts[name] = imported(part) if isinstance(part, str) else part
                check_reward_fn(self.parts[name])
        self.listeners: list[Listener] = []
        self._scorers: dict[str, nn.Module] = {}

    def __call__(self, prompts: list[str], responses: list[str], **columns: list[Any]) -> list[float]:
        """One number per response; each function gets the columns that it names."""
        if not self._scorers:
            self._scorers = {name: load_scorer(part).to(own_device()) for name, part in self.parts.items()}
        found = {name: scorer(prompts, responses, columns).float().cpu() for name, scorer in self._scorers.items()}
        for tell in self.listeners:
            tell(found)
        return weighted_sum(found, self.weights).tolist()


class Rule:
    """A rule on texts as a reward function: 1 where a response breaks it, else 0.

    Args:
        pattern: a regular expression (case counts; `(?i)` at its beginning changes that).
        required: False forbids what the pattern finds, True asks for it.
    """

    def __init__(self, pattern: str, required: bool = False) -> None:
        try:
            self.pattern, self.required = re.compile(pattern), required
        except re.error as error:
            raise ValueError(f"the rule's pattern {pattern!r} is no regular expression: {error}") from None

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        return [float((self.pattern.search(response) is None) == self.required) for response in responses]


def own_device() -> torch.device:
    """This rank's GPU, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
