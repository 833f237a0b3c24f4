"""Runs PPO on the quickstart with each known detail switched off or broken in turn (variants.py), and measures what it cost.

    python tutorials/details/laboratory.py WORK SEED_0 SEED_1 SEED_2 [--only NAME …] [--seeds S …] [--part 0/2]
    python tutorials/details/page.py WORK

SEED_S is the folder that `lit-rlhf quickstart --out FOLDER --seed S` left: SFT and the reward model are made once a seed. WORK gets one
file a variant and seed; what is there is not run again. `--part i/n` runs every n-th of what is left, for n processes side by side.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import variants
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from variants import VARIANTS, Variant

from lit_rlhf import cli
from lit_rlhf.callbacks import ExportHF
from lit_rlhf.generation import Sampling
from lit_rlhf.networks import CausalPolicy, ScalarModel
from lit_rlhf.quickstart.evaluate import Judge
from lit_rlhf.quickstart.run import quiet, settings, stage_command

# Without what does not change the policy, and without the watch that ends a run whose policy has collapsed: the end is to be seen.
PLAIN = [
    "--trainer.logger=false",
    "--trainer.limit_val_batches=0",
    "--trainer.enable_progress_bar=false",
    "--model.init_args.collapse_patience=null",
]
PATIENCE = 3  # of the watch where it is on


class Diary(Callback):
    """Each iteration's numbers of its rollout and its first update, and when the collapse watch would have ended the run."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.collapsed: int | None = None

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if module.position == module.items:
            self.rows.append(module.journal.entries[0] | module.journal.entries[1])
            if self.collapsed is None and max(module.collapse.count.values()) >= PATIENCE:
                self.collapsed = module.iteration


def train(variant: Variant, quick: Path, seed: int, work: Path, more: list[str] | None = None) -> tuple[CausalPolicy, Diary, str | None]:
    """PPO on the quickstart in `quick` with that variant; the policy, its diary, and why the run stopped early where it did.

    Args:
        more: arguments of every variant, e.g. for a short run in a test.
    """
    placed = {"{seed}": str(seed), "{fresh}": str(work / f"fresh-{seed}")}
    own = list(variant.args)
    for name, value in placed.items():
        own = [arg.replace(name, value) for arg in own]
    if any(placed["{fresh}"] in arg for arg in own):
        write_fresh(quick, seed, Path(placed["{fresh}"]))
    diary, stopped = Diary(), None
    folder = [f"--trainer.default_root_dir={work / 'logs'}"]
    run = cli.build(stage_command("ppo", quick, seed, [*PLAIN, *folder, *(more or ()), *own]))
    run.trainer.callbacks = [c for c in run.trainer.callbacks if not isinstance(c, ExportHF)] + [diary]
    with variant.context():
        try:
            run.run()
        except Exception as error:
            if not cli.raised_here(error):
                raise
            stopped = str(error)
    return run.model.policy, diary, stopped


def write_fresh(quick: Path, seed: int, folder: Path) -> None:
    """The quickstart's untrained model with a new scalar head, as a directory."""
    if not (folder / "config.json").is_file():
        torch.manual_seed(seed)
        ScalarModel.load(str(quick / "init"), head="new").save(folder)


def judge_of(quick: Path, seed: int) -> Judge:
    """The quickstart's own evaluation, the same for all variants, of one seed's quickstart."""
    return Judge(quick, Sampling(**settings("ppo")["model"]["init_args"]["sampling"]), seed)


def measure(variant: Variant, quick: Path, seed: int, work: Path, judge: Judge) -> dict[str, Any]:
    """Trains one variant and judges its policy."""
    begin, folder = time.process_time(), work / f"{variant.name}-{seed}"
    policy, diary, stopped = train(variant, quick, seed, work)
    policy.save(folder)
    seconds = time.process_time() - begin
    found = {
        "variant": variant.name,
        "seed": seed,
        "seconds": seconds,
        "stopped": stopped,
        "collapsed": diary.collapsed,
        "diary": diary.rows,
    }
    if variant is variants.DEFAULT:
        found["as_quickstart"] = same_weights(folder, quick / "ppo" / "hf" / "policy")
    found |= asdict(judge(folder))
    shutil.rmtree(folder)
    return found


def same_weights(one: Path, other: Path) -> bool:
    """Whether two directories hold the same weights, bit for bit."""
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def jobs(seeds: Iterable[int], only: list[str]) -> Iterator[tuple[Variant, int]]:
    """All of one seed before the next."""
    for seed in seeds:
        yield from ((variant, seed) for variant in VARIANTS if not only or variant.name in only)


def result_file(work: Path, name: str, seed: int) -> Path:
    return work / f"{name}.{seed}.json"


def write(path: Path, content: Any) -> None:
    """JSON, whole or not at all."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(new, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("quickstarts", type=Path, nargs="+", help="of the seeds 0, 1, …")
    parser.add_argument("--only", nargs="*", default=[], choices=[v.name for v in VARIANTS], metavar="NAME")
    parser.add_argument("--seeds", nargs="*", type=int, default=[], help="default all")
    parser.add_argument("--part", default="0/1")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    cli.quiet()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    part, parts = map(int, args.part.split("/"))
    judges: dict[int, Judge] = {}
    with quiet():
        for number, (variant, seed) in enumerate(jobs(args.seeds or range(len(args.quickstarts)), args.only)):
            if number % parts != part:
                continue
            quick = args.quickstarts[seed]
            judge = judges.get(seed) or judges.setdefault(seed, judge_of(quick, seed))
            if not result_file(args.work, "sft", seed).exists():
                write(result_file(args.work, "sft", seed), {"variant": "sft", "seed": seed} | asdict(judge(quick / "sft" / "hf")))
            target = result_file(args.work, variant.name, seed)
            if not target.exists():
                found = measure(variant, quick, seed, args.work, judge)
                write(target, found)
                gold, kl = (sum(found[key]) / len(found[key]) for key in ("gold", "kl"))
                print(
                    f"{variant.name}, seed {seed}: gold {gold:.3f}, KL {kl:.2f}, {found['seconds']:.0f} s {found['stopped'] or ''}",
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(main())
