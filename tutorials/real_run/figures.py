"""Makes figures.json, the curves and the tables of ../real_run.md, from a run of configs/local with the commands on that page.

    python tutorials/real_run/figures.py --runs runs/local --sft sft.jsonl --ppo ppo.jsonl --logs LOGS

`--sft`, `--ppo`: what `lit-rlhf predict` wrote with the SFT policy and with PPO's. `--logs`: what `/usr/bin/time -v` printed for each run.
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_rlhf.metrics import Rouge
from lit_rlhf.report import lines
from lit_rlhf.report.svg import standalone

HERE = Path(__file__).parent
CHARTS = {
    "sft": {"loss (nats per token)": ("train/loss", "val/loss")},
    "reward": {"loss": ("train/loss", "val/loss"), "accuracy": ("train/accuracy", "val/accuracy")},
    "ppo": {
        "score": ("rollout/score",),
        "KL to SFT (nats per response)": ("rollout/kl",),
        "length (tokens)": ("rollout/length",),
        "EOS rate": ("rollout/eos_rate",),
        "policy loss": ("ppo/policy_loss",),
        "value loss": ("ppo/value_loss",),
    },
}
CURVES = {stage: sorted({m for metrics in charts.values() for m in metrics}) for stage, charts in CHARTS.items()}


def curves(folder: Path, names: list[str]) -> dict[str, list[list[float]]]:
    """[step, value] of each metric, from the newest event file that has it."""
    found: dict[str, list[list[float]]] = {}
    for version in sorted((folder / "lightning_logs").iterdir(), key=lambda p: int(p.name.split("_")[1])):
        events = EventAccumulator(str(version))
        events.Reload()
        tags = set(events.Tags()["scalars"])
        if not tags & {name for name in names if not name.startswith("val")}:
            continue  # a validation alone
        for name in set(names) & tags:
            found[name] = [[e.step, round(e.value, 5)] for e in events.Scalars(name)]
    return found


def last(folder: Path, prefix: str) -> dict[str, float]:
    """The last value of every metric under a prefix."""
    values = {}
    for version in sorted((folder / "lightning_logs").iterdir(), key=lambda p: int(p.name.split("_")[1])):
        events = EventAccumulator(str(version))
        events.Reload()
        values |= {tag: round(events.Scalars(tag)[-1].value, 4) for tag in events.Tags()["scalars"] if tag.startswith(prefix)}
    return values


def costs(log: Path) -> dict[str, float]:
    """Wall seconds and peak GB from the report of /usr/bin/time -v."""
    text = log.read_text(errors="replace")
    clock = re.search(r"Elapsed .*: ([\d:.]+)\n", text).group(1).split(":")  # type: ignore[union-attr]
    seconds = sum(float(part) * 60**i for i, part in enumerate(reversed(clock)))
    return {
        "seconds": round(seconds),
        "peak_gb": round(int(re.search(r"Maximum resident set size \(kbytes\): (\d+)", text).group(1)) / 1e6, 2),
    }  # type: ignore[union-attr]


def rouge(rows: list[dict[str, Any]]) -> dict[str, float]:
    metric = Rouge()
    metric.update([r["response"] for r in rows], [r["reference"] for r in rows])
    return {name: round(float(value), 4) for name, value in metric.compute().items()}


def wilson(right: float, n: int) -> list[float]:
    """The 95% interval of a share (Wilson 1927)."""
    z = 1.96
    centre, half = (
        (right + z * z / (2 * n)) / (1 + z * z / n),
        z * math.sqrt(right * (1 - right) / n + z * z / (4 * n * n)) / (1 + z * z / n),
    )
    return [round(centre - half, 3), round(centre + half, 3)]


def paired(a: list[float], b: list[float]) -> dict[str, Any]:
    """Mean of b - a with its standard error and 95% interval."""
    d = [y - x for x, y in zip(a, b, strict=True)]
    mean = sum(d) / len(d)
    error = math.sqrt(sum((x - mean) ** 2 for x in d) / (len(d) - 1) / len(d))
    return {
        "mean": round(mean, 3),
        "stderr": round(error, 3),
        "interval": [round(mean - 1.96 * error, 3), round(mean + 1.96 * error, 3)],
        "n": len(d),
    }


def stage(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the predictions of a policy say."""
    means = {name: round(sum(float(r[name]) for r in rows) / len(rows), 3) for name in ("score", "kl", "length", "eos_rate")}
    return means | rouge(rows)


