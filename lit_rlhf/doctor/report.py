"""The doctor's findings as a table for a terminal, and as report.html and report.json."""

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lit_rlhf.doctor.case import Case
from lit_rlhf.doctor.finding import Finding
from lit_rlhf.functional import grouped_mean
from lit_rlhf.report import Answer, Bars, Plot, Report, Sample, Samples, Table, histogram

MARKS = {"pass": "pass", "warn": "WARN", "fail": "FAIL", "skip": "skip"}
WORDS = {"pass": "passed", "warn": "warned", "fail": "failed", "skip": "skipped"}
SHOWN = 6  # samples


def as_text(findings: Sequence[Finding], seconds: float) -> str:
    """The findings as a table for a terminal, with reason and remedy under what did not pass."""
    width = max(len(f.name) for f in findings)
    lines = []
    for f in findings:
        lines.append(f"{MARKS[f.status]}  {f.name:{width}}  {f.measured}")
        notes = (("expected", f.expected), ("why", f.reason), ("do", f.remedy)) if f.status in ("warn", "fail") else ()
        for label, note in notes:
            lines += textwrap.wrap(f"{label}: {note}", 120, initial_indent=" " * (width + 8), subsequent_indent=" " * (width + 10))
    failed = ", ".join(f.name for f in findings if f.status == "fail")
    return "\n".join([*lines, "", f"{count(findings)}, in {seconds:.0f} s" + (f": {failed}" if failed else "")])


def count(findings: Sequence[Finding]) -> str:
    """How many passed, warned, failed and were skipped."""
    counts = Counter(f.status for f in findings)
    return ", ".join(f"{counts[status]} {word}" for status, word in WORDS.items())


def report(case: Case, findings: Sequence[Finding]) -> Report:
    """The findings with what they were measured on: scores of five kinds of responses, lengths, some samples."""
    page = Report("lit-rlhf doctor", lead=", ".join(f"{role} {path}" for role, path in case.directories.items()))
    page.data = {"findings": [asdict(f) for f in findings]}
    rows = [[f.name, f.status, f.measured, f.expected, f.reason, f.remedy] for f in findings]
    page.add(count(findings), Table("", ["check", "status", "measured", "expected", "why", "what to do"], rows, status="status"))
    known = vars(case)  # what no check could make is not made here again
    figures: list[Any] = []
    if "kinds" in known:
        figures.append(_kinds(case))
    if "rollout" in known and "references" in known:
        figures.append(_lengths(case))
    if figures:
        page.add("What it was measured on", *figures)
    if "kinds" in known:
        page.add("Samples", Samples(_samples(case), number="scores"))
    return page


def _kinds(case: Case) -> Bars:
    means = {name: grouped_mean(scores) for name, scores in case.kinds.items()}
    low, high = [m.low for m in means.values()], [m.high for m in means.values()]
    return Bars("Mean score by kind of response", "score", list(means), [m.mean for m in means.values()], low, high)


def _lengths(case: Case) -> Plot:
    made = case.rollout.batch.response_mask.sum(1) - case.rollout.finished.long()
    return histogram("Lengths", "tokens", {"references": case.lengths(case.references[1]).tolist(), "samples": made.float().tolist()})


def _samples(case: Case) -> list[Sample]:
    texts = {"reference": case.references[1], "sample": case.rollout.texts}
    return [
        Sample(prompt, [Answer(name, text[i], float(case.kinds[name][i])) for name, text in texts.items()])
        for i, prompt in enumerate(case.references[0][:SHOWN])
    ]
