"""Linear layers: the projection of every task, and every task's gradient of a shared layer."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from trunkline.kernels.tasks import task_projection_triton
from trunkline.kernels.tasks.task_gram import task_gradients, task_gradients_reference
from trunkline.kernels.tasks.task_projection import task_projection, task_projection_reference
from virtual_gpu.case import Case, bounds, normal, placed

COUNTS = [5, 0, 129, 1, 0, 64, 63, 65, 3]


def projection(
    name: str,
    counts: list[int],
    width: int,
    out: int,
    activation: str = "gelu",
    *,
    dtype: torch.dtype,
    patches: tuple = (),
    layout: Callable[[Tensor], Tensor] = lambda x: x,
) -> Case:
    N, R = len(counts), sum(counts)
    x, weight, bias = normal(R, width), normal(N, width, out, seed=1) / width**0.5, normal(N, out, seed=2)
    inputs = (*(layout(t.to(dtype)) for t in (x, weight, bias)), bounds(counts), activation)
    return Case("task_projection", name, task_projection, task_projection_reference, inputs, patches=patches)


# every product in large tiles, whatever its size
LARGE_TILES = (task_projection_triton, "_is_large", lambda *sizes: True)


def projections(dtype: torch.dtype) -> Iterator[Case]:
    run = partial(projection, dtype=dtype)
    yield run("ragged", COUNTS, 160, 144)
    yield run("no rows", [0] * 9, 160, 144)
    yield run("many rows of one task", [0, 1100, 600, 2, 0, 0, 513, 1, 0], 32, 48)
    yield run("ragged, large tiles", COUNTS, 160, 144, patches=(LARGE_TILES,))
    for activation in ("none", "relu", "tanh"):
        yield run(activation, COUNTS, 160, 144, activation)
    yield run("odd widths", COUNTS, 24, 13)
    yield run("one column", [5, 0, 70], 33, 1, "none")
    yield run("one task", [77], 48, 48, "tanh")
    yield run("transposed weight", COUNTS, 48, 32, "relu", layout=lambda x: x.mT.contiguous().mT if x.ndim > 2 else x)
    yield run(f"{dtype.itemsize} bytes off", COUNTS, 48, 32, "relu", layout=partial(placed, bytes_off=dtype.itemsize))
    yield run("1500 tasks", [3, 0, 1, 70] + [0, 1] * 748, 32, 16, "none")


def gradients(dtype: torch.dtype) -> Iterator[Case]:
    for name, counts, D, C, off in (
        ("ragged", [5, 0, 129, 1, 64, 0, 63, 3, 65], 160, 144, 0),
        ("no tokens", [0, 0, 0], 160, 144, 0),
        ("odd widths", [5, 0, 70], 33, 7, 0),
        ("one task", [70], 48, 48, 0),
        (f"{dtype.itemsize} bytes off", [5, 0, 70], 48, 48, dtype.itemsize),
    ):
        rows, offsets = sum(counts) + 2, bounds(counts)  # two of no task
        inputs = tuple(placed(t.to(dtype), off) for t in (normal(rows, D), normal(rows, C, seed=1)))
        op, definition = partial(_gradients, offsets=offsets), partial(_definition, offsets=offsets)
        yield Case("task_gradients", name, op, definition, inputs, constant=(0, 1))


def _gradients(x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    return task_gradients(x, dy, offsets)


def _definition(x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    """The products of torch in the inputs' dtype, widened at last."""
    if x.dtype == torch.float64:
        return task_gradients_reference(x, dy, offsets)
    ends = offsets.tolist()
    return torch.stack([(dy[a:b].T @ x[a:b]).float() for a, b in zip(ends[:-1], ends[1:], strict=True)])
