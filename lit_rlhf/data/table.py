"""Tokenised splits: built once, kept in datasets' cache, summed up in a few numbers."""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets.exceptions import DatasetGenerationError
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_rlhf.data.loader import permutation
from lit_rlhf.data.schemas import Schema, examples
from lit_rlhf.data.sources import Data, Part, open_source, pick, pick_val
from lit_rlhf.data.tokenise import FEATURES, Encoder, Settings, tokenise


@dataclass(frozen=True)
class Sources:
    """Where the splits of one DataModule come from."""

    data: Data
    val_data: Data | None = None
    test_data: Data | None = None
    name: str | None = None
    revision: str | None = None
    train_split: str = "train"
    val_split: str | None = None
    val_fraction: float = 0.0
    limit_train_rows: int | None = None
    limit_val_rows: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}, not at least 0 and less than 1")
        for name in ("limit_train_rows", "limit_val_rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; leave it out, or give at least 1")


@dataclass(frozen=True)
class Table:
    """One split's usable rows: ids on disk, lengths in memory. All arrays have one entry per row."""

    name: str
    rows: datasets.Dataset
    index: np.ndarray
    """Where each row stands in `rows`."""
    keys: np.ndarray
    """Hash of each prompt's text."""
    prompt_tokens: np.ndarray
    response_tokens: np.ndarray
    """Tokens of all of a row's responses, EOS included."""
    loss_tokens: np.ndarray
    """Prompt tokens that count because they are earlier assistant turns."""
    pairs: np.ndarray
    """Pairs of each row."""
    truncated: np.ndarray
    longest: np.ndarray
    """Tokens of the row's longest response."""
    read: int
    dropped: dict[str, int]

    def __len__(self) -> int:
        return len(self.index)

    def fetch(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """These rows, as `FEATURES` says."""
        columns = self.rows[[int(self.index[i]) for i in positions]]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def take(self, positions: np.ndarray, **changes: Any) -> "Table":
        """The table of these rows alone."""
        arrays = {name: value[positions] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(self, **arrays, **changes)

    def summary(self) -> dict[str, Any]:
        """Rows read, kept and dropped by reason, length percentiles in tokens, share of prompts that were cut."""
        out: dict[str, Any] = {"source": self.name, "read": self.read, "rows": len(self), "dropped": self.dropped}
        for name, lengths in (("prompt_tokens", self.prompt_tokens), ("response_tokens", self.longest)):
            if lengths.any():
                out[name] = {f"p{q}": int(np.percentile(lengths, q, method="nearest")) for q in (50, 90, 99)} | {"max": int(lengths.max())}
        return out | {"truncated": float(self.truncated.mean()) if len(self) else 0.0}


@cache
def _code() -> str:
    """A hash of this package's source, so that rows tokenised by an older version are not taken for new ones."""
    here = Path(__file__).parent
    return hashlib.blake2b(b"".join(p.read_bytes() for p in sorted(here.glob("*.py"))), digest_size=8).hexdigest()


def build_table(part: Part, schemas: tuple[Schema, ...], settings: Settings, encoder: Encoder, limit: int | None = None) -> Table:
    """Reads, checks and tokenises one split, or takes it from the cache; a ValueError where nothing usable is left."""
    state = [
        _code(),
        part.name,
        part.content(),
        [list(map(str, s.columns)) for s in schemas],
        asdict(settings),
        encoder.fingerprint,
        limit,
    ]
    fingerprint = hashlib.blake2b(json.dumps(state, sort_keys=True).encode(), digest_size=16).hexdigest()

    def rows() -> Iterator[dict[str, Any]]:
        return tokenise(examples(part.rows(), part.name, schemas, settings.columns), encoder, settings, limit)

    table = _as_table(part.name, _cached(rows, fingerprint))
    if not len(table):
        reasons = ", ".join(f"{n} {reason}" for reason, n in table.dropped.items())
        raise ValueError(f"{part.name}: all {table.read} rows are dropped ({reasons}); mend rows, or loosen the settings that drop them")
    return table


def _cached(rows: Any, fingerprint: str) -> datasets.Dataset:
    """The rows as a Dataset in datasets' cache, in a temporary folder where that cannot be written."""
    try:
        try:
            return datasets.Dataset.from_generator(rows, features=FEATURES, fingerprint=fingerprint)
        except OSError as error:
            rank_zero_warn(
                f"the data sets' cache {datasets.config.HF_DATASETS_CACHE} cannot be used ({error}): tokenising into a temporary folder"
            )
            return datasets.Dataset.from_generator(
                rows, features=FEATURES, fingerprint=fingerprint, cache_dir=tempfile.mkdtemp(prefix="lit_rlhf-")
            )
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _as_table(name: str, rows: datasets.Dataset) -> Table:
    def column(field: str) -> Any:
        return rows.data.column(field)

    def lengths(values: Any) -> np.ndarray:
        return np.asarray(pc.list_value_length(values).to_numpy(), dtype=np.int64)

    dropped = np.asarray(column("dropped").to_pylist(), dtype=object)
    index = np.flatnonzero(dropped == "")
    answers, per_row = lengths(pc.list_flatten(column("responses"))), lengths(column("responses"))
    owner = np.repeat(np.arange(len(rows)), per_row)
    longest = np.zeros(len(rows), dtype=np.int64)
    np.maximum.at(longest, owner, answers)
    total = np.bincount(owner, weights=answers, minlength=len(rows)).astype(np.int64)
    return Table(
        name=name,
        rows=rows,
        index=index,
        keys=column("key").to_numpy()[index],
        prompt_tokens=lengths(column("prompt_ids"))[index],
        response_tokens=total[index],
        loss_tokens=lengths(column("prompt_loss"))[index],
        pairs=lengths(column("pairs"))[index],
        truncated=np.asarray(column("truncated").to_pylist(), dtype=bool)[index],
        longest=longest[index],
        read=len(rows),
        dropped=dict(Counter(reason for reason in dropped.tolist() if reason).most_common()),
    )


def load_tables(
    sources: Sources, schemas: tuple[Schema, ...], settings: Settings, encoder: Encoder, wanted: set[str], seed: int
) -> dict[str, Table]:
    """The wanted ones of "train", "val" and "test", as far as they exist.

    Without a validation source, `val_fraction` of the prompts, by a permutation that depends on the seed alone, is held out of the training
    split with all their rows.
    """
    parts = _parts(sources)
    limits = {"train": sources.limit_train_rows, "val": sources.limit_val_rows, "test": sources.limit_val_rows}
    out: dict[str, Table] = {}
    if sources.val_fraction and "val" not in parts and wanted & {"train", "val"}:
        out["train"], out["val"] = _hold_out(build_table(parts.pop("train"), schemas, settings, encoder), sources, seed)
    for split, part in parts.items():
        if split in wanted:
            out[split] = build_table(part, schemas, settings, encoder, limits[split])
    return {split: table for split, table in out.items() if split in wanted}


def _parts(sources: Sources) -> dict[str, Part]:
    """Which split of which source is "train", "val" and "test"; the last two only where there are such."""
    own = open_source(sources.data, name=sources.name, revision=sources.revision)
    out = {"train": pick(own, sources.train_split, _label(sources.data), "train_split")}
    taken = "" if "" in own and sources.train_split not in own else sources.train_split
    if sources.val_data is not None:
        other, label = open_source(sources.val_data, name=sources.name, revision=sources.revision), _label(sources.val_data)
        val = pick_val(other, sources.val_split, label, "val_split") or pick(other, "validation", label, "val_split")
    elif sources.val_split is not None or not sources.val_fraction:
        val = pick_val(own, sources.val_split, _label(sources.data), "val_split", taken)
    else:
        val = None
    if val is not None:
        out["val"] = val
    if sources.test_data is not None:
        other = open_source(sources.test_data, name=sources.name, revision=sources.revision)
        out["test"] = pick(other, "test", _label(sources.test_data), "test_data")
    elif "test" in own and taken != "test":
        out["test"] = own["test"]
    return out


def _label(data: Any) -> str:
    return data if isinstance(data, str) else "data"


def _hold_out(table: Table, sources: Sources, seed: int) -> tuple[Table, Table]:
    """Training and validation rows that share no prompt."""
    prompts, owner = np.unique(table.keys, return_inverse=True)
    count = max(1, round(len(prompts) * sources.val_fraction))
    if count >= len(prompts):
        raise ValueError(f"{table.name}: val_fraction {sources.val_fraction} of {len(prompts)} prompts leaves none to train on")
    held = np.zeros(len(prompts), dtype=bool)
    held[permutation(len(prompts), seed, 1)[:count]] = True
    train = np.flatnonzero(~held[owner])[: sources.limit_train_rows]
    val = np.flatnonzero(held[owner])[: sources.limit_val_rows]
    return table.take(train), table.take(val)


def summarise(tables: dict[str, Table]) -> dict[str, Any]:
    """Every split's summary, and under "shared_prompts" how many prompts stand in each two of them."""
    out: dict[str, Any] = {split: table.summary() for split, table in tables.items()}
    names = list(tables)
    shared = {f"{a}+{b}": len(np.intersect1d(tables[a].keys, tables[b].keys)) for i, a in enumerate(names) for b in names[i + 1 :]}
    return out | {"shared_prompts": shared}


def report(summary: dict[str, Any], loggers: Sequence[Any] = ()) -> None:
    """Prints the summary on rank 0 and gives its numbers to the loggers as data/<split>/<what>."""
    lines, numbers = [], {}
    for split, s in summary.items():
        if split == "shared_prompts":
            continue
        numbers |= {f"data/{split}/read": s["read"], f"data/{split}/rows": s["rows"], f"data/{split}/truncated": s["truncated"]}
        numbers |= {f"data/{split}/dropped/{reason}": n for reason, n in s["dropped"].items()}
        dropped = ", dropped: " + ", ".join(f"{n:,} {reason}" for reason, n in s["dropped"].items()) if s["dropped"] else ""
        line = f"{split}: {s['rows']:,} of {s['read']:,} rows read from {s['source']}{dropped}"
        for what in ("prompt_tokens", "response_tokens"):
            if what in s:
                numbers |= {f"data/{split}/{what}/{q}": n for q, n in s[what].items()}
                line += f"; {what.replace('_', ' ')} " + " ".join(f"{q} {n:,}" for q, n in s[what].items())
        lines.append(line + (f"; {s['truncated']:.1%} of prompts cut" if s["truncated"] else ""))
    for both, n in summary["shared_prompts"].items():
        numbers[f"data/shared_prompts/{both}"] = n
        if n:
            lines.append(f"{n:,} prompts stand in both {' and '.join(both.split('+'))}")
    if lines:
        rank_zero_info("\n".join(lines))
    for logger in loggers:
        logger.log_metrics({name: float(n) for name, n in numbers.items()}, step=0)
