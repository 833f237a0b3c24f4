"""SampleTable: a few prompts with what the model answers, to read along while it learns."""

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_rlhf.report.text import as_markdown, visible

ORDER = ("prompt", "response", "reference", "score", "kl")
TERMINAL_CHARACTERS = 400  # of a text in one cell of the terminal's table; a long one keeps both its ends


class SampleTable(Callback):
    """After each validation, the first `rows` of `pl_module.samples` as a TensorBoard text table and, on a terminal, as a rich table."""

    def __init__(self, rows: int = 8) -> None:
        if rows < 1:
            raise ValueError(f"SampleTable: rows must be at least 1, got {rows}")
        self.rows = rows

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        samples = list(getattr(pl_module, "samples", None) or [])[: self.rows]
        if not samples or trainer.sanity_checking or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_text"):
                logger.experiment.add_text("samples", markdown_table(samples), trainer.global_step)
        if sys.stdout.isatty():
            Console().print(rich_table(samples, title=f"step {trainer.global_step}"))


def _columns(samples: list[dict[str, Any]]) -> list[str]:
    """The known columns that any sample has, in the order of a reader."""
    return [name for name in ORDER if any(sample.get(name) is not None for sample in samples)]


def _cell(value: Any) -> str:
    """A value as printable text: control characters that a policy may sample must not reach a terminal."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}"
    return visible(str(value))


def markdown_table(samples: list[dict[str, Any]]) -> str:
    """A Markdown table in which every text shows as it is: punctuation is written as character references, line ends as <br>."""
    names = _columns(samples)
    rows = [[as_markdown(_cell(sample.get(name))) for name in names] for sample in samples]
    return "\n".join("| " + " | ".join(row) + " |" for row in [names, ["---"] * len(names), *rows])


def rich_table(samples: list[dict[str, Any]], title: str = "") -> Table:
    """The same for a terminal; texts are plain (no markup) and shortened in their middle."""
    table = Table(title=title, show_lines=True)
    for name in (names := _columns(samples)):
        table.add_column(name, justify="right" if name in ("score", "kl") else "left", overflow="fold", no_wrap=name in ("score", "kl"))
    for sample in samples:
        table.add_row(*(Text(_shorten(_cell(sample.get(name)).strip())) for name in names))
    return table


def _shorten(text: str) -> str:
    half = TERMINAL_CHARACTERS // 2
    return text if len(text) <= TERMINAL_CHARACTERS else f"{text[:half]} … {text[-half:]}"
