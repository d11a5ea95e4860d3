"""What takes long to make and depends on nothing but its inputs is made once: encoded data and trained tokenizers.

A file's name is the SHA-256 of everything that went into it, so a file is never out of date, and its last bytes are
that of what it holds, so a damaged one is found. Encoded data is mapped into memory (Arrow's file format, not
compressed): what nobody looks at takes no memory. What is mapped is a copy in a file without a name, made while the
digest is checked, which takes seconds for a gigabyte: nobody can cut or change it, as they can a file that has a name,
and a page that is cut off while it is mapped ends the process without a word. A run goes on without a cache that cannot
be written or read.
"""

import json
import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from hashlib import file_digest, sha256
from pathlib import Path
from typing import IO, Any, TypeGuard

import pyarrow as pa
import tokenizers

from trunkline.engine.cache_folder import cache_folder
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.tasks.task import Task
from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.training.data.encoded import Counts, Encoded

FORMAT = 3  # to be raised when encoding changes; part of every name
DIGEST = 64  # bytes at the end of every file: a SHA-256 in hexadecimal

PART = 1 << 20  # bytes that are checked and copied at once

Tell = Callable[[str], None]


def encoded(
    task: Task, key: Sequence[Any], causal: bool, make: Callable[[], Encoded], tell: Tell = lambda _: None
) -> Encoded:
    """One encoded split, from the cache or made and kept there; only made, where the cache cannot be used.

    Args:
        key: what the examples depend on besides the task: rows, tokenizer, longest length.
        tell: is told of a damaged file, which is made anew, and of a cache that cannot be used.
    """
    path = _path([asdict(task), causal, *key], ".arrow", tell)
    if path and (content := _content(path, tell)):
        return _mapped(content, task, causal, path)
    made = make()
    kept = _keep(path, lambda file: _write(file, made), tell)
    return _mapped(content, task, causal, path) if kept and path and (content := _content(path, tell)) else made


def tokenizer(key: Sequence[Any], make: Callable[[], Tokenizer], tell: Tell = lambda _: None) -> Tokenizer:
    """A trained tokenizer, as `encoded`."""
    path = _path(list(key), ".tokenizer.json", tell)
    if content := _content(path, tell):
        return Tokenizer(tokenizers.Tokenizer.from_str(content[:].decode()))
    made = make()
    _keep(path, lambda file: file.write_text(made.inner.to_str(), encoding="utf-8"), tell)
    return made


def _path(key: list[Any], suffix: str, tell: Tell) -> Path | None:
    name = sha256(json.dumps([FORMAT, key]).encode()).hexdigest() + suffix
    try:
        return cache_folder() / name
    except RuntimeError as error:  # nobody's home
        tell(_unusable("the user's home", error))
        return None


def _content(path: Path | None, tell: Tell) -> mmap.mmap | None:
    """What a file holds, as it was written, in memory that is nobody else's; None where there is no such file, or a
    damaged one, which would be other data without a word."""
    if path is None:
        return None
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file, _unnamed(path.parent) as copy:
            state, left = sha256(), path.stat().st_size - DIGEST
            while left > 0 and (part := file.read(min(left, PART))):
                state.update(part)
                copy.write(part)
                left -= len(part)
            copy.flush()
            if left == 0 and copy.tell() and file.read() == state.hexdigest().encode():
                return mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        tell(_unusable(path.parent, error))
        return None
    tell(f"cache: {path} is damaged, and made anew")
    return None


def _unnamed(folder: Path) -> IO[bytes]:
    """A file that only this process has, and that is gone with it."""
    try:
        return tempfile.TemporaryFile(dir=folder)
    except OSError:  # a cache that others keep may be read alone
        return tempfile.TemporaryFile()


def _keep(path: Path | None, write: Callable[[Path], Any], tell: Tell) -> TypeGuard[Path]:
    """Writes a file, and its digest at the end, that is complete or not there, whatever happens to this process or
    another one. Whether it is there."""
    if path is None:
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
            file = Path(temporary) / path.name
            write(file)
            with file.open("r+b") as written:
                digest = file_digest(written, "sha256").hexdigest().encode()
                written.write(digest)
            os.replace(file, path)
    except OSError as error:
        tell(_unusable(path.parent, error))
        return False
    return True


def _unusable(place: Path | str, error: Exception) -> str:
    why = error.strerror if isinstance(error, OSError) and error.strerror else error
    return f"cache: {place} cannot be used ({why}), so all is made again in the next run; TRUNKLINE_CACHE names another"


def _write(path: Path, data: Encoded) -> None:
    references = [[reference] if isinstance(reference, str) else reference for reference in data.references]
    columns = {
        "tokens": pa.LargeListArray.from_arrays(data.bounds, data.tokens),
        "labels": pa.LargeListArray.from_arrays(data.label_bounds, data.labels),
        "references": pa.array(references or [[]] * len(data), pa.large_list(pa.large_string())),
    }
    if data.types is not None:
        columns["types"] = pa.LargeListArray.from_arrays(data.bounds, data.types)
    batch = pa.record_batch(columns, metadata={"counts": json.dumps(asdict(data.counts))})
    with pa.ipc.new_file(path, batch.schema) as file:
        file.write_batch(batch)  # as one, so that every column lies in one piece


def _mapped(content: mmap.mmap, task: Task, causal: bool, path: Path) -> Encoded:
    """The data in a file, none of which is read yet. Pickled, it is the name of the file."""
    batch = pa.ipc.open_file(pa.py_buffer(content)).get_batch(0)
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
        types=batch["types"].values.to_numpy() if "types" in batch.schema.names else None,
    )
    object.__setattr__(data, "again", (_again, (path, task, causal)))
    return data


def _again(path: Path, task: Task, causal: bool) -> Encoded:
    """What another process has mapped.

    Raises:
        ValueError: the file is no longer what it was.
    """
    told: list[str] = []
    if content := _content(path, told.append):
        return _mapped(content, task, causal, path)
    raise ValueError(f"cache: {path} was removed or damaged while it was in use; {' '.join(told)}")


class References(Sequence[str | list[str]]):
    """The texts that each example is to be matched with; made when they are asked for."""

    def __init__(self, column: pa.LargeListArray):
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, i: Any) -> Any:
        texts = self.column[i].as_py()
        return texts[0] if len(texts) == 1 else texts
