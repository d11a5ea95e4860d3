"""The kernels of the small heads' losses against their definition in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parity import assert_as_accurate
from trunkline.kernels import arguments
from trunkline.kernels.tasks import task_loss_torch, task_loss_triton
from trunkline.kernels.tasks.task_loss import task_logits, task_loss, task_loss_reference

CLASSES = [3, 1, 2, 7, 1, 20]  # columns of every task
REGRESSION = [False, True, False, False, False, False]  # the other task with one column has one class
COUNTS = [7, 5, 40, 0, 3, 18]


def make(
    counts: list[int], dtype: torch.dtype, device: str, width: int = 24, classes: list[int] = CLASSES
) -> tuple[Tensor, ...]:
    """The arguments of `task_loss`, in order."""
    task = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    R, K, columns = len(task), sum(classes), torch.tensor(classes)
    inputs = (
        torch.randn(R, width).to(dtype),
        torch.randn(K, width).to(dtype),
        torch.randn(K).to(dtype),
        torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
        (torch.rand(R) * columns[task]).long(),
        torch.randn(R),
        torch.rand(R) + 0.5,
        F.pad(columns.cumsum(0), (1, 0)).to(torch.int32),
        torch.tensor(REGRESSION[: len(classes)]),
    )
    return tuple(t.to(device) for t in inputs)


def assert_matches(
    inputs: tuple[Tensor, ...], smoothing: float, width: int = max(CLASSES), several: Tensor | None = None
) -> None:
    def definition(*inputs: Tensor) -> tuple[Tensor, ...]:
        loss, *others = task_loss_reference(*inputs, label_smoothing=smoothing, several=several)
        return loss.to(torch.promote_types(loss.dtype, torch.float32)), *others

    def op(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(task_loss(*inputs, width=width, label_smoothing=smoothing, several=several))

    assert_as_accurate(op, definition, inputs, constant=(5, 6))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_matches_definition(dtype, smoothing, device):
    assert_matches(make(COUNTS, dtype, device), smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_several_labels_match_definition(dtype, smoothing, device):
    """Beside a number and tasks with one class a row."""
    inputs, several = make(COUNTS, dtype, device), torch.tensor([True, False, False, False, True, True], device=device)
    own = several.repeat_interleave(torch.tensor(COUNTS, device=device))
    bits = 2 ** torch.tensor(CLASSES, device=device).repeat_interleave(torch.tensor(COUNTS, device=device))
    inputs[4][own] = (torch.rand(len(own), device=device) * bits).long()[own]
    inputs[2][:3] += 12  # sure of the first task's labels, rightly or wrongly
    assert_matches(inputs, smoothing, several=several)


def test_63_labels(device):
    several = torch.tensor([True, False], device=device)
    inputs = make([9, 3], torch.float32, device, classes=[63, 1])
    inputs[4][:3] = torch.tensor([2**63 - 1, 0, 2**62 + 1])
    assert_matches(inputs, 0.1, width=63, several=several)


@pytest.mark.gpu
def test_bfloat16():
    assert_matches(make([9 * count for count in COUNTS], torch.bfloat16, "cuda", width=200), 0.1)


@pytest.mark.parametrize("counts", [[0] * 6, [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 5, 0]], ids=str)
def test_few_rows(counts, device):
    assert_matches(make(counts, torch.float32, device), 0.1)


def test_many_classes(device):
    assert_matches(make([20, 3], torch.float32, device, classes=[200, 1]), 0.1, width=200)


def test_long_tasks_are_shared_out(device, monkeypatch):
    """Rows beyond a task's first chunk are added up from partial sums."""
    monkeypatch.setattr(task_loss_triton, "MIN_CHUNK", 16)
    monkeypatch.setattr(task_loss_triton, "PROGRAMS", 1 << 20)
    assert_matches(make([17, 0, 50, 1, 0, 16], torch.float32, device), 0.0)


def test_sums(device):
    *tensors, target, value, row_weight, class_offsets, regression = make(COUNTS, torch.float32, device)
    row_weight[::3] = 0
    row_weight[52:55] = 0  # all of the fifth task
    inputs = (*tensors, target, value, row_weight, class_offsets, regression)
    got = task_loss(*inputs, width=max(CLASSES))
    expected = task_loss_torch.forward(*inputs, max(CLASSES), 0.0)
    for total, wanted in zip(got, expected[0], strict=True):
        torch.testing.assert_close(total, wanted)
    assert got.count.sum() == (row_weight > 0).sum()
    assert_matches(inputs, 0.0)


@pytest.mark.parametrize("offset", [1e3, -1e3])
def test_logits_of_a_thousand(offset, device):
    x, weight, bias, *rest = make([10, 0, 10, 0, 0, 10], torch.float32, device)
    assert_matches((x, weight, bias + offset, *rest), 0.1)


def test_gradient_of_a_sure_prediction(device):
    """p = 0.9993 for the true class: p - 1 must not be what is left of the rounding of p."""
    logits = torch.zeros(5, 5).fill_diagonal_(8.625)
    offsets, regression = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([False])
    rows = (offsets, torch.arange(5), torch.zeros(5), torch.ones(5), offsets, regression)

    def gradient(function, dtype: torch.dtype, **options: int) -> Tensor:
        leaves = [t.to(device, dtype).requires_grad_() for t in (torch.eye(5), logits, torch.zeros(5))]
        loss = function(*leaves, *(t.to(device) for t in rows), **options)
        return torch.autograd.grad(loss[0], leaves)[1].double()

    exact = gradient(task_loss_reference, torch.float64)
    for dtype in (torch.float32, torch.float16):
        got = gradient(lambda *inputs, **options: task_loss(*inputs, **options).loss, dtype, width=5)
        torch.testing.assert_close(got, exact, rtol=4 * max(torch.finfo(dtype).eps, 1e-4), atol=0.0)


def test_logits(device):
    x, weight, bias, offsets, _, _, _, class_offsets, _ = make(COUNTS, torch.float32, device)
    logits = task_logits(x, weight, bias, offsets, class_offsets, max(CLASSES))
    own = F.linear(x[12:52], weight[4:6], bias[4:6])  # the third task
    torch.testing.assert_close(logits[12:52, :2], own)
    assert (logits[12:52, 2:] == -math.inf).all()


@pytest.mark.no_kernel
def test_target_outside_of_the_classes_is_named(device, monkeypatch):
    monkeypatch.setattr(arguments, "_CHECK", True)
    inputs = make(COUNTS, torch.float32, device)
    inputs[4][14] = 2
    with pytest.raises(ValueError, match=r"target must be in \[0, 2\) for task 2, got 2 at row 14"):
        task_loss(*inputs, width=max(CLASSES))


def test_same_bits_every_time(device):
    x, weight, bias, *rest = make(COUNTS, torch.float16, device)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def results() -> tuple[Tensor, ...]:
        sums = task_loss(*leaves, *rest, width=max(CLASSES))
        dloss = torch.arange(6.0, device=device)
        return *(total.detach() for total in sums), *torch.autograd.grad(sums.loss, leaves, dloss)

    assert all(map(torch.equal, results(), results()))
