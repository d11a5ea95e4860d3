"""The losses of the small heads against their definition in float64, and what they count."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from parity import assert_as_accurate
from trunkline.kernels.task_loss import (
    LossSums,
    _backward,
    _forward,
    task_loss,
    task_loss_reference,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CLASSES = [3, 1, 2, 7, 1, 5]  # columns of every task
REGRESSION = [False, True, False, False, False, False]  # the other task with one column has one class
ABSENT = 3
ROWS = {"mixed": [0, 1, 2, 4, 5] * 40, "one row": [2], "one task": [1] * 9, "no row": []}  # the task of every row


class Inputs(NamedTuple):
    """The arguments of `task_loss`, in order."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    task: Tensor
    target: Tensor
    value: Tensor
    row_weight: Tensor
    class_offsets: Tensor
    regression: Tensor


def make(tasks: list[int], dtype: torch.dtype = torch.float32, device: str = "cpu", width: int = 24) -> Inputs:
    task = torch.tensor(tasks, dtype=torch.int64)
    R, K, regression = len(task), sum(CLASSES), torch.tensor(REGRESSION)
    target = (torch.rand(R) * torch.tensor(CLASSES)[task]).long()
    inputs = Inputs(
        x=torch.randn(R, width).to(dtype),
        weight=torch.randn(K, width).to(dtype),
        bias=torch.randn(K).to(dtype),
        task=task,
        target=target,
        value=torch.where(regression[task], torch.randn(R), 0.0),
        row_weight=torch.rand(R) + 0.5,
        class_offsets=torch.tensor([0, *CLASSES]).cumsum(0).to(torch.int32),
        regression=regression,
    )
    return Inputs(*(t.to(device) for t in inputs))


def assert_matches(inputs: Inputs, smoothing: float = 0.0, slack: float = 2.0) -> None:
    def definition(*inputs: Tensor) -> Tensor:  # in half precision its loss is rounded at last, ours is not
        loss = task_loss_reference(*inputs, label_smoothing=smoothing)
        return loss.to(torch.promote_types(loss.dtype, torch.float32))

    def op(*inputs: Tensor) -> Tensor:
        return task_loss(*inputs, width=max(CLASSES), label_smoothing=smoothing).loss

    assert_as_accurate(op, definition, inputs, constant=(5, 6), slack=slack)


def results(inputs: Inputs, dloss: Tensor) -> tuple[Tensor, ...]:
    """The sums and the gradients of x, weight and bias."""
    leaves = [t.detach().requires_grad_() for t in inputs[:3]]
    sums = task_loss(*leaves, *inputs[3:], width=max(CLASSES), label_smoothing=0.1)
    return *(total.detach() for total in sums), *torch.autograd.grad(sums.loss, leaves, dloss)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tasks", ROWS.values(), ids=ROWS)
