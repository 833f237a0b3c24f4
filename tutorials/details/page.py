"""Makes results.json, the drawings and the tables of ../details.md from what laboratory.py left.

python tutorials/details/page.py WORK     # or without WORK: from results.json
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from variants import AGAIN, DEFAULT, VARIANTS, Variant

from lit_rlhf.report import Bars, Plot, Series
from lit_rlhf.report.svg import standalone

HERE = Path(__file__).parent
PAGE = HERE.parent / "details.md"
LIMIT = 2.5  # standard errors that make a difference: with so many comparisons 2 would call one or two by chance
VERDICTS = ("breaks", "costs", "gains", "no difference seen", "one seed: not judged")
QUIET = VERDICTS[3:]  # not bold in the table
SIGNS = {  # of the first iteration, where a right PPO has 0 but for rounding
    "rollout/sampling_gap_max": ("log-probs off the sampler's by up to", 1e-3),
    "ppo/ratio_max_dev": ("ratio off 1 by up to", 1e-3),
    "rollout/kl": ("KL", 1e-3),
}
MEASURED = {"gold": "gold", "kl": "kl", "score": "scores", "length": "lengths"}  # as in `evaluate.Summaries`


@dataclass(frozen=True)
class Finding:
    """One variant over its seeds: gold reward minus the default's of the same seed, KL in nats, and the errors of both."""

    variant: Variant
    seeds: int
    gold: float
    difference: float
    error: float
    kl: float
    kl_difference: float
    kl_error: float
    length: float
    verdict: str
    signs: str


def read(work: Path) -> list[dict[str, Any]]:
    """Of every run in the folder: means over the posts, the paired difference from the default, and what its first iteration showed."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(work.glob("*.json"))]
    default = {run["seed"]: run for run in runs if run["variant"] == DEFAULT.name}
    rows = []
    for run in runs:
        if run["seed"] not in default:
            continue
        row = {name: run[name] for name in ("variant", "seed", "stopped", "collapsed", "as_quickstart") if name in run}
        row |= {name: round(fmean(run[values]), 5) for name, values in MEASURED.items()}
        own = default[run["seed"]]
        paired = [a - b for a, b in zip(run["gold"], own["gold"], strict=True)]
        row["kl_difference"] = round(fmean(run["kl"]) - fmean(own["kl"]), 5)
        row["same_texts"] = sum(a == b for a, b in zip(run["texts"], own["texts"], strict=True))
        row |= {"difference": round(fmean(paired), 5), "posts": len(paired), "posts_error": round(stdev(paired) / len(paired) ** 0.5, 5)}
        if run.get("diary"):
            row["first"] = {name: float(f"{run['diary'][0][name]:.3g}") for name in SIGNS}
            row["kl_curve"] = [round(entry["rollout/kl"], 3) for entry in run["diary"]]
        rows.append(row)
    order = {name: i for i, name in enumerate(["sft", *(v.name for v in VARIANTS)])}
    return sorted(rows, key=lambda r: (order[r["variant"]], r["seed"]))


def noise(rows: Sequence[dict[str, Any]]) -> float:
    """The standard deviation of the difference between two runs of the default that draw other noise, over seeds: its mean is 0."""
    again = [r["difference"] for r in rows if r["variant"] in {v.name for v in AGAIN}]
    return (sum(d * d for d in again) / len(again)) ** 0.5 if again else 0.0


def of(rows: Sequence[dict[str, Any]], names: set[str]) -> list[dict[str, Any]]:
    return [row for row in rows if row["variant"] in names]


def finding(variant: Variant, names: set[str], rows: Sequence[dict[str, Any]]) -> Finding:
    """The variant's row; its error is the larger of its own spread over seeds and that of the default run again, over root S."""
    found, sft = of(rows, names), {r["seed"]: r["gold"] for r in of(rows, {"sft"})}
    count = len({r["seed"] for r in found})
    difference, worst = [r["difference"] for r in found], noise(rows)
    error = max(spread(difference), worst) / count**0.5
    above_sft = fmean(r["gold"] - sft[r["seed"]] for r in found)
    kls = [r["kl"] for r in found]
    kl_error = spread(kls) / count**0.5
    ended = any(r["stopped"] or r["collapsed"] is not None for r in found)
    verdict = judge(fmean(difference), above_sft, error, ended) if count > 1 else VERDICTS[4]
    means = {name: fmean(r[name] for r in found) for name in MEASURED}
    return Finding(
        variant,
        count,
        means["gold"],
        fmean(difference),
        error,
        means["kl"],
        fmean(r["kl_difference"] for r in found),
        kl_error,
        means["length"],
        verdict,
        signs(found),
    )


