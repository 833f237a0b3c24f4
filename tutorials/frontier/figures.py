"""Makes figures.json, the drawings and the tables of ../frontier.md from `lit-rlhf frontier` on the quickstart's three seeds.

    python tutorials/frontier/figures.py FOLDER_OF_SEED_0 FOLDER_OF_SEED_1 FOLDER_OF_SEED_2

Each folder is the --out of the command on that page.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from lit_rlhf.frontier.analysis import Mark
from lit_rlhf.frontier.report import both, picture
from lit_rlhf.functional.best_of_n import Law
from lit_rlhf.functional.statistics import Estimate
from lit_rlhf.report.style import STYLE
from lit_rlhf.report.svg import svg

HERE = Path(__file__).parent
PAGE = HERE.parent / "frontier.md"
DRAWN = (":root", "@media (prefers", "svg", ".line", ".dashed", ".dot", ".band", ".column", ".whisker")


def marks(report: dict[str, Any]) -> list[Mark]:
    """The report's points."""
    return [Mark(**m | {"gains": {k: Estimate(**e) for k, e in m["gains"].items()}}) for m in report["marks"]]


def laws(report: dict[str, Any], form: str) -> dict[str, Law]:
    inf = float("inf")
    return {k: Law(**{n: inf if v is None else v for n, v in law.items()}) for k, law in report["laws"][form].items()}


def draw(report: dict[str, Any], seed: int) -> list[str]:
    """Writes the seed's drawings and returns their names."""
    found = marks(report)
    ppo, chosen = [m for m in found if m.setting != "best of n"], [m for m in found if m.setting == "best of n"]
    plots = {
        "ppo": picture(f"PPO, seed {seed}", ppo, laws(report, "rl")),
        "best_of_n": picture(f"Best-of-n, seed {seed}", chosen, laws(report, "best_of_n")),
        "both": both(ppo, chosen, f"Gold reward of both, seed {seed}"),
    }
    rules = "".join(line for line in STYLE.splitlines() if line.lstrip().startswith(DRAWN))
    names = []
    for name, plot in plots.items():
        text = re.sub(r"<title>.*?</title>", "", svg(plot)).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="360" ', 1)
        file = f"{name}-{seed}.svg"
        (HERE / file).write_text(
            text.replace(">", f"><style>svg{{background:var(--card);font-family:sans-serif}}{rules}</style>", 1) + "\n"
        )
        names.append(file)
    return names


def interval(e: dict[str, float] | None) -> str:
    return "" if e is None else f"{e['mean']:+.2f} ({e['low']:+.2f} to {e['high']:+.2f})"


def parting_rows(report: dict[str, Any], seed: int) -> list[str]:
    """A row for each setting: what gold picks, where the two part, what the end costs."""
    rows = []
    for p in report["partings"]:
        parted = "never" if p["parted"] is None else f"{p['parted']} ({p['parted_kl']:.1f})"
        cells = [p["setting"], f"{p['best']} ({p['best_kl']:.1f})", interval(p["best_gold"]), parted]
        rows.append(row(seed, *cells, interval(p["proxy_gain"]), interval(p["lost"])))
    return rows


def law_rows(report: dict[str, Any], seed: int) -> list[str]:
    """A row for each fitted law."""
    rows = []
    for form, name in (("rl", "PPO"), ("best_of_n", "best-of-n")):
        for reward, law in laws(report, form).items():
            peak = "none" if law.b <= 0 else f"{law.peak_distance**2:.1f} nats, {law.peak:+.2f}"
            rows.append(row(seed, name, reward, f"{law.a:.2f}", f"{law.b:.2f}", f"{law.error:.2f}", peak))
    return rows


def best_rows(report: dict[str, Any], seed: int) -> list[str]:
    """The best gold of PPO and of best-of-n, and what KL each spent on it."""
    found = marks(report)
    rows = []
    for name, part in (
        ("PPO", [m for m in found if m.setting != "best of n"]),
        ("best-of-n", [m for m in found if m.setting == "best of n"]),
    ):
        best = max(part, key=lambda m: m.gains["gold"].mean)
        what = f"{best.setting}, iteration {best.iteration}" if name == "PPO" else f"n = {best.iteration}"
        gains = [interval(best.gains[reward]._asdict()) for reward in ("gold", "proxy")]
        rows.append(row(seed, name, what, f"{best.kl:.2f}", *gains))
    return rows


def row(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def table(head: str, rows: list[str]) -> str:
    columns = head.count("|") + 1
    return "\n".join([f"| {head} |", "|" + " --- |" * columns, *rows])


def replace(name: str, text: str) -> None:
    """Writes `text` between the page's marks of that name."""
    page = PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    PAGE.write_text(page[: page.index(begin) + len(begin)] + "\n" + text + "\n" + page[page.index(end) :], encoding="utf-8")


def main(folders: list[str]) -> None:
    """Reads the reports and writes everything."""
    reports = [json.loads((Path(folder) / "report.json").read_text(encoding="utf-8")) for folder in folders]
    kept = [{name: r[name] for name in ("marks", "laws", "partings")} for r in reports]
    (HERE / "figures.json").write_text(json.dumps(rounded(kept), indent=None) + "\n", encoding="utf-8")
    files = [draw(report, seed) for seed, report in enumerate(kept)]
    replace("drawings", "\n".join(" ".join(f"![{f}](frontier/{f})" for f in row) for row in files))
    head = "seed | setting | gold picks iteration (KL) | gold gain there | parted at iteration (KL) | proxy gained after | gold lost after"
    replace("partings", table(head, [row for seed, r in enumerate(kept) for row in parting_rows(r, seed)]))
    replace(
        "laws", table("seed | of | reward | a | b | RMS error | peak", [row for seed, r in enumerate(kept) for row in law_rows(r, seed)])
    )
    head = "seed | of | best by gold | KL (nats) | gold gain | proxy gain"
    replace("best", table(head, [row for seed, r in enumerate(kept) for row in best_rows(r, seed)]))


def rounded(value: Any) -> Any:
    """Floats to five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main(sys.argv[1:])
