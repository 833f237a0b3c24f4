"""PairwiseReward: a reward model from people's choices between two responses (or rankings of K)."""

from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric

from lit_rlhf.batch import Batch
from lit_rlhf.checkpoints import RunRecord, fingerprint, load, save, settle
from lit_rlhf.data.common import load_trusted
from lit_rlhf.functional import pairwise_loss, pairwise_token_loss, ranking_loss
from lit_rlhf.metrics import PairAccuracy, group_columns, shown_accuracies
from lit_rlhf.modules.common import StepMeter, loss_scale, optimizers, record, reseed, reset_metrics, scored_rows, step_stats
from lit_rlhf.networks import ScalarModel, score_of
from lit_rlhf.optim import LRSchedule, Schedule
from lit_rlhf.pretrained import check_source, context_length_of, load_tokenizer
from lit_rlhf.sharding import clip_gradients, full_params, shard
from lit_rlhf.strategies import check_strategy


class PairwiseReward(L.LightningModule):
    """Learns scores such that the preferred response of a pair scores higher (Stiennon et al. 2020, 3.4; defaults are Huang et al. 2024's).

    The score of a response is the scalar head on the state of its last token, EOS. Start from the SFT directory. Validation reports
    `val/loss`, `val/accuracy` (ties are wrong) and `val/accuracy/<column>/<value>` for every column of the data with few values
    (worker, policies, confidence, ...). On export the mean raw score over reference responses is stored as `config.reward_mean`;
    lit_rlhf subtracts it, so that references score 0 on average.

    Args:
        model: the SFT stage's directory, or a hub name. A reward model's own directory continues from its head.
        loss: "pairwise" (Bradley-Terry on last tokens), "ranking" (all pairs of one prompt averaged, InstructGPT) or "token" (trlX's,
            every token from the first differing one on).
        center_coef: weight of (chosen + rejected)^2, which keeps scores near 0.
        reference_rows: how many references the mean is taken over.
        frozen_layers: how many of the lowest blocks do not train, embeddings included (trlX: 70%).
        dtype, attn_implementation, revision, trust_remote_code, peft, activation_checkpointing, optimizer, scheduler: as in `SFT`.
    """

    def __init__(
        self,
        model: str,
        *,
        loss: Literal["pairwise", "ranking", "token"] = "pairwise",
        center_coef: float = 0.0,
        reference_rows: int = 1024,
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
        record(self)
        if loss == "token" and center_coef:
            raise ValueError("center_coef applies to the losses 'pairwise' and 'ranking', not to 'token'")
        self.model = check_source(model)
        self.loss, self.center_coef, self.reference_rows = loss, center_coef, reference_rows
        self.source = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.loading = {"dtype": dtype, "attn_implementation": attn_implementation, "frozen_layers": frozen_layers, "peft": peft}
        self.loading["activation_checkpointing"] = activation_checkpointing
        self.optimizer, self.scheduler = optimizer, scheduler
        self.network: ScalarModel | None = None
        self.accuracy, self.val_loss = PairAccuracy(), MeanMetric()
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

    @property
    def count_by(self) -> str:
        """What the data counts as the divisor of the loss."""
        return "prompts" if self.loss == "ranking" else "pairs"

    def setup(self, stage: str) -> None:
        check_strategy(self)

    def configure_model(self) -> None:
        if self.network is None:
            reseed(0)  # the head is drawn from the run's seed
            network = ScalarModel.load(self.model, head="new", tokenizer=self.tokenizer, **self.source, **self.loading)
            self.network = shard(network, self._trainer)
            self.run.fingerprints = {"model": fingerprint(self.model, self.source["revision"])}

    def configure_optimizers(self) -> dict[str, Any]:
        return optimizers(self, [{"params": list(self.network.parameters())}], self.optimizer, self.scheduler)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        clip_gradients(self, optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_fit_start(self) -> None:
        self.network.train()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        micro = self.run.begin(self.trainer, batch_idx)
        reseed(self.trainer.global_step, micro, self.global_rank)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, stats = self._loss(batch, self.network(batch), batch.count)
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

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return {"scores": self._evaluate(batch, batch_idx)}

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return {"scores": self._evaluate(batch, batch_idx)}

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """One dictionary a response: prompt, response, score."""
        return scored_rows(self.tokenizer, batch, score_of(self.network(batch), batch.response_mask))

    def export_networks(self) -> dict[str, ScalarModel]:
        """What ExportHF writes: the reward model, its mean over references set first (on all ranks)."""
        self.network.set_mean(self.network.mean.item() + self._mean_reference_score())
        return {"": self.network}

    def _loss(self, batch: Batch, scalars: Tensor, count: float | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the pairs, divided by `count` (None: those of this batch)."""
        first, second = batch.pairs.unbind(1)
        if self.loss == "token":
            ids, mask, tokens = batch.response_ids, batch.response_mask, scalars[:, 1:]
            return pairwise_token_loss(tokens[first], tokens[second], ids[first], ids[second], mask[first], mask[second], count=count)
        scores = score_of(scalars, batch.response_mask)
        setting = {"margin": batch.margin, "target": batch.target, "center_coef": self.center_coef, "count": count}
        if self.loss == "ranking":
            return ranking_loss(scores, batch.pairs, batch.prompt_of, **setting)
        return pairwise_loss(scores[first], scores[second], **setting)

    def _evaluate(self, batch: Batch, batch_idx: int) -> Tensor:
        """Adds the batch to the metrics; returns its scores (N,), which callbacks such as RewardReport read."""
        scalars = self.network(batch)
        scores, (first, second) = score_of(scalars, batch.response_mask), batch.pairs.unbind(1)
        units = batch.prompt_of[first].unique() if self.loss == "ranking" else first  # what the loss is a mean over
        self.val_loss.update(self._loss(batch, scalars, None)[0], weight=len(units))
        owner = batch.prompt_of[first].tolist()
        groups = {name: [values[m] for m in owner] for name, values in group_columns(batch.columns).items()}
        self.accuracy.update(scores[first], scores[second], groups)
        if batch_idx == 0:
            self.samples = scored_rows(self.tokenizer, batch, scores)
        return scores

    def _report(self, stage: str) -> None:
        values = {"loss": self.val_loss.compute()} | shown_accuracies(self.accuracy.compute())
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()})
        reset_metrics(self.accuracy, self.val_loss)

    @torch.no_grad()
    def _mean_reference_score(self) -> float:
        """The mean score (after the mean set so far) over the data module's references, all ranks together."""
        total = torch.zeros(2, device=self.device, dtype=torch.float64)
        with self.trainer.precision_plugin.forward_context(), full_params(self.trainer.model):
            for batch in self.trainer.datamodule.reference_batches(self.reference_rows):
                scores = score_of(self.network(batch := batch.to(self.device)), batch.response_mask)
                total += torch.stack([scores.double().sum(), torch.tensor(float(len(scores)), dtype=torch.float64, device=self.device)])
        total = self.trainer.strategy.reduce(total, reduce_op="sum")
        return float(total[0] / total[1])
