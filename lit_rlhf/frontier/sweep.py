"""The settings of a sweep: each a name, the folder it runs in, and the command-line arguments that make it."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

PARTS = ("trainer", "model", "data", "seed_everything")


@dataclass(frozen=True)
class Setting:
    """One choice of every swept key."""

    values: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """E.g. "kl_coef=0.05 lr=1e-4"; of a sweep of nothing "as configured"."""
        return " ".join(f"{key}={value}" for key, value in self.values) or "as configured"

    @property
    def folder(self) -> str:
        """The name as that of a folder."""
        return re.sub(r"[^\w.=+-]+", "_", self.name)

    @property
    def own_start(self) -> bool:
        """Whether its policy or reward differs from that of the other settings, so that it has a zero of its own."""
        return any(option(key) in ("model.model", "model.reward_model", "model.reward_fn") for key, _ in self.values)

    @property
    def args(self) -> list[str]:
        """Options of `lit-rlhf fit`."""
        return [f"--{option(key)}={value}" for key, value in self.values]


def option(key: str) -> str:
    """The option that a swept key stands for: one of PPO's own (kl_coef, model, sampling.temperature), `lr`, or a whole key (trainer.…)."""
    if key == "lr":
        return "model.optimizer.init_args.lr"
    return key if key.split(".")[0] in PARTS and (key != "model") else f"model.{key}"


def settings(sweeps: Sequence[str]) -> list[Setting]:
    """All combinations of sweeps such as "kl_coef=0.01,0.05"; one Setting without values for none.

    Raises ValueError for a sweep without a key or values, and for a key that stands in two.
    """
    keys, choices = [], []
    for sweep in sweeps:
        key, equals, values = sweep.partition("=")
        options = [value.strip() for value in values.split(",") if value.strip()]
        if not key.strip() or not equals or not options:
            raise ValueError(f"--sweep {sweep!r}: give a key and its values, such as kl_coef=0.01,0.05,0.1")
        keys.append(key.strip())
        choices.append(list(dict.fromkeys(options)))
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise ValueError(f"--sweep names {twice[0]} twice; give all of its values in one")
    return [Setting(tuple(zip(keys, values, strict=True))) for values in itertools.product(*choices)]
