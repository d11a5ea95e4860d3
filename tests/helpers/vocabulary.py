"""What the tests of the vocabulary loss share: inputs, the function and its definition on them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from parity import assert_as_accurate
from trunkline.kernels.tasks.task_loss import LossSums
from trunkline.kernels.vocabulary.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

N, D, V = 4, 16, 101
ABSENT = 2  # the task without rows
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.01},
    "capped": {"softcap": 3.0},
    "everything": {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0},
}


class Inputs(NamedTuple):
    """The tensors that `linear_cross_entropy` takes, in the order of its reference."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    target: Tensor
    task: Tensor
    row_weight: Tensor


def make(rows: int, dtype: torch.dtype = torch.float32, device: str = "cpu", vocabulary: int = V) -> Inputs:
    tasks = torch.tensor([0, 1, 3])  # none of the absent one
    inputs = Inputs(
        x=torch.randn(rows, D).to(dtype),
        weight=(torch.randn(vocabulary, D) / 2).to(dtype),
        bias=torch.randn(vocabulary).to(dtype),
        target=torch.randint(vocabulary, (rows,)),
        task=tasks[torch.randint(len(tasks), (rows,))],
        row_weight=torch.rand(rows) + 0.5,
    )
    return Inputs(*(t.to(device) for t in inputs))


def op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    task: Tensor,
    row_weight: Tensor,
    num_tasks: int = N,
    **options: Any,
) -> LossSums:
    return linear_cross_entropy(x, weight, target, task, row_weight, num_tasks=num_tasks, bias=bias, **options)


def definition(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    task: Tensor,
    row_weight: Tensor,
    num_tasks: int = N,
    **options: float,
) -> Tensor:
    loss = linear_cross_entropy_reference(x, weight, target, task, row_weight, num_tasks, bias, **options)
    return loss.to(torch.promote_types(loss.dtype, torch.float32))  # in half precision it is rounded at last, ours not


def assert_matches(inputs: Inputs, **options: float) -> None:
    """With several tasks, whose gradients wait for the backward pass, and with one, whose gradients do not."""
    for num_tasks in (N, 1):
        assert_as_accurate(
            lambda *inputs: op(*inputs, **options).loss,
            lambda *inputs: definition(*inputs, **options),
            (*inputs._replace(task=inputs.task.clamp(max=num_tasks - 1)), num_tasks),
            constant=(5,),
        )


def results(inputs: Inputs, arriving: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """The sums and the gradients of x, weight and bias, where `arriving` is that of the losses."""
    leaves = [t.detach().requires_grad_() for t in inputs[:3]]
    sums = op(*leaves, *inputs[3:], **options)
    return *(total.detach() for total in sums), *torch.autograd.grad(sums.loss, leaves, arriving)
