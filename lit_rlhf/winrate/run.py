"""`lit-rlhf winrate A.jsonl B.jsonl --judge …`: joins, judges, prints a table, and writes a report where asked."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from lit_rlhf import cli
from lit_rlhf.functional.statistics import Estimate
from lit_rlhf.report import Answer, Bars, Report, Sample, Samples, Table
from lit_rlhf.winrate.judges import TEMPLATE, Verdict, load_judge
from lit_rlhf.winrate.pairs import Pair, join, read_predictions
from lit_rlhf.winrate.rates import WinRate, win_rate

SHOWN = 6  # samples of either kind


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `lit-rlhf winrate` with these arguments and returns its exit code: 0, or 2 where nothing could be compared."""
    options = _parser().parse_args(argv)
    cli.quiet()
    transformers.utils.logging.disable_progress_bar()
    names = options.names or [_name(path, (options.first, options.second)) for path in (options.first, options.second)]
    try:
        pairs = join(read_predictions(options.first), read_predictions(options.second), [options.first, options.second], options.common)
        template = TEMPLATE if options.template is None else Path(options.template).read_text(encoding="utf-8")
        found = {}
        for judge in options.judge:
            verdicts = load_judge(judge, template=template, dtype=options.dtype, device=options.device)(pairs)
            found[judge] = (win_rate(pairs, verdicts, options.seed), verdicts)
    except (ValueError, OSError, RuntimeError) as error:
        if not (cli.raised_here(error) or isinstance(error, OSError)):
            raise
        return cli.report(f"winrate: {error}", error, debug=False, code=2)
    print(as_text(names, len(pairs), {judge: rate for judge, (rate, _) in found.items()}))
    if options.out:
        print(report(names, pairs, found).write(options.out))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lit-rlhf winrate",
        allow_abbrev=False,
        description="How often the responses of A are better than those of B to the same prompts. Exit codes: 0 done, 2 refused.",
    )
    parser.add_argument("first", metavar="A.jsonl", help="what `lit-rlhf predict` wrote: rows with prompt and response")
    parser.add_argument("second", metavar="B.jsonl", help="the same of the other side")
    judges = "a reward model's directory, a causal language model's directory (asked in both orders), or a function's import path"
    parser.add_argument("--judge", nargs="+", required=True, help=judges)
    parser.add_argument("--names", nargs=2, metavar=("A", "B"), help="of the sides (default: their files')")
    parser.add_argument("--common", action="store_true", help="compare the prompts that both have, where they differ")
    parser.add_argument("--template", help="file with the question to a language model: {prompt}, {first}, {second}; it says A or B")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", help="of a judge's network (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write report.html and report.json there")
    return parser


def _name(path: str, both: Sequence[str]) -> str:
    """The file's name without its end; its folder's where both files have one name."""
    stems = [Path(p).stem for p in both]
    return Path(path).stem if stems[0] != stems[1] else Path(path).resolve().parent.name


def as_text(names: Sequence[str], count: int, rates: dict[str, WinRate]) -> str:
    """The win rates for a terminal."""
    lines = [f"{names[0]} against {names[1]}, {count:,} pairs; ties count a half, intervals are 95% (bootstrap by prompt)"]
    for judge, rate in rates.items():
        lines += ["", f"judge {judge}"]
        lines.append(f"  win rate         {_interval(rate.all)}: {rate.wins} won, {rate.ties} tied, {rate.losses} lost")
        lines.append(f"  unparsable       {rate.unparsable} pairs without an answer, not counted")
        lines.append(f"  at like length   {_interval(rate.like_length)}: {rate.alike} pairs that differ by at most a tenth")
        lines.append(f"  at equal length  {_interval(rate.equal_length)} (regression); {names[0]} is {rate.length_ratio:.2f} times as long")
        if rate.picked_first is not None:
            lines.append(f"  position         {rate.picked_first:.1%} of the answers name what was shown first")
    return "\n".join(lines)


def _interval(found: Estimate | None) -> str:
    return "unknown" if found is None else f"{found.mean:.1%} ({found.low:.1%} to {found.high:.1%})"


def report(names: Sequence[str], pairs: Sequence[Pair], found: dict[str, tuple[WinRate, list[Verdict]]]) -> Report:
    """Win rates, their intervals as bars, and the pairs that were won and lost by most."""
    page = Report(f"Win rate: {names[0]} against {names[1]}", lead=f"{len(pairs):,} pairs; ties count a half.")
    page.data = {"judges": {judge: asdict(rate) for judge, (rate, _) in found.items()}}
    head = ["judge", "win rate", "at like length", "at equal length", "won", "tied", "lost", "unparsable", "named first", "length ratio"]
    short = short_names(list(found))
    rows = [[short[j], r.all, r.like_length, r.equal_length, r.wins, r.ties, r.losses, r.unparsable, r.picked_first, r.length_ratio]
            for j, (r, _) in found.items()]  # fmt: skip
    whole = ", ".join(f"{name}: {judge}" for judge, name in short.items() if name != judge)
    bars = [(f"{short[j]}{what}", e) for j, (r, _) in found.items() for what, e in (("", r.all), (", equal length", r.equal_length)) if e]
    numbers = [e for _, e in bars]
    low, high = [e.low for e in numbers], [e.high for e in numbers]
    chart = Bars("Win rate", f"share won by {names[0]}", [n for n, _ in bars], [e.mean for e in numbers], low, high, levels={"even": 0.5})
    page.add("Win rates", Table("", head, rows, note=whole), chart)
    for judge, (_, verdicts) in found.items():
        page.add(
            f"Pairs, by {judge}", Samples(_samples(names, pairs, verdicts), number="the reward's difference or the judge's preference")
        )
    return page


def short_names(judges: Sequence[str]) -> dict[str, str]:
    """Each judge by the last part of its path that says something ("hf" does not), or whole where that does not tell them apart."""
    short = {}
    for judge in judges:
        parts = [part for part in judge.split("/") if part] or [judge]
        last = parts[-2] if parts[-1] == "hf" and len(parts) > 1 else parts[-1]
        short[judge] = last if len(parts) > 1 else last.rpartition(".")[2] or last
    named = list(short.values())
    return {judge: name if named.count(name) == 1 else judge for judge, name in short.items()}


def _samples(names: Sequence[str], pairs: Sequence[Pair], verdicts: Sequence[Verdict]) -> list[Sample]:
    """What was won by most and lost by most."""
    sizes = [(v.margin if v.margin is not None else v.preferred - 0.5, i) for i, v in enumerate(verdicts) if v.preferred is not None]
    ordered = [i for _, i in sorted(sizes)]
    shown = dict.fromkeys([*ordered[::-1][:SHOWN], *ordered[:SHOWN]])
    size = {i: s for s, i in sizes}
    return [
        Sample(
            pairs[i].prompt,
            [Answer(names[0], pairs[i].first, size[i]), Answer(names[1], pairs[i].second)],
            "won" if size[i] > 0 else "lost" if size[i] < 0 else "tied",
        )
        for i in shown
    ]


if __name__ == "__main__":
    sys.exit(main())
