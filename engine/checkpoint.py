"""Checkpoints that outlive what happens to runs: a kill in the middle of a save, a full disk, a damaged file.

A checkpoint is a folder: `<group>.safetensors` for each group of tensors, state.json, and last manifest.json with the
size and SHA-256 of the others. Nothing is ever unpickled. Of a model in slices every slice is a file of its own,
`<group>-<number>-of-<count>.safetensors`, which the rank that holds it writes: no host needs room for the whole. A save
goes through two names on its way to <name>:

    .<name>.partial    is being written; the next save removes what a killed one left
    .<name>.complete   is written, and as long as it is there, it and not <name> is the checkpoint of that name
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import file_digest
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import AdamW

Named = Iterable[tuple[str, Tensor]]
FORMAT = 1  # of the folder; any other is refused
FILES = ("*.safetensors", "state.json", "manifest.json")  # that a checkpoint is made of
ENTRIES = ("exp_avg", "exp_avg_sq", "step")  # what AdamW keeps for each parameter
SLICE = re.compile(r"(?P<group>.+)-(?P<number>\d+)-of-(?P<count>\d+)")  # the stem of its file, numbers from 1
CUT = "cut"  # in a slice's file: along which side each tensor is cut, as JSON
Result = TypeVar("Result")


class CheckpointError(ValueError):
    """A checkpoint that is absent, damaged or of another model; says which file and what is wrong with it."""


@dataclass(frozen=True)
class Part:
    """What one of the ranks that write a checkpoint together does of it.

    Attributes:
        number, count: which slice of the tensors it has; None: one that another rank writes.
        sides: along which each tensor is cut; what is not named is whole, and the first slice has it.
        first: whether it makes the folder and the manifest.
        gather: what every rank gives, by rank.
    """

    number: int | None = 0
    count: int = 1
    sides: Mapping[str, int] = field(default_factory=dict)
    first: bool = True
    gather: Callable[[Any], list[Any]] = lambda value: [value]

    def all_do(self, work: Callable[[], Result]) -> list[Result]:
        """What `work` makes on every rank; an OSError, the same on all, where it fails on one."""
        made, fault = None, ""
        try:
            made = work()
        except (OSError, SafetensorError) as error:  # safetensors tells of a full disk by the latter
            fault = str(error)
        everywhere = self.gather((made, fault))
        if faults := [fault for _, fault in everywhere if fault]:
            raise OSError(faults[0])
        return [made for made, _ in everywhere]


WHOLE = Part()


def save(
    folder: Path,
    name: str,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    part: Part = WHOLE,
) -> Path:
    """Writes the checkpoint folder/name; one of that name is only given up once the new one is complete.

    `tensors` are by group ('model', 'optimizer') and name, `state` is a JSON object. Only one run writes to a folder;
    where several ranks do, all call this, and the manifest is written once all their files are.

    Raises:
        OSError: the disk is full, not writable, ...; what was written is removed, earlier checkpoints stay.
    """
    partial, complete = folder / f".{name}.partial", folder / f".{name}.complete"

    def begin() -> None:
        _settle(folder)
        partial.mkdir(parents=True)

    def write() -> dict[str, Any]:
        files = [_write(partial, group, members, part) for group, members in tensors.items()]
        if part.first:
            files.append(partial / "state.json")
            files[-1].write_text(json.dumps(state, indent=2))
        for file in files:
            _sync(file)
        return {file.name: _fingerprint(file) for file in files}

    def conclude() -> None:
        listed = {file: fingerprint for of_rank in written for file, fingerprint in sorted(of_rank.items())}
        manifest = partial / "manifest.json"
        manifest.write_text(json.dumps({"format": FORMAT, "files": listed}, indent=2))
        for new in (manifest, partial):
            _sync(new)
        partial.rename(complete)
        _sync(folder)
        _settle(folder)

    try:
        part.all_do(begin if part.first else _nothing)
        written = part.all_do(write if part.first or part.number is not None else dict)
        part.all_do(conclude if part.first else _nothing)
    except ConnectionError:  # another rank is lost, who may be writing still: the next save removes what there is
        raise
    except OSError as error:
        if part.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"checkpoint {folder / name} is not saved, earlier ones are kept: {error}") from error
    return folder / name


def _nothing() -> None:
    """What a rank does while the first one makes or ends a checkpoint."""


def _write(folder: Path, group: str, members: Mapping[str, Tensor], part: Part) -> Path:
    if part.count == 1:
        file = folder / f"{group}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in members.items()}, file)
    else:
        assert part.number is not None
        file = folder / f"{group}-{part.number + 1}-of-{part.count}.safetensors"
        own = {key: tensor.contiguous() for key, tensor in members.items() if part.number == 0 or key in part.sides}
        sides = {key: part.sides[key] for key in own if key in part.sides}
        save_file(own, file, {CUT: json.dumps(sides)})
    file.chmod(folder.stat().st_mode & 0o666)  # safetensors writes for the owner only, whatever the umask
    return file


class _Joined(Mapping[str, Tensor]):
    """Tensors that lie in slices, each put together when it is asked for."""

    def __init__(self, files: list[Path], device: str):
        self.slices = [load_file(file, device) for file in files]
        with safe_open(files[0], "pt") as first:
            self.sides = json.loads(first.metadata()[CUT])

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.sides:
            return self.slices[0][name]
        return torch.cat([of_rank[name] for of_rank in self.slices], self.sides[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.slices[0])

    def __len__(self) -> int:
        return len(self.slices[0])


def load(path: Path, device: str | torch.device = "cpu") -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
    """The tensors, by group and name, and the state of a checkpoint, once all its files are found to be whole.

    Raises:
        CheckpointError: no such checkpoint, or a file of it is missing or damaged.
    """
    tensors: dict[str, Mapping[str, Tensor]] = {}
    state = {}
    for file in _verified(path):
        try:
            if file.suffix == ".safetensors":
                if found := SLICE.fullmatch(file.stem):
                    group, count = found["group"], int(found["count"])
                    names = [f"{group}-{number}-of-{count}.safetensors" for number in range(1, count + 1)]
                    if group not in tensors:
                        tensors[group] = _Joined([file.with_name(name) for name in names], str(device))
                else:
                    tensors[file.stem] = load_file(file, str(device))
            elif file.name == "state.json":
                state = json.loads(file.read_bytes())
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(f"{file} is not what its name says: {error}") from error
    return tensors, state


def digest(path: Path) -> str:
    """SHA-256 of a checkpoint: of its manifest, which has those of all its files."""
    return str(_fingerprint(_manifest(path))["sha256"])


def newest(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The valid 'step-<n>' of the largest n, with a warning for each one passed over; None if there is none at all.

    Raises:
        CheckpointError: there are checkpoints, but not a valid one; says what is wrong with each.
    """
    faults = []
    for path in steps(folder):
        try:
            _verified(path)
            return path
        except CheckpointError as error:
            faults.append(str(error))
            warn(f"checkpoint {path.name} is passed over: {error}")
    if faults:
        raise CheckpointError(f"no valid checkpoint in {folder}: {'; '.join(faults)}")
    return None


