"""CausalPolicy and ScalarModel: two thin modules whose forward is the only door to a Hugging Face backbone.

Both take a `Batch`, lay it out (layout.py), run the decoder once and give back what belongs to response tokens. Under FSDP a head works
only inside its network's forward, so what leaves a network are log-probs, values and scores, never states.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.attention import TREES
from lit_rlhf.batch import Batch, pad_cat
from lit_rlhf.functional import last_index, token_logprobs
from lit_rlhf.layout import Form, Layout, pack
from lit_rlhf.perf import Tally
from lit_rlhf.pretrained import (
    add_adapter,
    context_length,
    has_adapter,
    load_model,
    load_tokenizer,
    merged_state_dict,
    push,
    save_model,
    scalar_head,
)
from lit_rlhf.sharding import most


class CausalPolicy(nn.Module):
    """A causal language model that gives the log-probabilities of a batch's tokens.

    Args:
        lm: a Hugging Face causal decoder.
        tokenizer: its tokenizer, with pad != EOS (`load_tokenizer`).
    """

    def __init__(self, lm: PreTrainedModel, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.lm = lm
        self.tokenizer = tokenizer
        self.window = attention_window(lm.config)
        self.own_logits = False
        self.form: Form = "rows"
        self.tally: Tally | None = None
        self.shares_rows: bool | None = None
        """Whether a prompt's responses can share a row of the cache (`decoding.can_share_rows`); None: not tried yet."""
        rows = lm.get_output_embeddings().weight.shape[0]
        banned = torch.ones(rows, dtype=torch.bool)
        banned[torch.tensor(sorted(set(tokenizer.get_vocab().values())))] = False
        banned[tokenizer.pad_token_id] = True
        self.register_buffer("banned", banned, persistent=False)

    @classmethod
    def load(
        cls, path: str, *, tokenizer: Tokenizer | None = None, peft: Any = None, dropout: bool = False, **loading: Any
    ) -> "CausalPolicy":
        """Loads `path` with `loading` as in `load_model`, checks packing, and puts LoRA on it where `peft` is given."""
        tokenizer = tokenizer or load_tokenizer(
            path, revision=loading.get("revision"), trust_remote_code=loading.get("trust_remote_code", False)
        )
        lm = load_model(AutoModelForCausalLM, path, tokenizer, dropout=dropout, **loading)
        net = cls(lm, tokenizer)
        check_layout(net, trees=loading.get("attn_implementation") is None)
        if peft is not None:
            add_adapter(lm, peft)
        return net

    @property
    def context_length(self) -> int | None:
        return context_length(self.lm.config)

    def forward(self, batch: Batch, *, temperature: float = 1.0, ban: bool = False, adapter: bool = True) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of the response tokens, and of prompt tokens where `batch.prompt_loss_mask` asks for them.

        Args:
            temperature: divides the logits.
            ban: gives the pad token, and ids that no token has, probability 0, as sampling does.
            adapter: False runs the network with its LoRA adapter off (the reference).

        Returns:
            logprobs (N, R) and prompt_logprobs (M, P) or None; nats, float32, 0 outside their masks.
        """
        layout = lay_out(self, batch)
        hidden, head = self._hidden(layout, adapter)
        flat, setting = hidden.flatten(0, 1), {"temperature": temperature, "banned": self.banned if ban else None}
        mask = batch.response_mask
        found = token_logprobs(flat[layout.state_index[:, :-1][mask]], batch.response_ids[mask], head, **setting)
        logprobs = found.new_zeros(mask.shape).masked_scatter(mask, found)
        if batch.prompt_loss_mask is None:
            return logprobs, None
        mask = batch.prompt_loss_mask
        found = token_logprobs(flat[layout.prompt_index[:, :-1][mask[:, 1:]]], batch.prompt_ids[mask], head, **setting)
        return logprobs, found.new_zeros(mask.shape).masked_scatter(mask, found)

    def step(self, ids: Tensor, mask: Tensor, position_ids: Tensor, cache: Any, last: int = 1) -> Tensor:
        """One decoding step: logits (B * last, V) after each of the last of ids (B, T), in the head's precision, given the cache.

        The mask is (B, past + T), or (B, 1, T, past + T) bool, True = may attend.
        """
        mask = mask if mask.dim() == 4 else mask.long()
        rows = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids, "past_key_values": cache, "use_cache": True}
        if self.own_logits:
            logits = self.lm(**accepted(self.lm, rows | {"logits_to_keep": last})).logits[:, -last:]
        else:
            hidden = self.lm.base_model(**accepted(self.lm.base_model, rows)).last_hidden_state[:, -last:]
            logits = self.lm.get_output_embeddings()(hidden)
        return logits.flatten(0, 1)

    def form_for(self, batch: Batch) -> Form:
        """The rows that this batch takes: plain where a path is longer than the family's attention window."""
        return self.form if fits_window(batch, self.window) else "plain"

    def weights(self) -> dict[str, Tensor]:
        """The whole weights under the plain model's keys, adapters merged; where the network is sharded, all ranks must call it."""
        return merged_state_dict(self.lm)

    def save(self, directory: str | Path, weights: dict[str, Tensor] | None = None) -> None:
        """Writes a plain Hugging Face directory (safetensors, config, generation config, tokenizer) of `weights()`."""
        save_model(self.lm, self.tokenizer, directory, self.weights() if weights is None else weights)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, commit_message: str = "Upload from lit_rlhf") -> str:
        """Uploads the directory that `save` writes to a Hugging Face repository, made where it is missing; returns the commit's address."""
        return push(self, repo_id, private, commit_message)

    def _hidden(self, layout: Layout, adapter: bool = True) -> tuple[Tensor, Any]:
        """Final hidden states (B, T, H) and their head; where logits are changed after the head, the logits and the identity."""
        toggle = not adapter and has_adapter(self.lm)
        if toggle:
            self.lm.disable_adapters()
        try:
            if self.own_logits:
                return run(self.lm, layout).logits, nn.Identity()
            return run(self.lm.base_model, layout).last_hidden_state, self.lm.get_output_embeddings()
        finally:
            if toggle:
                self.lm.enable_adapters()


