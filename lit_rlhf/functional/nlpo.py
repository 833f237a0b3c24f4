"""NLPO's mask: the nucleus of another policy, and log-probs within it (Ramamurthy et al. 2022, arXiv:2210.01241)."""

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_rlhf.functional.logprobs import Head


def nucleus(logits: Tensor, top_p: float, *, min_tokens: int = 1, temperature: float = 1.0, banned: Tensor | None = None) -> Tensor:
    """The mask of the likeliest tokens whose probabilities together reach `top_p`, at least `min_tokens` of them (Holtzman et al. 2019).

    Shapes: logits (n, V), banned (V,) bool, never in it; result (n, V) bool.
    Errors: ValueError for top_p outside (0, 1] or min_tokens < 1.
    """
    if not 0 < top_p <= 1 or min_tokens < 1:
        raise ValueError(f"top_p must be above 0 and at most 1, min_tokens at least 1; got {top_p} and {min_tokens}")
    scaled = logits.float() / temperature
    scaled = scaled if banned is None else scaled.masked_fill(banned, -torch.inf)
    p, order = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = p.cumsum(-1) - p  # which rounding may put a little above 1
    kept = ((before < top_p) | (top_p == 1)) & (p > 0)
    kept[:, :min_tokens] = p[:, :min_tokens] > 0
    return torch.zeros_like(kept).scatter(1, order, kept)


def masked_token_logprobs(
    states: Tensor,
    targets: Tensor,
    guide_states: Tensor,
    head: Head,
    guide_head: Head,
    *,
    top_p: float,
    min_tokens: int = 1,
    temperature: float = 1.0,
    banned: Tensor | None = None,
    chunk_size: int = 256,
) -> Tensor:
    """log softmax(head(states) / temperature)[target] over the guide's nucleus alone: what a token sampled under the mask has.

    The target itself always counts: it was sampled, so it was allowed, and a cached forward may round probabilities otherwise.
    At most chunk_size x V logits of each are held at once, and made again in backward; the guide gets no gradient.
    Shapes: states (T, H), targets (T,) int64, guide_states (T, H'), banned (V,) bool; result (T,) float32, nats.
    """
    within = partial(_within, head=head, guide_head=guide_head, top_p=top_p, min_tokens=min_tokens, temperature=temperature, banned=banned)
    parts = []
    for some, wanted, guide in zip(*(torch.split(x, chunk_size) for x in (states, targets, guide_states.detach())), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(within, some, wanted, guide, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(within(some, wanted, guide))
    return torch.cat(parts)


def _within(
    states: Tensor,
    targets: Tensor,
    guide_states: Tensor,
    *,
    head: Head,
    guide_head: Head,
    top_p: float,
    min_tokens: int,
    temperature: float,
    banned: Tensor | None,
) -> Tensor:
    with torch.no_grad():
        allowed = nucleus(guide_head(guide_states), top_p, min_tokens=min_tokens, temperature=temperature, banned=banned)
        allowed = allowed.scatter(1, targets[:, None], True)
    logits = (head(states).float() / temperature).masked_fill(~allowed, -torch.inf)
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
