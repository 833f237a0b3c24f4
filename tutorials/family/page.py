"""Makes results.json, the drawing and the table of ../family.md, and WORK/report.html, from what methods.py left.

python tutorials/family/page.py WORK     # or without WORK: the page from results.json
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from methods import BEST, METHODS, SFT, Method

from lit_rlhf.functional.statistics import Estimate
from lit_rlhf.report import Plot, Report, Series, Table, Text
from lit_rlhf.report.svg import standalone

HERE = Path(__file__).parent
PAGE = HERE.parent / "family.md"
Z = 1.96
MEASURED = {"gold": "gold", "kl": "kl", "score": "scores", "length": "lengths"}  # as in `evaluate.Summaries`
COLUMNS = ["method", "learns from", "seeds", "gold", "gold − SFT", "KL to SFT (nats)", "reward model's score", "length"]
COLUMNS += ["responses sampled", "CPU s", "wall s"]


def read(work: Path) -> list[dict[str, Any]]:
    """Of every run in the folder: means over the posts, and the paired difference from SFT with its standard error over them."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(work.glob("*.[0-9]*.json"))]
    sft = {run["seed"]: run["gold"] for run in runs if run["method"] == SFT.name}
    rows = []
    for run in runs:
        paired = [a - b for a, b in zip(run["gold"], sft[run["seed"]], strict=True)]
        row = {key: run[key] for key in ("method", "seed", "sampled")} | {key: round(run[key], 1) for key in ("wall", "cpu")}
        row |= {key: round(fmean(run[values]), 4) for key, values in MEASURED.items()}
        error = stdev(paired) / len(paired) ** 0.5
        rows.append(row | {"posts": len(paired), "difference": round(fmean(paired), 4), "difference_error": round(error, 4)})
    order = {method.name: i for i, method in enumerate(METHODS)}
    return sorted(rows, key=lambda row: (order[row["method"]], row["seed"]))


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean over seeds with its standard error; one seed has none."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    mean = fmean(values)
    return Estimate(mean, error, mean - Z * error, mean + Z * error)


def gain(rows: Sequence[dict[str, Any]]) -> Estimate:
    """Gold minus SFT's; its error is the larger of the standard error over seeds and that over posts."""
    over, posts = over_seeds([r["difference"] for r in rows]), sum(r["difference_error"] ** 2 for r in rows) ** 0.5 / len(rows)
    error = max(over.error, posts)
    return Estimate(over.mean, error, over.mean - Z * error, over.mean + Z * error)


def groups(rows: Sequence[dict[str, Any]]) -> list[tuple[Method, list[dict[str, Any]]]]:
    """The methods that were run, in order, each with its seeds."""
    found = [(method, [row for row in rows if row["method"] == method.name]) for method in METHODS]
    return [(method, part) for method, part in found if part]


def shown(value: Estimate, digits: int = 2) -> str:
    return f"{value.mean:.{digits}f}" + (f" ± {value.error:.{digits}f}" if value.error else "")


def errors(difference: float, error: float) -> str:
    """How many standard errors a difference is; a dash where no post has another gold reward than SFT's."""
    return f"{difference / error:.1f}" if error else "–"


def cells(method: Method, part: Sequence[dict[str, Any]]) -> list[str]:
    """One line of the table."""
    over = {key: over_seeds([row[key] for row in part]) for key in ("gold", "kl", "score", "length", "sampled", "cpu", "wall")}
    made = [method.label, method.learns_from, str(len(part)), shown(over["gold"])]
    if method is SFT:
        made.append("")
    else:
        found = gain(part)
        each = ", ".join(errors(row["difference"], row["difference_error"]) for row in part)
        made.append(f"{found.mean:+.2f} ± {found.error:.2f} ({errors(found.mean, found.error)}; by seed {each})")
    kl = "0" if method is SFT else shown(over["kl"]) + (" (bound)" if method is BEST else "")
    made += [kl, shown(over["score"]), f"{over['length'].mean:.1f}", f"{over['sampled'].mean:,.0f}"]
    return made + ([f"{over[key].mean:.0f}" for key in ("cpu", "wall")] if method is not SFT else ["", ""])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- | --- |" + " ---: |" * (len(COLUMNS) - 2)]
    lines += ["| " + " | ".join(cells(method, part)) + " |" for method, part in groups(rows)]
    return "\n".join(lines)


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Which methods beat SFT by more than two standard errors and which do not, and what is missing."""
    judged = [(method.label, gain(part)) for method, part in groups(rows) if method is not SFT]
    better = [label for label, found in judged if found.mean > 2 * found.error]
    others = [f"{label} ({found.mean:+.2f} ± {found.error:.2f})" for label, found in judged if found.mean <= 2 * found.error]
    seeds, posts = len({row["seed"] for row in rows}), rows[0]["posts"]
    text = f"{seeds} seed{'s' if seeds > 1 else ''}, {posts} held-out posts each. "
    text += f"Above SFT by more than 2 standard errors: {', '.join(better) or 'none'}."
    text += f" Not: {', '.join(others)}." if others else ""
    absent = [method.label for method in METHODS if method.name not in {row["method"] for row in rows}]
    return text + (f" Not run yet: {', '.join(absent)}." if absent else "")


def scatter(rows: Sequence[dict[str, Any]]) -> Plot:
    """Gold over SFT's against sqrt(KL): a point a method, the mean over seeds with its interval, and its name."""
    found = [(method, fmean(row["kl"] for row in part), gain(part)) for method, part in groups(rows) if method is not SFT]
    x, gains = [max(kl, 0.0) ** 0.5 for _, kl, _ in found], [gold for _, _, gold in found]
    y, low, high = ([getattr(gold, name) for gold in gains] for name in ("mean", "low", "high"))
    hints = [f"{method.label}: {gold.mean:+.2f} ± {gold.error:.2f} at {kl:.2f} nats" for method, kl, gold in found]
    points = Series("", x, y, low, high, "points", hints, labels=[method.label for method, _, _ in found])
    return Plot("Gold reward over SFT's, against KL", "sqrt(KL to SFT) (nats^½)", "gold − SFT", [points], levels={"SFT": 0.0})


def report(rows: Sequence[dict[str, Any]]) -> Report:
    """The same table and drawing as a page of its own."""
    page = Report("The family on the quickstart's world", verdict(rows), data={"runs": list(rows)})
    body = [list(cells(method, part)) for method, part in groups(rows)]
    note = "± is the standard error over seeds; of gold − SFT the larger of that and the paired one over posts; in brackets, their ratio."
    page.add("Score against KL", scatter(rows), Table("", COLUMNS, body, note=note))
    page.add(
        "What was measured",
        Text("One sample a held-out post, as each method samples, at the training temperature; the gold reward is exact here."),
    )
    return page


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
    (HERE / "frontier.svg").write_text(standalone(scatter(rows)) + "\n", encoding="utf-8")
    replace("verdict", verdict(rows))
    replace("table", table(rows))
    replace("plot", "![gold against KL](family/frontier.svg)")
    if argv:
        print(report(rows).write(Path(argv[0])))


if __name__ == "__main__":
    main(sys.argv[1:])
