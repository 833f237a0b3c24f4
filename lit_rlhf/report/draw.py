"""Figures as marks (lines, areas, dots, words at pixels), which `svg.py` writes as SVG and `raster.py` as an image."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lit_rlhf.report.figures import Bars, Plot, Series

WIDTH = 380
PLOT_HEIGHT = 156  # of the area between the axes
TITLE, LEGEND_ROW, BAR_ROW = 24, 15, 18  # heights
RIGHT = 14
LETTER = 0.6  # an average letter's width in parts of its size
TICK_SIZE = 10
NAME_LETTERS = 24  # of a bar's name; a longer one loses its middle
COLOURS = 6  # in the palette; more series begin it again
ASIDE = 4  # pixels between the whiskers of two series at one x
MARGIN = 0.025  # of the x axis at either end, where points are drawn: none lies on the edge

Point = tuple[float, float]
At = Callable[[float, float], Point]


@dataclass(frozen=True)
class Mark:
    """One thing to draw; `style` names its colour and width (an SVG class)."""

    kind: Literal["path", "area", "dot", "text"]
    style: str
    at: tuple[Point, ...]
    text: str = ""
    """The words, or what a pointer over a dot or area is told."""
    anchor: Literal["start", "middle", "end"] = "start"
    turned: bool = False
    radius: float = 2.8


@dataclass(frozen=True)
class Drawing:
    """Marks on a canvas of width x height pixels."""

    title: str
    width: float
    height: float
    marks: list[Mark]


def draw(figure: Plot | Bars) -> Drawing:
    """The figure as marks; see `has_points` for figures with nothing to draw."""
    return _draw_bars(figure) if isinstance(figure, Bars) else _draw_plot(figure)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that enclose low..high, about so many steps apart."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= about)
    first, last = math.floor(low / step + 1e-9), max(math.ceil(high / step - 1e-9), math.floor(low / step + 1e-9) + 1)
    return [float(f"{step * i:.10g}") for i in range(first, last + 1)]


def log_ticks(values: Sequence[float]) -> list[float]:
    """The values themselves if they are few, else powers of ten (and 2 and 5 times those over a short span) that lie among them."""
    values = sorted(set(values))
    if len(values) <= 8:
        return values
    first, last = math.floor(math.log10(values[0])), math.ceil(math.log10(values[-1]))
    factors = (1,) if last - first > 2 else (1, 2, 5)
    marks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    return [mark for mark in marks if values[0] <= mark <= values[-1]]


def number(value: float) -> str:
    """A tick's number, short: 12k for 12000."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / min(size, 1e3 if unit == 'k' else size):g}{unit}"
    return f"{value:g}"


def _width(text: str, size: float = TICK_SIZE) -> float:
    return LETTER * size * len(text)


def _finite(series: Series) -> Series:
    """Without the points that are not finite; columns keep theirs as 0."""
    if series.kind == "columns":
        return replace(series, y=[y if math.isfinite(y) else 0.0 for y in series.y])
    kept = [i for i, (x, y) in enumerate(zip(series.x, series.y, strict=True)) if math.isfinite(x) and math.isfinite(y)]

    def pick(values: Sequence[float] | None) -> list[float] | None:
        return None if values is None else [v if math.isfinite(v := values[i]) else series.y[i] for i in kept]

    hints, labels = (None if words is None else [words[i] for i in kept] for words in (series.hints, series.labels))
    x, y = [series.x[i] for i in kept], [series.y[i] for i in kept]
    return replace(series, x=x, y=y, low=pick(series.low), high=pick(series.high), hints=hints, labels=labels)