class ScalarModel(nn.Module):
    """A decoder with a scalar head on every state: a reward model (its score is the last state's) or a value network.

    Args:
        model: a Hugging Face sequence classifier with one label.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.window = attention_window(model.config)
        self.form: Form = "rows"
        self.tally: Tally | None = None
        self.register_buffer("mean", torch.tensor(float(getattr(model.config, "reward_mean", None) or 0.0), dtype=torch.float32))

    @classmethod
    def load(
        cls,
        path: str,
        *,
        head: Literal["saved", "new", "zero"] = "saved",
        tokenizer: Tokenizer | None = None,
        peft: Any = None,
        **loading: Any,
    ) -> "ScalarModel":
        """Loads `path` (a directory or hub name).

        Args:
            head: "saved" requires the directory's own head; "new" draws one with std 1/sqrt(H + 1) (Stiennon et al. 2020's code) and
                "zero" sets it to 0, both only where the directory has none.
        """
        tokenizer = tokenizer or load_tokenizer(
            path, revision=loading.get("revision"), trust_remote_code=loading.get("trust_remote_code", False)
        )
        model = load_model(AutoModelForSequenceClassification, path, tokenizer, head=head, **loading)
        net = cls(model, tokenizer)
        check_layout(net, trees=loading.get("attn_implementation") is None)
        if peft is not None:
            add_adapter(model, peft)
            net.head.requires_grad_(True)
        return net

    @property
    def head(self) -> nn.Linear:
        return scalar_head(self.model)

    @property
    def context_length(self) -> int | None:
        return context_length(self.model.config)

    def forward(self, batch: Batch) -> Tensor:
        """One number for every state, (N, R + 1) float32: column t after t response tokens; `reward_mean` is subtracted."""
        return self.scalars(self.states(batch)) - self.mean

    def states(self, batch: Batch) -> Tensor:
        """What the head reads, (N, R + 1, H): column t after t response tokens. Under FSDP only within `forward`."""
        layout = lay_out(self, batch)
        return layout.states(run(self.model.base_model, layout).last_hidden_state)

    def scalars(self, states: Tensor) -> Tensor:
        """The head on states (N, R + 1, H), in float32 whatever the run's precision: bfloat16 would put a score of 6.03 at 6.03125."""
        bias = None if self.head.bias is None else self.head.bias.float()
        with torch.autocast(states.device.type, enabled=False):
            return nn.functional.linear(states.float(), self.head.weight.float(), bias).squeeze(-1)

    def form_for(self, batch: Batch) -> Form:
        return self.form if fits_window(batch, self.window) else "plain"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ScalarModel":
        """Moves and casts the network as any module, but its mean stays float32, as scores are."""
        mean = self.mean
        super()._apply(fn, recurse)
        self.mean = mean.to(self.mean.device)
        return self

    def set_mean(self, mean: float) -> None:
        """Makes `mean` (raw score units) the zero of the scores, here and in the directory that `save` writes."""
        self.mean.fill_(mean)

    def weights(self) -> dict[str, Tensor]:
        """The whole weights under the plain model's keys, adapters merged; where the network is sharded, all ranks must call it."""
        return merged_state_dict(self.model)

    def save(self, directory: str | Path, weights: dict[str, Tensor] | None = None) -> None:
        """Writes a plain Hugging Face directory; `reward_mean` rides in its config, and plain transformers gives the raw score."""
        self.model.config.problem_type, self.model.config.reward_mean = "regression", float(self.mean)
        save_model(self.model, self.tokenizer, directory, self.weights() if weights is None else weights)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, commit_message: str = "Upload from lit_rlhf") -> str:
        """Uploads the directory that `save` writes to a Hugging Face repository, made where it is missing; returns the commit's address."""
        return push(self, repo_id, private, commit_message)


