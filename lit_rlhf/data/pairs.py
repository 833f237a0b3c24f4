"""Prompts with two or more responses and who is preferred, for reward models."""

from functools import partial
from typing import Any, Literal

import lightning as L
import numpy as np

from lit_rlhf.batch import Batch
from lit_rlhf.data.collate import collate
from lit_rlhf.data.common import eval_loader, eval_split, extra_table, load_trusted, prepare, train_loader
from lit_rlhf.data.loader import StepLoader, permutation, run_seed
from lit_rlhf.data.schemas import PAIR_SCHEMAS, SFT_SCHEMAS
from lit_rlhf.data.sources import Data
from lit_rlhf.data.table import Sources, Table
from lit_rlhf.data.tokenise import Settings


class PairwiseDataModule(L.LightningDataModule):
    """Comparisons: each row is one prompt, its responses (each stored and computed once) and the pairs among them.

    Rows: prompt + chosen + rejected, with `margin` and `target` (probability that chosen is better) where there; chosen + rejected that
    share their beginning (HH-RLHF); OpenAI's info + summaries + choice; ratings: prompt + responses + scores, of which every pair is taken;
    prompt + responses + pairs, a list of [preferred, other] as positions from 0, with `target` and `margin` as lists of a number a pair.

    Args:
        data: hub name, https URL, file or folder (json, jsonl, csv, parquet, also gzipped; arrow), Dataset, DatasetDict or list of rows.
        val_data: the same, for validation; without it a split of `data`, else `val_fraction` of its prompts.
        test_data: the same, for test and predict; without it the "test" split of `data`.
        name: the hub data set's configuration.
        revision: the hub data set's revision.
        train_split: split of `data` to train on.
        val_split: split to validate on; None takes the first of validation, valid, val and test that exists.
        val_fraction: share of the prompts held out where there is no validation source.
        columns: our column names to yours, such as {prompt: question}.
        batch_size: rows of one optimiser step, over all ranks and micro-batches.
        val_batch_size: rows of one validation step over all ranks; None takes as many as a training micro-batch has.
        max_prompt_tokens: longer TL;DR posts are cut at paragraphs; for other prompts `overlong` says what happens.
        max_response_tokens: rows with a longer response (EOS included) are dropped and counted.
        overlong: "error", or "left" to keep a prompt's last tokens.
        on_bad_row: "error", or "skip" to drop such rows and count them by reason.
        limit_train_rows: use the first so many usable rows.
        limit_val_rows: the same for validation and test.
        min_words: drop rows with a response of fewer words (characters in scripts without spaces).
        subreddits: keep only posts of these.
        response_token_bounds: keep only rows whose responses have so many tokens (lowest, highest; EOS not counted).
        tokenizer: path or object, where no module brings its own.
        drop_equal: drop pairs of equal responses.
        ties: equal scores of ratings are pairs with target 0.5 ("half") or no pairs ("drop").
        references: prompts with reference responses (rows as SFTDataModule's) whose mean score is the reward model's zero; None takes the
            preferred responses of the training rows.
    """

    def __init__(
        self,
        data: Data,
        *,
        val_data: Data | None = None,
        test_data: Data | None = None,
        name: str | None = None,
        revision: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        val_fraction: float = 0.0,
        columns: dict[str, str] | None = None,
        batch_size: int = 64,
        val_batch_size: int | None = None,
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
        drop_equal: bool = False,
        ties: Literal["half", "drop"] = "half",
        references: Data | None = None,
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
            drop_equal=drop_equal,
            ties=ties,
        )
        self.batch_size, self.val_batch_size = batch_size, val_batch_size
        self.tokenizer, self.references = tokenizer, references
        self.tables: dict[str, Table] = {}
        self.extra: dict[str, Table] = {}
        self.summary: dict[str, Any] = {}
        self._loader: StepLoader | None = None
        self._resume: dict[str, Any] = {}

    load_from_checkpoint = classmethod(load_trusted)  # type: ignore[assignment]

    def setup(self, stage: str | None = None) -> None:
        """Reads, checks and tokenises what the stage needs; every bad row ends in an error here, before a model loads."""
        self.tables, self.summary = prepare(self, stage, PAIR_SCHEMAS)
        if self.references is not None and "references" not in self.extra:
            self.extra["references"] = extra_table(self, self.references, SFT_SCHEMAS, "references")

    def batch(self, split: str, positions: list[int]) -> Batch:
        """These rows of a split ("train", "val", "test") as one Batch."""
        return collate(self.tables[split].fetch(positions))

    def train_dataloader(self) -> StepLoader:
        """Batches whose `count` is the step's number of pairs, or of prompts where the module's `count_by` is "prompts"."""
        self._loader = train_loader(self, *self._sizes("train"), partial(self.batch, "train"))
        self._loader.load_state_dict(self._resume)
        self._resume = {}
        return self._loader

    def reference_batches(self, rows: int) -> StepLoader:
        """This rank's share of `rows` prompts with one reference response each, drawn by the seed; every rank gets as many batches."""
        table = self.extra.get("references", self.tables.get("train"))
        if table is None:
            raise ValueError("no reference responses: give references, or set up the training rows (stage fit)")
        drawn = table.take(np.sort(permutation(len(table), run_seed(), 3)[:rows]))

        def batch(positions: list[int]) -> Batch:
            found = drawn.fetch(positions)
            best = [row["pairs"][0][0] if row["pairs"] else 0 for row in found]
            return collate([row | {"responses": [row["responses"][i]], "pairs": []} for i, row in zip(best, found, strict=True)])

        return eval_loader(self, drawn.prompt_tokens + drawn.longest, np.ones(len(drawn)), batch)

    def val_dataloader(self) -> StepLoader | list[Any]:
        """All validation rows in order, or no loader where there are none."""
        return self._eval("val") if "val" in self.tables else []

    def test_dataloader(self) -> StepLoader:
        """All test rows in order."""
        return self._eval(eval_split(self.tables, "test"))

    def predict_dataloader(self) -> StepLoader:
        """The test rows, else the validation rows, else the training rows, in order."""
        return self._eval(eval_split(self.tables, "predict"))

    def _eval(self, split: str) -> StepLoader:
        return eval_loader(self, *self._sizes(split), partial(self.batch, split))

    def _sizes(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of each row, and what it adds to the divisor of the loss."""
        table = self.tables[split]
        count_by = getattr(getattr(self.trainer, "lightning_module", None), "count_by", "pairs")
        return table.prompt_tokens + table.response_tokens, np.ones(len(table)) if count_by == "prompts" else table.pairs

    def state_dict(self) -> dict[str, Any]:
        """The position in the training rows."""
        return self._loader.state_dict() if self._loader else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes effect when the training loader is made."""
        self._resume = state_dict
