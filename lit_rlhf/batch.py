"""The one batch type: M prompts and N responses, and each response belongs to a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


def pad_ids(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-pads lists of ids with 0 into ids (n, max length) int64 and their mask (n, max length) bool."""
    width = max((len(row) for row in rows), default=0)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.as_tensor(row, dtype=torch.long)
        mask[i, : len(row)] = True
    return ids, mask


@dataclass
class Batch:
    """M prompts and the N responses that belong to them; masks are bool, True = counts, and travel with their ids.

    A prompt has at least one token (generation from nothing has BOS as its prompt); padding is on the right and may lie
    anywhere in the vocabulary, since only masks say what counts.
    """

    prompt_ids: Tensor
    """(M, P) int64."""
    prompt_mask: Tensor
    """(M, P) bool."""
    response_ids: Tensor
    """(N, R) int64, EOS included where the response has one."""
    response_mask: Tensor
    """(N, R) bool, True through the first EOS."""
    prompt_of: Tensor
    """(N,) int64, which prompt a response belongs to."""
    prompt_loss_mask: Tensor | None = None
    """(M, P) bool, prompt tokens whose log-probability counts in the language-model loss; never position 0."""
    pairs: Tensor | None = None
    """(Q, 2) int64, rows of responses: the preferred one, the other one."""
    margin: Tensor | None = None
    """(Q,) float32, by how many score units the preferred one should lead."""
    target: Tensor | None = None
    """(Q,) float32, probability that the first of the pair is preferred: 1 certain, 0.5 a tie."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """The data set's columns, one entry per prompt; always "prompt" (text), and "reference" (text) where it is known."""
    rows: list[int] | None = None
    """(M) the prompts' row numbers in the data set, which sampling noise depends on; None: 0..M-1."""
    count: float | None = None
    """The loss divisor: tokens (SFT), pairs or prompts (reward) of the whole optimiser step, over all micro-batches and ranks."""

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]] = (), prompt_of: Sequence[int] | None = None, **rest: Any
    ) -> "Batch":
        """Builds a batch from lists of token ids; `prompt_of` defaults to one response per prompt.

        Raises ValueError for an empty prompt, an empty response or a `prompt_of` that names no prompt.
        """
        for name, rows in (("prompt", prompts), ("response", responses)):
            empty = [i for i, row in enumerate(rows) if len(row) == 0]
            if empty:
                raise ValueError(f"{name} {empty[0]} has no tokens; every {name} needs at least one (BOS or EOS)")
        owner = list(range(len(responses))) if prompt_of is None else list(prompt_of)
        if len(owner) != len(responses) or any(not 0 <= m < len(prompts) for m in owner):
            raise ValueError(
                f"prompt_of must name one of the {len(prompts)} prompts for each of the {len(responses)} responses, got {owner}"
            )
        prompt_ids, prompt_mask = pad_ids(prompts)
        response_ids, response_mask = pad_ids(responses)
        return cls(prompt_ids, prompt_mask, response_ids, response_mask, torch.tensor(owner, dtype=torch.long), **rest)

    @property
    def num_prompts(self) -> int:
        return self.prompt_ids.shape[0]

    @property
    def num_responses(self) -> int:
        return self.response_ids.shape[0]

    def to(self, device: torch.device | str, **kwargs: Any) -> "Batch":
        """Moves every tensor to `device`; Lightning calls it for each batch."""
        moved: dict[str, Any] = {f.name: v.to(device, **kwargs) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **moved)

    def column(self, name: str) -> list[Any]:
        """A column's entries, one per response instead of one per prompt."""
        return [self.columns[name][m] for m in self.prompt_of.tolist()]

    def select_prompts(self, prompts: Sequence[int] | Tensor) -> "Batch":
        """The batch of these prompts alone, without responses."""
        index = torch.as_tensor(prompts, dtype=torch.long, device=self.prompt_ids.device)
        empty = self.response_ids.new_zeros(0, 0)
        return Batch(
            *trim(self.prompt_ids[index], self.prompt_mask[index]),
            empty,
            empty.bool(),
            empty.new_zeros(0),
            columns={name: [values[i] for i in index.tolist()] for name, values in self.columns.items()},
            rows=None if self.rows is None else [self.rows[i] for i in index.tolist()],
        )

    def select(self, rows: Sequence[int] | Tensor) -> "Batch":
        """The batch of these response rows and the prompts they belong to, in the given order; pairs and count do not survive."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.response_ids.device)
        prompts, prompt_of = torch.unique(self.prompt_of[index], return_inverse=True)
        response_ids, response_mask = trim(self.response_ids[index], self.response_mask[index])
        kept = self.select_prompts(prompts)
        return replace(kept, response_ids=response_ids, response_mask=response_mask, prompt_of=prompt_of)

    def state(self) -> dict[str, Any]:
        """Tensors and plain data alone, so that a checkpoint loads with `weights_only=True`; `Batch(**state)` is the inverse."""
        return {f.name: getattr(self, f.name) for f in fields(Batch)}

    def with_responses(self, ids: Tensor, mask: Tensor, prompt_of: Tensor) -> "Batch":
        """The same prompts with these responses."""
        return replace(self, response_ids=ids, response_mask=mask, prompt_of=prompt_of, pairs=None, margin=None, target=None, count=None)


def trim(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Cuts the columns on the right that no row counts."""
    width = int(mask.any(0).nonzero().max()) + 1 if mask.any() else 0
    return ids[:, :width], mask[:, :width]