def score_of(scalars: Tensor, response_mask: Tensor) -> Tensor:
    """The score of each response (N,): the scalar (N, R + 1) of its last real token's state."""
    return scalars.gather(1, last_index(response_mask)[:, None] + 1).squeeze(1)


def in_parts(network: nn.Module, batch: Batch, budget: int, forward: Callable[[Batch], Tensor] | None = None) -> Tensor:
    """forward(batch) (default: the network's) -> (N, W), run over consecutive prompts of at most `budget` tokens (or one prompt) at a time.

    Where the network is sharded, every rank runs as many parts as the rank with the most.
    """
    forward = forward or network
    tokens = batch.prompt_mask.sum(1).index_add(0, batch.prompt_of, batch.response_mask.sum(1)).tolist()
    part, total, last = [0] * batch.num_prompts, 0, 0
    for m, n in enumerate(tokens):
        if total and total + n > budget:
            last, total = last + 1, 0
        part[m], total = last, total + n
    of_row = torch.tensor(part, device=batch.prompt_of.device)[batch.prompt_of]
    index = [rows for i in range(last + 1) if len(rows := (of_row == i).nonzero().squeeze(1))]
    turns = most(network, len(index))  # before the first forward, so that the ranks' collectives are the same ones in the same order
    found = [forward(batch if len(index) == 1 else batch.select(rows)) for rows in index]
    for _ in range(turns - len(index)):
        forward(batch.select(index[0]))
    return pad_cat(found)[torch.cat(index).argsort()]


# Running a decoder on a layout, and checking that packing is right for it


