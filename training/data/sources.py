"""The rows of one split of one task: from files, from a folder laid out like the hub, from the hub, or generated.

Reading is strict, because a misread row is never noticed later: a table with a ragged row, a quote that never closes or
bytes that are not UTF-8 is an error with file and row, and values stay strings until the encoder knows what they mean.
"""

import csv
import glob
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, Literal

from trunkline.engine.tasks.task import Task
from trunkline.training.data import generated

Columns = dict[str, list[Any]]


class MissingColumnError(ValueError):
    """A table without a column that is wanted."""


@dataclass(frozen=True)
class Rows:
    """The columns a task wants, of one split, and where each row came from."""

    columns: Columns
    """Values by column, under the name the task gives it: the key of 'document|dialogue' is 'document|dialogue'."""
    origins: tuple[tuple[str, int], ...]
    """(file or dataset, number of its rows), in the order of the rows."""
    digest: str
    """SHA-256 of the files, the generated rows or the hub's fingerprint; keys what is made of these rows."""

    def __len__(self) -> int:
        return sum(count for _, count in self.origins)

    def where(self, row: int) -> str:
        """The origin of row `row` (from 0) for error messages: 'train.csv, row 12' (from 1, header not counted)."""
        for name, count in self.origins:
            if row < count:
                return f"{name}, row {row + 1}"
            row -= count
        raise IndexError(f"{row + 1} rows past the end")


@dataclass(frozen=True)
class Source:
    """A split that is found, and not read yet."""

    digest: str
    """As that of its rows."""
    read: Callable[[], Rows]
    """Reads them, once."""


def read_rows(
    task: Task,
    split: Literal["train", "validation"],
    data: Path | None = None,
    base: Path | None = None,
    seed: int = 0,
) -> Rows:
    """Reads the columns of `task` for one split; arguments and errors as of `find_rows`."""
    return find_rows(task, split, data, base, seed).read()


def find_rows(
    task: Task,
    split: Literal["train", "validation"],
    data: Path | None = None,
    base: Path | None = None,
    seed: int = 0,
) -> Source:
    """Finds the rows of `task` for one split. Files are not parsed for that: what is made of them may be there already.

    Args:
        task: says where the rows are; the first that applies of: `generated`, a file in `task.train` or
            `task.validation`, the folder `data`, the hub.
        split: which of the two splits.
        data: folder laid out like the hub: DATA/glue/sst2/train-*.parquet for the hub's nyu-mll/glue, sst2.
        base: folder that relative file names start from (that of the YAML file); default: the working directory.
        seed: of generated rows.

    Raises:
        ValueError: nothing to read, or, also from `Source.read`, a row, column or byte that cannot be read; names task,
            file and row.
    """
    name = task.train if split == "train" else task.validation
    wanted = tuple(dict.fromkeys(column for column in (*task.text, task.label, task.start) if column))
    with _named(task, split):
        if task.generated:
            source = _generated_rows(task, split, wanted, seed)
        elif Path(name).suffix.lower() in _READERS:
            source = _file_rows(base or Path(), _named_files(base or Path(), name), wanted)
        elif not task.hub:
            raise ValueError(f"expected a {_FORMATS} file, or a hub dataset, got '{name}'")
        elif data is not None:
            source = _file_rows(data, _hub_files(data, task, name), wanted)
        else:
            source = _hub_rows(task, name, wanted)

    @cache
    def read() -> Rows:
        with _named(task, split):
            rows = source.read()
            if len(rows) == 0:
                raise ValueError(f"no rows in {', '.join(name for name, _ in rows.origins)}")
            return rows

    return Source(source.digest, read)


