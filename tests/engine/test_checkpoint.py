"""Checkpoints come back bit for bit, and no kill, damage or full disk goes unnoticed or costs an earlier one."""

import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from trunkline.engine.checkpoint import (
    CheckpointError,
    load,
    newest,
    prune,
    save,
)

FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def contents(number: int, size: int = 8) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """Tensors and state that tell whose checkpoint they are."""
    model = {"weight": torch.full((size,), float(number)), "bias": torch.arange(3) + number}
    return {"model": model, "optimizer": {"weight.step": torch.tensor(float(number))}}, {"step": number, "tasks": ["a"]}


def number_in(path: Path) -> int:
    """The number that a checkpoint was made from, which all of it has to agree with."""
    tensors, state = load(path)
    number = state["step"]
    expected, expected_state = contents(number, tensors["model"]["weight"].numel())
    assert state == expected_state
    torch.testing.assert_close(tensors, expected, rtol=0, atol=0)
    return number


def newest_of(folder: Path) -> tuple[Path | None, list[str]]:
    warnings: list[str] = []
    return newest(folder, warnings.append), warnings


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with step-1 and step-2."""
    for number in (1, 2):
        save(tmp_path / "run", f"step-{number}", *contents(number))
    return tmp_path / "run"


def assert_falls_back(run: Path, *words: str) -> None:
    """step-2 is refused with these words, step-1 is taken, and without it nothing is."""
    with pytest.raises(CheckpointError) as refused:
        load(run / "step-2")
    found, (warning,) = newest_of(run)
    assert found == run / "step-1"
    assert warning == f"checkpoint step-2 is passed over: {refused.value}"
    assert str(run / "step-2") in warning
    for word in words:
        assert word in warning


# What is saved comes back


def test_tensors_come_back_bit_for_bit(tmp_path):
    model = {
        "a NaN with a payload, -inf, a subnormal": torch.tensor([0x7FC00001, -0x800000, 1]).int().view(torch.float32),
        "bfloat16": torch.randn(3, 2).bfloat16(),
        "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(3, 5).T,
        "int64": torch.tensor([2**62 + 1]),
        "parameter": nn.Parameter(torch.randn(2)),
    }
    path = save(tmp_path / "new" / "folder", "best", {"model": model, "none": {}}, {})
    assert path == tmp_path / "new" / "folder" / "best"
    tensors, _ = load(path)
    assert tensors.keys() == {"model", "none"}
    assert tensors["none"] == {}
    assert tensors["model"].keys() == model.keys()
    for name, tensor in model.items():
        found = tensors["model"][name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found.flatten().view(torch.uint8), tensor.detach().flatten().view(torch.uint8))


def test_state_comes_back(tmp_path):
    state = {"step": 3, "best": {"score": 0.1 + 0.2, "at": None}, "tasks": ["sst2", "größer"], "worst": -float("inf")}
    assert load(save(tmp_path, "step-3", {}, state))[1] == state


def test_manifest_has_size_and_digest_of_every_other_file(run):
    manifest = json.loads((run / "step-2" / "manifest.json").read_bytes())
    assert manifest["format"] == 1
    assert names(run / "step-2") == FILES == ["manifest.json", *manifest["files"]]
    for name, entry in manifest["files"].items():
        content = (run / "step-2" / name).read_bytes()
        assert entry == {"size": len(content), "sha256": sha256(content).hexdigest()}


def test_files_are_as_readable_as_any_other(run):
    other = run / "other"
    other.touch()
    assert {(run / "step-2" / name).stat().st_mode for name in FILES} == {other.stat().st_mode}


def test_a_checkpoint_is_replaced_by_one_of_its_name(run):
    tensors, state = contents(3)
    save(run, "step-2", {"model": tensors["model"]}, state)
    assert names(run) == ["step-1", "step-2"]
    assert names(run / "step-2") == ["manifest.json", "model.safetensors", "state.json"]
    assert load(run / "step-2")[1]["step"] == 3


def test_loaded_tensors_are_not_the_file(run):
    tensors, _ = load(run / "step-2")
    tensors["model"]["weight"].zero_()
    assert number_in(run / "step-2") == 2
    shutil.rmtree(run)
    assert tensors["model"]["bias"].tolist() == [2, 3, 4]


# Killed while saving


def killed(work: Callable[[], object], after: float | None = None) -> bool:
    """Does `work` in a child, killed after so many seconds; False if it came to its end before."""
    if (child := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def save_and_die(operation: int, run: Path, name: str) -> None:
    """A save that is killed right before it opens, renames, removes, ... a file for the `operation`-th time."""
    operations = count()

    def watch(event: str, _: object) -> None:
        if event.startswith(("open", "os.", "shutil.")) and next(operations) == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    save(run, name, *contents(3))


def killed_saves(folder: Path, name: str) -> None:
    """Kills saves of `name`, beside or over step-2, at every file operation and while they write large files."""
    for operation in count():
        run = folder / f"operation-{operation:03}"
        save(run, "step-2", *contents(2))
        if not killed(partial(save_and_die, operation, run, name)):
            break
    large = contents(3, size=16_000_000)
    start = time.perf_counter()
    save(folder / "whole", name, *large)
    seconds = time.perf_counter() - start
    shutil.rmtree(folder / "whole")
    for tenths in (1, 3, 5, 7, 9):
        run = folder / f"writing-{tenths}"
        save(run, "step-2", *contents(2))
        killed(partial(save, run, name, *large), after=seconds * tenths / 10)


@pytest.mark.parametrize("name", ["step-2", "step-3"])
def test_a_kill_at_any_time_leaves_the_old_or_the_new_checkpoint(tmp_path, name):
    program = "import sys, pathlib, test_checkpoint as t; t.killed_saves(pathlib.Path(sys.argv[1]), sys.argv[2])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program, tmp_path, name], env=environment, check=True, timeout=300)
    numbers: dict[str, list[int]] = {"operation": [], "writing": []}
    unfinished = set()
    for run in sorted(tmp_path.iterdir()):
        kind = run.name.split("-")[0]
        if (run / f".{name}.partial").exists():
            unfinished.add(kind)
        found, warnings = newest_of(run)
        assert (found is not None, warnings) == (True, []), names(run)
        numbers[kind].append(number_in(found))
        assert number_in(save(run, name, *contents(4))) == 4  # as the resumed run does
        assert names(run) == sorted({"step-2", name})  # nothing is left over
    assert unfinished == {"operation", "writing"}
    old = numbers["operation"].count(2)
    assert numbers["operation"] == [2] * old + [3] * (
        len(numbers["operation"]) - old
    )  # the new one once it is complete
    assert 0 < old < len(numbers["operation"])


def test_an_unfinished_replacement_is_found_pruned_and_finished(run):
    save(run, "step-3", *contents(4))
    (run / "step-3").rename(run / ".step-3.complete")  # as a kill leaves it
    for old in (None, run / "step-3"):
        if old:
            shutil.copytree(run / "step-2", old)
            (old / "manifest.json").unlink()  # half removed already
        assert newest_of(run) == (run / "step-3", [])
        assert number_in(run / "step-3") == 4
    prune(run, keep=1)
    assert names(run) == ["step-3"]
    assert number_in(run / "step-3") == 4


# Damaged


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_or_of_another_length_is_found(run, name):
    file = run / "step-2" / name
    whole = file.read_bytes()
    for damaged in (b"", whole[:1], whole[: len(whole) // 2], whole[:-1], whole + b"x", whole + whole):
        file.write_bytes(damaged)
        assert_falls_back(run, f"{name} is missing or damaged")
    file.unlink()
    assert_falls_back(run, f"{name} is missing or damaged", "No such file")


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found(run, name):
    file = run / "step-2" / name
    whole = file.read_bytes()
    for position in range(0, 8 * len(whole), 3):  # some in every byte, and every one of the eight
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError) as refused:
            load(run / "step-2")
        assert name == "manifest.json" or f"{file} is missing or damaged" in str(refused.value)
    assert_falls_back(run)


def test_an_empty_folder_and_a_file_in_place_of_it_are_found(run):
    shutil.rmtree(run / "step-2")
    (run / "step-2").mkdir()
    assert_falls_back(run, "manifest.json is missing")
    (run / "step-2").rmdir()
    (run / "step-2").touch()
    assert_falls_back(run, "Not a directory")


@pytest.mark.parametrize(
    "manifest",
    [b"null", b"{}", b'{"format": 1}', b'{"format": 1, "files": {}}', b'{"format": 2, "files": {"state.json": 1}}'],
)
def test_a_manifest_of_another_kind_is_refused(run, manifest):
    (run / "step-2" / "manifest.json").write_bytes(manifest)
    assert_falls_back(run, "expected format 1 with its files, got ", str(json.loads(manifest)))


def test_only_files_of_the_manifest_are_read(run):
    shutil.copy(run / "step-2" / "model.safetensors", run / "step-2" / "more.safetensors")
    (run / "step-2" / "worse.safetensors").write_bytes(b"worse")
    assert number_in(run / "step-2") == 2
    assert load(run / "step-2")[0].keys() == {"model", "optimizer"}


class Malice:
    """Pickled, it makes a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_a_pickle_is_not_executed(run, tmp_path, name, listed):
    content = pickle.dumps(Malice(tmp_path / "executed"))
    (run / "step-2" / name).write_bytes(content)
    if listed and name != "manifest.json":  # by somebody who can also write the manifest
        manifest = json.loads((run / "step-2" / "manifest.json").read_bytes())
        manifest["files"][name] = {"size": len(content), "sha256": sha256(content).hexdigest()}
        (run / "step-2" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=name):
        load(run / "step-2")
    assert not (tmp_path / "executed").exists()
    pickle.loads(content)
    assert (tmp_path / "executed").exists()  # it would have been


