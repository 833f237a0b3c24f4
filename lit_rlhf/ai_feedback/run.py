"""`lit-rlhf ai-feedback label|revise FILE …`: files of comparisons or of SFT rows that a language model made."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from lit_rlhf import cli
from lit_rlhf.ai_feedback.labels import (
    Row,
    draw_principles,
    judged,
    label_rows,
    make_pairs,
    named_first,
    read_candidates,
    read_principles,
)
from lit_rlhf.ai_feedback.revision import CRITIQUE, REVISION, check_template, read_responses, revise
from lit_rlhf.generation import Sampling
from lit_rlhf.networks import CausalPolicy

STOP = "\n\n"  # where a model without a chat template has answered


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `lit-rlhf ai-feedback` with these arguments and returns its exit code: 0, or 2 where nothing could be made."""
    options = _parser().parse_args(argv)
    cli.quiet()
    transformers.utils.logging.disable_progress_bar()
    try:
        print(label(options) if options.what == "label" else revised(options))
    except (ValueError, OSError, RuntimeError) as error:
        if not (cli.raised_here(error) or isinstance(error, OSError)):
            raise
        return cli.report(f"ai-feedback {options.what}: {error}", error, debug=False, code=2)
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "Feedback by a language model: comparisons for a reward model (RLAIF), or revised responses for SFT (Constitutional AI)."
    parser = argparse.ArgumentParser(prog="lit-rlhf ai-feedback", allow_abbrev=False, description=f"{about} Exit codes: 0 done, 2 refused.")
    parts = parser.add_subparsers(dest="what", required=True)
    one = parts.add_parser("label", allow_abbrev=False, help="pairs of responses to one prompt, labelled in both orders, as comparisons")
    one.add_argument("files", nargs="+", metavar="FILE", help="rows with prompt and response, responses, or chosen and rejected")
    one.add_argument("--judge", required=True, help="a causal language model's directory; or any judge of `lit-rlhf winrate`")
    one.add_argument("--principles", metavar="FILE", help="one a line: each pair is judged by one of them")
    one.add_argument("--template", metavar="FILE", help="the question: {prompt}, {first}, {second}, with --principles {principle}")
    one.add_argument("--pairs_per_prompt", type=int, help="so many pairs of a prompt's responses (default: all)")
    one.add_argument("--most", type=float, default=1.0, help="no label is surer than this: 0.6 keeps them within 0.4 and 0.6 (%(default)s)")
    two = parts.add_parser("revise", allow_abbrev=False, help="responses criticised and rewritten by written principles, as rows for SFT")
    two.add_argument("files", nargs=1, metavar="FILE", help="rows with prompt and response, such as `lit-rlhf predict` writes")
    two.add_argument("--model", required=True, help="the language model that criticises and rewrites")
    two.add_argument("--principles", metavar="FILE", required=True, help="one a line")
    two.add_argument("--rounds", type=int, default=1, help="revisions of each response, by another principle each (%(default)s)")
    two.add_argument("--critique", metavar="FILE", help="its question: {prompt}, {response}, {principle}")
    two.add_argument("--revision", metavar="FILE", help="its question: {prompt}, {response}, {critique}, and {principle} if wanted")
    two.add_argument("--max_new_tokens", type=int, default=128, help="of a critique or a revision (%(default)s)")
    two.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest tokens (%(default)s)")
    two.add_argument("--stop", nargs="*", help="what ends an answer (default: a blank line, or nothing where there is a chat template)")
    for part in (one, two):
        part.add_argument("--out", type=Path, required=True, metavar="FILE", help="the jsonl file to write")
        part.add_argument("--seed", type=int, default=0, help="of what is drawn (%(default)s)")
        part.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        part.add_argument("--dtype", default="float32", help="of the language model (%(default)s)")
    return parser


def label(options: Any) -> str:
    """Writes the comparisons; returns what to print. Raises ValueError for what cannot be labelled."""
    if not 0.5 < options.most <= 1:
        raise ValueError(f"--most is {options.most}; give more than 0.5 and at most 1")
    if options.pairs_per_prompt is not None and options.pairs_per_prompt < 1:
        raise ValueError(f"--pairs_per_prompt must be at least 1, got {options.pairs_per_prompt}")
    pairs = make_pairs(read_candidates(options.files), options.pairs_per_prompt, options.seed)
    principles = None if options.principles is None else draw_principles(read_principles(options.principles), len(pairs), options.seed)
    template = None if options.template is None else Path(options.template).read_text(encoding="utf-8")
    verdicts = judged(options.judge, pairs, principles, template, device=options.device, dtype=options.dtype)
    rows = label_rows(pairs, verdicts, principles, options.most, judge=str(options.judge))
    write(options.out, rows)
    sure = sum(row["target"] for row in rows) / len(rows)
    lines = [
        f"{len(rows):,} of {len(pairs):,} pairs labelled, {len(pairs) - len(rows):,} without an answer that counts; mean target {sure:.3f}"
    ]
    first = named_first(verdicts)
    lines += [] if first is None else [f"{first:.1%} of the answers name what was shown first; far from 50% the judge hardly reads"]
    return "\n".join([*lines, str(options.out)])


def revised(options: Any) -> str:
    """Writes the SFT rows; returns what to print. Raises ValueError for what cannot be revised."""
    if options.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {options.rounds}")
    rows, principles = read_responses(options.files[0]), read_principles(options.principles)
    questions = {
        what: check_template(what, Path(given).read_text(encoding="utf-8") if given else default)
        for what, given, default in (("critique", options.critique, CRITIQUE), ("revision", options.revision, REVISION))
    }
    policy = CausalPolicy.load(options.model, dtype=options.dtype).eval().to(options.device)
    stop = ([] if policy.tokenizer.chat_template else [STOP]) if options.stop is None else options.stop
    made = revise(
        policy,
        rows,
        principles,
        Sampling(options.max_new_tokens, options.temperature, stop),
        rounds=options.rounds,
        seed=options.seed,
        **questions,
    )
    if not made:
        raise ValueError(f"the model changed none of {len(rows)} responses (its revisions are empty or the same); use another model")
    write(options.out, made)
    return f"{len(made):,} of {len(rows):,} responses revised; the others came back empty or unchanged and are left out\n{options.out}"


def write(path: Path, rows: Sequence[Row]) -> None:
    """One JSON object a line, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", errors="replace")
    os.replace(new, path)


if __name__ == "__main__":
    sys.exit(main())
