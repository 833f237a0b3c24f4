"""QPolicy: a causal policy with Q and V heads on its states (ILQL), which sampling may lean on, and its directory."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_rlhf.batch import Batch
from lit_rlhf.functional import move_towards, token_logprobs
from lit_rlhf.networks import CausalPolicy, lay_out, run
from lit_rlhf.pretrained import push

FILE = "q_values.safetensors"
PREFIX = "q_values."


@dataclass
class QValues:
    """What the heads say of a batch's response tokens; float32, 0 outside the mask (`values` there may hold anything)."""

    logprobs: Tensor
    """(N, R) nats, of the language model."""
    q: Tensor
    """(2, N, R), of the tokens taken."""
    target_q: Tensor
    """(2, N, R), by the target heads, without gradient."""
    q_logprobs: Tensor
    """(2, N, R) nats, log softmax over the vocabulary of each Q head, of the tokens taken."""
    values: Tensor
    """(N, R + 1), V after t response tokens."""


class Head(nn.Module):
    """Linear, ReLU, Linear on a state of size H, twice as wide in between (trlX's `make_head`)."""

    def __init__(self, size: int, outputs: int) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(size, 2 * size), nn.Linear(2 * size, outputs)

    def forward(self, states: Tensor) -> Tensor:
        return linear(self.out, self.features(states))

    def features(self, states: Tensor) -> Tensor:
        """What the last layer multiplies."""
        return linear(self.inner, states).relu()

    def taken(self, features: Tensor, ids: Tensor) -> Tensor:
        """The outputs (T,) named by ids (T,), without the others: a product with T rows of the last layer."""
        return (features * self.out.weight[ids].float()).sum(-1) + self.out.bias[ids].float()


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in float32 whatever the run's precision, as all heads of rewards: bfloat16 would round them to three digits."""
    with torch.autocast(x.device.type, enabled=False):
        return nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float())


class QHeads(nn.Module):
    """Two Q heads over the vocabulary, a target copy of each, and V; Q's target copies are buffers, which no optimiser sees."""

    def __init__(self, size: int, vocabulary: int) -> None:
        super().__init__()
        self.q = nn.ModuleList(Head(size, vocabulary) for _ in range(2))
        self.v = Head(size, 1)
        self.targets = nn.ModuleList(_as_buffers(copy.deepcopy(head)) for head in self.q)

    def follow(self, alpha: float) -> None:
        """Moves the target heads by `alpha` of the way to the Q heads."""
        sources = dict(self.q.named_parameters())
        for name, target in self.targets.named_buffers():
            move_towards(target, sources[name], alpha)

    def advantages(self, states: Tensor) -> Tensor:
        """min of the target Qs - V for every token (..., V) of the vocabulary after states (..., H)."""
        return torch.minimum(*(head(states) for head in self.targets)) - self.v(states)


def _as_buffers(module: nn.Module) -> nn.Module:
    for part in module.modules():
        for name, p in list(part._parameters.items()):
            del part._parameters[name]
            if p is not None:
                part.register_buffer(name, p.detach())
    return module


class GuidedHead(nn.Module):
    """The language model's head with beta * (Q - V) added to its logits; then all but the `top_k` largest are as good as impossible."""

    def __init__(self, head: nn.Module, heads: QHeads, beta: float, top_k: int | None) -> None:
        super().__init__()
        self.head, self.heads, self.beta, self.top_k = head, heads, beta, top_k

    def forward(self, states: Tensor) -> Tensor:
        logits = self.head(states).float() + self.beta * self.heads.advantages(states)
        if self.top_k is None or self.top_k >= logits.shape[-1]:
            return logits
        return logits.masked_fill(logits < logits.topk(self.top_k).values[..., -1:], -1e30)


