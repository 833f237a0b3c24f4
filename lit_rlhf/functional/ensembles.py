"""What several reward models say together, and where they disagree."""

import torch
from torch import Tensor


def spread(x: Tensor) -> Tensor:
    """The standard deviation over the models (of K, biased). Shapes: (K, N) -> (N,) float32."""
    return x.float().std(0, unbiased=False)


def lower_bound(scores: Tensor, coef: float = 1.0) -> Tensor:
    """Mean over the models - coef * their spread: a score that a response gets only where the models agree that it deserves it.

    Shapes: (K, N) -> (N,), in the scores' units. Source: Coste et al. 2023, arXiv:2310.02743 (uncertainty-weighted optimisation), who
    subtract a multiple of the variance instead; the spread has the score's own unit.
    """
    return scores.float().mean(0) - coef * spread(scores)


def preference_spread(first: Tensor, second: Tensor) -> Tensor:
    """The spread of the models' probabilities sigmoid(first - second) that the first of two responses is preferred.

    Pairs with the largest are worth labelling next (Christiano et al. 2017, 2.2.4: the highest variance across the ensemble's predictions);
    of margins 5 and 8, which agree, it is near 0. Shapes: both (K, N) -> (N,), between 0 and 0.5.
    Raises ValueError for fewer than two models.
    """
    if first.dim() != 2 or len(first) < 2:
        raise ValueError(f"the spread of an ensemble takes scores of two or more models, (K, N); got {tuple(first.shape)}")
    return spread((first.float() - second.float()).sigmoid())


def weighted_sum(parts: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """sum of weight * score over the parts, a weight of 1 where none is given. Shapes: each (N,) -> (N,)."""
    return torch.stack([weights.get(name, 1.0) * scores.float() for name, scores in parts.items()]).sum(0)
