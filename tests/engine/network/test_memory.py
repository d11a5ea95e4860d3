"""Freed memory is kept: a step that allocates what the last one freed takes no page faults for it."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import ctypes, resource, sys
from trunkline.engine.network.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def faults():
    for _ in range(10):
        held = [ctypes.c_void_p(libc.malloc(megabytes << 20)) for megabytes in (24, 8, 3, 48, 24)]
        for pointer in held:
            ctypes.memset(pointer, 1, 3 << 20)
        for pointer in held:
            libc.free(pointer)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(-faults() + faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_kept_memory_takes_no_page_faults():
    source = Path(__file__).resolve().parents[3] / "src"

    def faults(how: str) -> int:
        program = [sys.executable, "-c", PROGRAM, how]
        return int(subprocess.run(program, env={"PYTHONPATH": str(source)}, capture_output=True, check=True).stdout)

    assert faults("give back") > 1000  # otherwise there is nothing to gain
    assert faults("keep") < 100
