"""Metrics that add up over batches and ranks: ROUGE of texts, and how often the preferred response scores higher."""

import json
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Literal, Protocol

import torch
from rouge_score import rouge_scorer  # type: ignore[import-untyped]
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class TextTokenizer(Protocol):
    """What rouge-score asks of a tokenizer."""

    def tokenize(self, text: str) -> list[str]: ...


def characters(text: str) -> list[str]:
    """Every letter, mark and digit is a token (NFKC, case folded); spaces and punctuation are none: for scripts without spaces."""
    return [c for c in unicodedata.normalize("NFKC", text).casefold() if unicodedata.category(c)[0] in "LMN"]


class Rouge(Metric):
    """The mean F-measure, 0 to 1, of rouge-score for each key, and `rouge_mean`, the mean over the keys.

    keys: rouge1, rouge2, ..., rougeL (sentence structure ignored) or rougeLsum. tokenizer: "default" is rouge-score's own, which keeps
    a-z and 0-9 only, so that two equal Chinese texts get 0; "characters" takes every letter; or a function, or an object with
    tokenize(text) -> list of str. use_stemmer: Porter stemmer, for the default tokenizer alone.
    Source: Lin 2004; github.com/google-research/google-research/tree/master/rouge.
    """

    full_state_update = False
    sums: Tensor
    count: Tensor

    def __init__(
        self,
        keys: Sequence[str] = ("rouge1", "rouge2", "rougeL"),
        tokenizer: Literal["default", "characters"] | Callable[[str], list[str]] | TextTokenizer = "default",
        use_stemmer: bool = True,
    ) -> None:
        super().__init__()
        self.keys, self.default_tokenizer = list(keys), tokenizer == "default"
        if tokenizer == "characters":
            tokenizer = characters
        if isinstance(tokenizer, str) and tokenizer != "default":
            raise ValueError(f"tokenizer is {tokenizer!r}; give 'default', 'characters', a function or an object with tokenize(text)")
        own = None if tokenizer == "default" else tokenizer if hasattr(tokenizer, "tokenize") else SimpleNamespace(tokenize=tokenizer)
        self.scorer = rouge_scorer.RougeScorer(self.keys, use_stemmer=use_stemmer, tokenizer=own)
        self.add_state("sums", torch.zeros(len(self.keys)), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: list[str], references: list[str]) -> None:
        """Add one text per entry. Errors: ValueError for lists of different lengths, TypeError for a bare string."""
        if isinstance(predictions, str) or isinstance(references, str):
            raise TypeError("Rouge.update takes two lists of texts, not two texts")
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions but {len(references)} references; give one reference per prediction")
        for prediction, reference in zip(predictions, references, strict=True):
            if self.default_tokenizer and reference.strip() and not any(c.isascii() and c.isalnum() for c in reference):
                warnings.warn(
                    f"no a-z or 0-9 in the reference {reference[:40]!r}: its ROUGE is 0 whatever is written. "
                    "Use tokenizer='characters' for scripts without spaces.",
                    stacklevel=2,
                )
            scores = self.scorer.score(reference, prediction)
            self.sums += torch.tensor([scores[key].fmeasure for key in self.keys], device=self.sums.device)
        self.count += len(predictions)

    def compute(self) -> dict[str, Tensor]:
        """{key: mean F-measure} and rouge_mean, over all ranks; {} where no rank had a text. All ranks must call it."""
        if self.count == 0:
            return {}
        means = self.sums / self.count
        return dict(zip(self.keys, means, strict=True)) | {"rouge_mean": means.mean()}


class PairAccuracy(Metric):
    """The share of pairs in which the preferred response scores strictly higher (a tie is wrong), over all and by group.

    The groups (say, the data set's `confidence` column) may differ from rank to rank: each update appends its counts as JSON, byte by
    byte, to a state that torchmetrics concatenates over the ranks. Bytes are kept in the metric's float dtype, since that is the dtype
    torchmetrics gives to the empty state of a rank that saw nothing.
    """

    full_state_update = False
    right: Tensor
    total: Tensor
    tallies: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("tallies", [], dist_reduce_fx="cat")

    def update(self, preferred: Tensor, other: Tensor, groups: dict[str, list[Any]] | None = None) -> None:
        """Add pairs of scores, both (Q,); groups: {column: one value per pair}, where None puts a pair in no group of that column.

        Errors: ValueError when shapes or lengths differ.
        """
        if preferred.shape != other.shape or preferred.ndim != 1:
            raise ValueError(f"scores of shapes {tuple(preferred.shape)} and {tuple(other.shape)}; give two of shape (pairs,)")
        right = (preferred > other).tolist()
        self.right += sum(right)
        self.total += len(right)
        hits, sizes = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
        for column, values in (groups or {}).items():
            if len(values) != len(right):
                raise ValueError(f"column {column!r} has {len(values)} values for {len(right)} pairs; give one value per pair")
            for value, hit in zip(values, right, strict=True):
                if value is not None:
                    hits[column, str(value)] += hit
                    sizes[column, str(value)] += 1
        if sizes:
            line = json.dumps([[*group, hits[group], size] for group, size in sizes.items()]) + "\n"
            self.tallies.append(torch.tensor(list(line.encode()), device=self.device, dtype=self.dtype))

    def _groups(self) -> Iterator[tuple[str, int, int]]:
        if not isinstance(self.tallies, list) or self.tallies:  # a list before the ranks are joined, one tensor after
            for line in bytes(dim_zero_cat(self.tallies).int().tolist()).splitlines():
                for column, value, hits, size in json.loads(line):
                    yield f"{column}/{value}", hits, size

    def compute(self) -> dict[str, Tensor]:
        """{"accuracy", "pairs", "accuracy/<column>/<value>", "pairs/<column>/<value>"} over all ranks: shares of 1 and numbers of pairs.

        {} where no rank had a pair. All ranks must call it.
        """
        if self.total == 0:
            return {}
        hits, sizes = Counter[str](), Counter[str]()
        for name, right, size in self._groups():
            hits[name] += right
            sizes[name] += size
        result = {"accuracy": self.right / self.total, "pairs": self.total}
        for name in sorted(sizes):
            result[f"accuracy/{name}"] = torch.tensor(hits[name] / sizes[name], device=self.device)
            result[f"pairs/{name}"] = torch.tensor(sizes[name], device=self.device)
        return result


def group_columns(columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The columns that can group an accuracy: short strings, numbers and booleans, not the texts."""
    groups = {}
    for name, values in columns.items():
        known = [v for v in values if v is not None]
        if name in TEXTS or not known:
            continue
        if all(isinstance(v, bool | int) or (isinstance(v, str) and len(v) <= 40) for v in known):
            groups[name] = values
    return groups


def shown_accuracies(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of what PairAccuracy computes: the accuracy, and those by the values of columns with at most MAX_GROUPS values."""
    kinds = Counter(name.split("/")[1] for name in found if name.startswith("accuracy/"))
    return {n: x for n, x in found.items() if n == "accuracy" or (n.startswith("accuracy/") and kinds[n.split("/")[1]] <= MAX_GROUPS)}


MAX_GROUPS = 50
TEXTS = {"prompt", "reference", "chosen", "rejected", "post", "title", "summary", "label", "completion", "id", "info", "note", "messages"}
