"""The folder of a run: made or refused before any work is done, held by one process alone, cleared of nothing but runs.

run.json says which process works in the folder, and which names in it are the run's. Whoever holds a lock on that file
is alone in the folder; the system lets go of it when the process ends, however it ends.
"""

import errno
import fcntl
import json
import os
import socket
import tempfile
import time
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from trunkline.engine import checkpoint
from trunkline.engine.config import Config
from trunkline.engine.console import tell
from trunkline.engine.foreign import pretrained
from trunkline.engine.tasks.task import Task
from trunkline.training.data.corpus import Corpus
from trunkline.training.data.encoded import Encoded

MANIFEST = "run.json"
WRITTEN = {  # name of what a run writes -> the files inside, where it is a folder
    "config.yaml": (),
    "tokenizer.json": (),
    "metrics.jsonl": (),
    ".metrics.jsonl": (),
    "summary.json": (),
    "samples.json": (),
    "predictions.json": (),
    "report.html": (),
    "checkpoints": tuple(
        f"{folder}/{file}"
        for folder in ("best", "step-[0-9]*", ".*.partial", ".*.complete")
        for file in checkpoint.FILES
    ),
    "model": ("engine.json", "model.safetensors", "tokenizer.json"),
    "profile": ("trace.json", "table.txt"),
    "tensorboard": ("events.out.tfevents.*",),
}
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system that has none: nobody is kept out
BEFORE = {"counting": "tasks", "layout": 1}  # of checkpoints that do not say: not what is the default now
ANOTHER = "name another folder (run=...)"


class RunFolder:
    """A context in which this process alone works in a run's folder.

    Raises:
        ValueError: on entering it, that the folder cannot be used, is in use, or holds a run and neither `resume` nor
            `overwrite` is asked for; or something else stands where the run would write.
        OSError: on leaving it, that the disk is full, not writable, ...
    """

    def __init__(self, config: Config, resume: bool, overwrite: bool, writes: bool = True):
        """`writes`: False on the ranks that leave the folder to the first one."""
        self.config, self.resume, self.overwrite, self.writes = config, resume, overwrite, writes
        self.path = Path(config.run)
        self.checkpoints = self.path / "checkpoints"
        self.begun = False
        self.before = b""  # the manifest as it was found
        self.earlier: tuple[str, ...] = ()  # names that are an earlier run's

    def __enter__(self) -> "RunFolder":
        if not self.writes:
            return self
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run folder {self.path} is a file")
        if self.resume and not self.checkpoints.is_dir():
            raise ValueError(f"run folder {self.path} has no checkpoints to resume from: start it without --resume")
        self.made = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path) as file:
                file.write(b"whether there is room for more than nothing")
            self.lock = self._lock()
        except OSError as error:
            raise ValueError(f"run folder {self.path} cannot be written: {error}") from error
        try:
            self.before = (self.path / MANIFEST).read_bytes()
            self.earlier = self._earlier()
            self._check()
            self._write(self.earlier)
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        if self.writes:
            self._leave()
        if self.begun and isinstance(error, OSError) and error.errno in NO_ROOM:
            raise OSError(
                f"run folder {self.path}: {error}; its checkpoints stay: once it can be written, go on with --resume"
            ) from error

    def begin(self) -> None:
        """From here on the folder holds this run: an earlier one that is to be replaced is removed.

        To be called once everything is checked that can be checked.
        """
        if not self.resume:
            if self.earlier and not self.overwrite:
                tell(f"run folder {self.path}: the run there ended before its first checkpoint, and is begun anew")
            for name in self.earlier:
                _remove(self.path, name)
        self._write(tuple(WRITTEN))
        self.begun = True
        self.checkpoints.mkdir(exist_ok=True)

    def _check(self) -> None:
        """Whether the folder may be used as it is asked for."""
        if self.resume:
            return
        resumable = bool(checkpoint.steps(self.checkpoints))
        finished = any((self.path / name).exists() for name in ("summary.json", "model"))
        if self.earlier and (resumable or finished) and not self.overwrite:
            go_on = "resume it (--resume), " if resumable else ""
            raise ValueError(f"run folder {self.path} holds a run: {go_on}replace it (--overwrite), or {ANOTHER}")
        if self.overwrite and not self.earlier and any(path.name != MANIFEST for path in self.path.iterdir()):
            raise ValueError(
                f"run folder {self.path} holds files, but no run to be replaced: leave --overwrite out, or {ANOTHER}"
            )
        for name in WRITTEN:
            path = self.path / name
            if path.is_symlink() or (path.exists() and name not in self.earlier):
                what = "is a link" if path.is_symlink() else "is no run's"
                raise ValueError(
                    f"run folder {self.path}: {path} {what}, and would be overwritten: move it, or {ANOTHER}"
                )
        for key in ("init", "tokenizer"):
            source = Path(getattr(self.config, key)).resolve()
            if self.earlier and getattr(self.config, key) and source.is_relative_to(self.path.resolve()):
                raise ValueError(f"run folder {self.path} holds {source}, which {key} needs: {ANOTHER}")

    def _earlier(self) -> tuple[str, ...]:
        """The names that are an earlier run's: by its manifest, or as runs wrote them before they had one."""
        try:
            match json.loads((self.path / MANIFEST).read_bytes()):
                case {"format": 1, "written": [_, *_] as names}:
                    return tuple(name for name in names if name in WRITTEN)
        except (OSError, ValueError):
            pass
        only = {path.name for path in self.path.iterdir()} <= {*WRITTEN, MANIFEST} and self.checkpoints.is_dir()
        logged = (self.path / "config.yaml").is_file() and (self.path / "metrics.jsonl").is_file()
        return tuple(WRITTEN) if only or logged else ()

    def _lock(self) -> int:
        """A descriptor of the manifest, which is locked as long as it is open.

        Raises:
            ValueError: another process holds the lock; says which.
        """
        path = self.path / MANIFEST
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                time.sleep(0.2)  # it may not have written yet who it is
                holder = os.read(lock, 10_000)
                os.close(lock)
                raise ValueError(f"run folder {self.path} is in use by {_in_words(holder)}: {ANOTHER}") from error
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
                return lock
            os.close(lock)  # the one who held it has just removed it

    def _leave(self) -> None:
        """Lets go of the folder; where nothing came of the run, it is as it was."""
        if not self.begun and self.before:
            self._put(self.before)
        elif not self.begun:
            (self.path / MANIFEST).unlink(missing_ok=True)
            if self.made and not any(self.path.iterdir()):
                self.path.rmdir()
        os.close(self.lock)

    def _write(self, names: tuple[str, ...]) -> None:
        holder = {"process": os.getpid(), "host": socket.gethostname()}
        self._put(json.dumps({"format": 1, **holder, "written": names}, indent=1).encode())

    def _put(self, manifest: bytes) -> None:
        os.pwrite(self.lock, manifest, 0)  # in place: the lock is on this very file
        os.ftruncate(self.lock, len(manifest))


