"""What PPO, and modules that sample as it does, refuse before anything loads: contradicting settings, data, Trainer, a value network."""

from typing import Any

from lit_rlhf.networks import ScalarModel
from lit_rlhf.pretrained import check_source, load_tokenizer
from lit_rlhf.scoring import check_reward_fn
from lit_rlhf.sharding import shards
from lit_rlhf.strategies import check_strategy


def check_settings(ppo: Any) -> None:
    """Raises ValueError, TypeError or FileNotFoundError for arguments of PPO that cannot work together."""
    check_sampled(ppo)
    if ppo.value_init == "reward" and ppo.reward_model is None:
        raise ValueError("value_init is 'reward', but there is no reward_model; use 'sft' or a directory")
    if ppo.value_init not in ("reward", "sft"):
        check_source(ppo.value_init)
    if ppo.value_clip is not None and ppo.value_clip <= 0:
        raise ValueError(f"value_clip must be above 0, got {ppo.value_clip}; null switches it off")
    for name in ("gamma", "lam"):
        if not 0 <= getattr(ppo.shaping, name) <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {getattr(ppo.shaping, name)}")


def check_groups(rloo: Any) -> None:
    """Raises ValueError for an advantage that the number of responses per prompt does not allow."""
    if rloo.advantage != "moving_mean" and rloo.responses_per_prompt < 2:
        raise ValueError(
            f"advantage {rloo.advantage!r} compares the responses to one prompt, and responses_per_prompt is {rloo.responses_per_prompt}: "
            "give at least 2, or advantage: moving_mean"
        )


def check_rewarded(ppo: Any) -> None:
    """Raises what `check_settings` does, for the arguments that all modules that sample and score share."""
    if (ppo.reward_model is None) == (ppo.reward_fn is None):
        raise ValueError("give exactly one of reward_model and reward_fn" + (", not both" if ppo.reward_model else ""))
    if ppo.reward_fn is not None:
        check_reward_fn(ppo.reward_fn)
    else:
        check_source(ppo.reward_model)
    if ppo.sampling.temperature <= 0:
        raise ValueError(f"{algorithm(ppo)} needs sampling.temperature > 0: greedy responses have no probability to change")
    for name in ("batch_size", "responses_per_prompt", "ppo_epochs", "epochs", "minibatches", "kl_horizon", "tokens_per_forward"):
        if getattr(ppo, name, 1) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(ppo, name)}")


def check_sampled(ppo: Any) -> None:
    """Raises what `check_settings` does, for the arguments that PPO and RLOO share."""
    check_rewarded(ppo)
    if ppo.kl_target is not None and ppo.kl_target <= 0:
        raise ValueError(f"kl_target must be above 0 nats per response (or null for a fixed coefficient), got {ppo.kl_target}")
    if ppo.kl_target is not None and ppo.batch_size >= 5 * ppo.kl_horizon:
        raise ValueError(f"kl_horizon {ppo.kl_horizon} must be over a fifth of batch_size {ppo.batch_size}, or the coefficient reaches 0")
    for name, number in (("clip", ppo.clip), ("score_clip", ppo.shaping.score_clip)):
        if number is not None and number <= 0:
            raise ValueError(f"{name} must be above 0, got {number}" + ("" if name == "clip" else "; null switches it off"))
    if ppo.batch_size % ppo.responses_per_prompt:
        raise ValueError(f"batch_size {ppo.batch_size} must be a multiple of responses_per_prompt {ppo.responses_per_prompt}")


def algorithm(module: Any) -> str:
    """The name of the module's algorithm, whatever a user's subclass is called."""
    return next((c.__name__ for c in type(module).__mro__ if c.__module__.startswith("lit_rlhf.")), type(module).__name__)


def check_run(ppo: Any, stage: str, prompts: int | None = None) -> None:
    """Raises TypeError or ValueError where the Trainer or the DataModule cannot serve PPO, or a module that samples as it does.

    prompts: how many an iteration learns from; by default those that it samples for.
    """
    check_strategy(ppo)
    if stage == "fit":
        _check_trainer(ppo, ppo.trainer)
        check_parts(ppo, ppo.num_prompts if prompts is None else prompts)
    new, limit = ppo.sampling.max_new_tokens, ppo.context_length
    if limit is not None and new >= limit:  # each prompt's own length is checked by the data module
        raise ValueError(f"sampling.max_new_tokens {new} leaves no room for a prompt in the context of {ppo.model}, {limit} tokens")


def _check_trainer(ppo: Any, trainer: Any) -> None:
    if not hasattr(trainer.datamodule, "prompts"):
        raise TypeError(
            f"{(name := algorithm(ppo))} trains on a PromptDataModule (fit({name.lower()}, datamodule=PromptDataModule(…))): it draws each "
            "iteration's prompts by number"
        )
    if bool(getattr(ppo, "ptx_coef", 0)) != (getattr(trainer.datamodule, "ptx_data", None) is not None):
        raise ValueError("ptx_coef needs the rows of PromptDataModule(ptx_data=…), and the rows need a ptx_coef: give both or neither")
    if trainer.limit_train_batches != 1.0 and not trainer.fast_dev_run and not trainer.overfit_batches:
        raise ValueError("limit_train_batches would cut iterations short; use max_steps, or a smaller batch_size or fewer epochs")


def check_one_device(module: Any) -> None:
    """Raises ValueError for a sharded strategy, of modules whose networks are read outside of a forward that it knows of."""
    if shards(module.trainer):
        raise ValueError(f"{algorithm(module)} reads its networks' states, which sharded strategies do not hand out: use one device or ddp")


def check_parts(ppo: Any, prompts: int, more: str = "") -> None:
    """Raises ValueError where so many prompts cannot be split into an iteration's micro-batches; `more`: what to do about it."""
    trainer = ppo.trainer
    more = more or f"raise {next(name for name in ('batch_size', 'minibatch_size', 'num_prompts') if hasattr(ppo, name))}"
    if prompts < ppo.minibatches * trainer.accumulate_grad_batches * trainer.world_size:
        raise ValueError(
            f"{prompts} prompts per iteration cannot be split into minibatches {ppo.minibatches} x accumulate_grad_batches "
            f"{trainer.accumulate_grad_batches} x {trainer.world_size} ranks; {more} or lower one of them"
        )


def load_value(ppo: Any, loading: dict[str, Any]) -> ScalarModel:
    """The value network; its tokenizer must be the policy's, since it reads the policy's ids."""
    if ppo.value_init == "sft":
        return ScalarModel.load(ppo.model, head="zero", tokenizer=ppo.tokenizer, **loading, **ppo.training_setup)
    path = ppo.reward_model if ppo.value_init == "reward" else ppo.value_init
    if load_tokenizer(path, trust_remote_code=ppo.source["trust_remote_code"]).get_vocab() != ppo.tokenizer.get_vocab():
        raise ValueError(f"the tokenizer of {path} is not that of {ppo.model}, so it cannot be the value network; set value_init: sft")
    value = ScalarModel.load(
        path, tokenizer=ppo.tokenizer, **ppo.loading, **ppo.training_setup, trust_remote_code=ppo.source["trust_remote_code"]
    )
    if ppo.reward_baseline != "mean":
        value.set_mean(0.0)  # in its config too: the exported network must give the values it was trained to
    return value
