"""The rows of one split of one task: from files, from a folder laid out like the hub, from the hub, or generated.

Where a task has no validation split of its own, a part of its training rows is held out.
"""

import glob
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, Literal

from trunkline.engine.tasks.stored_table import in_words
from trunkline.engine.tasks.task import Task
from trunkline.training.data import generated
from trunkline.training.data.dataset_folder import files_of, is_dataset_folder, read_dataset_folder
from trunkline.training.data.tables import (
    FORMATS,
    READERS,
    Choose,
    Columns,
    Wanted,
    choose_columns,
    columns_of_records,
    format_of,
    read_table,
    rows_of,
    unread,
)


@dataclass(frozen=True)
class Rows:
    """The columns a task wants, of one split, and where each row came from."""

    columns: Columns
    """Values by column, under the name the task gives it: the key of 'document|dialogue' is 'document|dialogue'."""
    origins: tuple[tuple[str, int], ...]
    """(file or dataset, number of its rows), in the order of the rows."""
    digest: str
    """SHA-256 of the files, the generated rows or the hub's fingerprint; keys what is made of these rows."""
    part: Sequence[int] | None = None
    """Of the origins' rows, those that these are, ascending; None: all."""

    def __len__(self) -> int:
        return sum(count for _, count in self.origins) if self.part is None else len(self.part)

    def where(self, row: int) -> str:
        """The origin of row `row` (from 0) for error messages: 'train.csv, row 12' (from 1, header not counted)."""
        row = row if self.part is None else self.part[row]
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
    held_out = task.validation if isinstance(task.validation, float) else None
    name = os.path.expanduser(str(task.train if split == "train" or held_out else task.validation))
    wanted = tuple(dict.fromkeys(column for column in (*task.text, *task.label_columns, task.start) if column))
    with _named(task, split):
        if task.generated:
            source = _generated_rows(task, split, wanted, seed)
        elif format_of(name):
            source = _file_rows(base or Path(), _named_files(base or Path(), name), wanted, task.encoding)
        elif not task.hub and is_dataset_folder((base or Path()) / name):
            source = _file_rows(base or Path(), [name], wanted, task.encoding)
        elif not task.hub:
            expected = f"expected a {FORMATS} file, a folder of save_to_disk, or a hub dataset"
            raise ValueError(f"{expected}; {unread(name)}{_offer(split)}")
        elif data is not None:
            source = _file_rows(data, _hub_files(data, task, name, split), wanted, task.encoding)
        else:
            source = _hub_rows(task, name, wanted)
        if held_out:
            source = _part(source, task.text, held_out, split)

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
        told = str(error)
        for name in map(str, (task.train, task.validation)):
            told = told.replace(name, in_words(name))
        raise ValueError(f"task '{task.name}', {split} split: {told}") from error


def _offer(split: str) -> str:
    return "; `validation: 0.1` holds out a tenth of the training rows" if split == "validation" else ""


def rows_of_file(path: Path, choose: Choose | None, encoding: str = "utf-8") -> Iterator[Sequence[Any]]:
    """The rows of one file, one after the other, in memory that does not depend on their number.

    Args:
        choose: as of `rows_of`.

    Raises:
        ValueError: no such file, another format, or, when it is reached, a row or byte that cannot be read.
    """
    if not format_of(path.name):
        raise ValueError(f"expected a {FORMATS} file; {unread(str(path))}")
    if path.exists() and not path.is_file():
        raise ValueError(f"cannot read {path.absolute()}: it is no ordinary file")
    try:
        file = path.open("rb")
    except OSError as error:
        raise ValueError(f"cannot read {path.absolute()}: {error.strerror}; expected a {FORMATS} file") from error
    with file:
        yield from rows_of(file, path.name, choose, encoding)


def read_columns(path: Path, wanted: Wanted, encoding: str = "utf-8") -> Rows:
    """Columns of one file, of all its rows.

    Args:
        wanted: names; None: all columns that have one.

    Raises:
        MissingColumnError: it has not all of them.
        ValueError: no such file, another format, or a row or byte that cannot be read.
    """
    if not format_of(path.name) and not is_dataset_folder(path):
        raise ValueError(f"expected a {FORMATS} file; {unread(str(path))}")
    return _file_rows(path.parent, [path.name], wanted, encoding).read()


