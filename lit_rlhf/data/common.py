"""What the three DataModules share: asking the module for its tokenizer, and making loaders for the Trainer."""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from lit_rlhf.batch import Batch
from lit_rlhf.data.loader import StepLoader, run_seed
from lit_rlhf.data.schemas import Schema
from lit_rlhf.data.sources import open_source, pick
from lit_rlhf.data.table import Table, build_table, load_tables, report, summarise
from lit_rlhf.data.tokenise import Encoder

FROM_USER = ("optimizer", "scheduler", "peft", "reward_fn", "rouge_tokenizer", "tokenizer", "trust_remote_code")
WANTED = {"fit": {"train", "val"}, "validate": {"val"}, "test": {"test"}, "predict": {"test", "val", "train"}}


def load_trusted(cls: Any, checkpoint_path: Any, **arguments: Any) -> Any:
    """Lightning's `load_from_checkpoint`, with which a checkpoint's hyper-parameters import nothing and trust nothing.

    Files of Lightning's command line ask for its parser, which imports whatever class or function they name. Here they are plain data, and
    what may be code (`FROM_USER`) is the caller's, or else the signature's default.
    """
    defaults: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        parameters = inspect.signature(base.__init__).parameters
        defaults |= {name: parameters[name].default for name in FROM_USER if name in parameters}
    owner = next(c for c in cls.__mro__ if getattr(vars(c).get("load_from_checkpoint"), "__func__", None) is load_trusted)
    trusted = {"weights_only": True} | defaults | arguments | {"_instantiator": None}
    with warnings.catch_warnings():  # frozen weights are in the directories, not in our files: thousands of names
        warnings.filterwarnings("ignore", "Found keys that are in the model state dict but not in the checkpoint")
        return super(owner, cls).load_from_checkpoint(checkpoint_path, **trusted)


def encoder_of(trainer: Any, tokenizer: Any) -> tuple[Encoder, int | None]:
    """The module's tokenizer and context length, else those of the `tokenizer` argument (a path or an object)."""
    module = getattr(trainer, "lightning_module", None)
    own, context = getattr(module, "tokenizer", None), getattr(module, "context_length", None)
    if own is not None:
        return Encoder(own), context
    if tokenizer is None:
        raise ValueError("no tokenizer: give tokenizer= (a path or an object), or fit a module that has one")
    if isinstance(tokenizer, str):
        from lit_rlhf.pretrained import load_tokenizer

        tokenizer = load_tokenizer(tokenizer)
    return Encoder(tokenizer), context


def prepare(module: Any, stage: str | None, schemas: tuple[Schema, ...]) -> tuple[dict[str, Table], dict[str, Any]]:
    """The tables that this stage needs beside those at hand, and the summary of all; prints and logs what is new.

    `module` is a DataModule with `trainer`, `tokenizer`, `sources`, `settings` and `tables`.
    """
    encoder, context = encoder_of(module.trainer, module.tokenizer)
    module.encoder = encoder
    settings = replace(module.settings, context_length=context)
    if settings.prompts_only:
        sampling = getattr(getattr(module.trainer, "lightning_module", None), "sampling", None)
        settings = replace(settings, new_tokens=getattr(sampling, "max_new_tokens", 1))
    made_for = (encoder.fingerprint, settings)
    have = module.tables if getattr(module, "_made_for", made_for) == made_for else {}
    module._made_for = made_for
    wanted = WANTED.get(str(getattr(stage, "value", stage)), {"train", "val", "test"})
    new = load_tables(module.sources, schemas, settings, encoder, wanted - set(have), run_seed())
    found = have | new
    tables = {split: found[split] for split in ("train", "val", "test") if split in found}
    summary = summarise(tables)
    if new:
        report(summary, getattr(module.trainer, "loggers", ()))
    return tables, summary


def extra_table(module: Any, data: Any, schemas: tuple[Schema, ...], argument: str) -> Table:
    """Prompts with responses from a second source, under the DataModule's settings; its "train" split where it has splits."""
    part = pick(open_source(data, name=None), "train", argument, argument)
    encoder, context = encoder_of(module.trainer, module.tokenizer)
    settings = replace(module.settings, columns=None, prompts_only=False, context_length=context)
    table = build_table(part, schemas, settings, encoder)
    module.summary[argument] = table.summary()
    report(summarise({argument: table}), getattr(module.trainer, "loggers", ()))
    return table


def train_loader(module: Any, lengths: np.ndarray, counts: np.ndarray, collate: Callable[[list[int]], Batch]) -> StepLoader:
    """The training loader of this rank; outside a Trainer, that of a single process without accumulation."""
    trainer = module.trainer
    loader = StepLoader(
        lengths,
        counts,
        collate,
        batch_size=module.batch_size,
        accumulate=getattr(trainer, "accumulate_grad_batches", 1),
        rank=getattr(trainer, "global_rank", 0),
        world=getattr(trainer, "world_size", 1),
        shuffle=not getattr(trainer, "overfit_batches", 0),
        seed=run_seed(),
        epoch=getattr(trainer, "current_epoch", 0),
    )
    limit = getattr(trainer, "limit_train_batches", 1.0)
    loader.limit = min(len(loader), limit) if isinstance(limit, int) else int(len(loader) * limit)
    return loader


def eval_loader(module: Any, lengths: np.ndarray, counts: np.ndarray, collate: Callable[[list[int]], Batch]) -> StepLoader:
    """All rows once, in order, every step's rows split over the ranks; by default as many as a training micro-batch has."""
    trainer = module.trainer
    rank, world = getattr(trainer, "global_rank", 0), getattr(trainer, "world_size", 1)
    size = module.val_batch_size or module.batch_size // (getattr(trainer, "accumulate_grad_batches", None) or 1)
    return StepLoader(lengths, counts, collate, batch_size=max(size, world), rank=rank, world=world)


def eval_split(tables: dict[str, Table], stage: str) -> str:
    """The split that `stage` runs on: predict takes the test rows, else the validation rows, else the training rows."""
    for split in {"test": ("test",), "predict": ("test", "val", "train")}[stage]:
        if split in tables:
            return split
    raise ValueError(f"no rows to {stage} on: give test_data, or a data set with a test split")
