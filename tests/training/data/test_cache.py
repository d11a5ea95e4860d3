"""What is made once is found again, whole and only for the same inputs; what was not finished is not there."""

import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cached import COLUMNS, KEY, assert_same, files, in_another_process, not_again

from encoded import BYTES, CLASSIFY, GENERATE, PAIR, REGRESS, SPAN, TAG, TEXT, changed, made
from trunkline.engine.config import Config
from trunkline.engine.network.trunk import TrunkConfig
from trunkline.engine.settings import Batch
from trunkline.engine.tasks.task import Task
from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.training.data import cache
from trunkline.training.data.corpus import load_corpus

pytestmark = pytest.mark.usefixtures("own_cache")
MISHAPS = {"text": ["a", "", "b", "c" * 99], "label": [0, 0, -1, 1]}


# Where


def test_the_folder_is_the_one_the_environment_names(own_cache, tmp_path, monkeypatch):
    assert cache.cache_folder() == own_cache
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == own_cache
    monkeypatch.delenv("TRUNKLINE_CACHE")
    assert cache.cache_folder() == tmp_path / "xdg" / "trunkline"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_folder() == tmp_path / "home" / ".cache" / "trunkline"


# What


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("task", [CLASSIFY, REGRESS, TAG, SPAN, GENERATE, TEXT], ids=lambda task: task.head)
def test_the_second_time_it_is_read_and_equal(task, causal, own_cache):
    encoded = made(task, causal=causal, **COLUMNS[task.head])
    assert_same(cache.encoded(task, KEY, causal, lambda: encoded), encoded)
    assert len(files(own_cache)) == 1
    assert_same(cache.encoded(task, KEY, causal, not_again), encoded)


def test_counts_are_kept():
    task = changed(CLASSIFY, unlabelled="drop")
    encoded = made(task, **MISHAPS)
    assert list(vars(encoded.counts).values()) == [1, 0, 1, 1]
    cache.encoded(task, KEY, True, lambda: encoded)
    assert_same(cache.encoded(task, KEY, True, not_again), encoded)


def test_a_tokenizer_is_trained_once(own_cache):
    trained = Tokenizer.train(["some text", "more text"], 270)
    for make in (lambda: trained, not_again):
        found = cache.tokenizer([270, "digest"], make)
        assert found.digest == trained.digest
        assert (found.end, found.separator, found.summary) == (trained.end, trained.separator, trained.summary)
    cache.tokenizer([271, "digest"], lambda: trained)
    assert len(files(own_cache)) == 2


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
for _ in range(10_000_000):  # which takes as much longer on a slow machine
    pass
loop = time.process_time() - began - seconds
last = large.example(len(large) - 1, 0).tokens.tolist()
gc.collect()
blocks = sys.getallocatedblocks()
mixer = Mixer([large.lengths], Mixing(), [0.0], 256, steps=1000, seed=0)
mixer.batch(999)
print(seconds / loop, opened, anonymous() - before, sys.getallocatedblocks() - blocks, *last)
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
    output = in_another_process(OPENED).stdout.split()
    loops, opened, mixed = float(output[0]), int(output[1]), int(output[2])
    assert loops < 4  # of five steps an example
    assert opened < 1 << 20  # of 64 MB of tokens and 64 MB of the rest
    assert mixed < 8 * n * 8  # lengths, their order and places: a few numbers an example
    assert int(output[3]) < 50_000  # objects; none for each example
    assert [*map(int, output[4:])] == [*range((n - 1) * L, n * L)]


# Another input, another file


@pytest.mark.parametrize("place", range(len(KEY)))
def test_another_key_is_another_file(place, own_cache):
    encoded = made(CLASSIFY, **COLUMNS["classify"])
    cache.encoded(CLASSIFY, KEY, True, lambda: encoded)
    other = made(CLASSIFY, text=["z"], label=[1])
    key = [*KEY[:place], 65 if place == 3 else "other", *KEY[place + 1 :]]
    assert_same(cache.encoded(CLASSIFY, key, True, lambda: other), other)
    assert_same(cache.encoded(CLASSIFY, KEY, False, lambda: replace(other, causal=False)), replace(other, causal=False))
    assert len(files(own_cache)) == 3
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
def test_another_task_is_another_file(fields, own_cache):
    encoded = made(PAIR, first=["a"], second=["b"], label=[0])
    for task in (PAIR, changed(PAIR, **fields)):
        cache.encoded(task, KEY, True, lambda: encoded)
    assert len(files(own_cache)) == 2


def test_another_format_is_another_file(own_cache, monkeypatch):
    encoded = made(CLASSIFY, **COLUMNS["classify"])
    cache.encoded(CLASSIFY, KEY, True, lambda: encoded)
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    cache.encoded(CLASSIFY, KEY, True, lambda: encoded)
    assert len(files(own_cache)) == 2


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text(f"text,label\nsome words of {split},1\nmore words,0\n")
    task = Task("toy", "classify", ("text",), "label", ("no", "yes"), train="train.csv", validation="validation.csv")
    return Config(tasks=(task,), base=str(tmp_path), vocab_size=270)


def test_a_run_encodes_again_only_what_has_changed(config, own_cache, tmp_path):
    def new_files(config: Config, tokenizer: Tokenizer | None = BYTES) -> int:
        before, told = files(own_cache) if own_cache.is_dir() else set(), []
        load_corpus(config, tokenizer, tell=told.append)
        assert len(told) == len(files(own_cache) - before)
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


def test_the_head_decides_what_a_tokenizer_is_trained_on(config, own_cache):
    """Targets are text to be learnt, the words of a span are in the text already."""
    (task,) = config.tasks
    for head in ("regress", "generate"):
        load_corpus(replace(config, tasks=(changed(task, head=head, labels=()),)))
    assert len(list(own_cache.glob("*.tokenizer.json"))) == 2


# What was not finished


def test_nothing_is_left_when_making_fails(own_cache):
    def fail():
        raise ValueError("a bad row")

    with pytest.raises(ValueError, match="a bad row"):
        cache.encoded(CLASSIFY, KEY, True, fail)
    with pytest.raises(ValueError, match="a bad row"):
        cache.tokenizer([1], fail)
    assert not own_cache.exists() or not files(own_cache)


def test_a_full_disk_costs_the_cache_and_not_the_run(own_cache, monkeypatch):
    def write_half(path, data):
        path.write_bytes(b"ARROW1 and no more")
        raise OSError(28, "No space left on device")

    encoded, told = made(CLASSIFY, **COLUMNS["classify"]), []
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_write", write_half)
        assert cache.encoded(CLASSIFY, KEY, True, lambda: encoded, told.append) is encoded
    assert told == [
        f"cache: {own_cache} cannot be used (No space left on device), so all is made again in the next run; "
        "TRUNKLINE_CACHE names another"
    ]
    assert not files(own_cache)
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
