"""Where data comes from: the hub, a URL, a file, a folder, a Dataset or a list; each as named splits of rows."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from lit_rlhf.data.read import SUFFIXES, BadRow, Row, read_file, suffix_of

# str | Dataset | DatasetDict | list of dicts | list of str. For a class in the type, jsonargparse would take the name of a file for that of
# a configuration, and put what stands in the file (a whole csv, as one string) in the place of its name.
Data = Any
VAL_NAMES = ("validation", "valid", "val", "test")


@dataclass(frozen=True)
class Part:
    """One split: its rows, and a text that changes whenever they do."""

    name: str
    rows: Callable[[], Iterator[Row]]
    content: Callable[[], str]


def open_source(data: Any, *, name: str | None = None, revision: str | None = None) -> dict[str, Part]:
    """The splits of a source; one that has no splits (a file, a list, a Dataset) stands under "".

    Raises ValueError or FileNotFoundError where there is no such source.
    """
    if isinstance(data, (datasets.IterableDataset, datasets.IterableDatasetDict)):
        raise ValueError(
            "a streaming data set has no length: take the rows that you want, datasets.Dataset.from_list(list(stream.take(n)))"
        )
    if isinstance(data, datasets.DatasetDict):
        return {split: _from_dataset(part, split) for split, part in data.items()}
    if isinstance(data, datasets.Dataset):
        return {"": _from_dataset(data, "data")}
    if isinstance(data, (list, tuple)):
        return {"": _from_list(list(data))}
    if not isinstance(data, (str, os.PathLike)):
        raise ValueError(f"data must be a hub name, URL, path, Dataset or list of rows, not {type(data).__name__}")
    data = os.fspath(data)
    if re.match(r"https?://", data):
        return {"": _from_url(data)}
    path = Path(os.path.expanduser(data))
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return {"": _from_file(path)}
    if data.startswith((".", "/", "~")) or suffix_of(data) or data.count("/") > 1:
        raise FileNotFoundError(f"{data}: no such file or folder (looked from {os.getcwd()}); check the path")
    return _from_hub(data, name, revision)


def _from_dataset(part: datasets.Dataset, name: str) -> Part:
    part = part.with_format(None)
    return Part(name, lambda: ((f"{name}[{i}]", dict(row)) for i, row in enumerate(part)), lambda: str(part._fingerprint))


def _from_list(rows: list[Any]) -> Part:
    def read() -> Iterator[Row]:
        for i, row in enumerate(rows):
            where = f"data[{i}]"
            row = {"prompt": row} if isinstance(row, str) else row
            yield (
                where,
                dict(row) if isinstance(row, dict) else BadRow("not an object", where, f"a {type(row).__name__}, not a dict of columns"),
            )

    return Part("data", read, lambda: _digest(json.dumps(row, sort_keys=True, default=str).encode() for row in rows))


def _from_file(path: Path, name: str | None = None) -> Part:
    def content() -> str:
        try:
            with open(path, "rb") as file:
                return _digest(iter(lambda: file.read(1 << 20), b""))
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}): check the file and its permissions") from error

    return Part(name or str(path), lambda: read_file(path, name), content)


def _from_url(url: str) -> Part:
    """A file that is fetched once and kept in datasets' download cache."""
    name = url.split("?")[0].split("#")[0]
    if not suffix_of(name):
        raise ValueError(f"{url}: the address must end in the name of a file, one of {', '.join(SUFFIXES)} (or with .gz)")
    try:
        path = datasets.DownloadManager().download(url)
    except (OSError, ValueError) as error:
        raise ValueError(f"{url}: cannot be fetched ({type(error).__name__}: {error})") from error
    return _from_file(Path(path), name)


def _from_folder(path: Path) -> dict[str, Part]:
    """A folder that save_to_disk wrote, or one of files whose names say their split: train.jsonl, data/valid-0.parquet, tldr_train.csv."""
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return open_source(_saved(path))
    files = sorted(f for f in path.rglob("*") if f.is_file() and suffix_of(f.name) and not f.name.startswith((".", "dataset_info")))
    if not files:
        raise ValueError(f"{path}: the folder holds no data file ({', '.join(SUFFIXES)}, or with .gz)")
    splits: dict[str, list[Path]] = {}
    for file in files:
        stem = file.name.lower().removesuffix(".gz").rsplit(".", 1)[0]
        words = set(re.split(r"[-_./]", str(file.relative_to(path).with_name(stem)).lower()))
        for split in {stem, *(words & {"train", *VAL_NAMES})}:
            splits.setdefault(split, []).append(file)
    if not {"train", *VAL_NAMES} & set(splits):
        splits[""] = files
    return {split: _from_files(members) for split, members in splits.items()}


def _saved(path: Path) -> datasets.Dataset | datasets.DatasetDict:
    """What save_to_disk left in a folder, its tables checked: pyarrow trusts a damaged file's offsets."""
    try:
        found = datasets.load_from_disk(str(path))
        for part in found.values() if isinstance(found, datasets.DatasetDict) else [found]:
            part.data.table.validate(full=True)
    except Exception as error:
        what = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{path}: not a readable data set of save_to_disk ({what}): it is damaged or cut off; save it again") from error
    return found


def _from_files(files: list[Path]) -> Part:
    parts = [_from_file(file) for file in files]
    return Part(
        ", ".join(part.name for part in parts),
        lambda: (row for part in parts for row in part.rows()),
        lambda: "+".join(part.content() for part in parts),
    )


def _from_hub(data: str, name: str | None, revision: str | None) -> dict[str, Part]:
    try:
        loaded = datasets.load_dataset(data, name, revision=revision)
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError) as error:
        raise ValueError(f"{data}: neither a file or folder here nor a data set on the hub ({error})") from error
    except ConnectionError as error:
        raise ValueError(f"{data}: no such file or folder, and the hub cannot be reached ({error})") from error
    except Exception as error:
        what = (str(error).splitlines() or ["no reason given"])[0][:300]
        raise ValueError(
            f"{data}: the hub's data set cannot be loaded ({type(error).__name__}: {what}); check its name, and `name`, its configuration"
        ) from error
    return {split: _from_dataset(part, f"{data}/{split}") for split, part in loaded.items()}


def _digest(chunks: Iterator[bytes] | Any) -> str:
    state = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        state.update(chunk)
        state.update(b"\0")
    return state.hexdigest()


def pick(parts: dict[str, Part], wanted: str, source: str, argument: str) -> Part:
    """The split of that name, or the only thing there is; a ValueError that lists the splits where there is neither."""
    if wanted in parts:
        return parts[wanted]
    if "" in parts:
        return parts[""]
    raise ValueError(f"{source} has no split {wanted!r} (has: {', '.join(sorted(parts))}): set {argument}")


def pick_val(parts: dict[str, Part], wanted: str | None, source: str, argument: str, taken: str | None = None) -> Part | None:
    """The split named, else the first of validation, valid, val and test that exists and is not `taken`, else None."""
    if wanted is not None:
        if wanted not in parts:
            raise ValueError(
                f"{source} has no split {wanted!r} (has: {', '.join(sorted(filter(None, parts))) or 'no splits'}): set {argument}"
            )
        return parts[wanted]
    return next((parts[name] for name in VAL_NAMES if name in parts and name != taken), None)
