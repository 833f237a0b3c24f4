"""train(): a policy in one call, the form that trlX's users know."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, Literal

import lightning as L
from transformers import Pipeline

from lit_rlhf.data import PairwiseDataModule, PromptDataModule, SFTDataModule, rewarded_rows
from lit_rlhf.modules import DPO, ILQL, NLPO, PPO, RFT, RLOO, Quark
from lit_rlhf.scoring import accepted_columns

SAMPLING: dict[str, Any] = {"ppo": PPO, "rloo": RLOO, "nlpo": NLPO, "rft": RFT, "quark": Quark}  # learn from what they sample and a reward
GIVEN: dict[str, Any] = {"dpo": DPO, "ilql": ILQL}  # learn from rows
ROWS = {"dpo": "rows with prompt, chosen and rejected", "ilql": "(texts, rewards), or rows with prompt, response and reward"}


def train(
    model: str,
    reward_fn: Callable[..., Sequence[float]] | None = None,
    prompts: Any = None,
    *,
    method: Literal["ppo", "rloo", "nlpo", "rft", "quark", "dpo", "ilql"] = "ppo",
    dataset: Any = None,
    eval_prompts: Any = None,
    eval_dataset: Any = None,
    iterations: int | None = None,
    settings: Mapping[str, Any] | None = None,
    trainer: L.Trainer | None = None,
) -> PPO | RLOO | NLPO | RFT | Quark | DPO | ILQL:
    """Trains `model` (a directory or hub name) by `method` and returns the trained module.

    Args:
        reward_fn: `reward_fn(prompts, responses, **columns)` or trlX's `reward_fn(samples)` (a sample is prompt + response); or give
            `settings["reward_model"]`. "dpo" takes none; "ilql" only scores validation's responses by it.
        prompts: texts, rows with a "prompt", or whatever `PromptDataModule` reads; None generates from nothing (BOS). Not of "dpo", "ilql".
        dataset: of "dpo": rows with prompt, chosen and rejected, or whatever `PairwiseDataModule` reads; of "ilql": (texts, rewards) as in
            trlX (a text may be a (prompt, response) pair), or rows with a "reward" that `SFTDataModule` reads.
        eval_prompts, eval_dataset: the same, for validation.
        iterations: of sampling methods, each with `settings["batch_size"]` responses (100 by default; RFT and Quark name them otherwise);
            of "dpo" and "ilql" passes over the rows (1 by default). Unused where `trainer` is given.
        settings: arguments of `PPO`, `RLOO`, `NLPO`, `RFT`, `Quark`, `DPO` or `ILQL`, e.g. {"batch_size": 64, "kl_coef": 0.1}.
        trainer: a Lightning Trainer to use instead of the default one.

    The policy is `train(...).policy` (of ILQL `.network`, with its heads); its `.save("dir")` writes a Hugging Face directory.
    Errors: ValueError for an unknown method, or for an argument that the method does not take.
    """
    given = {"reward_fn": reward_fn, "prompts": prompts, "eval_prompts": eval_prompts, "dataset": dataset, "eval_dataset": eval_dataset}
    check_method(method, {name for name, value in given.items() if value is not None})
    reward = {} if reward_fn is None else {"reward_fn": with_samples(reward_fn)}
    module: Any = (SAMPLING | GIVEN)[method](model, **reward, **(settings or {}))
    data: Any
    if method == "ilql":
        data = SFTDataModule(as_rewarded(dataset, module.tokenizer), val_data=as_rewarded(eval_dataset, module.tokenizer))
    elif method == "dpo":
        data = PairwiseDataModule(dataset, val_data=eval_dataset)
    else:
        data = PromptDataModule(as_rows(prompts), val_data=as_rows(eval_prompts))
    if trainer is None and method in GIVEN:
        trainer = L.Trainer(max_epochs=1 if iterations is None else iterations)
    elif trainer is None:
        trainer = L.Trainer(max_epochs=100 if iterations is None else iterations, log_every_n_steps=module.steps_per_iteration)
    trainer.fit(module, datamodule=data)
    return module  # type: ignore[no-any-return]


def check_method(method: str, given: set[str]) -> None:
    """Raises ValueError for a method that there is not, or for arguments that are another's."""
    if method not in SAMPLING | GIVEN:
        raise ValueError(f"method {method!r} is not known: give one of {', '.join(SAMPLING | GIVEN)}")
    others = {"dataset", "eval_dataset"} if method in SAMPLING else {"prompts", "eval_prompts"}
    others |= {"reward_fn"} if method == "dpo" else set()
    wants = "reward_fn (or settings['reward_model']) and prompts" if method in SAMPLING else f"dataset: {ROWS[method]}"
    if wrong := sorted(given & others):
        raise ValueError(f"method {method!r} takes no {' and no '.join(wrong)}: it learns from {wants}")
    if method in GIVEN and "dataset" not in given:
        raise ValueError(f"method {method!r} learns from {wants}, and none is given")


def as_rewarded(dataset: Any, tokenizer: Any) -> Any:
    """(texts, rewards) as rows with prompt, response and reward; anything else as it is."""
    return rewarded_rows(*dataset, tokenizer) if isinstance(dataset, tuple) and len(dataset) == 2 else dataset


def as_rows(prompts: Any) -> Any:
    """A list of texts as rows with a prompt; anything else as it is."""
    if isinstance(prompts, list | tuple) and prompts and all(isinstance(p, str) for p in prompts):
        return [{"prompt": p} for p in prompts]
    return prompts


def with_samples(reward_fn: Callable[..., Sequence[float]]) -> Callable[..., Sequence[float]]:
    """Makes trlX's reward_fn(samples, ...) one that is called with prompts and responses; others are returned as they are.

    A function takes samples if its first parameter is called so, or if it has only one; besides them it may ask for `prompts`, `outputs`
    and the data set's columns.
    """
    if isinstance(reward_fn, Pipeline):
        return reward_fn
    try:
        parameters = list(inspect.signature(reward_fn).parameters.values())
    except ValueError:
        return reward_fn
    required = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not parameters or (parameters[0].name != "samples" and len(required) != 1):
        return reward_fn

    @wraps(reward_fn)
    def on_samples(prompts: list[str], responses: list[str], **columns: Any) -> Sequence[float]:
        given = accepted_columns(reward_fn, columns | {"prompts": prompts, "outputs": responses}, leading=1)
        return reward_fn([p + r for p, r in zip(prompts, responses, strict=True)], **given)

    on_samples.__signature__ = inspect.signature(lambda prompts, responses, **columns: None)  # type: ignore[attr-defined]
    return on_samples