def _draw_plot(plot: Plot) -> Drawing:
    series = [found for s in plot.series if (found := _finite(s)).y]
    xs = [x for s in series for x in s.x] + list(plot.x_range or ())
    ys = [y for s in series for part in (s.y, s.low or (), s.high or ()) for y in part] + list(plot.levels.values())
    ys += list(plot.y_range or ()) + ([0.0] if any(s.kind == "columns" for s in series) else [])
    y_ticks = ticks(min(ys), max(ys), 5)
    low_x, high_x = min(xs), max(xs)
    x_ticks = log_ticks(xs) if plot.x_log else [x for x in ticks(low_x, high_x, 5) if low_x <= x <= high_x]
    colours = _colours(series)
    legend, legend_height = _legend([s.name for s in series], [s.kind for s in series], colours)
    top = TITLE + legend_height
    left = 24 + max(_width(number(y)) for y in y_ticks)
    right, bottom = WIDTH - RIGHT, top + PLOT_HEIGHT
    scale = math.log10 if plot.x_log else float
    begin, span = scale(low_x), (scale(high_x) - scale(low_x)) or 1.0
    free = MARGIN * span if plot.x_range is None and any(s.kind == "points" for s in series) else 0.0
    begin, span = begin - free, span + 2 * free
    low_y, high_y = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def at(x: float, y: float) -> Point:
        return left + (scale(x) - begin) / span * (right - left), bottom - (y - low_y) / (high_y - low_y) * PLOT_HEIGHT

    marks = [Mark("text", "title", ((2, 14),), plot.title), *legend]
    for y, (_, height) in ((y, at(low_x, y)) for y in y_ticks):
        marks += [Mark("path", "grid", ((left, height), (right, height)))]
        marks += [Mark("text", "tick", ((left - 5, height + 3),), number(y), "end")]
    marks += [Mark("text", "tick", ((at(x, low_y)[0], bottom + 14),), number(x), "middle") for x in x_ticks]
    marks += [Mark("text", "label", (((left + right) / 2, bottom + 31),), plot.x_label, "middle")]
    marks += [Mark("text", "label", ((11, (top + bottom) / 2),), plot.y_label, "middle", turned=True)]
    if plot.diagonal:
        low, high = max(low_x, low_y), min(high_x, high_y)
        marks += [Mark("path", "level", (at(low, low), at(high, high)))]
    for s, colour, aside in zip(series, colours, _asides(series), strict=True):
        marks += _series(s, colour, lambda x, y, aside=aside: (at(x, y)[0] + aside, at(x, y)[1]))
    marks += _levels(plot.levels, lambda y: at(low_x, y)[1], left, right)
    return Drawing(plot.title, WIDTH, bottom + 38, marks)


def _colours(series: Sequence[Series]) -> list[int]:
    """The number of each series' colour: that of the series it is `like`, else the next."""
    found: dict[str, int] = {}
    numbers, new = [], 0
    for s in series:
        numbers.append(found.get(s.like, new % COLOURS) if s.like else new % COLOURS)
        new += s.like not in found
        found.setdefault(s.name, numbers[-1])
    return numbers


def _asides(series: Sequence[Series]) -> list[float]:
    """By how many pixels each series stands beside its x, so that whiskers of several do not cover each other."""
    whiskered = [i for i, s in enumerate(series) if s.kind == "points" and s.low is not None]
    shifts = {i: ASIDE * (k - (len(whiskered) - 1) / 2) for k, i in enumerate(whiskered)}
    return [shifts.get(i, 0.0) for i in range(len(series))]


def _levels(levels: Mapping[str, float], height: Callable[[float], float], left: float, right: float) -> list[Mark]:
    marks = []
    for name, value in levels.items():
        y = height(value)
        marks += [Mark("path", "level", ((left, y), (right, y))), Mark("text", "tick halo", ((right, y - 4),), name, "end")]
    return marks


def _series(series: Series, colour: int, at: At) -> list[Mark]:
    points = [at(x, y) for x, y in zip(series.x, series.y, strict=False)]
    if series.kind == "columns":
        edges, marks = series.x, []
        for i, y in enumerate(series.y):
            (x0, y0), (x1, y1) = at(edges[i], 0), at(edges[i + 1], y)
            hint = series.hints[i] if series.hints else f"{edges[i]:.3g} to {edges[i + 1]:.3g}: {y:.3g}"
            marks += [Mark("area", f"column{colour}", ((x0, y0), (x0, y1), (x1, y1), (x1, y0)), hint)] if y else []
        return marks
    low = [] if series.low is None else [at(x, y) for x, y in zip(series.x, series.low, strict=True)]
    high = [] if series.high is None else [at(x, y) for x, y in zip(series.x, series.high, strict=True)]
    hints = series.hints or [f"{series.name} {x:.4g}: {y:.4g}".strip() for x, y in zip(series.x, series.y, strict=True)]
    radius = 2.8 if len(points) <= 100 else 1.7
    dots = [Mark("dot", f"dot{colour}", (point,), hint, radius=radius) for point, hint in zip(points, hints, strict=True)]
    if series.kind == "points":
        return [Mark("path", f"whisker{colour}", (a, b)) for a, b in zip(low, high, strict=True)] + dots + _labels(series, points)
    marks = [Mark("area", f"band{colour}", (*low, *reversed(high)))] if len(low) > 1 else []
    marks += [Mark("path", f"{series.kind}{colour}", tuple(points))] if len(points) > 1 else []
    return marks + (dots if len(points) <= 12 else [])


