"""SFT: supervised fine-tuning of a causal language model on references, validated on what it writes."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric

from lit_rlhf.batch import Batch
from lit_rlhf.checkpoints import RunRecord, fingerprint, load, save, settle
from lit_rlhf.data.common import load_trusted
from lit_rlhf.data.loader import run_seed
from lit_rlhf.functional import lm_loss
from lit_rlhf.generation import Sampling, sample
from lit_rlhf.metrics import Rouge
from lit_rlhf.modules.common import (
    PREDICTION,
    VALIDATION,
    StepMeter,
    as_sampling,
    loss_scale,
    optimizers,
    record,
    reseed,
    reset_metrics,
    step_stats,
)
from lit_rlhf.networks import CausalPolicy
from lit_rlhf.optim import LRSchedule, Schedule
from lit_rlhf.pretrained import check_source, context_length_of, load_tokenizer
from lit_rlhf.sharding import clip_gradients, shard
from lit_rlhf.strategies import check_strategy


class SFT(L.LightningModule):
    """Maximises the likelihood of the response tokens, EOS included (Stiennon et al. 2020, B.1; defaults are Huang et al. 2024's).

    What counts in the loss is the data's decision (`SFTDataModule(prompt_loss=True)` counts the whole text), and the loss divides by the
    tokens of the whole optimiser step. Validation writes a response for every prompt and compares it with the reference: `val/loss`,
    `val/rouge1`, `val/rouge2`, `val/rougeL`, their mean `val/rouge_mean`, `val/length`, `val/eos_rate`.

    Args:
        model: a Hugging Face directory or hub name.
        sampling: how validation and `predict` write responses; greedy by default.
        rouge_tokenizer: "default" (rouge-score's), "characters" for scripts without spaces, or a callable.
        dropout: keep the model's own dropout while training.
        dtype: of the weights; they train in float32 unless asked. The Trainer's `precision` says what is computed in.
        attn_implementation, revision, trust_remote_code: as in transformers' `from_pretrained`.
        peft: a peft config, e.g. `peft.LoraConfig`; only the adapter trains, and the export holds the merged weights.
        frozen_layers: how many of the lowest blocks do not train, embeddings included.
        activation_checkpointing: keep each block's input alone and compute the block again in backward: memory for about a third more time.
        optimizer: parameters -> optimizer.
        scheduler: (optimizer, total_steps) -> scheduler, stepped every update.
    """

    def __init__(
        self,
        model: str,
        *,
        sampling: Sampling = Sampling(temperature=0.0),  # noqa: B008
        rouge_tokenizer: Any = "default",
        dropout: bool = False,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        peft: Any = None,
        frozen_layers: int = 0,
        activation_checkpointing: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-6, eps=1e-5, weight_decay=0.01),  # noqa: B008
        scheduler: Schedule | LRSchedule = Schedule("cosine"),  # noqa: B008
    ) -> None:
        super().__init__()
        self.sampling = as_sampling(sampling)
        record(self, self.sampling)
        self.model = check_source(model)
        self.loading = {
            "dtype": dtype,
            "attn_implementation": attn_implementation,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
            "frozen_layers": frozen_layers,
            "peft": peft,
            "activation_checkpointing": activation_checkpointing,
        }
        self.dropout = dropout
        self.optimizer, self.scheduler = optimizer, scheduler
        self.policy: CausalPolicy | None = None
        self.rouge, self.val_loss = Rouge(tokenizer=rouge_tokenizer), MeanMetric()
        self.val_length, self.val_eos = MeanMetric(), MeanMetric()
        self.meter, self.run = StepMeter(), RunRecord()
        self.strict_loading = False  # weights that do not train are not in our checkpoints
        self.samples: list[dict[str, Any]] = []
        self._tokenizer: Any = None

    load_from_checkpoint = classmethod(load_trusted)  # type: ignore[assignment]

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(
                self.model, revision=self.loading["revision"], trust_remote_code=self.loading["trust_remote_code"]
            )
        return self._tokenizer

    @property
    def context_length(self) -> int | None:
        return context_length_of(self.model, revision=self.loading["revision"], trust_remote_code=self.loading["trust_remote_code"])

    def setup(self, stage: str) -> None:
        check_strategy(self)

    def configure_model(self) -> None:
        if self.policy is None:
            reseed(0)  # an adapter is drawn from the run's seed, on every rank the same
            network = CausalPolicy.load(self.model, tokenizer=self.tokenizer, dropout=self.dropout, **self.loading)
            self.policy = shard(network, self._trainer)
            self.run.fingerprints = {"model": fingerprint(self.model, self.loading["revision"])}

    def configure_optimizers(self) -> dict[str, Any]:
        return optimizers(self, [{"params": list(self.policy.parameters())}], self.optimizer, self.scheduler)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        clip_gradients(self, optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_fit_start(self) -> None:
        self.policy.train()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        micro = self.run.begin(self.trainer, batch_idx)
        reseed(self.trainer.global_step, micro, self.global_rank)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, stats = self._loss(batch, batch.count)
        self.meter.add(stats)
        return loss * loss_scale(self.trainer)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log_dict(step_stats(self, "train/", f", epoch {self.trainer.current_epoch}"), prog_bar=True)

    def on_train_start(self) -> None:
        settle(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        load(self, checkpoint)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """One dictionary a prompt: prompt, response, and the reference where there is one."""
        written = sample(self.policy, batch, self.sampling, key=(run_seed(), PREDICTION)).texts
        return response_rows(batch.columns, written)

    def export_networks(self) -> dict[str, CausalPolicy]:
        """What ExportHF writes: the policy, at the directory itself."""
        return {"": self.policy}

    def _loss(self, batch: Batch, count: float | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over the tokens that count / count (None: those of this batch)."""
        logprobs, prompt_logprobs = self.policy(batch)
        mask = batch.response_mask
        if prompt_logprobs is not None:
            logprobs = torch.cat([logprobs.flatten(), prompt_logprobs.flatten()])
            mask = torch.cat([mask.flatten(), batch.prompt_loss_mask.flatten()])
        return lm_loss(logprobs, mask, count=count)

    def _evaluate(self, batch: Batch, batch_idx: int) -> None:
        if batch_idx == 0:
            self.samples = []
        if batch.num_responses:
            tokens = batch.response_mask.sum() + (0 if batch.prompt_loss_mask is None else batch.prompt_loss_mask.sum())
            self.val_loss.update(self._loss(batch, None)[0], weight=tokens)
        written = sample(self.policy, batch, self.sampling, key=(run_seed(), VALIDATION))
        self.val_length.update(written.batch.response_mask.sum(1).float())
        self.val_eos.update(written.finished.float())
        rows = response_rows(batch.columns, written.texts)
        scored = [r for r in rows if r.get("reference") is not None]
        self.rouge.update([r["response"] for r in scored], [r["reference"] for r in scored])
        self.samples += rows

    def _report(self, stage: str) -> None:
        means = {"loss": self.val_loss, "length": self.val_length, "eos_rate": self.val_eos}
        values = {name: metric.compute() for name, metric in means.items() if metric.update_called} | self.rouge.compute()
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()})
        reset_metrics(*means.values(), self.rouge)


def response_rows(columns: Mapping[str, list[Any]], texts: list[str], **more: list[Any]) -> list[dict[str, Any]]:
    """One dictionary a prompt for sample tables and jsonl files: prompt, response, reference where known, and `more`."""
    rows = []
    for i, text in enumerate(texts):
        row = {"prompt": columns["prompt"][i], "response": text}
        if "reference" in columns:
            row["reference"] = columns["reference"][i]
        rows.append(row | {name: values[i] for name, values in more.items()})
    return rows
