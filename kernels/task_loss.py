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

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
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
    rows, columns, losses = offsets.diff().tolist(), class_offsets.diff().tolist(), []
    of_rows = (tensor.split(rows) for tensor in (x, target, value, row_weight))
    of_columns = (tensor.split(columns) for tensor in (weight, bias))
    for x, y, v, row_w, w, b, is_number in zip(*of_rows, *of_columns, regression.tolist(), strict=True):
        logits = F.linear(x, w, b)
        if is_number:
            loss = (logits[:, 0] - v.to(logits.dtype)).square()
        else:
            loss = F.cross_entropy(logits, y, reduction="none", label_smoothing=label_smoothing)
        losses.append((loss * row_w.to(loss.dtype)).sum())
    return torch.stack(losses)


def sum_by_task(values: Tensor, task: Tensor, num_tasks: int) -> Tensor:
    """(R,) -> (N,)"""
    return values.new_zeros(num_tasks).index_add_(0, task, values)


def _task_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """(R,) int64"""
    tasks = torch.arange(len(offsets) - 1, device=offsets.device)
    return tasks.repeat_interleave(offsets[1:] - offsets[:-1], output_size=rows)


# The reference. With some hundred rows the arithmetic takes less time than the calls that it is made of: there are as
# few as can be, and indices are worked out in numpy, whose calls cost a fifth of torch's. A task with at least so many
# logits, and classes, has products of its own, which then take less time than its logits one by one.
LARGE, WIDE = 2500, 8


class _Entries(NamedTuple):
    """The logits that exist, E of them, int64."""

    starts: Tensor  # (R,) or (K,) first of each row, or of each column
    row: Tensor  # (E,)
    column: Tensor  # (E,) in the table
    place: Tensor  # (E,) in (R, C)


class _Layout:
    """Which rows and columns belong together, in numpy."""

    def __init__(self, offsets: Tensor, class_offsets: Tensor):
        self.device = offsets.device
        self.offsets, self.class_offsets = offsets.cpu().numpy(), class_offsets.cpu().numpy()
        self.counts, self.classes = np.diff(self.offsets), np.diff(self.class_offsets)  # (N,)
        self.is_small = (self.counts * self.classes < LARGE) | (self.classes < WIDE)

    def check(self, rows: int, columns: int, width: int) -> None:
        """Raises ValueError for what only the values tell."""
        check_offsets("task_loss", self.offsets, rows)
        least, most = self.classes.min(), self.classes.max()
        if self.class_offsets[0] != 0 or self.class_offsets[-1] != columns or least < 1 or most > width:
            raise ValueError(
                f"task_loss: class_offsets must rise from 0 to K = {columns} by 1 to C = {width} columns a task, "
                f"got {self.class_offsets.tolist()}"
            )

    def check_targets(self, target: Tensor, regression: Tensor) -> None:
        """Raises ValueError for a class that the row's task does not have."""
        labels, classes = target.cpu().numpy(), self.of_row(np.where(regression.cpu().numpy(), 0, self.classes))
        wrong = ((labels < 0) | (labels >= classes)) & (classes > 0)
        if wrong.any():
            row = int(wrong.argmax())
            task = int(np.searchsorted(self.offsets, row, side="right")) - 1
            raise ValueError(
                f"task_loss: target must be in [0, {classes[row]}) for task {task}, got {labels[row]} at row {row}"
            )

    def of_row(self, of_task: np.ndarray) -> np.ndarray:
        """(N,) -> (R,)"""
        return of_task.repeat(self.counts)

    def by_row(self, width: int) -> _Entries:
        """Row after row, the columns of its task if that is small."""
        count = self.of_row(self.classes * self.is_small)
        starts, row, column = _ranges(self.of_row(self.class_offsets[:-1]), count)
        return self._entries(starts, row, column, width)

    def by_column(self, width: int) -> _Entries:
        """Column after column, the rows of its task if that is small."""
        count = (self.counts * self.is_small).repeat(self.classes)
        starts, column, row = _ranges(self.offsets[:-1].repeat(self.classes), count)
        return self._entries(starts, row, column, width)

    def large(self) -> Iterator[tuple[slice, slice, slice]]:
        """Of every other task: its rows, its columns of the table, and those of (R, C)."""
        for t in np.flatnonzero(~self.is_small):
            rows, columns = (slice(*bounds[t : t + 2].tolist()) for bounds in (self.offsets, self.class_offsets))
            yield rows, columns, slice(int(self.classes[t]))

    def _entries(self, starts: np.ndarray, row: np.ndarray, column: np.ndarray, width: int) -> _Entries:
        place = row * width + column - self.of_row(self.class_offsets[:-1])[row]
        return _Entries(*(torch.as_tensor(array, device=self.device) for array in (starts, row, column, place)))