def _labels(series: Series, points: Sequence[Point]) -> list[Mark]:
    """Each point's words at its right; at its left where the canvas ends before, or where an earlier point's words stand."""
    marks, taken = list[Mark](), list[tuple[float, float, float]]()
    for (x, y), text in zip(points, series.labels or (), strict=False):
        if not text:
            continue
        wide = _width(text)
        sides = [(x + 6, x + 6 + wide, "start"), (x - 6 - wide, x - 6, "end")]
        inside = [side for side in sides if side[0] >= 0 and side[1] <= WIDTH] or sides[1:]
        free = [side for side in inside if not any(abs(y - h) < TICK_SIZE and side[0] < end and begin < side[1] for begin, end, h in taken)]
        begin, end, anchor = (free or inside)[0]
        taken.append((begin, end, y))
        marks.append(Mark("text", "tick halo", ((begin if anchor == "start" else end, y + 3.5),), text, anchor))
    return marks


def _legend(names: Sequence[str], kinds: Sequence[str], colours: Sequence[int]) -> tuple[list[Mark], float]:
    """The names of two or more series in rows below the title, and the height that they take."""
    if len(names) < 2:
        return [], 4.0
    marks, x, y = [], 2.0, TITLE + 6.0
    for name, kind, colour in zip(names, kinds, colours, strict=True):
        wide = 18 + _width(name) + 12
        if x > 2 and x + wide > WIDTH:
            x, y = 2.0, y + LEGEND_ROW
        style = {"points": "dot", "columns": "column"}.get(kind, kind) + str(colour)
        if kind == "points":
            marks.append(Mark("dot", style, ((x + 7, y - 4),)))
        elif kind == "columns":
            marks.append(Mark("area", style, ((x, y - 8), (x + 13, y - 8), (x + 13, y), (x, y))))
        else:
            marks.append(Mark("path", style, ((x, y - 4), (x + 14, y - 4))))
        marks.append(Mark("text", "tick", ((x + 18, y),), name))
        x += wide
    return marks, y + 13 - TITLE


def _draw_bars(bars: Bars) -> Drawing:
    rows = [i for i, value in enumerate(bars.values) if math.isfinite(value)]
    values = [bars.values[i] for i in rows] + [v for part in (bars.low, bars.high) for v in part or () if math.isfinite(v)]
    values += [*bars.levels.values(), *(bars.range or (0.0,))]
    x_ticks = ticks(min(values), max(values), 4)
    half = NAME_LETTERS // 2
    names = [name if len(name) <= NAME_LETTERS else f"{name[: half - 1]}…{name[-half:]}" for name in bars.names]
    left = 8 + max(_width(names[i]) for i in rows)
    right = WIDTH - RIGHT - max((_width(text) + 4 for text in bars.texts or ()), default=0.0)
    top = TITLE + (16 if bars.levels else 6)
    bottom = top + BAR_ROW * len(rows) + 2
    low, high = x_ticks[0], x_ticks[-1]

    def across(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    marks = [Mark("text", "title", ((2, 14),), bars.title)]
    for value in x_ticks:
        marks += [Mark("path", "grid", ((across(value), top), (across(value), bottom)))]
        marks += [Mark("text", "tick", ((across(value), bottom + 14),), number(value), "middle")]
    marks += [Mark("text", "label", (((left + right) / 2, bottom + 31),), bars.label, "middle")]
    base = across(min(max(0.0, low), high))
    for row, i in enumerate(rows):
        y, end = top + BAR_ROW * (row + 0.5) + 1, across(bars.values[i])
        marks += [
            Mark("area", "column0", ((base, y - 6), (end, y - 6), (end, y + 6), (base, y + 6)), f"{bars.names[i]}: {bars.values[i]:.4g}")
        ]
        if bars.low is not None and bars.high is not None and math.isfinite(bars.low[i]) and math.isfinite(bars.high[i]):
            marks += [Mark("path", "whisker0", ((across(bars.low[i]), y), (across(bars.high[i]), y)))]
        marks += [Mark("text", "tick", ((left - 5, y + 3.5),), names[i], "end")]
        marks += [Mark("text", "tick", ((right + 6, y + 3.5),), bars.texts[i])] if bars.texts else []
    for name, value in bars.levels.items():
        marks += [Mark("path", "level", ((across(value), top), (across(value), bottom)))]
        marks += [Mark("text", "tick halo", ((across(value), top - 4),), name, "middle")]
    return Drawing(bars.title, WIDTH, bottom + 38, marks)