def draw(name: str, found: dict[str, list[list[float]]]) -> list[str]:
    """Writes one SVG file per chart of a stage and returns their names."""
    files = []
    for number, (title, metrics) in enumerate(CHARTS[name].items()):
        named = {m.split("/")[0] if len(metrics) > 1 else title: [(x, y) for x, y in found.get(m, [])] for m in metrics}
        file = f"{name}-{number}.svg"
        (HERE / file).write_text(standalone(lines(f"{name}: {title}", "optimiser step", title, named)))
        files.append(file)
    return files


def tables(figures: dict[str, Any]) -> str:
    """The page's tables, in Markdown."""
    names = ("rouge1", "rouge2", "rougeL", "rouge_mean", "length", "eos_rate", "loss")
    lines = ["| SFT, greedy, 200 held-out posts | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for label, values in (("SmolLM2-135M-Instruct", figures["sft"]["before"]), ("after SFT", figures["sft"]["after"])):
        lines.append(f"| {label} | " + " | ".join(f"{values[f'val/{n}']:.3f}" for n in names) + " |")
    reward = figures["reward"]
    low, high = reward["interval"]
    lines += [
        "",
        "| reward model | held-out accuracy |",
        "| --- | ---: |",
        f"| all 200 pairs | {reward['val/accuracy']:.3f} (95%: {low}, {high}) |",
    ]
    lines += [f"| how = {k.rsplit('/', 1)[1]} | {v:.3f} |" for k, v in reward.items() if k.startswith("val/accuracy/how")]
    names = ("score", "kl", "length", "eos_rate", "rouge1", "rouge2", "rougeL", "rouge_mean")
    lines += ["", "| sampled at T = 0.7, 200 held-out posts | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    lines += [f"| {name.upper()} | " + " | ".join(f"{row[n]:.3f}" for n in names) + " |" for name, row in figures["policies"].items()]
    gain = figures["ppo_minus_sft"]
    how = f"standard error {gain['stderr']}, 95%: {gain['interval'][0]} to {gain['interval'][1]}"
    lines += ["", f"PPO minus SFT, score, paired over {gain['n']} posts: **{gain['mean']:+.3f}** ({how})."]
    lines += ["", "| run | wall time | peak memory |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {c['seconds'] // 60} min {c['seconds'] % 60} s | {c['peak_gb']} GB |" for name, c in figures["costs"].items()]
    return "\n".join(lines)


def samples(figures: dict[str, Any]) -> str:
    """Ten posts with the summaries of both policies, in Markdown."""

    def clean(text: str) -> str:
        return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")

    parts = ["| post (beginning) | maintainer | SFT (score) | PPO (score) |", "| --- | --- | --- | --- |"]
    for s in figures["samples"]:
        post = clean(s["prompt"].split("POST:", 1)[1].removesuffix("TL;DR:"))[:160]
        parts.append(f"| {post}… | {clean(s['reference'])} | {clean(s['sft'])} ({s['scores'][0]}) | {clean(s['ppo'])} ({s['scores'][1]}) |")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("runs", "sft", "ppo", "logs"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    rows = {name: [json.loads(line) for line in getattr(args, name).read_text().splitlines()] for name in ("sft", "ppo")}
    assert [r["prompt"] for r in rows["sft"]] == [r["prompt"] for r in rows["ppo"]]
    reward = last(args.runs / "reward", "val/")
    figures = {
        "sft": {"before": last(args.runs / "sft_before", "val/"), "after": last(args.runs / "sft", "val/")},
        "reward": reward | {"interval": wilson(reward["val/accuracy"], 200)},
        "policies": {name: stage(rows[name]) for name in rows},
        "ppo_minus_sft": paired([r["score"] for r in rows["sft"]], [r["score"] for r in rows["ppo"]]),
        "costs": {log.stem: costs(log) for log in sorted(args.logs.glob("*.log"))},
        "curves": {name: curves(args.runs / name, names) for name, names in CURVES.items()},
        "samples": [
            {
                "prompt": a["prompt"],
                "reference": a["reference"],
                "sft": a["response"],
                "ppo": b["response"],
                "scores": [round(a["score"], 2), round(b["score"], 2)],
            }
            for a, b in list(zip(rows["sft"], rows["ppo"], strict=True))[:: len(rows["sft"]) // 10][:10]
        ],
    }
    (HERE / "figures.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    page = HERE.parent / "real_run.md"
    pictures = " ".join(f"![{file}](real_run/{file})" for name, found in figures["curves"].items() for file in draw(name, found))
    text = page.read_text()
    for part, content in {"figures": tables(figures), "curves": pictures, "samples": samples(figures)}.items():
        start, rest = text.split(f"<!-- {part} -->", 1)
        text = f"{start}<!-- {part} -->\n{content}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    page.write_text(text)


if __name__ == "__main__":
    main()
