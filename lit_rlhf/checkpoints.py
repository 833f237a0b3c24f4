"""What the modules write into a checkpoint beside Lightning's own entries, and what they check when a run goes on from one.

Lightning restores weights, optimisers, schedules and its loop counters. Everything else that a run depends on is a function of the seed
and of counters, so the counters are saved and no RNG state. Three more things make a resume exact or refuse it:

- A checkpoint may be asked for while an optimiser step is half done (accumulation, an exception, a signal). It then describes the last
  whole step: the micro-batches since are taken back, and the run that goes on does them again.
- Networks and weights that do not train are not written; they come from the directories that the run started from, whose fingerprints
  are. (Sharded checkpoints hold them, because loading those needs every key.)
- Settings that were changed since hold, and are listed. Where they would cut a half-done iteration or epoch in two, they are refused.
"""

import hashlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lit_rlhf.checkpoint_io import read
from lit_rlhf.data.loader import run_seed
from lit_rlhf.sharding import name_weights, plain_name, saves_shards

FORMAT = 1
KEY = "lit_rlhf"
WEIGHTS = {".json", ".safetensors", ".jinja", ".txt", ".model"}
WHOLE = 64 * 2**20  # bytes up to which a file is read from end to end
LONGEST = 100  # entries of a list that is a setting
BLOCK, EVERY = 16 * 2**10, 4 * 2**20


class RunRecord:
    """What a module knows of its run for the sake of checkpoints; every module has one as `run`.

    fingerprints: of the directories it started from. groups: the optimiser's settings before the first step. resumed: what the checkpoint
    said of them, until training starts. start: how many micro-batches of its epoch the checkpoint had behind it. And which of this epoch's
    micro-batches belong to an optimiser step that is not finished.
    """

    def __init__(self) -> None:
        self.fingerprints: dict[str, str] = {}
        self.groups: list[dict[str, Any]] = []
        self.resumed: dict[str, Any] | None = None
        self.epoch, self.step, self.first, self.begun, self.start = -1, -1, 0, 0, 0
        self.stepping = -1

    def begin(self, trainer: L.Trainer, batch_idx: int) -> int:
        """A micro-batch starts: its number within its optimiser step. Call it first in `on_train_batch_start`.

        Lightning 2.6.6 forgets to count an epoch as begun when it goes on from the last batch of the one before, and miscounts epochs after
        the next such stop; here it is made up for.
        """
        epochs = trainer.fit_loop.epoch_progress
        if epochs.current.ready == epochs.current.processed:
            epochs.increment_ready()
            epochs.increment_started()
        if (self.epoch, self.step) != (trainer.current_epoch, trainer.global_step):
            self.epoch, self.step, self.first = trainer.current_epoch, trainer.global_step, batch_idx
        self.begun = batch_idx + 1
        return batch_idx - self.first

    def unfinished(self, trainer: L.Trainer) -> bool:
        """Whether the optimiser step whose micro-batch began last has not been made."""
        return (self.epoch, self.step) == (trainer.current_epoch, trainer.global_step)

    def changing(self, trainer: L.Trainer) -> bool:
        """Whether the optimiser is at work on the weights, which then belong to no step (`stepping`: the last one that it was let into)."""
        progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        return self.stepping == trainer.global_step and progress.ready > progress.completed

    def undone(self, trainer: L.Trainer) -> int:
        """How many micro-batches were handed out since the last whole optimiser step of this epoch."""
        handed = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if self.epoch < 0:  # no batch of this fit has begun
            return handed - self.start if handed >= self.start else handed
        epochs = trainer.fit_loop.epoch_progress.current
        if epochs.started == epochs.completed:  # between two epochs, or after the last: the count is still that of the one before
            return 0
        if self.epoch != trainer.current_epoch:
            return handed
        return max(0, handed - (self.first if self.step == trainer.global_step else self.begun))


def save(module: Any, checkpoint: dict[str, Any]) -> None:
    """Completes `checkpoint` in place; call it in `on_save_checkpoint`. Raises RuntimeError where the optimiser is changing the weights."""
    trainer = module.trainer
    if module.run.changing(trainer):
        raise RuntimeError(
            f"step {trainer.global_step}: {type(sys.exc_info()[1]).__name__} stopped the optimizer while it changed the weights "
            f"({sys.exc_info()[1]}), so no checkpoint is written now; go on from the one before with --ckpt_path last"
        )
    undone = module.run.undone(trainer)
    if undone:
        _take_back(checkpoint, undone, type(trainer.datamodule).__qualname__)
    name_weights(module, checkpoint)
    if not saves_shards(trainer):
        frozen = {plain_name(name) for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
        frozen |= _frozen_buffers(module)
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name not in frozen}
    checkpoint[KEY] = {
        "format": FORMAT,
        "module": _class_name(module),
        "seed": run_seed(),
        "sources": module.run.fingerprints,
        "settings": settings(module),
        "groups": module.run.groups,
    }


