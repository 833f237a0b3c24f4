"""Drawings as images, for TensorBoard, which shows no SVG. Pillow comes with tensorboard."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lit_rlhf.report.draw import Drawing, Mark
from lit_rlhf.report.style import LIGHT, LIGHT_COLOURS
from lit_rlhf.report.text import visible

SCALE = 2  # pixels of the image for each of the drawing
WIDTHS = {"line": 1.8, "dashed": 1.8, "whisker": 1.5}
OPACITY = {"band": 0.18, "column": 0.5, "dot": 0.75}
DASHES = {"dashed": (5, 4), "level": (2, 3)}
SIZES = {"title": 12, "label": 10.5}


def raster(drawing: Drawing) -> np.ndarray:
    """The drawing in the light palette, uint8 of shape (height, width, 3), twice as many pixels as the SVG has."""
    image = Image.new("RGB", (round(drawing.width * SCALE), round(drawing.height * SCALE)), LIGHT["card"])
    for mark in drawing.marks:
        _paint(image, mark)
    return np.asarray(image)


def _paint(image: Image.Image, mark: Mark) -> None:
    name = mark.style.split()[0]
    kind, colour = name.rstrip("0123456789"), _colour(name)
    points = [(x * SCALE, y * SCALE) for x, y in mark.at]
    if mark.kind == "text":
        _write(image, mark, points[0], LIGHT["text"] if kind == "title" else LIGHT["soft"], SIZES.get(kind, 10))
        return
    opaque = ImageDraw.Draw(image)
    if mark.kind == "path":
        for part in _dashes(points, DASHES[kind]) if kind in DASHES else [points]:
            opaque.line(part, fill=colour, width=round(WIDTHS.get(kind, 1) * SCALE), joint="curve")
        return
    if mark.kind == "dot":
        (x, y), r = points[0], mark.radius * SCALE
        points = [(x - r, y - r), (x + r, y + r)]
    left, top = math.floor(min(x for x, _ in points)), math.floor(min(y for _, y in points))
    mask = Image.new("L", (math.ceil(max(x for x, _ in points)) - left + 1, math.ceil(max(y for _, y in points)) - top + 1), 0)
    moved = [(x - left, y - top) for x, y in points]
    shape = ImageDraw.Draw(mask).ellipse if mark.kind == "dot" else ImageDraw.Draw(mask).polygon
    shape(moved, fill=round(255 * OPACITY.get(kind, 1.0)))
    image.paste(colour, (left, top), mask)


def _colour(name: str) -> str:
    number = name[len(name.rstrip("0123456789")) :]
    return LIGHT_COLOURS[int(number)] if number else {"grid": LIGHT["rule"]}.get(name, LIGHT["soft"])


def _dashes(points: list[tuple[float, float]], pattern: tuple[int, int]) -> list[list[tuple[float, float]]]:
    """The path's straight pieces cut into dashes; each piece begins with one."""
    parts, (on, off) = [], (pattern[0] * SCALE, pattern[1] * SCALE)
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        length = math.hypot(x1 - x0, y1 - y0)
        at = 0.0
        while at < length:
            ends = [at / length, min(at + on, length) / length]
            parts.append([(x0 + (x1 - x0) * t, y0 + (y1 - y0) * t) for t in ends])
            at += on + off
    return parts


def _write(image: Image.Image, mark: Mark, at: tuple[float, float], colour: str, size: float) -> None:
    """The words with their base line at `at`; turned ones read upwards and are centred."""
    font, text = ImageFont.load_default(size * SCALE), visible(mark.text)
    if not mark.turned:
        ImageDraw.Draw(image).text(at, text, fill=colour, font=font, anchor={"start": "ls", "middle": "ms", "end": "rs"}[mark.anchor])
        return
    left, top, right, bottom = font.getbbox(text)
    upright = Image.new("L", (math.ceil(right - left), math.ceil(bottom - top)), 0)
    ImageDraw.Draw(upright).text((-left, -top), text, fill=255, font=font)
    mask = upright.rotate(90, expand=True)
    image.paste(colour, (round(at[0] - mask.width * 0.8), round(at[1] - mask.height / 2)), mask)
