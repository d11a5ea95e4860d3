"""The columns of one file: .csv, .tsv, .jsonl, .json or .parquet, all but the last of them also with .gz.

Reading is strict, because a misread row is never noticed later: a table with a ragged row, a quote that never closes, a
key given twice or bytes of another encoding are errors with file and row, and values stay strings until the encoder
knows what they mean.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

Columns = dict[str, list[Any]]
Wanted = Sequence[str] | None

FORMATS = ".csv, .tsv, .jsonl, .json or .parquet"
SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".ods")


class MissingColumnError(ValueError):
    """A table without a column that is wanted."""


def format_of(name: str) -> str:
    """The suffix by which a file is read, of 'a.csv.gz' '.csv'; empty: it is none of FORMATS."""
    path = Path(name.lower())
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return suffix if suffix in READERS else ""


def unread(name: str) -> str:
    """What to do about a file of another format, in words."""
    if Path(name).suffix.lower() in SPREADSHEETS:
        return f"'{name}' is a spreadsheet: save it as CSV (UTF-8), or pandas.read_excel(...).to_csv(...)"
    return f"got '{name}'"


def read_table(data: bytes, name: str, wanted: Wanted, encoding: str = "utf-8") -> Columns:
    """Columns of a file with these bytes.

    Args:
        name: of the file; its suffix says how it is read.
        wanted: names of columns; of 'a|b', the first that the file has. None: all that have a name.
        encoding: of text; Parquet has its own.

    Raises:
        MissingColumnError: it has not all of them.
        ValueError: a row or byte that cannot be read; names file and row.
    """
    if name.lower().endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{name} is not a valid gzip file: {error}") from error
    suffix = format_of(name)
    if suffix == ".parquet":
        return _read_parquet(data, name, wanted)
    return READERS[suffix](_decode(data, name, encoding), name, wanted)


def _decode(data: bytes, name: str, encoding: str) -> str:
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        offset, line = error.start, data.count(b"\n", 0, error.start) + 1
        known = "UTF-8" if encoding.lower() in ("utf-8", "utf8") else encoding
        raise ValueError(
            f"{name} is not {known}: byte 0x{data[offset]:02x} at offset {offset}, line {line}{_guess(data)}"
        ) from error
    except UnicodeError as error:
        raise ValueError(f"{name} is not {encoding}: {error}") from error
    text = text.removeprefix("\ufeff").rstrip("\r\n")
    if not text:
        raise ValueError(f"{name} is empty")
    return text


def _guess(data: bytes) -> str:
    """What the bytes look like, and what to do about it."""
    if data.startswith(b"\x1f\x8b"):
        return "; it is compressed: end its name in .gz"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "; it looks like UTF-16: write `encoding: utf-16` on the task"
    return "; of another encoding, name it on the task: `encoding: windows-1252`, for one"


def _read_csv(text: str, name: str, wanted: Wanted) -> Columns:
    # The standard library's parser: pyarrow's takes a quote that is still open at the end of the file as closed.
    csv.field_size_limit(2**31 - 1)  # characters; the default, 131,072, is less than a book
    records: list[list[str]] = []
    try:
        records.extend(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise ValueError(f"{name}, row {len(records)}: {error}") from error
    if not all(records):  # an empty line is no field to the parser; in a file of one column it is one
        records = [fields or [""] for fields in records]
    return _columns_of_table(records, name, wanted)


def _read_tsv(text: str, name: str, wanted: Wanted) -> Columns:
    # Quotes mean nothing in GLUE's TSV, and a line is a row. Not splitlines(): it also splits at U+0085 or U+2028.
    lines = text.split("\n")
    return _columns_of_table([line.removesuffix("\r").split("\t") for line in lines], name, wanted)


def _read_jsonl(text: str, name: str, wanted: Wanted) -> Columns:
    records = []
    for row, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            raise ValueError(f"{name}, row {row}: not JSON: the line is blank")
        record = _parsed(line, f"{name}, row {row}")
        if not isinstance(record, dict):
            hint = "; an array is read from a .json file" if isinstance(record, list) else ""
            raise ValueError(f"{name}, row {row}: expected a JSON object, got {line[:40]}{hint}")
        records.append(record)
    return columns_of_records(records, name, wanted)


def _read_json(text: str, name: str, wanted: Wanted) -> Columns:
    """An array of objects, by itself or as 'data' of an object, as SQuAD's."""
    content = _parsed(text, name)
    records = content.get("data") if isinstance(content, dict) else content
    if not isinstance(records, list):
        raise ValueError(f"{name}: expected a JSON array of objects, got {text[:40]!r}")
    for row, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise ValueError(f"{name}, row {row}: expected a JSON object, got {json.dumps(record)[:40]}")
    if records and all("paragraphs" in record for record in records):
        records = _questions(records, name)
    return columns_of_records(records, name, wanted)


