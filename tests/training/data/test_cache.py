"""What is made once is found again, whole and only for the same inputs; what was not finished is not there."""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encoded import BYTES, CLASSIFY, GENERATE, PAIR, REGRESS, SPAN, TAG, TEXT, changed, made
from trunkline.engine.config import Config
from trunkline.engine.network.trunk import TrunkConfig
from trunkline.engine.settings import Batch
from trunkline.engine.tasks.task import Task
from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.training.data import cache
from trunkline.training.data.corpus import load_corpus
from trunkline.training.data.encoded import Encoded

KEY = ["train", "digest of rows", "digest of tokenizer", 64]
COLUMNS = {
    "classify": {"text": ["a", "bc"], "label": [2, 0]},
    "regress": {"text": ["a", "bc"], "label": [0.1, -2.5e-7]},
    "tag": {"text": ["dogs bark", "a"], "label": ["noun verb", "other"]},
    "span": {"question": ["?", "??"], "text": ["abc", "de f"], "label": ["b", "f"]},
    "generate": {"text": ["a", "b" * 99, "c"], "label": ["x\n🎉", ["y", "", "z"], ["w"]]},
    "language-model": {"text": ["x" * 200, "y"]},
}
MISHAPS = {"text": ["a", "", "b", "c" * 99], "label": [0, 0, -1, 1]}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRUNKLINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def not_again() -> None:
    pytest.fail("made a second time")


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_same(found: Encoded, expected: Encoded) -> None:
    for name in ("tokens", "bounds", "labels", "label_bounds"):
        mine, other = getattr(found, name), getattr(expected, name)
        np.testing.assert_array_equal(mine, other)
        assert mine.dtype == other.dtype
    for name in ("task", "causal", "counts"):
        assert getattr(found, name) == getattr(expected, name)
    assert [*found.references] == [*expected.references]
    for i in range(len(expected)):
        assert found.reference(i) == expected.reference(i)
        for mine, other in zip(vars(found.example(i, 1)).values(), vars(expected.example(i, 1)).values(), strict=True):
            np.testing.assert_array_equal(mine, other)


def in_another_process(code: str, *arguments: Path) -> str:
    """What code says that has our test helpers."""
    here = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here / "helpers"), str(here.parent / "src")])}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=100
    ).stdout.strip()


# Where


def test_the_folder_is_the_one_the_environment_names(folder, tmp_path, monkeypatch):
    assert cache.cache_folder() == folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == folder
    monkeypatch.delenv("TRUNKLINE_CACHE")
    assert cache.cache_folder() == tmp_path / "xdg" / "trunkline"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_folder() == tmp_path / "home" / ".cache" / "trunkline"


# What


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("task", [CLASSIFY, REGRESS, TAG, SPAN, GENERATE, TEXT], ids=lambda task: task.head)
def test_the_second_time_it_is_read_and_equal(task, causal, folder):
    encoded = made(task, causal=causal, **COLUMNS[task.head])
    assert_same(cache.encoded(task, KEY, causal, lambda: encoded), encoded)
    assert len(files(folder)) == 1
    assert_same(cache.encoded(task, KEY, causal, not_again), encoded)


def test_counts_are_kept():
    task = changed(CLASSIFY, unlabelled="drop")
    encoded = made(task, **MISHAPS)
    assert list(vars(encoded.counts).values()) == [1, 0, 1, 1]
    cache.encoded(task, KEY, True, lambda: encoded)
    assert_same(cache.encoded(task, KEY, True, not_again), encoded)


def test_a_tokenizer_is_trained_once(folder):
    trained = Tokenizer.train(["some text", "more text"], 270)
    for make in (lambda: trained, not_again):
        found = cache.tokenizer([270, "digest"], make)
        assert found.digest == trained.digest
        assert (found.end, found.separator, found.summary) == (trained.end, trained.separator, trained.summary)
    cache.tokenizer([271, "digest"], lambda: trained)
    assert len(files(folder)) == 2


# Mapped, not read


