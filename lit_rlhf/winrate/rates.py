"""Win rates with their intervals: over all pairs, at like length, and as if both had the same length."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_rlhf.data.text import count_words
from lit_rlhf.functional import bootstrap_mean
from lit_rlhf.functional.statistics import Estimate
from lit_rlhf.winrate.judges import Verdict
from lit_rlhf.winrate.pairs import Pair

DRAWS = 1000
RIDGE = 1e-6
LIKE = 0.1  # of the longer one


@dataclass
class WinRate:
    """How often the first side is better; a tie counts a half, pairs without an answer do not count."""

    all: Estimate
    like_length: Estimate | None
    """Over the pairs whose lengths differ by at most a tenth of the longer one."""
    equal_length: Estimate | None
    """What a logistic regression on log(length first / length second) says where the two are equal (Stiennon et al. 2020, F)."""
    wins: int
    losses: int
    ties: int
    unparsable: int
    alike: int
    """Pairs of like length."""
    picked_first: float | None
    """Share of all answers that name what was shown first; 0.5 without position bias. None where the judge was asked once."""
    length_ratio: float
    """Mean words of the first side over those of the second."""


def win_rate(pairs: Sequence[Pair], verdicts: Sequence[Verdict], seed: int = 0) -> WinRate:
    """The win rate with 95% bootstrap intervals, drawn by prompt; ValueError where the judge answered none of the pairs."""
    known = [(p, v.preferred) for p, v in zip(pairs, verdicts, strict=True) if v.preferred is not None]
    if not known:
        raise ValueError(f"the judge gave no answer that counts to any of the {len(pairs)} pairs; use another judge, or another template")
    values = torch.tensor([value for _, value in known], dtype=torch.double)
    groups = torch.tensor([p.number for p, _ in known])
    lengths = torch.tensor([[count_words(p.first), count_words(p.second)] for p, _ in known], dtype=torch.double).clamp(min=1)
    like = (lengths[:, 0] - lengths[:, 1]).abs() <= LIKE * lengths.max(1).values
    ratio = (lengths[:, 0] / lengths[:, 1]).log()
    return WinRate(
        bootstrap_mean(values, groups, seed=seed),
        bootstrap_mean(values[like], groups[like], seed=seed) if like.any() else None,
        at_equal_length(values, ratio, groups, seed) if float(ratio.std(unbiased=False)) > 1e-6 else None,
        int((values > 0.5).sum()),
        int((values < 0.5).sum()),
        int((values == 0.5).sum()),
        len(pairs) - len(known),
        int(like.sum()),
        _picked_first(verdicts),
        float(lengths[:, 0].mean() / lengths[:, 1].mean()),
    )


def _picked_first(verdicts: Sequence[Verdict]) -> float | None:
    """Of the answers of both orders: the second order's are turned round, so that each says how often what stood first was named."""
    shown = [p if k == 0 else 1 - p for v in verdicts for k, p in enumerate(v.orders) if p is not None]
    return sum(float(p > 0.5) + 0.5 * (p == 0.5) for p in shown) / len(shown) if shown else None


def at_equal_length(values: Tensor, ratio: Tensor, groups: Tensor, seed: int = 0) -> Estimate:
    """sigmoid(a) of P(win) = sigmoid(a + b log length ratio), fitted by maximum likelihood, with the bootstrap interval by prompt.

    A ridge of 1e-6 on a and b keeps them finite where all pairs are won. Shapes: (n,) all.
    """
    _, which = torch.unique(groups, return_inverse=True)
    count, generator = int(which.max()) + 1, torch.Generator().manual_seed(seed)
    draws = [torch.bincount(torch.randint(count, (count,), generator=generator), minlength=count) for _ in range(DRAWS)]
    weights = torch.stack([torch.ones(count, dtype=torch.long), *draws]).double()[:, which]
    found = _logistic(values, ratio, weights).sigmoid()
    low, high = torch.quantile(found[1:], torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return Estimate(float(found[0]), float(found[1:].std(unbiased=False)), low, high)


def _logistic(values: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    """The intercepts (D,) of logistic regressions of values on x under weights (D, n), by Newton's method."""
    features = torch.stack([torch.ones_like(x), x], 1)
    beta, ridge = torch.zeros(len(weights), 2, dtype=torch.double), RIDGE * torch.eye(2, dtype=torch.double)
    for _ in range(60):
        p = (beta @ features.T).sigmoid()
        gradient = (weights * (values - p)) @ features - RIDGE * beta
        curvature = torch.einsum("dn,ni,nj->dij", weights * p * (1 - p), features, features) + ridge
        step = torch.linalg.solve(curvature, gradient[:, :, None]).squeeze(2).clamp(-2, 2)
        beta = beta + step
        if float(step.abs().max()) < 1e-9:
            break
    return beta[:, 0]
