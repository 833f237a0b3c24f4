"""Reads json, jsonl, csv, parquet and arrow files row by row, and says of every bad row where it stands."""

import csv
import gzip
import json
import sys
import zlib
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
        yield from _read_tables(_parquet_batches(path), name, "parquet")
    elif suffix == ".arrow":
        yield from _read_tables(_arrow_batches(path), name, "arrow")
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
    try:
        file = open(path, "rb")
        magic = file.read(2)
        file.seek(0)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): check the file and its permissions") from error
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
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"{name}: cannot be unpacked after line {number} ({error}): the file is damaged or cut off; fetch or write it again"
        ) from None


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
        return _as_row(json.loads(line), where)
    except (ValueError, RecursionError) as error:
        return BadRow("not JSON", where, f"not valid JSON: {_json_fault(error)}")


def _json_fault(error: ValueError | RecursionError) -> str:
    """What Python's parser had against a text: JSONDecodeError, depth, or a number of thousands of digits."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "too deeply nested" if isinstance(error, RecursionError) else "a number of thousands of digits"


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
                raise BadRow("not JSON", f"{name}:{line}", "the array does not end: the file is cut off; fetch or write it again")
            return
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            place = f"{name}:{start - 1 + error.lineno if isinstance(error, json.JSONDecodeError) else line}"
            what = f"not valid JSON: {_json_fault(error)}; mend the array, or write one object a line: bad lines can then be skipped"
            raise BadRow("not JSON", place, what) from None
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
            what = f"not valid CSV: {error}; put fields with quotes or line ends in quotes, double the quotes in them, or write jsonl"
            raise BadRow("not CSV", where, what) from None
        if bad:
            yield where, bad.pop()
            bad.clear()
        elif not fields:
            continue
        elif header is None:
            header = fields
            if twice := next((field for i, field in enumerate(fields) if field in fields[:i]), None):
                raise ValueError(f"{where}: the header names the column {_short(twice)} twice; give each column a name of its own")
        elif len(fields) != len(header):
            yield where, BadRow("not CSV", where, f"{len(fields)} fields where the header has {len(header)}")
        else:
            yield where, dict(zip(header, fields, strict=True))


def _parquet_batches(path: str | Path) -> Iterator[Any]:
    import pyarrow.parquet as parquet

    yield from parquet.ParquetFile(path).iter_batches(batch_size=256)


def _arrow_batches(path: str | Path) -> Iterator[Any]:
    """The record batches of an arrow file, of the streaming or the random-access kind (which begins with ARROW1)."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        magic = file.read(6)
        file.seek(0)
        reader = pa.ipc.open_file(file) if magic == b"ARROW1" else pa.ipc.open_stream(file)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if magic == b"ARROW1" else reader
        for batch in batches:
            yield from (batch.slice(start, 256) for start in range(0, len(batch), 256))


def _read_tables(batches: Iterator[Any], name: str, kind: str) -> Iterator[Row]:
    """The rows of record batches, each batch checked before Python touches it: pyarrow trusts a damaged file's offsets."""
    index = 0
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            batch.validate(full=True)
            rows = batch.to_pylist()
        except Exception as error:  # pyarrow raises half a dozen kinds, and to_pylist those of the Python types
            what = (str(error).splitlines() or [type(error).__name__])[0][:200]
            place = f" after row {index - 1}" if index else ""
            raise ValueError(f"{name}: not a readable {kind} file{place} ({what}): it is damaged, cut off or of another kind") from None
        for row in rows:
            yield f"{name}[{index}]", row
            index += 1


def _short(value: Any) -> str:
    """The value as it stands in a message, at most 40 characters."""
    try:
        text = "null" if value is None else repr(value)
    except (RecursionError, ValueError):  # nested too deeply; a number of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 40 else text[:37] + "..."


def names_of(row: Iterable[Any]) -> str:
    """The column names as they stand in a message: sorted, long or odd ones shortened, at most 20."""
    names = sorted(map(str, row))
    shown = [name if len(name) <= 40 and name.isprintable() and name else _short(name) for name in names[:20]]
    return ", ".join(shown) + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "nothing"
