"""The losses of all small heads in PyTorch and numpy: the reference that serves where no kernel does, fast on a CPU.

With some hundred rows the arithmetic takes less time than the calls that it is made of: there are as few as can be, and
all that is small is worked out in numpy, whose calls cost a fifth of torch's. The logits of all small tasks are worked
out one by one, as the entries of a sparse matrix; a task with at least LARGE logits, and WIDE classes, has products of
its own, which then take less time.

R rows, D width, N tasks, K columns of the table, C columns of the widest task, E logits of small tasks
"""

from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.kernels.arguments import can_look, check_offsets
from trunkline.kernels.dispatch import versions

LARGE, WIDE = 2500, 8
REGRESSION, SEVERAL = 1, 2  # kinds of tasks; 0: one class a row
MOST_LABELS = 63  # of several: a bit of an int64 each


class _Entries(NamedTuple):
    """The logits of small tasks, int64."""

    starts: Tensor  # (R,) or (K,) first of each row, or of each column
    row: Tensor  # (E,)
    column: Tensor  # (E,) in the table
    place: Tensor  # (E,) in (R, C)


class Layout:
    """Which rows and columns belong together, in numpy."""

    def __init__(self, offsets: Tensor, class_offsets: Tensor, width: int):
        self.device, self.width = offsets.device, width
        self.offsets, self.class_offsets = _numpy(offsets), _numpy(class_offsets)
        self.counts, self.classes = (ends[1:] - ends[:-1] for ends in (self.offsets, self.class_offsets))  # (N,)
        self.is_small = (self.counts * self.classes < LARGE) | (self.classes < WIDE)

    def check(self, rows: int, columns: int, kinds: Tensor) -> None:
        """Raises ValueError for what only the values tell."""
        check_offsets("task_loss", self.offsets, rows)
        fits = (self.classes >= 1) & (self.classes <= self.width)
        if self.class_offsets[0] != 0 or self.class_offsets[-1] != columns or not fits.all():
            raise ValueError(
                f"task_loss: class_offsets must rise from 0 to K = {columns} by 1 to C = {self.width} columns a task, "
                f"got {self.class_offsets.tolist()}"
            )
        wide = (_numpy(kinds) == REGRESSION) & (self.classes != 1)
        if wide.any():
            task = int(wide.argmax())
            raise ValueError(
                f"task_loss: a regression has one column, got {self.classes[task]} in class_offsets for task {task}"
            )
        several = self.classes[_numpy(kinds) == SEVERAL]
        if (several > MOST_LABELS).any():
            raise ValueError(f"task_loss: of several labels a task has at most {MOST_LABELS}, got {several.max()}")

    def check_targets(self, target: Tensor, kinds: Tensor) -> None:
        """Raises ValueError for a class that the row's task does not have."""
        labels, kind, classes = _numpy(target), self.of_row(_numpy(kinds)), self.of_row(self.classes)
        beyond = np.where(kind == SEVERAL, labels >> np.minimum(classes, MOST_LABELS) > 0, labels >= classes)
        wrong = ((labels < 0) | beyond) & (kind != REGRESSION)
        if wrong.any():
            row = int(wrong.argmax())
            task = int(np.searchsorted(self.offsets, row, side="right")) - 1
            below = f"2**{classes[row]}" if kind[row] == SEVERAL else classes[row]
            raise ValueError(
                f"task_loss: target must be in [0, {below}) for task {task}, got {labels[row]} at row {row}"
            )

    def of_row(self, of_task: np.ndarray) -> np.ndarray:
        """(N,) -> (R,)"""
        return of_task.repeat(self.counts)

    def tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    @cached_property
    def task(self) -> Tensor:
        """(R,) int64"""
        return self.tensor(self.of_row(np.arange(len(self.counts))))

    def sums(self, *values: np.ndarray) -> np.ndarray:
        """n times (R,) -> (n, N) float64"""
        task, N = _numpy(self.task), len(self.counts)
        return np.array([np.bincount(task, of_row, N) for of_row in values])

    @cached_property
    def by_row(self) -> _Entries:
        """Row after row, the columns of its task if that is small."""
        starts, row, inside = _ranges(self.of_row(self.classes * self.is_small))
        column = self.of_row(self.class_offsets[:-1])[row] + inside
        return self._entries(starts, row, column, row * self.width + inside)

    @cached_property
    def by_column(self) -> _Entries:
        """Column after column, the rows of its task if that is small."""
        starts, column, inside = _ranges((self.counts * self.is_small).repeat(self.classes))
        row = self.offsets[:-1].repeat(self.classes)[column] + inside
        first = self.class_offsets[:-1].repeat(self.classes)  # (K,) column of the same task
        return self._entries(starts, row, column, row * self.width + column - first[column])

    def large(self) -> Iterator[tuple[slice, slice, slice]]:
        """Of every other task: its rows, its columns of the table, and those of (R, C)."""
        for t in (~self.is_small).nonzero()[0]:
            rows, columns = (slice(*bounds[t : t + 2].tolist()) for bounds in (self.offsets, self.class_offsets))
            yield rows, columns, slice(int(self.classes[t]))

    def _entries(self, *arrays: np.ndarray) -> _Entries:
        return _Entries(*map(self.tensor, arrays))


