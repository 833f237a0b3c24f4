"""RFT: best-of-n distillation. Sample n responses, keep the best, fine-tune on them, repeat."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lit_rlhf.batch import Batch
from lit_rlhf.best_of import Candidates, candidates
from lit_rlhf.checkpoints import RunRecord, settle
from lit_rlhf.data.common import load_trusted
from lit_rlhf.data.loader import run_seed
from lit_rlhf.data.tokenise import Encoder
from lit_rlhf.functional import best_of_each, first_of_equal, lm_loss
from lit_rlhf.generation import Sampling, sample
from lit_rlhf.metrics import Rouge
from lit_rlhf.modules.common import PREDICTION, VALIDATION, StepMeter, as_sampling, loss_scale, optimizers, record, reseed, step_stats
from lit_rlhf.modules.iterations import add_rows, begin, log_rollout, minibatch, own_prompts, report, val_metrics
from lit_rlhf.modules.ppo_checks import check_one_device, check_parts, check_rewarded, check_run
from lit_rlhf.modules.ppo_state import Journal, begin_anew, load_state, save_state, source_fingerprints, where
from lit_rlhf.modules.sft import response_rows
from lit_rlhf.networks import CausalPolicy
from lit_rlhf.optim import LRSchedule, Schedule
from lit_rlhf.perf import Clock
from lit_rlhf.pretrained import check_source, context_length_of, load_tokenizer
from lit_rlhf.rollout import agree, gather_parts, score_texts
from lit_rlhf.scorers import load_scorer
from lit_rlhf.sharding import clip_gradients


class RFT(L.LightningModule):
    """Expert iteration: the policy learns the best of its own responses by the language-model loss, and samples again.

    Each iteration samples n responses for each of `num_prompts` prompts, keeps the `keep` best distinct ones that ended (RAFT, Dong et al.
    2023; with `min_score` RFT, Yuan et al. 2023) and takes epochs x minibatches optimiser steps on them. There is no KL penalty: how far
    the policy goes is bounded by the iterations (best-of-n of its own: at most log n - (n - 1)/n nats each). Needs a `PromptDataModule`.
    Validation logs `val/score`, `val/length`, `val/eos_rate` and `val/rouge…` of single samples.

    Args:
        model: the SFT directory or hub name.
        reward_model, reward_fn: as in `BestOfN`; one of the two.
        n: responses per prompt. keep: how many of them to learn from. min_score: only those that score at least this.
        num_prompts: prompts an iteration, over all ranks.
        epochs, minibatches: passes over what was kept, and optimiser steps per pass.
        sampling, rouge_tokenizer, dtype, attn_implementation, revision, trust_remote_code, peft, frozen_layers, activation_checkpointing,
            optimizer, scheduler: as in `SFT`; the sampling is that of iterations, validation and `predict`.
    """

    def __init__(
        self,
        model: str,
        *,
        reward_model: str | None = None,
        reward_fn: Callable[..., Any] | None = None,
        n: int = 16,
        keep: int = 1,
        min_score: float | None = None,
        num_prompts: int = 256,
        epochs: int = 1,
        minibatches: int = 4,
        sampling: Sampling = Sampling(),  # noqa: B008
        rouge_tokenizer: Any = "default",
        dtype: str = "float32",
        attn_implementation: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        peft: Any = None,
        frozen_layers: int = 0,
        activation_checkpointing: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-6, eps=1e-5, weight_decay=0.01),  # noqa: B008
        scheduler: Schedule | LRSchedule = Schedule("constant"),  # noqa: B008
    ) -> None:
        super().__init__()
        self.sampling = as_sampling(sampling)
        record(self, self.sampling)
        self.model, self.reward_model, self.reward_fn = check_source(model), reward_model, reward_fn
        self.epochs, self.minibatches = epochs, minibatches
        check_rewarded(self)
        if not 1 <= keep <= n or num_prompts < 1:
            raise ValueError(f"n {n} must be at least keep {keep}, both and num_prompts {num_prompts} at least 1")
        self.n, self.keep, self.min_score, self.num_prompts = n, keep, min_score, num_prompts
        self.source = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.loading = {"dtype": dtype, "attn_implementation": attn_implementation}
        self.training_setup = {"peft": peft, "frozen_layers": frozen_layers, "activation_checkpointing": activation_checkpointing}
        self.optimizer, self.scheduler = optimizer, scheduler
        self.policy: CausalPolicy | None = None
        self.scorer: torch.nn.Module | None = None
        self.rouge, self.val_metrics = Rouge(tokenizer=rouge_tokenizer), val_metrics(("score", "length", "eos_rate"))
        self.meter, self.run, self.journal, self.clock = StepMeter(), RunRecord(), Journal(), Clock()
        self.strict_loading = False  # frozen networks are not in our checkpoints
        self.samples: list[dict[str, Any]] = []
        self.iteration, self.position, self.step_position, self.episodes, self.stopped = 0, 0, 0, 0, False
        self.experience: Batch | None = None
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
        return self.epochs * self.minibatches

    @property
    def items(self) -> int:
        """Micro-batches per iteration."""
        return self.steps_per_iteration * self.trainer.accumulate_grad_batches

    def setup(self, stage: str) -> None:
        check_run(self, stage)
        check_one_device(self)

    def configure_model(self) -> None:
        if self.policy is None:
            reseed(0)  # an adapter is drawn from the run's seed
            self.policy = CausalPolicy.load(self.model, tokenizer=self.tokenizer, **self.loading, **self.source, **self.training_setup)
            trusted = {"trust_remote_code": self.source["trust_remote_code"]}
            self.scorer = load_scorer(self.reward_fn or self.reward_model, **({} if self.reward_fn else self.loading | trusted))
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

    # One iteration

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        begin(self, batch_idx)

    def _collect(self) -> None:
        """Samples and scores n responses for each prompt, on every rank its part, and keeps the best of all."""
        self.clock.begin()
        prompts, mine = own_prompts(self)
        part = replace(prompts.select_prompts(mine), rows=list(mine))
        with self.trainer.precision_plugin.forward_context():
            made = gather_parts(lambda: candidates(self.policy, self.scorer, part, self.sampling, self.n, (run_seed(), self.iteration)))
        found = Candidates(
            [row for c in made for row in c.texts], *(torch.cat([getattr(c, x) for c in made]) for x in ("scores", "finished", "lengths"))
        )
        kept = best_of_each(found.scores, found.finished & first_of_equal(found.texts), self.keep, self.min_score)
        more = f"sample more of them (num_prompts), or keep more responses: of {kept.numel()}, {int(kept.sum())} ended and scored enough;"
        check_parts(self, int(kept.any(1).sum()), more)
        self.experience = kept_batch(self.tokenizer, prompts, found.texts, kept)
        self.episodes += kept.numel()
        stats = {"score": found.scores[kept].mean(), "mean_score": found.scores.mean(), "episodes": torch.tensor(float(self.episodes))}
        stats |= {"score_std": found.scores.std(unbiased=False), "kept": kept.float().mean(), "eos_rate": found.finished.float().mean()}
        log_rollout(self, stats | {"length": found.lengths.float().mean()})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        part, count, _ = minibatch(self, self.position)
        loss, stats = lm_loss(self.policy(part)[0], part.response_mask, count=count)
        self.position += 1
        self.meter.add(stats)
        return loss * loss_scale(self.trainer)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.journal.add(self, step_stats(self, "train/", where(self)))
        if self.position == self.items:
            self.journal.write(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        save_state(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        load_state(self, checkpoint)

    # Evaluation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        add_rows(self, self._write(batch, VALIDATION), batch_idx)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        report(self, "val")

    def on_test_epoch_end(self) -> None:
        report(self, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """One dictionary a prompt: prompt, response, reference where known, score, length, eos_rate."""
        return self._write(batch, PREDICTION)

    def _write(self, batch: Batch, purpose: int) -> list[dict[str, Any]]:
        made = sample(self.policy, batch, self.sampling, key=(run_seed(), purpose))
        scores = agree(lambda: score_texts(self.scorer, made.batch, made.texts))
        lengths, ended = made.batch.response_mask.sum(1).tolist(), made.finished.float().tolist()
        return response_rows(batch.columns, made.texts, score=scores.tolist(), length=lengths, eos_rate=ended)

    def export_networks(self) -> dict[str, CausalPolicy]:
        """What ExportHF writes: the policy, at the directory itself."""
        return {"": self.policy}


def kept_batch(tokenizer: Any, prompts: Batch, texts: list[list[str]], kept: Tensor) -> Batch:
    """The prompts that have responses (M, n) that are `kept`, and these, tokenised as an SFT file's would be."""
    encoder = Encoder(tokenizer)
    rows = kept.any(1).nonzero().squeeze(1).tolist()
    of = [(i, texts[m][k]) for i, m in enumerate(rows) for k in kept[m].nonzero().squeeze(1).tolist()]
    ids = encoder.ids([text for _, text in of])
    ids_of_prompts = [prompts.prompt_ids[m][prompts.prompt_mask[m]].tolist() for m in rows]
    return Batch.of(ids_of_prompts, [encoder.response(row) for row in ids], [i for i, _ in of])
