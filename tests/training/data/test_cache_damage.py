"""A cache that is damaged, cut while it is used, or written by two at once: found, made anew, and never believed."""

import pickle
import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cached import COLUMNS, KEY, assert_same, files, in_another_process, not_again

from encoded import CLASSIFY, GENERATE, TEXT, made
from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.training.data import cache
from trunkline.training.data.encoded import Encoded

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("task", [CLASSIFY, GENERATE, TEXT], ids=lambda task: task.head)
def test_every_damaged_file_is_found_made_anew_and_said(task, own_cache):
    encoded = made(task, **COLUMNS[task.head])
    cache.encoded(task, KEY, True, lambda: encoded)
    (file,) = own_cache.iterdir()
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


def test_a_file_that_is_cut_or_changed_while_it_is_used_changes_nothing(own_cache):
    """In a process of its own, which a page that is not there any more would end."""
    assert in_another_process(CUT, own_cache).stdout == "survived 500 True\n"


def test_a_cache_that_can_only_be_read_is_read(own_cache, monkeypatch):
    encoded, unnamed = made(CLASSIFY, **COLUMNS["classify"]), tempfile.TemporaryFile
    cache.encoded(CLASSIFY, KEY, True, lambda: encoded)

    def not_here(dir: Path | None = None) -> Any:
        if dir:
            raise OSError(30, "Read-only file system")
        return unnamed()

    monkeypatch.setattr(tempfile, "TemporaryFile", not_here)
    assert_same(cache.encoded(CLASSIFY, KEY, True, not_again), encoded)


def test_another_process_is_told_of_a_file_that_is_gone(own_cache):
    encoded = made(CLASSIFY, **COLUMNS["classify"])
    pickled = pickle.dumps(cache.encoded(CLASSIFY, KEY, True, lambda: encoded))
    (file,) = own_cache.iterdir()
    file.write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"cache: .*\.arrow was removed or damaged while it was in use"):
        pickle.loads(pickled)


def test_a_damaged_tokenizer_is_made_anew(own_cache):
    trained, told = Tokenizer.train(["some text", "more text"], 270), []
    cache.tokenizer([1], lambda: trained)
    (file,) = own_cache.iterdir()
    file.write_bytes(file.read_bytes().replace(b"some", b"same").replace(b"text", b"test")[:-1])
    assert cache.tokenizer([1], lambda: trained, told.append).digest == trained.digest
    assert told == [f"cache: {file} is damaged, and made anew"]


def test_two_runs_that_fill_it_at_once_do_not_meet(own_cache):
    """The second one finds it empty, makes it, and is overtaken by the first."""
    encoded = made(CLASSIFY, **COLUMNS["classify"])

    def overtaken() -> Encoded:
        cache.encoded(CLASSIFY, KEY, True, lambda: encoded)
        return encoded

    assert_same(cache.encoded(CLASSIFY, KEY, True, overtaken), encoded)
    assert len(files(own_cache)) == 1


WRITES = """
import sys, time
from pathlib import Path
from encoded import CLASSIFY, made
from trunkline.training.data import cache

own, other = map(Path, sys.argv[1:])
write = cache._write

def beside_the_other(path, data):
    path.write_bytes(b"half of it")
    own.touch()
    while not other.exists():
        time.sleep(0.01)
    write(path, data)

cache._write = beside_the_other
made_here = made(CLASSIFY, text=["a", "bc"], label=[2, 0])
kept = cache.encoded(CLASSIFY, [], True, lambda: made_here, print)
print(kept.tokens.tolist() == made_here.tokens.tolist(), kept.labels.tolist())
"""


def test_two_processes_that_write_one_file_at_the_same_time_do_not_meet(own_cache, tmp_path):
    """Each begins before the other has ended; both have whole data, and one file is left."""
    ready = [tmp_path / "first", tmp_path / "second"]
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda pair: in_another_process(WRITES, *pair), [ready, ready[::-1]])
    assert first.stdout == second.stdout == "True [2.0, 0.0]\n", first.stderr + second.stderr
    assert len(files(own_cache)) == 1
    encoded = made(CLASSIFY, text=["a", "bc"], label=[2, 0])
    assert_same(cache.encoded(CLASSIFY, [], True, not_again), encoded)


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


def test_a_killed_writer_leaves_nothing_that_is_read(own_cache):
    killed = in_another_process(KILLED)
    assert killed.returncode == -signal.SIGKILL
    assert not [name for name in files(own_cache) if name.endswith(".arrow")]
    encoded = made(CLASSIFY, text=["a"], label=[1])
    assert_same(cache.encoded(CLASSIFY, [], True, lambda: encoded), encoded)
    assert_same(cache.encoded(CLASSIFY, [], True, not_again), encoded)
