"""DPO: a policy learnt from choices between two responses directly, without a reward model and without sampling."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric

from lit_rlhf.batch import Batch
from lit_rlhf.checkpoints import RunRecord, fingerprint, load, save, settle
from lit_rlhf.data.common import eval_split, load_trusted
from lit_rlhf.functional import dpo_loss
from lit_rlhf.functional.dpo import DPOLoss
from lit_rlhf.metrics import PairAccuracy, group_columns, shown_accuracies
from lit_rlhf.modules.common import StepMeter, loss_scale, optimizers, record, reseed, reset_metrics, scored_rows, step_stats
from lit_rlhf.modules.reference import ReferenceLogprobs
from lit_rlhf.networks import CausalPolicy
from lit_rlhf.optim import LRSchedule, Schedule
from lit_rlhf.pretrained import check_source, context_length_of, load_tokenizer
from lit_rlhf.sharding import clip_gradients, shard
from lit_rlhf.strategies import check_strategy


class DPO(L.LightningModule):
    """Direct preference optimisation (Rafailov et al. 2023) of pairs or rankings; the implicit reward is beta * log(pi / pi_ref).

    Needs a `PairwiseDataModule`: a prompt's responses share its computation. The reference is `model` as it was; its log-probs are computed
    once, before the first step, and then it is dropped (with `peft` it is the policy with its adapter off). Validation reports `val/loss`,
    `val/accuracy` of the implicit rewards (also by column, as PairwiseReward) and `val/margin`.

    Args:
        model: the SFT stage's directory, or a hub name.
        beta: strength of the KL penalty to the reference.
        loss: "sigmoid" (Rafailov et al. 2023) or "ipo" (Azar et al. 2023).
        label_smoothing: the share of labels taken to be flipped, 0 to 0.5 (conservative DPO).
        length_average: divide a response's log-ratio by its tokens; None: for "ipo" alone, as TRL does on the word of IPO's authors.
        sft_coef: weight of -log pi(chosen) / tokens, the mean over pairs (Pang et al. 2024, arXiv:2404.19733): against chosen responses
            that become less likely too.
        tokens_per_forward: how many tokens a pass of the reference may hold.
        dtype, attn_implementation, revision, trust_remote_code, peft, frozen_layers, activation_checkpointing, optimizer, scheduler: as in
            `SFT`.
    """

    def __init__(
        self,
        model: str,
        *,
        beta: float = 0.1,
        loss: DPOLoss = "sigmoid",
        label_smoothing: float = 0.0,
        length_average: bool | None = None,
        sft_coef: float = 0.0,
        tokens_per_forward: int = 16384,
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
        record(self)
        if beta <= 0 or not 0 <= label_smoothing < 0.5 or sft_coef < 0 or tokens_per_forward < 1:
            raise ValueError(
                f"DPO needs beta above 0 (got {beta}), label_smoothing of at least 0 and below 0.5 (got {label_smoothing}), sft_coef of at "
                f"least 0 (got {sft_coef}) and tokens_per_forward of at least 1 (got {tokens_per_forward})"
            )
        self.model = check_source(model)
        self.setting: dict[str, Any] = {"beta": beta, "kind": loss, "label_smoothing": label_smoothing}
        self.length_average = loss == "ipo" if length_average is None else length_average
        self.sft_coef, self.tokens_per_forward = sft_coef, tokens_per_forward
        self.source = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.loading = {"dtype": dtype, "attn_implementation": attn_implementation}
        self.training_setup = {"peft": peft, "frozen_layers": frozen_layers, "activation_checkpointing": activation_checkpointing}
        self.adapted = peft is not None
        self.optimizer, self.scheduler = optimizer, scheduler
        self.policy: CausalPolicy | None = None
        self.reference = ReferenceLogprobs()
        self.accuracy, self.val_loss, self.val_margin = PairAccuracy(), MeanMetric(), MeanMetric()
        self.meter, self.run = StepMeter(), RunRecord()
        self.strict_loading = False  # weights that do not train are not in our checkpoints
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

    def setup(self, stage: str) -> None:
        check_strategy(self)
        if not hasattr(self.trainer.datamodule, "reference_batches"):
            raise TypeError("DPO learns from a PairwiseDataModule (fit(dpo, datamodule=PairwiseDataModule(…))), whose rows have numbers")

    def configure_model(self) -> None:
        if self.policy is None:
            reseed(0)  # an adapter is drawn from the run's seed, on every rank the same
            network = CausalPolicy.load(self.model, tokenizer=self.tokenizer, **self.source, **self.loading, **self.training_setup)
            self.policy = shard(network, self._trainer)
            self.run.fingerprints = {"model": fingerprint(self.model, self.source["revision"])}

    def configure_optimizers(self) -> dict[str, Any]:
        return optimizers(self, [{"params": list(self.policy.parameters())}], self.optimizer, self.scheduler)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        clip_gradients(self, optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_fit_start(self) -> None:
        self.policy.train()

    def on_train_start(self) -> None:
        settle(self)
        self.reference.fill(self, "train", self.trainer.train_dataloader, self.trainer.max_steps - self.trainer.global_step)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        micro = self.run.begin(self.trainer, batch_idx)
        reseed(self.trainer.global_step, micro, self.global_rank)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, stats, _ = self._loss(batch, "train", batch.count)
        self.meter.add(stats)
        return loss * loss_scale(self.trainer)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log_dict(step_stats(self, "train/", f", epoch {self.trainer.current_epoch}"), prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        load(self, checkpoint)

    def on_validation_start(self) -> None:
        batches = self.trainer.num_sanity_val_batches if self.trainer.sanity_checking else self.trainer.num_val_batches
        self.reference.fill(self, "val", self.trainer.val_dataloaders, batches[0], keep=self.trainer.sanity_checking)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return {"scores": self._evaluate(batch, batch_idx, "val")}

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_start(self) -> None:
        self.reference.fill(self, "test", self.trainer.test_dataloaders, self.trainer.num_test_batches[0])

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return {"scores": self._evaluate(batch, batch_idx, "test")}

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def on_predict_start(self) -> None:
        split = eval_split(self.trainer.datamodule.tables, "predict")
        self.reference.fill(self, split, self.trainer.predict_dataloaders, self.trainer.num_predict_batches[0])

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """One dictionary a response: prompt, response, score (its implicit reward)."""
        split = eval_split(self.trainer.datamodule.tables, "predict")
        return scored_rows(self.tokenizer, batch, self.setting["beta"] * self._log_ratios(batch, split)[0])

    def export_networks(self) -> dict[str, CausalPolicy]:
        """What ExportHF writes: the policy, at the directory itself."""
        return {"": self.policy}

    def _log_ratios(self, batch: Batch, split: str) -> tuple[Tensor, Tensor, Tensor]:
        """log(pi / pi_ref) and log pi of each response (N,), in nats, and their tokens."""
        logprobs, lengths = self.policy(batch)[0].sum(1), batch.response_mask.sum(1)
        ratios = logprobs - self.reference.of(batch, split)
        return (ratios / lengths if self.length_average else ratios), logprobs, lengths

    def _loss(self, batch: Batch, split: str, count: float | None) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The loss of the pairs divided by `count` (None: those of this batch), its stats, and the implicit rewards (N,)."""
        ratios, logprobs, lengths = self._log_ratios(batch, split)
        first, second = batch.pairs.unbind(1)
        loss, stats = dpo_loss(ratios[first], ratios[second], margin=batch.margin, target=batch.target, count=count, **self.setting)
        count = len(first) if count is None else count
        stats |= {f"{name}_logprob": logprobs.detach()[rows].sum() / count for name, rows in (("chosen", first), ("rejected", second))}
        if self.sft_coef:
            sft = -(logprobs / lengths)[first].sum() / count
            loss = loss + self.sft_coef * sft
            stats |= {"sft_loss": sft.detach(), "loss": loss.detach()}
        return loss, stats, self.setting["beta"] * ratios.detach()

    def _evaluate(self, batch: Batch, batch_idx: int, split: str) -> Tensor:
        """Adds the batch to the metrics; returns the implicit rewards (N,), which callbacks such as RewardReport read."""
        loss, stats, rewards = self._loss(batch, split, None)
        first, second = batch.pairs.unbind(1)
        self.val_loss.update(loss, weight=len(first))
        self.val_margin.update(stats["margin"], weight=len(first))
        owner = batch.prompt_of[first].tolist()
        groups = {name: [values[m] for m in owner] for name, values in group_columns(batch.columns).items()}
        self.accuracy.update(rewards[first], rewards[second], groups)
        if batch_idx == 0:
            self.samples = scored_rows(self.tokenizer, batch, rewards)
        return rewards

    def _report(self, stage: str) -> None:
        values = {"loss": self.val_loss.compute(), "margin": self.val_margin.compute()} | shown_accuracies(self.accuracy.compute())
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()})
        reset_metrics(self.accuracy, self.val_loss, self.val_margin)
