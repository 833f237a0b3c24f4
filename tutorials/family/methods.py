"""Runs every algorithm on the quickstart's world and judges all of them alike; page.py makes the table of ../family.md of it.

    python tutorials/family/methods.py WORK SEED_0 SEED_1 SEED_2 [--only NAME …] [--seeds S …] [--part 0/2]
    python tutorials/family/page.py WORK

SEED_S is the folder that `lit-rlhf quickstart --out FOLDER --seed S` left: SFT and the reward model are made once a seed. WORK gets one
file a method and seed; what is there is not run again. `--part i/n` runs every n-th of what is left, for n processes side by side.
"""

import argparse
import json
import logging
import os
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lit_rlhf import cli
from lit_rlhf.best_of import candidates
from lit_rlhf.callbacks import ExportHF
from lit_rlhf.functional import best_of_n_kl
from lit_rlhf.generation import Sampling
from lit_rlhf.iterate import run
from lit_rlhf.iterate.fits import read_done
from lit_rlhf.iterate.rounds import Round, read_rows
from lit_rlhf.modules import ILQL, NLPO, Quark
from lit_rlhf.quickstart.evaluate import NOISE, Judge, Summaries
from lit_rlhf.quickstart.run import quiet, settings, stage_command
from lit_rlhf.quickstart.world import CARE, gold

# Without what does not change the policy.
PLAIN = ["--trainer.logger=false", "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"]
REWARDED = "rewarded_{part}.jsonl"
BEST_OF = 16
ROUNDS = ["--rounds=3", "--prompts=1024", "--responses=4", "--pairs=2400"]


@dataclass(frozen=True)
class Method:
    """One algorithm: its YAML file is configs/quickstart/NAME.yaml; `learns_from` is what it needs beside the SFT model."""

    name: str
    label: str
    learns_from: str


SFT = Method("sft", "SFT", "")
BEST = Method("best-of-n", f"best of {BEST_OF}", "reward model, when used")
TRAINED = [
    Method("rft", "RFT", "reward model"),
    Method("dpo", "DPO", "rankings"),
    Method("rloo", "RLOO", "reward model"),
    Method("ppo", "PPO", "reward model"),
    Method("nlpo", "NLPO", "reward model"),
    Method("quark", "Quark", "reward model"),
    Method("ilql", "ILQL", "people's scores of rankings"),
]
ITERATED = Method("iterate", "iterated RLHF", "labels of its own responses, round after round")
METHODS = [SFT, BEST, *TRAINED, ITERATED]


def best_of_n(judge: Judge) -> Summaries:
    """The reward model's choice of n samples of SFT; their KL is its bound, log n - (n - 1)/n."""
    found = candidates(judge.sft, judge.scorer, judge.batch(), judge.sampling, BEST_OF, (judge.seed, NOISE))
    best = found.best
    texts = [row[k] for row, k in zip(found.texts, best.tolist(), strict=True)]
    scores, lengths = (x.gather(1, best[:, None]).squeeze(1).tolist() for x in (found.scores, found.lengths))
    return Summaries(texts, gold(judge.prompts, texts), scores, [best_of_n_kl(BEST_OF)] * len(texts), lengths)


def learnt(judge: Judge, module: Any) -> Summaries:
    """One sample a post from what a module has learnt, in its own way of sampling."""
    if isinstance(module, NLPO):
        return judge(module.masked)
    if isinstance(module, ILQL):
        with module.network.eval().guided(module.beta, module.top_k) as policy:
            return judge(policy)
    return quark(judge, module) if isinstance(module, Quark) else judge(module.policy)


def quark(judge: Judge, module: Quark) -> Summaries:
    """Behind the best quantile's token; the reference reads none."""
    module.policy.eval()
    with torch.no_grad():
        rows = module.predict_step(judge.batch(), 0)
    texts, scores, kl, lengths = ([row[key] for row in rows] for key in ("response", "score", "kl", "length"))
    return Summaries(texts, gold(judge.prompts, texts), scores, kl, lengths)


def train(method: Method, quick: Path, seed: int, work: Path, more: list[str] | None = None) -> Any:
    """The method's YAML file on the quickstart in `quick`; the module that has learnt.

    Args:
        more: arguments of every method, e.g. for a short run in a test.
    """
    if method.name == "ilql":
        write_rewarded(quick / "data")
    folder = [f"--trainer.default_root_dir={work / 'logs'}"]
    fit = cli.build(stage_command(method.name, quick, seed, [*PLAIN, *folder, *(more or ())]))
    fit.trainer.callbacks = [c for c in fit.trainer.callbacks if not isinstance(c, ExportHF)]
    fit.run()
    return fit.model


