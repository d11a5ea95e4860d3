"""The losses of tasks with several labels: against the definition in float64, torch's own, and values worked out."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parity import assert_as_accurate
from small_heads import CLASSES, ROWS, Inputs, make
from trunkline.kernels.tasks.task_loss import example, task_loss, task_loss_reference

SEVERAL = torch.tensor([True, False, False, True, True, True])  # the second is a number, the third has one class a row


def inputs_of(tasks: list[int], dtype: torch.dtype = torch.float32, several: Tensor = SEVERAL) -> Inputs:
    inputs = make(tasks, dtype)
    task = torch.tensor(tasks, dtype=torch.int64)
    alternatives = torch.where(several, 2 ** torch.tensor(CLASSES), torch.tensor(CLASSES))[task]
    return inputs._replace(target=(torch.rand(len(tasks)) * alternatives).long())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("tasks", [*ROWS.values(), sorted([0, 1, 2, 3, 4, 5] * 9)], ids=[*ROWS, "all tasks"])
def test_matches_definition(tasks, dtype, smoothing):
    def definition(*inputs: Tensor) -> tuple[Tensor, ...]:
        loss, *others = task_loss_reference(*inputs, label_smoothing=smoothing, several=SEVERAL)
        return loss.to(torch.promote_types(loss.dtype, torch.float32)), *others

    def op(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(task_loss(*inputs, width=max(CLASSES), label_smoothing=smoothing, several=SEVERAL))

    assert_as_accurate(op, definition, inputs_of(tasks, dtype), constant=(5, 6))


def test_is_torchs_binary_cross_entropy():
    inputs = inputs_of([3] * 20)
    sums = task_loss(*inputs._replace(row_weight=torch.ones(20)), width=max(CLASSES), several=SEVERAL)
    table = slice(*inputs.class_offsets[3:5])
    logits = F.linear(inputs.x, inputs.weight[table], inputs.bias[table])
    holds = torch.tensor([[target >> c & 1 for c in range(7)] for target in inputs.target.tolist()])
    torch.testing.assert_close(sums.loss[3] / 20, F.binary_cross_entropy_with_logits(logits, holds.float()))
    assert sums.correct[3] == ((logits > 0) == holds).all(1).sum()


def test_sums():
    """Worked out by hand: the logits are the features, 0 and log 3, whose probabilities are 1/2 and 3/4."""
    sums = task_loss(
        torch.tensor([[0.0, math.log(3)]] * 4),
        torch.eye(2),
        torch.zeros(2),
        offsets=torch.tensor([0, 4], dtype=torch.int32),
        target=torch.tensor([0b00, 0b01, 0b10, 0b11]),
        value=torch.zeros(4),
        row_weight=torch.tensor([1.0, 2.0, 4.0, 0.0]),
        class_offsets=torch.tensor([0, 2], dtype=torch.int32),
        regression=torch.tensor([False]),
        width=2,
        several=torch.tensor([True]),
    )
    half, likely, unlikely = (-math.log(p) / 2 for p in (1 / 2, 3 / 4, 1 / 4))
    assert sums.loss.item() == pytest.approx(half + unlikely + 2 * (half + unlikely) + 4 * (half + likely))
    assert (sums.weight.item(), sums.count.item(), sums.correct.item()) == (7.0, 3.0, 1.0)  # a logit of 0 is a no


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradcheck_and_sure_predictions(dtype):
    """A probability of 1 - 1e-9 has a loss and a gradient, also where float32 has no such probability."""
    x = torch.eye(2, dtype=dtype).requires_grad_()
    offsets = torch.tensor([0, 2], dtype=torch.int32)
    weight = torch.tensor([[20.0, 0.0], [0.0, -20.0]], dtype=dtype, requires_grad=True)
    rows = (offsets, torch.tensor([1, 0]), torch.zeros(2), torch.ones(2), offsets, torch.tensor([False]))

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        bias = torch.tensor([0.0, 0.0], dtype=dtype)
        return task_loss(x, weight, bias, *rows, width=2, several=torch.tensor([True])).loss

    (gradient,) = torch.autograd.grad(loss(x, weight), weight)
    tiny = 1 / (1 + math.exp(20)) / 2
    torch.testing.assert_close(gradient.diagonal(), torch.tensor([-tiny, tiny], dtype=dtype), rtol=1e-5, atol=0)
    if dtype == torch.float64:
        torch.autograd.gradcheck(loss, (x, weight / 10))


def test_logits_that_are_not_finite_show():
    inputs = inputs_of([3] * 4)
    inputs.x[2, 0] = math.nan
    assert task_loss(*inputs, width=max(CLASSES), several=SEVERAL).loss[3].isnan()


def test_the_other_kinds_are_as_without():
    inputs, others = inputs_of(ROWS["mixed"], several=SEVERAL & False), torch.zeros(6, dtype=torch.bool)
    assert others.any().item() is False
    got = task_loss(*inputs, width=max(CLASSES), several=others)
    assert all(map(torch.equal, got, task_loss(*inputs, width=max(CLASSES))))


def test_63_labels():
    arguments = example("cpu", torch.float32, rows=30, tasks=1, width=8, classes=63, several=True)
    arguments["target"][:2] = torch.tensor([2**63 - 1, 0])
    big = task_loss(**arguments).loss
    del arguments["width"]
    torch.testing.assert_close(big, task_loss_reference(**arguments).loss)


def test_class_weights_are_of_the_first_label():
    inputs, class_weight = inputs_of([0, 2, 3]), torch.arange(1.0, 1 + sum(CLASSES))
    got = task_loss(*inputs, width=max(CLASSES), several=SEVERAL, class_weight=class_weight)
    plain = task_loss(*inputs, width=max(CLASSES), several=SEVERAL)
    torch.testing.assert_close(got.weight[[0, 3]], plain.weight[[0, 3]] * class_weight[[0, 6]])


@pytest.mark.parametrize("target", [-1, 8, 2**62])
def test_bits_beyond_the_labels_are_named(target):
    inputs = inputs_of([0, 0, 1])
    inputs.target[1] = target
    message = rf"target must be in \[0, 2\*\*3\) for task 0, got {target} at row 1"
    with pytest.raises(ValueError, match=message):
        task_loss(*inputs, width=max(CLASSES), several=SEVERAL)


def test_what_cannot_be_is_named():
    inputs = inputs_of([0])
    with pytest.raises(ValueError, match=r"several must be bool \(6,\), got torch.int64 \[6\]"):
        task_loss(*inputs, width=max(CLASSES), several=SEVERAL.long())
    with pytest.raises(ValueError, match=r"several must be bool \(6,\), got torch.bool \[5\]"):
        task_loss(*inputs, width=max(CLASSES), several=SEVERAL[1:])
    arguments = example("cpu", torch.float32, rows=3, tasks=1, width=8, classes=64)
    with pytest.raises(ValueError, match="a task has at most 63, got 64"):
        task_loss(**arguments, several=torch.tensor([True]))
