"""report.html: the stage table, the training curves and summaries side by side, in one file that loads nothing from elsewhere."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_rlhf.data.text import split_post
from lit_rlhf.quickstart.chart import Chart, Points, smoothed, svg

SHOWN_POSTS = 12
COLUMNS = {
    "gold": "gold reward",
    "score": "reward model's score",
    "kl": "KL to SFT (nats)",
    "length": "length (tokens)",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
}
DIGITS = {"length": 1, "score": 2, "kl": 2}
STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #5b6470; --rule: #d9dee5; --page: #ffffff; --card: #f5f7fa;
  --c0: #1f6feb; --c1: #c2570c; --c2: #2c8a4b; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ee; --soft: #9aa4b2; --rule: #343b46; --page: #14171c; --card: #1d2128;
  --c0: #6ea8fe; --c1: #f0a35e; --c2: #6cc98b; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 1180px;
  margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { max-width: 75ch; } .soft { color: var(--soft); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } .scroll { overflow-x: auto; }
th, td { padding: .35rem .7rem; white-space: nowrap; border-bottom: 1px solid var(--rule); text-align: right; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; color: var(--soft); font-size: .85rem; }
.grid-of-charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 1rem; }
.grid-of-charts svg { width: 100%; background: var(--card); border-radius: 8px; padding: 6px; box-sizing: border-box; }
svg text { font-family: inherit; fill: var(--text); } svg .title { font-size: 12px; font-weight: 600; }
svg .tick { font-size: 10px; fill: var(--soft); } svg .label { font-size: 10.5px; fill: var(--soft); }
svg .grid { stroke: var(--rule); } svg .level { stroke: var(--soft); stroke-dasharray: 5 4; }
svg polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg line.line0, svg line.line1, svg line.line2 { stroke-width: 2.5; }
.line0 { stroke: var(--c0); } .line1 { stroke: var(--c1); } .line2 { stroke: var(--c2); }
.fill0 { fill: var(--c0); } .fill1 { fill: var(--c1); } .fill2 { fill: var(--c2); }
article { background: var(--card); border-radius: 8px; padding: .8rem 1rem; margin: .8rem 0; }
article p { margin: .2rem 0 .6rem; max-width: none; }
article dl { display: grid; grid-template-columns: 7rem 3.4rem 1fr; gap: .15rem .6rem; margin: 0; }
article dt { color: var(--soft); } article dd { margin: 0; overflow-wrap: anywhere; }
article dd.number { text-align: right; font-variant-numeric: tabular-nums; }
"""


def write_report(path: Path, report: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], logs: Path) -> None:
    """Writes report.html from the report's numbers, the samples of `evaluate` and the TensorBoard files below `logs`."""
    read = {stage: read_curves(logs / stage) for stage in ("sft", "reward", "ppo")}
    charts = [svg(chart) for chart in all_charts(read, report["kl_target"])]
    path.write_text(page(report, samples, [chart for chart in charts if chart]), encoding="utf-8")


