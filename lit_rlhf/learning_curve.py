"""`lit-rlhf learning-curve --config reward.yaml`: a reward model's accuracy against the number of training pairs.

The same run, from the same start, on nested parts of the training rows; each is judged on the same validation pairs. It says whether more
labels would help, how far the model is from people's agreement among themselves, and whether it serves annotators it has not learned from.
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

import lit_rlhf.data
import lit_rlhf.modules
from lit_rlhf import cli
from lit_rlhf.callbacks import RewardReport
from lit_rlhf.cli_errors import one_line, parameter_names
from lit_rlhf.data.loader import permutation
from lit_rlhf.data.table import Table
from lit_rlhf.functional.preferences import label_agreement
from lit_rlhf.functional.statistics import Estimate, grouped_mean
from lit_rlhf.modules import PairwiseReward
from lit_rlhf.report import Plot, Report, Series, Text
from lit_rlhf.report import Table as ReportTable
from lit_rlhf.report.reward import ScoredPairs, numbers
from lit_rlhf.report.tensorboard import publish

SIZES = 6  # of the curve where none are given: all rows, a half, a quarter, …
WORKER = "worker"
FIXED = (  # nothing but the weights in memory is wanted of each run
    "--trainer.callbacks=null",
    "--trainer.enable_checkpointing=false",
    "--trainer.logger=false",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.val_check_interval=1.0",
    "--trainer.check_val_every_n_epoch=1000000",
)


class TrainOn(Callback):
    """Leaves the training table with these rows alone, once the DataModule has read it."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            tables = trainer.datamodule.tables
            tables["train"] = tables["train"].take(self.rows)


@dataclass
class Point:
    """One size of the curve: rows and pairs trained on, and the validation pairs as that model scores them."""

    rows: int
    pairs: int
    scored: ScoredPairs
    seconds: float


@dataclass
class Labels:
    """What the data says before any training."""

    train: Table
    workers: list[Any]
    """Who labelled each training row; None where it is not known."""
    agreement: Estimate | None
    """Of people among themselves, on the validation pairs, else on the training pairs."""
    digest: str
    """SHA-256 of the training and validation rows as tokenised."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `lit-rlhf learning-curve` with these arguments and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="lit-rlhf learning-curve",
        description="Trains a reward model on parts of its data and draws accuracy against pairs; --config files and options as in `fit`.",
        allow_abbrev=False,
    )
    parser.add_argument("--sizes", type=int, nargs="+", metavar="ROWS", help="training rows (default: all, a half, a quarter, … six sizes)")
    parser.add_argument("--out", type=Path, help="folder for the report (default: learning_curve in trainer.default_root_dir)")
    parser.add_argument("--hold_out_workers", type=float, default=0.0, help="share of the annotators (column `worker`) not trained on")
    options, args = parser.parse_known_args(argv)
    cli.quiet()
    try:
        path = learning_curve(args, options.sizes, options.out, options.hold_out_workers)
    except (ValueError, FileNotFoundError, cli.Refused, RuntimeError) as error:
        if not (isinstance(error, cli.Refused) or cli.raised_here(error)):
            raise
        return cli.report(one_line(error, args, parameter_names(lit_rlhf.modules, lit_rlhf.data)), error, debug=False, code=2)
    print(f"\nAccuracy against pairs: {path}")
    return 0


def learning_curve(args: Sequence[str], sizes: Sequence[int] | None = None, out: Path | None = None, hold_out_workers: float = 0.0) -> Path:
    """Trains at each size and writes the report; returns the path of report.html.

    args: the arguments of `lit-rlhf fit` for a PairwiseReward. Sizes that an earlier call with the same arguments and rows finished are
    read from `out` and not trained again. Raises ValueError for sizes or data that allow no curve.
    """
    if not 0 <= hold_out_workers < 1:
        raise ValueError(f"--hold_out_workers is {hold_out_workers}; give a share of the annotators, at least 0 and below 1")
    built = build(args)
    labels = read_labels(built)
    held = held_out(labels.workers, hold_out_workers)
    order = permutation(len(labels.train), 0, 0x4C43)
    order = order[[labels.workers[i] not in held for i in order]]
    wanted = sorted(set(sizes or [len(order) >> i for i in range(SIZES)]))
    wanted = [size for size in wanted if size >= (1 if sizes else built.datamodule.batch_size)]
    if len(wanted) < 2 or wanted[0] < 1 or wanted[-1] > len(order):
        raise ValueError(
            f"sizes {wanted or list(sizes or ())} of {len(order)} training rows make no curve: give two or more from 1 to that"
        )
    out = out or Path(built.trainer.default_root_dir) / "learning_curve"
    points = []
    for size in wanted:
        print(f"\n== {size:,} rows", flush=True)
        made_by = {"args": list(args), "data": labels.digest, "held_out_workers": sorted(map(str, held))}
        points.append(point(args, np.sort(order[:size]), out / "points" / f"{size}.json", made_by))
        found = points[-1].scored.accuracy()
        print(f"accuracy {found.mean:.3f} ({found.low:.3f} to {found.high:.3f}), {points[-1].seconds:.0f} s", flush=True)
    return publish(make_report(points, labels, held), out)


def build(args: Sequence[str]) -> cli.CLI:
    """Trainer, module and DataModule of the command line `args`; raises ValueError where the module is no PairwiseReward."""
    built = cli.build(["fit", *args, *FIXED])
    if not isinstance(built.model, PairwiseReward):
        raise ValueError(f"a learning curve is of a PairwiseReward, not of {type(built.model).__name__}: give the YAML of the reward stage")
    return built


def point(args: Sequence[str], rows: np.ndarray, path: Path, made_by: dict[str, Any]) -> Point:
    """The size's point as the file holds it, where the same arguments and data made that; else trained now and written."""
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["made_by"] == made_by:
            print(f"from {path}", flush=True)
            scored = known["scored"]
            scored |= {"scores": torch.tensor(scored["scores"], dtype=torch.double)}
            scored |= {name: torch.tensor(scored[name]) for name in ("lengths", "target")}
            return Point(len(rows), known["pairs"], ScoredPairs(**scored), known["seconds"])
    made = train(args, rows)
    scored = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in vars(made.scored).items()}
    content = {"made_by": made_by, "pairs": made.pairs, "seconds": made.seconds, "scored": scored}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(new, path)
    return made


