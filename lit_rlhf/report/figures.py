"""Figures as data: what is plotted, without a word on how it is drawn (`draw.py`)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """Points of one name and colour.

    Args:
        low, high: the interval of each y, as long as y: a band around a line, whiskers on points.
        kind: "line", "dashed", "points", or "columns", whose x holds the len(y) + 1 edges of the columns.
        hints: what a pointer over each point is told; default its numbers.
        like: the name of an earlier series whose colour it takes, e.g. of the points that a curve was fitted to.
        labels: written beside each of `points`; "" writes nothing.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    kind: Literal["line", "dashed", "points", "columns"] = "line"
    hints: Sequence[str] | None = None
    like: str | None = None
    labels: Sequence[str] | None = None

    def __post_init__(self) -> None:
        wanted = len(self.y) + (self.kind == "columns")
        if len(self.x) != wanted:
            raise ValueError(f"series {self.name!r}: {len(self.x)} x for {len(self.y)} y of kind {self.kind!r}; give {wanted}")
        for what, values in (("low", self.low), ("high", self.high), ("hints", self.hints), ("labels", self.labels)):
            if values is not None and len(values) != len(self.y):
                raise ValueError(f"series {self.name!r}: {len(values)} {what} for {len(self.y)} y; give as many")
        if (self.low is None) != (self.high is None):
            raise ValueError(f"series {self.name!r}: an interval needs both low and high")


@dataclass(frozen=True)
class Plot:
    """Series over one pair of axes. Labels say the unit.

    Args:
        levels: dashed horizontal lines by name, e.g. {"chance": 0.5}.
        diagonal: y = x, dashed, as in a reliability diagram.
        x_log: a logarithmic x axis; every x is then above 0.
        x_range, y_range: what the axes hold at least; default the data and the levels.
        note: what the figure says, below it.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    levels: Mapping[str, float] = field(default_factory=dict)
    diagonal: bool = False
    x_log: bool = False
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    note: str = ""


@dataclass(frozen=True)
class Bars:
    """A horizontal bar per name, for values of groups.

    Args:
        label: of the values' axis, with its unit.
        low, high: the interval of each value.
        texts: written at each bar's right, e.g. "0.71 of 120".
        levels: dashed vertical lines by name.
        range: what the values' axis holds at least; default 0, the values and the levels.
    """

    title: str
    label: str
    names: Sequence[str]
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    texts: Sequence[str] | None = None
    levels: Mapping[str, float] = field(default_factory=dict)
    range: tuple[float, float] | None = None
    note: str = ""

    def __post_init__(self) -> None:
        for what, values in (("values", self.values), ("low", self.low), ("high", self.high), ("texts", self.texts)):
            if values is not None and len(values) != len(self.names):
                raise ValueError(f"bars {self.title!r}: {len(values)} {what} for {len(self.names)} names; give as many")
        if (self.low is None) != (self.high is None):
            raise ValueError(f"bars {self.title!r}: an interval needs both low and high")


def lines(
    title: str, x_label: str, y_label: str, curves: Mapping[str, Points], levels: Mapping[str, float] | None = None, note: str = ""
) -> Plot:
    """A line for each of `curves`, name -> (x, y) points."""
    series = [Series(name, [x for x, _ in points], [y for _, y in points]) for name, points in curves.items()]
    return Plot(title, x_label, y_label, series, levels=levels or {}, note=note)


def histogram(title: str, x_label: str, samples: Mapping[str, Sequence[float]], bins: int = 30, note: str = "") -> Plot:
    """Each sample's share of its values in `bins` columns of equal width, the same for all; values that are not finite are left out."""
    kept = {name: [v for v in values if math.isfinite(v)] for name, values in samples.items()}
    values = [v for part in kept.values() for v in part] or [0.0]
    low, high = min(values), max(values)
    width = (high - low) / bins or 1.0 / bins  # where all values are equal: one column of a span of 1
    series = []
    for name, part in kept.items():
        counts = [0] * bins
        for v in part:
            counts[min(int((v - low) / width), bins - 1)] += 1
        if part:
            series.append(Series(name, [low + width * i for i in range(bins + 1)], [c / len(part) for c in counts], kind="columns"))
    return Plot(title, x_label, "share", series, y_range=(0, 0), note=note)


def smoothed(points: Points, window: int) -> list[tuple[float, float]]:
    """Each y as the mean of the last `window` ones."""
    return [(x, sum(y for _, y in points[max(0, i + 1 - window) : i + 1]) / min(i + 1, window)) for i, (x, _) in enumerate(points)]


def has_points(figure: Plot | Bars) -> bool:
    """Whether there is anything finite to draw."""
    values: Iterable[float] = figure.values if isinstance(figure, Bars) else (v for s in figure.series for v in s.y)
    return any(math.isfinite(v) for v in values)
