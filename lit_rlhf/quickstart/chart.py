"""Line charts as inline SVG, coloured by the page's style sheet; no library and nothing loaded from elsewhere."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 26, 38  # margins around the plot, in pixels

Points = Sequence[tuple[float, float]]


@dataclass
class Chart:
    """A chart of named lines over one x axis.

    Args:
        lines: name -> (x, y) points; a line without points is left out.
        level: a dashed horizontal line and its name, e.g. a target.
    """

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Points] = field(default_factory=dict)
    level: tuple[str, float] | None = None


def svg(chart: Chart) -> str:
    """The chart as one <svg> element, or "" where no line has a point."""
    lines = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in chart.lines.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points] + ([chart.level[1]] if chart.level else [])
    x_ticks, y_ticks = ticks(min(xs), max(xs), 5), ticks(min(ys), max(ys), 4)
    low_x, high_x = min(xs), max(max(xs), min(xs) + 1e-9)
    low_y, high_y = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - low_x) / (high_x - low_x), (y - low_y) / (high_y - low_y)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [_axes(chart, [x for x in x_ticks if low_x <= x <= high_x], y_ticks, at)]
    if chart.level:
        y = at(low_x, chart.level[1])[1]
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{y - 4:.1f}" text-anchor="end">{escape(chart.level[0])}</text>')
    parts += [_line(i, points, at) for i, points in enumerate(lines.values())]
    parts.append(_legend(list(lines)) if len(lines) > 1 else "")
    label = f'role="img" aria-label="{escape(chart.title)}"'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" {label}>{"".join(parts)}</svg>'


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that enclose low..high, about so many steps apart."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= about)
    first, last = math.floor(low / step + 1e-9), max(math.ceil(high / step - 1e-9), math.floor(low / step + 1e-9) + 1)
    return [round(step * i, 10) for i in range(first, last + 1)]


def smoothed(points: Points, window: int) -> list[tuple[float, float]]:
    """Each y as the mean of the last `window` ones."""
    return [(x, sum(y for _, y in points[max(0, i + 1 - window) : i + 1]) / min(i + 1, window)) for i, (x, _) in enumerate(points)]


def _axes(chart: Chart, x_ticks: list[float], y_ticks: list[float], at) -> str:  # type: ignore[no-untyped-def]
    parts = [f'<text class="title" x="{LEFT}" y="15">{escape(chart.title)}</text>']
    for value in y_ticks:
        y = at(0, value)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 5}" y="{y + 3:.1f}" text-anchor="end">{value:g}</text>')
    for value in x_ticks:
        parts.append(f'<text class="tick" x="{at(value, 0)[0]:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{value:g}</text>')
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text class="label" x="{middle_x}" y="{HEIGHT - 6}" text-anchor="middle">{escape(chart.x_label)}</text>')
    turned = f'text-anchor="middle" transform="rotate(-90 11 {middle_y})"'
    parts.append(f'<text class="label" x="11" y="{middle_y}" {turned}>{escape(chart.y_label)}</text>')
    return "".join(parts)


def _line(number: int, points: Points, at) -> str:  # type: ignore[no-untyped-def]
    places = [at(x, y) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    marks = "".join(f'<circle class="fill{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in places) if len(places) <= 6 else ""
    return f'<polyline class="line{number}" points="{path}"/>{marks}'


def _legend(names: list[str]) -> str:
    """Right-aligned in the title's row."""
    parts, x = [], float(WIDTH - RIGHT)
    for number, name in reversed(list(enumerate(names))):
        x -= 6.2 * len(name)
        parts.append(f'<text class="tick" x="{x:.1f}" y="15">{escape(name)}</text>')
        parts.append(f'<line class="line{number}" x1="{x - 15:.1f}" x2="{x - 4:.1f}" y1="12" y2="12"/>')
        x -= 24
    return "".join(parts)
