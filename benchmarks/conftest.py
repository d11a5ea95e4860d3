"""pytest benchmarks --benchmark-only [-k attention] [--sizes gpu|cpu|smoke] [--deadline SECONDS] [--record]"""

import shlex
import sys
import time

import pytest
import torch

from trunkline.benchmarks.microbenchmarks.examples import scaled, shipped_kernels
from trunkline.benchmarks.microbenchmarks.measure import DIRECTIONS, OURS, has_gradient
from trunkline.benchmarks.microbenchmarks.peers import PEERS
from trunkline.benchmarks.record import record_kernels

# the vocabulary loss has "loss" nowhere in its name; `-k loss` is to find it
KEYWORDS = {"linear_cross_entropy": ["loss"]}
CPU_ROWS, CPU_WIDTH = 4608, 256
BEGAN = time.monotonic()


class Measured(dict):
    """What was measured so far, by kernel, shape and direction; written down at once, since the clock or a fault of the
    device may end the session at any time."""

    def __init__(self, write: bool) -> None:
        super().__init__()
        self.write = write

    def __setitem__(self, key: tuple, case: dict) -> None:
        super().__setitem__(key, case)
        if self.write:
            record_kernels(self, shlex.join(["pytest", *sys.argv[1:]]))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("trunkline")
    group.addoption("--sizes", choices=["gpu", "cpu", "smoke"], default="gpu" if torch.cuda.is_available() else "cpu")
    group.addoption("--deadline", type=float, default=float("inf"), help="seconds after which nothing new is begun")
    group.addoption("--record", action="store_true", help="write what is measured to results/, over what is there")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One case for each kernel, shape, direction and system."""
    sizes_for, cases = metafunc.config.getoption("--sizes"), []
    dtype = torch.float32 if sizes_for != "gpu" else torch.bfloat16
    for kernel in shipped_kernels():
        seen = []
        for shape, full in kernel.shapes.items():
            sizes = full
            if sizes_for == "cpu":
                sizes = scaled(full, CPU_ROWS, CPU_WIDTH)
            elif sizes_for == "smoke":
                sizes = scaled(full, 48, 16)
            if sizes in seen:
                continue
            seen.append(sizes)
            for direction in DIRECTIONS if has_gradient(kernel, full, dtype) else DIRECTIONS[:1]:
                task = (kernel, shape, sizes, dtype, direction)
                for system in (OURS, *PEERS[kernel.name]):
                    name = f"{kernel.name}-{shape}-{direction}-{system}"
                    cases.append(pytest.param(task, system, id=name))
    metafunc.parametrize(("task", "system"), cases)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for kernel, keywords in KEYWORDS.items():
            if f"[{kernel}-" in item.name:
                item.extra_keyword_matches.update(keywords)


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Measured:
    return Measured(write=request.config.getoption("--record"))


@pytest.fixture(autouse=True)
def in_time(request: pytest.FixtureRequest) -> None:
    limit = request.config.getoption("--deadline")
    if time.monotonic() - BEGAN > limit:
        pytest.skip(f"not begun within {limit:g} seconds")