def accepted(module: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the module's forward takes by name."""
    names = inspect.signature(module.forward).parameters
    return {k: v for k, v in arguments.items() if k in names}


def lay_out(net: CausalPolicy | ScalarModel, batch: Batch) -> Layout:
    """The batch in the rows that the network takes, entered in its tally."""
    form = net.form_for(batch)
    layout = pack(batch, form)
    if net.tally is not None:
        net.tally.add(batch, layout.input_ids.numel(), shared=form != "plain")
    return layout


def run(module: nn.Module, layout: Layout) -> Any:
    """One forward of a Hugging Face decoder over a layout's rows, without a cache."""
    rows = {"input_ids": layout.input_ids, "attention_mask": layout.attention_mask, "position_ids": layout.position_ids, "use_cache": False}
    return module(**accepted(module, rows))


def attention_window(config: Any) -> int | None:
    """The shortest attention window that the config names, or None: a packed row's mask would drop it."""
    if getattr(config, "use_sliding_window", True) is False:
        return None
    named = [getattr(config, key, None) for key in ("sliding_window", "window_size", "attention_window", "local_attention")]
    windows = [n for n in named if isinstance(n, int) and n > 0]
    return min(windows, default=None)


def fits_window(batch: Batch, window: int | None) -> bool:
    """Whether no prompt + response of the batch is longer than the window."""
    if window is None:
        return True
    paths = batch.prompt_mask.sum(1)[batch.prompt_of] + batch.response_mask.sum(1)
    return int(paths.max()) <= window


@torch.no_grad()
def check_layout(net: CausalPolicy | ScalarModel, trees: bool = True) -> None:
    """Compares packed with plain rows, and our log-probs with the model's own logits, on random tokens; sets `form` and `own_logits`.

    Families that scale or cap their logits after the head use those logits; families for which packing is not exact take plain rows,
    and one warning says so.

    Args:
        trees: may set the attention implementation to ours. Where the user chose one, it stays, and packed rows have a mask.
    """
    model = net.lm if isinstance(net, CausalPolicy) else net.model
    was_training = model.training
    model.eval()
    batch = _random_batch(min(model.get_input_embeddings().weight.shape[0], 1000), net.window).to(next(model.parameters()).device)
    tolerance = 5e-5 if next(model.parameters()).dtype == torch.float32 else 5e-2
    plain = pack(batch, "plain")
    base = run(model.base_model, plain).last_hidden_state
    if isinstance(net, CausalPolicy):
        net.own_logits = _changes_logits(model, plain, base, tolerance)
    states = plain.states(base)
    before = model.config._attn_implementation
    for form in ("trees", "rows") if trees and before == "sdpa" else ("rows",):
        difference = _difference(model, pack(batch, form), states, TREES if form == "trees" else before)
        if difference <= tolerance:
            net.form = form
            break
    else:
        net.form = "plain"
        rank_zero_warn(
            f"{model.config.model_type}: packed rows differ from plain rows (by {difference:.1g} of the largest state), as with ALiBi or "
            "local or eager attention; using plain rows: the same numbers, more computation"
        )
    model.train(was_training)


def _difference(model: PreTrainedModel, layout: Layout, states: Tensor, attention: str) -> float:
    """How far the layout's states are from these, as a share of the largest; infinity where the model cannot take the layout."""
    try:
        if attention != model.config._attn_implementation:
            model.set_attn_implementation(attention)
        return float((layout.states(run(model.base_model, layout).last_hidden_state) - states).abs().max() / states.abs().max())
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        rank_zero_info(f"a packed forward of {model.config.model_type} failed: {error}")
        return float("inf")


def _changes_logits(lm: PreTrainedModel, layout: Layout, hidden: Tensor, tolerance: float) -> bool:
    """Whether the logits are not the head's output; tried on enlarged states, since a soft cap hardly moves a new model's small logits."""
    head, made = lm.get_output_embeddings(), []  # type: tuple[Any, list[Tensor]]
    factor = 30 / head(hidden).abs().max()
    hooks = [
        head.register_forward_pre_hook(lambda _, args: (args[0] * factor,)),
        head.register_forward_hook(lambda *args: made.append(args[2])),
    ]
    try:
        logits = run(lm, layout).logits
    finally:
        for hook in hooks:
            hook.remove()
    return not made or bool((logits.float() - made[0].float()).abs().max() > 30 * tolerance)


def _random_batch(vocabulary: int, window: int | None) -> Batch:
    """Three prompts with 2, 1 and 2 responses of random tokens, no path longer than the window."""
    room = min(window or 40, 40)
    draw = torch.Generator().manual_seed(0)
    tokens = lambda n: torch.randint(vocabulary, (max(n, 1),), generator=draw).tolist()  # noqa: E731
    prompts = [tokens(room // 2), tokens(room // 3), tokens(room // 4)]
    return Batch.of(prompts, [tokens(room // d) for d in (2, 3, 4, 3, 5)], [0, 0, 1, 2, 2])
