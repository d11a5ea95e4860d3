"""The columns of one file: .csv, .tsv, .jsonl, .json or .parquet, all but the last of them also with .gz.

Reading is strict, because a misread row is never noticed later: a table with a ragged row, a quote that never closes, a
key given twice or bytes of another encoding are errors with file and row, and values stay strings until the encoder
knows what they mean. Rows come one after the other, in memory that does not depend on their number; only .json, which
is one value, is read as a whole, and of Parquet a row group.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

Columns = dict[str, list[Any]]
Wanted = Sequence[str] | None
Choose = Callable[[list[str]], Sequence[str]]  # of the columns that a file has, those that are read
SEPARATORS = ",;\t|"  # of the fields of a CSV, the usual one first; Excel writes the second in half of Europe
PART, AT_ONCE = 1 << 20, 1024  # bytes, and rows of Parquet, that are looked at together

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


def check_encoding(command: str, encoding: str) -> None:
    """
    Raises:
        ValueError: an --encoding of a command that no text can have.
    """
    try:
        "a".encode(encoding or "utf-8")
    except (LookupError, ValueError) as error:
        known = "windows-1252 and utf-16 are known"
        raise ValueError(f"{command}: --encoding {encoding!r} is unknown; {known}") from error


def read_table(file: BinaryIO, name: str, wanted: Wanted, encoding: str = "utf-8") -> Columns:
    """Columns of a file.

    Args:
        file: what it holds, from its beginning.
        name: of the file; its suffix says how it is read.
        wanted: names of columns; of 'a|b', the first that the file has. None: all that have a name.
        encoding: of text; Parquet has its own.

    Raises:
        MissingColumnError: it has not all of them.
        ValueError: a row or byte that cannot be read; names file and row.
    """
    if wanted is None and format_of(name) in (".jsonl", ".json"):
        return columns_of_records([record for (record,) in rows_of(file, name, None, encoding)], name, None)
    return _columns(lambda choose: rows_of(file, name, choose, encoding), name, wanted)


def rows_of(file: BinaryIO, name: str, choose: Choose | None, encoding: str = "utf-8") -> Iterator[Sequence[Any]]:
    """The rows of a file, one after the other; each has the values of the columns that were chosen.

    Args:
        choose: is told the file's columns (of JSON the keys of the first object), and says which to read. None, of
            JSON alone: a row is the whole object.
        file, name, encoding: as of `read_table`.

    Raises:
        ValueError: as `read_table`, when the row is reached.
    """
    if not name.lower().endswith(".gz"):
        yield from _unpacked_rows(file, name, choose, encoding)
        return
    try:
        with gzip.GzipFile(fileobj=file) as unpacked:
            yield from _unpacked_rows(unpacked, name, choose, encoding)  # type: ignore[arg-type]
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{name} is not a valid gzip file: {error}") from error


def _unpacked_rows(file: BinaryIO, name: str, choose: Choose | None, encoding: str) -> Iterator[Sequence[Any]]:
    suffix = format_of(name)
    if suffix == ".parquet":
        yield from READERS[suffix](file, name, choose)
        return
    # a value of a CSV may have line ends in it, which stay as they are; elsewhere \n alone ends a line, and not, as for
    # splitlines(), U+0085 or U+2028
    text = io.TextIOWrapper(file, encoding, newline="" if suffix == ".csv" else "\n")
    try:
        yield from READERS[suffix](_lines(text, name), name, choose)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not {_undecodable(file, encoding)}") from error
    except UnicodeError as error:
        raise ValueError(f"{name} is not {encoding}: {error}") from error
    finally:
        text.detach()  # which would close the file, and that is the caller's


def _lines(text: Iterable[str], name: str) -> Iterator[str]:
    """Lines with their ends, but for a byte order mark and for the ends of lines at the end of the file."""
    held: list[str] = []  # the last line that is not empty, and empty ones after it
    for place, given in enumerate(text):
        line = given if place else given.removeprefix("\ufeff")
        if line.strip("\r\n"):
            yield from held
            held = []
        held.append(line)
    last = held[0].rstrip("\r\n") if held else ""
    if not last:
        raise ValueError(f"{name} is empty")
    yield last


def _undecodable(file: BinaryIO, encoding: str) -> str:
    """What a file's text is not, with the place of the first byte that shows it and what to do."""
    file.seek(0)
    decoder, offset, line, begin = codecs.getincrementaldecoder(encoding)(), 0, 1, b""
    while True:
        part = file.read(PART)
        begin = begin or part
        try:
            decoder.decode(part, final=not part)
        except UnicodeDecodeError as error:
            before = len(error.object) - len(part)  # bytes of the part before it, which begin a character
            line += part.count(b"\n", 0, max(error.start - before, 0))
            known = "UTF-8" if encoding.lower() in ("utf-8", "utf8") else encoding
            place = f"byte 0x{error.object[error.start]:02x} at offset {offset - before + error.start}, line {line}"
            return f"{known}: {place}{_guess(begin, known)}"
        offset += len(part)
        line += part.count(b"\n")


