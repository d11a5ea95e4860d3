"""The self-test sees an op that is wrong, and says what that means where no kernel can be blamed."""

import pytest
import torch

from trunkline.training import self_test as module
from trunkline.training.self_test import OPS, self_test

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def test_every_op_with_a_kernel_is_tested():
    from trunkline.kernels.dispatch import TRITON

    names = {op._schema.name.removeprefix("trunkline::") for op in TRITON}
    assert {name for op in OPS for name in op.kernels} == {name for name in names if "seeded" not in name}


def test_all_is_well_on_this_machine():
    told: list[str] = []
    outcomes = self_test(CPU, told.append)
    assert [(outcome.op.name, outcome.problem) for outcome in outcomes] == [(op.name, "") for op in OPS]
    assert all(0 < outcome.share < 1 for outcome in outcomes)
    assert told == []


@pytest.mark.parametrize("factor", [0.0, 1.001, float("nan")])
@pytest.mark.parametrize("place", range(len(OPS)), ids=[op.name for op in OPS])
def test_wrong_numbers_without_a_kernel_are_an_error(monkeypatch, place, factor):
    op = OPS[place]._replace(function=lambda **arguments: OPS[place].function(**arguments) * factor)
    monkeypatch.setattr(module, "OPS", (op,))
    with pytest.raises(ValueError, match=f"{op.name} on cpu is wrong without our kernels: .* is torch intact?"):
        self_test(CPU, print)


def test_a_wrong_gradient_is_named(monkeypatch):
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            return 1.01 * dx

    projection = next(op for op in OPS if op.name == "task_projection")
    wrong = projection._replace(function=lambda bias, **others: projection.function(bias=Twice.apply(bias), **others))
    monkeypatch.setattr(module, "OPS", (wrong,))
    with pytest.raises(ValueError, match="times what is allowed, in the gradient of bias"):
        self_test(CPU, print)


def test_what_an_op_throws_is_told(monkeypatch):
    def broken(**arguments):
        raise RuntimeError("PTX was compiled with an unsupported toolchain\nand more")

    monkeypatch.setattr(module, "OPS", (OPS[0]._replace(function=broken),))
    with pytest.raises(ValueError, match="fails: RuntimeError: PTX was compiled with an unsupported toolchain: is"):
        self_test(CPU, print)
