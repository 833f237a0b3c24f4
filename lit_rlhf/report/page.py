"""A report: sections of texts, figures, tables and samples, written as one report.html that loads nothing, and as report.json.

Every text is data and is escaped; `Markup` alone is HTML that its maker has escaped.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from lit_rlhf.functional.statistics import Estimate
from lit_rlhf.report.figures import Bars, Plot
from lit_rlhf.report.style import STYLE
from lit_rlhf.report.svg import svg
from lit_rlhf.report.text import html

SAMPLES_WARNING = (
    "Written by models or taken from the data. A model writes what it was trained on: it may be false, offensive, private or dangerous. "
    "Nobody checked these texts."
)
LONG = 40  # characters of a cell that is broken into lines


@dataclass(frozen=True)
class Text:
    """A paragraph; `soft` for a side remark."""

    text: str
    soft: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells: texts, whole numbers, floats, booleans, None (empty) and `Estimate`s.

    Args:
        digits: behind the point, for floats and Estimates; a mapping gives them by column.
        status: the column whose words pass, warn and fail are coloured.
        note: what the table says, below it.
        folded: only a line that opens it is shown at first, for long tables.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    digits: int | Mapping[str, int] = 3
    status: str | None = None
    note: str = ""
    folded: bool = False

    def __post_init__(self) -> None:
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.title!r}: row {i} has {len(row)} cells for {len(self.columns)} columns")


class Answer(NamedTuple):
    """One text of a sample: who wrote it, what it is, and its number (a score) if it has one."""

    name: str
    text: str
    number: float | None = None


@dataclass(frozen=True)
class Sample:
    """A prompt with what was answered; `title` is shown bold before the prompt."""

    prompt: str
    answers: Sequence[Answer]
    title: str = ""


@dataclass(frozen=True)
class Samples:
    """Samples under a line that warns that models write what they were trained on.

    Args:
        number: what the answers' numbers are, with their unit.
    """

    samples: Sequence[Sample]
    number: str = ""


@dataclass(frozen=True)
class Markup:
    """HTML that its maker has escaped, and the same as data for report.json."""

    html: str
    data: Any = None


Block = Text | Plot | Bars | Table | Samples | Markup


@dataclass
class Section:
    """A heading with what stands below it."""

    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass
class Report:
    """What a page holds. `lead` stands below its title, `data` beside the sections in report.json."""

    title: str
    lead: str = ""
    sections: list[Section] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def add(self, title: str, *blocks: Block) -> Section:
        """Appends a section and returns it."""
        self.sections.append(Section(title, list(blocks)))
        return self.sections[-1]

    def write(self, folder: Path | str) -> Path:
        """Writes report.html and report.json into `folder` (made if absent); returns the path of report.html."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "report.json", json.dumps(as_data(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        _replace(folder / "report.html", page(self))
        return folder / "report.html"


def page(report: Report) -> str:
    """The report as one HTML file that loads nothing from elsewhere and runs no script."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html(report.title)}</title>'
    body = [f"<h1>{html(report.title)}</h1>", f'<p class="soft">{html(report.lead)}</p>' if report.lead else ""]
    for section in report.sections:
        body += [f"<h2>{html(section.title)}</h2>", *_blocks(section.blocks)]
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def as_data(report: Report) -> dict[str, Any]:
    """The report as plain JSON data: `data`'s keys, then title, lead and sections; what is not finite is null."""
    sections = [{"title": s.title, "blocks": [_block_data(block) for block in s.blocks]} for s in report.sections]
    return {**plain(report.data), "title": report.title, "lead": report.lead, "sections": sections}


def _block_data(block: Block) -> dict[str, Any]:
    return {"kind": type(block).__name__.lower(), **{name: value for name, value in plain(block).items() if name != "html"}}


def plain(value: Any) -> Any:
    """The value as JSON has it: dataclasses and named tuples as objects, tensors as lists, NaN and infinity as null."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate is no Unicode text
    return value if value is None or isinstance(value, bool | int) else str(value)


def cell(value: Any, digits: int) -> str:
    """A table's cell as text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, Estimate):
        return f"{value.mean:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.{digits}f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def digits_of(table: Table, column: str) -> int:
    return table.digits if isinstance(table.digits, int) else table.digits.get(column, 3)


def _blocks(blocks: Sequence[Block]) -> Iterator[str]:
    """Each block's HTML; figures that follow each other share a grid."""
    for figures, group in groupby(blocks, key=lambda block: isinstance(block, Plot | Bars)):
        if figures:
            drawn = [_figure(block) for block in group if isinstance(block, Plot | Bars)]
            yield f'<div class="figures">{"".join(drawn)}</div>' if any(drawn) else ""
        else:
            yield from map(_block, group)


def _figure(figure: Plot | Bars) -> str:
    drawn = svg(figure)
    note = f"<figcaption>{html(figure.note)}</figcaption>" if figure.note else ""
    return f"<figure>{drawn}{note}</figure>" if drawn else ""


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p{_class('soft' * block.soft)}>{html(block.text)}</p>"
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Samples):
        number = f" The numbers are {html(block.number)}." if block.number else ""
        return f'<p class="soft">{html(SAMPLES_WARNING)}{number}</p>' + "".join(map(_sample, block.samples))
    return block.html if isinstance(block, Markup) else ""


def _table(table: Table) -> str:
    words = [any(isinstance(row[i], str) for row in table.rows) for i in range(len(table.columns))]
    head = "".join(f"<th{_class('words' * w)}>{html(name)}</th>" for name, w in zip(table.columns, words, strict=True))
    rows = []
    for row in table.rows:
        cells = []
        for name, value, left in zip(table.columns, row, words, strict=True):
            shown = cell(value, digits_of(table, name))
            classes = ["words"] * left + ["long"] * (isinstance(value, str) and len(shown) > LONG)
            classes += [shown] if name == table.status and shown in ("pass", "warn", "fail") else []
            cells.append(f"<td{_class(*classes)}>{html(shown)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    title = f"<h3>{html(table.title)}</h3>" if table.title and not table.folded else ""
    note = f'<p class="soft">{html(table.note)}</p>' if table.note else ""
    shown = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>{note}'
    return title + (
        f"<details><summary>{html(table.title or 'table')}, {len(rows):,} rows</summary>{shown}</details>" if table.folded else shown
    )


def _class(*names: str) -> str:
    """The attribute for these classes; nothing for none."""
    return f' class="{" ".join(names)}"' if any(names) else ""


def _sample(sample: Sample) -> str:
    title = f"<b>{html(sample.title)}</b> " if sample.title.strip() else ""
    lines = []
    for answer in sample.answers:
        shown = "" if answer.number is None else f"{answer.number:.2f}"
        lines.append(f'<dt>{html(answer.name)}</dt><dd class="number">{shown}</dd><dd>{html(answer.text)}</dd>')
    return f"<article><p>{title}{html(sample.prompt)}</p><dl>{''.join(lines)}</dl></article>"


def _replace(path: Path, text: str) -> None:
    """Writes the file whole: a reader sees the old one or the new one."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