def _questions(articles: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """SQuAD's articles as a row for every question."""
    try:
        return [
            {"title": article.get("title"), "context": paragraph["context"], **question}
            for article in articles
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{name}: articles need paragraphs with 'context' and 'qas', as SQuAD's: {error!r}") from error


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"{where}: not JSON: {error.msg} at {line}column {error.colno}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: not read: nested too deeply") from error
    except ValueError as error:  # a key twice, or a number of thousands of digits
        raise ValueError(f"{where}: not read: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key '{next(key for key in keys if keys.count(key) > 1)}' is given twice")
    return found


def _read_parquet(data: bytes, name: str, wanted: Wanted) -> Columns:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        chosen = choose_columns(file.schema_arrow.names, name, wanted)
        table = file.read(columns=list(chosen.values()))
        table.validate(full=True)  # is text UTF-8?
        return {column: table[own].to_pylist() for column, own in chosen.items()}
    except (pyarrow.ArrowException, OSError, OverflowError) as error:
        raise ValueError(f"{name} is not a valid Parquet file: {error}") from error


READERS: dict[str, Callable[..., Columns]] = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
}


def _columns_of_table(records: list[list[str]], name: str, wanted: Wanted) -> Columns:
    header, *rows = records
    chosen = choose_columns(header, name, wanted)
    if {*map(len, rows)} - {len(header)}:
        row, fields = next((row, fields) for row, fields in enumerate(rows, 1) if len(fields) != len(header))
        raise ValueError(f"{name}, row {row}: expected {len(header)} fields, as in the header, got {len(fields)}")
    places = {column: header.index(own) for column, own in chosen.items()}
    return {column: [*map(itemgetter(place), rows)] for column, place in places.items()}


def columns_of_records(records: list[dict[str, Any]], name: str, wanted: Wanted) -> Columns:
    """The wanted columns of records that have the same keys; all: those that every record has."""
    keys = list(dict.fromkeys(key for record in records for key in record))
    if wanted is None:
        keys = [key for key in keys if all(key in record for record in records)]
    chosen = choose_columns(keys, name, wanted)
    for row, record in enumerate(records, 1):
        for key in chosen.values():
            if key not in record:
                raise ValueError(f"{name}, row {row}: no key '{key}', found {list(record)}")
    return {column: [record[key] for record in records] for column, key in chosen.items()}


def choose_columns(found: list[str], name: str, wanted: Wanted) -> dict[str, str]:
    """The name in the file of each wanted column: of 'a|b', the first that the file has."""
    chosen = {}
    if wanted is None:
        meant = {column: [column] for column in found if column.strip()}
    else:
        meant = {column: [column, *column.split("|")] for column in wanted}  # a name may have a bar in it
    for column, alternatives in meant.items():
        present = [own for own in alternatives if own in found]
        if not present:
            raise MissingColumnError(f"{name} has no column '{column}': wanted {[*meant]}, found {found}")
        if found.count(present[0]) > 1:
            raise ValueError(f"{name} has two columns '{present[0]}': found {found}")
        chosen[column] = present[0]
    return chosen
