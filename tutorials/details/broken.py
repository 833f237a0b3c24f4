"""PPO with one detail broken: within these contexts `PPO` is wrong in one way; the package has no options for this."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_rlhf import generation, rollout, scoring
from lit_rlhf.decoding import can_share_rows
from lit_rlhf.functional import advantages, k3, last_index, policy_loss, token_rewards, value_loss, whiten
from lit_rlhf.modules import ppo
from lit_rlhf.networks import CausalPolicy

DROPOUT = 0.1  # GPT-2's and OPT's own rate


# The KL penalty


@contextmanager
def kl_sign_flipped() -> Iterator[None]:
    """The penalty +beta * (logprob - ref_logprob): the policy is paid for leaving the reference."""

    def flipped(*args: Any, kl_coef: float) -> Tensor:
        return token_rewards(*args, kl_coef=-kl_coef)

    with mock.patch.object(rollout, "token_rewards", flipped):
        yield


@contextmanager
def k3_penalty() -> Iterator[None]:
    """The penalty is k3 of each token, which is never negative, in place of k1."""
    with mock.patch.object(advantages, "k1", k3):
        yield


# Advantages and returns


@contextmanager
def whiten_over_padding() -> Iterator[None]:
    """Mean and variance over the whole matrix (N, R), the zeros after each response's end counted."""

    def padded(x: Tensor, mask: Tensor, keep_mean: bool = False, unbiased: bool = False) -> Tensor:
        return whiten(x, torch.ones_like(mask), keep_mean, unbiased)

    with mock.patch.object(rollout, "whiten", padded):
        yield


@contextmanager
def whiten_keeps_mean() -> Iterator[None]:
    """A whitening that adds the mean back: advantages are scaled, never centred."""

    def uncentred(x: Tensor, mask: Tensor, keep_mean: bool = False, unbiased: bool = False) -> Tensor:
        return whiten(x, mask, True, unbiased)

    with mock.patch.object(rollout, "whiten", uncentred):
        yield


@contextmanager
def returns_of_whitened() -> Iterator[None]:
    """The value network's target is values + whitened advantages."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        experience, stats = rollout.shape(*args, **kwargs)
        returns = torch.where(experience.batch.response_mask, experience.advantages + experience.values, 0.0)
        return replace(experience, returns=returns), stats

    with mock.patch.object(ppo, "shape", wrong):
        yield


# Sampling and log-probs


@contextmanager
def logprobs_without_temperature() -> Iterator[None]:
    """Policy and reference give log-probs at temperature 1, whatever the sampler's is."""
    forward = CausalPolicy.forward

    def at_one(self: CausalPolicy, batch: Any, *, temperature: float = 1.0, **more: Any) -> Any:
        return forward(self, batch, temperature=1.0, **more)

    with mock.patch.object(CausalPolicy, "forward", at_one):
        yield


def top_k(k: int) -> Callable[[], Any]:
    """Rollouts are drawn from the k likeliest tokens; the log-probs are those of the whole distribution."""

    @contextmanager
    def context() -> Iterator[None]:
        draw = generation.draw

        def cut(logits: Tensor, banned: Tensor, *more: Any) -> Any:
            allowed = logits.masked_fill(banned, -torch.inf)
            lowest = allowed.topk(k, dim=1).values[:, -1:]
            return draw(logits.masked_fill(allowed < lowest, generation.LOWEST), banned, *more)

        with mock.patch.object(generation, "draw", cut):
            yield

    return context


@contextmanager
def dropout_on() -> Iterator[None]:
    """Residual dropout, as GPT-2 has it, in the policy and the value network while they roll out and learn."""

    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return (F.dropout(out[0], DROPOUT, module.training), *out[1:])
        return F.dropout(out, DROPOUT, module.training)

    def after(module: Any) -> None:
        can_share_rows(module.policy)  # tried while the policy is still a function of its input
        for network in (module.policy.lm, module.value.model):
            for block in network.base_model.layers:
                for part in (block.self_attn, block.mlp):
                    part.register_forward_hook(hook)

    with _configured(after):
        yield


@contextmanager
def pad_is_eos() -> Iterator[None]:
    """The mask is rebuilt as ids != pad, and pad is EOS: the end is in no log-prob, KL, value or loss; the token before has the score."""

    def wrong(made: Any, *args: Any, **kwargs: Any) -> Any:
        mask = made.batch.response_mask
        mask = mask.scatter(1, last_index(mask)[:, None], ~made.finished[:, None])
        mask[:, 0] = True  # a response that is nothing but EOS keeps it, or no token could carry its score
        return rollout.shape(replace(made, batch=replace(made.batch, response_mask=mask), values=made.values * mask), *args, **kwargs)

    with mock.patch.object(ppo, "shape", wrong):
        yield


@contextmanager
def scored_without_eos() -> Iterator[None]:
    """The reward model was trained to score the EOS and is asked for the score of the token before it."""
    text_batch = scoring.text_batch

    def cut(*args: Any) -> Any:
        batch = text_batch(*args)
        mask = batch.response_mask.scatter(1, last_index(batch.response_mask)[:, None], False)
        mask[:, 0] = True  # an empty response has nothing but its EOS
        return replace(batch, response_mask=mask)

    with mock.patch.object(scoring, "text_batch", cut):
        yield


# Losses


@contextmanager
def mean_of_means() -> Iterator[None]:
    """Each response's mean over its own tokens, then the mean over responses: a short response's token weighs more."""
    with _losses(lambda total, loss, rows: total + loss / rows):
        yield


@contextmanager
def divided_in_loop() -> Iterator[None]:
    """`loss += row; loss /= rows` within the loop over rows: row n of N is divided N - n + 1 times, so the last one is all that counts."""
    with _losses(lambda total, loss, rows: (total + loss) / rows):
        yield


def _losses(add: Callable[[Any, Tensor, int], Any]) -> Any:
    """Both losses as a loop over responses; the stats stay those of the right loss."""

    def looped(loss_of: Any) -> Any:
        def loss(new: Tensor, old: Tensor, target: Tensor, mask: Tensor, *, clip: Any, count: Any = None) -> Any:
            total: Any = 0.0
            for n in range(len(mask)):
                row = slice(n, n + 1)
                total = add(total, loss_of(new[row], old[row], target[row], mask[row], clip=clip)[0], len(mask))
            return total, loss_of(new.detach(), old, target, mask, clip=clip, count=count)[1]

        return loss

    return mock.patch.multiple(ppo, policy_loss=looped(policy_loss), value_loss=looped(value_loss))


# The value network


@contextmanager
def value_sees_action() -> Iterator[None]:
    """Off by one: V_t is read after token t, so that the baseline knows the action that it judges."""

    def after(module: Any) -> None:
        module.value.register_forward_hook(lambda network, args, out: out.roll(-1, 1))

    with _configured(after):
        yield


def _configured(after: Callable[[Any], None]) -> Any:
    """PPO whose networks are changed by `after` once they are loaded."""
    configure = ppo.PPO.configure_model

    def changed(self: Any) -> None:
        new = self.policy is None
        configure(self)
        if new:
            after(self)

    return mock.patch.object(ppo.PPO, "configure_model", changed)
