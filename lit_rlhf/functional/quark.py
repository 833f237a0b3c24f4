"""Quark: quantiles of the reward, and a language-model loss that stays near the reference (Lu et al. 2022, arXiv:2205.13636)."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_rlhf.functional.logprobs import Head
from lit_rlhf.functional.losses import Stats
from lit_rlhf.functional.masking import masked_mean


def quantiles(scores: Tensor, k: int) -> Tensor:
    """Which of k equal shares each score is in, 0 the lowest; of equal scores the earlier is the lower.

    Shapes: (N,) -> (N,) int64. With fewer scores than shares the highest stands in share k - 1 still.
    Errors: ValueError for k < 2. Source: GXimingLu/Quark, data_pool.py.
    """
    if k < 2:
        raise ValueError(f"Quark needs at least 2 quantiles, got {k}")
    rank = torch.empty_like(scores, dtype=torch.long)
    rank[scores.argsort(stable=True)] = torch.arange(1, len(scores) + 1, device=scores.device)
    return (rank * k + len(scores) - 1) // len(scores) - 1


def logprobs_kl_entropy(
    states: Tensor, targets: Tensor, ref_states: Tensor, head: Head, ref_head: Head, *, banned: Tensor | None = None, chunk_size: int = 256
) -> tuple[Tensor, Tensor, Tensor]:
    """log p(target), KL(p || p_ref) = sum_v p (log p - log p_ref) and -sum_v p log p, over the whole vocabulary, for each of T positions.

    At most chunk_size x V logits of each are held at once, and made again in backward.
    Shapes: states (T, H), targets (T,) int64, ref_states (T, H'), banned (V,) bool: ids of probability 0 in both. The policy may have more
    ids than the reference, at the end, which then have probability 0. Results (T,) float32, nats.
    """
    parts = []
    pieces = (torch.split(x, chunk_size) for x in (states, targets, ref_states.detach()))
    for some, wanted, ref in zip(*pieces, strict=True):
        arguments = (some, wanted, ref, head, ref_head, banned)
        if torch.is_grad_enabled():
            parts.append(checkpoint(_exact, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_exact(*arguments))
    logprobs, kl, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
    return logprobs, kl, entropy


def _exact(
    states: Tensor, targets: Tensor, ref_states: Tensor, head: Head, ref_head: Head, banned: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        ref = ref_head(ref_states).float()
    logits = head(states).float()[:, : ref.shape[1]]
    if banned is not None:
        logits, ref = (x.masked_fill(banned[: ref.shape[1]], -1e30) for x in (logits, ref))
    logprobs, ref = logits.log_softmax(-1), ref.log_softmax(-1)
    p = logprobs.exp()
    return logprobs.gather(1, targets[:, None]).squeeze(1), (p * (logprobs - ref)).sum(-1), -(p * logprobs).sum(-1)


def quark_loss(
    logprobs: Tensor,
    kl: Tensor,
    entropy: Tensor,
    mask: Tensor,
    *,
    kl_coef: float = 0.05,
    entropy_coef: float = 0.06,
    count: float | None = None,
) -> tuple[Tensor, Stats]:
    """-log p(token | quantile) + kl_coef * KL(p || p_ref) - entropy_coef * H(p), each a mean over response tokens.

    Shapes: all (N, R); nats. count: tokens. Source: Lu et al. 2022, eq. 2, and GXimingLu/Quark main.py @ 30c9a0f (with its defaults).
    stats: loss, lm_loss, kl, entropy.
    """
    parts = {"lm_loss": -masked_mean(logprobs, mask, count=count), "kl": masked_mean(kl, mask, count=count)}
    parts["entropy"] = masked_mean(entropy, mask, count=count)
    loss = parts["lm_loss"] + kl_coef * parts["kl"] - entropy_coef * parts["entropy"]
    return loss, {"loss": loss.detach()} | {name: x.detach() for name, x in parts.items()}
