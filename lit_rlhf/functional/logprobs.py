"""Log-probabilities and entropies of tokens, in nats."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]


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

    The head's own precision (autocast too) makes the logits; from there on it is float32. While gradients are enabled, each chunk's
    logits are dropped and computed again in backward, so the peak is chunk_size x V, not T x V, for one more pass through the head.

    Shapes: states (T, H), targets (T,) int64, head (t, H) -> (t, V), banned (V,) bool or None; result (T,) float32, nats. T may be 0.
    temperature: that of the sampler; log-probs at another temperature belong to another distribution (SFD ppo.py:618,625,733).
    banned: tokens the sampler never picks (True); their log-prob is -inf and the others are renormalised.
    Errors: ValueError for temperature <= 0 or chunk_size < 1.
    """
    _check_temperature(temperature)
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: give the number of tokens whose logits may be held at once, at least 1")
    chunks = []
    for s, t in zip(torch.split(states, chunk_size), torch.split(targets, chunk_size), strict=True):
        if torch.is_grad_enabled():
            chunk = checkpoint(_chunk_logprobs, s, t, head, temperature, banned, use_reentrant=False, preserve_rng_state=False)
        else:
            chunk = _chunk_logprobs(s, t, head, temperature, banned)
        chunks.append(chunk)
    return torch.cat(chunks)


def token_entropy(logits: Tensor, *, temperature: float = 1.0, banned: Tensor | None = None) -> Tensor:
    """-sum_v p_v log p_v of softmax(logits / temperature), where a token of probability 0 adds 0 (its logit may be -inf).

    Shapes: logits (..., V), banned (V,) bool or None; result (...,) float32, nats.
    Errors: ValueError for temperature <= 0.
    """
    _check_temperature(temperature)
    logprobs = _scaled(logits, temperature, banned).log_softmax(-1)
    return -(logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0.0)).sum(-1)
