"""Losses of all small heads together: classification and regression rows of any mix of tasks in one call.

The heads lie side by side in one table: task t owns the columns class_offsets[t] : class_offsets[t + 1]. For row r of
task t, with logits z over the columns of t and n of them:
    classification  l_r = (1 - s) * -log softmax(z)[y] + s * mean_c -log softmax(z)[c],  s the label smoothing
    regression      l_r = (z - v)^2
    several labels  l_r = mean_c -(t_c log sigmoid(z_c) + (1 - t_c) log sigmoid(-z_c)),  t_c = (1 - s) y_c + s / 2
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

from trunkline.kernels.arguments import check_tensors
from trunkline.kernels.dispatch import register
from trunkline.kernels.once_differentiable import once_differentiable
from trunkline.kernels.tasks import task_loss_torch, task_loss_triton
from trunkline.kernels.tasks.task_loss_torch import REGRESSION, SEVERAL
from trunkline.kernels.tasks.task_tiles import random_offsets


class LossSums(NamedTuple):
    """Per task: sums over its rows. Only `loss` carries gradients."""

    loss: Tensor  # (N,) sum of weight * loss, float32
    weight: Tensor  # (N,) sum of weights, float32
    count: Tensor  # type: ignore[assignment]  # hides tuple.count; (N,) rows with weight > 0, float32
    correct: Tensor  # (N,) of those, rows whose highest logit is the target, or whose labels all are; 0 for regression


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
    several: Tensor | None = None,
) -> LossSums:
    """The definition: one task after the other."""
    rows, columns, sums = offsets.diff().tolist(), class_offsets.diff().tolist(), []
    of_rows = (tensor.split(rows) for tensor in (x, target, value, row_weight))
    of_columns = (tensor.split(columns) for tensor in (weight, bias))
    kinds = _kinds(regression, several).tolist()
    for x, y, v, row_w, w, b, kind in zip(*of_rows, *of_columns, kinds, strict=True):
        logits, counted = F.linear(x, w, b), row_w > 0
        if kind == REGRESSION:
            loss, correct = (logits[:, 0] - v.to(logits.dtype)).square(), torch.zeros_like(counted)
        elif kind == SEVERAL:
            holds = (y[:, None] >> torch.arange(logits.shape[1], device=y.device)) & 1  # (rows, columns)
            aimed = holds * (1 - label_smoothing) + label_smoothing / 2
            loss = F.binary_cross_entropy_with_logits(logits, aimed.to(logits.dtype), reduction="none").mean(1)
            correct = ((logits > 0) == holds).all(1) & counted
        else:
            loss = F.cross_entropy(logits, y, reduction="none", label_smoothing=label_smoothing)
            correct = (logits.argmax(-1) == y) & counted
        sums.append(((loss * row_w.to(loss.dtype)).sum(), row_w.sum(), counted.sum(), correct.sum()))
    loss, *others = map(torch.stack, zip(*sums, strict=True))
    return LossSums(loss, *(total.to(torch.promote_types(loss.dtype, torch.float32)) for total in others))


def _kinds(regression: Tensor, several: Tensor | None) -> Tensor:
    """(N,) uint8: 0 of a task with one class a row, REGRESSION, SEVERAL"""
    kinds = regression.view(torch.uint8)
    return kinds if several is None else torch.where(several, SEVERAL, kinds)


def sum_by_task(values: Tensor, task: Tensor, num_tasks: int) -> Tensor:
    """(R,) -> (N,)"""
    return values.new_zeros(num_tasks).index_add_(0, task, values)


def _task_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """(R,) int64; some task also where the offsets are wrong."""
    tasks = torch.bucketize(torch.arange(rows, device=offsets.device), offsets[1:].contiguous(), right=True)
    return tasks.clamp(max=len(offsets) - 2)


def _has_kernel(x: Tensor, width: int) -> bool:
    return x.dtype != torch.float64 and width <= task_loss_triton.WIDEST


# the ops' schemas are those of the references


def _forward_triton(x, weight, bias, offsets, target, value, row_weight, class_offsets, kinds, width, smoothing):
    inputs = (x, weight, bias, offsets, target, value, row_weight, class_offsets, kinds, width, smoothing)
    if not _has_kernel(x, width):
        return task_loss_torch.forward(*inputs)
    task_loss_torch.check(x, weight, offsets, target, class_offsets, kinds, width)
    return task_loss_triton.forward(*inputs)


def _backward_triton(dloss, gradient, x, *others):
    backward = task_loss_triton.backward if _has_kernel(x, gradient.shape[1]) else task_loss_torch.backward
    return backward(dloss, gradient, x, *others)


def _logits_triton(x, weight, bias, offsets, class_offsets, width):
    logits = task_loss_triton.logits if _has_kernel(x, width) else task_loss_torch.logits
    return logits(x, weight, bias, offsets, class_offsets, width)


def _logits_fake(x, weight, bias, offsets, class_offsets, width):
    return x.new_empty((len(x), width), dtype=torch.promote_types(x.dtype, torch.float32))


def _forward_fake(x, weight, bias, offsets, target, value, row_weight, class_offsets, kinds, width, smoothing):
    gradient = _logits_fake(x, weight, bias, offsets, class_offsets, width)
    return gradient.new_empty(4, len(offsets) - 1), gradient


_forward = register("task_loss_forward", triton=_forward_triton, reference=task_loss_torch.forward, fake=_forward_fake)
_backward = register(
    "task_loss_backward",
    triton=_backward_triton,
    reference=task_loss_torch.backward,
    fake=lambda dloss, gradient, x, weight, bias, *rest: tuple(t.new_empty(t.shape) for t in (x, weight, bias)),
)
task_logits = register("task_logits", triton=_logits_triton, reference=task_loss_torch.logits, fake=_logits_fake)


class _TaskLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, offsets, target, value, row_weight, class_offsets, kinds, width, smoothing):
        sums, gradient = _forward(
            x, weight, bias, offsets, target, value, row_weight, class_offsets, kinds, width, smoothing
        )
        ctx.save_for_backward(gradient, x, weight, bias, offsets, class_offsets)
        ctx.set_materialize_grads(False)
        return sums.unbind()

    @staticmethod
    @once_differentiable("task_loss")
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None,) * 11
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
    several: Tensor | None = None,
) -> LossSums:
    """Loss sums of all classification and regression tasks of a batch.

    Args:
        x: (R, D) hidden states of the labelled rows, sorted by task; float32, float16, bfloat16 or float64.
        weight: (K, D) all heads' classes, one task after the other; the dtype of `x`.
        bias: (K,)
        offsets: (N + 1,) int32; rows of task t are offsets[t] : offsets[t + 1]. A task may have none.
        target: (R,) int64, class inside its task; of several labels bit c says whether label c holds; of no meaning for
            regression.
        value: (R,) float32, label of regression rows; 0 elsewhere.
        row_weight: (R,) float32, factor of each row's loss.
        class_offsets: (N + 1,) int32, columns of each task in the table.
        regression: (N,) bool; such a task has one column and the squared error.
        width: C, columns of the widest task; known on the host, so that nobody asks the device.
        label_smoothing: share of the probability spread over all classes of the task.
        class_weight: (K,) float32, by which the weight of a row is multiplied according to its target; the rows of a
            regression all have its one column, and those of several labels their first.
        several: (N,) bool; such a task has a label in each of its columns, at most 63, any number of which hold; None:
            no task has.

    Returns:
        `LossSums`; sums are taken in float32 at least. A task without rows has sums of 0. Gradients flow from `loss` to
        x, weight and bias.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit one another, targets that are not integers; and, looked at
            on the CPU and on a GPU with TRUNKLINE_CHECK=1, a target outside of its task's classes, a regression of
            several columns, and offsets that do
            not rise from 0 to R or class_offsets that do not rise from 0 to K.
    """
    check_tensors(
        "task_loss",
        {"x": x, "weight": weight, "bias": bias},
        integers={"offsets": offsets, "class_offsets": class_offsets},
        others={"target": target, "value": value, "row_weight": row_weight, "regression": regression},
        optional={"class_weight": class_weight, "several": several},
    )
    if x.ndim != 2 or class_offsets.ndim != 1 or len(class_offsets) < 2:
        raise ValueError(
            "task_loss: x must be (R, D) and class_offsets (N + 1,) of at least one task, "
            f"got {list(x.shape)} and {list(class_offsets.shape)}"
        )
    (R, D), N = x.shape, len(class_offsets) - 1
    if weight.ndim != 2 or weight.shape[1] != D or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"task_loss: weight must be (K, {D}) and bias (K,), got {list(weight.shape)} and {list(bias.shape)}"
        )
    if len(weight) < N:
        raise ValueError(f"task_loss: every one of N = {N} tasks must have a column, got K = {len(weight)}")
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
    if regression.dtype != torch.bool:
        raise ValueError(f"task_loss: regression must be bool, got {regression.dtype}")
    if several is not None and (several.dtype != torch.bool or several.shape != (N,)):
        raise ValueError(f"task_loss: several must be bool ({N},), got {several.dtype} {list(several.shape)}")
    if width < 1:
        raise ValueError(f"task_loss: width must be the columns of the widest task, at least 1, got {width}")
    if class_weight is not None and class_weight.shape != bias.shape:
        raise ValueError(f"task_loss: class_weight must be (K,) = ({len(bias)},), got {list(class_weight.shape)}")
    kinds = _kinds(regression, several)
    if class_weight is not None:
        task = _task_of_rows(offsets, R)
        column = class_offsets[task] + target.masked_fill(kinds[task] > 0, 0)
        row_weight = row_weight * class_weight[column.clamp(0, len(class_weight) - 1)]  # what is outside is named below
    loss, *others = _TaskLoss.apply(
        x, weight, bias, offsets, target, value, row_weight, class_offsets, kinds, width, label_smoothing
    )
    # detached here: marked inside as not differentiable, compiled by torch 2.11, a view has a gradient all the same
    return LossSums(loss, *(total.detach() for total in others))


SHAPES: dict[str, dict[str, Any]] = {
    "9 tasks": {"rows": 512, "tasks": 9, "width": 768, "classes": 3},
    "10 tasks": {"rows": 512, "tasks": 10, "width": 768, "classes": 3},
    "1000 tasks": {"rows": 512, "tasks": 1000, "width": 768, "classes": 3},
    "tags": {"rows": 65536, "tasks": 3, "width": 768, "classes": 17},
    "256 classes": {"rows": 512, "tasks": 4, "width": 768, "classes": 256},
    "several labels": {"rows": 512, "tasks": 9, "width": 768, "classes": 28, "several": True},
}


def example(
    device: torch.device | str,
    dtype: torch.dtype,
    rows: int = 512,
    tasks: int = 9,
    width: int = 768,
    classes: int = 3,
    several: bool = False,
) -> dict[str, Any]:
    """Arguments of `task_loss`: R `rows` spread at random over N `tasks`, D `width`.

    The tasks have in turn `classes`, two, and, as a regression, one column; with `several`, any number of the `classes`
    and of the two hold at once.
    """
    generator = torch.Generator(device).manual_seed(0)
    columns = torch.tensor([(classes, 2, 1)[t % 3] for t in range(tasks)], device=device)
    offsets = random_offsets(rows, tasks, device, generator)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    uniform = torch.rand(rows, generator=generator, device=device)
    K = int(columns.sum())
    alternatives = 2 ** columns.clamp(max=62) if several else columns
    return {
        "x": normal(rows, width, dtype=dtype),
        "weight": normal(K, width, dtype=dtype) / width**0.5,
        "bias": normal(K, dtype=dtype),
        "offsets": offsets,
        "target": (uniform * alternatives[_task_of_rows(offsets, rows)]).long(),
        "value": normal(rows, dtype=torch.float32),
        "row_weight": torch.ones(rows, device=device),
        "class_offsets": F.pad(columns.cumsum(0), (1, 0)).to(torch.int32),
        "regression": columns == 1,
        "width": max(classes, 2),
        **({"several": columns > 1} if several else {}),
    }
