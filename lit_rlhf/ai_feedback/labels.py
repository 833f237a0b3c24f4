"""Pairs of responses labelled by a judge (RLAIF: Lee et al. 2023, arXiv:2309.00267; Bai et al. 2022, arXiv:2212.08073, sec. 4)."""

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from lit_rlhf.data.loader import permutation
from lit_rlhf.winrate.judges import ANSWERS, TEMPLATE, LMJudge, Verdict, fill, load_judge
from lit_rlhf.winrate.pairs import Pair

Row = dict[str, Any]
PAIRS, PRINCIPLES = 0x4149, 0x414A  # keys of what is drawn
BY_PRINCIPLE = (
    "Which of two responses to a prompt follows the principle better?\n\nPrinciple:\n{principle}\n\nPrompt:\n{prompt}\n\n"
    "Response A:\n{first}\n\nResponse B:\n{second}\n\nAnswer with A or B. The better response is Response"
)


def soft_label(verdict: Verdict) -> float | None:
    """The probability that the first response is the better one: the mean of both orders, so that a judge's liking for what stands first
    cancels; a judge that is asked once says it itself; None where an order has no answer."""
    if verdict.preferred is None or not verdict.orders:
        return verdict.preferred
    return sum(float(order) for order in verdict.orders if order is not None) / len(verdict.orders)


def comparison(prompt: Any, first: Any, second: Any, preferred: float, **columns: Any) -> Row:
    """A row that a PairwiseDataModule reads: the likelier one as `chosen`, and `target`, the probability that it is the better one."""
    chosen, rejected = (first, second) if preferred >= 0.5 else (second, first)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "target": max(preferred, 1 - preferred), **columns}


def limited(preferred: float, most: float) -> float:
    """The probability kept within 1 - most and most: a judge that is always sure teaches a reward model to be (Bai et al. 2022, 4.1)."""
    return min(max(preferred, 1 - most), most)


def read_candidates(paths: Sequence[str | Path]) -> dict[str, list[str]]:
    """The different responses to each prompt, out of rows with prompt and response, responses, or chosen and rejected.

    Raises FileNotFoundError, and ValueError with file and line for a row that is none of these.
    """
    found: dict[str, list[str]] = {}
    for path in paths:
        for where, row in read_objects(path):
            texts = row.get("responses") or [row[name] for name in ("response", "chosen", "rejected") if name in row]
            if not isinstance(row.get("prompt"), str) or not texts or not all(isinstance(t, str) for t in texts):
                raise ValueError(
                    f'{where}: no text in "prompt", or none in "response", "responses", or "chosen" and "rejected" (has: {", ".join(row)})'
                )
            known = found.setdefault(row["prompt"], [])
            known += [text for text in dict.fromkeys(texts) if text.strip() and text not in known]
    return found


def read_objects(path: str | Path) -> list[tuple[str, Row]]:
    """(file:line, object) of each line; FileNotFoundError without a file, ValueError for a line that is no object or a file without any."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give rows of JSON, such as `lit-rlhf predict` writes")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise ValueError(f"{path}:{number}: no JSON ({error}); the file is damaged or cut off: write it again") from None
        if row is not None and not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: {type(row).__name__}, not an object; give one row of JSON a line")
        rows += [] if row is None else [(f"{path}:{number}", row)]
    if not rows:
        raise ValueError(f"{path} has no rows; check that it was written to its end")
    return rows


def read_principles(path: str | Path) -> list[str]:
    """One principle a line; blank lines and those that begin with # do not count. Raises ValueError for none, or for one with fields."""
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise ValueError(f"{path} has no principle; write one a line")
    for principle in found:
        if any(name in principle for name in ("{prompt}", "{first}", "{second}", "{response}", "{critique}")):
            raise ValueError(f"{path}: the principle {principle!r} has a field of the question in it; write it as plain words")
    return found


def make_pairs(candidates: dict[str, list[str]], per_prompt: int | None, seed: int) -> list[Pair]:
    """All pairs of responses to one prompt, or `per_prompt` of them drawn by the seed. Raises ValueError where there is none."""
    pairs = []
    for number, (prompt, texts) in enumerate(candidates.items()):
        own = list(combinations(texts, 2))
        kept = sorted(permutation(len(own), seed, PAIRS, number)[:per_prompt].tolist())
        pairs += [Pair(prompt, *own[q], {}, number) for q in kept]
    if not pairs:
        raise ValueError(
            f"none of {len(candidates)} prompts has two different responses to compare; give a second file, or several responses a prompt"
        )
    return pairs


def draw_principles(principles: Sequence[str], count: int, seed: int) -> list[str]:
    """One of the principles for each of `count` pairs (Bai et al. 2022, 4.1: drawn at random for each label)."""
    return [principles[permutation(len(principles), seed, PRINCIPLES, i)[0]] for i in range(count)]


def judged(name: Any, pairs: Sequence[Pair], principles: Sequence[str] | None, template: str | None, **loading: Any) -> list[Verdict]:
    """The judge's verdicts, in both orders; with `principles`, one a pair, a language model is asked by each pair's own.

    Raises ValueError for principles with a judge that is no language model, or with a template that has no {principle}.
    """
    template = template or (TEMPLATE if principles is None else BY_PRINCIPLE)
    judge = load_judge(name, template=template, **loading)
    if principles is None:
        return judge(pairs)
    if not isinstance(judge, LMJudge):
        raise ValueError(f"--principles are for a language model that is asked; {name} is a reward or a function")
    if "{principle}" not in template:
        raise ValueError("the template has no {principle}, so the principles would change nothing: put it in")
    verdicts: dict[int, Verdict] = {}
    for principle in dict.fromkeys(principles):
        own = [i for i, p in enumerate(principles) if p == principle]
        judge.template = fill(template, {"{principle}": principle})
        verdicts |= dict(zip(own, judge([pairs[i] for i in own]), strict=True))
    return [verdicts[i] for i in range(len(pairs))]


def label_rows(
    pairs: Sequence[Pair], verdicts: Sequence[Verdict], principles: Sequence[str] | None, most: float, **columns: Any
) -> list[Row]:
    """The comparisons to write: the pairs that the judge answered in both orders, with `target`, its answers `orders`, the principle.

    Raises ValueError where it answered none.
    """
    rows = []
    for i, (pair, verdict) in enumerate(zip(pairs, verdicts, strict=True)):
        preferred = soft_label(verdict)
        if preferred is not None:
            more = {} if principles is None else {"principle": principles[i]}
            orders = {"orders": list(verdict.orders)} if verdict.orders else {}
            rows.append(comparison(pair.prompt, pair.first, pair.second, limited(preferred, most), **more, **orders, **columns))
    if not rows:
        says = " or ".join(ANSWERS)
        raise ValueError(
            f"the judge gave no answer that counts to any of {len(pairs)} pairs (it must say {says}): use another, or another template"
        )
    return rows


def named_first(verdicts: Sequence[Verdict]) -> float | None:
    """The share of a judge's answers that name what was shown first, an even answer as a half; None for one that is asked once."""
    orders = [v.orders for v in verdicts if v.preferred is not None and len(v.orders) == 2]
    shown = [p for one, other in orders if one is not None and other is not None for p in (one, 1 - other)]
    return sum((p > 0.5) + (p == 0.5) / 2 for p in shown) / len(shown) if shown else None