class QPolicy(nn.Module):
    """A policy and its Q and V heads as one network; `guided` makes the policy sample, and give log-probs, by both.

    Raises ValueError for a family whose logits are changed after its head: there is no one place to add to them.
    """

    def __init__(self, policy: CausalPolicy, heads: QHeads) -> None:
        super().__init__()
        if policy.own_logits:
            raise ValueError(f"{policy.lm.config.model_type} changes its logits after the head, where Q - V cannot be added: give another")
        self.policy, self.heads = policy, heads

    @classmethod
    def load(cls, path: str, **loading: Any) -> "QPolicy":
        """Loads `path` as `CausalPolicy.load` does, with the heads that lie there or else new ones (drawn by torch's own seed)."""
        policy = CausalPolicy.load(path, **loading)
        weight = policy.lm.get_output_embeddings().weight
        heads, file = QHeads(policy.lm.config.hidden_size, weight.shape[0]), Path(path) / FILE
        if file.is_file():
            saved = load_file(file)
            own = {name: tuple(x.shape) for name, x in heads.state_dict().items()}
            if own != {name: tuple(x.shape) for name, x in saved.items()}:
                raise ValueError(f"{file} does not belong to the model beside it (other names or shapes); export the directory again")
            heads.load_state_dict(saved)
        return cls(policy, heads.to(weight.device))

    @property
    def tokenizer(self) -> Any:
        return self.policy.tokenizer

    def forward(self, batch: Batch) -> QValues:
        """Log-probs, Q, target Q, log softmax of Q, and V of the batch's responses."""
        layout, mask, lm = lay_out(self.policy, batch), batch.response_mask, self.policy.lm
        states = layout.states(run(lm.base_model, layout).last_hidden_state)
        at, ids = states[:, :-1][mask], batch.response_ids[mask]
        logprobs = token_logprobs(at, ids, lm.get_output_embeddings())
        features = [head.features(at) for head in self.heads.q]
        q = [head.taken(x, ids) for head, x in zip(self.heads.q, features, strict=True)]
        with torch.no_grad():
            target = [head.taken(head.features(at), ids) for head in self.heads.targets]
        values = self.heads.v(states).squeeze(-1)
        q_logprobs = [token_logprobs(x, ids, head.out) for head, x in zip(self.heads.q, features, strict=True)]

        def spread(found: Tensor) -> Tensor:
            return found.new_zeros(mask.shape).masked_scatter(mask, found)

        q, target, q_logprobs = (torch.stack([spread(x) for x in part]) for part in (q, target, q_logprobs))
        return QValues(spread(logprobs), q, target, q_logprobs, values)

    @contextmanager
    def guided(self, beta: float, top_k: int | None = None) -> Iterator[CausalPolicy]:
        """Within it the policy's logits are log p + beta * (Q - V), its `top_k` largest: what `sample` and log-probs then see."""
        lm = self.policy.lm
        head = lm.get_output_embeddings()
        lm.set_output_embeddings(GuidedHead(head, self.heads, beta, top_k))
        try:
            yield self.policy
        finally:
            lm.set_output_embeddings(head)

    def weights(self) -> dict[str, Tensor]:
        """The language model's whole weights (adapters merged), and the heads' under `q_values.`."""
        return self.policy.weights() | {PREFIX + name: x.detach() for name, x in self.heads.state_dict().items()}

    def save(self, directory: str | Path, weights: dict[str, Tensor] | None = None) -> None:
        """Writes a plain Hugging Face directory of the language model, with the heads in a file of their own beside it."""
        weights = self.weights() if weights is None else weights
        self.policy.save(directory, {name: x for name, x in weights.items() if not name.startswith(PREFIX)})
        heads = {name.removeprefix(PREFIX): x.cpu().contiguous() for name, x in weights.items() if name.startswith(PREFIX)}
        save_file(heads, Path(directory) / FILE)
        (Path(directory) / FILE).chmod(0o644)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, commit_message: str = "Upload from lit_rlhf") -> str:
        """Uploads the directory that `save` writes; see `CausalPolicy.push_to_hub`."""
        return push(self, repo_id, private, commit_message)
