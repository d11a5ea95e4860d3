"""The tasks' own weight gradients and their Gram matrix, on the reference."""

import re

import pytest
import torch
from torch import Tensor

from trunkline.kernels.tasks import task_gram as module
from trunkline.kernels.tasks.task_gram import example, task_gradients, task_gram

pytestmark = pytest.mark.usefixtures("one_thread")


def of_autograd(x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    """(N, C, D) by as many backward passes through a linear layer as there are tasks."""
    weight = torch.zeros(dy.shape[1], x.shape[1], dtype=x.dtype, requires_grad=True)
    y = x @ weight.T
    gradients = []
    for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        of_task = torch.zeros_like(dy)
        of_task[first:last] = dy[first:last]
        gradients.append(torch.autograd.grad(y, weight, of_task, retain_graph=True)[0])
    return torch.stack(gradients)


CASES = {
    "nine tasks": tuple(example("cpu", torch.float64, 70, 9, 5, 7).values()),
    "one task": tuple(example("cpu", torch.float64, 12, 1, 4, 3).values()),
    "one token": (torch.ones(1, 2).double(), torch.ones(1, 3).double(), torch.tensor([0, 0, 1, 1])),
    "no tokens": (torch.ones(0, 2).double(), torch.ones(0, 3).double(), torch.tensor([0, 0, 0])),
}


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)
@pytest.mark.parametrize("way", ["pairwise", "kept", "by columns"])
def test_as_many_backward_passes_find(arguments, way, monkeypatch):
    monkeypatch.setattr(module, "PRODUCTS_PER_ELEMENT", 1e9 if way == "pairwise" else 0)
    monkeypatch.setattr(module, "KEPT", 1 << 28 if way == "kept" else 8)
    expected = of_autograd(*arguments)
    gram, gradients = task_gram(*arguments)
    torch.testing.assert_close(gram, torch.einsum("tcd,scd->ts", expected, expected), rtol=1e-10, atol=1e-12)
    assert (gradients is not None) == (way == "kept")
    torch.testing.assert_close(task_gradients(*arguments), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_taken_in_float32(dtype):
    """With every product 1, sums beyond the integers that the dtype can hold."""
    x, dy = torch.ones(3000, 2, dtype=dtype), torch.ones(3000, 3, dtype=dtype)
    gradients = task_gradients(x, dy, torch.tensor([0, 2999, 3000]))
    assert gradients.dtype == torch.float32
    assert gradients[0].unique().tolist() == [2999.0]


def test_few_rows_are_taken_in_pairs():
    assert task_gram(**example("cpu", torch.float32, 16, 3, 64, 64)).gradients is None
    assert task_gram(**example("cpu", torch.float32, 512, 3, 64, 64)).gradients is not None


def test_rows_beyond_the_last_offset_do_not_count():
    x, dy, offsets = example("cpu", torch.float32, 40, 4, 8, 8).values()
    end = int(offsets[-1])
    assert end < len(x)
    expected = task_gradients(x[:end], dy[:end], offsets)
    x[end:] = dy[end:] = torch.nan
    assert torch.equal(task_gradients(x, dy, offsets), expected)


def test_the_op_is_sound():
    arguments = tuple(example("cpu", torch.float32, 30, 3, 4, 6).values())
    torch.library.opcheck(torch.ops.trunkline.task_gradients.default, arguments)


@pytest.mark.parametrize(
    ("x", "dy"), [((4, 2), (5, 3)), ((4,), (4, 3)), ((4, 2), (4,))], ids=["rows", "x is flat", "dy is flat"]
)
def test_shapes_that_do_not_fit(x, dy):
    for function in (task_gradients, task_gram):
        with pytest.raises(ValueError, match=r"x must be \(R, D\), dy \(R, C\)"):
            function(torch.ones(x), torch.ones(dy), torch.tensor([0, 4]))


@pytest.mark.parametrize("offsets", [[0, 5], [1, 4], [0, 3, 2]], ids=["too far", "not from 0", "falling"])
def test_offsets_that_do_not_fit_the_rows_are_named(offsets):
    message = re.escape(f"offsets must rise from 0 to at most R = 4, got {offsets}")
    for function in (task_gradients, task_gram):
        with pytest.raises(ValueError, match=message):
            function(torch.ones(4, 2), torch.ones(4, 3), torch.tensor(offsets))
