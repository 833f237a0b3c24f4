"""The networks of a Job as shells: built by the classes that train, from config.json alone, with parameters that hold no numbers.

Call these inside of a FakeTensorMode: parameters then have shapes, types and gradients, and no bytes.
"""

import copy
import dataclasses
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_rlhf.attention import TREES
from lit_rlhf.directories import load_config
from lit_rlhf.networks import CausalPolicy, ScalarModel
from lit_rlhf.pretrained import add_adapter, checkpoint_activations, disable_dropout, freeze, load_tokenizer, scalar_head

CHANGES_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")  # families whose logits are changed after the head


@dataclass
class Shells:
    """The networks of a run by role; None where it has none of that role."""

    policy: CausalPolicy | None = None
    reference: CausalPolicy | None = None
    value: ScalarModel | None = None
    reward: ScalarModel | None = None

    def present(self) -> dict[str, nn.Module]:
        return {role: network for role, network in vars(self).items() if network is not None}


@dataclass(frozen=True)
class Source:
    """A model's config and what stands in for its tokenizer."""

    config: Any
    tokenizer: Any


def read_source(path: str, revision: str | None, trust_remote_code: bool) -> Source:
    """The config of a directory (its config.json is enough) or hub name.

    Raises FileNotFoundError or ValueError as `load_config` does.
    """
    config = load_config(path, revision=revision, trust_remote_code=trust_remote_code)
    return Source(config, _tokenizer(path, config, revision, trust_remote_code))


def _tokenizer(path: str, config: Any, revision: str | None, trust_remote_code: bool) -> Any:
    """The directory's tokenizer, whose added pad token may add a row to the embeddings; a stand-in where it has none."""
    if os.path.isdir(path) and not any(name.startswith(("tokenizer", "vocab")) for name in os.listdir(path)):
        return SimpleNamespace(pad_token_id=0, eos_token_id=1, get_vocab=lambda: {"": 0})
    try:
        return load_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code)
    except OSError:
        return SimpleNamespace(pad_token_id=0, eos_token_id=1, get_vocab=lambda: {"": 0})


def build(job: Any, sources: dict[str, Source]) -> Shells:
    """The shells of the job's networks, as its module's `configure_model` makes them (not sharded yet)."""
    args, policy = job.model, sources["policy"]
    if job.stage == "sft":
        return Shells(policy=_policy(policy, args, trained=True, dropout=args.dropout))
    if job.stage == "reward":
        return Shells(reward=_scalar(policy, args, trained=True))
    shells = Shells(policy=_policy(policy, args, trained=True), value=_scalar(sources["value"], args, trained=True))
    if args.peft is None:
        shells.reference = _policy(policy, args, trained=False)
    if "reward" in sources:
        shells.reward = _scalar(sources["reward"], args, trained=False)
    return shells


def _model(auto: Any, source: Source, args: Any) -> Any:
    """What load_model makes, with nothing read."""
    config, rows = copy.deepcopy(source.config), getattr(source.config, "vocab_size", 0)
    if auto is AutoModelForSequenceClassification:
        config.num_labels = 1
    pad = source.tokenizer.pad_token_id
    if pad == rows == max(source.tokenizer.get_vocab().values()):
        config.vocab_size = rows + 1
    config.pad_token_id = pad if pad < config.vocab_size else None
    options = {} if args.attn_implementation is None else {"attn_implementation": args.attn_implementation}
    return auto.from_config(config, dtype=getattr(torch, args.dtype), **options)


def _policy(source: Source, args: Any, *, trained: bool, dropout: bool = False) -> CausalPolicy:
    lm = _model(AutoModelForCausalLM, source, args)
    network = CausalPolicy(lm, source.tokenizer)
    network.own_logits = any(getattr(source.config, name, None) not in (None, 1, 1.0) for name in CHANGES_LOGITS)
    if not dropout:
        disable_dropout(lm)
    return _finish(network, lm, args, trained)


def _scalar(source: Source, args: Any, *, trained: bool) -> ScalarModel:
    model = _model(AutoModelForSequenceClassification, source, args)
    scalar_head(model)
    disable_dropout(model)
    return _finish(ScalarModel(model, source.tokenizer), model, args, trained)


def _finish(network: Any, model: Any, args: Any, trained: bool) -> Any:
    if args.attn_implementation is None and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(TREES)
        network.form = "trees"
    if not trained:
        return network.requires_grad_(False)
    freeze(model, args.frozen_layers)
    if args.activation_checkpointing:
        checkpoint_activations(model)
    if args.peft is not None:
        with unmoved():
            add_adapter(model, made(args.peft))
        if isinstance(network, ScalarModel):
            network.head.requires_grad_(True)
    return network.train()


@contextmanager
def unmoved() -> Iterator[None]:
    """Leaves `Module.to` out: peft moves new layers to where the old ones are already, which tensors without numbers refuse."""
    apply = nn.Module._apply
    nn.Module._apply = lambda self, *_: self  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module._apply = apply  # type: ignore[method-assign]


def made(given: Any, *args: Any) -> Any:
    """An object that YAML describes by class_path and init_args, or what `given` itself makes of the arguments."""
    description = given.as_dict() if hasattr(given, "as_dict") else given
    if not (isinstance(description, dict) and "class_path" in description):
        return given(*args) if args else given
    kind, init = import_object(description["class_path"]), dict(description.get("init_args") or {})
    for field in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ():  # peft.LoraConfig has dataclasses inside
        if isinstance(init.get(field.name), dict) and dataclasses.is_dataclass(field.default_factory):
            init[field.name] = field.default_factory(**init[field.name])  # type: ignore[operator]
    return kind(*args, **init)


def import_object(path: str) -> Any:
    """The object of a dotted path."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
