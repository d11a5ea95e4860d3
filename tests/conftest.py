"""What every test file shares: two threads, fixed seeds, real data where it is there, GPU tests only on a GPU."""

import random
from pathlib import Path

import numpy
import pytest
import torch

torch.set_num_threads(2)  # the same order of summation, and so the same numbers, on a laptop and on a 64-core server


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder shared/data beside the repository: real data sets, laid out as on the Hugging Face hub."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs real data in {folder}")
    return folder
