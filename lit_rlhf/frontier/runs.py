"""PPO at one setting, and best-of-n from where it starts: what is done is not done again, what was cut off goes on."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rlhf import cli
from lit_rlhf.best_of import candidates
from lit_rlhf.callbacks import ExportHF, SampleTable
from lit_rlhf.data.loader import run_seed
from lit_rlhf.frontier.points import Points, held_out
from lit_rlhf.frontier.sweep import Setting
from lit_rlhf.modules import PPO
from lit_rlhf.networks import CausalPolicy
from lit_rlhf.rollout import score_texts
from lit_rlhf.scorers import load_scorer

DONE = "done.json"


class Interrupted(RuntimeError):
    """A run that was stopped from outside and can go on."""


def command(rest: Sequence[str], setting: Setting, folder: Path) -> list[str]:
    """`lit-rlhf fit` with the user's arguments, the setting's, and the folder's; a policy that collapses is part of the picture."""
    own = [f"--trainer.default_root_dir={folder}", "--trainer.enable_checkpointing=true", "--model.collapse_patience=null"]
    return ["fit", *rest, *setting.args, *own, "--ckpt_path=last"]


def run_setting(rest: Sequence[str], setting: Setting, folder: Path, gold: Any, every: int | None) -> None:
    """Trains one setting to its end, from its last checkpoint if it has one; nothing is done where it has ended before.

    Raises ValueError for a folder of another setting, for what is no PPO, for a KL coefficient that would adapt away from its sweep, and
    Interrupted where the run was.
    """
    args = command(rest, setting, folder)
    if is_done(folder, args):
        return
    remember(folder, args)
    run = cli.build(args)
    check(run, setting)
    iterations = run.trainer.max_epochs
    size = every or max(1, iterations // 8)
    dropped = (ExportHF, SampleTable, ModelCheckpoint)
    kept = [c for c in run.trainer.callbacks if not isinstance(c, dropped)]
    scorer = None if gold is None else load_scorer(gold)
    points = Points(folder, scorer, size, iterations)
    saved = ModelCheckpoint(dirpath=folder / "checkpoints", every_n_epochs=size, save_last="link", save_on_exception=False)
    run.trainer.callbacks = [*kept, points, saved]
    run.run()
    if run.trainer.received_sigterm or run.trainer.interrupted:
        raise Interrupted(f"{setting.name} was interrupted; the same command goes on from its last checkpoint")
    if run.trainer.is_global_zero:
        write(folder / DONE, {"args": args, "iterations": iterations})


def check(run: Any, setting: Setting) -> None:
    """Raises ValueError for what cannot be swept."""
    if not isinstance(run.model, PPO):
        raise ValueError(f"a frontier is of PPO runs; the configuration trains a {type(run.model).__name__}: give a PPO's YAML file")
    swept = [key for key, _ in setting.values]
    if "kl_coef" in swept and run.model.kl_target is not None:
        raise ValueError(
            f"kl_target {run.model.kl_target:g} would adapt kl_coef away from its sweep; add --model.kl_target null, or sweep that"
        )
    if run.trainer.max_epochs is None or run.trainer.max_epochs < 1:
        raise ValueError("the number of iterations is not known: set trainer.max_epochs")


def is_done(folder: Path, args: Sequence[str]) -> bool:
    """Whether the folder's run has ended; ValueError where it was another."""
    for name in (DONE, "setting.json"):
        if (folder / name).is_file():
            known = json.loads((folder / name).read_text(encoding="utf-8"))["args"]
            if known != list(args):
                other = [a for a in known if a not in args] + [a for a in args if a not in known]
                raise ValueError(f"{folder} was made with other arguments ({', '.join(other[:4])}); give another --out, or remove it")
            if name == DONE:
                return True
    return False


def remember(folder: Path, args: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "setting.json", {"args": list(args)})


def best_of_n(rest: Sequence[str], folder: Path, gold: Any, n: int) -> dict[str, Any]:
    """n samples of the SFT policy to each held-out prompt with their proxy and gold scores, (M, n) lists; made once, then read."""
    args = command(rest, Setting(()), folder)
    path = folder / "samples.json"
    if is_done(folder, [*args, f"n={n}", f"gold={gold}"]):
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    remember(folder, [*args, f"n={n}", f"gold={gold}"])
    run = cli.build(args)
    check(run, Setting(()))
    out = sample_all(run, None if gold is None else load_scorer(gold), n)
    write(path, out)
    write(folder / DONE, {"args": [*args, f"n={n}", f"gold={gold}"]})
    return out


@torch.no_grad()
def sample_all(run: Any, gold: Any, n: int) -> dict[str, Any]:
    """Samples and scores, in one process on the device that the Trainer would take, in its precision."""
    module, data, device = run.model, run.datamodule, run.trainer.strategy.root_device
    data.tokenizer = module.tokenizer
    data.setup("validate")
    policy = CausalPolicy.load(module.model, tokenizer=module.tokenizer, **module.loading, **module.source).eval().to(device)
    proxy = load_scorer(module.reward_fn or module.reward_model).to(device)
    if module.reward_baseline != "mean" and hasattr(proxy, "network"):
        proxy.network.mean.zero_()  # as PPO does, so that both have one zero
    rows = []
    for batch in held_out(data):
        with run.trainer.precision_plugin.forward_context():  # as PPO's points are measured
            found = candidates(policy, proxy, batch, module.sampling, n, (run_seed(),))
        owner = torch.arange(batch.num_prompts).repeat_interleave(n)
        spread = batch.with_responses(found.lengths.view(-1, 1), torch.ones(len(owner), 1, dtype=torch.bool), owner)
        texts = [text for row in found.texts for text in row]
        with run.trainer.precision_plugin.forward_context():
            golds = None if gold is None else score_texts(gold, spread, texts).view(-1, n).tolist()
        for i, row in enumerate(batch.rows or range(batch.num_prompts)):
            rows.append({"row": row, "proxy": found.scores[i].tolist()} | ({} if golds is None else {"gold": golds[i]}))
    rows.sort(key=lambda row: row["row"])
    return {name: [row[name] for row in rows] for name in rows[0] if name != "row"}


def write(path: Path, content: Any) -> None:
    """JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(new, path)
