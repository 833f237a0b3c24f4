"""NLPO: PPO whose policy may only say what an earlier copy of itself finds likely."""

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
from lit_rlhf.functional import policy_loss, value_loss
from lit_rlhf.generation import Sampling
from lit_rlhf.masked_policy import MaskedPolicy
from lit_rlhf.metrics import Rouge
from lit_rlhf.modules.common import PREDICTION, StepMeter, as_sampling, loss_scale, optimizers, record, reseed, step_stats
from lit_rlhf.modules.iterations import begin, draw, evaluate, load_reward, minibatch, note, report, sampled_rows, val_metrics
from lit_rlhf.modules.ppo_checks import check_one_device, check_run, check_settings, load_value
from lit_rlhf.modules.ppo_state import Journal, begin_anew, load_state, save_state, source_fingerprints, where
from lit_rlhf.networks import CausalPolicy, ScalarModel
from lit_rlhf.optim import LRSchedule, Schedule
from lit_rlhf.perf import Clock
from lit_rlhf.pretrained import check_source, context_length_of, load_tokenizer
from lit_rlhf.rollout import Actors, Shaping, shape


class NLPO(L.LightningModule):
    """Natural language policy optimisation (Ramamurthy et al. 2022, *Is reinforcement learning (not) for natural language processing?*).

    PPO, but tokens are sampled from the policy within the nucleus (`top_p`) of a mask policy: a copy of the policy, taken anew every
    `mask_every` iterations. Log-probs, ratios and KL are those of what is sampled, the policy renormalised within the mask. That departs
    from RL4LMs, whose masked log-prob is not renormalised and whose KL leaves the mask out: its ratio is not that of the distribution it
    sampled from. Here KL to the reference starts at -log of the nucleus's probability per token (at most 0.105 nats at top_p 0.9), not 0.
    Needs a `PromptDataModule`. The export samples from its own nucleus by its generation config.

    Args:
        top_p, min_tokens: the mask keeps the likeliest tokens that reach this probability, at least so many (RL4LMs: 0.9 and 100).
        mask_every: iterations between two copies.
        model, reward_model, reward_fn, value_init, sampling, batch_size, responses_per_prompt, ppo_epochs, minibatches, kl_coef, kl_target,
            kl_horizon, gamma, lam, clip, value_clip, value_coef, value_lr, center_values, whiten_advantages, no_eos_score,
            reward_baseline, score_clip, collapse_patience, reward_timeout, tokens_per_forward, rouge_tokenizer, dtype,
            attn_implementation, revision, trust_remote_code, activation_checkpointing, optimizer, scheduler: as in `PPO`.
    """

    def __init__(
        self,
        model: str,
        *,
        reward_model: str | None = None,
        reward_fn: Callable[..., Any] | None = None,
        value_init: str | None = None,
        top_p: float = 0.9,
        min_tokens: int = 100,
        mask_every: int = 20,
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
        activation_checkpointing: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-6, eps=1e-5, weight_decay=0.01),  # noqa: B008
        scheduler: Schedule | LRSchedule = Schedule("linear"),  # noqa: B008
    ) -> None:
        super().__init__()
        self.sampling = as_sampling(sampling)
        record(self, self.sampling)
        self.model, self.reward_model, self.reward_fn = check_source(model), reward_model, reward_fn
        self.value_init = value_init or ("reward" if reward_model else "sft")
        self.mask, self.mask_every = {"top_p": top_p, "min_tokens": min_tokens}, mask_every
        self.batch_size, self.responses_per_prompt = batch_size, responses_per_prompt
        self.ppo_epochs, self.minibatches = ppo_epochs, minibatches
        self.kl_coef, self.kl_target, self.kl_horizon = kl_coef, kl_target, kl_horizon
        self.clip, self.value_clip, self.value_coef, self.value_lr = clip, value_clip, value_coef, value_lr
        self.reward_baseline, self.reward_timeout, self.tokens_per_forward = reward_baseline, reward_timeout, tokens_per_forward
        self.center_values, self.collapse = center_values, CollapseWatch(collapse_patience)
        floor = (-1.0 if reward_model else None) if no_eos_score == "auto" else no_eos_score
        self.shaping = Shaping(floor, score_clip, False, whiten_advantages, gamma, lam)
        self.source = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.loading = {"dtype": dtype, "attn_implementation": attn_implementation}
        self.training_setup = {"activation_checkpointing": activation_checkpointing}
        self.optimizer, self.scheduler = optimizer, scheduler
        check_settings(self)
        if not 0 < top_p <= 1 or min_tokens < 1 or mask_every < 1:
            raise ValueError(f"top_p {top_p} must be in (0, 1], min_tokens {min_tokens} and mask_every {mask_every} at least 1")
        self.policy: CausalPolicy | None = None
        self.mask_policy: CausalPolicy | None = None
        self.reference: CausalPolicy | None = None
        self.value: ScalarModel | None = None
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
        return self.ppo_epochs * self.minibatches

    @property
    def num_prompts(self) -> int:
        """Prompts per iteration, over all ranks."""
        return self.batch_size // self.responses_per_prompt

    @property
    def items(self) -> int:
        """Micro-batches per iteration."""
        return self.steps_per_iteration * self.trainer.accumulate_grad_batches

    @property
    def masked(self) -> MaskedPolicy:
        """The policy that samples and learns."""
        return MaskedPolicy(self.policy, self.mask_policy, self.sampling.temperature, **self.mask)

    @property
    def actors(self) -> Actors:
        return Actors(self.masked, self.reference, self.value, self.scorer)

    def setup(self, stage: str) -> None:
        check_run(self, stage)
        check_one_device(self)

    def configure_model(self) -> None:
        if self.policy is not None:
            return
        reseed(0)
        loading = self.loading | self.source | {"tokenizer": self.tokenizer}
        self.policy = CausalPolicy.load(self.model, **loading, **self.training_setup)
        self.mask_policy, self.reference = (CausalPolicy.load(self.model, **loading).requires_grad_(False) for _ in range(2))
        self.value = load_value(self, self.loading | self.source)
        self.scorer = load_reward(self)
        self.run.fingerprints = source_fingerprints(self)

    def configure_optimizers(self) -> dict[str, Any]:
        rate = {} if self.value_lr is None else {"lr": self.value_lr}
        groups = [{"params": list(self.policy.parameters())}, {"params": list(self.value.parameters()), **rate}]
        return optimizers(self, groups, self.optimizer, self.scheduler)

    def on_fit_start(self) -> None:
        self.policy.train()
        self.value.train()

    def on_train_start(self) -> None:
        begin_anew(self)
        settle(self)

    # One iteration

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        begin(self, batch_idx)

    def _collect(self) -> None:
        """Takes the mask policy anew where it is time, samples, and makes experience of it."""
        if self.iteration % self.mask_every == 0:
            self.mask_policy.load_state_dict(self.policy.state_dict())
        rollout, look = draw(self)
        center = self.center_values and self.episodes == 0
        self.experience, stats = shape(rollout, self.kl_coef, self.shaping, center_values=center)
        if center:
            self.value.set_mean(float(self.value.mean + stats["value_offset"]))
        note(self, stats | look)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        old, count, _ = minibatch(self, self.position)
        mask = old.batch.response_mask
        logprobs, _ = self.masked(old.batch, temperature=self.sampling.temperature)
        values = self.value(old.batch)[:, :-1]
        loss, stats = policy_loss(logprobs, old.logprobs, old.advantages, mask, clip=self.clip, count=count)
        v_loss, v_stats = value_loss(values, old.values, old.returns, mask, clip=self.value_clip, count=count)
        self.position += 1
        self.meter.add(stats | v_stats)
        return (loss + self.value_coef * v_loss) * loss_scale(self.trainer)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.journal.add(self, step_stats(self, "ppo/", where(self)))
        if self.position == self.items:
            self.journal.write(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        save_state(self, checkpoint)
        checkpoint["mask_policy"] = {name: x.detach().cpu() for name, x in self.mask_policy.state_dict().items()}  # nothing else has it

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        load_state(self, checkpoint)
        self.configure_model()
        self.mask_policy.load_state_dict(checkpoint["mask_policy"])

    # Evaluation, under the mask

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        evaluate(self, batch, batch_idx)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        report(self, "val")

    def on_test_epoch_end(self) -> None:
        report(self, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """One dictionary a prompt: prompt, response, reference where known, score, kl, length, eos_rate; sampled under the mask."""
        return sampled_rows(self, batch, PREDICTION)

    def export_networks(self) -> dict[str, CausalPolicy | ScalarModel]:
        """What ExportHF writes: policy and value network, each in its own directory; the policy samples from its own nucleus."""
        wanted = {"do_sample": True, "temperature": self.sampling.temperature, "top_p": self.mask["top_p"], "top_k": 0}
        self.policy.lm.generation_config.update(**wanted)
        return {"policy": self.policy, "value": self.value}
