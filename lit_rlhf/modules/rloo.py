"""RLOO and REINFORCE: a policy optimised against a reward without a value network; a prompt's responses are each other's baseline.

As in PPO one Lightning epoch is one iteration, and `iterations.py` has what the two share.
"""

from collections.abc import Callable
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lit_rlhf.batch import Batch, Experience
from lit_rlhf.checkpoints import RunRecord, settle
from lit_rlhf.collapse import CollapseWatch
from lit_rlhf.data.common import load_trusted
from lit_rlhf.functional import group_normalised, leave_one_out, rloo_loss, token_rewards
from lit_rlhf.functional.rloo import Ratio
from lit_rlhf.generation import Sampling
from lit_rlhf.metrics import Rouge
from lit_rlhf.modules.common import PREDICTION, StepMeter, as_sampling, loss_scale, optimizers, record, reseed, step_stats
from lit_rlhf.modules.iterations import begin, draw, evaluate, load_reward, minibatch, note, report, sampled_rows, val_metrics
from lit_rlhf.modules.ppo_checks import check_groups, check_run, check_sampled
from lit_rlhf.modules.ppo_state import Journal, begin_anew, load_state, save_state, source_fingerprints, where
from lit_rlhf.networks import CausalPolicy
from lit_rlhf.optim import LRSchedule, Schedule
from lit_rlhf.perf import Clock
from lit_rlhf.pretrained import check_source, context_length_of, load_tokenizer
from lit_rlhf.rollout import Actors, Rollout, RunningMoments, Shaping, shaped_scores, statistics
from lit_rlhf.sharding import clip_gradients, shard

Advantage = Literal["leave_one_out", "group_normalised", "moving_mean"]


