"""A round's runs of the Trainer: each goes on from its last checkpoint, and what has ended is not run again."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rlhf import cli
from lit_rlhf.callbacks import ExportHF
from lit_rlhf.iterate.rounds import Round, write_json
from lit_rlhf.modules import PPO, PairwiseReward
from lit_rlhf.rewards import RewardEnsemble

DONE = "done.json"
REWARD_STEPS = 200  # between two checkpoints of a reward model
PPO_PARTS = 8  # checkpoints of PPO


class Interrupted(RuntimeError):
    """A run that was stopped from outside and can go on."""


def given(words: Sequence[str]) -> list[str]:
    """YAML files and key=value settings, as they stand behind --reward and --ppo, as options of `fit`."""
    return [f"--{word}" if "=" in word else f"--config={word}" for word in words]


def reward_command(options: Any, now: Round, member: int) -> list[str]:
    """One reward model, from SFT, on all labels so far."""
    own = [f"--model.model={options.sft}", f"--data.data={now.comparisons}"]
    own += [f"--data.val_data={now.held_out}"] if now.held_out.stat().st_size else []
    return ["fit", *given(options.reward), *own, *_fixed(now.reward(member), seed_of(options.seed, now.number, member))]


def ppo_command(options: Any, now: Round) -> list[str]:
    """PPO from SFT against the round's reward model, or against the mean of several less their spread."""
    reward = rewarded(options, now)
    own = [f"--model.model={options.sft}", f"--model.reward_model={reward if isinstance(reward, str) else 'null'}"]
    if isinstance(reward, RewardEnsemble):
        chosen = cli.build(sampling_command(options)).model  # with a reward_fn, PPO takes neither of these two from a reward model
        start = reward.models[0] if chosen.value_init == "reward" else chosen.value_init
        own += [f"--model.value_init={start}", f"--model.no_eos_score={json.dumps(chosen.shaping.no_eos_score)}"]
        made = {"models": reward.models, "spread_coef": reward.spread_coef, "dtype": chosen.loading["dtype"]}
        own += [f"--model.reward_fn={json.dumps({'class_path': 'lit_rlhf.rewards.RewardEnsemble', 'init_args': made})}"]
        own += ["--trainer.callbacks+=lit_rlhf.callbacks.RewardParts"]
    return ["fit", *given(options.ppo), *own, *_fixed(now.ppo, seed_of(options.seed, now.number, 0))]


def rewarded(options: Any, now: Round) -> str | RewardEnsemble:
    """What the round's PPO learns from: a reward model's directory, or an ensemble of them."""
    models = [str(now.reward(member) / "hf") for member in range(options.members)]
    return models[0] if len(models) == 1 else RewardEnsemble(models, options.spread_coef)


def sampling_command(options: Any) -> list[str]:
    """PPO's command for its prompts, sampling and precision alone: the SFT model stands where the reward model is not yet."""
    own = [f"--model.model={options.sft}", f"--model.reward_model={options.sft}", f"--trainer.default_root_dir={options.out}"]
    return ["fit", *given(options.ppo), *own, "--trainer.logger=false", f"--seed_everything={options.seed}"]


def _fixed(folder: Path, seed: int) -> list[str]:
    setting = [f"--trainer.default_root_dir={folder}", "--trainer.enable_checkpointing=true", f"--seed_everything={seed}"]
    return [*setting, "--ckpt_path=last"]


def seed_of(seed: int, number: int, member: int) -> int:
    """A seed of its own for each run: the members of an ensemble differ by their heads and the order of their rows."""
    return seed + 10000 * number + 100 * member


def is_done(folder: Path) -> bool:
    return (folder / DONE).is_file()


def fit(args: Sequence[str], folder: Path, kind: type) -> None:
    """Trains one run to its end and exports it to `folder`/hf. Raises ValueError for another module, Interrupted where it was."""
    run = cli.build(args)
    if not isinstance(run.model, kind):
        option = "--reward" if kind is PairwiseReward else "--ppo"
        raise ValueError(f"{option} configures a {type(run.model).__name__}; give the YAML file of a {kind.__name__}")
    every: dict[str, Any] = {"every_n_train_steps": REWARD_STEPS}
    if kind is PPO:
        every = {"every_n_epochs": max(1, (run.trainer.max_epochs or 1) // PPO_PARTS)}
    kept = [c for c in run.trainer.callbacks if not isinstance(c, ExportHF | ModelCheckpoint)]
    saved = ModelCheckpoint(dirpath=folder / "checkpoints", save_last="link", save_on_exception=False, **every)
    run.trainer.callbacks = [*kept, ExportHF(str(folder / "hf")), saved]
    run.run()
    if run.trainer.received_sigterm or run.trainer.interrupted:
        raise Interrupted(f"{folder} was interrupted; the same command goes on from its last checkpoint")
    if run.trainer.is_global_zero:
        write_json(folder / DONE, {"args": list(args), "steps": run.trainer.global_step})


def read_done(folder: Path) -> dict[str, Any]:
    """What `fit` left when it ended."""
    return json.loads((folder / DONE).read_text(encoding="utf-8"))  # type: ignore[no-any-return]
