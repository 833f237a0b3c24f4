"""sample(): prompts -> responses, with a temperature and nothing else that the log-probs do not apply.

Sampling noise is a function of (key, global row, token, vocabulary id) and of nothing else, so the same rows give the same responses
whatever ranks or batches they are split over: a Gumbel draw on top of the logits, from a counter-based hash instead of a generator's state.
The prompt is prefilled once for all of its responses, and responses that have ended leave the batch (decoding.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from lit_rlhf.batch import Batch
from lit_rlhf.decoding import Decoder, can_share_rows, replayed, weights_cast_once
from lit_rlhf.networks import CausalPolicy
from lit_rlhf.sharding import any_rank, is_sharded

BLOCK = 128
FIRST_BLOCK = 1 << 30
"""The number of the first block where noise is concerned: no vocabulary id is as large."""
LOWEST = -1e30
CPU_PIECE = 1 << 18
"""How many logits a CPU works on at a time: 1 MB of float32."""
CHECK_EVERY = 8
"""After how many tokens a GPU's host asks which responses have ended."""


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
    decoder: Literal["auto", "static", "dynamic"] = "auto",
) -> Sampled:
    """Samples `num_responses` responses for each prompt, in the policy's current mode and precision.

    Args:
        prompts: a batch of M prompts (its responses, if any, are ignored).
        key: what else the noise depends on, e.g. (seed, iteration).
        rows: the prompts' global row numbers, default those of the batch; response k of row r draws noise number r * num_responses + k.
        decoder: "static" decodes in room of a fixed size, on CUDA by replaying one captured step; "dynamic" attends to what is there.
            "auto" is static on CUDA where the policy is not sharded and can (`can_share_rows`). The tokens are the same.

    Raises ValueError where prompt + max_new_tokens exceed the policy's context, or for a static decoder that the policy cannot take.
    """
    check_context(policy, prompts, sampling)
    rows = (prompts.rows or range(prompts.num_prompts)) if rows is None else rows
    numbers = [r * num_responses + k for r in rows for k in range(num_responses)]
    with weights_cast_once(policy):
        draft = Draft(policy, prompts, sampling, num_responses, key, numbers, _is_static(policy, decoder))
        draft.run()
    return draft.sampled()


def _is_static(policy: CausalPolicy, decoder: str) -> bool:
    can = can_share_rows(policy) and not is_sharded(policy)
    if decoder == "static" and not can:
        raise ValueError(f"a {policy.lm.config.model_type} policy, sharded or of this family, cannot decode statically; use decoder='auto'")
    return can and (decoder == "static" or (decoder == "auto" and next(policy.parameters()).is_cuda))