@pytest.mark.parametrize("task", [CLASSIFY, GENERATE], ids=lambda task: task.head)
def test_another_process_gets_the_name_of_the_file(task):
    encoded = made(task, **COLUMNS[task.head])
    mapped = cache.encoded(task, KEY, True, lambda: encoded)
    assert len(pickle.dumps(mapped)) < 2000 < len(pickle.dumps(mapped.tokens)) + 2000
    assert_same(pickle.loads(pickle.dumps(mapped)), encoded)
    fewer = replace(mapped, bounds=mapped.bounds[:2], label_bounds=mapped.label_bounds[:2])
    assert len(pickle.loads(pickle.dumps(fewer))) == 1  # it is no longer what the file says


OPENED = """
import gc, sys, time
from encoded import CLASSIFY
from trunkline.training.data import cache
from trunkline.training.data.mixing import Mixer
from trunkline.engine.settings import Mixing

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

cache.encoded(CLASSIFY, ["small"], True, lambda: 1 / 0)  # whatever is loaded for the first one
before, began = anonymous(), time.process_time()  # which other programs do not lengthen
large = cache.encoded(CLASSIFY, ["large"], True, lambda: 1 / 0)
seconds, opened = time.process_time() - began, anonymous() - before
last = large.example(len(large) - 1, 0).tokens.tolist()
gc.collect()
blocks = sys.getallocatedblocks()
mixer = Mixer([large.lengths], Mixing(), [0.0], 256, steps=1000, seed=0)
mixer.batch(999)
print(seconds, opened, anonymous() - before, sys.getallocatedblocks() - blocks, *last)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_million_examples_are_there_at_once():
    """In a process of its own, so that nothing else comes and goes in its memory."""
    n, L = 2_000_000, 8
    tokens = np.arange(n * L, dtype=np.int32).reshape(n, L)
    for name, count in (("small", 10), ("large", n)):
        data = replace(
            made(CLASSIFY, text=["a"], label=[0]),
            tokens=tokens[:count].reshape(-1),
            bounds=np.arange(count + 1) * L,
            labels=np.ones(count),
            label_bounds=np.arange(count + 1),
        )
        cache.encoded(CLASSIFY, [name], True, lambda data=data: data)
    output = in_another_process(OPENED).split()
    seconds, opened, mixed = float(output[0]), int(output[1]), int(output[2])
    assert seconds < 0.5
    assert opened < 1 << 20  # of 64 MB of tokens and 64 MB of the rest
    assert mixed < 8 * n * 8  # lengths, their order and places: a few numbers an example
    assert int(output[3]) < 50_000  # objects; none for each example
    assert [*map(int, output[4:])] == [*range((n - 1) * L, n * L)]


# Another input, another file


@pytest.mark.parametrize("place", range(len(KEY)))
def test_another_key_is_another_file(place, folder):
    encoded = made(CLASSIFY, **COLUMNS["classify"])
    cache.encoded(CLASSIFY, KEY, True, lambda: encoded)
    other = made(CLASSIFY, text=["z"], label=[1])
    key = [*KEY[:place], 65 if place == 3 else "other", *KEY[place + 1 :]]
    assert_same(cache.encoded(CLASSIFY, key, True, lambda: other), other)
    assert_same(cache.encoded(CLASSIFY, KEY, False, lambda: replace(other, causal=False)), replace(other, causal=False))
    assert len(files(folder)) == 3
    assert_same(cache.encoded(CLASSIFY, KEY, True, not_again), encoded)


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "other"},
        {"text": ("second", "first")},
        {"labels": ("yes", "no")},
        {"too_long": "drop"},
        {"unlabelled": "drop"},
        {"empty": "error"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_another_task_is_another_file(fields, folder):
    encoded = made(PAIR, first=["a"], second=["b"], label=[0])
    for task in (PAIR, changed(PAIR, **fields)):
        cache.encoded(task, KEY, True, lambda: encoded)
    assert len(files(folder)) == 2


def test_another_format_is_another_file(folder, monkeypatch):
    encoded = made(CLASSIFY, **COLUMNS["classify"])
    cache.encoded(CLASSIFY, KEY, True, lambda: encoded)
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    cache.encoded(CLASSIFY, KEY, True, lambda: encoded)
    assert len(files(folder)) == 2


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text(f"text,label\nsome words of {split},1\nmore words,0\n")
    task = Task("toy", "classify", ("text",), "label", ("no", "yes"), train="train.csv", validation="validation.csv")
    return Config(tasks=(task,), base=str(tmp_path), vocab_size=270)


def test_a_run_encodes_again_only_what_has_changed(config, folder, tmp_path):
    def new_files(config: Config, tokenizer: Tokenizer | None = BYTES) -> int:
        before, told = files(folder) if folder.is_dir() else set(), []
        load_corpus(config, tokenizer, tell=told.append)
        assert len(told) == len(files(folder) - before)
        return len(told)

    (task,) = config.tasks
    assert new_files(config) == 2
    assert new_files(config) == 0
    assert new_files(replace(config, steps=7, seed=8, run="elsewhere", vocab_size=280)) == 0
    assert new_files(replace(config, batch=Batch(max_length=64))) == 2
    assert new_files(replace(config, trunk=TrunkConfig(causal=False))) == 2
    assert new_files(replace(config, tasks=(changed(task, too_long="drop"),))) == 2
    assert new_files(config, Tokenizer.train(["other words"], 262)) == 2
    (tmp_path / "validation.csv").write_text("text,label\nother words,1\n")
    assert new_files(config) == 1
    assert new_files(config, None) == 3  # a tokenizer as well
    assert new_files(config, None) == 0
    assert new_files(replace(config, vocab_size=271), None) == 3
    (tmp_path / "validation.csv").write_text("text,label\nOther words,1\n")
    (tmp_path / "train.csv").write_text("text,label\nSome words,1\nmore words,0\n")
    assert new_files(config, None) == 3
    assert new_files(replace(config, lowercase=True), None) == 3
    (tmp_path / "train.csv").write_text("text,label\nother words,1\n")
    assert new_files(config, None) == 3


def test_the_head_decides_what_a_tokenizer_is_trained_on(config, folder):
    """Targets are text to be learnt, the words of a span are in the text already."""
    (task,) = config.tasks
    for head in ("regress", "generate"):
        load_corpus(replace(config, tasks=(changed(task, head=head, labels=()),)))
    assert len(list(folder.glob("*.tokenizer.json"))) == 2


# What was not finished


def test_nothing_is_left_when_making_fails(folder):
    def fail():
        raise ValueError("a bad row")

    with pytest.raises(ValueError, match="a bad row"):
        cache.encoded(CLASSIFY, KEY, True, fail)
    with pytest.raises(ValueError, match="a bad row"):
        cache.tokenizer([1], fail)
    assert not folder.exists() or not files(folder)


def test_a_full_disk_costs_the_cache_and_not_the_run(folder, monkeypatch):
    def write_half(path, data):
        path.write_bytes(b"ARROW1 and no more")
        raise OSError(28, "No space left on device")

    encoded, told = made(CLASSIFY, **COLUMNS["classify"]), []
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_write", write_half)
        assert cache.encoded(CLASSIFY, KEY, True, lambda: encoded, told.append) is encoded
    assert told == [
        f"cache: {folder} cannot be used (No space left on device), so all is made again in the next run; "
        "TRUNKLINE_CACHE names another"
    ]
    assert not files(folder)
    cache.encoded(CLASSIFY, KEY, True, lambda: encoded)
    assert_same(cache.encoded(CLASSIFY, KEY, True, not_again), encoded)


def test_a_cache_that_cannot_be_used_is_said_once_and_the_run_goes_on(config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRUNKLINE_CACHE", str(tmp_path / "file" / "cache"))
    told = []
    corpus = load_corpus(config, tell=told.append)
    assert [len(split) for split in (*corpus.train, *corpus.validation)] == [2, 2]
    assert len([message for message in told if message.startswith("cache: ")]) == 1
    monkeypatch.delenv("TRUNKLINE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home")))
    assert load_corpus(config).tokenizer.digest == corpus.tokenizer.digest


# Damage


@pytest.mark.parametrize("task", [CLASSIFY, GENERATE, TEXT], ids=lambda task: task.head)
def test_every_damaged_file_is_found_made_anew_and_said(task, folder):
    encoded = made(task, **COLUMNS[task.head])
    cache.encoded(task, KEY, True, lambda: encoded)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    random = np.random.default_rng(0)
    bits = sorted({*random.integers(0, 8 * len(whole), 40).tolist(), 0, 8 * len(whole) - 1})
    damaged = [bytes(b ^ (1 << bit % 8) * (i == bit // 8) for i, b in enumerate(whole)) for bit in bits]
    for content in (*damaged, b"", whole[:10], whole[:100], whole[:-1], whole + b"x", bytes(len(whole))):
        file.write_bytes(content)
        told = []
        assert_same(cache.encoded(task, KEY, True, lambda: encoded, told.append), encoded)
        assert told == [f"cache: {file} is damaged, and made anew"]
        assert file.read_bytes() == whole


CUT = """
import sys
from pathlib import Path
from encoded import CLASSIFY, made
from trunkline.training.data import cache

