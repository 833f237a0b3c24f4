"""Attention in which each tree of a packed row sees itself alone, without padding and without a mask over the whole row.

Registered with transformers as an attention implementation of its own (`TREES`); `networks.py` puts models on it whose attention is
torch's `scaled_dot_product_attention`. On a CPU each tree is a call of that function, causal where it has one branch. On CUDA it is one
FlexAttention over the row with a block mask that is made once per layout.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

TREES = "lit_rlhf_trees"


@dataclass
class Trees:
    """The trees of one row of T tokens, one after the other, without padding."""

    segment: Tensor
    """(T,) int64, the tree of each token."""
    branch: Tensor
    """(T,) int64, 0 for the prompt's tokens, k for those of its k-th response."""
    sizes: list[int]
    """Tokens of each tree."""
    masks: list[Tensor | None]
    """For each tree its (L, L) mask, True = may attend; None where it has one branch, which causal attention serves."""
    made: dict[str, Any] = field(default_factory=dict)

    def marker(self) -> Tensor:
        """What takes the place of an attention mask on the way through a Hugging Face model: four dimensions, and `trees` on it."""
        marker = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.segment.device)
        marker.trees = self  # type: ignore[attr-defined]
        return marker

    def block_mask(self) -> BlockMask:
        """The row's mask for FlexAttention, made once."""
        if "block_mask" not in self.made:
            size, device = len(self.segment), self.segment.device
            rule = partial(may_attend, self.segment, self.branch)
            self.made["block_mask"] = create_block_mask(rule, 1, None, size, size, device=device.type, _compile=device.type == "cuda")
        return self.made["block_mask"]


def may_attend(segment: Tensor, branch: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The rule of layout.py as FlexAttention's `mask_mod`; all arguments but the first two are indices."""
    reach = (branch[key] == 0) | (branch[key] == branch[query])
    return (segment[query] == segment[key]) & (key <= query) & reach


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers calls it; without trees on the mask (sampling, plain rows) it is transformers' own.

    Shapes: query (1, heads, T, D), key and value (1, key heads, T, D); result (1, T, heads, D).
    """
    trees: Trees | None = getattr(attention_mask, "trees", None)
    if trees is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest)
    unserved = [name for name in ("softcap", "s_aux", "position_bias") if rest.get(name) is not None]
    if unserved:
        raise ValueError(f"attention over trees has no {', '.join(unserved)}")
    if query.device.type == "cuda":
        out, _ = flex_attention_forward(module, query, key, value, trees.block_mask(), scaling=scaling, dropout=dropout, **rest)
        return out, None
    groups, dtype = query.shape[1] // key.shape[1], query.dtype
    if query.device.type == "cpu":  # in bfloat16 the backward pass of torch's CPU kernel takes three times as long
        query, key, value = query.float(), key.float(), value.float()
    parts = (x.split(trees.sizes, dim=2) for x in (query, repeat_kv(key, groups), repeat_kv(value, groups)))
    setting = {"dropout_p": dropout, "scale": scaling}
    with torch.autocast(query.device.type, enabled=False):
        found = [
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, **setting).transpose(1, 2)
            for q, k, v, mask in zip(*parts, trees.masks, strict=True)
        ]
    return torch.cat(found, dim=1).to(dtype), None


AttentionInterface.register(TREES, attend)
AttentionMaskInterface.register(TREES, sdpa_mask)
