"""Runs the seeds of ../control.md and writes its figures.json, curves and tables.

    python tutorials/control/figures.py --out runs/control [--seeds 5] [--worlds cartpole remarks pendulum]
    python tutorials/control/figures.py --out runs/control --only cartpole/labels [--seed 0]

Every run leaves a file below --out and is not run again. With --only or --seed, those are run and nothing else is written.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from feedback import train
from preferences import CARTPOLE, PENDULUM, Learned, from_preferences, from_true_reward
from world import steps_upright

from lit_rlhf.report import Plot, Series
from lit_rlhf.report.svg import standalone

HERE = Path(__file__).parent
PAGE = HERE.parent / "control.md"
REMARK_STEPS, BIN = 3_000, 250
PICTURES = {"cartpole": ["cartpole"], "remarks": ["remarks", "tired"], "pendulum": ["pendulum"]}


def learned(run: Learned) -> dict[str, Any]:
    return {"curve": run.curve, "final": run.final, "labels": run.labels}


def remarked(method: str, seed: int, **setting: bool) -> dict[str, Any]:
    """TAMER or COACH: how long the pole stood by the step its episode ended at, and in ten fresh episodes, acting greedily."""
    net, curve = train(method, seed, REMARK_STEPS, **setting)
    final = steps_upright(lambda state: int(net(torch.as_tensor(state)).argmax()), 10, seed + 10_000)
    return {"curve": curve, "final": final}


RUNS: dict[str, Callable[[int], dict[str, Any]]] = {
    "cartpole/true": lambda seed: learned(from_true_reward(CARTPOLE, seed)),
    "cartpole/labels": lambda seed: learned(from_preferences(CARTPOLE, seed)),
    "cartpole/shuffled": lambda seed: learned(from_preferences(CARTPOLE, seed, shuffled=True)),
    "pendulum/true": lambda seed: learned(from_true_reward(PENDULUM, seed)),
    "pendulum/labels": lambda seed: learned(from_preferences(PENDULUM, seed)),
    "remarks/TAMER": lambda seed: remarked("tamer", seed),
    "remarks/COACH": lambda seed: remarked("coach", seed),
    "remarks/TAMER, tired": lambda seed: remarked("tamer", seed, tires=True),
    "remarks/COACH, tired": lambda seed: remarked("coach", seed, tires=True),
    "remarks/TAMER, muddled": lambda seed: remarked("tamer", seed, muddled=True),
    "remarks/COACH, muddled": lambda seed: remarked("coach", seed, muddled=True),
}
FEWER = {"cartpole/shuffled": 1, "pendulum/true": 1, "pendulum/labels": 1}  # seeds of a control, and of what the page shows besides
NAMES = {"true": "true reward", "labels": "700 labels", "shuffled": "700 labels, shuffled"}


def run(name: str, seed: int, out: Path) -> dict[str, Any]:
    """The run's numbers, from its file where it has one; `seconds` are of the processor."""
    file = out / f"{name.replace('/', '-').replace(', ', '-')}-{seed}.json"
    if not file.is_file():
        begin = time.process_time()
        found = RUNS[name](seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found | {"seconds": round(time.process_time() - begin, 1)}) + "\n", encoding="utf-8")
        print(name, seed, round(found["final"], 1), flush=True)
    return json.loads(file.read_text(encoding="utf-8"))


def on_grid(curve: list[list[float]], grid: list[float]) -> list[float]:
    """The curve's last value at or before each point of the grid, its first one before that."""
    return [next((y for x, y in reversed(curve) if x <= g), curve[0][1]) for g in grid]


def series(name: str, runs: list[dict[str, Any]], grid: list[float]) -> Series:
    """The mean over seeds, in a band from the lowest to the highest."""
    by_point = list(zip(*(on_grid(r["curve"], grid) for r in runs), strict=True))
    return Series(name, grid, [fmean(p) for p in by_point], [min(p) for p in by_point], [max(p) for p in by_point])


def pictures(world: str, found: dict[str, list[dict[str, Any]]]) -> dict[str, Plot]:
    """One world's curves by file name."""

    def of(grid: list[float], keys: dict[str, str]) -> list[Series]:
        return [series(label, found[f"{world}/{key}"], grid) for key, label in keys.items()]

    if world == "cartpole":
        steps = [1600.0 * (i + 1) for i in range(CARTPOLE.steps // 1600)]
        return {"cartpole": Plot("CartPole, fixed horizon: PPO", "steps", "true return, at most 200", of(steps, NAMES))}
    if world == "pendulum":
        steps, two = [200.0 * (i + 1) for i in range(PENDULUM.steps // 200)], {key: NAMES[key] for key in ("true", "labels")}
        return {"pendulum": Plot("Pendulum: SAC", "steps", "true return, at most 0", of(steps, two))}
    bins, label = [float(BIN * (i + 1)) for i in range(REMARK_STEPS // BIN)], "steps the pole stood"
    plain = {key: key for key in ("TAMER", "COACH", "TAMER, muddled", "COACH, muddled")}
    tired = {"TAMER, tired": "TAMER", "COACH, tired": "COACH"}
    return {
        "remarks": Plot("CartPole-v1: a trainer's remarks", "steps", label, of(bins, plain)),
        "tired": Plot("The same, with a trainer who tires", "steps", label, of(bins, tired)),
    }


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Each seed's final value, their mean and its standard error."""
    seeds = max(map(len, found.values()))
    rows = [
        "| learned from | " + " | ".join(f"seed {s}" for s in range(seeds)) + " | mean | processor seconds |",
        "| --- |" + " ---: |" * (seeds + 2),
    ]
    for name, runs in found.items():
        finals, key = [r["final"] for r in runs], name.split("/")[1]
        each = [f"{x:.1f}" for x in finals] + ["–"] * (seeds - len(finals))
        error = f" ± {stdev(finals) / len(finals) ** 0.5:.1f}" if len(finals) > 1 else ""
        cells = [NAMES.get(key, key), *each, f"{fmean(finals):.1f}{error}"]
        rows.append("| " + " | ".join([*cells, f"{fmean(r['seconds'] for r in runs):.0f}"]) + " |")
    return "\n".join(rows)


def replace(name: str, text: str) -> None:
    """Writes `text` between the page's marks of that name."""
    page = PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    PAGE.write_text(page[: page.index(begin) + len(begin)] + "\n" + text + "\n" + page[page.index(end) :], encoding="utf-8")


def publish(world: str, found: dict[str, list[dict[str, Any]]]) -> None:
    """Writes one world's figures, curves and table."""
    file = HERE / "figures.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name, runs in found.items():
        kept[name] = [{k: r[k] for k in ("final", "seconds", "labels") if k in r} for r in runs]
    file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    for name, plot in pictures(world, found).items():
        (HERE / f"{name}.svg").write_text(standalone(plot) + "\n", encoding="utf-8")
    shown = " ".join(f"![{name}](control/{name}.svg)" for name in PICTURES[world])
    replace(world, f"{shown}\n\n{table(found)}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--worlds", nargs="*", choices=list(PICTURES), default=list(PICTURES))
    parser.add_argument("--only", nargs="*", choices=list(RUNS), help="run these, write no page")
    parser.add_argument("--seed", type=int, help="run this one alone, write no page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(args.seeds) if args.seed is None else [args.seed]
    for world in args.worlds:
        names = [name for name in args.only or RUNS if name.startswith(world)]
        found = {name: [run(name, seed, args.out) for seed in seeds[: FEWER.get(name)]] for name in names}
        if not args.only and args.seed is None:
            publish(world, found)


if __name__ == "__main__":
    main()
