"""Drawings as inline SVG, coloured by the page's style sheet; nothing is loaded from elsewhere."""

from html import escape

from lit_rlhf.report.draw import WIDTH, Drawing, Mark, draw
from lit_rlhf.report.figures import Bars, Plot, has_points
from lit_rlhf.report.style import FIGURE_STYLE
from lit_rlhf.report.text import visible


def svg(figure: Plot | Bars, margin: float = 0) -> str:
    """The figure as one <svg> element with so many pixels around it, or "" where it has nothing to draw."""
    if not has_points(figure):
        return ""
    drawing: Drawing = draw(figure)
    label = f'role="img" aria-label="{escape(visible(drawing.title))}"'
    box = f"{-margin:g} {-margin:g} {drawing.width + 2 * margin:g} {drawing.height + 2 * margin:g}"
    return f'<svg viewBox="{box}" {label}>{"".join(map(_element, drawing.marks))}</svg>'


def standalone(figure: Plot | Bars) -> str:
    """The figure as an SVG file for a Markdown page, with its own colours for light and dark."""
    drawn = svg(figure, margin=8).replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" ', 1)
    return drawn.replace(">", f"><style>{FIGURE_STYLE}</style>", 1)


def _element(mark: Mark) -> str:
    x, y = mark.at[0]
    hint = f"<title>{escape(visible(mark.text))}</title>" if mark.text and mark.kind != "text" else ""
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in mark.at)
    if mark.kind == "path":
        return f'<polyline class="{mark.style}" points="{points}"/>'
    if mark.kind == "area":
        return f'<polygon class="{mark.style}" points="{points}">{hint}</polygon>'
    if mark.kind == "dot":
        return f'<circle class="{mark.style}" cx="{x:.1f}" cy="{y:.1f}" r="{mark.radius:g}">{hint}</circle>'
    anchor = f' text-anchor="{mark.anchor}"' if mark.anchor != "start" else ""
    turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if mark.turned else ""
    return f'<text class="{mark.style}" x="{x:.1f}" y="{y:.1f}"{anchor}{turned}>{escape(visible(mark.text))}</text>'
