"""The per-task linear layers against their definition in float64; a task never sees another's rows or weights."""

import pytest
import torch
from torch import Tensor

from parity import assert_as_accurate
from trunkline.kernels.tasks.task_projection import (
    SHAPES,
    _backward,
    _forward,
    example,
    task_projection,
    task_projection_reference,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ACTIVATIONS = ["none", "gelu", "relu", "tanh"]
COUNTS = {  # rows of every task
    "ragged": [5, 0, 129, 1, 0, 64],
    "one task": [7],
    "one row": [0, 1, 0],
    "no row": [0, 0],
}


def make(
    counts: list[int], dtype: torch.dtype = torch.float32, device: str = "cpu", width: int = 24, out: int = 13
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and offsets."""
    N, R = len(counts), sum(counts)
    tensors = (torch.randn(R, width), torch.randn(N, width, out) / width**0.5, torch.randn(N, out))
    offsets = torch.tensor([0, *counts]).cumsum(0).to(device, torch.int32)
    return *(x.to(device, dtype) for x in tensors), offsets


def results(
    x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, activation: str, dy: Tensor
) -> tuple[Tensor, ...]:
    """The output and the gradients of x, weight and bias."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = task_projection(*leaves, offsets, activation)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_matches_definition(counts, activation, device):
    assert_as_accurate(task_projection, task_projection_reference, (*make(counts, device=device), activation))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, activation, device):
    inputs = make(COUNTS["ragged"], dtype, device)
    assert_as_accurate(task_projection, task_projection_reference, (*inputs, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    *tensors, offsets = make([2, 0, 3], torch.float64, width=3, out=2)
    leaves = [x.requires_grad_() for x in tensors]
    torch.autograd.gradcheck(lambda *leaves: task_projection(*leaves, offsets, activation), leaves)


def test_views():
    x, weight, bias, offsets = make(COUNTS["ragged"])
    x, weight, bias = torch.randn(len(x), 48)[:, 24:], weight.mT.contiguous().mT, bias.T.contiguous().T
    assert_as_accurate(task_projection, task_projection_reference, (x, weight, bias, offsets, "gelu"))


def test_memory_around_the_rows_is_never_read():
    x, weight, bias, offsets = make(COUNTS["ragged"])
    dy = torch.randn(len(x), 13)
    clean = results(x, weight, bias, offsets, "gelu", dy)
    x, weight, bias, dy = (
        torch.cat([torch.full_like(t, float("nan")), t, torch.full_like(t, float("nan"))])[len(t) : 2 * len(t)]
        for t in (x, weight, bias, dy)
    )
    assert all(map(torch.equal, results(x, weight, bias, offsets, "gelu", dy), clean))


def test_other_tasks_are_never_read():
    x, weight, bias, offsets = make(COUNTS["ragged"])
    dy = torch.randn(len(x), 13)
    clean = results(x, weight, bias, offsets, "gelu", dy)

    def only(own: Tensor, x: Tensor) -> Tensor:
        return torch.where(own.view(-1, *[1] * (x.ndim - 1)), x, torch.nan)

    for task in range(len(weight)):
        mine = torch.arange(len(weight)) == task
        rows = mine.repeat_interleave(offsets.diff())
        got = results(only(rows, x), only(mine, weight), only(mine, bias), offsets, "gelu", only(rows, dy))
        for own, result, expected in zip((rows, rows, mine, mine), got, clean, strict=True):
            assert torch.equal(result[own], expected[own])


def test_task_without_rows_has_zero_gradients():
    x, weight, bias, offsets = make(COUNTS["ragged"])
    _, _, dweight, dbias = results(x, weight, bias, offsets, "gelu", torch.randn(len(x), 13))
    assert dweight.flatten(1).any(1).tolist() == dbias.any(1).tolist() == [True, False, True, True, False, True]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_op_contract(activation):
    x, weight, bias, offsets = make([3, 0, 2], torch.bfloat16)
    torch.library.opcheck(_forward, (x, weight, bias, offsets, activation))
    y, z = _forward(x, weight, bias, offsets, activation)
    saved = z if activation == "gelu" else y
    torch.library.opcheck(_backward, (torch.randn_like(y), x, weight, bias, saved, offsets, activation))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
def test_compiles():
    x, weight, bias, offsets = make([3, 0, 2])
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def function(*leaves: Tensor) -> Tensor:
        return task_projection(*leaves, offsets, "gelu").square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
    eager = function(*leaves)
    torch.testing.assert_close(compiled, eager)
    for got, expected in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves), strict=True):
        torch.testing.assert_close(got, expected)


def test_same_bits_every_time():
    inputs = make(COUNTS["ragged"])
    dy = torch.randn(len(inputs[0]), 13)
    first = results(*inputs, "gelu", dy)
    assert all(map(torch.equal, first, results(*inputs, "gelu", dy)))


@pytest.mark.parametrize(
    ("x", "bias", "offsets"), [((5, 3), (2, 6), 3), ((5,), (2, 6), 3), ((5, 4), (6,), 3), ((5, 4), (2, 6), 2)]
)
def test_wrong_shapes_are_named(x, bias, offsets):
    message = (
        r"task_projection: with weight \(N, D, C\) = \[2, 4, 6\], x must be \(R, 4\), bias \(2, 6\) and "
        rf"offsets \(3,\), got \[{', '.join(map(str, x))}\], \[{', '.join(map(str, bias))}\] and \[{offsets}\]"
    )
    with pytest.raises(ValueError, match=message):
        task_projection(
            torch.zeros(x), torch.zeros(2, 4, 6), torch.zeros(bias), torch.zeros(offsets, dtype=torch.int32)
        )


@pytest.mark.parametrize("weight", [(4, 6), (0, 4, 6)])
def test_weight_without_tasks_is_named(weight):
    message = rf"weight must be \(N, D, C\) of at least one task, got \[{', '.join(map(str, weight))}\]"
    with pytest.raises(ValueError, match=message):
        task_projection(torch.zeros(0, 4), torch.zeros(weight), torch.zeros(0, 6), torch.zeros(1, dtype=torch.int32))


def test_unknown_activation_is_named():
    with pytest.raises(ValueError, match="activation must be one of none, gelu, relu, tanh, got 'swish'"):
        task_projection(*make([2]), "swish")


@pytest.mark.parametrize("offsets", [[0, 2, 4], [0, 6, 5], [1, 3, 5]])
def test_offsets_that_do_not_cover_the_rows_are_named(offsets):
    x, weight, bias, _ = make([2, 3])
    message = rf"task_projection: offsets must rise from 0 to R = 5, got \[{', '.join(map(str, offsets))}\]"
    with pytest.raises(ValueError, match=message):
        task_projection(x, weight, bias, torch.tensor(offsets, dtype=torch.int32))


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_example(sizes):
    arguments = example("cpu", torch.bfloat16, **(sizes | {"rows": 64, "width": 8, "columns": 8}))
    y = task_projection(**arguments)
    assert y.shape == (64, 8)
    assert y.isfinite().all()
