"""Losses of all small heads together: classification and regression rows of any mix of tasks in one call.

The heads lie side by side in one table: task t owns the columns class_offsets[t] : class_offsets[t + 1]. For row r of
task t, with logits z over the columns of t and n of them:
    classification  l_r = (1 - s) * -log softmax(z)[y] + s * mean_c -log softmax(z)[c],  s the label smoothing
    regression      l_r = (z - v)^2
and the loss of a task is sum_r w_r l_r. Row weights are the place for class weights and for masking (w = 0).
Saved for backward: w_r * dl_r/dz_r, (R, C), made in forward. The loss is linear in it, so that backward, exact for any
gradient of the sums, is one factor per task and two thin products, each result rounded once.

R rows, D width, N tasks, K columns of the table, C columns of the widest task
Source: Caruana, Multitask Learning, 1997; label smoothing as in Szegedy et al., arXiv:1512.00567, section 7.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.kernels import task_loss_triton
from trunkline.kernels.dispatch import register
from trunkline.kernels.task_tiles import can_look, check_offsets, random_offsets


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
    offsets: Tensor,
    target: Tensor,
    value: Tensor,
    row_weight: Tensor,
    class_offsets: Tensor,
    regression: Tensor,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The definition: one task after the other, (N,) loss sums."""
    rows, columns, losses = offsets.tolist(), class_offsets.tolist(), []
    for t in range(len(columns) - 1):
        own, table = slice(rows[t], rows[t + 1]), slice(columns[t], columns[t + 1])
        logits = F.linear(x[own], weight[table], bias[table])
        if regression[t]:
            loss = (logits[:, 0] - value[own].to(logits.dtype)).square()
        else:
            loss = F.cross_entropy(logits, target[own], reduction="none", label_smoothing=label_smoothing)
        losses.append((loss * row_weight[own].to(loss.dtype)).sum())
    return torch.stack(losses)


def sum_by_task(values: Tensor, task: Tensor, num_tasks: int) -> Tensor:
    """(R,) -> (N,)"""
    return values.new_zeros(num_tasks).index_add_(0, task, values)


def _task_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """(R,) int64"""
    tasks = torch.arange(len(offsets) - 1, device=offsets.device)
    return tasks.repeat_interleave(offsets[1:] - offsets[:-1], output_size=rows)


class _Entries(NamedTuple):
    """The logits that exist, E of them: row after row the columns of its own task."""

    row: Tensor  # (E,) int64
    place: Tensor  # (E,) int64, class inside the task
    column: Tensor  # (E,) int64, in the table
    starts: Tensor  # (R,) int64, first of each row


def _entries(task: Tensor, class_offsets: Tensor, width: int) -> _Entries:
    first = class_offsets.long()[task]
    classes = class_offsets[1:][task] - first  # (R,)
    row, place = (torch.arange(width, device=task.device) < classes[:, None]).nonzero(as_tuple=True)
    return _Entries(row, place, first[row] + place, classes.cumsum(0) - classes)


def _logits_reference(
    x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, class_offsets: Tensor, width: int
) -> Tensor:
    return _logits(x, weight, bias, _task_of_rows(offsets, len(x)), class_offsets, width)


def _logits(x: Tensor, weight: Tensor, bias: Tensor, task: Tensor, class_offsets: Tensor, width: int) -> Tensor:
    """(R, C), -inf beyond the last class"""
    dtype = torch.promote_types(x.dtype, torch.float32)
    row, place, column, starts = _entries(task, class_offsets, width)
    # the derivative of a bag's sum by its factors: x[row] . weight[column] without a copy of either
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.to(dtype), weight.to(dtype), column, starts, row, mode=0
    )
    logits = x.new_full((len(x), width), float("-inf"), dtype=dtype)
    logits[row, place] = products + bias.to(dtype)[column]
    return logits


def _check(
    offsets: Tensor, target: Tensor, class_offsets: Tensor, regression: Tensor, columns: int, width: int
) -> None:
    """Raises ValueError for what only the values tell."""
    check_offsets("task_loss", offsets, len(target))
    bounds = class_offsets.tolist()
    classes = [last - first for first, last in zip(bounds[:-1], bounds[1:], strict=True)]
    if bounds[0] != 0 or bounds[-1] != columns or min(classes) < 1 or max(classes) > width:
        raise ValueError(
            f"task_loss: class_offsets must rise from 0 to K = {columns} by 1 to C = {width} columns a task, "
            f"got {bounds}"
        )
    task = _task_of_rows(offsets, len(target))
    limit = (class_offsets[1:] - class_offsets[:-1])[task]
    wrong = ((target < 0) | (target >= limit)) & ~regression[task]
    if wrong.any():
        row = int(wrong.nonzero()[0])
        t = int(task[row])
        raise ValueError(
            f"task_loss: target must be in [0, {classes[t]}) for task {t}, got {int(target[row])} at row {row}"
        )