# Which one is the newest


def test_the_newest_is_the_one_of_the_largest_number(tmp_path):
    for number in (9, 10, 2):
        save(tmp_path, f"step-{number}", *contents(number))
    for name in ("best", "step-x", "step-", "step-99.old", "old-step-99", "step-11-12"):
        save(tmp_path, name, *contents(99))
    assert newest_of(tmp_path) == (tmp_path / "step-10", [])


def test_none_is_the_newest_only_where_there_is_none(tmp_path):
    assert newest_of(tmp_path / "absent") == (None, [])
    assert newest_of(tmp_path) == (None, [])
    save(tmp_path, "best", *contents(1))
    assert newest_of(tmp_path) == (None, [])
    with pytest.raises(NotADirectoryError):
        newest_of(tmp_path / "best" / "state.json")
    with pytest.raises(CheckpointError, match="last/manifest.json is missing"):
        load(tmp_path / "last")


def test_with_broken_checkpoints_only_nothing_starts_afresh(run):
    (run / "step-1" / "manifest.json").unlink()
    (run / "step-2" / "state.json").write_text("{}")
    warnings: list[str] = []
    with pytest.raises(CheckpointError, match="no valid checkpoint in") as refused:
        newest(run, warnings.append)
    for file in (run / "step-1" / "manifest.json", run / "step-2" / "state.json"):
        assert f"{file} is missing or damaged" in str(refused.value)
    assert len(warnings) == 2


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for number in (8, 9, 10, 11):
        save(tmp_path, f"step-{number}", *contents(number))
    save(tmp_path, "best", *contents(8))
    prune(tmp_path, keep=9)
    assert len(names(tmp_path)) == 5
    prune(tmp_path, keep=2)
    assert names(tmp_path) == ["best", "step-10", "step-11"]
    prune(tmp_path, keep=0)
    assert names(tmp_path) == ["best", "step-11"]