def train(args: Sequence[str], rows: np.ndarray) -> Point:
    """One run on these training rows, and its scores of the validation pairs."""
    begin, built = time.perf_counter(), build(args)
    judge = RewardReport(write=False)
    built.trainer.callbacks += [TrainOn(rows), judge]
    built.trainer.fit(built.model, built.datamodule)
    built.trainer.validate(built.model, built.datamodule, verbose=False)
    pairs = int(built.datamodule.tables["train"].pairs.sum())
    return Point(len(rows), pairs, judge.pairs.decided(), time.perf_counter() - begin)


def read_labels(built: cli.CLI) -> Labels:
    """Reads and tokenises the data as `fit` will, and looks at who labelled what."""
    data = built.datamodule
    data.trainer = SimpleNamespace(lightning_module=built.model)
    data.setup("fit")
    if "val" not in data.tables:
        raise ValueError("a learning curve needs validation pairs: give --data.val_data, or --data.val_fraction 0.1")
    agreement = next((found for split in ("val", "train") if (found := agreement_of(data.tables[split])) is not None), None)
    digest = hashlib.sha256()
    for split in ("val", "train"):
        rows = data.tables[split].fetch(range(len(data.tables[split])))
        digest.update(json.dumps(rows, default=str).encode())
    workers = [json.loads(row["columns"]).get(WORKER) for row in rows]
    return Labels(data.tables["train"], workers, agreement, digest.hexdigest())


def agreement_of(table: Table) -> Estimate | None:
    """How far people agree on the pairs of responses that a table has more than once; ties left out."""
    items, first = [], []
    for row in table.fetch(range(len(table))):
        for q, (i, j) in enumerate(row["pairs"]):
            a, b = tuple(row["responses"][i]), tuple(row["responses"][j])
            if row["target"] and row["target"][q] == 0.5:
                continue
            items.append((row["key"], *sorted((a, b))))
            first.append((a <= b) == (not row["target"] or row["target"][q] > 0.5))
    return label_agreement(numbers(items), torch.tensor(first, dtype=torch.bool))


