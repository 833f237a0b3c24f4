"""What the points say: gains in units of SFT's spread, Gao et al.'s fits, where proxy and gold part, and what gold would pick."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_rlhf.frontier.points import Point
from lit_rlhf.functional import best_of_n_kl, best_of_n_mean, fit_law, grouped_mean
from lit_rlhf.functional.best_of_n import Law
from lit_rlhf.functional.statistics import Estimate

REWARDS = ("proxy", "gold")


@dataclass(frozen=True)
class Scale:
    """The zero and the unit of a reward: mean and standard deviation over the SFT policy's own samples."""

    mean: float
    std: float


@dataclass
class Mark:
    """One point of the picture: a setting after an iteration, or best-of-n."""

    setting: str
    iteration: int
    """Iterations learnt, or n."""
    kl: float
    gains: dict[str, Estimate] = field(default_factory=dict)
    """By reward, in its standard deviations over SFT samples; 0 is SFT."""
    length: float = math.nan

    @property
    def distance(self) -> float:
        """sqrt(KL), KL below 0 (noise) taken as 0."""
        return math.sqrt(max(self.kl, 0.0))


def scales(samples: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, Scale]:
    """Of the SFT policy's samples, (M, n) lists by reward."""
    tensors = {name: torch.tensor(values, dtype=torch.double) for name, values in samples.items()}
    return {name: Scale(float(x.mean()), max(float(x.std(unbiased=False)), 1e-9)) for name, x in tensors.items()}


def own_scales(points: Sequence[Point]) -> dict[str, Scale]:
    """Of a run whose policy or reward is not that of the others: over its own first point, SFT before the first iteration."""
    return scales({name: [getattr(points[0], name)] for name in REWARDS if getattr(points[0], name)})


def best_of_n_marks(samples: Mapping[str, Sequence[Sequence[float]]], scale: Mapping[str, Scale]) -> list[Mark]:
    """Best-of-n for n = 1, 2, 4, … up to all samples, chosen by the proxy."""
    proxy = torch.tensor(samples["proxy"], dtype=torch.double)
    sizes = [2**k for k in range(proxy.shape[1].bit_length()) if 2**k <= proxy.shape[1]]
    marks = []
    for n in sizes:
        gains = {}
        for name in samples:
            worth = best_of_n_mean(proxy, torch.tensor(samples[name], dtype=torch.double), n)
            gains[name] = grouped_mean((worth - scale[name].mean) / scale[name].std)
        marks.append(Mark("best of n", n, best_of_n_kl(n), gains))
    return marks


def run_marks(setting: str, points: Sequence[Point], scale: Mapping[str, Scale]) -> list[Mark]:
    """A run's points as marks."""
    marks = []
    for point in points:
        gains = {name: grouped_mean(_gain(point, name, scale)) for name in REWARDS if getattr(point, name)}
        length = sum(point.length) / max(len(point.length), 1)
        marks.append(Mark(setting, point.iteration, sum(point.kl) / len(point.kl), gains, length))
    return marks


def _gain(point: Point, reward: str, scale: Mapping[str, Scale]) -> Tensor:
    return (torch.tensor(getattr(point, reward), dtype=torch.double) - scale[reward].mean) / scale[reward].std


def laws(marks: Sequence[Mark], form: str) -> dict[str, Law]:
    """Gao et al.'s law for each reward, fitted to all marks; a reward with fewer than two distances has none."""
    found = {}
    for reward in REWARDS:
        known = [(m.distance, m.gains[reward].mean) for m in marks if reward in m.gains]
        if len({d for d, _ in known if d > 0}) >= 2:
            found[reward] = fit_law([d for d, _ in known], [g for _, g in known], form)  # type: ignore[arg-type]
    return found


@dataclass
class Parting:
    """Where proxy and gold part along one run."""

    setting: str
    best: int
    """The iteration that gold likes best."""
    best_kl: float
    best_gold: Estimate
    parted: int | None
    """The first later iteration whose gold is lower beyond the noise while its proxy is not; None where there is none."""
    parted_kl: float | None
    lost: Estimate | None
    """Gold at the best iteration minus gold at the last, on the same prompts, in standard deviations."""
    proxy_gain: Estimate | None
    """Proxy at the last iteration minus proxy at gold's best."""


def parting(setting: str, points: Sequence[Point], scale: Mapping[str, Scale]) -> Parting | None:
    """None where there is no gold reward or no point after the first."""
    if len(points) < 2 or not points[0].gold:
        return None
    best = max(points, key=lambda p: sum(p.gold))
    golds, proxies = (_gain(best, name, scale) for name in ("gold", "proxy"))
    parted = None
    for point in (p for p in points if p.iteration > best.iteration):
        lost, gained = grouped_mean(golds - _gain(point, "gold", scale)), grouped_mean(_gain(point, "proxy", scale) - proxies)
        if parted is None and lost.low > 0 and gained.mean >= 0:
            parted = point
    last = points[-1] if points[-1].iteration > best.iteration else None
    kl = lambda point: sum(point.kl) / len(point.kl)  # noqa: E731
    return Parting(
        setting,
        best.iteration,
        kl(best),
        grouped_mean(golds),
        None if parted is None else parted.iteration,
        None if parted is None else kl(parted),
        None if last is None else grouped_mean(golds - _gain(last, "gold", scale)),
        None if last is None else grouped_mean(_gain(last, "proxy", scale) - proxies),
    )
