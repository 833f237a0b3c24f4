"""Makes figures.json, the drawings, tables and samples of ../debian_tldr.md from what run.sh left.

    python tutorials/debian_tldr/figures.py RUNS

Reports are read as report.json; their figures are data there and are drawn again for the page.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_rlhf.report import Bars, Plot, Series, lines
from lit_rlhf.report.svg import standalone

HERE = Path(__file__).parent
PAGE = HERE.parent / "debian_tldr.md"
NOT_RUN = "*Not run yet.*"
CURVES = {
    "sft": {"loss (nats per token)": ("train/loss", "val/loss")},
    "reward": {"loss (nats per pair)": ("train/loss", "val/loss")},
    "frontier/as_configured": {
        "score": ("rollout/score",),
        "KL to SFT (nats per response)": ("rollout/kl",),
        "value loss": ("ppo/value_loss",),
        "length (tokens)": ("rollout/length",),
    },
}
DRAWN = {  # file -> report and the figure's title in it
    "reward-how": ("reward", "Accuracy by how"),
    "reward-reliability": ("reward", "Reliability"),
    "reward-differences": ("reward", "Score differences"),
    "reward-length": ("reward", "Accuracy by length difference"),
    "hh-reliability": ("hh", "Reliability"),
    "hh-length": ("hh", "Accuracy and length"),
    "curve": ("learning_curve", "Accuracy against training pairs"),
    "frontier-ppo": ("frontier", "PPO"),
    "frontier-best": ("frontier", "Best-of-n from SFT"),
    "frontier-both": ("frontier", "Gold reward of both"),
    "doctor-kinds": ("doctor_after", "Mean score by kind of response"),
    "inspect-value": ("inspect", "Value and return"),
}
REPORTS = ("reward", "hh", "learning_curve", "frontier", "doctor_before", "doctor_after", "inspect")
SFT_NAMES = ("rouge1", "rouge2", "rougeL", "rouge_mean", "length", "eos_rate", "loss")
REWARD_NAMES = {
    "pairs": "held-out pairs",
    "accuracy": "accuracy",
    "loss": "loss (nats per pair; chance 0.693)",
    "ece": "calibration error",
    "ece_floor": "that of a perfectly calibrated model",
    "mean_confidence": "mean confidence",
    "accuracy_matched": "accuracy at matched length",
    "longer_chosen": "the data prefer the longer",
    "longer_scored": "the model prefers the longer",
    "length_correlation": "correlation with length",
}
TOKEN_NAMES = ("logprob", "ref_logprob", "kl", "reward", "value", "advantage", "return")


def read(runs: Path, name: str) -> dict[str, Any]:
    """A report; {} where that step has not run."""
    path = runs / name / "report.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def scalars(folder: Path) -> dict[str, list[list[float]]]:
    """[step, value] of every metric in a run's event files; the newest file that has it wins."""
    found: dict[str, list[list[float]]] = {}
    for version in sorted((folder / "lightning_logs").glob("version_*"), key=lambda p: int(p.name.split("_")[1])):
        events = EventAccumulator(str(version))
        events.Reload()
        found |= {tag: [[e.step, round(e.value, 5)] for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return found


def last(folder: Path) -> dict[str, float]:
    """The last value of every validation metric."""
    return {tag.removeprefix("val/"): points[-1][1] for tag, points in scalars(folder).items() if tag.startswith("val/")}


def block(report: dict[str, Any], title: str) -> dict[str, Any] | None:
    """The figure or table of that title."""
    return next((b for s in report.get("sections", []) for b in s["blocks"] if b.get("title") == title), None)


def figure(found: dict[str, Any]) -> Plot | Bars:
    """The figure that a report holds as data."""
    data = {name: value for name, value in found.items() if name != "kind"}
    return Plot(**data | {"series": [Series(**s) for s in data["series"]]}) if "series" in data else Bars(**data)


def costs(path: Path) -> dict[str, float]:
    """CPU and wall minutes and peak GB from the report of /usr/bin/time -v."""
    text = path.read_text(encoding="utf-8", errors="replace")

    def value(name: str) -> str:
        return re.search(rf"{name}.*: ([\d:.]+)\n", text).group(1)  # type: ignore[union-attr]

    wall = sum(float(part) * 60**i for i, part in enumerate(reversed(value("Elapsed").split(":"))))
    cpu = float(value("User time")) + float(value("System time"))
    return {"cpu": round(cpu / 60, 1), "wall": round(wall / 60, 1), "gb": round(int(value("Maximum resident")) / 1e6, 1)}


def collect(runs: Path) -> dict[str, Any]:
    """Everything that the page shows, as data."""
    reports = {
        name: read(runs, name) for name in ("reward", "hh", "learning_curve", "frontier", "doctor_before", "doctor_after", "inspect")
    }
    rates = {path.parent.name: json.loads(path.read_text())["judges"] for path in sorted((runs / "winrate").glob("*/report.json"))}
    policies = {name: rows_of(runs / "predictions" / name / "predictions.jsonl") for name in ("sft", "ppo", "best_of_n")}
    inspected = reports["inspect"]
    return {
        "sft": {"before": last(runs / "before"), "after": last(runs / "sft")},
        "reward": {n: {k: reports[n][k] for k in REWARD_NAMES} for n in ("reward", "hh") if reports[n]},
        "judge": last(runs / "judge"),
        "how": (block(reports["reward"], "Accuracy by group") or {}).get("rows", []),
        "learning_curve": {k: v for k, v in reports["learning_curve"].items() if k in ("sizes", "pairs", "last_gain", "accuracy")},
        "frontier": {k: v for k, v in reports["frontier"].items() if k in ("marks", "laws", "partings")},
        "winrate": rates,
        "policies": {n: means(rows) for n, rows in policies.items() if rows},
        "doctor": {n: reports[n].get("findings", []) for n in ("doctor_before", "doctor_after")},
        "inspect": {k: inspected[k] for k in ("prompt", "response", "tokens", "score", "columns", "settings")} if inspected else {},
        "costs": {path.name: costs(path) for path in sorted((runs / "time").iterdir()) if path.stat().st_size},
        "curves": {name: curves_of(runs / name, charts) for name, charts in CURVES.items()},
        "samples": samples_of(policies["sft"], policies["ppo"]),
    }


def curves_of(folder: Path, charts: dict[str, tuple[str, ...]]) -> dict[str, list[list[float]]]:
    found = scalars(folder)
    return {metric: found[metric] for metrics in charts.values() for metric in metrics if metric in found}


def means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The mean of each number in a policy's predictions, and ROUGE against the maintainers' synopses."""
    from lit_rlhf.metrics import Rouge

    metric = Rouge()
    metric.update([r["response"] for r in rows], [r["reference"] for r in rows])
    names = [n for n in ("score", "kl", "length", "eos_rate") if n in rows[0]]
    found = {n: sum(float(r[n]) for r in rows) / len(rows) for n in names}
    return {"rows": len(rows)} | found | {n: float(v) for n, v in metric.compute().items()}


def samples_of(sft: list[dict[str, Any]], ppo: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ten posts, evenly taken, with what both policies wrote."""
    if not sft or not ppo:
        return []
    assert [r["prompt"] for r in sft] == [r["prompt"] for r in ppo]
    pairs = list(zip(sft, ppo, strict=True))[:: max(1, len(sft) // 10)][:10]
    return [
        {"prompt": a["prompt"], "reference": a["reference"], "sft": a["response"], "ppo": b["response"], "scores": [a["score"], b["score"]]}
        for a, b in pairs
    ]


def draw(runs: Path, data: dict[str, Any]) -> dict[str, str]:
    """Writes the drawings; returns their Markdown by name."""
    made = {}
    for file, (name, title) in DRAWN.items():
        found = block(read(runs, name), title)
        if found:
            (HERE / f"{file}.svg").write_text(standalone(figure(found)) + "\n", encoding="utf-8")
            made[file] = f"![{title}](debian_tldr/{file}.svg)"
    for name, charts in CURVES.items():
        stage = "ppo" if name.startswith("frontier") else name
        for number, (title, metrics) in enumerate(charts.items()):
            curves = {
                m.split("/")[0] if len(metrics) > 1 else title: [(x, y) for x, y in data["curves"][name][m]]
                for m in metrics
                if m in data["curves"][name]
            }
            if curves:
                (HERE / f"{stage}-{number}.svg").write_text(standalone(lines(f"{stage}: {title}", "optimiser step", title, curves)) + "\n")
                made[f"{stage}-{number}"] = f"![{stage}: {title}](debian_tldr/{stage}-{number}.svg)"
    return made


def row(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def table(head: str, rows: list[str]) -> str:
    """A Markdown table; a line that says so where its step has not run."""
    if not rows:
        return NOT_RUN
    columns = head.count("|") + 1
    return "\n".join([f"| {head} |", "| --- |" + " ---: |" * (columns - 1), *rows])


def shown(value: Any, digits: int = 3, sign: str = "") -> str:
    """A number, an interval, or nothing."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return f"{value['mean']:{sign}.{digits}f} ({value['low']:{sign}.{digits}f} to {value['high']:{sign}.{digits}f})"
    return f"{value:{sign}.{digits}f}" if isinstance(value, float) else f"{value:,}"


def short(value: float) -> str:
    return f"{value:.1f}"


def clean(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def tables(data: dict[str, Any], runs: Path) -> dict[str, str]:
    """The page's tables by name."""
    names = list(data["reward"])
    policies = ("score", "kl", "length", "eos_rate", "rouge1", "rouge2", "rougeL", "rouge_mean")
    sft = [
        row(label, *(shown(values[n]) for n in SFT_NAMES))
        for label, values in (("SmolLM2-135M-Instruct", data["sft"]["before"]), ("after SFT", data["sft"]["after"]))
        if values
    ]
    found = {
        "sft": table(f"greedy, 200 held-out posts | {' | '.join(SFT_NAMES)}", sft),
        "reward": table(
            "| " + " | ".join({"reward": "Debian synopses", "hh": "HH harmless"}[n] for n in names),
            [row(what, *(shown(data["reward"][n][k]) for n in names)) for k, what in REWARD_NAMES.items()],
        ),
        "how": table("how the other one was made | pairs | accuracy", [row(r[1], r[2], shown(r[3])) for r in data["how"]]),
        "policies": table(
            f"sampled at T = 0.7 | posts | {' | '.join(policies)}",
            [row(n.upper(), v["rows"], *(shown(v.get(k)) for k in policies)) for n, v in data["policies"].items()],
        ),
        "winrate": table("A against B | judge | A wins | at equal length | won, tied, lost | unparsable | named first", winrates(data)),
        "costs": table("step | CPU min | wall min | peak GB", [row(n, *map(short, c.values())) for n, c in data["costs"].items()]),
        "samples": samples(data),
        "tokens": tokens(data["inspect"]),
    }
    for name in ("doctor_before", "doctor_after"):
        path = runs / f"{name}.txt"
        found[name] = f"```\n{path.read_text(encoding='utf-8').strip()}\n```" if path.is_file() else NOT_RUN
    return found | frontier(data["frontier"]) | curve(data["learning_curve"])


def curve(found: dict[str, Any]) -> dict[str, str]:
    if not found:
        return {"learning_curve": NOT_RUN}
    accuracy = found["accuracy"]["all validation pairs"]
    rows = [row(pairs, shown(e)) for pairs, e in zip(found["pairs"], accuracy, strict=True)]
    return {"learning_curve": table("training pairs | held-out accuracy", rows)}


def frontier(found: dict[str, Any]) -> dict[str, str]:
    """The points, and where the two part."""
    if not found:
        return {"frontier": NOT_RUN}
    points = [
        row(
            "best of n" if m["setting"] == "best of n" else "PPO",
            m["iteration"],
            f"{m['kl']:.2f}",
            *(shown(m["gains"].get(reward), 2, "+") for reward in ("proxy", "gold")),
        )
        for m in found["marks"]
    ]
    return {"frontier": table("of | iteration or n | KL (nats) | proxy gain | gold gain (ROUGE)", points)}


def winrates(data: dict[str, Any]) -> list[str]:
    rows = []
    for pair, judges in data["winrate"].items():
        for judge, r in judges.items():
            counts = f"{r['wins']}, {r['ties']}, {r['losses']}"
            named = "" if r["picked_first"] is None else f"{r['picked_first']:.0%}"
            known = Path(judge).parent.name if judge.endswith("/hf") else judge.split(".")[-1]
            name = JUDGES.get(known, "SmolLM2-135M-Instruct, asked")
            rows.append(
                row(pair.replace("-", " / "), name, shown(r["all"], 2), shown(r["equal_length"], 2), counts, r["unparsable"], named)
            )
    return rows


JUDGES = {"reward": "the reward model that PPO saw", "judge": "a reward model of other pairs", "rouge": "ROUGE with the maintainer"}


def samples(data: dict[str, Any]) -> str:
    rows = []
    if not data["samples"]:
        return NOT_RUN
    for s in data["samples"]:
        post = clean(s["prompt"].split("POST:", 1)[1].removesuffix("TL;DR:"))[:160]
        written = [f"{clean(s[n])} ({score:.2f})" for n, score in zip(("sft", "ppo"), s["scores"], strict=True)]
        rows.append(row(f"{post}…", clean(s["reference"]), *written))
    return "\n".join(["| post (beginning) | maintainer | SFT (score) | PPO (score) |", "| --- | --- | --- | --- |", *rows])


def tokens(found: dict[str, Any]) -> str:
    if not found:
        return NOT_RUN
    rows = [
        row(f"`{token.replace(' ', '·')}`", *(shown(found["columns"][n][t], 2) for n in TOKEN_NAMES))
        for t, token in enumerate(found["tokens"])
    ]
    return table(f"token | {' | '.join(TOKEN_NAMES)}", rows)


def rounded(value: Any) -> Any:
    """Floats to five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def replace(page: str, name: str, text: str) -> str:
    """The page with `text` between its marks of that name."""
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    return page[: page.index(begin) + len(begin)] + "\n" + text + "\n" + page[page.index(end) :]


def main(runs: Path) -> None:
    data = rounded(collect(runs))
    (HERE / "figures.json").write_text(json.dumps(data, ensure_ascii=False) + "\n", encoding="utf-8")
    pictures = draw(runs, data)
    page = PAGE.read_text(encoding="utf-8")
    for name, text in tables(data, runs).items():
        page = replace(page, name, text)
    for names in re.findall(r"<!-- pictures: (.*?) -->", page):
        page = replace(page, f"pictures: {names}", " ".join(pictures[n] for n in names.split() if n in pictures))
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