def test_matches_definition(tasks, smoothing, device):
    assert_matches(make(tasks, device=device), smoothing)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, device):
    assert_matches(make(ROWS["mixed"], dtype, device), smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_sums_in_float32(dtype):
    inputs = make(ROWS["mixed"], dtype)
    exact = task_loss_reference(*(t.double() if t.is_floating_point() else t for t in inputs))
    loss = task_loss(*inputs, width=max(CLASSES)).loss
    torch.testing.assert_close(loss, exact.float())


def test_gathers_in_chunks(monkeypatch):
    monkeypatch.setattr("trunkline.kernels.task_loss.GATHERED", 3 * max(CLASSES) * 24 + 1)  # 200 rows, 3 at a time
    assert_matches(make(ROWS["mixed"]), smoothing=0.1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradcheck(smoothing):
    x, weight, bias, *rest = make([0, 1, 2, 4, 5, 0], torch.float64, width=3)

    def loss(*leaves: Tensor) -> Tensor:
        return task_loss(*leaves, *rest, width=max(CLASSES), label_smoothing=smoothing).loss

    torch.autograd.gradcheck(loss, [t.requires_grad_() for t in (x, weight, bias)])


def test_sums():
    """Worked out by hand: two tasks of two classes, whose logits are the features, and a number."""
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [5.0, 0.0], [3.0, 0.0]])
    sums = task_loss(
        x,
        torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]),
        torch.zeros(5),
        task=torch.tensor([0, 1, 0, 1, 2]),
        target=torch.tensor([0, 1, 1, 0, 0]),
        value=torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]),
        row_weight=torch.tensor([2.0, 0.5, 1.0, 0.0, 0.25]),
        class_offsets=torch.tensor([0, 2, 4, 5], dtype=torch.int32),
        regression=torch.tensor([False, False, True]),
        width=2,
    )
    right, wrong = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    torch.testing.assert_close(sums.loss, torch.tensor([2 * math.log(2) + right, 0.5 * wrong, 0.25 * 4.0]))
    assert sums.weight.tolist() == [3.0, 0.5, 0.25]
    assert sums.count.tolist() == [2.0, 1.0, 1.0]  # the fourth row has weight 0
    assert sums.correct.tolist() == [2.0, 0.0, 0.0]  # of two equal logits the first is the answer


def test_task_without_rows_has_zeros():
    sums = results(make(ROWS["mixed"]), torch.randn(len(CLASSES)))
    first, last = sum(CLASSES[:ABSENT]), sum(CLASSES[: ABSENT + 1])
    assert [total[ABSENT].item() for total in sums[:4]] == [0.0] * 4
    for gradient in sums[5:]:  # of weight and bias
        assert not gradient[first:last].any()


def test_one_class_has_neither_loss_nor_gradient():
    inputs = make([4] * 5)
    loss, weight, count, correct, *gradients = results(inputs, torch.ones(len(CLASSES)))
    assert loss[4].abs() < 1e-5
    assert (count[4], correct[4]) == (5, 5)
    assert all(gradient.abs().max() < 1e-5 for gradient in gradients)


def test_rows_of_weight_zero_do_not_count():
    inputs = make(ROWS["mixed"])
    for total in results(inputs._replace(row_weight=torch.zeros_like(inputs.row_weight)), torch.ones(len(CLASSES))):
        assert not total.any()
    kept = torch.arange(len(inputs.task)) % 3 > 0
    dloss = torch.randn(len(CLASSES))
    fewer = results(Inputs(*(t[kept] if len(t) == len(kept) else t for t in inputs)), dloss)
    *masked, dx, dweight, dbias = results(inputs._replace(row_weight=inputs.row_weight * kept), dloss)
    assert not dx[~kept].any()
    for got, expected in zip((*masked, dx[kept], dweight, dbias), fewer, strict=True):
        torch.testing.assert_close(got, expected)


def test_only_loss_carries_gradients():
    x, *rest = make(ROWS["mixed"])
    sums = task_loss(x.requires_grad_(), *rest, width=max(CLASSES))
    assert [total.requires_grad for total in sums] == [True, False, False, False]


@pytest.mark.parametrize("offset", [1e3, -1e3])
def test_logits_of_a_thousand(offset):
    inputs = make([0, 2, 5] * 20)
    assert_matches(inputs._replace(bias=inputs.bias + offset), smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradient_of_a_sure_prediction(dtype):
    """p = 0.9993 for the true class: p - 1 must not be what is left of the rounding of p."""
    logits = torch.zeros(5, 5).fill_diagonal_(8.625)  # exact in every dtype, and so is everything but the gradient
    offsets, regression = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([False])
    rows = (torch.zeros(5, dtype=torch.int64), torch.arange(5), torch.zeros(5), torch.ones(5))

    def gradients(function, dtype: torch.dtype, **options: int) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in (torch.eye(5), logits, torch.zeros(5))]
        loss = function(*leaves, *rows, offsets, regression, **options)
        return torch.autograd.grad(loss[0], leaves)

    exact = gradients(task_loss_reference, torch.float64)
    got = gradients(lambda *inputs, **options: task_loss(*inputs, **options).loss, dtype, width=5)
    assert exact[1].diagonal().max() < -1e-4
    torch.testing.assert_close(got[1].double(), exact[1], rtol=4 * max(torch.finfo(dtype).eps, 1e-4), atol=0.0)


