"""sample(): prompts -> responses, with a temperature and nothing else that the log-probs do not apply.

Sampling noise is a function of (key, global row, token, vocabulary id) and of nothing else, so the same rows give the same responses
whatever ranks or batches they are split over: a Gumbel draw on top of the logits, from a counter-based hash instead of a generator's state.
The prompt is prefilled once for all of its responses, and rows that are finished leave the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from lit_rlhf.batch import Batch
from lit_rlhf.functional import token_entropy
from lit_rlhf.networks import CausalPolicy
from lit_rlhf.sharding import any_rank


@dataclass
class Sampling:
    """How responses are sampled.

    Args:
        max_new_tokens: the longest response, EOS included, in tokens.
        temperature: divides the logits; 0 takes the likeliest token (for validation and prediction, not for PPO's rollouts).
        stop: strings that end a response as EOS does; the text is cut before them.
    """

    max_new_tokens: int = 53
    temperature: float = 0.7
    stop: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")


@dataclass
class Sampled:
    """Prompts with the responses sampled for them."""

    batch: Batch
    """The prompts and their N responses; response n belongs to prompt n // num_responses."""
    finished: Tensor
    """(N,) bool: ended by EOS or a stop string, not by max_new_tokens."""
    logprobs: Tensor
    """(N, R) nats as seen while sampling, 0 outside the mask (greedy: at temperature 1)."""
    entropy: Tensor
    """(N, R) nats, of the distribution each token was drawn from."""
    texts: list[str]
    """The responses as text, without EOS and cut before a stop string."""


@torch.no_grad()
def sample(
    policy: CausalPolicy,
    prompts: Batch,
    sampling: Sampling,
    *,
    num_responses: int = 1,
    key: Sequence[int] = (0,),
    rows: Sequence[int] | None = None,
) -> Sampled:
    """Samples `num_responses` responses for each prompt, in the policy's current mode and precision.

    Args:
        prompts: a batch of M prompts (its responses, if any, are ignored).
        key: what else the noise depends on, e.g. (seed, iteration).
        rows: the prompts' global row numbers, default those of the batch; response k of row r draws noise number r * num_responses + k.

    Raises ValueError where prompt + max_new_tokens exceed the policy's context.
    """
    check_context(policy, prompts, sampling)
    device, num_prompts = prompts.prompt_ids.device, prompts.num_prompts
    rows = (prompts.rows or range(num_prompts)) if rows is None else rows
    numbers = torch.tensor([r * num_responses + k for r in rows for k in range(num_responses)], dtype=torch.int32, device=device)
    total, width = len(numbers), sampling.max_new_tokens
    ids, logprobs, entropy = (torch.zeros(total, width, dtype=dt, device=device) for dt in (torch.long, torch.float, torch.float))
    lengths, finished = torch.zeros(total, dtype=torch.long, device=device), torch.zeros(total, dtype=torch.bool, device=device)

    logits, mask, position, cache = _prefill(policy, prompts, num_responses)
    alive = torch.arange(total, device=device)
    for t in range(width):
        token, logprobs[alive, t], entropy[alive, t] = draw(logits, policy.banned, sampling.temperature, (*key, t), numbers[alive])
        ids[alive, t] = token
        lengths[alive] += 1
        done = token == policy.tokenizer.eos_token_id
        if sampling.stop:
            done |= _stopped(policy, ids, lengths, alive, sampling.stop)
        finished[alive[done]] = True
        if done.any():
            keep = (~done).nonzero().squeeze(1)
            alive, token, mask, position = alive[keep], token[keep], mask[keep], position[keep]
        if len(alive) == 0 or t + 1 == width:
            break
        if done.any():
            cache.batch_select_indices(keep)
        any_rank(policy, True)
        mask, position = torch.cat([mask, mask.new_ones(len(alive), 1)], 1), position + 1
        logits = policy.step(token[:, None], mask, position[:, None], cache)
    while any_rank(policy, False):  # a step of a sharded policy takes all ranks: keep step with those that are not done
        policy.step(ids.new_zeros(1, 1), mask.new_ones(1, 1), position.new_zeros(1, 1), DynamicCache(config=policy.lm.config))
    longest = int(lengths.max())
    response_mask = torch.arange(longest, device=device) < lengths[:, None]
    owner = torch.arange(num_prompts, device=device).repeat_interleave(num_responses)
    batch = prompts.with_responses(ids[:, :longest], response_mask, owner)
    return Sampled(batch, finished, logprobs[:, :longest], entropy[:, :longest], response_texts(policy.tokenizer, batch, sampling.stop))


def _prefill(policy: CausalPolicy, prompts: Batch, num_responses: int) -> tuple[Tensor, Tensor, Tensor, DynamicCache]:
    """Computes the prompts once: next logits (N, V), mask (N, P) and last position (N,) for each of their N responses, and the cache."""
    ids, mask = left_padded(prompts)
    position = (mask.long().cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=policy.lm.config)
    logits = policy.step(ids, mask, position, cache)
    if num_responses > 1:
        cache.batch_repeat_interleave(num_responses)
    logits, mask, position = (x.repeat_interleave(num_responses, 0) for x in (logits, mask, position[:, -1]))
    return logits, mask, position, cache


def draw(logits: Tensor, banned: Tensor, temperature: float, key: Sequence[int], rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one token a row from softmax(logits / temperature) without the banned ids: argmax of logits + Gumbel noise.

    Args:
        logits: (n, V); banned: (V,) bool; rows: (n,) int32 numbers that the noise is a function of, with `key`.

    Returns token (n,), its log-probability (n,) and the entropy (n,), in nats.
    """
    scaled = logits.float().masked_fill(banned, -torch.inf) / (temperature or 1.0)
    token = (scaled + gumbel(key, rows, scaled.shape[1])).argmax(1) if temperature > 0 else scaled.argmax(1)
    return token, scaled.log_softmax(1).gather(1, token[:, None]).squeeze(1), token_entropy(scaled)


def gumbel(key: Sequence[int], rows: Tensor, size: int) -> Tensor:
    """Standard Gumbel noise (n, size), a pure function of (key, row, column): -log(E), E = -log(1 - u), u a 31-bit hash."""
    seed = 0
    for part in key:
        seed = _mix_int(seed ^ (part & 0xFFFFFFFF))
    row = _mix((rows.to(torch.int32) ^ _signed(seed)) + _signed(0x9E3779B9))
    column = _mix(torch.arange(size, dtype=torch.int32, device=rows.device))
    u = (_mix(row[:, None] ^ column) & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31)
    return u.neg_().log1p_().neg_().log_().neg_()


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash with good avalanche (C. Wellons' lowbias32), on int32 with wrap-around."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _signed(0x7FEB352D)
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _signed(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x


def left_padded(prompts: Batch) -> tuple[Tensor, Tensor]:
    """Prompt ids and mask (M, P) with the padding moved to the left, so that every row's last token is real."""
    shift = prompts.prompt_ids.shape[1] - prompts.prompt_mask.sum(1, keepdim=True)
    index = (torch.arange(prompts.prompt_ids.shape[1], device=shift.device) - shift) % prompts.prompt_ids.shape[1]
    return prompts.prompt_ids.gather(1, index), prompts.prompt_mask.gather(1, index)


def check_context(policy: CausalPolicy, prompts: Batch, sampling: Sampling) -> None:
    """Raises ValueError where the longest prompt and its response would not fit in the model's context."""
    longest, limit = int(prompts.prompt_mask.sum(1).max()), policy.context_length
    if limit is not None and longest + sampling.max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens + max_new_tokens {sampling.max_new_tokens} exceed the model's context of {limit}; "
            f"set max_prompt_tokens to at most {limit - sampling.max_new_tokens}"
        )


def response_texts(tokenizer: object, batch: Batch, stop: Sequence[str] = ()) -> list[str]:
    """The responses (N) as text, without special tokens and cut before the first stop string."""
    rows = [row[kept].tolist() for row, kept in zip(batch.response_ids.cpu(), batch.response_mask.cpu(), strict=True)]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)  # type: ignore[attr-defined]
    return [text[: min((i for s in stop if (i := text.find(s)) >= 0), default=len(text))] for text in texts]


def _stopped(policy: CausalPolicy, ids: Tensor, lengths: Tensor, alive: Tensor, stop: Sequence[str]) -> Tensor:
    """Which of the living rows contain a stop string by now."""
    texts = policy.tokenizer.batch_decode([ids[n, : int(lengths[n])].tolist() for n in alive], skip_special_tokens=True)
    return torch.tensor([any(s in text for s in stop) for text in texts], device=ids.device)
