"""Quark: a pool of responses sorted by reward, each learnt behind the token of its quantile; then the best quantile is asked for."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lit_rlhf.batch import Batch, join
from lit_rlhf.checkpoints import RunRecord, settle
from lit_rlhf.data.common import load_trusted
from lit_rlhf.data.loader import rolling, run_seed
from lit_rlhf.functional import k1, logprobs_kl_entropy, quantiles, quark_loss
from lit_rlhf.generation import Sampled, Sampling, sample
from lit_rlhf.metrics import Rouge
from lit_rlhf.modules.common import PREDICTION, VALIDATION, StepMeter, as_sampling, loss_scale, optimizers, record, reseed, step_stats
from lit_rlhf.modules.iterations import add_rows, begin, log_rollout, minibatch, own_prompts, report, val_metrics
from lit_rlhf.modules.ppo_checks import check_one_device, check_rewarded, check_run
from lit_rlhf.modules.ppo_state import Journal, begin_anew, load_state, save_state, source_fingerprints, where
from lit_rlhf.modules.sft import response_rows
from lit_rlhf.networks import CausalPolicy, lay_out
from lit_rlhf.optim import LRSchedule, Schedule
from lit_rlhf.perf import Clock
from lit_rlhf.pretrained import check_source, context_length_of, load_tokenizer
from lit_rlhf.quantile_tokens import add_quantile_tokens, conditioned, one_each, with_tokens
from lit_rlhf.rollout import agree, gather_parts, score_texts
from lit_rlhf.scorers import load_scorer


class Quark(L.LightningModule):
    """Quantized reward conditioning (Lu et al. 2022, *Quark: Controllable text generation with reinforced unlearning*).

    Each iteration samples responses (the first from the model as it is, later ones behind the best quantile's token), adds them to a pool
    of all responses so far, sorts it into quantiles by score, and takes `minibatches` optimiser steps on `quark_loss` of rows drawn from
    it, each behind its quantile's token. The reference never sees a token. Needs a `PromptDataModule`. Validation logs `val/score`,
    `val/kl` (k1, to the reference), `val/length`, `val/eos_rate` and `val/rouge…` behind the best token. The export's tokenizer has the
    tokens: elsewhere, put `<|quantile_{K-1}|>` in front of a prompt.

    Args:
        model: the SFT directory or hub name; for `predict` an exported one.
        reward_model, reward_fn: as in `BestOfN`; one of the two.
        num_quantiles: K. num_prompts: sampled for in an iteration, over all ranks. responses_per_prompt: of each.
        minibatches: optimiser steps an iteration. minibatch_size: rows of each, over all ranks and micro-batches.
        kl_coef, entropy_coef: weights of the exact KL divergence to the reference and of the entropy, per token.
        no_eos_score: replaces the score of a response that did not end; None leaves it.
        sampling, rouge_tokenizer, dtype, attn_implementation, revision, trust_remote_code, activation_checkpointing, optimizer, scheduler:
            as in `SFT`; the sampling is that of iterations, validation and `predict`.
    """

    def __init__(
        self,
        model: str,
        *,
        reward_model: str | None = None,
        reward_fn: Callable[..., Any] | None = None,
        num_quantiles: int = 5,
        num_prompts: int = 256,
        responses_per_prompt: int = 1,
        minibatches: int = 16,
        minibatch_size: int = 64,
        kl_coef: float = 0.05,
        entropy_coef: float = 0.06,
        no_eos_score: float | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008
        rouge_tokenizer: Any = "default",
        dtype: str = "float32",
        attn_implementation: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        activation_checkpointing: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5, eps=1e-8, weight_decay=0.0),  # noqa: B008
        scheduler: Schedule | LRSchedule = Schedule("linear"),  # noqa: B008
    ) -> None:
        super().__init__()
        self.sampling = as_sampling(sampling)
        record(self, self.sampling)
        self.model, self.reward_model, self.reward_fn = check_source(model), reward_model, reward_fn
        self.num_quantiles, self.num_prompts, self.responses_per_prompt = num_quantiles, num_prompts, responses_per_prompt
        self.epochs, self.minibatches, self.minibatch_size, self.no_eos_score = 1, minibatches, minibatch_size, no_eos_score
        check_rewarded(self)
        if num_quantiles < 2 or min(num_prompts, minibatch_size) < 1:
            raise ValueError(
                f"num_quantiles {num_quantiles} must be at least 2, num_prompts {num_prompts}, minibatch_size {minibatch_size} at least 1"
            )
        self.setting = {"kl_coef": kl_coef, "entropy_coef": entropy_coef}
        self.source = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.loading = {"dtype": dtype, "attn_implementation": attn_implementation}
        self.activation_checkpointing = activation_checkpointing
        self.optimizer, self.scheduler = optimizer, scheduler
        self.policy: CausalPolicy | None = None
        self.reference: CausalPolicy | None = None
        self.scorer: torch.nn.Module | None = None
        self.rouge, self.val_metrics = Rouge(tokenizer=rouge_tokenizer), val_metrics()
        self.meter, self.run, self.journal, self.clock = StepMeter(), RunRecord(), Journal(), Clock()
        self.iteration, self.position, self.step_position, self.episodes, self.stopped = 0, 0, 0, 0, False
        self.experience: Batch | None = None
        self.pool: Batch | None = None  # a prompt (without a quantile's token) and a response a row
        self.scores = torch.zeros(0)
        self.strict_loading = False  # frozen networks are not in our checkpoints
        self.samples: list[dict[str, Any]] = []
        self._tokenizer: Any = None
        self.token_ids: list[int] = []

    load_from_checkpoint = classmethod(load_trusted)  # type: ignore[assignment]

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.model, **self.source)
            self.token_ids = add_quantile_tokens(self._tokenizer, self.num_quantiles)
        return self._tokenizer

    @property
    def context_length(self) -> int | None:
        """One less than the model's: a quantile's token stands before every prompt."""
        length = context_length_of(self.model, **self.source)
        return length and length - 1

    @property
    def steps_per_iteration(self) -> int:
        return self.minibatches

    @property
    def items(self) -> int:
        """Micro-batches per iteration."""
        return self.minibatches * self.trainer.accumulate_grad_batches

    def setup(self, stage: str) -> None:
        check_run(self, stage, prompts=self.minibatches * self.minibatch_size)
        check_one_device(self)
        if self.num_prompts < self.trainer.world_size:
            raise ValueError(f"num_prompts {self.num_prompts} must be at least one for each of the {self.trainer.world_size} ranks")

    def configure_model(self) -> None:
        if self.policy is not None:
            return
        reseed(0)  # the tokens' embeddings are drawn from the run's seed
        loading, tokenizer = self.loading | self.source, self.tokenizer
        plain = CausalPolicy.load(self.model, activation_checkpointing=self.activation_checkpointing, **loading)
        self.policy = with_tokens(plain, tokenizer, self.token_ids)
        self.reference = CausalPolicy.load(self.model, **loading).requires_grad_(False)
        self.reference.banned[[i for i in self.token_ids if i < len(self.reference.banned)]] = True  # where `model` has them already
        trusted = {"trust_remote_code": self.source["trust_remote_code"]}
        self.scorer = load_scorer(self.reward_fn or self.reward_model, **({} if self.reward_fn else self.loading | trusted))
        self.run.fingerprints = source_fingerprints(self)

    def configure_optimizers(self) -> dict[str, Any]:
        return optimizers(self, [{"params": list(self.policy.parameters())}], self.optimizer, self.scheduler)

    def on_fit_start(self) -> None:
        self.policy.train()

    def on_train_start(self) -> None:
        if self.run.resumed is None:
            self.pool, self.scores = None, torch.zeros(0)
        begin_anew(self)
        settle(self)

    # One iteration

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        begin(self, batch_idx)

    def _collect(self) -> None:
        """Samples on every rank its part, sorts the pool anew and draws the iteration's rows from it."""
        self.clock.begin()
        prompts, mine = own_prompts(self)
        part = replace(prompts.select_prompts(mine), rows=list(mine)).to(self.device)

        def make() -> tuple[Batch, Tensor, Tensor]:
            made = self._sample(part, (run_seed(), self.iteration), self.pool is not None, self.responses_per_prompt)
            found = part.with_responses(made.batch.response_ids, made.batch.response_mask, made.batch.prompt_of)
            return one_each(found).to("cpu"), score_texts(self.scorer, made.batch, made.texts).float().cpu(), made.finished.cpu()

        with self.trainer.precision_plugin.forward_context():
            batches, scores, ended = zip(*gather_parts(make), strict=True)
        new, raw, finished = join(batches), torch.cat(scores), torch.cat(ended)
        shaped = raw if self.no_eos_score is None else torch.where(finished, raw, torch.full_like(raw, self.no_eos_score))
        self.pool = new if self.pool is None else join([self.pool, new])
        self.scores = torch.cat([self.scores, shaped])
        quantile = quantiles(self.scores, self.num_quantiles)
        rows = rolling(len(self.scores), 0, self.minibatches * self.minibatch_size, run_seed(), self.iteration)
        pool, self.episodes = self.pool, len(self.scores)  # row i of the pool is prompt i's
        drawn = [x[rows] for x in (pool.prompt_ids, pool.prompt_mask, pool.response_ids, pool.response_mask)]
        self.experience = Batch(*drawn, torch.arange(len(rows)), columns={"quantile": quantile[rows].tolist()})
        best = self.scores[quantile == self.num_quantiles - 1].mean()
        stats = {"score": raw.mean(), "score_std": raw.std(unbiased=False), "best_quantile_score": best}
        stats |= {"eos_rate": finished.float().mean(), "length": new.response_mask.sum(1).float().mean()}
        log_rollout(self, stats | {"episodes": torch.tensor(float(self.episodes))})

    def _sample(self, prompts: Batch, key: tuple[int, ...], best: bool, num_responses: int = 1) -> Sampled:
        """Responses to the prompts, behind the best quantile's token or as they are; the sampled batch's prompts have the token."""
        prompts = self._conditioned(prompts, [self.num_quantiles - 1] * prompts.num_prompts) if best else prompts
        return sample(self.policy, prompts, self.sampling, num_responses=num_responses, key=key)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        part, count, _ = minibatch(self, self.position)
        mask = part.response_mask
        states, head = response_states(self.policy, self._conditioned(part, part.columns["quantile"]))
        with torch.no_grad():
            ref_states, ref_head = response_states(self.reference, part)
        ids, banned = part.response_ids[mask], self.policy.banned
        found = logprobs_kl_entropy(states, ids, ref_states, head, ref_head, banned=banned)
        logprobs, kl, entropy = (x.new_zeros(mask.shape).masked_scatter(mask, x) for x in found)
        loss, stats = quark_loss(logprobs, kl, entropy, mask, count=count, **self.setting)
        self.position += 1
        self.meter.add(stats)
        return loss * loss_scale(self.trainer)

    def _conditioned(self, batch: Batch, quantile: list[int]) -> Batch:
        return conditioned(batch, torch.tensor(self.token_ids)[quantile], self.tokenizer.bos_token_id)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.journal.add(self, step_stats(self, "train/", where(self)))
        if self.position == self.items:
            self.journal.write(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        save_state(self, checkpoint)
        if self.pool is not None:
            checkpoint["quark"] = {"pool": self.pool.state(), "scores": self.scores}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        load_state(self, checkpoint)
        if "quark" in checkpoint:
            self.pool, self.scores = Batch(**checkpoint["quark"]["pool"]), checkpoint["quark"]["scores"]

    # Evaluation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        add_rows(self, self._write(batch, VALIDATION), batch_idx)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        report(self, "val")

    def on_test_epoch_end(self) -> None:
        report(self, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """One dictionary a prompt: prompt, response, reference where known, score, kl to `model`, length, eos_rate."""
        return self._write(batch, PREDICTION)

    def _write(self, batch: Batch, purpose: int) -> list[dict[str, Any]]:
        made = self._sample(batch, (run_seed(), purpose), True)
        temperature, mask = self.sampling.temperature, made.batch.response_mask
        plain = batch.with_responses(made.batch.response_ids, mask, made.batch.prompt_of)
        of = [net(b, temperature=temperature, ban=True)[0] for net, b in ((self.policy, made.batch), (self.reference, plain))]
        scores = agree(lambda: score_texts(self.scorer, made.batch, made.texts))
        more = {"score": scores.tolist(), "kl": (k1(*of) * mask).sum(1).tolist(), "length": mask.sum(1).tolist()}
        return response_rows(batch.columns, made.texts, **more, eos_rate=made.finished.float().tolist())

    def export_networks(self) -> dict[str, CausalPolicy]:
        """What ExportHF writes: the policy, at the directory itself; its tokenizer has the tokens."""
        return {"": self.policy}


def response_states(policy: CausalPolicy, batch: Batch) -> tuple[Tensor, Any]:
    """The states (T, H) before each response token, and the head that makes logits of them."""
    layout = lay_out(policy, batch)
    hidden, head = policy._hidden(layout)
    return hidden.flatten(0, 1)[layout.state_index[:, :-1][batch.response_mask]], head
