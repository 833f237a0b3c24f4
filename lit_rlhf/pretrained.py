"""Hugging Face directories and hub names: tokenizers with a pad token of their own, weights, adapters, exports."""

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as hf_logging

from lit_rlhf.directories import (
    check_architecture,
    check_loaded,
    check_remote_code,
    check_source,
    check_tokenizer_files,
    check_weight_files,
    explained,
    load_config,
)
from lit_rlhf.sharding import plain_name, whole, whole_state


def load_tokenizer(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Tokenizer:
    """Loads a tokenizer whose pad token is never its EOS: an unused special token is taken, else `<|pad|>` is added.

    Raises ValueError where it cannot be read, brings code along that is not trusted, or has no EOS token, since no response could end.
    """
    check_remote_code(check_source(path), "tokenizer", revision, trust_remote_code)
    check_tokenizer_files(path)
    with explained(path, "its tokenizer", revision):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        tokenizer("a")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path} has no EOS token, so no response could end; set tokenizer.eos_token and save it there")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        unused = _unused_special(tokenizer)
        if unused is None:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        else:
            tokenizer.pad_token = unused
    tokenizer.padding_side = "right"
    return tokenizer


def _unused_special(tokenizer: Tokenizer) -> str | None:
    """A special token with no job: not EOS, BOS, mask or the like, and not part of the chat template; names with "pad" go first."""
    taken = {getattr(tokenizer, f"{role}_token", None) for role in ("bos", "eos", "cls", "sep", "mask")}
    byte_level = "ByteLevel" in str(getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", ""))
    if not byte_level:
        taken.add(tokenizer.unk_token)
    free = [t.content for _, t in sorted(tokenizer.added_tokens_decoder.items()) if t.special and t.content not in taken]
    free = [t for t in free if t not in (tokenizer.chat_template or "")]
    return next((t for t in free if "pad" in t.lower()), free[0] if free else None)


def load_model(
    auto: Any,
    path: str,
    tokenizer: Tokenizer,
    *,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dropout: bool = False,
    frozen_layers: int = 0,
    activation_checkpointing: bool = False,
    head: str = "saved",
) -> PreTrainedModel:
    """Loads weights in `dtype` (safetensors only), checks that none is missing, and makes room for an added pad token.

    Raises ValueError for a model of another kind, missing or broken weights, or a tokenizer whose ids exceed the model's table.
    """
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    config, scalar = load_config(path, **source), auto is AutoModelForSequenceClassification
    check_architecture(config, path, scalar)
    check_weight_files(path)
    if scalar:
        config.num_labels = 1
    fits = tokenizer.pad_token_id < (getattr(config, "vocab_size", None) or 0)
    config.pad_token_id = tokenizer.pad_token_id if fits else None  # embeddings with a padding_idx refuse one outside their table
    options = source | ({} if attn_implementation is None else {"attn_implementation": attn_implementation})
    model, info = _read(auto, path, config=config, dtype=dtype_of(dtype), **options)
    check_loaded(model, path, info)
    _check_missing(model, path, list(info["missing_keys"]), head if scalar else "saved")
    if not dropout:
        disable_dropout(model)
    freeze(model, frozen_layers)
    if activation_checkpointing:
        checkpoint_activations(model)
    _fit_table(model, path, tokenizer)
    return model


def dtype_of(name: str) -> torch.dtype:
    """The floating point type of that name."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {name!r}, which is no floating point type of torch; give float32, bfloat16 or float16")
    return found


def _fit_table(model: PreTrainedModel, path: str, tokenizer: Tokenizer) -> None:
    """Makes room for a pad token that was added behind the model's table; refuses a tokenizer with other ids beyond it."""
    rows, top = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values())
    if top == tokenizer.pad_token_id == rows:
        model.resize_token_embeddings(rows + 1, mean_resizing=False)
        model.config.pad_token_id = tokenizer.pad_token_id
    elif top >= rows:
        raise ValueError(
            f"the tokenizer of {path} has ids up to {top}, the model's table has {rows} rows; they do not belong together: give the model "
            "with its own tokenizer"
        )