class Draft:
    """Responses on their way: what has been drawn, and the decoder that says what comes next."""

    def __init__(
        self,
        policy: CausalPolicy,
        prompts: Batch,
        sampling: Sampling,
        num_responses: int,
        key: Sequence[int],
        numbers: Sequence[int],
        static: bool,
    ) -> None:
        self.policy, self.prompts, self.sampling, self.num_responses, self.static = policy, prompts, sampling, num_responses, static
        device, total, width = prompts.prompt_ids.device, len(numbers), sampling.max_new_tokens
        lengths = prompts.prompt_mask.sum(1).tolist()
        decoder = getattr(policy, "decoder", partial(Decoder, policy))  # a policy under a mask has one of its own (masked_policy.py)
        self.decoder = decoder(prompts, lengths, num_responses, width - 1, shared=can_share_rows(policy), static=static)
        self.ids = torch.zeros(total + 1, width, dtype=torch.long, device=device)  # the last row is that of places without a response
        self.logprobs, self.entropy = torch.zeros(2, total + 1, width, device=device)
        self.lengths = torch.full((total,), width, device=device)
        self.finished = torch.zeros(total, dtype=torch.bool, device=device)
        self.numbers = torch.tensor([*numbers, 0], dtype=torch.int32, device=device)
        self.seeds = torch.tensor([seed_of((*key, t)) for t in range(width)], dtype=torch.int32, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.token = torch.zeros(total, dtype=torch.long, device=device)
        self.owner, self.checked = self.decoder.places.flatten(), 0

    def run(self) -> None:
        """Draws until every response has ended or is as long as it may be."""
        every, share = (CHECK_EVERY, 0.5) if self.ids.is_cuda else (1, 0.75)
        self._draw(self.decoder.logits)
        del self.decoder.logits
        step, width = self._stepper(), self.sampling.max_new_tokens
        for drawn in range(1, width + 1):
            if drawn % every == 0 or drawn == width:
                alive = self._find_ends(drawn)
                if not alive.any() or drawn == width:
                    break
                if self._drop(alive, share):
                    step = self._stepper()
            any_rank(self.policy, True)
            step()
            self.decoder.moved()
        empty = self.ids.new_zeros(1, 1)
        while any_rank(self.policy, False):  # a step of a sharded policy takes all ranks: keep step with those that are not done
            self.policy.step(empty, empty == 0, empty, DynamicCache(config=self.policy.lm.config))

    def sampled(self) -> Sampled:
        """What was drawn, up to where each response ended."""
        longest, total = int(self.lengths.max()), len(self.lengths)
        mask = torch.arange(longest, device=self.ids.device) < self.lengths[:, None]
        owner = torch.arange(self.prompts.num_prompts, device=self.ids.device).repeat_interleave(self.num_responses)
        ids, logprobs, entropy = (x[:total, :longest].masked_fill(~mask, 0) for x in (self.ids, self.logprobs, self.entropy))
        batch = self.prompts.with_responses(ids, mask, owner)
        return Sampled(batch, self.finished, logprobs, entropy, response_texts(self.policy.tokenizer, batch, self.sampling.stop))

    def _stepper(self) -> Callable[[], None]:
        return replayed(self._step) if self.static and self.ids.is_cuda else self._step

    def _step(self) -> None:
        self._draw(self.decoder.step(self.token))

    def _draw(self, logits: Tensor) -> None:
        """Draws a token for each place and writes it down; tensors alone say where, so that this can be replayed."""
        seed, numbers = self.seeds.index_select(0, self.column), self.numbers.index_select(0, self.owner)
        token, logprob, entropy = draw(logits, self.policy.banned, self.sampling.temperature, seed, numbers)
        at = (self.owner, self.column)
        self.ids[at], self.logprobs[at], self.entropy[at] = token, logprob, entropy
        self.token.copy_(token)
        self.column += 1

    def _find_ends(self, drawn: int) -> Tensor:
        """Writes down which responses have ended within the `drawn` tokens so far; those that have not, (N,) bool on the host."""
        before, open_rows = self.checked, ~self.finished
        is_end = self.ids[:-1, before:drawn] == self.policy.tokenizer.eos_token_id
        ended = is_end.any(1) & open_rows
        self.lengths = torch.where(ended, before + 1 + is_end.int().argmax(1), self.lengths)
        self.finished |= ended
        self.checked = drawn
        if self.sampling.stop:
            for n in open_rows.nonzero().squeeze(1).tolist():
                length = self._stopped_at(n, before, min(drawn, int(self.lengths[n])))
                if length is not None:
                    self.lengths[n], self.finished[n] = length, True
        return (~self.finished).cpu()

    def _stopped_at(self, n: int, before: int, drawn: int) -> int | None:
        """After how many tokens, more than `before`, response n holds a stop string; None where it has none."""
        ids, stop = self.ids[n, :drawn].tolist(), self.sampling.stop
        texts = self.policy.tokenizer.batch_decode([ids[:length] for length in range(before + 1, drawn + 1)], skip_special_tokens=True)
        return next((before + 1 + i for i, text in enumerate(texts) if any(s in text for s in stop)), None)

    def _drop(self, alive: Tensor, share: float) -> bool:
        """Lets responses that have ended leave the batch where no more than `share` of the places would be left; whether it did."""
        places = self.decoder.places.cpu()
        live = torch.cat([alive, alive.new_zeros(1)])[places]
        counts = live.sum(1)
        rows, width = counts.nonzero().squeeze(1), int(counts.max())
        if len(rows) * width > share * places.numel():
            return False
        order = live[rows].int().argsort(dim=1, descending=True, stable=True)[:, :width]
        index = rows[:, None] * places.shape[1] + order
        owner = torch.where(live.flatten()[index], places.flatten()[index], len(alive)).to(self.ids.device)
        index = index.to(self.ids.device)
        self.decoder.keep(index, owner)
        self.owner, self.token = owner.flatten(), self.token[index.flatten()]
        return True


def draw(logits: Tensor, banned: Tensor, temperature: float, key: Sequence[int] | Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one token a row from softmax(logits / temperature) without the banned ids, with Gumbel noise: argmax of log p + noise.

    First a block of BLOCK ids by the blocks' probabilities, then an id of it by its own, so that noise is needed for V / BLOCK + BLOCK
    numbers, not for V. (Gumbel's maximum over a block's ids is distributed as noise on the log of their sum.)

    Args:
        logits: (n, V); banned: (V,) bool; rows: (n,) int32 numbers that the noise is a function of, with `key`.

    Returns token (n,), its log-probability (n,) and the entropy (n,), in nats.
    """
    (count, size), device = logits.shape, logits.device
    blocks = -(-size // BLOCK)
    ban = torch.zeros(size, device=device).masked_fill_(banned, LOWEST)
    scaled, mass, spread = (torch.empty(count, *w, device=device) for w in ((size,), (blocks,), ()))
    piece = max(1, CPU_PIECE // size) if device.type == "cpu" else count
    weights = torch.zeros(min(piece, count), blocks * BLOCK, device=device)
    for a in range(0, count, piece):  # what the cores' caches can hold
        x, w = scaled[a : a + piece], weights[: min(piece, count - a)]
        torch.add(ban, logits[a : a + piece], alpha=1 / (temperature or 1.0), out=x)
        x.sub_(x.amax(1, keepdim=True)).clamp_(min=LOWEST)  # -inf times a probability of 0 would be NaN
        torch.exp(x, out=w[:, :size])
        torch.sum(w.unflatten(1, (blocks, BLOCK)), 2, out=mass[a : a + piece])
        torch.sum(w[:, :size].mul_(x), 1, out=spread[a : a + piece])
    total = mass.sum(1)
    token = scaled.argmax(1, keepdim=True) if temperature == 0 else _choose(scaled, mass, key, rows)
    log_total = total.log()
    return token.squeeze(1), scaled.gather(1, token).squeeze(1) - log_total, log_total - spread / total


def _choose(scaled: Tensor, mass: Tensor, key: Sequence[int] | Tensor, rows: Tensor) -> Tensor:
    """A block of ids from log `mass` (n, blocks), then an id of it from `scaled` (n, V), as (n, 1)."""
    size, device = scaled.shape[1], rows.device
    names = torch.arange(mass.shape[1], device=device) + FIRST_BLOCK
    block = (mass.log() + gumbel(key, rows, names)).argmax(1, keepdim=True)
    ids = block * BLOCK + torch.arange(BLOCK, device=device)
    inside = scaled.gather(1, ids.clamp(max=size - 1)).masked_fill(ids >= size, -torch.inf)
    return ids.gather(1, (inside + gumbel(key, rows, ids)).argmax(1, keepdim=True))


def gumbel(key: Sequence[int] | Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Standard Gumbel noise (n, size), a pure function of (key, row, column): -log(E), E = -log(1 - u), u a 31-bit hash.

    Args:
        key: whole numbers, or what `seed_of` makes of them. rows: (n,). columns: (size,) or (n, size).
    """
    seed = key if isinstance(key, Tensor) else seed_of(key)
    row = _mix((rows.to(torch.int32) ^ seed) + _signed(0x9E3779B9))
    u = (_mix(row[:, None] ^ _mix(columns.to(torch.int32))) & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31)
    return u.neg_().log1p_().neg_().log_().neg_()


def seed_of(key: Sequence[int]) -> int:
    """The key as one signed 32-bit number."""
    seed = 0
    for part in key:
        seed = _mix_int(seed ^ (part & 0xFFFFFFFF))
    return _signed(seed)


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


def check_context(policy: CausalPolicy, prompts: Batch, sampling: Sampling) -> None:
    """Raises ValueError where the longest prompt and its response would not fit in the model's context."""
    longest, limit = int(prompts.prompt_mask.sum(1).max()), policy.context_length
    if limit is not None and longest + sampling.max_new_tokens > limit:
        left = limit - sampling.max_new_tokens
        remedy = f"set max_prompt_tokens to at most {left}" if left > 0 else f"a response has at most {max(limit - longest, 0)} tokens here"
        raise ValueError(
            f"a prompt of {longest} tokens + max_new_tokens {sampling.max_new_tokens} exceed the model's context of {limit}; {remedy}"
        )


def response_texts(tokenizer: object, batch: Batch, stop: Sequence[str] = ()) -> list[str]:
    """The responses (N) as text, without special tokens and cut before the first stop string."""
    rows = [row[kept].tolist() for row, kept in zip(batch.response_ids.cpu(), batch.response_mask.cpu(), strict=True)]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)  # type: ignore[attr-defined]
    return [text[: min((i for s in stop if (i := text.find(s)) >= 0), default=len(text))] for text in texts]
