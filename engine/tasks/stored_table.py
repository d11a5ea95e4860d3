"""A table that is given from Python is kept as a file: so it is read like any other, and a run finds it again."""

import os
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline.engine.cache_folder import cache_folder

if TYPE_CHECKING:
    import pyarrow

TABLES = "a pandas or polars frame, a datasets.Dataset, a pyarrow table, a dict of columns or a list of rows"
FOLDER = "tables"  # in the cache


def stored_table(given: Any, what: str) -> str:
    """The Parquet file that a table is kept in, in the cache; the same table gives the same file.

    Args:
        what: what messages call it.

    Raises:
        ValueError: it is no table, or has columns that hold values of several kinds.
        OSError: the disk is full, not writable, ...
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = _arrow(given, what)
        content = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(table.replace_schema_metadata(None), content)
    except (pyarrow.ArrowException, AttributeError, TypeError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{what}: a column mixes values of several kinds, and cannot be kept: {told:.300}") from error
    data = content.getvalue()
    path = cache_folder() / FOLDER / f"{sha256(data).hexdigest()[:32]}.parquet"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_bytes(data)
        partial.replace(path)
    return str(path)


def in_words(file: str) -> str:
    """What messages call a file: of a table that was given from Python, not where it is kept."""
    path = Path(file)
    kept = path.parent.name == FOLDER and re.fullmatch(r"[0-9a-f]{32}\.parquet", path.name)
    return "the table given from Python" if kept else file


def _arrow(given: Any, what: str) -> "pyarrow.Table":
    import pyarrow

    if isinstance(given, pyarrow.Table):
        return given
    if isinstance(given, Mapping):
        if any(hasattr(part, "column_names") for part in given.values()):
            raise ValueError(f"{what}: these are several splits, {', '.join(map(str, given))}: give one of them")
        return pyarrow.Table.from_pydict({str(name): _listed(values) for name, values in given.items()})
    if isinstance(given, list) and given and all(isinstance(row, Mapping) for row in given):
        return pyarrow.Table.from_pylist([dict(row) for row in given])
    if hasattr(given, "with_format") and hasattr(given, "column_names"):  # datasets.Dataset, also a selection of one
        if not hasattr(given, "__len__"):
            raise ValueError(f"{what}: a streamed dataset has no order to be repeated: load it without streaming")
        return given.with_format("arrow")[:]
    if hasattr(given, "to_arrow"):  # polars
        return given.to_arrow()
    if hasattr(given, "columns") and hasattr(given, "dtypes"):  # pandas
        return pyarrow.Table.from_pandas(given, preserve_index=False)
    raise ValueError(f"{what} must be a file, a split or a table ({TABLES}), got {type(given).__name__} {given!r:.60}")


def _listed(values: Any) -> list[Any]:
    return values.tolist() if hasattr(values, "tolist") else list(values)