def _forward_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    offsets: Tensor,
    target: Tensor,
    value: Tensor,
    row_weight: Tensor,
    class_offsets: Tensor,
    regression: Tensor,
    width: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if can_look(offsets):
        _check(offsets, target, class_offsets, regression, len(weight), width)
    N, task = len(offsets) - 1, _task_of_rows(offsets, len(x))
    logits = _logits(x, weight, bias, task, class_offsets, width)  # (R, C)
    number = regression[task]  # (R,) rows of regression tasks
    target = target.masked_fill(number, 0)[:, None]
    row_weight = row_weight.to(logits.dtype)

    log_p = logits.log_softmax(-1)
    loss = -log_p.gather(1, target).squeeze(1)
    gradient = log_p.exp()
    gradient.scatter_add_(1, target, gradient.new_full(target.shape, label_smoothing - 1))
    if label_smoothing:
        inside = logits > float("-inf")
        share = label_smoothing / inside.sum(-1, dtype=logits.dtype)  # (R,)
        loss = (1 - label_smoothing) * loss - share * log_p.where(inside, 0.0).sum(-1)
        gradient -= share[:, None] * inside
    difference = logits[:, 0] - value
    loss = torch.where(number, difference.square(), loss)
    gradient[:, 0] = torch.where(number, 2 * difference, gradient[:, 0])  # its only column

    counted = (row_weight > 0).to(logits.dtype)
    correct = counted * (logits.argmax(-1) == target.squeeze(1)) * ~number
    columns = (row_weight * loss, row_weight, counted, correct)
    sums = LossSums(*(sum_by_task(values, task, N) for values in columns))
    return *sums, gradient * row_weight[:, None]


def _backward_reference(
    dloss: Tensor, gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, class_offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    task = _task_of_rows(offsets, len(x))
    row, place, column, starts = _entries(task, class_offsets, gradient.shape[1])
    dlogits = gradient[row, place] * dloss[task[row]]  # (E,)

    def weighted_sums(table: Tensor, index: Tensor, starts: Tensor, factors: Tensor) -> Tensor:
        table = table.to(gradient.dtype)
        return F.embedding_bag(index, table, starts, per_sample_weights=factors, mode="sum")

    dx = weighted_sums(weight, column, starts, dlogits)  # of the columns of each row
    order = column.argsort(stable=True)
    starts = torch.searchsorted(column[order], torch.arange(len(weight), device=x.device))
    dweight = weighted_sums(x, row[order], starts, dlogits[order])  # of the rows of each column
    dbias = dweight.new_zeros(len(weight)).index_add_(0, column, dlogits)
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(bias.dtype)


def _has_kernel(x: Tensor, width: int) -> bool:
    return x.dtype != torch.float64 and width <= task_loss_triton.WIDEST


def _forward_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    offsets: Tensor,
    target: Tensor,
    value: Tensor,
    row_weight: Tensor,
    class_offsets: Tensor,
    regression: Tensor,
    width: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if can_look(offsets):
        _check(offsets, target, class_offsets, regression, len(weight), width)
    forward = task_loss_triton.forward if _has_kernel(x, width) else _forward_reference
    return forward(
        x, weight, bias, offsets, target, value, row_weight, class_offsets, regression, width, label_smoothing
    )


def _backward_triton(
    dloss: Tensor, gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, class_offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    backward = task_loss_triton.backward if _has_kernel(x, gradient.shape[1]) else _backward_reference
    return backward(dloss, gradient, x, weight, bias, offsets, class_offsets)


def _logits_triton(
    x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, class_offsets: Tensor, width: int
) -> Tensor:
    logits = task_loss_triton.logits if _has_kernel(x, width) else _logits_reference
    return logits(x, weight, bias, offsets, class_offsets, width)


def _logits_fake(x, weight, bias, offsets, class_offsets, width):
    return x.new_empty((len(x), width), dtype=torch.promote_types(x.dtype, torch.float32))


def _forward_fake(x, weight, bias, offsets, target, value, row_weight, class_offsets, regression, width, smoothing):
    gradient = _logits_fake(x, weight, bias, offsets, class_offsets, width)
    return *(gradient.new_empty(len(offsets) - 1) for _ in range(4)), gradient


_forward = register("task_loss_forward", triton=_forward_triton, reference=_forward_reference, fake=_forward_fake)
_backward = register(
    "task_loss_backward",
    triton=_backward_triton,
    reference=_backward_reference,
    fake=lambda dloss, gradient, x, weight, bias, *rest: tuple(t.new_empty(t.shape) for t in (x, weight, bias)),
)
task_logits = register("task_logits", triton=_logits_triton, reference=_logits_reference, fake=_logits_fake)


class _TaskLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, offsets, target, value, row_weight, class_offsets, regression, width, smoothing):
        loss, *sums, gradient = _forward(
            x, weight, bias, offsets, target, value, row_weight, class_offsets, regression, width, smoothing
        )
        ctx.save_for_backward(gradient, x, weight, bias, offsets, class_offsets)
        ctx.mark_non_differentiable(*sums)
        return loss, *sums

    @staticmethod
    def backward(ctx, dloss, *_):
        return *_backward(dloss.contiguous(), *ctx.saved_tensors), *[None] * 8


def task_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    offsets: Tensor,
    target: Tensor,
    value: Tensor,
    row_weight: Tensor,
    class_offsets: Tensor,
    regression: Tensor,
    *,
    width: int,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
) -> LossSums:
    """Loss sums of all classification and regression tasks of a batch.

    Args:
        x: (R, D) hidden states of the labelled rows, sorted by task; float32, float16, bfloat16 or float64.
        weight: (K, D) all heads' classes, one task after the other; the dtype of `x`.
        bias: (K,)
        offsets: (N + 1,) int32; rows of task t are offsets[t] : offsets[t + 1]. A task may have none.
        target: (R,) int64, class inside its task; of no meaning for regression.
        value: (R,) float32, label of regression rows; 0 elsewhere.
        row_weight: (R,) float32, factor of each row's loss.
        class_offsets: (N + 1,) int32, columns of each task in the table.
        regression: (N,) bool; such a task has one column and the squared error.
        width: C, columns of the widest task; known on the host, so that nobody asks the device.
        label_smoothing: share of the probability spread over all classes of the task.
        class_weight: (K,) float32, by which the weight of a row is multiplied according to its target.

    Returns:
        `LossSums`; sums are taken in float32 at least. A task without rows has sums of 0. Gradients flow from `loss` to
        x, weight and bias.

    Raises:
        ValueError: shapes that do not fit one another, targets that are not integers; and, looked at on the CPU and on
            a GPU with TRUNKLINE_CHECK=1, a target outside of its task's classes, and offsets that do not rise from 0
            to R or class_offsets that do not rise from 0 to K.
    """
    (R, D), N = x.shape, len(class_offsets) - 1
    if weight.shape[1] != D or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"task_loss: weight must be (K, {D}) and bias (K,), got {list(weight.shape)} and {list(bias.shape)}"
        )
    for name, rows in (("target", target), ("value", value), ("row_weight", row_weight)):
        if rows.shape != (R,):
            raise ValueError(f"task_loss: {name} must be (R,) = ({R},) to match x, got {list(rows.shape)}")
    if offsets.shape != (N + 1,) or regression.shape != (N,):
        raise ValueError(
            f"task_loss: offsets must be ({N + 1},) and regression ({N},) to match class_offsets of N = {N} tasks, "
            f"got {list(offsets.shape)} and {list(regression.shape)}"
        )
    if target.dtype != torch.int64:
        raise ValueError(f"task_loss: target must be int64 classes, got {target.dtype}; numbers belong into value")
    if class_weight is not None:
        first = class_offsets[:-1].long()[_task_of_rows(offsets, R)]
        row_weight = row_weight * class_weight[first + target]
    return LossSums(
        *_TaskLoss.apply(
            x, weight, bias, offsets, target, value, row_weight, class_offsets, regression, width, label_smoothing
        )
    )