def _guess(data: bytes, encoding: str) -> str:
    """What the bytes look like that are not of this encoding, and what to do about it."""
    if data.startswith(b"\x1f\x8b"):
        return "; it is compressed: end its name in .gz"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "; it looks like UTF-16: write `encoding: utf-16` on the task, or --encoding utf-16 in a command"
    if b"\0" in data:
        return "; it has zero bytes, which this encoding does not write: is it a table?"
    other = "windows-1252" if encoding == "UTF-8" else "utf-8"
    return f"; it may be `encoding: {other}` on the task, or --encoding {other} in a command"


def _csv_rows(lines: Iterator[str], name: str, choose: Choose) -> Iterator[Sequence[Any]]:
    # The standard library's parser: pyarrow's takes a quote that is still open at the end of the file as closed.
    csv.field_size_limit(2**31 - 1)  # characters; the default, 131,072, is less than a book
    header = next(lines)
    separator = _separator(header)
    reader = csv.reader(chain([header], lines), strict=True, delimiter=separator)

    def records() -> Iterator[list[str]]:
        row, line = 0, 1  # the header is no row
        try:
            for fields in reader:
                row, line = row + 1, reader.line_num + 1
                yield fields or [""]  # an empty line is no field to the parser; in a file of one column it is one
        except csv.Error as error:
            place = f"row {row}" if row else "header"
            raise ValueError(f"{name}, {place}: {_csv_fault(error)} (it begins in line {line})") from error

    hint = f"; a field with {separator!r} in it needs quotes around it"
    return _rows_below_a_header(records(), name, choose, hint)


def _separator(header: str) -> str:
    """What parts the fields of a CSV: the first of `SEPARATORS` that its header has outside quotes."""
    outside = re.sub(r'"[^"]*("|$)', "", header)
    return next((separator for separator in SEPARATORS if separator in outside), SEPARATORS[0])


def _csv_fault(error: csv.Error) -> str:
    if "end of data" in str(error):
        return "a quote that opens is never closed"
    return 'a quote within quotes has to be written twice, as ""' if "expected after" in str(error) else str(error)


def _tsv_rows(lines: Iterator[str], name: str, choose: Choose) -> Iterator[Sequence[Any]]:
    # Quotes mean nothing in GLUE's TSV, and a line is a row.
    return _rows_below_a_header(
        (line.removesuffix("\n").removesuffix("\r").split("\t") for line in lines), name, choose
    )


def _rows_below_a_header(
    records: Iterator[list[str]], name: str, choose: Choose, hint: str = ""
) -> Iterator[Sequence[Any]]:
    """The chosen fields of each row; `hint`: what to do where a row has too many of them."""
    header = next(records)
    places = [header.index(column) for column in choose(header)]
    for row, fields in enumerate(records, 1):
        if len(fields) != len(header):
            many = hint if len(fields) > len(header) else ""
            expected = f"expected {len(header)} fields, as in the header, got {len(fields)}"
            raise ValueError(f"{name}, row {row}: {expected}{many}")
        yield [fields[place] for place in places]


