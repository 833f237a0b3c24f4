"""The strategies that two CPU ranks try, FSDP1 among them through a subclass: Lightning and torch allow it on GPUs only."""

from contextlib import contextmanager
from typing import Any

import lightning.pytorch.strategies.fsdp as lightning_fsdp
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import device, nn
from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, FullyShardedDataParallel, StateDictType


@contextmanager
def _full_without_offload(module: nn.Module, world_size: int, rank0_only: bool = True):
    """Whole state dicts, left where they are: moving CPU tensors to the CPU crashes torch with SIGSEGV."""
    full = FullStateDictConfig(offload_to_cpu=False, rank0_only=False), FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=False)
    with FullyShardedDataParallel.state_dict_type(module, StateDictType.FULL_STATE_DICT, *full):
        yield


class CPUFSDPStrategy(FSDPStrategy):
    """Lightning's FSDPStrategy with `device_id` cpu, which it has no argument for."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        lightning_fsdp._get_full_state_dict_context = _full_without_offload
        wrapping: dict[str, Any] = {"mixed_precision": self.mixed_precision_config, "sharding_strategy": self.sharding_strategy}
        return FullyShardedDataParallel(model, device_id=device("cpu"), **wrapping, **self.kwargs)


def strategy(name: str, world: int = 2, sharded: bool = False) -> Strategy:
    """A new strategy object (each Trainer needs its own); `sharded`: its checkpoints are directories of one file a rank."""
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if name == "fsdp1":
        return CPUFSDPStrategy(process_group_backend="gloo", state_dict_type="sharded" if sharded else "full")
    assert name == "fsdp2"
    return ModelParallelStrategy(
        data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=sharded, process_group_backend="gloo"
    )