def spread(values: Sequence[float]) -> float:
    """The standard deviation, 0 where there is one value."""
    return stdev(values) if len(values) > 1 else 0.0


def judge(difference: float, above_sft: float, error: float, ended: bool) -> str:
    """The verdict, by rule."""
    if ended or above_sft < -LIMIT * error:
        return "breaks"
    if abs(difference) <= LIMIT * error:
        return "no difference seen"
    return "gains" if difference > 0 else "costs"


def signs(found: Sequence[dict[str, Any]]) -> str:
    """What the first iteration's numbers and the collapse watch say, the largest over the seeds."""
    said = []
    for name, (words, limit) in SIGNS.items():
        worst = max((r["first"][name] for r in found), key=abs)
        said += [f"{words} {worst:.2g}"] if abs(worst) > limit else []
    if all(r["same_texts"] == r["posts"] for r in found):
        said.append("the default's texts to the letter")
    ended = [r["collapsed"] for r in found if r["collapsed"] is not None]
    said += [f"collapse seen at iteration {min(ended)}"] if ended else []
    said += ["stopped: not finite"] if any(r["stopped"] for r in found) else []
    return "; ".join(said)


def findings(rows: Sequence[dict[str, Any]]) -> list[Finding]:
    """One per variant, the repeated defaults as one."""
    there = {r["variant"] for r in rows}
    again = {v.name for v in AGAIN}
    out = [finding(AGAIN[0], again & there, rows)] if again & there else []
    return out + [finding(v, {v.name}, rows) for v in VARIANTS if v.name in there and v is not DEFAULT and v.name not in again]


# The page


def how(variant: Variant) -> str:
    """The arguments without their common prefix, or the patch's name."""
    args = [arg.removeprefix("--").removeprefix("model.init_args.").replace("=", ": ", 1) for arg in variant.args]
    return ", ".join(f"`{arg}`" for arg in args) if args else f"patch `{variant.context.__qualname__.split('.')[0]}`"


def signed(value: float, digits: int = 2) -> str:
    return f"{value:+.{digits}f}"


def table(found: Sequence[Finding], rows: Sequence[dict[str, Any]]) -> str:
    head = "part | detail | source | how | seeds | gold − default | KL (nats) | verdict | seen in the first iteration"
    lines = [f"| {head} |", "| --- | --- | --- | --- | ---: | ---: | ---: | --- | --- |"]
    for name, label in (("sft", "SFT"), (DEFAULT.name, "default")):
        part = of(rows, {name})
        gold, kl = [r["difference"] for r in part], [r["kl"] for r in part]
        error = f" ± {stdev(gold) / len(gold) ** 0.5:.2f}" if name == "sft" and len(gold) > 1 else ""
        around = f" ± {stdev(kl) / len(kl) ** 0.5:.2f}" if name != "sft" and len(kl) > 1 else ""
        level = fmean(r["gold"] for r in part)
        lines.append(f"| | {label}: gold {level:.2f} | | | {len(part)} | {signed(fmean(gold))}{error} | {fmean(kl):.2f}{around} | | |")
    for f in found:
        v = f.variant
        changed = how(v) if v not in AGAIN else "`seed_everything`"
        cells = [v.group, v.detail if v not in AGAIN else "other order of prompts, other sampling noise; twice a seed", v.source, changed]
        mark = f"**{f.verdict}**" if f.verdict not in QUIET else f.verdict
        kl = f"{f.kl:.2f}" + (f" ± {f.kl_error:.2f}" if f.seeds > 1 else "")
        cells += [str(f.seeds), f"{signed(f.difference)} ± {f.error:.2f}", kl, mark, f.signs]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(found: Sequence[Finding], rows: Sequence[dict[str, Any]]) -> str:
    """How many of which verdict, from how many runs, and how large the noise is."""
    seeds, posts = len({r["seed"] for r in rows}), rows[0]["posts"]
    same = [r["as_quickstart"] for r in rows if "as_quickstart" in r]
    numbers = {v: sum(f.verdict == v for f in found if f.variant not in AGAIN) for v in VERDICTS}
    counts = ", ".join(f"{n} {v}" for v, n in numbers.items() if n or v not in QUIET)
    runs = sum(r["variant"] != "sft" for r in rows)
    bits = f" The default's weights are those that `lit-rlhf quickstart` left, bit for bit, on {sum(same)} of {len(same)} seeds."
    measured = f"{runs} runs on {seeds} seed{'s' if seeds > 1 else ''}, {posts} held-out posts each.{bits if any(same) else ''}"
    again = (
        f"The default run again with other noise differs from itself by {noise(rows):.3f} (standard deviation of one seed's difference)."
    )
    return f"{measured} {again} Verdicts: {counts}.{missing(rows)}"


