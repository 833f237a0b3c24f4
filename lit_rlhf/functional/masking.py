"""Means, whitening and positions under a mask. A mask is bool and True = counts."""

import torch
from torch import Tensor

EPSILON = 1e-8  # added to the variance, as in SFD ppo.py `whiten` and Ziegler et al.'s `utils.core.whiten`


def divisor(local: int | Tensor, count: float | None) -> float:
    """`count` where it is given (the whole optimiser step's), else the local number.

    Errors: ValueError when the divisor would be zero or less, for a mean over nothing is a bug upstream.
    """
    chosen = float(local if count is None else count)
    if not chosen > 0:
        where = "the mask (or the batch) is empty" if count is None else "count= is the number over the whole optimiser step"
        raise ValueError(f"a mean over {chosen:g} entries: {where}; pass a batch with at least one entry that counts")
    return chosen


def masked_mean(x: Tensor, mask: Tensor, *, count: float | None = None) -> Tensor:
    """sum(x where mask) / count: the mean over what counts; entries outside the mask may hold anything, NaN included.

    Shapes: x and mask equal, any; result a float32 scalar in the units of x.
    count: the divisor; None = mask.sum(). With the count of the whole optimiser step, the results of its micro-batches (and ranks) add
        up to the mean over the step, whatever the split; an empty micro-batch then adds 0.
    Errors: ValueError when the mask is empty and count is None.
    """
    return torch.where(mask, x.float(), 0.0).sum() / divisor(mask.sum() if count is None else 0, count)


def whiten(x: Tensor, mask: Tensor, keep_mean: bool = False, unbiased: bool = False) -> Tensor:
    """(x - mu) * rsqrt(var + 1e-8), plus mu when the mean is kept; mu and var are over the mask, and the result is 0 outside it.

    Shapes: x and mask equal, any; result float32.
    keep_mean: True leaves the mean where it was and only scales the spread; False leaves a mean of 0.
    unbiased: divide the variance by n - 1; False (by n) as SFD ppo.py and Ziegler et al. do, TRL's default is True.
    Errors: ValueError when the mask holds nothing, or one entry with unbiased.
    """
    n = int(mask.sum())
    mean = masked_mean(x, mask)
    var = masked_mean((x.float() - mean).square(), mask, count=n - 1 if unbiased else n)
    return torch.where(mask, (x.float() - mean) * torch.rsqrt(var + EPSILON) + (mean if keep_mean else 0.0), 0.0)


def last_index(mask: Tensor) -> Tensor:
    """Index of the last True of each row: an index, not a length.

    Shapes: mask (N, R); result (N,) int64 in 0..R-1.
    Errors: ValueError that names the rows without any True.
    """
    last = (mask.flip(-1).cumsum(-1) > 0).sum(-1) - 1
    if bool((last < 0).any()):
        rows = (last < 0).nonzero().flatten().tolist()
        raise ValueError(f"rows {rows[:8]} have no token that counts (mask all False); every row needs at least one, the EOS for example")
    return last


def through_first(hits: Tensor) -> Tensor:
    """The mask that keeps each row up to and including its first hit, and the whole row where there is none.

    Shapes: hits (N, R) bool (an EOS, say); result (N, R) bool.
    """
    return hits.cumsum(-1) - hits.long() == 0