def prune(folder: Path, keep: int) -> None:
    """Removes all checkpoints 'step-<n>' but the `keep`, at least 1, of the largest n."""
    _settle(folder)
    for path in steps(folder)[max(keep, 1) :]:
        _remove(path)


def optimizer_tensors(optimizer: AdamW, named_parameters: Named) -> dict[str, Tensor]:
    """The state of AdamW (without amsgrad), not copied: '<parameter>.exp_avg', '.exp_avg_sq' and '.step'.

    A parameter that had no gradient yet has no state: it gets the zeros that AdamW starts from.
    """
    tensors: dict[str, Tensor] = {}
    names = {parameter: name for name, parameter in named_parameters}
    for p in [p for group in optimizer.param_groups for p in group["params"]]:
        state = optimizer.state.get(p) or {e: torch.zeros(() if e == "step" else p.shape) for e in ENTRIES}
        tensors |= {f"{names[p]}.{e}": state[e] for e in ENTRIES}
    return tensors


def load_optimizer_tensors(optimizer: AdamW, named_parameters: Named, tensors: Mapping[str, Tensor]) -> None:
    """Gives `optimizer` a copy of what `optimizer_tensors` took; the learning rate and the like stay its own.

    Raises:
        CheckpointError: an entry is missing, surplus or of another shape; the optimizer is left as it was.
    """
    shapes = {key: list(tensor.shape) for key, tensor in optimizer_tensors(optimizer, named_parameters).items()}
    if differences := list(_differences({key: list(tensor.shape) for key, tensor in tensors.items()}, shapes)):
        raise CheckpointError(
            f"optimizer state of another model, {len(differences)} shapes differ: {'; '.join(differences[:9])}"
        )
    names = [key.removesuffix(".step") for key in shapes if key.endswith(".step")]  # in the optimizer's own order
    state = {i: {entry: tensors[f"{name}.{entry}"].clone() for entry in ENTRIES} for i, name in enumerate(names)}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def check_same(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Compares the settings that define a run, from the state of its checkpoint, with those it is to go on with.

    Raises:
        ValueError: lists all differences, such as 'batch.tokens: 2048 in the checkpoint, 4096 now'.
    """
    if differences := "; ".join(_differences(saved, json.loads(json.dumps(current)))):  # as JSON: a tuple is a list
        raise ValueError(f"a run cannot go on with other settings: {differences}")


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in {**saved, **current}:
        before, now = saved.get(key, "absent"), current.get(key, "absent")
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from _differences(before, now, f"{prefix}{key}.")
        elif before != now:
            yield f"{prefix}{key}: {before} in the checkpoint, {now} now"


def _settle(folder: Path) -> None:
    """Removes the saves that did not get to their end, and brings those that did to their place."""
    for partial in folder.glob(".*.partial"):
        shutil.rmtree(partial)
    for complete in folder.glob(".*.complete"):
        target = folder / complete.name.removeprefix(".").removesuffix(".complete")
        _remove(target)
        for other in target.iterdir() if target.is_dir() else ():  # what is not ours stays where it was
            other.rename(complete / other.name)
        if target.is_dir():
            target.rmdir()
        complete.rename(target)


def _remove(path: Path) -> None:
    """Removes a checkpoint, and its folder unless something else lies there."""
    for file in _files(path):
        file.unlink(missing_ok=True)
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()


def _files(path: Path) -> list[Path]:
    return [file for pattern in FILES for file in path.glob(pattern)]


def steps(folder: Path) -> list[Path]:
    """The checkpoints 'step-<n>' of a folder, whole or damaged, largest n first."""
    numbers = set()
    for path in map(folder.joinpath, os.listdir(folder) if folder.exists() else ()):
        number = path.name.removeprefix(".").removesuffix(".complete").removeprefix("step-")
        others = path.is_dir() and not _files(path) and any(path.iterdir())  # nothing of ours is in there
        if number.isdecimal() and path.name in (f"step-{number}", f".step-{number}.complete") and not others:
            numbers.add(number)
    return [folder / f"step-{number}" for number in sorted(numbers, key=int, reverse=True)]


def _verified(path: Path) -> list[Path]:
    """The files that the manifest of a checkpoint lists, each found to be as it was written."""
    file = _manifest(path)
    path = file.parent
    try:
        match json.loads(file.read_bytes()):
            case {"format": version, "files": {"state.json": _} as files} if version == FORMAT:
                for name, expected in files.items():
                    file = path / name
                    if (found := _fingerprint(file)) != expected:
                        raise ValueError(f"expected {expected}, got {found}")
                return [path / name for name in files]
            case other:
                raise ValueError(f"expected format {FORMAT} with its files, got {other}")
    except (OSError, ValueError) as error:  # the latter too where it is not JSON, or not UTF-8
        raise CheckpointError(f"{file} is missing or damaged: {error}") from error


def _manifest(path: Path) -> Path:
    """That of a checkpoint, which may not have come to its place yet."""
    complete = path.with_name(f".{path.name}.complete")
    return (complete if complete.exists() else path) / "manifest.json"


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        return {"size": file.stat().st_size, "sha256": file_digest(content, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
