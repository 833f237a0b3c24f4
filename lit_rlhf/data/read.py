"""Reads json, jsonl, csv, parquet and arrow files row by row, and says of every bad row where it stands."""

import csv
import gzip
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")


class BadRow(ValueError):
    """A row that cannot be used: `reason` is the short name it is counted under, the text says what, where and what to do."""

    def __init__(self, reason: str, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")
        self.reason = reason


Row = tuple[str, "dict[str, Any] | BadRow"]  # where it stands, and its fields


def suffix_of(name: str) -> str:
    """The file type by its name, without .gz: ".jsonl" for "a.jsonl.gz"; "" where it is none that we read."""
    suffix = Path(name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in SUFFIXES else ""


def read_file(path: str | Path, name: str | None = None) -> Iterator[Row]:
    """The rows of one file, each with "FILE:LINE" (text formats) or "FILE[index]"; `name`, if given, replaces the path in these."""
    name = name or str(path)
    suffix = suffix_of(name)
    if suffix == ".parquet":
        yield from _read_parquet(path, name)
    elif suffix == ".arrow":
        from datasets import Dataset

        yield from ((f"{name}[{i}]", row) for i, row in enumerate(Dataset.from_file(str(path))))
    elif suffix in (".csv", ".tsv"):
        with _open(path) as file:
            yield from _read_csv(file, name, "\t" if suffix == ".tsv" else ",")
    elif suffix:
        with _open(path) as file:
            yield from _read_json(file, name)
    else:
        raise ValueError(f"{name}: unknown kind of file; read are {', '.join(SUFFIXES)}, all but the last two also with .gz")


def _open(path: str | Path) -> IO[bytes]:
    """The file's bytes, unpacked where it is gzipped (by its first two bytes, so a wrong name does not matter)."""
    file = open(path, "rb")
    magic = file.read(2)
    file.seek(0)
    return gzip.open(file) if magic == b"\x1f\x8b" else file  # type: ignore[return-value]


def _lines(file: Iterable[bytes], name: str) -> Iterator[tuple[str, str | BadRow]]:
    """Every line as text; one that is not UTF-8 as a BadRow."""
    number = 0
    try:
        for number, line in enumerate(file, 1):
            where = f"{name}:{number}"
            try:
                yield where, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield (
                    where,
                    BadRow(
                        "not UTF-8",
                        where,
                        f"invalid UTF-8 at byte {error.start + 1} of the line (0x{line[error.start]:02x}): save the file as UTF-8",
                    ),
                )
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        raise ValueError(f"{name}: cannot be unpacked after line {number} ({error}): the file is damaged or cut off") from None


def _read_json(file: IO[bytes], name: str) -> Iterator[Row]:
    """One object a line, or one array of objects."""
    lines, first = _lines(file, name), True
    for where, line in lines:
        if isinstance(line, str) and not line.strip():
            continue
        if first and isinstance(line, str) and line.lstrip().startswith("["):
            yield from _read_array(line, lines, name, int(where.rsplit(":", 1)[1]))
            return
        first = False
        yield where, line if isinstance(line, BadRow) else _parse_line(line, where)


def _parse_line(line: str, where: str) -> dict[str, Any] | BadRow:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        at = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "too deeply nested"
        return BadRow("not JSON", where, f"not valid JSON: {at}")
    return _as_row(row, where)


def _as_row(row: Any, where: str) -> dict[str, Any] | BadRow:
    if isinstance(row, dict):
        return row
    return BadRow("not an object", where, f"{_short(row)} is no object with named fields")


def _read_array(first: str, rest: Iterable[tuple[str, str | BadRow]], name: str, start: int) -> Iterator[Row]:
    """The objects of one JSON array, each with the line it begins on."""
    pieces = [first]
    for _, line in rest:
        if isinstance(line, BadRow):
            raise line
        pieces.append(line)
    text, decoder, line, seen = "".join(pieces), json.JSONDecoder(), start, 0
    at = text.index("[") + 1
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        line, seen = line + text.count("\n", seen, at), at
        if at >= len(text) or text[at] == "]":
            if at >= len(text):
                raise BadRow("not JSON", f"{name}:{line}", "the array does not end: the file is cut off")
            return
        try:
            row, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise BadRow("not JSON", f"{name}:{start - 1 + error.lineno}", f"not valid JSON: {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise BadRow("not JSON", f"{name}:{line}", "not valid JSON: too deeply nested") from None
        yield f"{name}:{line}", _as_row(row, f"{name}:{line}")


def _read_csv(file: IO[bytes], name: str, delimiter: str) -> Iterator[Row]:
    """Rows of a csv file with a header line; quoted fields may hold newlines, and a row stands at its first line."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    bad: list[BadRow] = []

    def text() -> Iterator[str]:
        for _, line in _lines(file, name):
            if isinstance(line, BadRow):
                bad.append(line)
                line = "?\n"
            yield line

    reader = csv.reader(text(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        where = f"{name}:{reader.line_num + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise BadRow("not CSV", where, f"not valid CSV: {error}") from None
        if bad:
            yield where, bad.pop()
            bad.clear()
        elif not fields:
            continue
        elif header is None:
            header = fields
        elif len(fields) != len(header):
            yield where, BadRow("not CSV", where, f"{len(fields)} fields where the header has {len(header)}")
        else:
            yield where, dict(zip(header, fields, strict=True))


def _read_parquet(path: str | Path, name: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=256)
        index = 0
        for batch in batches:
            for row in batch.to_pylist():
                yield f"{name}[{index}]", row
                index += 1
    except pa.ArrowInvalid as error:
        raise ValueError(f"{name}: not a readable parquet file: {error}") from None


def _short(value: Any) -> str:
    """The value as it stands in a message, at most 40 characters."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