@contextmanager
def _named(task: Task, split: str) -> Iterator[None]:
    """A context whose errors say which task and split they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"task '{task.name}', {split} split: {error}") from error


def read_columns(path: Path, wanted: Sequence[str]) -> Rows:
    """Columns of one file, of all its rows.

    Raises:
        MissingColumnError: it has not all of them.
        ValueError: no such file, another format, or a row or byte that cannot be read.
    """
    if path.suffix.lower() not in _READERS:
        raise ValueError(f"expected a {_FORMATS} file, got {path}")
    return _file_rows(path.parent, [path.name], tuple(wanted)).read()


def _generated_rows(task: Task, split: str, wanted: Sequence[str], seed: int) -> Source:
    name = f"generated {split} rows of {task.name}"
    records = generated.generate(task.name, split, generated.SIZES[split], seed)
    digest = sha256(json.dumps(records).encode()).hexdigest()
    return Source(digest, lambda: Rows(_columns_of_records(records, name, wanted), ((name, len(records)),), digest))


def _hub_rows(task: Task, split: str, wanted: Sequence[str]) -> Source:
    name = " ".join(filter(None, (task.hub, task.subset, split)))
    try:
        import datasets  # optional, and a second of start-up time

        table = datasets.load_dataset(task.hub, task.subset or None, split=split)
    # offline, not on the hub, not open to all, a script, a file that does not parse, a full disk: every
    # one is an error of another class there, and some are of none but Exception
    except Exception as error:
        if type(error) is ValueError:  # of an unknown subset or split; it says which there are
            raise
        local = "/".join(filter(None, ("DIR", task.hub.rpartition("/")[2], task.subset, f"{split}-*.parquet")))
        cause = " ".join(str(error.__cause__ or error).split())
        raise ValueError(
            f"cannot load {name} from the hub, which needs a connection and trunkline[hub]: {cause[:500]}; "
            f"local files serve as well: data=DIR with {local}"
        ) from error
    chosen = _choose_columns(table.column_names, name, wanted)
    digest = sha256(table._fingerprint.encode()).hexdigest()
    return Source(
        digest, lambda: Rows({column: table[chosen[column]][:] for column in wanted}, ((name, len(table)),), digest)
    )


def _hub_files(data: Path, task: Task, split: str) -> list[str]:
    """The files of a split below `data`, relative to it."""
    name = task.hub.rpartition("/")[2]
    places = (f"{name}/{task.subset}", name, f"{task.hub}/{task.subset}", task.hub, task.subset, "")
    folders = list(dict.fromkeys(data / place for place in places))
    for folder in folders:
        shards = sorted(folder.glob(f"{split}-*.parquet"))
        for shard in shards:
            stated = re.search(r"-of-(\d+)$", shard.stem)
            if stated and int(stated[1]) != len(shards):
                raise ValueError(f"{shard} is one of {int(stated[1])} files, found {len(shards)}")
        files = shards or [file for suffix in _READERS if (file := folder / f"{split}{suffix}").is_file()][:1]
        if files:
            return [str(file.relative_to(data)) for file in files]
    looked_in = ", ".join(map(str, folders))
    raise ValueError(f"no {split}-*.parquet, nor {split} as a {_FORMATS} file, in any of {looked_in}")


def _named_files(base: Path, source: str) -> list[str]:
    """The files that `source` stands for, relative to `base`."""
    if "*" not in source:
        return [source]
    names = sorted(glob.glob(source, root_dir=base))
    if not names:
        raise ValueError(f"no file matches {base.absolute() / source}")
    return names


def _file_rows(folder: Path, names: list[str], wanted: Sequence[str]) -> Source:
    state = sha256()
    for name in names:
        path = folder / name
        try:
            with path.open("rb") as file:
                state.update(path.suffix.encode() + file_digest(file, "sha256").digest())
        except OSError as error:
            raise ValueError(f"cannot read {path.absolute()}: {error.strerror}; expected a {_FORMATS} file") from error

    def read() -> Rows:
        columns: Columns = {column: [] for column in wanted}
        origins = []
        for name in names:
            part = _READERS[Path(name).suffix.lower()]((folder / name).read_bytes(), name, wanted)
            for column in wanted:
                columns[column].extend(part[column])
            origins.append((name, len(part[wanted[0]])))
        return Rows(columns, tuple(origins), state.hexdigest())

    return Source(state.hexdigest(), read)


def _decode(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        offset, line = error.start, data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{name} is not UTF-8: byte 0x{data[offset]:02x} at offset {offset}, line {line}") from error
    text = text.removeprefix("\ufeff").rstrip("\r\n")
    if not text:
        raise ValueError(f"{name} is empty")
    return text


def _read_csv(data: bytes, name: str, wanted: Sequence[str]) -> Columns:
    # The standard library's parser: pyarrow's takes a quote that is still open at the end of the file as closed.
    csv.field_size_limit(2**31 - 1)  # characters; the default, 131,072, is less than a book
    records: list[list[str]] = []
    try:
        for fields in csv.reader(io.StringIO(_decode(data, name), newline=""), strict=True):
            records.append(fields or [""])  # an empty line is no field to the parser; in a file of one column it is one
    except csv.Error as error:
        raise ValueError(f"{name}, row {len(records)}: {error}") from error
    return _columns_of_table(records, name, wanted)


def _read_tsv(data: bytes, name: str, wanted: Sequence[str]) -> Columns:
    # Quotes mean nothing in GLUE's TSV, and a line is a row. Not splitlines(): it also splits at U+0085 or U+2028.
    lines = _decode(data, name).split("\n")
    return _columns_of_table([line.removesuffix("\r").split("\t") for line in lines], name, wanted)


def _read_jsonl(data: bytes, name: str, wanted: Sequence[str]) -> Columns:
    records = []
    for line, text in enumerate(_decode(data, name).split("\n"), 1):
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, row {line}: not JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{name}, row {line}: expected a JSON object, got {text[:40]}")
        records.append(record)
    return _columns_of_records(records, name, wanted)


def _read_parquet(data: bytes, name: str, wanted: Sequence[str]) -> Columns:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        chosen = _choose_columns(file.schema_arrow.names, name, wanted)
        table = file.read(columns=list(chosen.values()))
        table.validate(full=True)  # is text UTF-8?
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{name} is not a valid Parquet file: {error}") from error
    return {column: table[chosen[column]].to_pylist() for column in wanted}


_READERS = {".parquet": _read_parquet, ".csv": _read_csv, ".tsv": _read_tsv, ".jsonl": _read_jsonl}
_FORMATS = ".csv, .tsv, .jsonl or .parquet"


def _columns_of_table(records: list[list[str]], name: str, wanted: Sequence[str]) -> Columns:
    header, *rows = records
    chosen = _choose_columns(header, name, wanted)
    for row, fields in enumerate(rows, 1):
        if len(fields) != len(header):
            raise ValueError(f"{name}, row {row}: expected {len(header)} fields, as in the header, got {len(fields)}")
    places = {column: header.index(chosen[column]) for column in wanted}
    return {column: [fields[place] for fields in rows] for column, place in places.items()}


def _columns_of_records(records: list[dict[str, Any]], name: str, wanted: Sequence[str]) -> Columns:
    chosen = _choose_columns(list(dict.fromkeys(key for record in records for key in record)), name, wanted)
    for row, record in enumerate(records, 1):
        for key in chosen.values():
            if key not in record:
                raise ValueError(f"{name}, row {row}: no key '{key}', found {list(record)}")
    return {column: [record[chosen[column]] for record in records] for column in wanted}


def _choose_columns(found: list[str], name: str, wanted: Sequence[str]) -> dict[str, str]:
    """The name in the file of each wanted column: of 'a|b', the first that the file has."""
    chosen = {}
    for column in wanted:
        present = [alternative for alternative in column.split("|") if alternative in found]
        if not present:
            raise MissingColumnError(f"{name} has no column '{column}': wanted {list(wanted)}, found {found}")
        if found.count(present[0]) > 1:
            raise ValueError(f"{name} has two columns '{present[0]}': found {found}")
        chosen[column] = present[0]
    return chosen