texts = ["a" * 99] * 500
encoded = made(CLASSIFY, text=texts, label=[1] * len(texts))
found = cache.encoded(CLASSIFY, ["key"], True, lambda: encoded)
(file,) = Path(sys.argv[1]).glob("*.arrow")
whole = file.read_bytes()
for content in (bytes(len(whole)), b"", whole[:100]):
    file.write_bytes(content)  # in place, as `cp` and a disk that fails do
    for name in ("tokens", "bounds", "labels", "label_bounds"):
        assert (getattr(found, name) == getattr(encoded, name)).all(), name
again = cache.encoded(CLASSIFY, ["key"], True, lambda: encoded)
print("survived", len(again), sorted(path.name for path in file.parent.iterdir()) == [file.name])
"""


def test_a_file_that_is_cut_or_changed_while_it_is_used_changes_nothing(folder):
    """In a process of its own, which a page that is not there any more would end."""
    assert in_another_process(CUT, folder) == "survived 500 True"


def test_a_cache_that_can_only_be_read_is_read(folder, monkeypatch):
    encoded, unnamed = made(CLASSIFY, **COLUMNS["classify"]), tempfile.TemporaryFile
    cache.encoded(CLASSIFY, KEY, True, lambda: encoded)

    def not_here(dir: Path | None = None) -> Any:
        if dir:
            raise OSError(30, "Read-only file system")
        return unnamed()

    monkeypatch.setattr(tempfile, "TemporaryFile", not_here)
    assert_same(cache.encoded(CLASSIFY, KEY, True, not_again), encoded)


def test_another_process_is_told_of_a_file_that_is_gone(folder):
    encoded = made(CLASSIFY, **COLUMNS["classify"])
    pickled = pickle.dumps(cache.encoded(CLASSIFY, KEY, True, lambda: encoded))
    (file,) = folder.iterdir()
    file.write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"cache: .*\.arrow was removed or damaged while it was in use"):
        pickle.loads(pickled)


def test_a_damaged_tokenizer_is_made_anew(folder):
    trained, told = Tokenizer.train(["some text", "more text"], 270), []
    cache.tokenizer([1], lambda: trained)
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes().replace(b"some", b"same").replace(b"text", b"test")[:-1])
    assert cache.tokenizer([1], lambda: trained, told.append).digest == trained.digest
    assert told == [f"cache: {file} is damaged, and made anew"]


def test_two_runs_that_fill_it_at_once_do_not_meet(folder):
    """The second one finds it empty, makes it, and is overtaken by the first."""
    encoded = made(CLASSIFY, **COLUMNS["classify"])

    def overtaken() -> Encoded:
        cache.encoded(CLASSIFY, KEY, True, lambda: encoded)
        return encoded

    assert_same(cache.encoded(CLASSIFY, KEY, True, overtaken), encoded)
    assert len(files(folder)) == 1


KILLED = """
import os, signal
from encoded import CLASSIFY, made
from trunkline.training.data import cache

def killed(path, data):
    path.write_bytes(b"ARROW1 and no more")
    os.kill(os.getpid(), signal.SIGKILL)

cache._write = killed
cache.encoded(CLASSIFY, [], True, lambda: made(CLASSIFY, text=["a"], label=[1]))
"""


def test_a_killed_writer_leaves_nothing_that_is_read(folder):
    here = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(here / "helpers"), str(here.parent / "src")])
    killed = subprocess.run([sys.executable, "-c", KILLED], env={**os.environ, "PYTHONPATH": path})
    assert killed.returncode == -signal.SIGKILL
    assert not [name for name in files(folder) if name.endswith(".arrow")]
    encoded = made(CLASSIFY, text=["a"], label=[1])
    assert_same(cache.encoded(CLASSIFY, [], True, lambda: encoded), encoded)
    assert_same(cache.encoded(CLASSIFY, [], True, not_again), encoded)