def held_out(workers: Sequence[Any], share: float) -> set[Any]:
    """So many of the annotators, drawn by a fixed permutation; none where the share is 0.

    Raises ValueError where a share is asked for and fewer than two annotators are known.
    """
    known = sorted({w for w in workers if w is not None}, key=str)
    if not share:
        return set()
    if len(known) < 2:
        raise ValueError(f"--hold_out_workers: the training rows name {len(known)} annotators in a column {WORKER!r}; it takes two or more")
    count = min(max(1, round(share * len(known))), len(known) - 1)
    return {known[i] for i in permutation(len(known), 0, 0x484F)[:count]}


def make_report(points: Sequence[Point], labels: Labels, held: set[Any]) -> Report:
    """The curve, its table, and what the last doubling brought."""
    known = {w for w in labels.workers if w is not None} - held
    voters = points[0].scored.columns.get(WORKER, [])
    new = (
        torch.tensor([w is not None and w not in known for w in voters], dtype=torch.bool)
        if known and voters
        else torch.zeros(0, dtype=torch.bool)
    )
    report = Report("Reward model: learning curve", f"{len(points[0].scored.prompts):,} validation pairs, the same for every size.")
    masks = {"all validation pairs": None} | (
        {"annotators not trained on": new, "annotators trained on": ~new} if new.any() and not new.all() else {}
    )
    found = {name: [point.scored.accuracy(mask) for point in points] for name, mask in masks.items()}
    x = [point.pairs for point in points]
    series = [Series(name, x, [e.mean for e in es], [e.low for e in es], [e.high for e in es]) for name, es in found.items()]
    levels = {"chance": 0.5} | ({} if labels.agreement is None else {"people among themselves": labels.agreement.mean})
    plot = Plot(
        "Accuracy against training pairs", "training pairs", "share that is right", series, levels, x_log=True, note="Bands are 95%."
    )
    rows = [[p.rows, p.pairs, *(es[i] for es in found.values()), p.seconds] for i, p in enumerate(points)]
    gain = last_gain(points)
    report.add("Accuracy", Text(_reading(points, gain)), Text(_people(labels, new, held)), plot)
    report.add(
        "Sizes", ReportTable("", ["rows", "pairs", *(f"accuracy, {name}" for name in masks), "seconds"], rows, digits={"seconds": 0})
    )
    report.data = {"sizes": [p.rows for p in points], "pairs": [p.pairs for p in points], "last_gain": gain, "agreement": labels.agreement}
    report.data |= {"held_out_workers": sorted(map(str, held)), "accuracy": found}
    return report


def last_gain(points: Sequence[Point]) -> Estimate:
    """By how much accuracy rose from the last size but one to the last, pair by pair on the same pairs."""
    before, after = ((point.scored.margins > 0).double() for point in points[-2:])
    return grouped_mean(after - before, points[-1].scored.groups)


def _reading(points: Sequence[Point], gain: Estimate) -> str:
    said = f"From {points[-2].pairs:,} to {points[-1].pairs:,} pairs accuracy changed by {gain.mean:+.3f} "
    said += f"({gain.low:+.3f} to {gain.high:+.3f})."
    if gain.low > 0:
        return said + " It still rises: more labels would help."
    return said + " That is within the noise: more labels of this kind would help little, or more validation pairs are needed to see it."


def _people(labels: Labels, new: torch.Tensor, held: set[Any]) -> str:
    """Who agrees with whom."""
    said = "No pair of responses was labelled twice, so people's agreement among themselves, the usual ceiling, is not known."
    if labels.agreement is not None:
        a = labels.agreement
        said = f"Two people agree on {a.mean:.3f} ({a.low:.3f} to {a.high:.3f}) of the pairs that several labelled: the usual ceiling."
    if len(new) and not new.any():
        return (
            said
            + " Every annotator of the validation pairs also labelled training rows; --hold_out_workers 0.2 leaves a fifth of them out."
        )
    return said + (f" {len(held)} annotators were left out of training." if held else "")