# What cannot be written


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Writing past so many bytes of a file fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name", ["step-2", "step-3"])
@pytest.mark.parametrize("large", ["tensors", "state"])
def test_a_full_disk_costs_no_earlier_checkpoint(run, name, large):
    tensors, state = contents(3, size=100_000 if large == "tensors" else 8)
    if large == "state":
        state["text"] = "x" * 400_000
    with (
        files_limited_to(100_000),
        pytest.raises(OSError, match=f"{re.escape(str(run / name))} is not saved.*File too large"),
    ):
        save(run, name, tensors, state)
    assert names(run) == ["step-1", "step-2"]
    assert newest_of(run) == (run / "step-2", [])
    assert number_in(run / "step-2") == 2
    save(run, name, tensors, state)  # once there is room again
    assert load(run / name)[1] == state


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(OSError, match=f"{re.escape(str(tmp_path / 'run' / 'step-1'))} is not saved"):
        save(tmp_path / "run", "step-1", *contents(1))
    assert (tmp_path / "run").is_file()


def test_a_state_that_is_not_json_costs_no_earlier_checkpoint(run):
    with pytest.raises(TypeError):
        save(run, "step-2", contents(3)[0], {"random": torch.get_rng_state()})
    assert newest_of(run) == (run / "step-2", [])
    save(run, "step-3", *contents(3))
    assert names(run) == ["step-1", "step-2", "step-3"]
