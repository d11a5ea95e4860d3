"""One op, two implementations: which one runs is decided by the device and two environment variables."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trunkline.kernels import dispatch
from trunkline.kernels.dispatch import register

TESTS = Path(__file__).resolve().parents[1]
PATH = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS / "helpers")])
CHOICE = """
from deprecations import raise_ours
raise_ours()
import torch
from torch import Tensor
from trunkline.kernels.dispatch import register

def reference(x: Tensor) -> Tensor:
    return torch.zeros_like(x)

op = register("probe", reference=reference, triton=torch.ones_like, fake=torch.empty_like)
print(op(torch.full((1,), 5.0)).item(), torch._C._dispatch_has_kernel_for_dispatch_key("trunkline::probe", "CUDA"))
"""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "0.0 True"),  # the reference on the CPU, Triton for CUDA tensors
        ({"TRITON_INTERPRET": "1"}, "1.0 False"),  # Triton on the CPU
        ({"TRITON_INTERPRET": "1", "TRUNKLINE_REFERENCE": "1"}, "0.0 False"),  # the reference everywhere
    ],
    ids=["default", "interpret", "reference"],
)
def test_environment_chooses_the_implementation(environment, expected):
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRUNKLINE_REFERENCE")}
    environment = {**inherited, "PYTHONPATH": PATH, **environment}
    command = [sys.executable, "-c", CHOICE]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert output.strip() == expected


def test_op_without_triton_has_its_reference_everywhere():
    def reference(x: Tensor, factor: float, power: int, offset: Tensor | None) -> tuple[Tensor, Tensor]:
        return factor * x**power, x + (0 if offset is None else offset.item())  # which only a real tensor has

    def fake(x, factor, power, offset):
        return x.new_empty(x.shape), x.new_empty(x.shape)

    op = register("probe", reference=reference, fake=fake)
    expected = "trunkline::probe(Tensor x, float factor, SymInt power, Tensor? offset) -> (Tensor, Tensor)"
    assert str(op._schema) == expected
    first, second = op(torch.tensor([2.0, 3.0]), 0.5, 2, None)
    assert first.tolist() == [2.0, 4.5]
    assert second.tolist() == [2.0, 3.0]
    torch.library.opcheck(op, (torch.randn(2, 3), 0.5, 2, torch.ones(1)))
    assert op(torch.empty(4, 2, device="meta"), 0.5, 2, torch.empty(1, device="meta"))[1].shape == (4, 2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_autocast_ends_at_the_op(device):
    def reference(x: Tensor) -> Tensor:
        return x @ x

    op = register("squared", reference=reference, fake=torch.empty_like)
    x = torch.randn(8, 8, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        product = op(x)
    assert torch.equal(product, x @ x)


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    entered = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        entered.append(x)
        yield
        entered.append("left")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    x = torch.ones(2)
    launch = dispatch._on_device_of_tensors(lambda x, factor: (x * factor, list(entered)))
    product, during = launch(x, 3)
    assert product.tolist() == [3.0, 3.0]
    assert during[0] is x
    assert len(during) == 1
    assert entered[1] == "left"


WITHOUT_TRITON = """
from deprecations import raise_ours
raise_ours()
import sys
sys.modules["triton"] = None  # what is not installed cannot be imported
from pathlib import Path
from importlib import import_module
import trunkline.kernels.dispatch
room = Path(trunkline.kernels.dispatch.__file__).parent
for path in sorted(room.rglob("*.py")):
    print(import_module(".".join(["trunkline.kernels", *path.relative_to(room).with_suffix("").parts])).__name__)
"""


def test_kernel_files_are_importable_without_triton():
    environment = {**os.environ, "PYTHONPATH": PATH}
    command = [sys.executable, "-c", WITHOUT_TRITON]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert "trunkline.kernels.attention.attention" in output.split()