def load(module: Any, checkpoint: Mapping[str, Any]) -> None:
    """Refuses a checkpoint that this module cannot go on from, and lists changed settings; call it in `on_load_checkpoint`.

    Raises ValueError: another class or format, a starting directory that has changed, weights that are missing, of another shape, or alone.
    """
    saved = checkpoint.get(KEY)
    if saved is None or saved.get("format") != FORMAT:
        found = "no entry of lit_rlhf" if saved is None else f"format {saved.get('format')}, and this version reads format {FORMAT}"
        raise ValueError(f"the checkpoint has {found}: start from an exported directory instead")
    if saved["module"] != _class_name(module):
        raise ValueError(f"the checkpoint is of {saved['module']}, and this run trains {_class_name(module)}: give one of its own")
    if module._trainer is None:
        return
    for name, old in saved["sources"].items():
        new = module.run.fingerprints.get(name)
        if new != old:
            raise ValueError(
                f"the files of {name} {getattr(module, name)!r} are not those that the checkpoint was made with (fingerprint {old[:12]}, "
                f"now {(new or 'none')[:12]}): put them back, or start a new run without ckpt_path"
            )
    # (directories of shards keep their optimizer_states elsewhere)
    if module.trainer.state.fn == TrainerFn.FITTING and not {"lr_schedulers", "loops"} <= checkpoint.keys():
        raise ValueError(
            "the checkpoint holds weights alone (save_weights_only), so no run can go on from it: save whole ones, or start a new run "
            "from an exported directory"
        )
    old, new = saved["settings"]["trainer.accumulate_grad_batches"], module.trainer.accumulate_grad_batches
    if module.trainer.state.fn == TrainerFn.FITTING and old != new:
        _recount(checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"], old, new)
    if (weights := _weights(module, checkpoint)) is not None:
        _check_weights(module, weights)
    if module.trainer.state.fn == TrainerFn.FITTING:
        module.run.resumed = dict(saved)


def settle(module: Any) -> None:
    """Forgets what an earlier fit left half done; after a resume puts changed optimiser settings over the restored ones and lists them.

    Call it in `on_train_start`.
    """
    saved, module.run.resumed = module.run.resumed, None
    module.meter.stats = {}  # of a step that an earlier fit of this module left half done
    module.run.epoch = module.run.step = module.run.stepping = -1
    module.run.start = module.trainer.fit_loop.epoch_loop.batch_progress.current.ready
    if saved is None:
        return
    changes = changed(saved["settings"], settings(module))
    if saved["seed"] != run_seed():
        changes["seed"] = (saved["seed"], run_seed())
    for at, (old, new) in enumerate(zip(saved["groups"], module.run.groups, strict=True)):
        for name, (before, after) in changed(old, new).items():
            _set_option(module.trainer, at, name, before, after)
            if name != "initial_lr" and not any(key.startswith("model.optimizer") for key in changes):
                changes[f"optimizer.group{at}.{name}"] = (before, after)
    listed = "; changed since, and the new values hold: " + ", ".join(f"{k} {a!r} -> {b!r}" for k, (a, b) in sorted(changes.items()))
    rank_zero_info(f"goes on at step {module.trainer.global_step}{listed if changes else ', with the same settings'}")


def fingerprint(source: str, revision: str | None = None) -> str:
    """A hash of a model directory's names, sizes and contents; of a hub model, its commit.

    Of files over 64 MiB it reads 16 KiB in every 4 MiB and the end, so that 60 GB take seconds; training changes every part of a file.
    """
    path = Path(source)
    if not path.is_dir():
        from transformers.utils.hub import cached_file, extract_commit_hash  # a config would ask for code that the model may bring along

        return f"{source}@{extract_commit_hash(cached_file(source, 'config.json', revision=revision), None)}"
    found = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file() and p.suffix in WEIGHTS):
        size = file.stat().st_size
        found.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            for at in (0,) if size <= WHOLE else (*range(0, size - BLOCK, EVERY), size - BLOCK):
                stream.seek(at)
                found.update(stream.read(-1 if size <= WHOLE else BLOCK))
    return found.hexdigest()