def _part(source: Source, text: Sequence[str], fraction: float, split: str) -> Source:
    """The rows of one split, of a source that has those of both."""
    digest = sha256(f"{source.digest} {split} {fraction} of the rows with text".encode()).hexdigest()

    def read() -> Rows:
        rows = source.read()
        columns = [["" if cell is None else str(cell) for cell in rows.columns[column]] for column in text]
        validation = _held_out([*zip(*columns, strict=True)], fraction)
        part = [row for row in range(len(rows)) if (row in validation) == (split == "validation")]
        if not part:
            raise ValueError(f"{len(rows)} rows have too few different texts for `validation: {fraction}`")
        kept = {name: [values[row] for row in part] for name, values in rows.columns.items()}
        return Rows(kept, rows.origins, digest, part)

    return Source(digest, read)


def _held_out(texts: Sequence[Sequence[str]], fraction: float) -> set[int]:
    """Rows for validation: those of the texts whose SHA-256 are the lowest, until they are the fraction.

    So a text is on one side only, however often it occurs, whatever its case and spaces, and wherever its rows stand.
    Rows without text, which are one text to the hash, stay on the side of training and count for nothing.
    """
    rows_of: dict[bytes, list[int]] = {}
    for row, columns in enumerate(texts):
        if not any(text.strip() for text in columns):
            continue
        same = json.dumps([" ".join(text.split()).casefold() for text in columns])
        rows_of.setdefault(sha256(same.encode()).digest(), []).append(row)
    held_out: set[int] = set()
    for digest in sorted(rows_of)[:-1]:  # the last is left for training
        if len(held_out) >= fraction * sum(map(len, rows_of.values())):
            break
        held_out.update(rows_of[digest])
    return held_out


def _generated_rows(task: Task, split: str, wanted: Sequence[str], seed: int) -> Source:
    name = f"generated {split} rows of {task.name}"
    records = generated.generate(task.name, split, generated.SIZES[split], seed)
    digest = sha256(json.dumps(records).encode()).hexdigest()
    return Source(digest, lambda: Rows(columns_of_records(records, name, wanted), ((name, len(records)),), digest))


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
    chosen = choose_columns(table.column_names, name, wanted)
    digest = sha256(table._fingerprint.encode()).hexdigest()
    return Source(
        digest, lambda: Rows({column: table[chosen[column]][:] for column in wanted}, ((name, len(table)),), digest)
    )


def _hub_files(data: Path, task: Task, name_of_split: str, split: str) -> list[str]:
    """The files of a split below `data`, relative to it."""
    name = task.hub.rpartition("/")[2]
    places = (f"{name}/{task.subset}", name, f"{task.hub}/{task.subset}", task.hub, task.subset, "")
    folders = list(dict.fromkeys(data / place for place in places))
    for folder in folders:
        shards = sorted(folder.glob(f"{name_of_split}-*.parquet"))
        for shard in shards:
            stated = re.search(r"-of-(\d+)$", shard.stem)
            if stated and int(stated[1]) != len(shards):
                raise ValueError(f"{shard} is one of {int(stated[1])} files, found {len(shards)}")
        tables = [folder / f"{name_of_split}{suffix}{gz}" for suffix in READERS for gz in ("", ".gz")]
        files = shards or [file for file in tables if file.is_file()][:1]
        if files:
            return [str(file.relative_to(data)) for file in files]
    looked_in = ", ".join(map(str, folders))
    raise ValueError(
        f"no {name_of_split}-*.parquet, nor {name_of_split} as a {FORMATS} file, in any of {looked_in}{_offer(split)}"
    )


def _named_files(base: Path, source: str) -> list[str]:
    """The files that `source` stands for, relative to `base`."""
    if "*" not in source:
        return [source]
    names = sorted(glob.glob(source, root_dir=base))
    if not names:
        raise ValueError(f"no file matches {base.absolute() / source}")
    return names


def _file_rows(folder: Path, names: list[str], wanted: Wanted, encoding: str) -> Source:
    state = sha256(encoding.encode())
    for path in (file for name in names for file in files_of(folder / name)):
        try:
            with path.open("rb") as file:
                state.update(path.suffix.encode() + file_digest(file, "sha256").digest())
        except OSError as error:
            raise ValueError(f"cannot read {path.absolute()}: {error.strerror}; expected a {FORMATS} file") from error

    def read() -> Rows:
        columns: Columns = {}
        origins = []
        for name in names:
            if (folder / name).is_dir():
                part = read_dataset_folder(folder / name, name, wanted)
            else:
                with (folder / name).open("rb") as file:
                    part = read_table(file, name, wanted, encoding)
            for column, values in part.items():
                columns.setdefault(column, []).extend(values)
            origins.append((in_words(name), len(next(iter(part.values()), []))))
        return Rows(columns, tuple(origins), state.hexdigest())

    return Source(state.hexdigest(), read)