def missing(rows: Sequence[dict[str, Any]]) -> str:
    """Which variants have not been run at all, so that the page never looks complete when it is not."""
    there = {r["variant"] for r in rows}
    absent = [f"`{v.name}`" for v in VARIANTS if v.name not in there]
    return f" Not run yet: {', '.join(absent)}." if absent else ""


def bars(found: Sequence[Finding]) -> Bars:
    """Gold minus default of every variant, lowest first."""
    order = sorted(found, key=lambda f: f.difference)
    low, high = ([f.difference + side * LIMIT * f.error for f in order] for side in (-1, 1))
    texts = [f"KL {f.kl:.2g}" if f.kl < 100 else f"KL {f.kl:.0f}" for f in order]
    names = [f.variant.name if f.variant not in AGAIN else "again" for f in order]
    return Bars(
        "Gold reward minus the default's",
        f"gold reward, whiskers of {LIMIT:g} standard errors",
        names,
        [f.difference for f in order],
        low,
        high,
        texts,
    )


def stands_out(f: Finding, kl: float) -> bool:
    """Whether there is room for its name: an error or a fifth of a root nat away from the default."""
    return abs(f.difference) > f.error > 0 or abs(max(kl + f.kl_difference, 0.0) ** 0.5 - kl**0.5) > 0.2


def scatter(found: Sequence[Finding], rows: Sequence[dict[str, Any]]) -> Plot:
    """Gold against sqrt(KL), a colour for each verdict; what stands apart from the default bears its name.

    Both are the default's plus the difference from it on the same seeds, so that variants with fewer seeds lie right too.
    """
    default = of(rows, {DEFAULT.name})
    sft = fmean(r["gold"] for r in of(rows, {"sft"}))
    own = Finding(DEFAULT, 0, fmean(r["gold"] for r in default), 0, 0, fmean(r["kl"] for r in default), 0, 0, 0, "default", "")
    series = []
    for verdict in (*reversed(VERDICTS), "default"):  # the default on top
        part = [own] if verdict == "default" else [f for f in found if f.verdict == verdict and f.variant not in AGAIN]
        if part:
            hints = [f"{f.variant.name}: gold {f.gold:.2f} at {f.kl:.2f} nats" for f in part]
            labels = [f.variant.name if stands_out(f, own.kl) else "" for f in part]
            golds = [own.gold + f.difference for f in part]
            low, high = ([y + side * f.error for y, f in zip(golds, part, strict=True)] for side in (-1, 1))
            distance = [max(own.kl + f.kl_difference, 0.0) ** 0.5 for f in part]
            series.append(Series(verdict, distance, golds, low, high, "points", hints, labels=labels))
    return Plot("Gold reward against KL", "sqrt(KL to SFT) (nats^½)", "gold reward", series, levels={"SFT": sft}, x_range=(0, 0))


def replace(name: str, text: str) -> None:
    """Writes `text` between the page's marks of that name."""
    page = PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    PAGE.write_text(page[: page.index(begin) + len(begin)] + "\n" + text + "\n" + page[page.index(end) :], encoding="utf-8")


def main(argv: Sequence[str]) -> None:
    """Reads the runs and writes everything."""
    file = HERE / "results.json"
    if argv:
        rows = read(Path(argv[0]))
        file.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
    rows = json.loads(file.read_text(encoding="utf-8"))
    found = findings(rows)
    for name, figure in (("gold", bars(found)), ("frontier", scatter(found, rows))):
        (HERE / f"{name}.svg").write_text(standalone(figure) + "\n", encoding="utf-8")
    replace("summary", summary(found, rows))
    replace("table", table(found, rows))
    replace("plots", "![gold against KL](details/frontier.svg) ![gold minus default](details/gold.svg)")


if __name__ == "__main__":
    main(sys.argv[1:])
