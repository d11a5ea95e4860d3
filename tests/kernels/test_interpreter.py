"""The kernels on the CPU: interpreter/ in processes of their own, since Triton reads TRITON_INTERPRET at import."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, **changes: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **changes}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not gpu", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_kernels_in_the_interpreter():
    run("tests/kernels/interpreter", TRITON_INTERPRET="1")


@pytest.mark.skipif(find_spec("triton") is None or shutil.which("g++") is None, reason="needs triton and g++")
def test_what_a_gpu_will_run_launches_kernels():
    """The same tests as on a GPU, in bfloat16, on the virtual one; `make virtual` runs all of them there."""
    chosen = "bugs or neighbours or layout or rows_of_tiles"
    run(
        "tests/kernels/interpreter/attention/test_attention_short.py",
        "-W",
        "default",
        "-k",
        chosen,
        TRUNKLINE_VIRTUAL_GPU="90",
    )
