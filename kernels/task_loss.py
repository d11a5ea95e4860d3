"""Losses of all small heads together: classification and regression rows of any mix of tasks in one call.

The heads lie side by side in one table: task t owns the columns class_offsets[t] : class_offsets[t + 1]. For row r of
task t, with logits z over the columns of t and n of them:
    classification  l_r = (1 - s) * -log softmax(z)[y] + s * mean_c -log softmax(z)[c],  s the label smoothing
    regression      l_r = (z - v)^2
and the loss of a task is sum_r w_r l_r. Row weights are the place for class weights and for masking (w = 0).
Saved for backward: w_r * dl_r/dz_r, (R, C).

R rows, D width, N tasks, K columns of the table, C columns of the widest task
Source: Caruana, Multitask Learning, 1997; label smoothing as in Szegedy et al., arXiv:1512.00567, section 7.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.kernels.dispatch import register

GATHERED = 1 << 22  # elements of the table that the reference gathers at a time: 16 MiB of float32


class LossSums(NamedTuple):
    """Per task: sums over its rows. Only `loss` carries gradients."""

    loss: Tensor  # (N,) sum of weight * loss, float32
    weight: Tensor  # (N,) sum of weights, float32
    count: Tensor  # type: ignore[assignment]  # hides tuple.count; (N,) rows with weight > 0, float32
    correct: Tensor  # (N,) of those, rows whose highest logit is the target; 0 for regression, float32


def task_loss_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    task: Tensor,
    target: Tensor,
    value: Tensor,
    row_weight: Tensor,
    class_offsets: Tensor,
    regression: Tensor,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The definition: one task after the other, (N,) loss sums."""
    bounds, losses = class_offsets.tolist(), []
    for t, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        mine = task == t
        logits = F.linear(x[mine], weight[first:last], bias[first:last])
        if regression[t]:
            loss = (logits[:, 0] - value[mine].to(logits.dtype)).square()
        else:
            loss = F.cross_entropy(logits, target[mine], reduction="none", label_smoothing=label_smoothing)
        losses.append((loss * row_weight[mine].to(loss.dtype)).sum())
    return torch.stack(losses)


def sum_by_task(values: Tensor, task: Tensor, num_tasks: int) -> Tensor:
    """(R,) -> (N,)"""
    return values.new_zeros(num_tasks).index_add_(0, task, values)


