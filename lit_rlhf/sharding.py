"""shard(net, mesh): splits a network's parameters over the ranks (FSDP2), and what follows from it.

Every forward of a sharded network is a collective, so all ranks must run equally many: `any_rank` and `most` let loops agree.
"""

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor


def shard(network: nn.Module, trainer: Any) -> nn.Module:
    """Shards the network under Lightning's ModelParallelStrategy, block by block; under any other strategy it is returned as it is.

    Raises ValueError where the mesh is not all data parallel: Lightning's default on one node is one replica with tensors split over all
    devices, which lit_rlhf does not do.
    """
    strategy = getattr(trainer, "strategy", None)
    if not isinstance(strategy, ModelParallelStrategy):
        return network
    mesh = strategy.device_mesh["data_parallel"]
    if mesh.size() != trainer.world_size:
        raise ValueError(
            f"ModelParallelStrategy has data_parallel_size {mesh.size()} on {trainer.world_size} processes; set data_parallel_size to "
            f"{trainer.world_size} and tensor_parallel_size to 1 (configs/strategy/fsdp.yaml)"
        )
    for block in decoder_blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    if hasattr(network, "step"):
        register_fsdp_forward_method(network, "step")
    return network


def decoder_blocks(network: nn.Module) -> list[nn.Module]:
    """The transformer blocks: the longest ModuleList in the network."""
    stacks = [m for m in network.modules() if isinstance(m, nn.ModuleList)]
    return list(max(stacks, key=len)) if stacks else []


def is_sharded(network: nn.Module) -> bool:
    return isinstance(network, FSDPModule)


def any_rank(network: nn.Module, more: bool) -> bool:
    """Whether `more` holds on any rank; on this rank alone where the network is not sharded."""
    return more if not is_sharded(network) else bool(most(network, int(more)))


def most(network: nn.Module, n: int) -> int:
    """The largest n of all ranks; n itself where the network is not sharded."""
    if not is_sharded(network):
        return n
    largest = torch.tensor(n, device=next(network.parameters()).device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor's whole value on the CPU (all ranks must call it); any other tensor as it is."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
