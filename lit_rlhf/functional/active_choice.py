"""Which pairs are worth a label: those that an ensemble of reward models disagrees about most."""

import torch
from torch import Tensor


def difference_spread(scores: Tensor, pairs: Tensor) -> Tensor:
    """The standard deviation (biased) over K reward models of their score difference within each pair, in the scores' units.

    A constant that one model adds to all of its scores does not count: only what it says of the one response against the other does.
    Shapes: scores (K, N), pairs (Q, 2) int64 columns of `scores`; result (Q,) float64. Errors: ValueError for fewer than two models.
    Source: Christiano et al. 2017 (arXiv:1706.03741), 2.2.4, who take the variance across an ensemble's predictions.
    """
    if scores.dim() != 2 or len(scores) < 2:
        raise ValueError(f"the spread of an ensemble takes scores of two or more models, (K, N); got {tuple(scores.shape)}")
    first, second = pairs.unbind(1)
    return (scores[:, first].double() - scores[:, second].double()).std(0, unbiased=False)


def disputed_pairs(scores: Tensor, pairs: Tensor, count: int) -> Tensor:
    """Which `count` of the pairs the models disagree about most, largest spread first; of equal ones the earlier.

    Shapes: scores (K, N), pairs (Q, 2) int64; result (min(count, Q),) int64 rows of `pairs`.
    """
    return torch.argsort(difference_spread(scores, pairs), descending=True, stable=True)[:count]