def _columns(task: Tensor, class_offsets: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Each row's columns in the table, (R, C); those beyond its task's last repeat it and are `outside`."""
    first, last = class_offsets[task].long(), class_offsets[task + 1].long()
    column = first[:, None] + torch.arange(width, device=task.device)
    return column.minimum(last[:, None] - 1), column >= last[:, None]


def _chunks(rows: int, elements_per_row: int) -> Iterator[slice]:
    size = max(1, GATHERED // max(1, elements_per_row))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def logits_reference(
    x: Tensor, weight: Tensor, bias: Tensor, task: Tensor, class_offsets: Tensor, width: int
) -> Tensor:
    """(R, D) -> (R, C), each row's own head; -inf beyond its last class."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    columns, outside = _columns(task, class_offsets, width)
    logits = x.new_empty(columns.shape, dtype=dtype)
    for rows in _chunks(len(x), width * x.shape[1]):
        own = weight[columns[rows]].to(dtype)  # (r, C, D)
        logits[rows] = torch.einsum("rd,rcd->rc", x[rows].to(dtype), own)
    return (logits + bias[columns].to(dtype)).masked_fill(outside, float("-inf"))


def _forward_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    task: Tensor,
    target: Tensor,
    value: Tensor,
    row_weight: Tensor,
    class_offsets: Tensor,
    regression: Tensor,
    width: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    N = len(class_offsets) - 1
    logits = logits_reference(x, weight, bias, task, class_offsets, width)  # (R, C)
    outside = logits == float("-inf")
    number = regression[task]  # (R,) rows of regression tasks
    row_weight = row_weight.to(logits.dtype)

    log_p = logits.log_softmax(-1).masked_fill(outside, 0.0)
    classes = (~outside).sum(-1, keepdim=True)
    # a regression row has its label in `value`; its target is any valid column
    expected = F.one_hot(target, width).to(logits.dtype) * (1 - label_smoothing) + ~outside * label_smoothing / classes
    difference = logits[:, 0] - value
    loss = torch.where(number, difference.square(), -(expected * log_p).sum(-1))
    gradient = torch.where(outside, 0.0, log_p.exp() - expected)
    gradient = torch.where(
        number[:, None], F.one_hot(torch.zeros_like(target), width) * 2 * difference[:, None], gradient
    )

    counted = (row_weight > 0).to(logits.dtype)
    correct = counted * (logits.argmax(-1) == target) * ~number
    columns = (row_weight * loss, row_weight, counted, correct)
    sums = LossSums(*(sum_by_task(values, task, N) for values in columns))
    return *sums, gradient * row_weight[:, None]


def _backward_reference(
    dloss: Tensor, gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, task: Tensor, class_offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    columns, _ = _columns(task, class_offsets, gradient.shape[1])
    dlogits = gradient * dloss[task, None]  # (R, C); 0 outside of a task's columns
    dx = torch.empty_like(x, dtype=gradient.dtype)
    dweight = torch.zeros_like(weight, dtype=gradient.dtype)
    for rows in _chunks(len(x), gradient.shape[1] * x.shape[1]):
        own = weight[columns[rows]].to(gradient.dtype)  # (r, C, D)
        dx[rows] = torch.einsum("rc,rcd->rd", dlogits[rows], own)
        outer = dlogits[rows, :, None] * x[rows, None].to(gradient.dtype)  # (r, C, D)
        dweight.index_add_(0, columns[rows].flatten(), outer.flatten(0, 1))
    dbias = dweight.new_zeros(len(weight)).index_add_(0, columns.flatten(), dlogits.flatten())
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(bias.dtype)


def _forward_fake(x, weight, bias, task, target, value, row_weight, class_offsets, regression, width, label_smoothing):
    dtype = torch.promote_types(x.dtype, torch.float32)
    sums = (x.new_empty(len(class_offsets) - 1, dtype=dtype) for _ in range(4))
    return *sums, x.new_empty((len(x), width), dtype=dtype)


_forward = register("task_loss_forward", reference=_forward_reference, fake=_forward_fake)
_backward = register(
    "task_loss_backward",
    reference=_backward_reference,
    fake=lambda dloss, gradient, x, weight, bias, *rest: tuple(t.new_empty(t.shape) for t in (x, weight, bias)),
)


class _TaskLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, task, target, value, row_weight, class_offsets, regression, width, smoothing):
        loss, *sums, gradient = _forward(
            x, weight, bias, task, target, value, row_weight, class_offsets, regression, width, smoothing
        )
        ctx.save_for_backward(gradient, x, weight, bias, task, class_offsets)
        ctx.mark_non_differentiable(*sums)
        return loss, *sums

    @staticmethod
    def backward(ctx, dloss, *_):
        return *_backward(dloss.contiguous(), *ctx.saved_tensors), *[None] * 8


def task_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    task: Tensor,
    target: Tensor,
    value: Tensor,
    row_weight: Tensor,
    class_offsets: Tensor,
    regression: Tensor,
    *,
    width: int,
    label_smoothing: float = 0.0,
) -> LossSums:
    """Loss sums of all classification and regression tasks of a batch.

    Args:
        x: (R, D) hidden states of the labelled rows; float32, float16, bfloat16 or float64.
        weight: (K, D) all heads' classes, one task after the other.
        bias: (K,)
        task: (R,) int64, 0 <= task < N.
        target: (R,) int64, class inside its task; 0 for regression.
        value: (R,) float32, label of regression rows; 0 elsewhere.
        row_weight: (R,) float32, factor of each row's loss.
        class_offsets: (N + 1,) int32, columns of each task in the table.
        regression: (N,) bool; such a task has one column and the squared error.
        width: C, columns of the widest task; known on the host, so that nobody asks the device.
        label_smoothing: share of the probability spread over all classes of the task.

    Returns:
        `LossSums`; sums are taken in float32 at least. A task without rows has sums of 0. Gradients flow from `loss` to
        x, weight and bias.

    Raises:
        ValueError: shapes that do not fit one another.
    """
    R, D = x.shape
    if weight.shape[1] != D or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"task_loss: weight must be (K, {D}) and bias (K,), got {list(weight.shape)} and {list(bias.shape)}"
        )
    for name, rows in (("task", task), ("target", target), ("value", value), ("row_weight", row_weight)):
        if rows.shape != (R,):
            raise ValueError(f"task_loss: {name} must be (R,) = ({R},) to match x, got {list(rows.shape)}")
    return LossSums(
        *_TaskLoss.apply(
            x, weight, bias, task, target, value, row_weight, class_offsets, regression, width, label_smoothing
        )
    )
