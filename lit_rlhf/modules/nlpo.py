"""NLPO: PPO whose policy may only say what an earlier copy of itself finds likely."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lit_rlhf.batch import Batch
from lit_rlhf.checkpoints import RunRecord, fingerprint, settle
from lit_rlhf.data.common import load_trusted
from lit_rlhf.data.loader import run_seed
from lit_rlhf.functional import adapt_kl_coef, k1, policy_loss, value_loss
from lit_rlhf.generation import Sampling
from lit_rlhf.masked_policy import MaskedPolicy
from lit_rlhf.modules.common import PREDICTION, VALIDATION, StepMeter, as_sampling, loss_scale, optimizers, record, reseed, step_stats
from lit_rlhf.modules.evaluation import Evaluation
from lit_rlhf.modules.iteration_state import Iterations, check_iterating, check_sampling, gather_all, rank_rows
from lit_rlhf.modules.ppo_checks import load_value
from lit_rlhf.modules.sft import response_rows
from lit_rlhf.networks import CausalPolicy, ScalarModel
from lit_rlhf.optim import LRSchedule, Schedule
from lit_rlhf.pretrained import check_source, context_length_of, load_tokenizer
from lit_rlhf.rollout import Actors, Shaping, agree, collect, join_rollouts, shape
from lit_rlhf.scorers import load_scorer


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
            tokens_per_forward, rouge_tokenizer, dtype, attn_implementation, revision, trust_remote_code, activation_checkpointing,
            optimizer, scheduler: as in `PPO`.
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
        no_eos_score: float | None = None,
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
        check_sampling(self.sampling, reward_model, reward_fn)
        if not 0 < top_p <= 1 or min_tokens < 1 or mask_every < 1:
            raise ValueError(f"top_p {top_p} must be in (0, 1], min_tokens {min_tokens} and mask_every {mask_every} at least 1")
        if batch_size < 1 or batch_size % responses_per_prompt:
            raise ValueError(f"batch_size {batch_size} must be a multiple of responses_per_prompt {responses_per_prompt}")
        self.model, self.reward_fn = check_source(model), reward_fn
        self.reward_model = reward_model and check_source(reward_model)
        self.value_init = value_init or ("reward" if reward_model else "sft")
        self.mask, self.mask_every = {"top_p": top_p, "min_tokens": min_tokens}, mask_every
        self.num_prompts, self.responses_per_prompt = batch_size // responses_per_prompt, responses_per_prompt
        self.kl_coef, self.kl_target, self.kl_horizon = kl_coef, kl_target, kl_horizon
        self.clip, self.value_clip, self.value_coef, self.value_lr = clip, value_clip, value_coef, value_lr
        self.center_values, self.reward_baseline, self.tokens_per_forward = center_values, "mean", tokens_per_forward
        self.shaping = Shaping(no_eos_score, None, False, whiten_advantages, gamma, lam)
        self.source = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.loading = {"dtype": dtype, "attn_implementation": attn_implementation}
        self.training_setup = {"activation_checkpointing": activation_checkpointing}
        self.optimizer, self.scheduler = optimizer, scheduler
        self.policy: CausalPolicy | None = None
        self.mask_policy: CausalPolicy | None = None
        self.reference: CausalPolicy | None = None
        self.value: ScalarModel | None = None
        self.scorer: torch.nn.Module | None = None
        self.evaluation = Evaluation(("score", "kl", "length", "eos_rate"), rouge_tokenizer)
        self.meter, self.run, self.iterations, self.episodes = StepMeter(), RunRecord(), Iterations(ppo_epochs, minibatches), 0
        self.strict_loading = False  # frozen networks are not in our checkpoints
        self.samples: list[dict[str, Any]] = []
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
        return self.iterations.steps

    @property
    def masked(self) -> MaskedPolicy:
        """The policy that samples and learns."""
        return MaskedPolicy(self.policy, self.mask_policy, self.sampling.temperature, **self.mask)

    def setup(self, stage: str) -> None:
        check_iterating(self, stage)

    def configure_model(self) -> None:
        if self.policy is not None:
            return
        reseed(0)
        loading = self.loading | self.source | {"tokenizer": self.tokenizer}
        self.policy = CausalPolicy.load(self.model, **loading, **self.training_setup)
        self.mask_policy, self.reference = (CausalPolicy.load(self.model, **loading).requires_grad_(False) for _ in range(2))
        self.value = load_value(self, self.loading | self.source)
        self.scorer = load_scorer(self.reward_fn or self.reward_model, **({} if self.reward_fn else self.loading))
        self.run.fingerprints = {"model": fingerprint(self.model, self.source["revision"])}

    def configure_optimizers(self) -> dict[str, Any]:
        rate = {} if self.value_lr is None else {"lr": self.value_lr}
        groups = [{"params": list(self.policy.parameters())}, {"params": list(self.value.parameters()), **rate}]
        return optimizers(self, groups, self.optimizer, self.scheduler)

    def on_fit_start(self) -> None:
        self.policy.train()
        self.value.train()

    def on_train_start(self) -> None:
        self.iterations.begin_anew(self)
        settle(self)

    # One iteration

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.iterations.begin(self, batch_idx):
            self._collect()

    def _collect(self) -> None:
        """Takes the mask policy anew where it is time, samples, and makes experience of it."""
        number = self.iterations.number
        if number % self.mask_every == 0:
            self.mask_policy.load_state_dict(self.policy.state_dict())
        prompts = self.trainer.datamodule.prompts(0 if self.trainer.overfit_batches else number, self.num_prompts)
        mine = rank_rows(self, self.num_prompts)
        setting = {"num_responses": self.responses_per_prompt, "tokens_per_forward": self.tokens_per_forward, "rows": mine}
        actors = Actors(self.masked, self.reference, self.value, self.scorer)
        with self.trainer.precision_plugin.forward_context():
            made = gather_all(lambda: collect(actors, prompts.select_prompts(mine), self.sampling, key=(run_seed(), number), **setting))
        center = self.center_values and self.episodes == 0
        experience, stats = shape(join_rollouts(made), self.kl_coef, self.shaping, center_values=center)
        if center:
            self.value.set_mean(float(self.value.mean + stats["value_offset"]))
        self.episodes += self.num_prompts * self.responses_per_prompt
        stats |= {"kl_coef": torch.tensor(self.kl_coef), "episodes": torch.tensor(float(self.episodes))}
        if self.kl_target is not None:
            moved = {"target": self.kl_target, "horizon": self.kl_horizon, "n": self.num_prompts * self.responses_per_prompt}
            self.kl_coef = adapt_kl_coef(self.kl_coef, float(stats["kl"]), **moved)
        self.iterations.fill(self, experience, stats)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        old, count = self.iterations.micro_batch(self)
        mask = old.batch.response_mask
        logprobs, _ = self.masked(old.batch, temperature=self.sampling.temperature)
        values = self.value(old.batch)[:, :-1]
        loss, stats = policy_loss(logprobs, old.logprobs, old.advantages, mask, clip=self.clip, count=count)
        v_loss, v_stats = value_loss(values, old.values, old.returns, mask, clip=self.value_clip, count=count)
        self.meter.add(stats | v_stats)
        return (loss + self.value_coef * v_loss) * loss_scale(self.trainer)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.iterations.log(self, step_stats(self, "ppo/", f", iteration {self.iterations.number}"))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.iterations.save(self, checkpoint)
        mask = {name: x.detach().cpu() for name, x in self.mask_policy.state_dict().items()}  # a policy of earlier: nothing else has it
        checkpoint["nlpo"] = {"kl_coef": self.kl_coef, "episodes": self.episodes, "mask": mask}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.iterations.load(self, checkpoint)
        state = checkpoint["nlpo"]
        self.kl_coef, self.episodes = state["kl_coef"], state["episodes"]
        if self.mask_policy is None:
            self.configure_model()
        self.mask_policy.load_state_dict(state["mask"])

    # Evaluation: `val/…` and `test/…` are the same numbers

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluation.add(self, self._write(batch, VALIDATION), batch_idx)

    def on_validation_epoch_end(self) -> None:
        self.evaluation.report(self)

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """One dictionary a prompt: prompt, response, reference where known, score, kl, length, eos_rate; sampled under the mask."""
        return self._write(batch, PREDICTION)

    def _write(self, batch: Batch, purpose: int) -> list[dict[str, Any]]:
        actors = Actors(self.masked, self.reference, None, self.scorer)
        setting = {"key": (run_seed(), purpose), "tokens_per_forward": self.tokens_per_forward}
        made = agree(lambda: collect(actors, batch, self.sampling, **setting))
        mask = made.batch.response_mask
        kl, lengths = (k1(made.logprobs, made.ref_logprobs) * mask).sum(1).tolist(), mask.sum(1).tolist()
        more = {"score": made.scores.tolist(), "kl": kl, "length": lengths, "eos_rate": made.finished.float().tolist()}
        return response_rows(batch.columns, made.texts, **more)

    def export_networks(self) -> dict[str, CausalPolicy | ScalarModel]:
        """What ExportHF writes: policy and value network, each in its own directory; the policy samples from its own nucleus."""
        wanted = {"do_sample": True, "temperature": self.sampling.temperature, "top_p": self.mask["top_p"], "top_k": 0}
        self.policy.lm.generation_config.update(**wanted)
        return {"policy": self.policy, "value": self.value}
