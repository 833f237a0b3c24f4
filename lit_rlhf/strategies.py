"""What the modules refuse of a Trainer's strategy, precision and checkpoints, each in one line and before anything loads or trains."""

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.fsdp import FSDPModule, MixedPrecision
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1

from lit_rlhf.checkpoint_io import read
from lit_rlhf.sharding import saves_shards

METADATA = "meta.pt"
NO_DEEPSPEED = (
    "DeepSpeed is not supported: its ZeRO stages 2 and 3 are FSDP in PyTorch; leave `strategy` out and add the overlay "
    "--config configs/strategy/fsdp.yaml (FSDP2), whose checkpoints and exports other strategies load"
)


def refuse_strategy(strategy: Any) -> None:
    """Raises ValueError for a strategy (an object, a name, or what YAML gives) that lit_rlhf does not run under."""
    name = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", "")
    if isinstance(strategy, DeepSpeedStrategy) or "deepspeed" in str(name).lower():
        raise ValueError(NO_DEEPSPEED)


def check_strategy(module: Any) -> None:
    """Raises ValueError where the module's Trainer would train something else than was meant; for the hook `setup`.

    Gives FSDP1 the meaning of precision that all others have: weights, reductions and buffers as they are, autocast for mixed. Lightning's
    own would round a reward model's mean and the rotary frequencies to 16 bits, and a rollout would not see the weights that training sees.
    """
    trainer, strategy = module.trainer, module.trainer.strategy
    refuse_strategy(strategy)
    if trainer.precision == "16-true":
        raise ValueError("precision 16-true is not supported: float16 weights lose an update of PPO's size and their logits overflow; "
                         "use bf16-mixed (or 16-mixed on GPUs without bfloat16)")  # fmt: skip
    made, modules = next(module.parameters(), None) is not None, list(module.modules())
    if isinstance(strategy, ModelParallelStrategy):
        _check_fsdp2(trainer, made and not any(isinstance(m, FSDPModule) for m in modules))
    if isinstance(strategy, FSDPStrategy):
        _check_fsdp1(strategy, modules)
        if strategy._activation_checkpointing_kwargs and getattr(module, "hparams", {}).get("activation_checkpointing"):
            raise ValueError("activation_checkpointing is on in the model and in strategy fsdp, so that each block would be computed three "
                             "times; leave one of them out")  # fmt: skip
        if strategy.mixed_precision is None:
            strategy.mixed_precision = MixedPrecision()
    check_directory(trainer.ckpt_path, strategy)
    if saves_shards(trainer):
        for callback in trainer.checkpoint_callbacks:
            check_shard_names(callback)


def _check_fsdp2(trainer: Any, unsharded: bool) -> None:
    size = trainer.strategy.device_mesh["data_parallel"].size()
    if size != trainer.world_size:
        raise ValueError(
            f"ModelParallelStrategy has data_parallel_size {size} on {trainer.world_size} processes; set data_parallel_size to "
            f"{trainer.world_size} and tensor_parallel_size to 1 (configs/strategy/fsdp.yaml)"
        )
    if unsharded:
        raise ValueError(
            "the networks were made before this Trainer, so none is sharded and ModelParallelStrategy would leave each rank its own "
            "gradients; give this Trainer a new module"
        )


def _check_fsdp1(strategy: FSDPStrategy, modules: list[nn.Module]) -> None:
    if not strategy.kwargs.get("use_orig_params", True):
        raise ValueError("strategy fsdp needs use_orig_params: true (the default): frozen weights and parameter groups are lost without it")
    if any(isinstance(m, FSDP1) for m in modules):
        raise ValueError(
            "a network of this module is wrapped in FSDP already, by an earlier run or by hand, and FSDP1 wraps the whole module at once; "
            "give each Trainer a new module (the next one may load a checkpoint or an exported directory)"
        )


def check_directory(path: str | Path | None, strategy: Any) -> None:
    """Raises ValueError where `path` is a sharded checkpoint (a directory) that is not complete or that this strategy cannot read.

    A whole file is read for a sharded strategy here: it would open it by itself, FSDP1 so that code in it ran.
    """
    if path is None or not Path(path).is_dir():
        if path is not None and isinstance(strategy, ModelParallelStrategy | FSDPStrategy) and "://" not in str(path):
            read(path, mmap=True)
        return
    if not is_complete(path):
        raise ValueError(f"the checkpoint {path} was cut off while it was written (it has no {METADATA}); give the one before it")
    kind = "FSDP2" if isinstance(strategy, ModelParallelStrategy) else "FSDP1" if isinstance(strategy, FSDPStrategy) else "whole files"
    written = FileSystemReader(path).read_metadata().state_dict_metadata
    by = "FSDP1" if any(key.startswith("model.") for key in written) else "FSDP2"
    if by != kind:
        raise ValueError(
            f"the checkpoint {path} holds shards written by {by}, and this strategy reads {kind}; make it one file first: "
            f"lit-rlhf consolidate {path} FILE.ckpt, then --ckpt_path FILE.ckpt"
        )


def is_complete(path: str | Path) -> bool:
    """Whether a directory is a complete sharded checkpoint: Lightning writes METADATA last."""
    return (Path(path) / METADATA).is_file() and (Path(path) / ".metadata").is_file()


def check_shard_names(callback: ModelCheckpoint) -> None:
    """Raises ValueError where sharded checkpoints would be written over each other.

    They are written in place: killed in between, a directory holds new weights beside old metadata, and loads without an error.
    """
    advice = "sharded checkpoints must not be written over each other"
    if callback.save_last is True:
        raise ValueError(f"ModelCheckpoint: save_last is true; {advice}, so set save_last: link")
    name = callback.filename
    if name is not None and "{step" not in name:
        raise ValueError(f"ModelCheckpoint: filename {name!r} has no {{step}}; {advice}, so put {{step}} in the name or leave it out")
    if not callback._enable_version_counter:
        raise ValueError(f"ModelCheckpoint: enable_version_counter is false; {advice}, so leave it out")
