"""Prompts to sample responses to, for PPO."""

from typing import Any, Literal

import lightning as L
import numpy as np

from lit_rlhf.batch import Batch
from lit_rlhf.data.collate import collate
from lit_rlhf.data.common import encoder_of, eval_loader, eval_split, extra_table, load_trusted, prepare
from lit_rlhf.data.loader import StepLoader, StepNumbers, rolling, run_seed
from lit_rlhf.data.schemas import PROMPT_SCHEMAS, SFT_SCHEMAS
from lit_rlhf.data.sources import Data
from lit_rlhf.data.table import Sources, Table
from lit_rlhf.data.tokenise import Settings


class PromptDataModule(L.LightningDataModule):
    """Prompts that PPO samples responses to, and held-out ones to validate on.

    Rows: prompt alone (text or messages), or any rows that SFTDataModule and PairwiseDataModule take: their label, or preferred response,
    is then the "reference" column. Without data, responses are generated from the BOS token.

    Args:
        data: hub name, https URL, file or folder (json, jsonl, csv, parquet, also gzipped; arrow), Dataset, DatasetDict or list; or None.
        val_data: the same, for validation; without it a split of `data`, else `val_fraction` of its prompts.
        test_data: the same, for test and predict; without it the "test" split of `data`.
        name: the hub data set's configuration.
        revision: the hub data set's revision.
        train_split: split of `data` to train on.
        val_split: split to validate on; None takes the first of validation, valid, val and test that exists.
        val_fraction: share of the prompts held out where there is no validation source.
        columns: our column names to yours, such as {prompt: question}.
        val_batch_size: prompts of one validation step over all ranks (how many one iteration of PPO takes is PPO's argument).
        max_prompt_tokens: longer TL;DR posts are cut at paragraphs; for other prompts `overlong` says what happens.
        max_response_tokens: rows of `ptx_data` with a longer response (EOS included) are dropped and counted.
        overlong: "error", or "left" to keep a prompt's last tokens.
        on_bad_row: "error", or "skip" to drop such rows and count them by reason.
        limit_train_rows: use the first so many usable rows.
        limit_val_rows: the same for validation and test.
        min_words: drop rows with a reference of fewer words (characters in scripts without spaces).
        subreddits: keep only posts of these.
        response_token_bounds: keep only rows whose references have so many tokens (lowest, highest; EOS not counted).
        tokenizer: path or object, where no module brings its own.
        ptx_data: rows as SFTDataModule's, for the pretraining term of the loss (PPO-ptx).
    """

    def __init__(
        self,
        data: Data | None = None,
        *,
        val_data: Data | None = None,
        test_data: Data | None = None,
        name: str | None = None,
        revision: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        val_fraction: float = 0.0,
        columns: dict[str, str] | None = None,
        val_batch_size: int = 32,
        max_prompt_tokens: int = 512,
        max_response_tokens: int | None = None,
        overlong: Literal["error", "left"] = "error",
        on_bad_row: Literal["error", "skip"] = "error",
        limit_train_rows: int | None = None,
        limit_val_rows: int | None = None,
        min_words: int = 0,
        subreddits: list[str] | None = None,
        response_token_bounds: tuple[int, int] | None = None,
        tokenizer: Any = None,
        ptx_data: Data | None = None,
    ) -> None:
        super().__init__()
        self.sources = Sources(
            data, val_data, test_data, name, revision, train_split, val_split, val_fraction, limit_train_rows, limit_val_rows
        )
        self.settings = Settings(
            max_prompt_tokens=max_prompt_tokens,
            max_response_tokens=max_response_tokens,
            overlong=overlong,
            on_bad_row=on_bad_row,
            columns=columns,
            min_words=min_words,
            subreddits=subreddits,
            response_token_bounds=response_token_bounds,
            prompts_only=True,
        )
        self.val_batch_size, self.tokenizer, self.ptx_data = val_batch_size, tokenizer, ptx_data
        self.tables: dict[str, Table] = {}
        self.extra: dict[str, Table] = {}
        self.summary: dict[str, Any] = {}
        self._numbers: StepNumbers | None = None
        self._resume: dict[str, Any] = {}

    load_from_checkpoint = classmethod(load_trusted)  # type: ignore[assignment]

    def setup(self, stage: str | None = None) -> None:
        """Reads, checks and tokenises what the stage needs; every bad row ends in an error here, before a model loads."""
        if self.sources.data is None:
            if self.sources.val_data is not None or self.sources.test_data is not None:
                raise ValueError("data is None (generation from BOS), so val_data and test_data must be None too")
            self.encoder, _ = encoder_of(self.trainer, self.tokenizer)
        else:
            self.tables, self.summary = prepare(self, stage, PROMPT_SCHEMAS)
        if self.ptx_data is not None and "ptx" not in self.extra:
            self.extra["ptx"] = extra_table(self, self.ptx_data, SFT_SCHEMAS, "ptx_data")

    def prompts(self, iteration: int, size: int) -> Batch:
        """All `size` prompts of one PPO iteration, on every rank the same: a function of (seed, iteration).

        The prompts go round in passes, each a new permutation of all rows.
        """
        if self.sources.data is None:
            return self._from_bos(size)
        table = self.tables["train"]
        return collate(table.fetch(rolling(len(table), iteration * size, size, run_seed())))

    def ptx_batch(self, step: int, size: int) -> Batch:
        """All `size` prompts with responses for the pretraining term of one optimiser step; `count` is their number of response tokens."""
        if "ptx" not in self.extra:
            raise ValueError("no pretraining rows: give ptx_data")
        table = self.extra["ptx"]
        batch = collate(table.fetch(rolling(len(table), step * size, size, run_seed(), 2)))
        loss = 0 if batch.prompt_loss_mask is None else int(batch.prompt_loss_mask.sum())
        batch.count = float(int(batch.response_mask.sum()) + loss)
        return batch

    def train_dataloader(self) -> StepNumbers:
        """Numbers of the micro-batches of one iteration: module.steps_per_iteration x accumulate_grad_batches of them."""
        trainer: Any = self.trainer
        if trainer is None:
            raise ValueError(
                "the training loader of prompts only counts PPO's steps: fit it with a Trainer, or call prompts(iteration, size)"
            )
        self._numbers = StepNumbers(trainer.lightning_module.steps_per_iteration * trainer.accumulate_grad_batches)
        self._numbers.load_state_dict(self._resume)
        self._resume = {}
        return self._numbers

    def val_dataloader(self) -> StepLoader | list[Any]:
        """All validation prompts in order, or no loader where there are none."""
        return self._eval("val") if "val" in self.tables or self.sources.data is None else []

    def test_dataloader(self) -> StepLoader:
        """All test prompts in order."""
        return self._eval("test")

    def predict_dataloader(self) -> StepLoader:
        """The test prompts, else the validation prompts, else the training prompts, in order."""
        return self._eval("predict")

    def _eval(self, stage: str) -> StepLoader:
        if self.sources.data is None:
            rows = np.ones(self.sources.limit_val_rows or self.val_batch_size, dtype=np.int64)
            return eval_loader(self, rows, rows, lambda positions: self._from_bos(len(positions)))
        table = self.tables["val" if stage == "val" else eval_split(self.tables, stage)]
        return eval_loader(self, table.prompt_tokens, np.ones(len(table)), lambda positions: collate(table.fetch(positions)))

    def _from_bos(self, size: int) -> Batch:
        """`size` prompts of the one token that generation begins with."""
        return Batch.of([self.encoder.start] * size, columns={"prompt": [""] * size})

    def state_dict(self) -> dict[str, Any]:
        """The position in the iteration."""
        return self._numbers.state_dict() if self._numbers else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes effect when the training loader is made."""
        self._resume = state_dict
