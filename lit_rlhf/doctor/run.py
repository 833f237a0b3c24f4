"""`lit-rlhf doctor --sft DIR --reward DIR [--policy DIR] --data FILE…`: runs the checks, prints a table, says what to do."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import datasets
import torch
import transformers

from lit_rlhf import cli
from lit_rlhf.doctor import data, files, paths, policy, reward
from lit_rlhf.doctor.case import Case
from lit_rlhf.doctor.finding import Finding, NotMeasurable
from lit_rlhf.doctor.report import as_text, report

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


def examine(case: Case, checks: Sequence[str] = tuple(CHECKS), allow: Sequence[str] = (), debug: bool = False) -> list[Finding]:
    """The findings of these checks; a failed one of `allow` becomes a warning, one that lacks what it needs is skipped and says so.

    A check that ends in an error fails (with `debug` the error is raised), unless `loads` failed before it and says why. Raises ValueError
    for names that are no checks.
    """
    for name in (*checks, *allow):
        if name not in CHECKS:
            raise ValueError(f"there is no check {name!r} (there are: {', '.join(CHECKS)})")
    found: list[Finding] = []
    for name in checks:
        finding = _run(name, case, excused=any(f.name == "loads" and f.status == "fail" for f in found), debug=debug)
        if finding.status == "fail" and name in allow:
            finding.status = "warn"
        found.append(finding)
    return found


def _run(name: str, case: Case, excused: bool, debug: bool) -> Finding:
    try:
        return CHECKS[name](case)
    except NotMeasurable as error:
        return Finding(name, "skip", str(error))
    except Exception as error:  # what is examined may be broken in any way: the other checks still run
        said = f"could not be measured ({type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]})"
        if debug:
            raise
        if excused:
            return Finding(name, "skip", said)
        remedy = f"mend what the error names; `--only {name} --debug` shows where it comes from"
        return Finding(name, "fail", said, "that it can be measured", "the check ended in an error", remedy)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `lit-rlhf doctor` and returns its exit code: 0, 1 where a check failed, 2 where nothing could be examined."""
    options = _parser().parse_args(argv)
    cli.quiet()
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    begin = time.perf_counter()
    apart = ("only", "allow", "out", "debug")
    case = Case(**{name: value for name, value in vars(options).items() if name not in apart})
    try:
        if files.loads(case).status != "fail":
            case.splits  # noqa: B018  (data that cannot be read are refused, not examined)
        findings = examine(case, options.only or tuple(CHECKS), options.allow, debug=options.debug)
    except (ValueError, OSError) as error:
        if options.debug or not cli.raised_here(error):
            raise
        return cli.report(f"doctor: {error}", error, debug=False, code=2)
    print(as_text(findings, time.perf_counter() - begin))
    if options.out:
        print(f"{report(case, findings).write(options.out)}")
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
    parser.add_argument(
        "--data", nargs="+", required=True, help="files, folders or hub names: comparisons, prompts with references, prompts"
    )
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
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write report.html and report.json there")
    parser.add_argument("--debug", action="store_true", help="stop with a traceback where a check ends in an error")
    return parser


if __name__ == "__main__":
    sys.exit(main())
