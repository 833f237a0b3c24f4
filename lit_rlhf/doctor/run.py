"""`lit-rlhf doctor --sft DIR --reward DIR [--policy DIR] --data FILE…`: runs the checks, prints a table, says what to do."""

import argparse
import json
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import datasets
import torch
import transformers

from lit_rlhf import cli
from lit_rlhf.doctor import data, files, paths, policy, reward
from lit_rlhf.doctor.case import Case
from lit_rlhf.doctor.finding import Finding, NotMeasurable

Check = Callable[[Case], Finding]
CHECKS: dict[str, Check] = {
    "merged": files.merged,
    "loads": files.loads,
    "tokenizer": files.tokenizer,
    "pad": files.pad,
    "eos": files.eos,
    "lineage": files.lineage,
    "truncation": data.truncation,
    "shared_prompts": data.shared_prompts,
    "kl": policy.kl,
    "ratio": policy.ratio,
    "dropout": files.dropout,
    "sampling": files.sampling,
    "ends": policy.ends,
    "length": policy.length,
    "repetition": policy.repetition,
    "paths": paths.paths,
    "accuracy": reward.accuracy,
    "head": reward.head,
    "eos_read": reward.eos_read,
    "calibration": reward.calibration,
    "length_bias": reward.length_bias,
    "order": reward.order,
    "center": reward.center,
    "drift": policy.drift,
    "ends (policy)": partial(policy.ends, role="policy"),
    "length (policy)": partial(policy.length, role="policy"),
    "repetition (policy)": partial(policy.repetition, role="policy"),
}
MARKS = {"pass": "pass", "warn": "WARN", "fail": "FAIL", "skip": "skip"}


def examine(case: Case, checks: Sequence[str] = tuple(CHECKS), allow: Sequence[str] = ()) -> list[Finding]:
    """The findings of these checks; a failed one of `allow` becomes a warning, one that lacks what it needs is skipped and says so.

    Raises ValueError for names that are no checks.
    """
    for name in (*checks, *allow):
        if name not in CHECKS:
            raise ValueError(f"there is no check {name!r} (there are: {', '.join(CHECKS)})")
    found = []
    for name in checks:
        finding = _run(name, case)
        if finding.status == "fail" and name in allow:
            finding.status = "warn"
        found.append(finding)
    return found


def _run(name: str, case: Case) -> Finding:
    try:
        return CHECKS[name](case)
    except NotMeasurable as error:
        return Finding(name, "skip", str(error))
    except (ValueError, OSError, RuntimeError) as error:
        return Finding(name, "skip", f"could not be measured: {(str(error) or type(error).__name__).splitlines()[0]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `lit-rlhf doctor` with these arguments and returns its exit code: 0, 1 where a check failed, 2 where nothing could be examined."""
    options = _parser().parse_args(argv)
    cli.quiet()
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    begin = time.perf_counter()
    try:
        case = Case(**{name: value for name, value in vars(options).items() if name not in ("only", "allow", "json", "html")})
        case.splits  # noqa: B018  (bad data and an SFT directory that does not load are refused)
        findings = examine(case, options.only or tuple(CHECKS), options.allow)
    except (ValueError, OSError) as error:
        if not cli.raised_here(error):
            raise
        return cli.report(f"doctor: {error}", error, debug=False, code=2)
    print(as_text(findings, time.perf_counter() - begin))
    if options.json:
        write_json(findings, options.json)
    return int(any(f.status == "fail" for f in findings))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lit-rlhf doctor",
        allow_abbrev=False,
        description="Checks what SFT, reward model and data hand to PPO, and names what is broken. Exit codes: 0 nothing failed, 1 a check "
        "failed, 2 refused.",
    )
    parser.add_argument("--sft", required=True, help="the SFT stage's directory or hub name")
    parser.add_argument("--reward", required=True, help="the reward model's, or a reward function's import path")
    parser.add_argument("--policy", help="the PPO stage's directory (ppo/hf/policy)")
    parser.add_argument("--base", help="the language model that SFT began from; with it the reward model's ancestry is checked")
    parser.add_argument("--data", nargs="+", required=True, help="files, folders or hub names: comparisons, prompts with references, prompts")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the samples, as in PPO (%(default)s)")
    parser.add_argument("--max_new_tokens", type=int, help="of the samples (default: what the references take, at least 53)")
    parser.add_argument("--max_prompt_tokens", type=int, default=512, help="as in training (%(default)s)")
    parser.add_argument("--rows", type=int, default=256, help="held-out rows that each measurement takes (%(default)s)")
    parser.add_argument("--limit_rows", type=int, default=20000, help="rows read of each file (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", help="of the networks (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="CHECK", help=f"these checks alone, of: {', '.join(CHECKS)}")
    parser.add_argument("--allow", nargs="+", metavar="CHECK", default=[], help="checks whose failure is only a warning")
    parser.add_argument("--json", type=Path, help="write the findings to this file")
    return parser


def as_text(findings: Sequence[Finding], seconds: float) -> str:
    """The findings as a table for a terminal, with reason and remedy under what did not pass."""
    width = max(len(f.name) for f in findings)
    lines = []
    for f in findings:
        lines.append(f"{MARKS[f.status]}  {f.name:{width}}  {f.measured}")
        notes = (("expected", f.expected), ("why", f.reason), ("do", f.remedy)) if f.status in ("warn", "fail") else ()
        for label, note in notes:
            lines += textwrap.wrap(f"{label}: {note}", 120, initial_indent=" " * (width + 8), subsequent_indent=" " * (width + 10))
    counts = Counter(f.status for f in findings)
    failed = ", ".join(f.name for f in findings if f.status == "fail")
    total = ", ".join(f"{counts[status]} {word}" for status, word in (("pass", "passed"), ("warn", "warned"), ("fail", "failed"), ("skip", "skipped")))
    return "\n".join([*lines, "", f"{total}, in {seconds:.0f} s" + (f": {failed}" if failed else "")])


def write_json(findings: Sequence[Finding], path: Path) -> None:
    """The findings as a JSON list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(f) for f in findings], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
