"""ExportHF: plain Hugging Face directories, which the next stage and every other tool load."""

import math
import os
import shutil
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lit_rlhf.sharding import gathered


class ExportHF(Callback):
    """Writes `pl_module.export_networks()` to `dirpath` when `monitor` improves (mode max or min), or at the end of the fit without one.

    The new directory is complete before it takes the old one's place. A run that never validated has no best: its last weights are written
    at the end, with a warning. Nothing is written by a sanity check, `fast_dev_run`, or a `validate` outside of a fit.
    Raises ValueError: a `dirpath` that holds something else than an export or what the run starts from, a `monitor` that was not logged.
    """

    def __init__(self, dirpath: str, monitor: str | None = None, mode: Literal["max", "min"] = "max") -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"ExportHF: mode must be max or min, got {mode!r}")
        self.dirpath, self.monitor, self.mode = Path(dirpath), monitor, mode
        self.best: float | None = None

    @property
    def state_key(self) -> str:
        return f"ExportHF[{self.dirpath}, {self.monitor}, {self.mode}]"

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses, before anything trains, a target that could not be written or that an export must not replace."""
        if stage != "fit" or trainer.fast_dev_run or not trainer.is_global_zero:
            return
        old = _beside(self.dirpath, "old")
        if old.exists() and not self.dirpath.exists():
            old.rename(self.dirpath)  # a run was killed between the two renames of an exchange
        if self.dirpath.exists() and not _is_export(self.dirpath):
            raise ValueError(f"ExportHF: {self.dirpath} holds something that is no export; it would be replaced, so name another dirpath")
        for name in ("model", "reward_model", "value_init"):
            source = getattr(pl_module, name, None)
            if isinstance(source, str) and Path(source).resolve() == self.dirpath.resolve():
                raise ValueError(
                    f"ExportHF: dirpath {self.dirpath} is the {name} that this run starts from; it would be replaced, so name another"
                )
        self.dirpath.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(self.dirpath.parent, os.W_OK):
            raise ValueError(f"ExportHF: no permission to write in {self.dirpath.parent}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and not trainer.fast_dev_run
        if self.monitor is None or not fitting:
            return
        value = trainer.strategy.broadcast(self._monitored(trainer))
        if math.isfinite(value) and (self.best is None or (value > self.best if self.mode == "max" else value < self.best)):
            self.best = value
            self.export(trainer, pl_module, f"{self.monitor} {value:.4g}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run or self.best is not None:
            return
        if self.monitor is not None:
            rank_zero_warn(f"ExportHF: no finite {self.monitor} was seen, so the last weights are exported, not the best")
        self.export(trainer, pl_module, "end of the fit")

    def export(self, trainer: Trainer, pl_module: LightningModule, why: str) -> None:
        """Writes the directory from rank 0 (call it on every rank); raises on every rank what went wrong there."""
        networks, failure = pl_module.export_networks(), None
        with gathered(trainer.model) as mine:
            weights = {name: network.weights() for name, network in networks.items()} if mine else {}
        if trainer.is_global_zero:
            try:
                _replace(self.dirpath, networks, weights)
            except Exception as error:
                failure = error
        message = trainer.strategy.broadcast(failure and f"{type(failure).__name__}: {failure}")
        if message:
            raise RuntimeError(f"ExportHF could not write {self.dirpath}: {message}") from failure
        names = " ".join(name for name in networks if name)
        rank_zero_info(f"exported {self.dirpath}{f' ({names})' if names else ''}: {why}, step {trainer.global_step}")

    def _monitored(self, trainer: Trainer) -> float:
        if self.monitor not in trainer.callback_metrics:
            raise ValueError(
                f"ExportHF: monitor {self.monitor!r} was not logged (logged: {', '.join(sorted(trainer.callback_metrics)) or 'none'}); "
                "name one of these"
            )
        return float(trainer.callback_metrics[self.monitor])


def _beside(directory: Path, what: str) -> Path:
    return directory.parent / f".{directory.name}.{what}"


def _is_export(directory: Path) -> bool:
    """Whether a directory is empty or was exported: nothing in it but a model, or folders with one each."""
    entries = list(directory.iterdir()) if directory.is_dir() else [directory]
    return all((directory / "config.json").exists() or (entry / "config.json").is_file() for entry in entries)


def _replace(directory: Path, networks: dict[str, Any], weights: dict[str, Any]) -> None:
    """Saves the networks beside `directory`, then exchanges the two; whatever fails before that leaves `directory` as it was."""
    new, old = _beside(directory, "new"), _beside(directory, "old")
    shutil.rmtree(new, ignore_errors=True)
    try:
        for name, network in networks.items():
            (new / name).mkdir(parents=True, exist_ok=True)
            network.save(new / name, weights[name])
        shutil.rmtree(old, ignore_errors=True)
        if directory.exists():
            directory.rename(old)
        new.rename(directory)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
