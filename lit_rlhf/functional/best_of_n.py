"""Best-of-n: what it is worth and how far it goes from the policy it samples from, and the laws that over-optimisation follows."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1)/n nats: the KL of the best of n samples to one sample, where no two samples tie (an upper bound where some do).

    Source: Stiennon et al. 2020, G.3; Beirami et al. 2024 (arXiv:2401.01879) prove the bound.
    """
    return math.log(n) - (n - 1) / n


def best_of_n_mean(scores: Tensor, worth: Tensor, n: int) -> Tensor:
    """The expected worth of the response that `scores` likes best of n, estimated without bias from N >= n samples a prompt.

    sum_i C(i-1, n-1)/C(N, n) worth_(i), worth in the order of ascending scores: the mean over all choices of n out of the N samples (Nakano
    et al. 2021, WebGPT, appendix I). Samples of one score share its worth evenly.
    Shapes: scores, worth (M, N); result (M,) float64, one number a prompt. Errors: ValueError for n outside 1..N.
    """
    total = scores.shape[1]
    if not 1 <= n <= total:
        raise ValueError(f"the best of {n} cannot be estimated from {total} samples a prompt; n goes from 1 to {total}")
    scores, order = scores.sort(1)
    worth = worth.double().gather(1, order)
    same = (scores[:, :, None] == scores[:, None, :]).double()
    worth = (same @ worth[:, :, None]).squeeze(2) / same.sum(2)
    weights = [math.comb(i - 1, n - 1) / math.comb(total, n) for i in range(1, total + 1)]
    return worth @ torch.tensor(weights, dtype=torch.double)


class Law(NamedTuple):
    """A law of over-optimisation in d = sqrt(KL): its two coefficients, its root mean square error, and its peak."""

    form: str
    a: float
    b: float
    error: float
    peak_distance: float
    """Where the law is highest; infinite where it never turns (b <= 0)."""
    peak: float

    def __call__(self, distance: float) -> float:
        """The law's value at d = sqrt(KL); 0 at 0."""
        return distance * (self.a - self.b * (distance if self.form == "best_of_n" else math.log(distance))) if distance > 0 else 0.0


def fit_law(distance: Sequence[float], gain: Sequence[float], form: Literal["best_of_n", "rl"]) -> Law:
    """Least squares of Gao et al.'s laws: gain = d (a - b d) for best-of-n, d (a - b ln d) for RL; d = sqrt(KL), gain 0 at d = 0.

    Source: Gao, Schulman and Hilton 2022 (arXiv:2210.10760), eq. 1; the peaks are at d = a/2b and d = exp(a/b - 1).
    Errors: ValueError for fewer than two different distances above 0.
    """
    points = [(d, g) for d, g in zip(distance, gain, strict=True) if d > 0]
    if len({d for d, _ in points}) < 2:
        raise ValueError("the law has two coefficients: give the gains at two or more distances above 0")
    d, g = torch.tensor(points, dtype=torch.double).unbind(1)
    features = torch.stack([d, -d * (d if form == "best_of_n" else d.log())], 1)
    a, b = torch.linalg.lstsq(features, g[:, None]).solution.flatten().tolist()
    error = float((features @ torch.tensor([a, b], dtype=torch.double) - g).square().mean().sqrt())
    if b <= 0:
        return Law(form, a, b, error, math.inf, math.inf)
    top = a / (2 * b) if form == "best_of_n" else math.exp(min(a / b - 1, 700.0))
    return Law(form, a, b, error, top, a * a / (4 * b) if form == "best_of_n" else b * top)