def settings(module: L.LightningModule) -> dict[str, Any]:
    """The run's settings as one flat mapping of plain values: model.*, data.*, trainer.*."""
    trainer = module.trainer
    flat = {f"model.{key}": value for key, value in _flat(module.hparams)}
    for part in (trainer.datamodule, getattr(trainer.datamodule, "settings", None), getattr(trainer.datamodule, "sources", None)):
        flat |= {f"data.{key}": value for key, value in _flat(_public(part))}
    names = ("max_steps", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision", "world_size")
    return flat | {f"trainer.{name}": getattr(trainer, name) for name in names} | {"trainer.strategy": type(trainer.strategy).__name__}


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The entries that differ: name -> (old, new), None where there is none."""
    return {key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)}


def group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The plain settings of each parameter group (lr, betas, …), as they are before the first step."""
    return [
        {key: list(v) if isinstance(v, tuple) else v for key, v in group.items() if key != "params" and _plain(v)}
        for group in optimizer.param_groups
    ]


def _set_option(trainer: L.Trainer, group: int, name: str, old: Any, new: Any) -> None:
    """Puts one changed setting of a parameter group in place of the restored one; a learning rate keeps its place in the schedule."""
    options = trainer.optimizers[0].param_groups[group]
    if name not in ("lr", "initial_lr"):
        options[name] = tuple(new) if isinstance(options.get(name), tuple) else new
        return
    if name == "initial_lr":  # what schedules multiply
        options["lr"] = options["lr"] * new / old if old else new
        options["initial_lr"] = new
        for config in trainer.lr_scheduler_configs:
            if hasattr(config.scheduler, "base_lrs"):
                config.scheduler.base_lrs[group] = new


def _take_back(checkpoint: dict[str, Any], undone: int, datamodule: str) -> None:
    """Sets Lightning's and the loader's counters to where they stood when the last whole optimiser step's batch ended."""
    loop = checkpoint["loops"]["fit_loop"]
    progress = loop["epoch_loop.batch_progress"]
    left = progress["current"]["ready"] - undone
    for part in ("total", "current"):
        done = progress[part]["ready"] - undone
        progress[part] |= {"ready": done, "started": done, "processed": done, "completed": done - (left > 0)}
    progress["is_last_batch"] = False
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # Lightning adds one when it restarts
    for state in (checkpoint.get(datamodule), *loop["state_dict"].get("combined_loader", ())):
        if state and "position" in state:
            state["position"] -= undone


def _recount(progress: dict[str, Any], old: int, new: int) -> None:
    """Lightning's count of micro-batches where an optimiser step had `old` of them and now has `new`; checkpoints hold whole steps."""
    for part in ("total", "current"):
        ended = progress[part]["ready"] - progress[part]["completed"]
        done = progress[part]["ready"] // old * new
        progress[part] |= {"ready": done, "started": done, "processed": done, "completed": done - ended}


def _weights(module: Any, checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The checkpoint's weights; a sharded strategy has taken them out and loaded them already, so they are looked up in its file.

    None for directories of shards, which do not load with a weight missing.
    """
    path = module.trainer.ckpt_path
    if "state_dict" in checkpoint or path is None or not Path(path).is_file():
        return checkpoint.get("state_dict")
    return read(path, mmap=True)["state_dict"]


def _check_weights(module: L.LightningModule, saved: Mapping[str, Any]) -> None:
    own = {plain_name(name): p for name, p in module.named_parameters() if p.requires_grad}
    if missing := sorted(own.keys() - saved.keys()):
        raise ValueError(
            f"the checkpoint lacks {len(missing)} of the {len(own)} weights that train, {missing[0]} first: give the model, peft and "
            "frozen_layers of its run"
        )
    whole = not isinstance(module.trainer.strategy, FSDPStrategy)  # FSDP1's parameters are pieces
    for name, parameter in own.items() if whole else ():
        if tuple(saved[name].shape) != tuple(parameter.shape):
            raise ValueError(
                f"the checkpoint's {name} has shape {tuple(saved[name].shape)}, the model's {tuple(parameter.shape)}: give the model of "
                "its run"
            )


def _frozen_buffers(module: nn.Module) -> set[str]:
    """Buffers of the networks none of whose parameters trains (a reference, a reward model)."""
    return {
        plain_name(f"{name}.{buffer}")
        for name, child in module.named_children()
        if list(child.parameters()) and not any(p.requires_grad for p in child.parameters())
        for buffer, _ in child.named_buffers()
    }


def _class_name(module: L.LightningModule) -> str:
    """The name of the module's own or nearest lit_rlhf class, so that a user's subclass may change names."""
    return next(c.__name__ for c in type(module).__mro__ if c.__module__.startswith("lit_rlhf.") or c.__module__.startswith("lightning."))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif _plain(value):
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _public(part: Any) -> dict[str, Any]:
    """The plain public attributes of a DataModule and of its settings."""
    names = [name for name in vars(part) if not name.startswith("_")] if part is not None else []
    return {name: getattr(part, name) for name in names if name not in ("summary", "allow_zero_length_dataloader_with_multiple_devices")}


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= LONGEST and all(map(_plain, value))  # longer ones are data: prompts given as a list
    return value is None or isinstance(value, bool | int | float | str)
