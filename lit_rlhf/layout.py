"""Packs a Batch into rows of tokens and reads states back out: the only file that knows about packing.

    row:        [ prompt 1 | resp 1a | resp 1b ] [ prompt 2 | resp 2a | resp 2b ]
    segment:      0 0 0 0    0 0       0 0 0       1 1 1      1 1       1 1
    branch:       0 0 0 0    1 1       2 2 2       0 0 0      1 1       2 2
    position:     0 1 2 3    4 5       4 5 6       0 1 2      3 4       3 4

Token i may attend to token j when `segment_i == segment_j and j <= i and (branch_j == 0 or branch_j == branch_i)`. A prompt is stored
and computed once, its responses branch off from it, and positions restart per path.

Three forms of rows, the first that a network can take (networks.check_layout tries them):
    "trees"   one row without padding, attention tree by tree (attention.py)
    "rows"    several rows, as long as the longest tree, trees put together first-fit, with a boolean mask
    "plain"   one prompt + response a row, padded on the right: for ALiBi, sliding windows, state-space layers
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_rlhf.attention import Trees
from lit_rlhf.batch import Batch

Form = Literal["trees", "rows", "plain"]


@dataclass
class Layout:
    """Rows of tokens ready for a Hugging Face decoder, and where each state lies in them."""

    input_ids: Tensor
    """(B, T) int64; padding is id 0 and lies on the right."""
    position_ids: Tensor
    """(B, T) int64."""
    attention_mask: Tensor
    """Trees: their marker (attention.py). Rows: (B, 1, T, T) bool, True = may attend. Plain: (B, T) int64, 1 = real."""
    state_index: Tensor
    """(N, R + 1) int64 into the B * T tokens: column t is the token after which t response tokens have been seen (clamped to the last)."""
    prompt_index: Tensor
    """(M, P) int64 into the B * T tokens (clamped to the prompt's last)."""

    def states(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, T, H) -> states (N, R + 1, H)."""
        return hidden.flatten(0, 1)[self.state_index]


def pack(batch: Batch, form: Form = "trees") -> Layout:
    """Lays the batch out in rows of the given form. A prompt without responses is a tree of its own."""
    prompts = batch.prompt_mask.sum(1).tolist()
    lengths = batch.response_mask.sum(1).tolist()
    owner = batch.prompt_of.tolist()
    children: list[list[int]] = [[] for _ in prompts]
    for n, m in enumerate(owner):
        children[m].append(n)
    trees = [(m, c) for m, c in enumerate(children)]
    if form == "plain":
        trees = [(m, [n]) for m, c in trees for n in c] + [(m, []) for m, c in trees if not c]
    sizes = [prompts[m] + sum(lengths[n] for n in c) for m, c in trees]
    if form == "trees":
        return _lay_out(batch, [trees], prompts, lengths, sum(sizes), form)
    rows = _first_fit(sizes, max(sizes)) if form == "rows" else [[i] for i in range(len(trees))]
    return _lay_out(batch, [[trees[i] for i in row] for row in rows], prompts, lengths, max(sizes), form)


def _first_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing bin packing of tree sizes into rows of `capacity` tokens."""
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        k = next((k for k, room in enumerate(free) if room >= sizes[i]), None)
        if k is None:
            rows.append([])
            free.append(capacity)
            k = len(rows) - 1
        rows[k].append(i)
        free[k] -= sizes[i]
    return rows


def _lay_out(
    batch: Batch, rows: list[list[tuple[int, list[int]]]], prompts: list[int], lengths: list[int], width: int, form: Form
) -> Layout:
    """Writes the trees of each row one after the other; index tensors are built on the CPU and moved once."""
    shape = (len(rows), width)
    source, position = torch.full(shape, -1), torch.zeros(shape, dtype=torch.long)
    segment, branch = torch.full(shape, -1), torch.zeros(shape, dtype=torch.long)
    num_prompts, prompt_width = batch.prompt_ids.shape
    num_responses, response_width = batch.response_ids.shape
    prompt_start, response_start = torch.zeros(num_prompts, dtype=torch.long), torch.zeros(num_responses, dtype=torch.long)
    prompt_end = torch.zeros(num_responses, dtype=torch.long)
    for b, row in enumerate(rows):
        at = 0
        for s, (m, children) in enumerate(row):
            p = prompts[m]
            prompt_start[m] = b * width + at
            _fill(source, position, branch, b, at, p, m * prompt_width, 0, 0)
            segment[b, at : at + p + sum(lengths[n] for n in children)] = s
            at += p
            for k, n in enumerate(children):
                prompt_end[n], response_start[n] = prompt_start[m] + p - 1, b * width + at
                _fill(source, position, branch, b, at, lengths[n], num_prompts * prompt_width + n * response_width, p, k + 1)
                at += lengths[n]
    steps = torch.arange(response_width)
    last = torch.tensor(lengths, dtype=torch.long)[:, None] - 1
    state_index = torch.cat([prompt_end[:, None], response_start[:, None] + torch.minimum(steps, last.clamp(min=0))], dim=1)
    state_index = torch.where(
        torch.cat([torch.ones_like(last).bool(), (last >= 0).expand(-1, response_width)], 1), state_index, prompt_end[:, None]
    )
    ends = torch.tensor(prompts, dtype=torch.long)[:, None] - 1
    prompt_index = prompt_start[:, None] + torch.minimum(torch.arange(prompt_width), ends)
    device = batch.prompt_ids.device
    tokens = torch.cat([batch.prompt_ids.flatten(), batch.response_ids.flatten()])
    real = (source >= 0).to(device)
    input_ids = torch.where(real, tokens[source.clamp(min=0).to(device)], 0)
    mask = real.long() if form == "plain" else _mask(segment.to(device), branch.to(device), form)
    return Layout(input_ids, position.to(device), mask, state_index.to(device), prompt_index.to(device))


def _mask(segment: Tensor, branch: Tensor, form: Form) -> Tensor:
    """What the model is given as attention mask: (B, 1, T, T), or the one row's trees."""
    if form == "rows":
        return attention_rule(segment, branch)
    return trees_of(segment[0], branch[0]).marker()


def trees_of(segment: Tensor, branch: Tensor) -> Trees:
    """The trees of one row, from the tree number (T,) and branch number (T,) of each token."""
    sizes = segment.unique_consecutive(return_counts=True)[1].tolist()
    masks = [attention_rule(torch.zeros_like(b)[None], b[None])[0, 0] if (b > 1).any() else None for b in branch.split(sizes)]
    return Trees(segment, branch, sizes, masks)


def _fill(source: Tensor, position: Tensor, branch: Tensor, b: int, at: int, length: int, start: int, first: int, k: int) -> None:
    """Writes one run of `length` tokens: where its ids come from, its positions from `first` on, its branch number."""
    source[b, at : at + length] = torch.arange(start, start + length)
    position[b, at : at + length] = torch.arange(first, first + length)
    branch[b, at : at + length] = k


def attention_rule(segment: Tensor, branch: Tensor) -> Tensor:
    """The mask (B, 1, T, T) bool of the rule above; a padding token (segment -1) attends to padding only, so that no row is empty."""
    same = segment[:, :, None] == segment[:, None, :]
    reach = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    causal = torch.ones(segment.shape[1], segment.shape[1], dtype=torch.bool, device=segment.device).tril()
    return (same & reach & causal)[:, None]