class RLOO(L.LightningModule):
    """REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024): a response's reward minus the mean of its prompt's other responses.

    The reward is of the whole response, its score minus `kl_coef` times the sum of its tokens' log(pi / pi_ref). Needs a
    `PromptDataModule`. `model` is the SFT stage's directory: policy and reference start from it.

    Args:
        model: the SFT directory or hub name.
        responses_per_prompt: k; 1 is plain REINFORCE.
        advantage: "leave_one_out"; "group_normalised" (GRPO's: minus the mean of the prompt's responses, over their standard deviation) or
            "moving_mean" (minus the mean of all rewards of the iterations before). None: the first, and the last where k is 1.
        ratio: "sequence" (one ratio and clip for a whole response) or "token" (GRPO's, the mean over a response's tokens).
        epochs, minibatches: passes over an iteration's responses, and optimiser steps per pass; 1 and 1 are on policy.
        kl_coef: beta of the penalty in the reward. (GRPO has its KL in the loss instead; for that method's advantage alone, set 0.)
        clip: of the ratio; without effect where each iteration has one optimiser step.
        reward_model, reward_fn, sampling, batch_size, kl_target, kl_horizon, no_eos_score, reward_baseline, score_clip, collapse_patience,
            reward_timeout, tokens_per_forward, rouge_tokenizer, dtype, attn_implementation, revision, trust_remote_code, peft,
            frozen_layers, activation_checkpointing, optimizer, scheduler: as in `PPO`.
    """

    def __init__(
        self,
        model: str,
        *,
        reward_model: str | None = None,
        reward_fn: Callable[..., Any] | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008
        batch_size: int = 512,
        responses_per_prompt: int = 4,
        advantage: Advantage | None = None,
        ratio: Ratio = "sequence",
        epochs: int = 1,
        minibatches: int = 1,
        kl_coef: float = 0.05,
        kl_target: float | None = None,
        kl_horizon: int = 10000,
        clip: float = 0.2,
        no_eos_score: float | Literal["auto"] | None = "auto",
        reward_baseline: Literal["none", "mean", "reference"] = "mean",
        score_clip: float | None = None,
        collapse_patience: int | None = 3,
        reward_timeout: float | None = None,
        tokens_per_forward: int = 16384,
        rouge_tokenizer: Any = "default",
        dtype: str = "float32",
        attn_implementation: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        peft: Any = None,
        frozen_layers: int = 0,
        activation_checkpointing: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0),  # noqa: B008
        scheduler: Schedule | LRSchedule = Schedule("linear"),  # noqa: B008
    ) -> None:
        super().__init__()
        self.sampling = as_sampling(sampling)
        record(self, self.sampling)
        self.model = check_source(model)
        self.reward_model, self.reward_fn = reward_model, reward_fn
        self.batch_size, self.responses_per_prompt = batch_size, responses_per_prompt
        self.advantage = advantage or ("moving_mean" if responses_per_prompt == 1 else "leave_one_out")
        self.ratio, self.epochs, self.minibatches, self.clip = ratio, epochs, minibatches, clip
        self.kl_coef, self.kl_target, self.kl_horizon = kl_coef, kl_target, kl_horizon
        self.reward_baseline, self.reward_timeout, self.tokens_per_forward = reward_baseline, reward_timeout, tokens_per_forward
        self.collapse = CollapseWatch(collapse_patience)
        floor = (-1.0 if reward_model else None) if no_eos_score == "auto" else no_eos_score
        self.shaping = Shaping(floor, score_clip)
        self.moments = RunningMoments() if self.advantage == "moving_mean" else None  # of the rewards so far
        self.source = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.loading = {"dtype": dtype, "attn_implementation": attn_implementation}
        self.training_setup = {"peft": peft, "frozen_layers": frozen_layers, "activation_checkpointing": activation_checkpointing}
        self.optimizer, self.scheduler = optimizer, scheduler
        check_sampled(self)
        check_groups(self)
        self.policy: CausalPolicy | None = None
        self.reference: CausalPolicy | None = None
        self.scorer: torch.nn.Module | None = None
        self.rouge, self.val_metrics = Rouge(tokenizer=rouge_tokenizer), val_metrics()
        self.meter, self.run, self.journal, self.clock = StepMeter(), RunRecord(), Journal(), Clock()
        self.samples: list[dict[str, Any]] = []
        self.iteration, self.position, self.step_position, self.episodes, self.stopped = 0, 0, 0, 0, False
        self.experience: Experience | None = None
        self.strict_loading = False  # frozen networks are not in our checkpoints
        self._tokenizer: Any = None

    load_from_checkpoint = classmethod(load_trusted)  # type: ignore[assignment]

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.model, **self.source)
        return self._tokenizer

    @property
    def context_length(self) -> int | None:
        return context_length_of(self.model, **self.source)

    @property
    def steps_per_iteration(self) -> int:
        """Optimiser steps between two rollouts."""
        return self.epochs * self.minibatches

    @property
    def num_prompts(self) -> int:
        """Prompts per iteration, over all ranks."""
        return self.batch_size // self.responses_per_prompt

    @property
    def items(self) -> int:
        """Micro-batches per iteration."""
        return self.steps_per_iteration * self.trainer.accumulate_grad_batches

    @property
    def actors(self) -> Actors:
        return Actors(self.policy, self.reference, None, self.scorer)

    def setup(self, stage: str) -> None:
        check_run(self, stage)

    def configure_model(self) -> None:
        if self.policy is not None:
            return
        reseed(0)  # adapters are drawn from the run's seed, on every rank the same
        loading = self.loading | self.source
        self.policy = shard(CausalPolicy.load(self.model, tokenizer=self.tokenizer, **loading, **self.training_setup), self._trainer)
        if self.training_setup["peft"] is None:
            self.reference = shard(CausalPolicy.load(self.model, tokenizer=self.tokenizer, **loading).requires_grad_(False), self._trainer)
        self.scorer = load_reward(self)
        self.run.fingerprints = source_fingerprints(self)

    def configure_optimizers(self) -> dict[str, Any]:
        return optimizers(self, [{"params": list(self.policy.parameters())}], self.optimizer, self.scheduler)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        clip_gradients(self, optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_fit_start(self) -> None:
        self.policy.train()

    def on_train_start(self) -> None:
        begin_anew(self)
        settle(self)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        begin(self, batch_idx)

    def _collect(self) -> None:
        """Makes the iteration's experience and logs it."""
        rollout, look = draw(self)
        self.experience, stats = self._shape(rollout)
        note(self, stats | look)

    def _shape(self, rollout: Rollout) -> tuple[Experience, dict[str, Tensor]]:
        """Scores and KL -> one reward and one advantage a response, which stands at each of its tokens."""
        mask, none = rollout.batch.response_mask, torch.zeros_like(rollout.values)
        scores = shaped_scores(rollout, self.shaping)
        rewards = token_rewards(rollout.logprobs, rollout.ref_logprobs, scores, mask, kl_coef=self.kl_coef)
        advantages = self._advantages(rewards.sum(1))
        parts = (rollout.logprobs, rollout.ref_logprobs, none, scores, rewards, advantages[:, None] * mask, none)
        stats = statistics(rollout, scores, rewards) | {"advantage_std": advantages.std(unbiased=False)}
        return Experience(rollout.batch, *parts), stats

    def _advantages(self, rewards: Tensor) -> Tensor:
        """(N,) of the responses' rewards (N,), the responses of a prompt after each other."""
        if self.moments is None:
            compare = leave_one_out if self.advantage == "leave_one_out" else group_normalised
            return compare(rewards, self.responses_per_prompt)
        baseline = self.moments.mean if self.moments.count else float(rewards.mean())
        self.moments(rewards)
        return rewards - baseline

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        experience, _, count = minibatch(self, self.position)
        logprobs, _ = self.policy(experience.batch, temperature=self.sampling.temperature, ban=True)
        mask, advantages = experience.batch.response_mask, experience.advantages[:, 0]
        loss, stats = rloo_loss(logprobs, experience.logprobs, advantages, mask, ratio=self.ratio, clip=self.clip, count=count)
        self.position += 1
        self.meter.add(stats)
        return loss * loss_scale(self.trainer)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.journal.add(self, step_stats(self, "rloo/", where(self)))
        if self.position == self.items:
            self.journal.write(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        save_state(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        load_state(self, checkpoint)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        evaluate(self, batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        report(self, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        evaluate(self, batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        report(self, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """One dictionary a prompt: prompt, response, reference where known, score, kl, length."""
        return sampled_rows(self, batch, PREDICTION)

    def export_networks(self) -> dict[str, CausalPolicy]:
        """What ExportHF writes: the policy, at the directory itself."""
        return {"": self.policy}
