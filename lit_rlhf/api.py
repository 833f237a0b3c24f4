"""train(): PPO in one call, the form that trlX's users know."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import lightning as L
from transformers import Pipeline

from lit_rlhf.callbacks import Throughput
from lit_rlhf.data import PromptDataModule
from lit_rlhf.modules import PPO
from lit_rlhf.scoring import accepted_columns


def train(
    model: str,
    reward_fn: Callable[..., Sequence[float]],
    prompts: Any = None,
    *,
    eval_prompts: Any = None,
    iterations: int = 100,
    settings: Mapping[str, Any] | None = None,
    trainer: L.Trainer | None = None,
) -> PPO:
    """Optimises `model` (a directory or hub name) against `reward_fn` with PPO and returns the trained module.

    Args:
        reward_fn: `reward_fn(prompts, responses, **columns)` or trlX's `reward_fn(samples)` (a sample is prompt + response).
        prompts: texts, rows with a "prompt", or whatever `PromptDataModule` reads; None generates from nothing (BOS).
        eval_prompts: the same, for validation.
        iterations: PPO iterations, each with `settings["batch_size"]` responses; unused where `trainer` is given.
        settings: arguments of `PPO`, e.g. {"batch_size": 64, "kl_coef": 0.1}.
        trainer: a Lightning Trainer to use instead of the default one.

    The policy is `train(...).policy`; `.policy.save("dir")` writes a Hugging Face directory.
    """
    module = PPO(model, reward_fn=with_samples(reward_fn), **(settings or {}))
    data = PromptDataModule(as_rows(prompts), val_data=as_rows(eval_prompts))
    trainer = trainer or L.Trainer(max_epochs=iterations, log_every_n_steps=module.steps_per_iteration, callbacks=[Throughput()])
    trainer.fit(module, datamodule=data)
    return module


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