def _in_words(holder: bytes) -> str:
    try:
        match json.loads(holder):
            case {"process": process, "host": host}:
                return f"process {process} on {host}"
    except ValueError:
        pass
    return "another process"


def _remove(run: Path, name: str) -> None:
    """Removes what a run wrote under a name; whatever else lies there stays, and so do the folders it lies in."""
    path = run / name
    if not WRITTEN[name]:
        path.unlink(missing_ok=True)
        return
    if not path.is_dir():
        return
    for pattern in WRITTEN[name]:
        for file in path.glob(pattern):
            if not file.parent.is_symlink():
                file.unlink()
    for folder in (*(inner for inner in path.iterdir() if inner.is_dir() and not inner.is_symlink()), path):
        if not any(folder.iterdir()):
            folder.rmdir()


def settings_that_count(config: Config) -> dict[str, Any]:
    """Without those of the place where a run lies and of the machine that it runs on."""
    settings = asdict(config)
    elsewhere = ("run", "base", "data", "tokenizer", "vectors")  # of the tokenizer the digest counts
    machine = ("device", "devices", "parallel", "slices", "rank_timeout", "compile", "checkpointing")
    for name in (*elsewhere, *machine, "profile", "track"):
        del settings[name]
    settings["tasks"] = [task.name for task in config.all_tasks]
    return settings


def after_restart(config: Config, resume: bool, overwrite: bool) -> tuple[bool, bool]:
    """`resume` and `overwrite` of a run whose ranks were started again: it goes on from its newest checkpoint."""
    return (True, False) if checkpoint.steps(Path(config.run) / "checkpoints") else (resume, overwrite)


def fingerprint(config: Config, corpus: Corpus) -> dict[str, Any]:
    """What must be the same for a run to go on; where it lies and what it runs on may change."""
    settings = settings_that_count(config)
    settings["layout"] = 1 if corpus.tokenizer.is_plain else config.layout
    settings["init"] = pretrained.digest(config.init) if config.init else ""
    settings["tasks"] = [task.name for task in corpus.tasks]  # in the order of the heads
    data = {
        split.task.name: asdict(split.task)
        | {"examples": len(split), "tokens": int(split.lengths.sum())}
        | {"digest": digest_of(split), "validation_digest": digest_of(validation)}
        for split, validation in zip(corpus.train, corpus.validation, strict=True)
    }
    return json.loads(json.dumps(settings | {"data": data, "tokenizer_digest": corpus.tokenizer.digest}))


def digest_of(split: Encoded) -> str:
    """SHA-256 of the examples: the texts, as tokens, and what is to be learnt of each."""
    state = sha256()
    for values in (split.tokens, split.bounds, split.labels, split.label_bounds):
        state.update(np.ascontiguousarray(values).view(np.uint8).data)
    return state.hexdigest()


def check_goes_on(saved: Mapping[str, Any], current: Mapping[str, Any], step: int) -> None:
    """Compares the fingerprint in a checkpoint with that of the run which is to go on from it at `step`.

    A run at its last step may be given more of them: from there on its learning rate is that of the longer run.

    Raises:
        ValueError: lists all differences.
    """
    task = {field.name: field.default for field in fields(Task) if field.default is not MISSING}
    digests = ("digest", "validation_digest")
    tasks = {
        name: task | {key: data[key] for key in digests}
        for name, data in current["data"].items()
        if name in saved["data"]
    }
    before = _completed(saved, current, asdict(Config(tasks=("text",))) | BEFORE | {"data": tasks})
    if before["steps"] == step < current["steps"]:
        before["steps"] = current["steps"]
    checkpoint.check_same(json.loads(json.dumps(before)), current)


def _completed(saved: Mapping[str, Any], current: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """With the defaults of what there was not yet when it was saved."""
    completed = dict(saved)
    for key, default in defaults.items():
        if key in current and key not in saved:
            completed[key] = default
        elif key in current and isinstance(default, Mapping):
            completed[key] = _completed(saved[key], current[key], default)
    return completed
