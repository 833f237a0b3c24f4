"""Checks of the data files: what was cut, and what stands in two splits."""

import re
from collections import Counter
from collections.abc import Callable

import numpy as np

from lit_rlhf.doctor.case import Case, Rows
from lit_rlhf.doctor.finding import Finding, NotMeasurable, judge

END = re.compile(r"[.!?…。！？][\"'”’)\]]*$")
ENOUGH = 50  # rows, for a share to mean something


def truncation(case: Case) -> Finding:
    """At most 5% of prompts are cut to max_prompt_tokens (20% fails), and responses do not pile up at a limit in mid-sentence.

    Responses that were cut somewhere have many of exactly the greatest length (in words, characters or tokens), and these do not end like a
    sentence; whole ones hardly ever share the greatest length. A fifth of them at it fails, a twentieth warns.
    """
    if not case.splits:
        raise NotMeasurable("no --data was given")
    prompts = {rows.name: float(rows.table.truncated.mean()) for rows in case.splits}
    piles = {rows.name: _pile(case, rows) for rows in case.splits if rows.kind != "prompts"}
    dropped = {rows.name: sum(rows.table.dropped.values()) / rows.table.read for rows in case.splits}
    worst, pile = max(prompts.values()), max((share for share, _ in piles.values()), default=0.0)
    said = [f"{share:.1%} of the prompts of {name} are cut" for name, share in prompts.items() if share > 0.05]
    cut = [(name, share, what) for name, (share, what) in piles.items() if share > 0.05]
    said += [f"{share:.0%} of the responses of {name} have exactly {what} and end in mid-sentence" for name, share, what in cut]
    said += [f"{share:.1%} of the rows of {name} cannot be read" for name, share in dropped.items() if share > 0]
    return judge(
        "truncation",
        "; ".join(said) or f"prompts cut: {worst:.1%} at most, responses cut: {pile:.1%} at most, in {len(prompts)} splits",
        "at most 5% of prompts or responses cut (20% fails), every row readable",
        fail=worst > 0.2 or pile > 0.2,
        warn=worst > 0.05 or pile > 0.05 or any(dropped.values()),
        reason="summaries were cut at a limit before they were written to the file: models learn to stop in mid-sentence"
        if pile > 0.05
        else "much of the posts is cut away"
        if worst > 0.05
        else "rows are dropped",
        remedy="make the file anew without that limit (or drop such rows: response_token_bounds); raise max_prompt_tokens if posts are cut",
        numbers={f"prompts_cut/{name}": share for name, share in prompts.items()}
        | {f"responses_cut/{name}": share for name, (share, _) in piles.items()},
    )


def _pile(case: Case, rows: Rows) -> tuple[float, str]:
    """The share of responses that have exactly the greatest length and do not end like a sentence, by the unit in which it is largest."""
    order = np.random.default_rng(case.seed).permutation(len(rows.table))[:1000]
    texts = [text.strip() for row in rows.table.fetch(sorted(order.tolist())) for text in case.texts(row["responses"])]
    units: dict[str, Callable[[str], int]] = {"words": lambda text: len(text.split()), "characters": len}
    found = (0.0, "")
    if len(texts) < ENOUGH or max(len(text.split()) for text in texts) <= 3:  # labels, not texts
        return found
    for unit, count in units.items():
        sizes = [count(text) for text in texts]
        most = max(sizes)
        at = [text for text, size in zip(texts, sizes, strict=True) if size == most]
        cut = sum(not END.search(text) for text in at)
        if cut > len(at) / 2:
            found = max(found, (cut / len(texts), f"{most} {unit}"))
    tokens = Counter(rows.table.longest.tolist())
    most = max(tokens)
    ended = sum(bool(END.search(text)) for text in texts) / len(texts)
    if found[0] == 0.0 and ended < 0.5:
        found = (tokens[most] / len(rows.table), f"{most} tokens")
    return found


def shared_prompts(case: Case) -> Finding:
    """No prompt stands in a training split and in a held-out split of the same kind; over 1% of the held-out ones fails.

    Whatever is measured on a prompt that was trained on is too good. A prompt in splits of different kinds (SFT's training rows, the reward
    model's held-out pairs) is a warning. Held out is what says so in its name: validation, valid, val, test, held_out, eval, dev.
    """
    trained, held = ([rows for rows in case.splits if rows.held_out is flag] for flag in (False, True))
    if not trained or not held:
        raise NotMeasurable("needs a training and a held-out split among --data (names with train and valid, test or held_out)")
    shares = {(t.name, h.name): float(np.isin(h.table.keys, t.table.keys).mean()) for t in trained for h in held}
    same = {(t.name, h.name) for t in trained for h in held if t.kind == h.kind}
    bad = {both: share for both, share in shares.items() if share > 0}
    return judge(
        "shared_prompts",
        "; ".join(f"{share:.1%} of the prompts of {h} stand in {t}" for (t, h), share in bad.items())
        or f"none, in {len(shares)} pairs of splits",
        "no prompt in a training split and a held-out one",
        fail=any(share > 0.01 for both, share in bad.items() if both in same),
        warn=bool(bad),
        reason="what is measured on these prompts was trained on",
        remedy="split by prompt, not by row: val_fraction of the DataModules does",
        numbers={f"{t} / {h}": share for (t, h), share in shares.items()},
    )
