"""Where a run's rounds keep what they made. Every file is whole or absent, so that nothing is made twice and nothing half made is read."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_rlhf.ai_feedback.labels import comparison
from lit_rlhf.data.schemas import PAIR_SCHEMAS, Example, examples
from lit_rlhf.data.sources import open_source, pick

Row = dict[str, Any]


@dataclass(frozen=True)
class Round:
    """One round's files, below the run's folder."""

    out: Path
    number: int
    """From 1."""

    @property
    def folder(self) -> Path:
        return self.out / f"round-{self.number}"

    @property
    def responses(self) -> Path:
        """One row a prompt: its responses, each with the policy that wrote it."""
        return self.folder / "responses.jsonl"

    @property
    def pairs(self) -> Path:
        """The pairs that were chosen to be labelled."""
        return self.folder / "pairs.jsonl"

    @property
    def to_label(self) -> Path:
        """The same for people: without the names of the policies."""
        return self.folder / "to_label.jsonl"

    @property
    def labelled(self) -> Path:
        """What people hand back."""
        return self.folder / "labelled.jsonl"

    @property
    def labels(self) -> Path:
        """The pairs with `preferred`, the probability that the first is the better one; None where nobody said."""
        return self.folder / "labels.jsonl"

    @property
    def comparisons(self) -> Path:
        """What this round's reward models learn from: the labels of all rounds so far, as a PairwiseDataModule reads them."""
        return self.folder / "comparisons.jsonl"

    @property
    def held_out(self) -> Path:
        """The labels of all rounds so far that no reward model learns from."""
        return self.folder / "held_out.jsonl"

    def reward(self, member: int) -> Path:
        """The folder of one reward model's run."""
        return self.folder / f"reward-{member}"

    @property
    def ppo(self) -> Path:
        """The folder of PPO's run."""
        return self.folder / "ppo"

    @property
    def evaluation(self) -> Path:
        return self.folder / "evaluation.json"

    @property
    def before(self) -> "Round | None":
        return Round(self.out, self.number - 1) if self.number > 1 else None

    @property
    def so_far(self) -> list["Round"]:
        """The rounds up to this one."""
        return [Round(self.out, number) for number in range(1, self.number + 1)]


def write_json(path: Path, content: Any) -> None:
    """JSON, whole or not at all."""
    _replace(path, json.dumps(content, ensure_ascii=False) + "\n")


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object a line, whole or not at all."""
    _replace(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))


def read_rows(path: Path) -> list[Row]:
    """What `write_rows` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    with new.open("w", encoding="utf-8", errors="replace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def write_comparisons(now: Round, earlier: Sequence[Row]) -> tuple[int, int]:
    """Writes all labels so far for this round's reward models, after `earlier` rows; how many pairs train and how many are held out.

    A round's labels of one prompt are one row, so that each response is computed once. Raises ValueError where there is none to train on.
    """
    rows, held_out = list(earlier), list[Row]()
    for known in now.so_far:
        labels = [row for row in read_rows(known.labels) if row["preferred"] is not None]
        rows += by_prompt([row for row in labels if not row["held_out"]], known.number)
        for row in (row for row in labels if row["held_out"]):
            named = {"policies": "--".join(sorted(row["policies"])), "round": known.number, "id": row["id"]}
            held_out.append(comparison(row["prompt"], row["first"], row["second"], row["preferred"], **named))
    if not rows:
        raise ValueError(f"{now.labels}: no pair of it or of an earlier round has a label to train on; label more pairs")
    write_rows(now.comparisons, rows)
    write_rows(now.held_out, held_out)
    return sum(len(row["pairs"]) for row in rows), len(held_out)


def by_prompt(labels: Sequence[Row], number: int) -> list[Row]:
    """A round's labelled pairs, one row a prompt: its responses, and the pairs of them, the likelier one first, with their targets."""
    rows: dict[str, Row] = {}
    for label in labels:
        made = rows.setdefault(label["prompt"], {"prompt": label["prompt"], "responses": [], "pairs": [], "target": [], "round": number})
        likelier, other = (label["first"], label["second"]) if label["preferred"] >= 0.5 else (label["second"], label["first"])
        made["responses"] += [text for text in (likelier, other) if text not in made["responses"]]
        made["pairs"].append([made["responses"].index(likelier), made["responses"].index(other)])
        made["target"].append(max(label["preferred"], 1 - label["preferred"]))
    return list(rows.values())


def earlier_comparisons(path: str | None) -> list[Row]:
    """The rows of a file of comparisons in any form that a PairwiseDataModule knows; [] for None. Raises the first bad row's error."""
    if path is None:
        return []
    rows: list[Row] = []
    part = pick(open_source(path), "train", path, "--comparisons")
    for found in examples(part.rows(), path, PAIR_SCHEMAS):
        if not isinstance(found, Example):
            raise found
        row = {"prompt": found.prompt, "responses": found.responses, "pairs": found.pairs, "round": 0}
        rows.append(row | {"target": found.target or [1.0] * len(found.pairs)} | ({} if found.margin is None else {"margin": found.margin}))
    return rows
