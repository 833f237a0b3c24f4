"""Reports in TensorBoard, and the curves that a run left there."""

from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter

from lit_rlhf.report.draw import draw
from lit_rlhf.report.figures import Bars, Plot, has_points
from lit_rlhf.report.page import Report, Table, Text, cell, digits_of
from lit_rlhf.report.raster import raster
from lit_rlhf.report.text import as_markdown

SUFFIX = ".report"  # of the event files that `publish` writes


def publish(report: Report, folder: Path) -> Path:
    """Writes report.html, report.json and TensorBoard events into `folder`, in place of older ones; returns the page's path."""
    path = report.write(folder)
    for old in folder.glob(f"events.out.tfevents.*{SUFFIX}"):
        old.unlink()
    with SummaryWriter(str(folder), filename_suffix=SUFFIX) as writer:
        add_report(writer, report, 0)
    return path


def add_report(writer: Any, report: Report, step: int) -> None:
    """Writes the report's figures as images, its tables and paragraphs as text; samples stay in report.html.

    writer: torch.utils.tensorboard's SummaryWriter, e.g. `logger.experiment`. Tags are report/<section>/<title>.
    """
    for section in report.sections:
        for number, block in enumerate(section.blocks):
            tag = f"report/{section.title}/{getattr(block, 'title', '') or number}"
            if isinstance(block, Plot | Bars) and has_points(block):
                writer.add_image(tag, raster(draw(block)), step, dataformats="HWC")
            elif isinstance(block, Table):
                writer.add_text(tag, markdown(block), step)
            elif isinstance(block, Text):
                writer.add_text(tag, as_markdown(block.text), step)


def markdown(table: Table) -> str:
    """The table in Markdown, with its note; every text shows as it is."""
    rows = [[cell(value, digits_of(table, name)) for name, value in zip(table.columns, row, strict=True)] for row in table.rows]
    shown = [list(table.columns), *rows]
    lines = ["| " + " | ".join(map(as_markdown, row)) + " |" for row in shown]
    return "\n".join([lines[0], "|" + " --- |" * len(table.columns), *lines[1:], "", as_markdown(table.note)])


def read_curves(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Every scalar of the newest TensorBoard log below `folder`: tag -> (step, value); empty where there is none."""
    files = sorted(folder.rglob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime)
    if not files:
        return {}
    events = EventAccumulator(str(files[-1].parent), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