def pad_cat(tensors: Sequence[Tensor]) -> Tensor:
    """Joins (n_i, ...) tensors into (sum n_i, ...), matrices padded with zeros on the right to the widest."""
    if tensors[0].dim() == 1:
        return torch.cat(list(tensors))
    width = max(x.shape[1] for x in tensors)
    return torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in tensors])


def join(batches: Sequence[Batch]) -> Batch:
    """One batch of all the prompts and responses, in order; pairs, loss masks and counts do not survive."""
    starts = [sum(b.num_prompts for b in batches[:i]) for i in range(len(batches))]
    names = ("prompt_ids", "prompt_mask", "response_ids", "response_mask")
    tensors: dict[str, Any] = {name: pad_cat([getattr(b, name) for b in batches]) for name in names}
    return Batch(
        **tensors,
        prompt_of=torch.cat([b.prompt_of + start for b, start in zip(batches, starts, strict=True)]),
        columns={name: [v for b in batches for v in b.columns[name]] for name in batches[0].columns},
    )


@dataclass
class Experience:
    """What one PPO iteration learns from; floats are float32 and zero outside `batch.response_mask`."""

    batch: Batch
    logprobs: Tensor
    """(N, R) nats, of the sampled token under the policy that sampled it, at the sampling temperature."""
    ref_logprobs: Tensor
    """(N, R) nats, under the frozen reference, at the same temperature."""
    values: Tensor
    """(N, R), V before token t is chosen."""
    scores: Tensor
    """(N,), one per response, what the reward was made of (after baseline, clipping, scaling, and the no-EOS rule)."""
    rewards: Tensor
    """(N, R), the KL penalty per token plus the score on the last real token."""
    advantages: Tensor
    """(N, R), GAE, whitened if asked."""
    returns: Tensor
    """(N, R), unwhitened advantages + values."""

    def select(self, rows: Sequence[int] | Tensor) -> "Experience":
        """These response rows, cut to their longest response."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.logprobs.device)
        batch = self.batch.select(index)
        width = batch.response_ids.shape[1]
        picked = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "batch"}
        return Experience(batch, **{name: x[:, :width] if x.dim() == 2 else x for name, x in picked.items()})

    def state(self) -> dict[str, Any]:
        """Tensors and plain data alone, so that a checkpoint loads with `weights_only=True`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "batch"} | {"batch": self.batch.state()}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> "Experience":
        """The inverse of `state`."""
        return cls(**state | {"batch": Batch(**state["batch"])})

    def to(self, device: torch.device | str) -> "Experience":
        return Experience(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})
