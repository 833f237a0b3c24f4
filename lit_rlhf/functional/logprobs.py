"""Log-probabilities and entropies of tokens, in nats."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]
TILE = {"cpu": 1 << 21}
"""Logits held at once, tokens x vocabulary: on a CPU what its cache holds (8 MB), elsewhere `WIDE_TILE`."""
WIDE_TILE = 1 << 27


def _scaled(logits: Tensor, temperature: float, banned: Tensor | None) -> Tensor:
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    return logits if banned is None else logits.masked_fill(banned, -torch.inf)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: a log-probability needs one above 0 (greedy sampling has none)")


def _chunk_logprobs(states: Tensor, targets: Tensor, head: Head, temperature: float, banned: Tensor | None) -> Tensor:
    return -F.cross_entropy(_scaled(head(states), temperature, banned), targets, reduction="none")


def token_logprobs(
    states: Tensor,
    targets: Tensor,
    head: Head,
    *,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    banned: Tensor | None = None,
) -> Tensor:
    """log softmax(head(states) / temperature)[target], without ever holding the logits of more than one chunk of tokens.

    The head's own precision (autocast too) makes the logits; from there on it is float32. Logits are made again in backward instead of
    being kept, for one more product with the head's weight. A linear head goes in tiles of tokens x vocabulary that stay in cache
    (`_TiledLogprobs`), any other in chunks of tokens, so the peak is chunk_size x V there.

    Shapes: states (T, H), targets (T,) int64, head (t, H) -> (t, V), banned (V,) bool or None; result (T,) float32, nats. T may be 0.
    temperature: that of the sampler; log-probs at another temperature belong to another distribution (SFD ppo.py:618,625,733).
    banned: tokens the sampler never picks (True); their log-prob is -inf and the others are renormalised.
    Errors: ValueError for temperature <= 0 or chunk_size < 1.
    """
    _check_temperature(temperature)
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: give the number of tokens whose logits may be held at once, at least 1")
    if type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks:  # sharded and adapted heads are other types
        return _TiledLogprobs.apply(states, head.weight, head.bias, targets, banned, temperature, chunk_size)
    chunks = []
    for s, t in zip(torch.split(states, chunk_size), torch.split(targets, chunk_size), strict=True):
        if torch.is_grad_enabled():
            chunk = checkpoint(_chunk_logprobs, s, t, head, temperature, banned, use_reentrant=False, preserve_rng_state=False)
        else:
            chunk = _chunk_logprobs(s, t, head, temperature, banned)
        chunks.append(chunk)
    return torch.cat(chunks)


class _TiledLogprobs(torch.autograd.Function):
    """Log-probs under a linear head by tiles of the logits: an online softmax forward, and in backward each tile again.

    d logprob_t / d logit_v = (v == target_t) - p_v. The peak is one tile, whatever T and V are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        banned: Tensor | None,
        temperature: float,
        chunk: int,
    ) -> Tensor:
        device = states.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        ctx.temperature, ctx.chunk = temperature, chunk
        total = states.new_full((len(states),), -torch.inf, dtype=torch.float32)
        wanted = total.clone()
        for rows, columns, logits in _tiles(ctx, states, weight, bias, banned):
            hit, column = _inside(targets[rows], columns)
            wanted[rows] = torch.where(hit, logits.gather(1, column[:, None]).squeeze(1), wanted[rows])
            top = logits.amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
            part = logits.sub_(top).exp_().sum(1).log_().add_(top.squeeze(1))
            total[rows] = torch.logaddexp(total[rows], part)
        ctx.save_for_backward(states, weight, bias, targets, banned, total)
        return wanted - total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, targets, banned, total = ctx.saved_tensors
        scale = grad.float() / ctx.temperature
        to_states, to_weight, to_bias = (
            torch.zeros(x.shape, dtype=torch.float32, device=x.device) if x is not None and needed else None
            for x, needed in zip((states, weight, bias), ctx.needs_input_grad, strict=False)
        )
        for rows, columns, logits in _tiles(ctx, states, weight, bias, banned):
            by_logit = logits.sub_(total[rows][:, None]).exp_().mul_(-scale[rows][:, None])
            hit, column = _inside(targets[rows], columns)
            by_logit.scatter_add_(1, column[:, None], (scale[rows] * hit)[:, None])
            if to_bias is not None:
                to_bias[columns] += by_logit.sum(0)
            by_logit = by_logit.to(ctx.dtype)
            _add_product(to_states, rows, by_logit, weight[columns].to(ctx.dtype))
            _add_product(to_weight, columns, by_logit.t(), states[rows].to(ctx.dtype))
        back = ((g, x) for g, x in zip((to_states, to_weight, to_bias), (states, weight, bias), strict=True))
        return (*(None if g is None else g.to(x.dtype) for g, x in back), None, None, None, None)


def _tiles(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, banned: Tensor | None) -> Iterator[tuple[slice, slice, Tensor]]:
    """The scaled logits (t, v) float32 of each tile with the tokens and the vocabulary ids it covers; the caller may overwrite them."""
    width = max(TILE.get(states.device.type, WIDE_TILE) // ctx.chunk, 1)
    with torch.autocast(states.device.type, enabled=False):
        for v in range(0, len(weight), width):
            columns = slice(v, min(v + width, len(weight)))
            head, offset = weight[columns].to(ctx.dtype).t(), None if bias is None else bias[columns].to(ctx.dtype)
            for t in range(0, len(states), ctx.chunk):
                rows = slice(t, min(t + ctx.chunk, len(states)))
                some = states[rows].to(ctx.dtype)
                logits = (some @ head if offset is None else torch.addmm(offset, some, head)).float()
                if ctx.temperature != 1.0:
                    logits.div_(ctx.temperature)
                yield rows, columns, logits if banned is None else logits.masked_fill_(banned[columns], -torch.inf)


def _inside(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Which of the targets (t,) lie in this part of the vocabulary, and where in it (anywhere for the others)."""
    hit = (targets >= columns.start) & (targets < columns.stop)
    return hit, (targets - columns.start).clamp(0, columns.stop - columns.start - 1)


def _add_product(total: Tensor | None, rows: slice, a: Tensor, b: Tensor) -> None:
    """total[rows] += a @ b, in float32; nothing where no gradient is wanted."""
    if total is None:
        return
    if a.dtype == torch.float32:
        total[rows].addmm_(a, b)
    else:
        total[rows] += a @ b


def token_entropy(logits: Tensor, *, temperature: float = 1.0, banned: Tensor | None = None) -> Tensor:
    """-sum_v p_v log p_v of softmax(logits / temperature), where a token of probability 0 adds 0 (its logit may be -inf).

    Shapes: logits (..., V), banned (V,) bool or None; result (...,) float32, nats.
    Errors: ValueError for temperature <= 0.
    """
    _check_temperature(temperature)
    logprobs = _scaled(logits, temperature, banned).log_softmax(-1)
    return -(logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0.0)).sum(-1)
