"""What takes long to make and depends on nothing but its inputs is made once: encoded data and trained tokenizers.

A file's name is the SHA-256 of everything that went into it, so a file is never out of date. Encoded data is not read
but mapped into memory (Arrow's file format, not compressed): it is there at once however much it is, and the pages that
nobody looks at cost nothing.
"""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa

from trunkline.engine.heads.registry import HEADS
from trunkline.engine.tasks.task import Task
from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.training.data.encoded import Counts, Encoded

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
    if not path.is_file():
        _keep(path, lambda temporary: _write(temporary, make()))
    return _mapped(path, task, causal)


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
    columns = {
        "tokens": pa.LargeListArray.from_arrays(data.bounds, data.tokens),
        "labels": pa.LargeListArray.from_arrays(data.label_bounds, data.labels),
        "references": pa.array(references or [[]] * len(data), pa.large_list(pa.large_string())),
    }
    batch = pa.record_batch(columns, metadata={"counts": json.dumps(asdict(data.counts))})
    with pa.ipc.new_file(path, batch.schema) as file:
        file.write_batch(batch)  # as one, so that every column lies in one piece


def _mapped(path: Path, task: Task, causal: bool) -> Encoded:
    """The data in a file, none of which is read yet. Pickled, it is the name of the file."""
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    tokens, labels = batch["tokens"], batch["labels"]
    data = Encoded(
        task=task,
        causal=causal,
        tokens=tokens.values.to_numpy(),
        bounds=tokens.offsets.to_numpy(),
        labels=labels.values.to_numpy(),
        label_bounds=labels.offsets.to_numpy(),
        references=References(batch["references"]) if HEADS[task.head].learns_words else [],
        counts=Counts(**json.loads(batch.schema.metadata[b"counts"])),
    )
    object.__setattr__(data, "again", (_mapped, (path, task, causal)))
    return data


class References(Sequence[str | list[str]]):
    """The texts that each example is to be matched with; made when they are asked for."""

    def __init__(self, column: pa.LargeListArray):
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, i: Any) -> Any:
        texts = self.column[i].as_py()
        return texts[0] if len(texts) == 1 else texts
