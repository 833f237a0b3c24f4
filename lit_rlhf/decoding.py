"""Decoder: a policy's keys and values, masks and positions, from one sampled token to the next.

A row of the cache is a prompt, stored once, and its W responses are W places in that row: tokens of one step stand side by side, and each
place sees the prompt and its own tokens.

    columns:    [ pad | prompt | a1 b1 c1 | a2 b2 c2 | ... ]
    place b:      0 0   1 1 1    0  1  0    0  1  0            1 = may attend

So a step reads a prompt's keys once for all of its responses. It is the rule of layout.py, one token at a time, for the families that
passed its check; others, and those that fail `can_share_rows`, get a row for each response, W = 1, and the model's own masks.

Keys and values lie in room that is taken once (`Room`): growing by concatenation would copy the whole cache at every token.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from lit_rlhf.attention import TREES
from lit_rlhf.batch import Batch
from lit_rlhf.networks import CausalPolicy
from lit_rlhf.sharding import is_sharded, most

PREFILL_TOKENS = 4096
"""How many tokens of prompts, padding included, one forward pass takes: enough for the matrix products, little padding, little memory."""
GROUPED = "lit_rlhf_grouped"


class Decoder:
    """Where the decoding of a batch of prompts stands.

    Args:
        prompts: M prompts; num_responses: how many places each gets. new_tokens: how many `step`s there may be.
        lengths: (M) tokens of each prompt, on the host.
        shared: a row holds a prompt and all of its responses; else a row holds one response.
        static: every step attends over all of the room and moves on by tensors alone, so that it can be captured; needs `shared`.

    Afterwards `logits` (M * num_responses, V) are those of the first token, and `places` (B, W) says which response a place is of; the
    number of responses stands for none.
    """

    def __init__(
        self,
        policy: CausalPolicy,
        prompts: Batch,
        lengths: Sequence[int],
        num_responses: int,
        new_tokens: int,
        *,
        shared: bool,
        static: bool = False,
    ) -> None:
        self.policy, self.shared = policy, shared
        num_prompts, longest = len(lengths), max(lengths)
        ids, mask = (x[:, -longest:] for x in left_padded(prompts))
        self.columns = Columns(longest, torch.tensor([longest], device=ids.device) if static else None)
        self.total = num_prompts * num_responses
        self.places = torch.arange(self.total, device=ids.device).view(-1, num_responses if shared else 1)
        self.repeats, self.steps = 1 if shared else num_responses, new_tokens
        self.mask = self._mask(mask.repeat_interleave(self.repeats, 0)[:, None].expand(-1, self.width, -1))
        position = torch.tensor(lengths, device=ids.device).repeat_interleave(num_responses)
        self.position = position.view(self.places.shape)
        self.cache, logits = self._prefill(ids, mask, lengths)
        self.logits = logits.repeat_interleave(num_responses, 0)

    @property
    def width(self) -> int:
        """W, places a row."""
        return self.places.shape[1]

    def step(self, tokens: Tensor) -> Tensor:
        """The next logits (B * W, V) after one more token (B * W,) in each place; `moved` must follow."""
        ids = tokens.view(self.places.shape)
        end = self.columns.length + self.width
        if self.columns.cursor is not None:
            seen = torch.arange(self.mask.shape[2], device=ids.device) < self.columns.cursor + self.width
            mask = (self.mask & seen)[:, None]
        else:
            mask = self.mask[:, None, :, :end] if self.shared else self.mask[:, 0, :end]
        with grouped_attention(self.policy.lm) if self.shared else nullcontext():
            logits = self.policy.step(ids, mask, self.position, self.cache, last=self.width)
        self.position += 1
        if self.columns.cursor is not None:
            self.columns.cursor += self.width
        return logits

    def moved(self) -> None:
        """Counts a step on the host, where a replayed one runs no line of Python."""
        self.columns.length += self.width
        self.steps -= 1

    def keep(self, index: Tensor, places: Tensor) -> None:
        """Goes on with the places (B', W') numbered `index` (row * W + place), each row's from one row; `places` are their responses."""
        rows = index[:, 0] // self.width
        seen = self.mask.flatten(0, 1)[index][:, :, : self.columns.length]
        self.position, self.places = self.position.flatten()[index], places
        all_rows = len(rows) == len(self.mask)
        self.mask = self._mask(seen)
        for layer in self.cache.layers:
            if isinstance(layer, Room):
                layer.move(rows, self.mask.shape[2])
            elif not all_rows:
                layer.batch_select_indices(rows)

    def _mask(self, seen: Tensor) -> Tensor:
        """Who sees what (B, W, columns): `seen` (B, W, so far), then each place its own tokens; static ones in sixteens."""
        own = torch.eye(self.width, dtype=torch.bool, device=seen.device).repeat(1, self.steps)
        spare = seen.new_zeros(self.width, 0 if self.columns.cursor is None else -(seen.shape[2] + own.shape[1]) % 16)
        return torch.cat([seen, torch.cat([own, spare], 1).expand(len(seen), -1, -1)], 2)

    def _prefill(self, ids: Tensor, mask: Tensor, lengths: Sequence[int]) -> tuple[Cache, Tensor]:
        """Computes the prompts, like lengths together; their keys and values as a cache, and the next logits (M, V).

        Each rank of a sharded policy makes as many passes as the one with the most.
        """
        cache = DynamicCache(config=self.policy.lm.config)
        plain = all(type(layer) is DynamicLayer for layer in cache.layers)
        parts = like_lengths(lengths, PREFILL_TOKENS) if plain else [list(range(len(ids)))]
        rooms: list[Any] = []
        found = []
        for turn in range(most(self.policy, len(parts))):
            part = parts[turn % len(parts)]
            index = torch.tensor(part, device=ids.device)
            start = ids.shape[1] - max(lengths[i] for i in part) if plain else 0
            cache, rows = DynamicCache(config=self.policy.lm.config), mask[index, start:]
            position = (rows.long().cumsum(1) - 1).clamp(min=0)
            found.append((index, self.policy.step(ids[index, start:], rows, position, cache)))
            if plain and turn < len(parts):
                self._store(rooms, cache, index, start)
        found = found[: len(parts)]
        logits = torch.cat([x for _, x in found])[torch.cat([index for index, _ in found]).argsort()]
        if plain:
            return Cache(layers=rooms), logits
        cache.batch_repeat_interleave(self.repeats)
        return cache, logits

    def _store(self, rooms: list[Any], cache: Cache, index: Tensor, start: int) -> None:
        """Copies the prompts' keys and values from the cache of a pass into the rows of the rooms, which are made with the first."""
        rows, columns = len(self.mask), self.mask.shape[2]
        if not rooms:
            # Rotary embeddings give float32 keys under autocast, which attention would cast anew at every step.
            dtype = autocast_dtype(index.device.type) if self.shared else None
            made = (Room.of(layer, rows, columns, self.columns, dtype) if layer.is_initialized else layer for layer in cache.layers)
            rooms.extend(made)
        at = (index[:, None] * self.repeats + torch.arange(self.repeats, device=index.device)).flatten()
        for room, layer in zip(rooms, cache.layers, strict=True):
            if isinstance(room, Room):
                for to, made in ((room.keys, layer.keys), (room.values, layer.values)):
                    to[at, :, start : self.columns.length] = made.to(to.dtype).repeat_interleave(self.repeats, 0)
                layer.keys = layer.values = None


