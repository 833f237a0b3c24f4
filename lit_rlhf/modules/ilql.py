"""ILQL: a policy and Q values learnt offline from rewarded responses; nothing is sampled until it is used."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lit_rlhf.batch import Batch
from lit_rlhf.checkpoints import RunRecord, fingerprint, load, save, settle
from lit_rlhf.data.common import load_trusted
from lit_rlhf.data.loader import run_seed
from lit_rlhf.data.rewarded import COLUMN, as_rewards, reward_moments
from lit_rlhf.data.sft import SFTDataModule
from lit_rlhf.functional import ilql_loss, last_token_rewards
from lit_rlhf.generation import Sampling, sample
from lit_rlhf.metrics import Rouge
from lit_rlhf.modules.common import PREDICTION, VALIDATION, StepMeter, as_sampling, loss_scale, optimizers, record, reseed, step_stats
from lit_rlhf.modules.iterations import add_rows, report, val_metrics
from lit_rlhf.modules.ppo_checks import check_one_device
from lit_rlhf.modules.sft import response_rows
from lit_rlhf.optim import LRSchedule, Schedule
from lit_rlhf.pretrained import check_source, context_length_of, load_tokenizer
from lit_rlhf.q_values import QPolicy
from lit_rlhf.rollout import score_texts
from lit_rlhf.scorers import load_scorer
from lit_rlhf.scoring import check_reward_fn
from lit_rlhf.strategies import check_strategy


class ILQL(L.LightningModule):
    """Implicit language Q-learning (Snell et al. 2022; formulas and defaults are trlX's), from an `SFTDataModule` with a "reward" column.

    Rewards are z-scored over the training rows and stand on the last token. Responses are sampled from log p + beta * (Q - V).
    Validation logs the losses' sum `val/loss` and, of sampled responses, `val/length`, `val/eos_rate`, `val/rouge…` where there are
    references, and `val/score` with a `reward_fn`. The export is a plain Hugging Face directory with the heads beside the weights, which
    `ILQL(directory)` (for `predict`) and `QPolicy.load` read again. (`lit_rlhf.data.rewarded_rows` makes rows of texts and rewards.)

    Args:
        model: a directory (its Q and V heads are taken up if it has some) or hub name.
        reward_fn: scores validation's and `predict`'s responses; nothing learns from it.
        gamma: discount a token. tau: of the expectile: above 0.5 V leans to the best actions.
        cql_coef, awac_coef: weights of the conservative term and of the (weighted) language-model loss.
        awac_beta: the latter's weights are exp(awac_beta * (Q - V)).
        target_rate, target_every: every so many steps the target heads go this share of the way to the Q heads.
        beta, top_k: how sampling leans on Q - V, and how many tokens it chooses among (None: all).
        sampling, dropout, rouge_tokenizer, dtype, attn_implementation, revision, trust_remote_code, peft, frozen_layers,
            activation_checkpointing, optimizer, scheduler: as in `SFT`.
    """

    def __init__(
        self,
        model: str,
        *,
        reward_fn: Callable[..., Any] | None = None,
        gamma: float = 0.99,
        tau: float = 0.7,
        cql_coef: float = 0.1,
        awac_coef: float = 1.0,
        awac_beta: float = 0.0,
        target_rate: float = 0.001,
        target_every: int = 5,
        beta: float = 1.0,
        top_k: int | None = 20,
        sampling: Sampling = Sampling(),  # noqa: B008
        rouge_tokenizer: Any = "default",
        dropout: bool = False,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        peft: Any = None,
        frozen_layers: int = 0,
        activation_checkpointing: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=5e-5, eps=1e-8, weight_decay=1e-6),  # noqa: B008
        scheduler: Schedule | LRSchedule = Schedule("cosine"),  # noqa: B008
    ) -> None:
        super().__init__()
        self.sampling = as_sampling(sampling)
        record(self, self.sampling)
        if not 0 < tau < 1 or not 0 < target_rate <= 1 or target_every < 1:
            raise ValueError(
                f"tau {tau} must be within 0 and 1, target_rate {target_rate} in (0, 1], target_every {target_every} at least 1"
            )
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}; null lets every token be sampled")
        if reward_fn is not None:
            check_reward_fn(reward_fn)
        self.model, self.reward_fn = check_source(model), reward_fn
        self.setting = {"gamma": gamma, "tau": tau, "cql_coef": cql_coef, "awac_coef": awac_coef, "awac_beta": awac_beta}
        self.target_rate, self.target_every, self.beta, self.top_k = target_rate, target_every, beta, top_k
        self.source = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.loading = {"dtype": dtype, "attn_implementation": attn_implementation, "dropout": dropout, "peft": peft}
        self.loading |= {"frozen_layers": frozen_layers, "activation_checkpointing": activation_checkpointing}
        self.optimizer, self.scheduler = optimizer, scheduler
        self.network: QPolicy | None = None
        self.scorer: torch.nn.Module | None = None
        names = ("loss", "length", "eos_rate") + (() if reward_fn is None else ("score",))
        self.rouge, self.val_metrics = Rouge(tokenizer=rouge_tokenizer), val_metrics(names)
        self.meter, self.run = StepMeter(), RunRecord()
        self.moments: tuple[float, float] | None = None
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
        check_one_device(self)
        if stage != "predict" and not isinstance(self.trainer.datamodule, SFTDataModule):
            raise TypeError('ILQL learns from an SFTDataModule (fit(ilql, datamodule=SFTDataModule(…))), whose rows have a "reward"')

    def configure_model(self) -> None:
        if self.network is None:
            reseed(0)  # the heads are drawn from the run's seed
            self.network = QPolicy.load(self.model, tokenizer=self.tokenizer, **self.loading, **self.source)
            self.scorer = None if self.reward_fn is None else load_scorer(self.reward_fn)
            self.run.fingerprints = {"model": fingerprint(self.model, self.source["revision"])}

    def configure_optimizers(self) -> dict[str, Any]:
        return optimizers(self, [{"params": list(self.network.parameters())}], self.optimizer, self.scheduler)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimiser's step, and after every `target_every` of them the target heads'."""
        super().optimizer_step(*args, **kwargs)
        if (self.trainer.global_step + 1) % self.target_every == 0:
            self.network.heads.follow(self.target_rate)

    def on_fit_start(self) -> None:
        self.network.train()
        self.moments = reward_moments(self.trainer.datamodule.tables["train"])

    def on_train_start(self) -> None:
        settle(self)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        micro = self.run.begin(self.trainer, batch_idx)
        reseed(self.trainer.global_step, micro, self.global_rank)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, stats = self._loss(batch, batch.count)
        self.meter.add(stats)
        return loss * loss_scale(self.trainer)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log_dict(step_stats(self, "train/", f", epoch {self.trainer.current_epoch}"), prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        load(self, checkpoint)

    def _loss(self, batch: Batch, count: float | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the batch's tokens, divided by `count` (None: their number)."""
        if self.moments is None:  # a validation or test without a fit before it
            tables = self.trainer.datamodule.tables
            self.moments = reward_moments(tables.get("train") or next(iter(tables.values())))
        rewards = as_rewards(batch.columns.get(COLUMN, [None]), "the batch")
        scores = (torch.tensor(rewards, device=self.device)[batch.prompt_of] - self.moments[0]) / self.moments[1]
        made, mask = self.network(batch), batch.response_mask
        rewards = last_token_rewards(scores, mask)
        return ilql_loss(made.logprobs, made.q, made.target_q, made.q_logprobs, made.values, rewards, mask, count=count, **self.setting)

    # Evaluation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if batch.num_responses:
            self.val_metrics["loss"].update(self._loss(batch, None)[0], weight=batch.response_mask.sum())
        add_rows(self, self._write(batch, VALIDATION), batch_idx)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        report(self, "val")

    def on_test_epoch_end(self) -> None:
        report(self, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """One dictionary a prompt: prompt, response, reference where known, score with a `reward_fn`, length, eos_rate."""
        return self._write(batch, PREDICTION)

    def _write(self, batch: Batch, purpose: int) -> list[dict[str, Any]]:
        with self.network.guided(self.beta, self.top_k) as policy:
            made = sample(policy, batch, self.sampling, key=(run_seed(), purpose))
        more = {"length": made.batch.response_mask.sum(1).tolist(), "eos_rate": made.finished.float().tolist()}
        if self.scorer is not None:
            more["score"] = score_texts(self.scorer, made.batch, made.texts).tolist()
        return response_rows(batch.columns, made.texts, **more)

    def export_networks(self) -> dict[str, QPolicy]:
        """What ExportHF writes: the policy with its heads, at the directory itself."""
        return {"": self.network}