def page(report: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], charts: Sequence[str]) -> str:
    """The page; every text that is not ours is escaped."""
    body = [
        "<h1>lit_rlhf quickstart</h1>",
        f'<p class="soft">Seed {report["seed"]}, {report["posts"]} held-out posts, {report["seconds"]["total"]:.0f} seconds in all.</p>',
        _verdict(report),
        "<h2>Stages</h2>",
        _stages(report["stages"]),
        '<p class="soft">Gold reward: +1 per key fact that the summary states, -1 per false one and per filler, a little off for length or '
        f"a missing end; {report['people']['gold']:.2f} for the people's own summaries. All stages sample at the training temperature; ± is"
        " one standard error. ROUGE compares with one person's summary, good or bad, so it need not rise with the gold reward.</p>",
        "<h2>Training</h2>",
        f'<div class="grid-of-charts">{"".join(charts)}</div>',
        "<h2>Summaries side by side</h2>",
        '<p class="soft">With the gold reward of each; the first is a person\'s, to which ROUGE compares.</p>',
        *(_sample(sample) for sample in samples[:SHOWN_POSTS]),
        "<h2>Time</h2>",
        _seconds(report["seconds"]),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>quickstart</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def stage_table(report: Mapping[str, Any]) -> str:
    """The stage table and the two other headline numbers as plain text."""
    lines = [f"{'stage':10} {'gold':>14} {'score':>7} {'KL':>7} {'length':>7} {'ROUGE-1':>8} {'ROUGE-2':>8} {'ROUGE-L':>8}"]
    for row in report["stages"]:
        first = f"{row['name']:10} {row['gold']:6.2f} ± {row['gold_stderr']:.2f}  {row['score']:7.2f} {row['kl']:7.2f} {row['length']:7.1f}"
        lines.append(first + "".join(f" {row[key]:8.3f}" for key in ("rouge1", "rouge2", "rougeL")))
    gain = report["ppo_minus_sft"]
    difference = f"{gain['gold']:+.2f} ± {gain['gold_stderr']:.2f} ({gain['standard_errors']:.0f} standard errors)"
    lines.append(f"\nPPO - SFT: gold {difference} on {report['posts']} posts")
    lines.append(f"reward model: orders {report['reward_accuracy']:.1%} of fresh pairs as the gold reward does")
    return "\n".join(lines)


def read_curves(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Every scalar of the newest TensorBoard log below `folder`: tag -> (step, value); empty where there is none."""
    files = sorted(folder.rglob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime)
    if not files:
        return {}
    events = EventAccumulator(str(files[-1].parent), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def all_charts(read: Mapping[str, Mapping[str, Points]], kl_target: float | None) -> list[Chart]:
    """The report's charts from each stage's curves."""
    sft, reward, ppo = (lambda tag, curves=read[stage]: curves.get(tag, []) for stage in ("sft", "reward", "ppo"))
    step, update = "optimiser step", "optimiser step"
    accuracy = {"training": smoothed(reward("train/accuracy"), 10), "validation": reward("val/accuracy")}
    return [
        Chart("SFT: loss", step, "nats per token", {"training": sft("train/loss"), "validation": sft("val/loss")}),
        Chart("SFT: ROUGE", step, "F-measure", {f"ROUGE-{key[5:]}": sft(f"val/{key}") for key in ("rouge1", "rouge2", "rougeL")}),
        Chart("Reward: loss", step, "nats per pair", {"training": smoothed(reward("train/loss"), 5), "validation": reward("val/loss")}),
        Chart("Reward: accuracy", step, "share of noisy choices", accuracy),
        Chart("PPO: score", update, "reward model's score", {"rollout": ppo("rollout/score"), "validation": ppo("val/score")}),
        Chart("PPO: KL", update, "nats per response", {"": ppo("rollout/kl")}, level=None if kl_target is None else ("target", kl_target)),
        Chart("PPO: length", update, "tokens per response", {"": ppo("rollout/length")}),
        Chart("PPO: entropy", update, "nats per token", {"": ppo("rollout/entropy")}),
        Chart("PPO: value loss", update, "squared score", {"": ppo("ppo/value_loss")}),
    ]


def _verdict(report: Mapping[str, Any]) -> str:
    gain, kl = report["ppo_minus_sft"], report["stages"][-1]["kl"]
    target = "" if report["kl_target"] is None else f" of a target of {report['kl_target']:g}"
    return (
        f"<p>On the same posts the gold reward of PPO's summaries is <b>{gain['gold']:+.2f} ± {gain['gold_stderr']:.2f}</b> from SFT's "
        f"({gain['standard_errors']:.0f} standard errors), at a KL of {kl:.1f} nats{target}. The reward model, which saw nothing but noisy "
        f"choices, orders {report['reward_accuracy']:.1%} of fresh pairs of summaries as the gold reward does.</p>"
    )


def _stages(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{title}</th>" for title in ("stage", *COLUMNS.values()))
    body = []
    for row in rows:
        cells = [escape(row["name"]), f"{row['gold']:.2f} ± {row['gold_stderr']:.2f}"]
        cells += [f"{row[key]:.{DIGITS.get(key, 3)}f}" for key in list(COLUMNS)[1:]]
        body.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _sample(sample: Mapping[str, Any]) -> str:
    """One post, and a person's and every stage's summary with its gold reward."""
    post = split_post(sample["prompt"])
    text = sample["prompt"] if post is None else post.post
    title = "" if post is None else post.head.partition("TITLE:")[2].removesuffix("POST: ").strip()
    lines = []
    for name, (summary, worth) in sample["summaries"].items():
        lines.append(f'<dt>{escape(name)}</dt><dd class="number">{worth:.2f}</dd><dd>{printable(summary)}</dd>')
    return f"<article><p><b>{printable(title)}</b> {printable(text)}</p><dl>{''.join(lines)}</dl></article>"


def printable(text: str) -> str:
    """The text for HTML: escaped, with a mark for every control character that a model may have written."""
    return escape("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text.strip()))


def _seconds(seconds: Mapping[str, float]) -> str:
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{value:.0f} s</td></tr>" for name, value in seconds.items())
    return f"<table><tbody>{rows}</tbody></table>"