@dataclass
class Columns:
    """How many columns of the room are in use, on the host, and for a static decoder on the device too."""

    length: int
    cursor: Tensor | None


class Room(DynamicLayer):
    """One layer's keys and values (B, heads, columns, D), written in place."""

    def __init__(self, keys: Tensor, values: Tensor, columns: Columns) -> None:
        super().__init__()
        self.keys, self.values, self.columns = keys, values, columns
        self.is_initialized, self.dtype, self.device = True, keys.dtype, keys.device

    @classmethod
    def of(cls, layer: DynamicLayer, rows: int, size: int, columns: Columns, dtype: torch.dtype | None) -> "Room":
        """Empty room for `rows` rows of `size` tokens like those of the layer; zeros, since what is masked is still multiplied."""
        keys, values = (x.new_zeros(rows, x.shape[1], size, x.shape[3], dtype=dtype) for x in (layer.keys, layer.values))
        return cls(keys, values, columns)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new, start = key_states.shape[2], self.columns.length
        if self.columns.cursor is not None:
            index = self.columns.cursor + torch.arange(new, device=self.device)
            self.keys.index_copy_(2, index, key_states.to(self.dtype))
            self.values.index_copy_(2, index, value_states.to(self.values.dtype))
            return self.keys, self.values
        self.keys[:, :, start : start + new] = key_states
        self.values[:, :, start : start + new] = value_states
        return self.keys[:, :, : start + new], self.values[:, :, : start + new]

    def get_seq_length(self) -> int:
        return self.columns.length

    def move(self, rows: Tensor, size: int) -> None:
        """Keeps these rows, in room for `size` tokens."""
        used = self.columns.length
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old[:, :, :size]
            if len(rows) < len(old):
                new = old.new_zeros(len(rows), old.shape[1], size, old.shape[3])
                new[:, :, :used] = old[rows, :, :used]
            setattr(self, name, new)


