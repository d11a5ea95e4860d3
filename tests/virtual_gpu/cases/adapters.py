"""Low-rank adapters of a linear layer, and of several in one."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from trunkline.kernels.adapters.low_rank import low_rank, low_rank_reference
from virtual_gpu.case import Case, bounds, normal, placed
from virtual_gpu.cases.linear_layers import COUNTS, LARGE_TILES

QKV = [0, 96, 96, 128, 144, 160]  # queries, keys and, behind columns that have no adapter, values


def adapters(
    name: str,
    counts: list[int],
    width: int,
    parts: list[int],
    rank: int,
    *,
    dtype: torch.dtype,
    columns: int = 0,
    patches: tuple = (),
    layout: Callable[[Tensor], Tensor] = lambda x: x,
) -> Case:
    """`columns` of the output; 0: as many as the parts have."""
    T, R, P, C = len(counts), sum(counts), len(parts) // 2, columns or parts[-1]
    W = sum(parts[1::2]) - sum(parts[::2])
    tensors = (
        normal(R, C),
        normal(R, width, seed=1),
        normal(T, width, P * rank, seed=2) / width**0.5,
        normal(T, rank, W, seed=3) / rank**0.5,
    )
    inputs = (*(layout(t.to(dtype)) for t in tensors), bounds(counts), parts, 0.5)
    return Case("low_rank", name, low_rank, low_rank_reference, inputs, patches=patches)


def cases(dtype: torch.dtype) -> Iterator[Case]:
    run = partial(adapters, dtype=dtype)
    yield run("ragged", COUNTS, 160, [0, 144], 16)
    yield run("ragged, parts", COUNTS, 160, QKV, 16, columns=176)
    yield run("no rows", [0] * 9, 160, QKV, 16)
    yield run("one row", [0, 1, 0], 160, QKV, 16)
    yield run("many rows of one adapter", [0, 1100, 600, 2, 0, 0, 513, 1, 0], 32, [0, 48], 16)
    yield run("rank 4", COUNTS, 48, [0, 32, 32, 48], 4)
    yield run("rank 64, parts", COUNTS, 48, [0, 32, 32, 48], 64)
    yield run("rank 64 of a wide layer", COUNTS, 800, QKV, 64)  # h has 192 columns, one tile
    yield run("rank 32 of a wide layer", COUNTS, 528, QKV, 32)
    yield run("rank 144", COUNTS, 48, [0, 32, 32, 48], 144)
    yield run("rank 128", COUNTS, 48, [0, 48], 128)
    yield run("rank 128, large tiles", COUNTS, 160, [0, 144], 128, patches=(LARGE_TILES,))
    yield run("odd widths", COUNTS, 33, [0, 13, 14, 21], 5, columns=23)
    yield run("one adapter", [77], 48, [0, 48], 16)
    off = partial(placed, bytes_off=dtype.itemsize)
    yield run(f"{dtype.itemsize} bytes off", [5, 0, 70], 48, [0, 32, 32, 48], 16, layout=off)
    yield run("1500 adapters", [3, 0, 1, 70] + [0, 1] * 748, 32, [0, 16], 16)