def iterate(quick: Path, seed: int, out: Path, more: Sequence[str]) -> tuple[Path, int]:
    """Rounds of `lit-rlhf iterate` after the quickstart's own labels; the last round's policy and the responses sampled in all of them.

    They begin anew where an earlier call was interrupted, so that all of them are timed.
    """
    shutil.rmtree(out, ignore_errors=True)
    stages = []
    for stage in ("reward", "ppo"):
        own = [word for word in more if word.startswith(("--trainer.", "--model.", "--data.")) and stage == "ppo"]
        file, *moved = stage_command(stage, quick, seed, [PLAIN[0], *own])[2:]
        stages += [f"--{stage}", file, *(word.removeprefix("--") for word in moved if not word.startswith("--seed"))]
    known = [f"--comparisons={quick / 'data' / 'comparisons_train.jsonl'}", f"--sft={quick / 'sft' / 'hf'}", f"--seed={seed}"]
    label = ["--gold=lit_rlhf.quickstart.world.gold", f"--care={CARE}"]
    rest = [word for word in more if not word.startswith(("--trainer.", "--model.", "--data."))]
    if code := run.main([*stages, *known, *label, *ROUNDS, f"--out={out}", *rest]):
        raise RuntimeError(f"lit-rlhf iterate ended with code {code}; its output says why")
    sampled, last = 0, Round(out, len(list(out.glob("round-*"))))
    each = int(json.loads((out / "iterate.json").read_text(encoding="utf-8"))["responses"])
    for now in last.so_far:
        ppo = cli.build(read_done(now.ppo)["args"])
        sampled += ppo.model.batch_size * (ppo.trainer.max_epochs or 0)
        rows = read_rows(now.responses)
        sampled += each * len(rows) * len({policy for row in rows for policy, _ in row["responses"]} - {"reference"})
    return last.ppo / "hf" / "policy", sampled


def write_rewarded(data: Path) -> None:
    """The rankings that the reward model learns from, as rewarded responses: a row each, with the scores that people gave."""
    for part in ("train", "valid"):
        out = data / REWARDED.format(part=part)
        if out.exists():
            continue
        rows = [json.loads(line) for line in (data / f"comparisons_{part}.jsonl").read_text(encoding="utf-8").splitlines()]
        made = [
            {"prompt": row["prompt"], "response": response, "reward": score}
            for row in rows
            for response, score in zip(row["responses"], row["scores"], strict=True)
        ]
        write(out, "".join(json.dumps(row) + "\n" for row in made))


def measure(method: Method, quick: Path, seed: int, work: Path, judge: Judge, more: list[str] | None = None) -> dict[str, Any]:
    """Trains one method and judges what it has learnt: a number a post, the responses it sampled while learning, and its seconds."""
    wall, cpu = time.perf_counter(), processor_seconds()

    def took() -> dict[str, float]:
        return {"wall": time.perf_counter() - wall, "cpu": processor_seconds() - cpu}

    if method is SFT:
        found, sampled, cost = judge(judge.sft), 0, {"wall": 0.0, "cpu": 0.0}
    elif method is BEST:
        found, sampled, cost = best_of_n(judge), BEST_OF * len(judge.prompts), took()
    elif method is ITERATED:
        policy, sampled = iterate(quick, seed, work / f"iterate-{seed}", more or ())
        cost, found = took(), judge(policy)
    else:
        module = train(method, quick, seed, work, more)
        cost = took()  # of learning alone
        found, sampled = learnt(judge, module), int(getattr(module, "episodes", 0))
    return {"method": method.name, "seed": seed, "sampled": sampled, **cost, **asdict(found)}


def processor_seconds() -> float:
    """Of this process and of those that it has waited for."""
    return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def write(path: Path, text: str) -> None:
    """A file, whole or not at all."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("quickstarts", type=Path, nargs="+", help="of the seeds 0, 1, …")
    parser.add_argument("--only", nargs="*", default=[], choices=[m.name for m in METHODS], metavar="NAME")
    parser.add_argument("--seeds", nargs="*", type=int, default=[], help="default all")
    parser.add_argument("--part", default="0/1")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of iterate's fits, which are processes of their own
    args.work.mkdir(parents=True, exist_ok=True)
    cli.quiet()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    part, parts = map(int, args.part.split("/"))
    judges: dict[int, Judge] = {}
    sampling = Sampling(**settings("ppo")["model"]["init_args"]["sampling"])
    with quiet():
        wanted = [m for m in METHODS if not args.only or m.name in args.only]
        every = [(method, seed) for seed in args.seeds or range(len(args.quickstarts)) for method in wanted]
        for method, seed in every[part::parts]:
            target = args.work / f"{method.name}.{seed}.json"
            if target.exists():
                continue
            judge = judges.get(seed) or judges.setdefault(seed, Judge(args.quickstarts[seed], sampling, seed))
            found = measure(method, args.quickstarts[seed], seed, args.work, judge)
            write(target, json.dumps(found) + "\n")
            means = {key: sum(found[key]) / len(found[key]) for key in ("gold", "kl", "scores", "lengths")}
            print(f"{method.name}, seed {seed}: {means}, {found['cpu']:.0f} CPU s, {found['sampled']} responses", flush=True)


if __name__ == "__main__":
    sys.exit(main())