def like_lengths(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """The numbers of `lengths` in groups of like length, the longest first: longest times count is at most `budget`, or the count is 1."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def left_padded(prompts: Batch) -> tuple[Tensor, Tensor]:
    """Prompt ids and mask (M, P) with the padding moved to the left, so that every row's last token is real."""
    shift = prompts.prompt_ids.shape[1] - prompts.prompt_mask.sum(1, keepdim=True)
    index = (torch.arange(prompts.prompt_ids.shape[1], device=shift.device) - shift) % prompts.prompt_ids.shape[1]
    return prompts.prompt_ids.gather(1, index), prompts.prompt_mask.gather(1, index)


# Attention of several tokens a row without a copy of keys and values for each head that shares them


def _grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *, scaling: float | None = None, **rest: Any
) -> tuple[Tensor, None]:
    """Attention (B, heads, T, D) over (B, heads that are shared, columns, D): heads that share keys are further queries of one head."""
    odd = [name for name in ("softcap", "s_aux", "position_bias") if rest.get(name) is not None]
    if odd:
        raise ValueError(f"attention with {', '.join(odd)}")
    batch, heads, tokens, size = query.shape
    shared = key.shape[1]
    query = query.reshape(batch, shared, heads // shared * tokens, size)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask.repeat(1, 1, heads // shared, 1), scale=scaling)
    return out.reshape(batch, heads, tokens, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, _grouped_attention)


@contextmanager
def grouped_attention(lm: nn.Module) -> Iterator[None]:
    """Within it a model with PyTorch's attention, or ours over trees, takes the one above."""
    config, before = lm.config, lm.config._attn_implementation
    if before in ("sdpa", TREES):
        config._attn_implementation = GROUPED
    try:
        yield
    finally:
        config._attn_implementation = before


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast casts to on this kind of device; None where it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


@contextmanager
def weights_cast_once(network: nn.Module) -> Iterator[None]:
    """Under autocast, keeps each weight's low-precision copy within it: Lightning's precision plugins cast them at every forward pass."""
    device = next(network.parameters()).device.type
    dtype = autocast_dtype(device)
    if dtype is None:
        yield
        return
    frozen = [] if is_sharded(network) else [p for p in network.parameters() if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)  # autocast keeps copies of leaves with gradients only
        with torch.autocast(device, dtype=dtype, cache_enabled=True):
            yield
    finally:
        torch.clear_autocast_cache()
        for p in frozen:
            p.requires_grad_(False)


# Which policies let responses share a row, and capturing a step


@torch.no_grad()
def can_share_rows(policy: CausalPolicy) -> bool:
    """Whether several responses can share a row of the cache: tried once, on random tokens, against a row for each response."""
    if policy.shares_rows is None:
        policy.shares_rows = policy.form != "plain" and policy.window is None and _sharing_agrees(policy)
    return policy.shares_rows


def _sharing_agrees(policy: CausalPolicy) -> bool:
    layers = DynamicCache(config=policy.lm.config).layers
    if not all(type(layer) is DynamicLayer for layer in layers):
        return False
    was_training, weight = policy.training, next(policy.parameters())
    policy.eval()
    draw = torch.Generator().manual_seed(0)
    vocabulary = min(policy.lm.get_input_embeddings().weight.shape[0], 1000)
    lengths = [12, 7, 3]
    prompts = Batch.of([torch.randint(vocabulary, (n,), generator=draw).tolist() for n in lengths]).to(weight.device)
    tokens = torch.randint(vocabulary, (3, 6), generator=draw).to(weight.device)
    found = []
    try:
        with torch.autocast(weight.device.type, enabled=False):
            for shared in (False, True):
                decoder = Decoder(policy, prompts, lengths, 2, len(tokens), shared=shared)
                found.append(torch.stack([(decoder.step(row), decoder.moved())[0] for row in tokens]).float())
        difference = float((found[1] - found[0]).abs().max() / found[0].abs().max())
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        difference = float("inf")
        rank_zero_info(f"decoding responses side by side with {policy.lm.config.model_type} failed: {error}")
    finally:
        policy.train(was_training)
    exact = weight.dtype == torch.float32 and not is_sharded(policy)
    if difference <= (2e-3 if exact else 5e-2):
        return True
    rank_zero_warn(
        f"{policy.lm.config.model_type}: responses that share a row of the cache differ from responses with a row each (by "
        f"{difference:.1g} of the largest logit); sampling gives each its row: the same numbers, more memory, no captured steps on a GPU"
    )
    return False


def replayed(step: Callable[[], None]) -> Callable[[], None]:
    """`step` for CUDA: its first call runs it, the second captures it as a graph and replays that, as all later calls do.

    What step reads and writes must lie in the same tensors each time. Where capturing fails, a warning says so, and steps run as they are.
    """
    calls, graph = 0, None  # type: tuple[int, torch.cuda.CUDAGraph | None]

    def call() -> None:
        nonlocal calls, graph
        calls += 1
        if calls == 1:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step()
            torch.cuda.current_stream().wait_stream(side)
            return
        if calls == 2:
            graph = _capture(step)
        step() if graph is None else graph.replay()

    return call


def _capture(step: Callable[[], None]) -> "torch.cuda.CUDAGraph | None":
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    except RuntimeError as error:
        rank_zero_warn(f"a decoding step could not be captured as a CUDA graph and runs without one, more slowly: {error}")
        return None
    return graph
