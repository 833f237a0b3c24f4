"""PPO: a policy optimised against a reward under a KL penalty.

One Lightning epoch is one PPO iteration, and optimisation is automatic, so clipping, accumulation, schedules, `max_steps` and checkpoint
intervals are the Trainer's. The rollout happens in `on_train_batch_start` when the experience is used up; only the counters here
(`iteration`, `position`) say where an iteration stands, never Lightning's.
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
from lit_rlhf.data.loader import split_by_tokens
from lit_rlhf.functional import lm_loss, policy_loss, value_loss
from lit_rlhf.generation import Sampling
from lit_rlhf.metrics import Rouge
from lit_rlhf.modules.common import PREDICTION, StepMeter, as_sampling, loss_scale, optimizers, record, reseed, step_stats
from lit_rlhf.modules.iterations import begin, draw, evaluate, load_reward, minibatch, note, report, sampled_rows, val_metrics
from lit_rlhf.modules.ppo_checks import check_run, check_settings, load_value
from lit_rlhf.modules.ppo_state import Journal, begin_anew, load_state, save_state, source_fingerprints, warn_stopped, where
from lit_rlhf.networks import CausalPolicy, ScalarModel
from lit_rlhf.optim import LRSchedule, Schedule
from lit_rlhf.perf import Clock
from lit_rlhf.pretrained import check_source, context_length_of, load_tokenizer
from lit_rlhf.rollout import Actors, RunningMoments, Shaping, shape
from lit_rlhf.sharding import clip_gradients, shard


class PPO(L.LightningModule):
    """Clipped policy gradient on sampled responses, with a value network, a frozen reference and a KL penalty per token.

    Source: Stiennon et al. 2020, Ziegler et al. 2019; defaults and details as in Huang et al. 2024 except where CONTRIBUTING.md says.
    Needs a `PromptDataModule`. `model` is the SFT stage's directory: policy and reference start from it.

    Args:
        model: the SFT directory or hub name.
        reward_model: a reward model's directory or hub name; or
        reward_fn: `reward_fn(prompts, responses, **columns)` -> one number per response, or a transformers pipeline; one of the two.
        value_init: where the value network starts: "reward" (the reward model), "sft" (`model` with a zero head) or a directory; by
            default the reward model if there is one, else "sft".
        sampling: of rollouts and validation; the temperature holds for all log-probs.
        batch_size: responses per iteration, over all ranks.
        responses_per_prompt: how many of them one prompt gets.
        ppo_epochs, minibatches: passes over the experience, and optimiser steps per pass.
        kl_coef: beta of the penalty -beta * (logprob - ref_logprob) per token; the starting point where `kl_target` is set.
        kl_target: nats per response that an adaptive coefficient steers to; None keeps it fixed.
        kl_horizon: responses over which it adapts (Ziegler et al. 2019, 2.2).
        gamma, lam: GAE's discount and decay.
        clip, value_clip: clip ranges of ratio and value (None: values unclipped).
        value_coef: weight of the value loss.
        value_lr: learning rate of the value network's parameter group; None takes the optimizer's.
        center_values: at the first rollout, shift the value network so that its mean is that of the rewards to come. A reward model's head
            was only trained on last tokens; without the shift a critic made of it is off by many units everywhere else, and value_clip
            lets it return by a fraction an iteration.
        whiten_advantages, whiten_rewards: over all response tokens of the iteration; rewards keep their mean.
        no_eos_score: replaces the score of a response that did not end; "auto" is -1 for reward models and none for functions.
        reward_baseline: "mean" (the reward model's `reward_mean`), "reference" (the score of the post's own reference, as trlX) or "none".
        score_clip: cut scores to +-this. scale_scores: divide them by their running standard deviation.
        max_kl_per_iteration: where an update's `ppo/approx_kl` (nats per token, from the policy that sampled) lies above this, it and the
            iteration's later updates change nothing, and a warning says so.
        collapse_patience: after how many iterations of collapsed responses in a row the run stops (`lit_rlhf.collapse`); None: never.
        reward_timeout: seconds that one call of `reward_fn` may take before the run stops; None waits for ever.
        ptx_coef: weight of the language-model loss on `PromptDataModule(ptx_data=…)` (InstructGPT's PPO-ptx).
        tokens_per_forward: how many tokens a pass without gradient may hold.
        dtype, attn_implementation, revision, trust_remote_code, peft, frozen_layers, activation_checkpointing, optimizer, scheduler: as in
            `SFT`; with `peft` the reference is the policy with its adapter off.
    """

    def __init__(
        self,
        model: str,
        *,
        reward_model: str | None = None,
        reward_fn: Callable[..., Any] | None = None,
        value_init: str | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008
        batch_size: int = 512,
        responses_per_prompt: int = 1,
        ppo_epochs: int = 4,
        minibatches: int = 1,
        kl_coef: float = 0.05,
        kl_target: float | None = None,
        kl_horizon: int = 10000,
        gamma: float = 1.0,
        lam: float = 0.95,
        clip: float = 0.2,
        value_clip: float | None = 0.2,
        value_coef: float = 0.1,
        value_lr: float | None = None,
        center_values: bool = True,
        whiten_advantages: bool = True,
        whiten_rewards: bool = False,
        no_eos_score: float | Literal["auto"] | None = "auto",
        reward_baseline: Literal["none", "mean", "reference"] = "mean",
        score_clip: float | None = None,
        scale_scores: bool = False,
        max_kl_per_iteration: float | None = None,
        collapse_patience: int | None = 3,
        reward_timeout: float | None = None,
        ptx_coef: float = 0.0,
        tokens_per_forward: int = 16384,
        rouge_tokenizer: Any = "default",
        dtype: str = "float32",
        attn_implementation: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        peft: Any = None,
        frozen_layers: int = 0,
        activation_checkpointing: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-6, eps=1e-5, weight_decay=0.01),  # noqa: B008
        scheduler: Schedule | LRSchedule = Schedule("linear"),  # noqa: B008
    ) -> None:
        super().__init__()
        self.sampling = as_sampling(sampling)
        record(self, self.sampling)
        self.model = check_source(model)
        self.reward_model, self.reward_fn = reward_model, reward_fn
        self.value_init = value_init or ("reward" if reward_model else "sft")
        self.batch_size, self.responses_per_prompt = batch_size, responses_per_prompt
        self.ppo_epochs, self.minibatches = ppo_epochs, minibatches
        self.kl_coef, self.kl_target, self.kl_horizon = kl_coef, kl_target, kl_horizon
        self.clip, self.value_clip, self.value_coef, self.value_lr = clip, value_clip, value_coef, value_lr
        self.reward_baseline, self.ptx_coef, self.tokens_per_forward = reward_baseline, ptx_coef, tokens_per_forward
        self.max_kl_per_iteration, self.reward_timeout = max_kl_per_iteration, reward_timeout
        self.center_values, self.collapse = center_values, CollapseWatch(collapse_patience)
        floor = (-1.0 if reward_model else None) if no_eos_score == "auto" else no_eos_score
        self.shaping = Shaping(floor, score_clip, whiten_rewards, whiten_advantages, gamma, lam)
        self.moments = RunningMoments() if scale_scores else None
        self.source = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.loading = {"dtype": dtype, "attn_implementation": attn_implementation}
        self.training_setup = {"peft": peft, "frozen_layers": frozen_layers, "activation_checkpointing": activation_checkpointing}
        self.optimizer, self.scheduler = optimizer, scheduler
        check_settings(self)
        self.policy: CausalPolicy | None = None
        self.reference: CausalPolicy | None = None
        self.value: ScalarModel | None = None
        self.scorer: torch.nn.Module | None = None
        self.rouge = Rouge(tokenizer=rouge_tokenizer)
        self.val_metrics = val_metrics()
        self.meter, self.run, self.journal, self.clock = StepMeter(), RunRecord(), Journal(), Clock()
        self.samples: list[dict[str, Any]] = []
        self.iteration, self.position, self.step_position, self.episodes, self.stopped = 0, 0, 0, 0, False
        self.experience: Experience | None = None
        self.strict_loading = False  # frozen networks are not in our checkpoints
        self._tokenizer: Any = None

    load_from_checkpoint = classmethod(load_trusted)  # type: ignore[assignment]

    # What the data module asks for

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
        return self.ppo_epochs * self.minibatches

    @property
    def num_prompts(self) -> int:
        """Prompts per iteration, over all ranks."""
        return self.batch_size // self.responses_per_prompt

    # Set-up

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
        self.value = shard(load_value(self, loading), self._trainer)
        self.scorer = load_reward(self)
        self.run.fingerprints = source_fingerprints(self)

    def configure_optimizers(self) -> dict[str, Any]:
        groups = [{"params": list(self.policy.parameters())}, {"params": list(self.value.parameters())}]
        if self.value_lr is not None:
            groups[1]["lr"] = self.value_lr
        return optimizers(self, groups, self.optimizer, self.scheduler)

    @property
    def actors(self) -> Actors:
        return Actors(self.policy, self.reference, self.value, self.scorer)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        clip_gradients(self, optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_fit_start(self) -> None:
        self.policy.train()
        self.value.train()

    # One iteration

    @property
    def items(self) -> int:
        """Micro-batches per iteration."""
        return self.steps_per_iteration * self.trainer.accumulate_grad_batches

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        begin(self, batch_idx)

    def _collect(self) -> None:
        """Makes the iteration's experience, logs it, and lets the KL coefficient adapt for the next one."""
        rollout, look = draw(self)
        center = self.center_values and self.episodes == 0
        self.experience, stats = shape(rollout, self.kl_coef, self.shaping, self.moments, center_values=center)
        if center:
            self.value.set_mean(float(self.value.mean + stats["value_offset"]))
        note(self, stats | look)

    def micro_batch(self, position: int) -> tuple[Experience, int]:
        """This rank's part of the minibatch at `position` in the iteration, and the minibatch's tokens over all ranks."""
        experience, tokens, _ = minibatch(self, position)
        return experience, tokens

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        experience, count = self.micro_batch(self.position)
        if self.stopped:  # the least that is a forward and a backward pass, which sharded strategies need of every rank
            experience = experience.select([0])
        mask = experience.batch.response_mask
        logprobs, _ = self.policy(experience.batch, temperature=self.sampling.temperature, ban=True)
        values = self.value(experience.batch)[:, :-1]
        loss, stats = policy_loss(logprobs, experience.logprobs, experience.advantages, mask, clip=self.clip, count=count)
        v_loss, v_stats = value_loss(values, experience.values, experience.returns, mask, clip=self.value_clip, count=count)
        stats |= v_stats
        loss = loss + self.value_coef * v_loss
        if self.ptx_coef and not self.stopped:
            ptx = self._ptx_loss()
            loss, stats["ptx_loss"] = loss + self.ptx_coef * ptx, ptx.detach()
        self.position += 1
        if self.stopped:
            return loss * 0.0
        self.meter.add(stats)
        return loss * loss_scale(self.trainer)

    def _ptx_loss(self) -> Tensor:
        """The language-model loss on this step's ptx rows, this rank's and micro-batch's part of it."""
        step, micro = divmod(self.position, self.trainer.accumulate_grad_batches)
        rows = self.num_prompts // self.minibatches
        batch = self.trainer.datamodule.ptx_batch(self.iteration * self.steps_per_iteration + step, rows)
        sizes = (batch.prompt_mask.sum(1) + batch.response_mask.sum(1)).tolist()
        parts = split_by_tokens(sizes, self.trainer.accumulate_grad_batches * self.trainer.world_size)
        part = batch.select(parts[micro * self.trainer.world_size + self.global_rank]).to(self.device)
        return lm_loss(self.policy(part)[0], part.response_mask, count=int(batch.response_mask.sum()))[0]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if not self.stopped:
            stats = step_stats(self, "ppo/", where(self))
            limit = self.max_kl_per_iteration
            self.stopped = limit is not None and float(stats["ppo/approx_kl"]) > limit
            self.journal.add(self, stats | {"ppo/skipped": torch.tensor(float(self.stopped))})
            if self.stopped:
                warn_stopped(self, float(stats["ppo/approx_kl"]))
        else:
            self.journal.add(self, {"ppo/skipped": torch.tensor(1.0)})
        if self.stopped:  # an optimiser leaves weights without a gradient alone
            optimizer.zero_grad(set_to_none=True)
        if self.position == self.items:
            self.journal.write(self.trainer)

    def on_train_start(self) -> None:
        begin_anew(self)
        settle(self)

    # Evaluation

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

    def export_networks(self) -> dict[str, CausalPolicy | ScalarModel]:
        """What ExportHF writes: policy and value network, each in its own directory."""
        return {"policy": self.policy, "value": self.value}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        save_state(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        load_state(self, checkpoint)
