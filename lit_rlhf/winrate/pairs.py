"""Two files of predictions joined by prompt."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHOWN = 60  # characters of a prompt in an error


@dataclass
class Pair:
    """One prompt with a response of each side, and the columns of the first side's row."""

    prompt: str
    first: str
    second: str
    columns: dict[str, Any]
    number: int
    """Of the prompt: pairs of one prompt share it."""


def read_predictions(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file that `predict` wrote; ValueError with file and line for what is no such row, FileNotFoundError without a file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `lit-rlhf predict` writes predictions.jsonl into trainer.default_root_dir")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: no JSON ({error}); the file is damaged or cut off: write it again") from None
        for name in ("prompt", "response"):
            if not isinstance(row, dict) or not isinstance(row.get(name), str):
                has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise ValueError(f'{path}:{number}: no text in the field "{name}" (has: {has}); give what `predict` writes')
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows; check that `predict` ended")
    return rows


def join(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]], names: Sequence[str], common: bool = False) -> list[Pair]:
    """The rows that have the same prompt, in the order of the first file; the k-th of several with one prompt goes with the k-th.

    Raises ValueError where a prompt stands in one file alone, or more often in one, unless `common` leaves such rows out; and where no
    prompt stands in both.
    """
    sides: list[dict[str, list[dict[str, Any]]]] = [defaultdict(list), defaultdict(list)]
    for side, rows in zip(sides, (first, second), strict=True):
        for row in rows:
            side[row["prompt"]].append(row)
    both = [prompt for prompt in sides[0] if prompt in sides[1]]
    if not both:
        one, other = (next(iter(side))[:SHOWN] for side in sides)
        raise ValueError(
            f"{names[0]} and {names[1]} share no prompt (they begin with {one!r} and {other!r}): predict both on the same data"
        )
    odd = [p for p in {**sides[0], **sides[1]} if len(sides[0].get(p, ())) != len(sides[1].get(p, ()))]
    if odd and not common:
        counts = [len(side.get(odd[0], ())) for side in sides]
        raise ValueError(
            f"{len(odd)} prompts do not stand in both files equally often: {odd[0][:SHOWN]!r} {counts[0]} times in {names[0]}, "
            f"{counts[1]} in {names[1]}; predict both on the same data, or compare what they share with --common"
        )
    return [
        Pair(prompt, a["response"], b["response"], {k: v for k, v in a.items() if k not in ("prompt", "response")}, number)
        for number, prompt in enumerate(both)
        for a, b in zip(sides[0][prompt], sides[1][prompt], strict=False)
    ]
