"""What sharded strategies (FSDP2 and FSDP1) need of the modules: splitting networks, keeping ranks in step, gathering weights.

Every forward of a sharded network is a collective, so all ranks must run equally many: `any_rank` and `most` let loops agree.

FSDP2 (ModelParallelStrategy) shards each network for itself in `shard`. FSDP1 (`strategy: fsdp`) wraps the whole LightningModule: blocks
are units of their own, everything else (embeddings, norms, heads) belongs to the root, whose parameters a network sees inside the root's
forward (`training_step`, `validation_step`) or inside `full_params`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor import DTensor


def shard(network: nn.Module, trainer: Any) -> nn.Module:
    """Shards the network block by block under FSDP2, names its blocks to FSDP1, and returns it as it is under any other strategy."""
    strategy = getattr(trainer, "strategy", None)
    if isinstance(strategy, FSDPStrategy):
        _wrap_blocks(strategy, network)
    if not isinstance(strategy, ModelParallelStrategy):
        return network
    mesh = strategy.device_mesh["data_parallel"]
    for block in decoder_blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    if hasattr(network, "step"):
        register_fsdp_forward_method(network, "step")
    return network


def _wrap_blocks(strategy: FSDPStrategy, network: nn.Module) -> None:
    """Makes FSDP1 wrap the network's blocks, unless the user gave an `auto_wrap_policy`."""
    policy = strategy.kwargs.setdefault("auto_wrap_policy", block_policy())
    if hasattr(policy, "blocks"):
        policy.blocks |= {type(block) for block in decoder_blocks(network)}


def block_policy() -> Callable[..., bool]:
    """A wrapping policy for FSDP1: modules of the classes in its set `blocks`."""

    def policy(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        return recurse or type(module) in policy.blocks  # type: ignore[attr-defined]

    policy.blocks = set()  # type: ignore[attr-defined]
    return policy


def decoder_blocks(network: nn.Module) -> list[nn.Module]:
    """The transformer blocks: the longest ModuleList in the network."""
    stacks = [m for m in network.modules() if isinstance(m, nn.ModuleList)]
    return list(max(stacks, key=len)) if stacks else []


def is_sharded(network: nn.Module) -> bool:
    """Whether a forward of the network is a collective."""
    return isinstance(network, FSDPModule) or any(isinstance(m, FSDP1) for m in network.modules())


def any_rank(network: nn.Module, more: bool) -> bool:
    """Whether `more` holds on any rank; on this rank alone where the network is not sharded."""
    return more if not is_sharded(network) else bool(most(network, int(more)))


def most(network: nn.Module, n: int) -> int:
    """The largest n of all ranks; n itself where the network is not sharded."""
    if not is_sharded(network):
        return n
    largest = torch.tensor(n, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def shards(trainer: Any) -> bool:
    """Whether the trainer's strategy splits parameters over the ranks."""
    return isinstance(trainer.strategy, ModelParallelStrategy | FSDPStrategy)


def saves_shards(trainer: Any) -> bool:
    """Whether checkpoints are directories of one file a rank: without every weight, frozen networks included, they could not be loaded."""
    strategy = getattr(trainer, "strategy", None)
    if isinstance(strategy, ModelParallelStrategy):
        return strategy._save_distributed_checkpoint
    return isinstance(strategy, FSDPStrategy) and strategy._state_dict_type == "sharded"


def full_params(root: nn.Module) -> AbstractContextManager[Any]:
    """Around forwards that are run outside of the root's own: under FSDP1 (root = trainer.model) the root's parameters are whole inside.

    The blocks gather and drop theirs at each of their forwards as always. Any other root needs nothing.
    """
    if isinstance(root, FSDP1):
        return FSDP1.summon_full_params(root, writeback=False, recurse=False)
    return nullcontext()


@contextmanager
def gathered(root: nn.Module) -> Iterator[bool]:
    """Around `network.weights()`, on all ranks: says whether this rank is to call it (under FSDP1 only rank 0 holds whole weights)."""
    if not isinstance(root, FSDP1):
        yield True
        return
    offload = root.compute_device.type != "cpu"
    with FSDP1.summon_full_params(root, writeback=False, rank0_only=True, offload_to_cpu=offload):
        yield dist.get_rank() == 0


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor's whole value on rank 0's CPU (all ranks must call it, the others get an empty one); any other tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if dist.get_rank() == 0 else full.new_empty(0, device="cpu")  # eight copies of a model do not fit in a host


def whole_state(network: nn.Module) -> dict[str, Tensor]:
    """The state dict with whole tensors, under the keys of the network before it was sharded.

    Raises RuntimeError under FSDP1 outside of `gathered`, where tensors are pieces.
    """
    if not any(isinstance(m, FSDP1) for m in network.modules()):
        return {k: whole(v.detach()) for k, v in network.state_dict().items()}
    found = dict(network.named_parameters(remove_duplicate=False))
    for name, module in network.named_modules():
        kept = (n for n, _ in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set)
        found |= {f"{name}.{n}" if name else n: getattr(module, n) for n in kept}
    if network.get_input_embeddings().weight.dim() != 2:
        raise RuntimeError(
            "the weights are split over the ranks by FSDP; let the ExportHF callback write them, or read them inside "
            "`with lit_rlhf.sharding.gathered(trainer.model) as mine:` on rank 0"
        )
    return {plain_name(k): v.detach().to("cpu", copy=True) for k, v in found.items()}


def plain_name(key: str) -> str:
    """A parameter's or module's name without what FSDP1 and activation checkpointing put in."""
    return key.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")


def clip_gradients(module: Any, optimizer: Any, clip_val: float | None, algorithm: str | None) -> None:
    """Clips as the Trainer's `gradient_clip_val` says; under FSDP1 by the norm over all ranks, which torch's own function would not take.

    For the hook `configure_gradient_clipping`. Each rank holds pieces of every gradient, so a local norm is too small.
    """
    root = module.trainer.model
    if clip_val and isinstance(root, FSDP1) and algorithm in (None, "norm"):
        root.clip_grad_norm_(clip_val)
    else:
        module.clip_gradients(optimizer, clip_val, algorithm)


def name_weights(module: Any, checkpoint: dict[str, Any]) -> None:
    """Calls the weights in a whole checkpoint's optimizer states by their names, so that sharded strategies find them.

    torch's optimizers number their own weights from 0, and Lightning takes those numbers to count all weights of the module: where frozen
    ones stand between, FSDP2 would take one weight's moments for another's without a word, and FSDP1 fail. Single processes and DDP load
    by order, whatever the weights are called.
    """
    if shards(module.trainer) or "optimizer_states" not in checkpoint:
        return
    names = {p: name for name, p in module.named_parameters()}
    states = []
    for optimizer, saved in zip(module.trainer.optimizers, checkpoint["optimizer_states"], strict=True):
        own = [names[p] for group in optimizer.param_groups for p in group["params"]]
        to = dict(zip((i for group in saved["param_groups"] for i in group["params"]), own, strict=True))
        groups = [group | {"params": [to[i] for i in group["params"]]} for group in saved["param_groups"]]
        states.append(saved | {"state": {to[i]: state for i, state in saved["state"].items()}, "param_groups": groups})
    checkpoint["optimizer_states"] = states