def _jsonl_rows(lines: Iterator[str], name: str, choose: Choose | None) -> Iterator[Sequence[Any]]:
    def records() -> Iterator[dict[str, Any]]:
        for row, line in enumerate(lines, 1):
            if not line.strip():
                raise ValueError(f"{name}, row {row}: not JSON: the line is blank")
            record = _parsed(line, f"{name}, row {row}")
            if not isinstance(record, dict):
                hint = "; an array is read from a .json file" if isinstance(record, list) else ""
                raise ValueError(f"{name}, row {row}: expected a JSON object, got {line.rstrip()[:40]}{hint}")
            yield record

    return _rows_of_records(records(), name, choose)


def _json_rows(lines: Iterator[str], name: str, choose: Choose | None) -> Iterator[Sequence[Any]]:
    """An array of objects, by itself or as 'data' of an object, as SQuAD's."""
    text = "".join(lines)
    content = _parsed(text, name)
    records = content.get("data") if isinstance(content, dict) else content
    if not isinstance(records, list):
        raise ValueError(f"{name}: expected a JSON array of objects, got {text[:40]!r}")
    for row, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise ValueError(f"{name}, row {row}: expected a JSON object, got {json.dumps(record)[:40]}")
    if records and all("paragraphs" in record for record in records):
        records = _questions(records, name)
    return _rows_of_records(records, name, choose)


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


def _rows_of_records(records: Iterable[dict[str, Any]], name: str, choose: Choose | None) -> Iterator[Sequence[Any]]:
    """The chosen keys of records, which all have to have them."""
    if choose is None:
        yield from ([record] for record in records)
        return
    chosen: Sequence[str] = ()
    for row, record in enumerate(records, 1):
        chosen = choose(list(record)) if row == 1 else chosen
        for key in chosen:
            if key not in record:
                raise ValueError(f"{name}, row {row}: no key '{key}', found {list(record)}")
        yield [record[key] for key in chosen]


def _parquet_rows(file: BinaryIO, name: str, choose: Choose) -> Iterator[Sequence[Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        # it is read from its end, which a packed one has to be unpacked for
        table = pyarrow.parquet.ParquetFile(io.BytesIO(file.read()) if isinstance(file, gzip.GzipFile) else file)
        chosen = choose(table.schema_arrow.names)
        for group in range(table.num_row_groups):  # asked for all at once, all are read beforehand
            for batch in table.iter_batches(AT_ONCE, [group], list(dict.fromkeys(chosen))):
                batch.validate(full=True)  # is text UTF-8?
                yield from zip(*(batch[column].to_pylist() for column in chosen), strict=True)
    except (pyarrow.ArrowException, OSError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is not a valid Parquet file: {error}") from error


READERS: dict[str, Callable[..., Iterator[Sequence[Any]]]] = {
    ".parquet": _parquet_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
}


def columns_of_records(records: Sequence[dict[str, Any]], name: str, wanted: Wanted) -> Columns:
    """The wanted columns of records that have the same keys; None: those that every record has."""
    if wanted is None:
        keys = dict.fromkeys(key for record in records for key in record)
        wanted = [key for key in keys if key.strip() and all(key in record for record in records)]
    return _columns(lambda choose: _rows_of_records(records, name, choose), name, wanted)


def _columns(rows: Callable[[Choose], Iterable[Sequence[Any]]], name: str, wanted: Wanted) -> Columns:
    """Rows by their columns; `rows` is told how to choose these."""
    chosen: dict[str, str] = {}

    def choose(found: list[str]) -> list[str]:
        chosen.update(choose_columns(found, name, wanted))
        return list(chosen.values())

    columns: list[list[Any]] = []
    for row in rows(choose):
        columns = columns or [[] for _ in row]
        for values, value in zip(columns, row, strict=True):
            values.append(value)
    names = chosen or wanted or ()  # nothing is chosen where there is no row to see it from
    return dict(zip(names, columns or [[] for _ in names], strict=True))


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