def _ranges(count: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """count[i] numbers from 0 for every i, one after the other: where those of each i begin; i and number of each."""
    ends = count.cumsum(dtype=np.int64)
    starts, owner = ends - count, np.arange(len(count)).repeat(count)
    return starts, owner, np.arange(len(owner)) - starts[owner]


@lru_cache(maxsize=1)  # backward asks for what forward did
def _kept(offsets: Tensor, class_offsets: Tensor, versions: tuple[int, ...], width: int) -> Layout:
    return Layout(offsets, class_offsets, width)


def _layout(offsets: Tensor, class_offsets: Tensor, width: int) -> Layout:
    return _kept(offsets, class_offsets, versions(offsets, class_offsets), width)


def logits(x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, class_offsets: Tensor, width: int) -> Tensor:
    return _logits(x, weight, bias, _layout(offsets, class_offsets, width)).to(x.device)


def _logits(x: Tensor, weight: Tensor, bias: Tensor, layout: Layout) -> Tensor:
    """(R, C) in the host's memory, -inf beyond the last class"""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, weight, bias = (tensor.to(dtype) for tensor in (x, weight, bias))
    starts, row, column, place = layout.by_row
    # the derivative of a bag's sum by its factors: x[row] . weight[column] without a copy of either
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(x, weight, column, starts, row, mode=0)
    logits = torch.full((len(x), layout.width), float("-inf"), dtype=dtype)
    # not an array of the bias itself: FSDP2 lets go of a parameter's memory, which it cannot once NumPy has it
    _numpy(logits).reshape(-1)[_numpy(place)] = _numpy(products) + _numpy(bias[column])
    for rows, columns, classes in layout.large():
        logits[rows, classes] = F.linear(x[rows], weight[columns], bias[columns])
    return logits


def _numpy(x: Tensor) -> np.ndarray:
    """The values in the host's memory; not a copy if they are there."""
    return x.detach().cpu().numpy()


def check(
    x: Tensor, weight: Tensor, offsets: Tensor, target: Tensor, class_offsets: Tensor, kinds: Tensor, width: int
) -> None:
    """Raises ValueError for what only the values tell, where they may be looked at."""
    if can_look(offsets):
        layout = _layout(offsets, class_offsets, width)
        layout.check(len(x), len(weight), kinds)
        layout.check_targets(target, kinds)


@np.errstate(all="ignore")  # what is not finite is for the caller to find
def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    offsets: Tensor,
    target: Tensor,
    value: Tensor,
    row_weight: Tensor,
    class_offsets: Tensor,
    kinds: Tensor,
    width: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    check(x, weight, offsets, target, class_offsets, kinds, width)
    layout = _layout(offsets, class_offsets, width)
    logits = _logits(x, weight, bias, layout)  # (R, C)
    logarithms = logits.log_softmax(-1)
    z, log_p, p, best = map(_numpy, (logits, logarithms, logarithms.exp(), logits.argmax(-1)))
    kind = layout.of_row(_numpy(kinds))  # (R,)
    number = kind == REGRESSION
    row, y = np.arange(len(z)), np.where(kind > 0, 0, _numpy(target))
    v, w = (_numpy(tensor.to(logits.dtype)) for tensor in (value, row_weight))
    counted = w > 0

    loss, gradient = -log_p[row, y], p
    gradient[row, y] += label_smoothing - 1
    if label_smoothing:
        inside = z > -np.inf
        share = label_smoothing / inside.sum(-1, dtype=z.dtype)  # (R,)
        loss = (1 - label_smoothing) * loss - share * log_p.sum(-1, where=inside)
        gradient -= share[:, None] * inside
    # a number has one column, whose cross-entropy is 0 with a gradient of 0
    difference = np.where(number, z[:, 0] - v, 0)
    loss += difference * difference
    gradient[:, 0] += 2 * difference
    correct = (best == y) & ~number
    own = (kind == SEVERAL).nonzero()[0]
    if len(own):
        classes = layout.of_row(layout.classes)[own]
        loss[own], gradient[own], correct[own] = _several(z[own], _numpy(target)[own], classes, label_smoothing)
    gradient *= w[:, None]
    sums = layout.sums(w * loss, w, counted, correct & counted)
    return layout.tensor(sums).to(logits.dtype), layout.tensor(gradient)


def _several(
    z: np.ndarray, target: np.ndarray, classes: np.ndarray, smoothing: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss (r,), gradient (r, C) and correctness (r,) of rows with several labels, from logits (r, C)."""
    place, count = np.arange(z.shape[1]), classes[:, None].astype(z.dtype)
    inside = place < classes[:, None]
    holds = (target[:, None] >> np.minimum(place, MOST_LABELS - 1) & 1).astype(bool)
    z = np.where(inside, z, 0)
    wrong = np.where(holds, -z, z)  # how far on the wrong side
    # log(1 + exp(wrong)); s / 2 of the target stands on the other side, where the loss is less by `wrong`
    loss = np.where(inside, np.logaddexp(0, wrong) - smoothing / 2 * wrong, 0)
    slope = np.exp(-np.logaddexp(0, -wrong)) - smoothing / 2  # sigmoid(wrong), and not what is left of a rounded 1 - p
    gradient = np.where(inside, np.where(holds, -slope, slope), 0)
    return (loss / count).sum(-1), gradient / count, (((z > 0) == holds) | ~inside).all(-1)


@np.errstate(all="ignore")
def backward(
    dloss: Tensor, gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, class_offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    layout = _layout(offsets, class_offsets, gradient.shape[1])
    dtypes = x.dtype, weight.dtype, bias.dtype
    x, weight = x.to(gradient.dtype), weight.to(gradient.dtype)
    dlogits = _numpy(gradient) * layout.of_row(_numpy(dloss))[:, None]  # (R, C)

    def weighted_sums(table: Tensor, starts: Tensor, index: Tensor, factors: np.ndarray) -> Tensor:
        return F.embedding_bag(index, table, starts, per_sample_weights=layout.tensor(factors), mode="sum")

    starts, row, column, place = layout.by_row
    dx = weighted_sums(weight, starts, column, dlogits.reshape(-1)[_numpy(place)])
    starts, row, column, place = layout.by_column
    factors = dlogits.reshape(-1)[_numpy(place)]
    dweight = weighted_sums(x, starts, row, factors)
    counts = np.bincount(_numpy(column), factors, len(bias))
    dbias = layout.tensor(counts.astype(np.float64))  # which, where there is nothing to count, are whole numbers
    for rows, columns, classes in layout.large():
        of_task = layout.tensor(dlogits[rows, classes])
        torch.mm(of_task, weight[columns], out=dx[rows])
        torch.mm(of_task.T, x[rows], out=dweight[columns])
        dbias[columns] = of_task.sum(0)
    dx, dweight, dbias = (total.to(dtype) for total, dtype in zip((dx, dweight, dbias), dtypes, strict=True))
    return dx, dweight, dbias