def _read(auto: Any, path: str, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """from_pretrained, from safetensors, without its report of missing weights: we give the verdict on them and on their shapes."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    checked: Any = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with explained(path, "its weights", options.get("revision")):
            return auto.from_pretrained(path, **checked, **options)
    finally:
        hf_logging.set_verbosity(verbosity)


def _check_missing(model: PreTrainedModel, path: str, missing: list[str], head: str) -> None:
    """Accepts a missing scalar head only where one may be made, and makes it."""
    other = [key for key in missing if not key.startswith("score.")]
    if other:
        keys = f"{', '.join(other[:3])}{'…' if len(other) > 3 else ''}"
        raise ValueError(f"{path} lacks weights of {type(model).__name__}: {keys}; copy or export the directory again")
    if missing and head == "saved":
        raise ValueError(f"{path} has no reward head ({missing[0]} is missing): it is a language model; train it with PairwiseReward first")
    if missing:
        linear = scalar_head(model)
        std = 0.0 if head == "zero" else (linear.in_features + 1) ** -0.5
        nn.init.normal_(linear.weight, std=std) if std else nn.init.zeros_(linear.weight)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)


def scalar_head(model: PreTrainedModel) -> nn.Linear:
    """The one-label head of a sequence classifier, called `score` in every decoder family of transformers."""
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise ValueError(f"{type(model).__name__} has no linear `score` head; this family cannot be a reward or value network")
    return model.score


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout rate in the live modules to 0, leaving the config as it is; a ratio of 1 at the first minibatch needs it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def freeze(model: PreTrainedModel, layers: int) -> None:
    """Stops the lowest `layers` blocks and all of the embeddings (a tied head is one of them) from training; 0 freezes nothing.

    trlX freezes the bottom 70% of a reward model this way, and all but 8 layers of a policy; it leaves the embeddings trainable.
    """
    if layers == 0:
        return
    stack = _blocks(model)
    if not 0 < layers <= len(stack):
        most = model.config.num_hidden_layers
        raise ValueError(f"frozen_layers is {layers}, the model has {most} blocks; give at most {most}")
    for module in (model.get_input_embeddings(), *stack[:layers]):
        module.requires_grad_(False)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Makes each block keep its input alone for backward, which computes the rest again (Chen et al. 2016): the same numbers.

    Only where gradients are on: transformers' own switch goes by training mode, in which PPO samples, and then drops the cache.
    Raises ValueError where the model has no stack of blocks.
    """
    stack = _blocks(model)
    if not stack:
        raise ValueError(f"activation_checkpointing: {type(model).__name__} has no stack of blocks to recompute; leave it out")
    for block in stack:
        block.forward = _recomputed(block.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return recomputed


def _blocks(model: PreTrainedModel) -> nn.ModuleList | tuple[()]:
    """The decoder's blocks, lowest first; () where it has no such stack."""
    stacks = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == model.config.num_hidden_layers]
    return stacks[0] if stacks else ()


def context_length_of(path: str, **source: Any) -> int | None:
    """`context_length` of a directory or hub name, from its config alone."""
    return context_length(load_config(path, **source))


def context_length(config: Any) -> int | None:
    """How many tokens a path may have, or None where the config does not say."""
    return next((n for key in ("max_position_embeddings", "n_positions", "max_seq_len") if (n := getattr(config, key, None))), None)


def save_model(model: PreTrainedModel, tokenizer: Tokenizer, directory: str | Path, weights: dict[str, Tensor]) -> None:
    """Writes weights, config, generation config and tokenizer as one plain Hugging Face directory."""
    weights = dict(weights)
    with torch.device("meta"):
        shell = type(model)(model.config)
    shell.generation_config = model.generation_config if model.can_generate() else None
    for config in filter(None, (shell.config, shell.generation_config)):
        config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    if shell.config.tie_word_embeddings:
        for key in getattr(model, "_tied_weights_keys", None) or ():
            weights.pop(key, None)
    shell.save_pretrained(directory, state_dict=weights)
    tokenizer.save_pretrained(directory)
    for file in Path(directory).iterdir():
        file.chmod(0o644)


def push(network: Any, repo_id: str, private: bool | None, commit_message: str) -> str:
    """Saves a network to a temporary directory and uploads that as one commit."""
    with tempfile.TemporaryDirectory() as directory:
        network.save(directory)
        api = huggingface_hub.HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=directory, commit_message=commit_message))


# LoRA, through transformers' own peft integration


def add_adapter(model: PreTrainedModel, peft: Any) -> None:
    """Puts a peft adapter (e.g. peft.LoraConfig) on the model in place, never on a scalar head; only the adapter's weights train.

    Raises ValueError for what an export could not add into the layers' weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name in ("use_dora", "modules_to_save", "trainable_token_indices"):
        if getattr(peft, name, None):
            raise ValueError(f"peft: {name} cannot be merged into an exported directory; leave it out and use plain LoRA")
    peft = copy.deepcopy(peft)  # peft writes what "all-linear" means for this model into it
    if isinstance(getattr(model, "score", None), nn.Linear) and not isinstance(getattr(peft, "exclude_modules", None), str):
        peft.exclude_modules = {*(getattr(peft, "exclude_modules", None) or ()), "score"}
    model.add_adapter(peft)
    if not all(hasattr(module, "get_delta_weight") for module in model.modules() if isinstance(module, BaseTunerLayer)):
        raise ValueError(f"peft: a {type(peft).__name__} cannot be merged into an exported directory; use peft.LoraConfig")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rank_zero_info(f"adapter: {trainable:,} of {sum(p.numel() for p in model.parameters()):,} weights train")


def has_adapter(model: PreTrainedModel) -> bool:
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def merged_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict with every adapter added into its layer's weight, under the plain model's keys."""
    state = whole_state(model)
    if not has_adapter(model):
        return state
    layers = {plain_name(name): module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    plain = {k.replace(".base_layer.", "."): v for k, v in state.items() if ".lora_" not in k}
    for name, layer in layers.items():
        weight = plain[f"{name}.weight"]
        plain[f"{name}.weight"] = weight + whole(layer.get_delta_weight(layer.active_adapters[0]).detach()).to(weight.dtype)
    return plain
