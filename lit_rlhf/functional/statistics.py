"""How sure a measured number is: intervals, calibration and correlation. Inputs are vectors of measurements, results plain numbers."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

Z95 = 1.959964  # two-sided 95% of a normal distribution


class Estimate(NamedTuple):
    """A mean with its standard error and 95% interval, in the units of what was measured."""

    mean: float
    error: float
    low: float
    high: float


def grouped_mean(x: Tensor, groups: Tensor | None = None) -> Estimate:
    """The mean of x, whose error allows for entries of one group going together (the pairs of one prompt).

    error^2 = G/(G-1) sum_g (sum_{i in g} (x_i - mean))^2 / n^2, the cluster-robust variance (Liang and Zeger 1986); with one entry a group
    it is the usual one. The interval is mean +- 1.96 error.
    Shapes: x (n,), groups (n,) int64 or None (every entry by itself). Errors: ValueError for no entries.
    """
    x = x.double()
    if len(x) == 0:
        raise ValueError("a mean over no entries: give at least one")
    mean = x.mean()
    sums = x - mean
    if groups is not None:
        _, which = torch.unique(groups, return_inverse=True)
        sums = torch.zeros(int(which.max()) + 1, dtype=torch.double).index_add(0, which, sums)
    count = len(sums)
    error = float((sums.square().sum() * count / (count - 1)).sqrt() / len(x)) if count > 1 else math.inf
    return Estimate(float(mean), error, float(mean) - Z95 * error, float(mean) + Z95 * error)


def grouped_share(hits: Tensor, groups: Tensor | None = None) -> Estimate:
    """The share of hits, with Wilson's interval (1927), which stays within 0..1 and has a width where all or none are hits.

    Its number of entries is the effective one, p(1-p)/error^2 x G/(G-1) with `grouped_mean`'s error: n where no groups are given, and
    the number of groups where all or none are hits.
    Shapes: hits (n,) bool; groups as in `grouped_mean`.
    """
    found = grouped_mean(hits.double(), groups)
    p, count = found.mean, len(hits) if groups is None else len(torch.unique(groups))
    n = p * (1 - p) / found.error**2 * count / (count - 1) if 0 < p < 1 and 0 < found.error < math.inf else float(count)
    middle, scale = p + Z95**2 / (2 * n), 1 + Z95**2 / n
    half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    return Estimate(p, found.error, (middle - half) / scale, (middle + half) / scale)


def bootstrap_mean(x: Tensor, groups: Tensor | None = None, *, draws: int = 2000, seed: int = 0) -> Estimate:
    """The mean of x with the percentile interval of `draws` bootstrap samples (Efron 1979), drawn by groups where there are such.

    Shapes: x (n,); groups as in `grouped_mean`. The same seed gives the same interval. Errors: ValueError for no entries.
    """
    x = x.double()
    if len(x) == 0:
        raise ValueError("a mean over no entries: give at least one")
    _, which = torch.unique(torch.arange(len(x)) if groups is None else groups, return_inverse=True)
    count = int(which.max()) + 1
    sums = torch.zeros(count, dtype=torch.double).index_add(0, which, x)
    sizes = torch.zeros(count, dtype=torch.double).index_add(0, which, torch.ones_like(x))
    generator, means = torch.Generator().manual_seed(seed), torch.empty(draws, dtype=torch.double)
    for i in range(draws):
        picks = torch.randint(count, (count,), generator=generator)
        means[i] = sums[picks].sum() / sizes[picks].sum()
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return Estimate(float(x.mean()), float(means.std(unbiased=False)), low, high)


class Bin(NamedTuple):
    """One bin of a reliability diagram: how many, the mean confidence in it and the share that was right."""

    size: int
    confidence: float
    accuracy: float


def confidence_bin(confidence: Tensor, bins: int = 10) -> Tensor:
    """(n,) int64: which of `bins` bins of equal width between .5 and 1 each confidence lies in; 1 lies in the last."""
    return ((confidence - 0.5) * 2 * bins).long().clamp(0, bins - 1)


def reliability(confidence: Tensor, right: Tensor, bins: int = 10) -> list[Bin]:
    """The non-empty bins of confidence between .5 and 1, of equal width, lowest first (Guo et al. 2017, for a choice between two).

    Shapes: confidence (n,) in .5..1, the probability given to the side that was chosen; right (n,) bool.
    """
    which = confidence_bin(confidence, bins)
    found = [which == i for i in range(bins)]
    return [Bin(int(m.sum()), float(confidence[m].double().mean()), float(right[m].double().mean())) for m in found if m.any()]


def calibration_error(bins: list[Bin]) -> float:
    """sum_b n_b/n |accuracy_b - confidence_b|: the expected calibration error of `reliability`'s bins (Guo et al. 2017, eq. 3)."""
    total = sum(b.size for b in bins)
    return sum(b.size / total * abs(b.accuracy - b.confidence) for b in bins)


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation; 0 where one of the two does not vary. Its square is the share of y's variance that a line in x explains.

    Shapes: (n,) both.
    """
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 1e-12 else 0.0
