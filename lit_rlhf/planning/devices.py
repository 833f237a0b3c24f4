"""What depends on the devices: attention kernels, precision, optimizer loops and how parameters are split over ranks."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lit_rlhf.attention import TREES, attend
from lit_rlhf.sharding import shard


class Attention:
    """Within it, takes the kernel that PyTorch would choose on the accelerator; without it, tensors without numbers get the slow one.

    CPU: flash attention; GPU: the memory-efficient one where there is a mask (which it wants in the queries' type, padded to eights, and
    which autograd keeps for every block), else flash attention. FlexAttention over trees, as on a GPU, keeps what flash attention keeps.
    (A TorchFunctionMode would not be there when activations are recomputed.)
    """

    def __init__(self, accelerator: str) -> None:
        self.accelerator = accelerator
        self._own = F.scaled_dot_product_attention

    def __enter__(self) -> None:
        F.scaled_dot_product_attention = self  # type: ignore[assignment]
        if self.accelerator == "gpu":
            AttentionInterface.register(TREES, _whole_row)

    def __exit__(self, *error: Any) -> None:
        F.scaled_dot_product_attention = self._own
        AttentionInterface.register(TREES, attend)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        if kwargs.get("dropout_p", 0.0) and self.accelerator == "cpu":
            return self._own(query, key, value, **kwargs)
        if torch.is_autocast_enabled("cpu") and query.dtype == torch.float32:
            query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
        return self._attend(query, key, value, kwargs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> Tensor:
        mask, causal, scale = kwargs.get("attn_mask"), kwargs.get("is_causal", False), kwargs.get("scale")
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -torch.inf)
        aten = torch.ops.aten
        if self.accelerator == "cpu":
            return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)[0]
        if mask is None:
            return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)[0]
        if mask.shape[-1] % 8:
            mask = F.pad(mask, (0, 8 - mask.shape[-1] % 8))[..., : mask.shape[-1]]
        mask = mask.expand(*query.shape[:3], key.shape[2])
        learns = torch.is_grad_enabled() and query.requires_grad
        return aten._scaled_dot_product_efficient_attention(query, key, value, mask, learns, 0.0, causal, scale=scale)[0]


def _whole_row(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any) -> Any:
    """One causal call over a row of trees; any other mask is left as it is."""
    return sdpa_attention_forward(module, query, key, value, None if hasattr(mask, "trees") else mask, **rest)


def forward_context(precision: str) -> Any:
    """What Lightning's precision plugin puts around a step; no weight's bf16 copy is kept for its next use."""
    return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False) if precision == "bf16-mixed" else nullcontext()


def lower(network: nn.Module) -> None:
    """network.to(bfloat16), which tensors without numbers refuse; weights that are one stay one."""
    made: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_floating_point():
                made.setdefault(id(p), nn.Parameter(p.detach().to(torch.bfloat16), requires_grad=p.requires_grad))
                module._parameters[name] = made[id(p)]
        for name, b in module._buffers.items():
            if b is not None and b.is_floating_point():
                module._buffers[name] = b.to(torch.bfloat16)


def loop_as_on(optimizer: torch.optim.Optimizer, accelerator: str) -> None:
    """On a GPU plain parameters are updated all at once (`foreach`), which holds one more copy of them for a moment."""
    for group in optimizer.param_groups:
        plain = all(type(p) in (Tensor, nn.Parameter) for p in group["params"])
        if accelerator == "gpu" and plain and group.get("foreach", True) is None and not group.get("fused"):
            group["foreach"] = True


@contextmanager
def ranks(world: int) -> Iterator[Any]:
    """A process group of `world` ranks of which this process is number 0 and the others are not there; gives its mesh, None for one.

    Raises RuntimeError inside of a real process group.
    """
    if world == 1:
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"

    if dist.is_initialized():
        raise RuntimeError("plan simulates ranks of its own and cannot run inside of a distributed job; start it as one process")
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (world,), mesh_dim_names=("data_parallel",))
    finally:
        dist.destroy_process_group()


def split(network: nn.Module, mesh: Any) -> None:
    """Splits a network over the ranks of the mesh by `shard` itself, as under FSDP2."""
    strategy = ModelParallelStrategy(data_parallel_size=mesh.size(), tensor_parallel_size=1)
    strategy._device_mesh = {"data_parallel": mesh}  # type: ignore[assignment]
    shard(network, SimpleNamespace(strategy=strategy, world_size=mesh.size()))