def _ranges(first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """first[i] : first[i] + count[i] for every i, one after the other: where each begins; i and the number itself."""
    ends = count.cumsum(dtype=np.int64)
    starts, owner = ends - count, np.arange(len(count)).repeat(count)
    return starts, owner, np.arange(len(owner)) + (first - starts)[owner]


def _logits_reference(
    x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, class_offsets: Tensor, width: int
) -> Tensor:
    return _logits(x, weight, bias, _Layout(offsets, class_offsets), width)


def _logits(x: Tensor, weight: Tensor, bias: Tensor, layout: _Layout, width: int) -> Tensor:
    """(R, C), -inf beyond the last class"""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, weight, bias = (tensor.to(dtype) for tensor in (x, weight, bias))
    starts, row, column, place = layout.by_row(width)
    # the derivative of a bag's sum by its factors: x[row] . weight[column] without a copy of either
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(x, weight, column, starts, row, mode=0)
    logits = x.new_full((len(x), width), float("-inf"))
    logits.view(-1).index_copy_(0, place, products.add_(bias.index_select(0, column)))
    for rows, columns, classes in layout.large():
        logits[rows, classes] = F.linear(x[rows], weight[columns], bias[columns])
    return logits


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
) -> tuple[Tensor, Tensor]:
    N, layout = len(offsets) - 1, _Layout(offsets, class_offsets)
    if can_look(offsets):
        layout.check(len(x), len(weight), width)
        layout.check_targets(target, regression)
    task = torch.as_tensor(layout.of_row(np.arange(N)), device=x.device)
    number = regression.index_select(0, task)  # (R,) rows of regression tasks
    target = target.masked_fill(number, 0)
    logits = _logits(x, weight, bias, layout, width)  # (R, C)
    row_weight = row_weight.to(logits.dtype)
    counted = row_weight > 0
    correct = (logits.argmax(-1) == target) & (counted > number)  # true > false

    log_p = logits.log_softmax(-1)
    loss = F.nll_loss(log_p, target, reduction="none")
    gradient = log_p.exp().scatter_(1, target[:, None], label_smoothing - 1, reduce="add")
    if label_smoothing:
        inside = logits > float("-inf")
        share = label_smoothing / inside.sum(-1, dtype=logits.dtype)  # (R,)
        loss = (1 - label_smoothing) * loss - share * log_p.where(inside, 0.0).sum(-1)
        gradient -= share[:, None] * inside
    # a number has one column, whose cross-entropy is 0 with a gradient of 0
    difference = (logits[:, 0] - value).where(number, 0.0)
    loss.addcmul_(difference, difference)
    gradient.select(1, 0).add_(difference, alpha=2)

    sums = logits.new_zeros(4, N)
    for total, values in zip(sums, (row_weight * loss, row_weight, counted, correct), strict=True):
        total.index_add_(0, task, values.to(total.dtype))
    return sums, gradient.mul_(row_weight[:, None])


def _backward_reference(
    dloss: Tensor, gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, class_offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtypes, C, layout = (x.dtype, weight.dtype, bias.dtype), gradient.shape[1], _Layout(offsets, class_offsets)
    x, weight = x.to(gradient.dtype), weight.to(gradient.dtype)
    task = torch.as_tensor(layout.of_row(np.arange(len(dloss))), device=x.device)
    dlogits = gradient * dloss.index_select(0, task)[:, None]  # (R, C)

    def weighted_sums(table: Tensor, starts: Tensor, index: Tensor, factors: Tensor) -> Tensor:
        return F.embedding_bag(index, table, starts, per_sample_weights=factors, mode="sum")

    starts, row, column, place = layout.by_row(C)
    dx = weighted_sums(weight, starts, column, dlogits.view(-1).index_select(0, place))
    starts, row, column, place = layout.by_column(C)
    factors = dlogits.view(-1).index_select(0, place)
    dweight = weighted_sums(x, starts, row, factors)
    dbias = factors.new_zeros(len(bias)).index_add_(0, column, factors)
    for rows, columns, classes in layout.large():
        of_task = dlogits[rows, classes]
        torch.mm(of_task, weight[columns], out=dx[rows])
        torch.mm(of_task.T, x[rows], out=dweight[columns])
        torch.sum(of_task, 0, out=dbias[columns])
    dx, dweight, dbias = (total.to(dtype) for total, dtype in zip((dx, dweight, dbias), dtypes, strict=True))
    return dx, dweight, dbias


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
) -> tuple[Tensor, Tensor]:
    inputs = (x, weight, bias, offsets, target, value, row_weight, class_offsets, regression, width, label_smoothing)
    if not _has_kernel(x, width):
        return _forward_reference(*inputs)
    if can_look(offsets):
        layout = _Layout(offsets, class_offsets)
        layout.check(len(x), len(weight), width)
        layout.check_targets(target, regression)
    return task_loss_triton.forward(*inputs)


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
    return gradient.new_empty(4, len(offsets) - 1), gradient


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
        sums, gradient = _forward(
            x, weight, bias, offsets, target, value, row_weight, class_offsets, regression, width, smoothing
        )
        ctx.save_for_backward(gradient, x, weight, bias, offsets, class_offsets)
        loss, *others = sums.unbind()
        ctx.mark_non_differentiable(*others)
        return loss, *others

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
    loss, *others = _TaskLoss.apply(
        x, weight, bias, offsets, target, value, row_weight, class_offsets, regression, width, label_smoothing
    )
    # compiled by torch 2.11, a view that was marked as not differentiable has a gradient all the same
    return LossSums(loss, *(total.detach() for total in others))


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
