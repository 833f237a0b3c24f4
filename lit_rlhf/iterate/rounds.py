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
    """Writes all labels so far for this round's reward models, after `earlier` ones; how many train and how many are held out.

    Raises ValueError where there is none to train on.
    """
    parts: dict[bool, list[Row]] = {False: list(earlier), True: []}
    for known in now.so_far:
        for row in read_rows(known.labels):
            if row["preferred"] is not None:
                policies = "--".join(sorted(row["policies"]))
                made = comparison(
                    row["prompt"], row["first"], row["second"], row["preferred"], policies=policies, round=known.number, id=row["id"]
                )
                parts[row["held_out"]].append(made)
    if not parts[False]:
        raise ValueError(f"{now.labels}: no pair of it or of an earlier round has a label to train on; label more pairs")
    write_rows(now.comparisons, parts[False])
    write_rows(now.held_out, parts[True])
    return len(parts[False]), len(parts[True])


def earlier_comparisons(path: str | None) -> list[Row]:
    """The pairs of a file of comparisons in any form that a PairwiseDataModule knows; [] for None. Raises the first bad row's error."""
    if path is None:
        return []
    rows: list[Row] = []
    part = pick(open_source(path), "train", path, "--comparisons")
    for found in examples(part.rows(), path, PAIR_SCHEMAS):
        if not isinstance(found, Example):
            raise found
        for number, (i, j) in enumerate(found.pairs):
            target = 1.0 if found.target is None else found.target[number]
            rows.append(comparison(found.prompt, found.responses[i], found.responses[j], target, policies="earlier", round=0))
            rows[-1] |= {} if found.margin is None else {"margin": found.margin[number]}
    return rows
