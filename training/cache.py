"""What takes long to make and depends on nothing but its inputs is made once: encoded data and trained tokenizers.

A file's name is the SHA-256 of everything that went into it, so a file is never out of date.
"""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trunkline.training.data import Counts, Encoded
from trunkline.training.tasks import SUMMARIES, Task
from trunkline.training.tokenizer import Tokenizer

FORMAT = 2  # to be raised when encoding changes; part of every name


def folder() -> Path:
    """TRUNKLINE_CACHE, or trunkline in the user's cache folder."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("TRUNKLINE_CACHE") or user / "trunkline")


def encoded(task: Task, key: Sequence[Any], causal: bool, make: Callable[[], Encoded]) -> Encoded:
    """One encoded split, from the cache or made and kept there.

    Args:
        key: what the examples depend on besides the task: rows, tokenizer, longest length.
    """
    path = _path([asdict(task), causal, *key], ".arrow")
    if path.is_file():
        return _read(path, task, causal)
    made = make()
    _keep(path, lambda temporary: _write(temporary, made))
    return made


def tokenizer(key: Sequence[Any], make: Callable[[], Tokenizer]) -> Tokenizer:
    """A trained tokenizer, from the cache or made and kept there."""
    path = _path(list(key), ".tokenizer.json")
    if not path.is_file():
        _keep(path, lambda temporary: make().inner.save(str(temporary)))
    return Tokenizer.load(str(path))


def _path(key: list[Any], suffix: str) -> Path:
    return folder() / (sha256(json.dumps([FORMAT, key]).encode()).hexdigest() + suffix)


def _keep(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a file that is complete or not there, whatever happens to this process or another one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        write(Path(temporary) / path.name)
        os.replace(Path(temporary) / path.name, path)


def _write(path: Path, data: Encoded) -> None:
    references = [[reference] if isinstance(reference, str) else reference for reference in data.references]
    table = pa.table(
        {
            "tokens": pa.LargeListArray.from_arrays(data.bounds, data.tokens),
            "labels": pa.LargeListArray.from_arrays(data.label_bounds, data.labels),
            "references": pa.array(references or [[]] * len(data), pa.list_(pa.string())),
        }
    )
    _write_table(table.replace_schema_metadata({"counts": json.dumps(asdict(data.counts))}), path)


def _write_table(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def _read(path: Path, task: Task, causal: bool) -> Encoded:
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()  # tokens stay in the file until they are looked at
    tokens, labels = (table[name].chunk(0) for name in ("tokens", "labels"))
    references = table["references"].to_pylist() if task.head in SUMMARIES else []
    return Encoded(
        task=task,
        causal=causal,
        tokens=tokens.values.to_numpy(),
        bounds=tokens.offsets.to_numpy().astype(np.int64),
        labels=labels.values.to_numpy(),
        label_bounds=labels.offsets.to_numpy().astype(np.int64),
        references=[texts[0] if len(texts) == 1 else texts for texts in references],
        counts=Counts(**json.loads(table.schema.metadata[b"counts"])),
    )
