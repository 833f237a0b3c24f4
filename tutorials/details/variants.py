"""The details, each with its source and with how it is switched off or broken: by command-line arguments where it is a setting."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import broken


@contextmanager
def _untouched() -> Iterator[None]:
    yield


@dataclass(frozen=True)
class Variant:
    """One detail.

    Args:
        name: short, a file name too.
        group: which part of PPO it belongs to.
        detail: what is done to it, in the table's words.
        source: where the detail is described or coded.
        args: arguments of `lit-rlhf fit`; {seed} is the seed, {fresh} a value network with random weights.
        context: what is patched while it runs.
    """

    name: str
    group: str
    detail: str
    source: str
    args: tuple[str, ...] = ()
    context: Callable[[], AbstractContextManager[Any]] = _untouched


def model(**settings: Any) -> tuple[str, ...]:
    """PPO's settings as arguments; None is YAML's null."""
    return tuple(f"--model.init_args.{key}={'null' if value is None else value}" for key, value in settings.items())


HUANG, STIENNON, ZIEGLER = "Huang et al. 2024 (N+)", "Stiennon et al. 2020", "Ziegler et al. 2019"
ENGSTROM = "Engstrom et al. 2020"
CONSTANT = ("--model.init_args.scheduler=lit_rlhf.optim.Schedule", "--model.init_args.scheduler.shape=constant")

DEFAULT = Variant("default", "", "configs/quickstart/ppo.yaml as it is", "")
AGAIN = [
    Variant(f"again-{n}", "the default again", f"other prompts' order and sampling noise ({n})", "", (f"--seed_everything={n}00{{seed}}",))
    for n in (1, 2)
]

KL = [
    Variant("no-kl", "KL", "no KL penalty", f"{ZIEGLER}, 2.2", model(kl_coef=0.0, kl_target=None)),
    Variant("fixed-kl", "KL", "coefficient fixed at 0.05, not adaptive", f"{HUANG}; {ZIEGLER} adapts it", model(kl_target=None)),
    Variant("kl-sign", "KL", "sign of the penalty flipped", f"{ZIEGLER}, 4.4: a bug of theirs", (), broken.kl_sign_flipped),
    Variant("k3-penalty", "KL", "penalty k3 in place of k1", "Schulman 2020; TRL's `kl_estimator`", (), broken.k3_penalty),
]
ADVANTAGES = [
    Variant(
        "no-whitening", "advantages", "advantages not whitened", f"{HUANG}; Andrychowicz et al. 2021", model(whiten_advantages="false")
    ),
    Variant(
        "whiten-padding", "advantages", "whitened over the padding too", "trlX's `whiten`, without a mask", (), broken.whiten_over_padding
    ),
    Variant("whiten-mean", "advantages", "whitening adds the mean back", "`shift_mean` in circulating code", (), broken.whiten_keeps_mean),
    Variant("whiten-rewards", "advantages", "rewards whitened too", f"{ZIEGLER}'s code; off in {HUANG}", model(whiten_rewards="true")),
    Variant(
        "returns", "advantages", "value target from whitened advantages", f"{HUANG}: returns come first", (), broken.returns_of_whitened
    ),
    Variant("gamma", "advantages", "gamma 0.95 in place of 1", f"{ZIEGLER}'s code: 1", model(gamma=0.95)),
    Variant("lambda-1", "advantages", "lambda 1 in place of 0.95", "Schulman et al. 2015", model(lam=1.0)),
]
SCORE = [
    Variant("no-eos-score", "score", "no -1 for a response without EOS", f"{HUANG}; {ZIEGLER}'s code", model(no_eos_score=None)),
    Variant("score-no-eos", "score", "scored without its EOS", "trlX issue 442", (), broken.scored_without_eos),
    Variant("not-centred", "score", "mean of the references not subtracted", f"{STIENNON}, 3.4", model(reward_baseline="none")),
    Variant(
        "reference", "score", "each post's own reference's score subtracted", "trlX's TL;DR example", model(reward_baseline="reference")
    ),
    Variant("scaled", "score", "divided by its running standard deviation", "trlX's `scale_reward`", model(scale_scores="true")),
]
SAMPLING = [
    Variant("temperature", "sampling", "log-probs without the temperature", HUANG, (), broken.logprobs_without_temperature),
    Variant("top-k", "sampling", "top-k of 2, unknown to the log-probs", f"{HUANG}; transformers' default was 50", (), broken.top_k(2)),
    Variant("dropout", "sampling", "dropout 0.1 on", HUANG, (), broken.dropout_on),
    Variant("pad-eos", "sampling", "pad = EOS: the mask drops the EOS", f"{HUANG}; trlX", (), broken.pad_is_eos),
    Variant("one-response", "sampling", "1 response a prompt in place of 4", f"{HUANG}: 1", model(responses_per_prompt=1)),
]
LOSS = [
    Variant("row-means", "loss", "mean of the responses' means", "GRPO's; TRL's PPO by micro-batch", (), broken.mean_of_means),
    Variant(
        "in-loop", "loss", "divided inside the loop over responses", "trlX's tutorial, of its reward model", (), broken.divided_in_loop
    ),
    Variant("no-clip", "loss", "ratio not clipped", "Schulman et al. 2017", model(clip=1e9)),
    Variant("no-value-clip", "loss", "value not clipped", f"{ZIEGLER}'s code; {ENGSTROM}", model(value_clip=None)),
    Variant("no-grad-clip", "loss", "gradient norm not clipped", ENGSTROM, ("--trainer.gradient_clip_val=null",)),
]
OPTIMISER = [
    Variant("one-epoch", "optimiser", "1 pass over a rollout in place of 2", f"{HUANG}: 4", model(ppo_epochs=1)),
    Variant("four-epochs", "optimiser", "4 passes", HUANG, model(ppo_epochs=4)),
    Variant("minibatches", "optimiser", "4 minibatches a pass in place of 1", f"{HUANG}: 1", model(minibatches=4)),
    Variant("constant-lr", "optimiser", "rate constant, not to 0", f"{STIENNON}; {ENGSTROM}", CONSTANT),
    Variant("adam-eps", "optimiser", "Adam's eps 1e-8 in place of 1e-5", HUANG, ("--model.init_args.optimizer.init_args.eps=1e-8",)),
]
VALUE = [
    Variant("value-sft", "value network", "from SFT with a zero head", f"{ZIEGLER}: zero; {STIENNON}: reward", model(value_init="sft")),
    Variant("value-fresh", "value network", "random weights", f"{STIENNON}, 3.4 and G.1", model(value_init="{fresh}")),
    Variant("value-mean", "value network", "not shifted to the first returns", "ours", model(center_values="false")),
    Variant("value-late", "value network", "reads V_t after token t", f"{HUANG}: before", (), broken.value_sees_action),
]
VARIANTS = [DEFAULT, *AGAIN, *KL, *SCORE, *SAMPLING, *ADVANTAGES, *LOSS, *OPTIMISER, *VALUE]
