"""What a cache is filled with, and how it is looked at."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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


def in_another_process(code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """How code ends that has our test helpers, and what it says."""
    here = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here / "helpers"), str(here.parent / "src")])}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
