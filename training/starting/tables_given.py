"""The tables that are given to `trunkline init`: which belong together, and whether they are tables at all."""

import gc
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from trunkline.training.data.dataset_folder import class_names_in, splits_of
from trunkline.training.data.sources import read_columns
from trunkline.training.data.tables import FORMATS, format_of
from trunkline.training.starting.columns import Column, number_in

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "dev"), "validation"),
    "test": "test",
}
LONGEST_NAME = 80  # characters of a column's name
BINARY = {  # what files of other kinds begin with
    b"PK\x03\x04": "a ZIP archive, as .xlsx and .docx are",
    b"\xd0\xcf\x11\xe0": "an old Office file, as .xls is",
    b"%PDF": "a PDF",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    **dict.fromkeys((b"<html", b"<!doctype"), "a web page"),
    b"<?xml": "XML",
}


class Table(NamedTuple):
    """A file, and its columns."""

    path: Path
    columns: list[Column]
    encoding: str

    @property
    def rows(self) -> int:
        return len(self.columns[0].values) if self.columns else 0


def grouped(files: Sequence[Path]) -> dict[str, dict[str, Path]]:
    """Files by split, by the name of what they are splits of: 'a-train.csv' and 'a-dev.csv' are two of 'a'.

    Raises:
        ValueError: two files are the same split of the same.
    """
    groups: dict[str, dict[str, Path]] = {}
    for folder in filter(splits_of, files):
        groups[folder.name] = {SPLITS[name]: folder / name for name in splits_of(folder) if name in SPLITS}
    for file in files:
        if file.name in groups:
            continue
        stem = file.name.removesuffix(".gz")
        stem = stem[: -len(Path(stem).suffix)] if format_of(file.name) else stem
        words = re.split(r"([-_. ]+)", stem)
        split = next((SPLITS[word.lower()] for word in words if word.lower() in SPLITS), "train")
        name = "".join(word for word in words if word.lower() not in SPLITS).strip("-_. ")
        splits = groups.setdefault(name or file.absolute().parent.name, {})
        if split in splits:
            raise ValueError(
                f"init: {splits[split]} and {file} are both the {split} rows of '{name}': put them into one file, or "
                "give them names of their own"
            )
        splits[split] = file
    for name, splits in groups.items():
        if "train" not in splits:
            raise ValueError(
                f"init: there are no rows to train on beside {', '.join(map(str, splits.values()))} of '{name}'"
            )
    return groups


def read_table(path: Path, encoding: str = "") -> Table:
    """All columns of a file; of an encoding that is not given, the one that it can be read in.

    Raises:
        ValueError: it is no table, or a table without names of its columns; says what was seen.
    """
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(4096)
        kind = next((kind for sign, kind in BINARY.items() if start.lstrip().lower().startswith(sign.lower())), "")
        if kind and format_of(path.name):
            raise ValueError(f"{path} is no table but {kind}; it takes a {FORMATS} file")
        if start.startswith((b"\xff\xfe", b"\xfe\xff")) and not encoding:
            encoding = "utf-16"
    tried = [encoding] if encoding else ["utf-8", "windows-1252"]
    gc.disable()  # a million rows are a million lists, none of them in a circle
    try:
        for place, name in enumerate(tried, 1):
            try:
                columns = read_columns(path, None, name).columns
                break
            except ValueError as error:
                if place == len(tried) or not isinstance(error.__cause__, UnicodeDecodeError):
                    raise
    finally:
        gc.enable()
    named = class_names_in(path) if path.is_dir() else {}
    table = Table(path, [Column(own, values, tuple(named.get(own, ()))) for own, values in columns.items()], name)
    if format_of(path.name) in (".csv", ".tsv"):
        _check_header(table)
    return table


def _check_header(table: Table) -> None:
    """
    Raises:
        ValueError: the first line is a row like the others.
    """
    names = [column.name for column in table.columns]
    if not names:
        raise ValueError(f"{table.path} has no names of columns in its first line")
    for column in table.columns:
        seen = {str(cell) for cell in column.cells}
        returns = column.name in seen and column.distinct <= max(2, len(column.values) / 2)
        if number_in(column.name) is not None or len(column.name) > LONGEST_NAME or returns:
            why = "values of the rows below" if returns else "no name of a column"
            shown = ",".join(f"column{place}" for place in range(1, len(names) + 1))
            raise ValueError(
                f"{table.path} seems to have no header: {column.name[:LONGEST_NAME]!r} in its first line is {why}. "
                f"Write the names of the columns into a line above it, such as {shown}"
            )


def repeated_texts(train: Mapping[str, Sequence[object]], other: Mapping[str, Sequence[object]]) -> int:
    """Rows of `other` whose texts stand in `train`, too."""
    known = {tuple(map(str, texts)) for texts in zip(*train.values(), strict=True)}
    return sum(tuple(map(str, texts)) in known for texts in zip(*other.values(), strict=True))
