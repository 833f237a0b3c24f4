"""Who says which response is better: an exact reward, a judge, or people, who hand back a file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_rlhf.ai_feedback.labels import soft_label
from lit_rlhf.iterate.rounds import Round, Row, read_rows, write_rows
from lit_rlhf.scorers import load_scorer
from lit_rlhf.winrate.judges import load_judge
from lit_rlhf.winrate.pairs import Pair

ANSWERS = {"first": 1.0, "second": 0.0, "tie": 0.5}
CARE = 0x4958  # key of a careless labeller's draws


class Waiting(Exception):
    """A round that goes on when people have labelled its pairs."""


def by_gold(
    gold: Any, pairs: Sequence[Row], columns: dict[int, dict[str, Any]], care: float | None, key: Sequence[int], device: str = "cpu"
) -> list[float]:
    """1, 0 or 0.5 for each pair, by the reward `gold` names; with `care` a draw, the first with probability sigmoid(care x difference).

    columns: what the data knows of each row, which a reward function may ask for.
    """
    scorer, prompts = load_scorer(gold).to(device), [pair["prompt"] for pair in pairs]
    names = dict.fromkeys(name for found in columns.values() for name in found)
    known = {name: [columns[pair["row"]].get(name) for pair in pairs] for name in names}
    first, second = (scorer(prompts, [pair[side] for pair in pairs], known).double().cpu() for side in ("first", "second"))
    if care is None:
        return ((first > second).double() + (first == second).double() / 2).tolist()
    drawn = np.random.Generator(np.random.Philox(np.random.SeedSequence([*key, CARE]))).random(len(pairs))
    return (torch.from_numpy(drawn) < torch.sigmoid(care * (first - second))).double().tolist()


def by_judge(judge: Any, pairs: Sequence[Row], columns: dict[int, dict[str, Any]], device: str) -> list[float | None]:
    """The probability that the first is better, by a judge as in `lit-rlhf winrate`: both orders averaged; None without an answer."""
    asked = [Pair(p["prompt"], p["first"], p["second"], columns[p["row"]], p["row"]) for p in pairs]
    return [soft_label(verdict) for verdict in load_judge(judge, device=device)(asked)]


def by_people(now: Round, pairs: Sequence[Row]) -> list[float | None]:
    """What people say in the round's `labelled.jsonl`; None for a pair that they left open.

    Without that file, writes `to_label.jsonl` for them and raises Waiting. Raises ValueError, with file and line, for what is no answer.
    """
    if not now.labelled.is_file():
        shown = [{name: pair[name] for name in ("id", "prompt", "first", "second")} | {"preferred": None} for pair in pairs]
        write_rows(now.to_label, shown)
        raise Waiting(
            f"round {now.number} waits for labels: fill in `preferred` (first, second, tie, or a probability of the first) in the "
            f"{len(shown)} rows of {now.to_label}, save them as {now.labelled}, and give the same command again"
        )
    said = _read_people(now.labelled, {pair["id"] for pair in pairs})
    return [said.get(pair["id"]) for pair in pairs]


def _read_people(path: Path, ids: set[str]) -> dict[str, float]:
    """id -> probability that the first is better, of the rows that were answered."""
    said: dict[str, float] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, answer = row["id"], row["preferred"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{path}:{number}: not an object with "id" and "preferred"; keep the rows of to_label.jsonl') from None
        if name not in ids:
            raise ValueError(f"{path}:{number}: no pair of this round has the id {name!r}; fill in this round's to_label.jsonl")
        if name in said:
            raise ValueError(f"{path}:{number}: the pair {name} is answered twice; keep one of the two")
        if answer is None or answer == "":
            continue
        value = ANSWERS.get(answer.strip().lower()) if isinstance(answer, str) else answer
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(f"{path}:{number}: `preferred` is {answer!r}; give first, second, tie, or a number from 0 to 1")
        said[name] = float(value)
    return said


def label(now: Round, options: Any, key: Sequence[int], device: str) -> list[Row]:
    """The round's pairs with `preferred`, by whoever the options name; also writes them. Raises ValueError where nobody answered any."""
    pairs = read_rows(now.pairs)
    columns = {row["row"]: row["columns"] for row in read_rows(now.responses)}
    if options.gold:
        answers: Sequence[float | None] = by_gold(options.gold, pairs, columns, options.care, key, device)
    elif options.judge:
        answers = by_judge(options.judge, pairs, columns, device)
    else:
        answers = by_people(now, pairs)
    if all(answer is None for answer in answers):
        who = f"the judge {options.judge}" if options.judge else str(now.labelled)
        raise ValueError(f"round {now.number}: {who} answered none of {len(pairs)} pairs; without labels there is nothing to learn")
    rows = [pair | {"preferred": answer} for pair, answer in zip(pairs, answers, strict=True)]
    write_rows(now.labels, rows)
    return rows