SHAPES: dict[str, dict[str, Any]] = {
    "9 tasks": {"rows": 512, "tasks": 9, "width": 768, "classes": 3},
    "10 tasks": {"rows": 512, "tasks": 10, "width": 768, "classes": 3},
    "1000 tasks": {"rows": 512, "tasks": 1000, "width": 768, "classes": 3},
    "tags": {"rows": 65536, "tasks": 3, "width": 768, "classes": 17},
    "256 classes": {"rows": 512, "tasks": 4, "width": 768, "classes": 256},
}


def example(
    device: torch.device | str,
    dtype: torch.dtype,
    rows: int = 512,
    tasks: int = 9,
    width: int = 768,
    classes: int = 3,
) -> dict[str, Any]:
    """Arguments of `task_loss`: R `rows` spread at random over N `tasks`, D `width`.

    The tasks have in turn `classes`, two, and, as a regression, one column.
    """
    generator = torch.Generator(device).manual_seed(0)
    columns = torch.tensor([(classes, 2, 1)[t % 3] for t in range(tasks)], device=device)
    offsets = random_offsets(rows, tasks, device, generator)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    uniform = torch.rand(rows, generator=generator, device=device)
    K = int(columns.sum())
    return {
        "x": normal(rows, width, dtype=dtype),
        "weight": normal(K, width, dtype=dtype) / width**0.5,
        "bias": normal(K, dtype=dtype),
        "offsets": offsets,
        "target": (uniform * columns[_task_of_rows(offsets, rows)]).long(),
        "value": normal(rows, dtype=torch.float32),
        "row_weight": torch.ones(rows, device=device),
        "class_offsets": F.pad(columns.cumsum(0), (1, 0)).to(torch.int32),
        "regression": columns == 1,
        "width": max(classes, 2),
    }