def test_certain_prediction_is_finite():
    inputs = make([0] * 4)
    inputs = inputs._replace(target=torch.ones_like(inputs.target))
    inputs.bias[1] = 1e4
    loss, _, _, correct, *gradients = results(inputs, torch.ones(len(CLASSES)))
    assert correct[0] == 4
    assert loss.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("device", DEVICES)
def test_memory_around_the_inputs_is_never_read(device):
    inputs = make(ROWS["mixed"], device=device)
    dloss = torch.randn(len(CLASSES), device=device)
    clean = results(inputs, dloss)
    amid_nan = (
        torch.cat([torch.full_like(t, float("nan")), t, torch.full_like(t, float("nan"))])[len(t) : 2 * len(t)]
        if t.is_floating_point()
        else t
        for t in (*inputs, dloss)
    )
    *inputs, dloss = amid_nan
    for got, expected in zip(results(Inputs(*inputs), dloss), clean, strict=True):
        torch.testing.assert_close(got, expected)


def test_views():
    inputs = make(ROWS["mixed"])
    R, D = inputs.x.shape
    inputs = inputs._replace(x=torch.randn(R, 2 * D)[:, D:], weight=inputs.weight.T.contiguous().T)
    assert not inputs.x.is_contiguous()
    assert_matches(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_op_contract(dtype):
    inputs = make([0, 1, 5, 1], dtype)
    *_, gradient = _forward(*inputs, max(CLASSES), 0.1)
    torch.library.opcheck(_forward, (*inputs, max(CLASSES), 0.1))
    dloss = torch.randn(len(CLASSES))
    torch.library.opcheck(_backward, (dloss, gradient, *inputs[:4], inputs.class_offsets))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
def test_compiles():
    x, weight, bias, *rest = make([0, 1, 5, 1])
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def function(*leaves: Tensor) -> LossSums:
        return task_loss(*leaves, *rest, width=max(CLASSES), label_smoothing=0.1)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
    eager = function(*leaves)
    torch.testing.assert_close(compiled, eager)
    dloss = torch.randn(len(CLASSES))
    got, expected = (torch.autograd.grad(sums.loss, leaves, dloss) for sums in (compiled, eager))
    torch.testing.assert_close(got, expected)


def test_same_bits_every_time():
    inputs = make(ROWS["mixed"])
    dloss = torch.randn(len(CLASSES))
    assert all(map(torch.equal, results(inputs, dloss), results(inputs, dloss)))


@pytest.mark.parametrize(("weight", "bias"), [((19, 23), (19,)), ((19, 24), (18,)), ((19, 24), (19, 1))])
def test_wrong_table_is_named(weight, bias):
    message = (
        rf"task_loss: weight must be \(K, 24\) and bias \(K,\), got \[{', '.join(map(str, weight))}\] and "
        rf"\[{', '.join(map(str, bias))}\]"
    )
    inputs = make([0, 1])._replace(weight=torch.zeros(weight), bias=torch.zeros(bias))
    with pytest.raises(ValueError, match=message):
        task_loss(*inputs, width=max(CLASSES))


@pytest.mark.parametrize("name", ["task", "target", "value", "row_weight"])
def test_wrong_number_of_rows_is_named(name):
    inputs = make([0, 1])
    inputs = inputs._replace(**{name: getattr(inputs, name).repeat(2)})
    with pytest.raises(ValueError, match=rf"task_loss: {name} must be \(R,\) = \(2,\) to match x, got \[4\]"):
        task_loss(*inputs, width=max(CLASSES))
