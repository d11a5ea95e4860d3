"""Losses: of all small heads in one call, their logits, and of vocabularies."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.kernels.tasks.task_loss import task_logits, task_loss, task_loss_reference
from trunkline.kernels.vocabulary import chunks as vocabulary_chunks
from trunkline.kernels.vocabulary.linear_cross_entropy import linear_cross_entropy, loss_of_logits
from virtual_gpu.case import Case, bounds, normal, placed

# 9 tasks, two of them regressions; the fifth has one class; one has a single row
FEW = [3, 1, 2, 3, 1, 3, 2, 1, 3]
NUMBERS = [False, True, False, False, False, False, False, True, False]
LABELS = [True, False, True, False, True, False, False, False, True]  # which may hold several
ROWS = [0, 1, 2, 4, 5] * 40 + [6] * 17 + [7] * 33 + [8]


def heads(
    name: str,
    columns: list[int],
    regression: list[bool],
    tasks: list[int],
    width: int,
    smoothing: float = 0.0,
    off: int = 0,
    several: list[bool] | None = None,
    *,
    dtype: torch.dtype,
) -> Case:
    task, N, R, K = torch.tensor(sorted(tasks), dtype=torch.int64), len(columns), len(tasks), sum(columns)
    numbers, generator = torch.tensor(regression), torch.Generator().manual_seed(R)
    row_weight = torch.rand(R, generator=generator) + 0.5
    row_weight[::5] = 0.0
    labels = None if several is None else torch.tensor(several)
    targets = torch.tensor([2**C if holds else C for C, holds in zip(columns, several or [False] * N, strict=True)])
    inputs = (
        *(placed(t.to(dtype), off) for t in (normal(R, width), normal(K, width, seed=1) / width**0.5)),
        placed(normal(K, seed=2).to(dtype), off),
        bounds(torch.bincount(task, minlength=N).tolist()),
        (torch.rand(R, generator=generator, dtype=torch.float64) * targets[task]).long(),
        torch.where(numbers[task], normal(R, seed=3), 0.0),
        row_weight,
        bounds(columns),
        numbers,
    )

    def op(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(task_loss(*inputs, width=max(columns), label_smoothing=smoothing, several=labels))

    def definition(*inputs: Tensor) -> tuple[Tensor, ...]:
        loss, *others = task_loss_reference(*inputs, label_smoothing=smoothing, several=labels)
        return loss.to(torch.promote_types(loss.dtype, torch.float32)), *others

    return Case("task_loss", name, op, definition, inputs, constant=(5, 6))


def small_heads(dtype: torch.dtype) -> Iterator[Case]:
    run = partial(heads, dtype=dtype)
    yield run("mixed", FEW, NUMBERS, ROWS, 96)
    yield run("mixed, smoothed", FEW, NUMBERS, ROWS, 96, 0.1)
    yield run("several labels", FEW, NUMBERS, ROWS, 96, several=LABELS)
    yield run("several labels, smoothed", FEW, NUMBERS, ROWS, 96, 0.1, several=LABELS)
    yield run("62 labels", [62, 3, 20], [False] * 3, [0, 1, 2] * 30, 96, 0.1, several=[True, False, True])
    yield run("one row", FEW, NUMBERS, [2], 96)
    yield run("no row", FEW, NUMBERS, [], 96)
    yield run("one class", FEW, NUMBERS, [4] * 9, 96)
    yield run("chunks of 1024 rows", FEW, NUMBERS, [0] * 2100 + [2] * 1030 + [7] * 1024, 32)
    third = [False, False, True, False]
    yield run("256 classes", [256, 2, 1, 256], third, [0, 1, 2, 3] * 30, 96, 0.1)
    yield run("100 classes", [100, 2, 1, 100], third, [0, 1, 2, 3] * 20, 96)
    yield run("17 classes, 4200 rows", [17, 2, 1], third[:3], [0] * 4000 + [1] * 100 + [2] * 100, 32)
    yield run("odd widths", [3, 1, 2, 7, 1, 5], [False, True] + [False] * 4, [0, 1, 2, 4, 5] * 40, 23, 0.1)
    yield run("one task", [3], [False], [0] * 20, 96)
    of_1100 = [0] * 40 + [*range(600, 700), 1023, 1024, 1025, 1099]
    yield run("1100 tasks", [3, 2, 1, 2] * 275, third * 275, of_1100, 32)
    yield run(f"{dtype.itemsize} bytes off", FEW, NUMBERS, ROWS, 96, off=dtype.itemsize)


def logits(name: str, columns: list[int], counts: list[int], width: int, *, dtype: torch.dtype) -> Case:
    R, K, C = sum(counts), sum(columns), max(columns)
    offsets, class_offsets = bounds(counts), bounds(columns)

    def definition(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = x.new_full((len(x), C), float("-inf"), dtype=torch.promote_types(x.dtype, torch.float32))
        row, first = 0, 0
        for n, c in zip(counts, columns, strict=True):
            own = slice(first, first + c)
            out[row : row + n, :c] = F.linear(x[row : row + n], weight[own], bias[own])
            row, first = row + n, first + c
        return out

    inputs = tuple(t.to(dtype) for t in (normal(R, width), normal(K, width, seed=1), normal(K, seed=2)))
    return Case(
        "task_logits", name, lambda *x: task_logits(*x, offsets, class_offsets, C), definition, inputs, (0, 1, 2)
    )


def small_heads_logits(dtype: torch.dtype) -> Iterator[Case]:
    run = partial(logits, dtype=dtype)
    yield run("three tasks", [3, 1, 2], [17, 0, 40], 96)
    yield run("odd widths", [3, 7], [17, 70], 23)
    yield run("no rows", [3, 1], [0, 0], 96)
    yield run("256 classes", [256, 2], [33, 5], 96)
    yield run("100 classes, 4200 rows", [100, 17], [4100, 100], 32)
    yield run("1100 tasks", [2, 1] * 550, [3] + [0, 1] * 549 + [2], 32)


def vocabulary(
    name: str,
    rows: int,
    words: int,
    num_tasks: int = 4,
    bias: bool = True,
    off: int = 0,
    offset: float = 0.0,
    weights: str = "some are 0",
    patches: tuple = (),
    *,
    dtype: torch.dtype,
    **options: float,
) -> Case:
    generator = torch.Generator().manual_seed(rows)
    row_weight = torch.rand(rows, generator=generator) + 0.5
    if weights == "some are 0":
        row_weight[::7] = 0.0
    elif weights == "all are 0":
        row_weight.zero_()
    x, weight, b = normal(rows, 32), normal(words, 32, seed=1) / 2, normal(words, seed=2) + offset
    x, weight, b = (placed(t.to(dtype), off) for t in (x, weight, b))
    target = torch.randint(words, (rows,), generator=generator)
    task = torch.tensor([0, 1, 3])[torch.randint(3, (rows,), generator=generator)].clamp(max=num_tasks - 1)

    def op(x: Tensor, weight: Tensor, b: Tensor, row_weight: Tensor) -> Tensor:
        given = b if bias else None
        return linear_cross_entropy(
            x, weight, target, task, row_weight, num_tasks=num_tasks, bias=given, **options
        ).loss

    def definition(x: Tensor, weight: Tensor, b: Tensor, row_weight: Tensor) -> Tensor:
        logits = F.linear(x, weight, b if bias else None)
        if x.dtype == torch.float16 and (offset or words > 9000):  # squares or sums of logits overflow
            logits = logits.float()
        loss = loss_of_logits(logits, target, task, row_weight, num_tasks, **options)
        return loss.to(torch.promote_types(loss.dtype, torch.float32))

    return Case("linear_cross_entropy", name, op, definition, (x, weight, b, row_weight), (3,), patches)


def vocabularies(dtype: torch.dtype) -> Iterator[Case]:
    run = partial(vocabulary, dtype=dtype)
    chunks = (vocabulary_chunks, "CHUNKS", {"cpu": (64, 0), "cuda": (64, 0)})
    yield run("1008 words", 150, 1008, patches=(chunks,))
    # some rows count in all others: a row of weight 0 can hide what happens in those that count
    yield run("1008 words, all rows count", 150, 1008, weights="all count", patches=(chunks,))
    yield run("1008 words, no row counts", 20, 1008, weights="all are 0")
    yield run("7 words, all rows count", 40, 7, weights="all count")
    yield run("1 word, all rows count", 40, 1, weights="all count")
    yield run("one task", 70, 1008, 1)
    yield run("no rows", 0, 1008)
    yield run("one row", 1, 1008)
    yield run("without bias", 70, 1008, bias=False)
    everything = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0}
    yield run("everything", 70, 1008, **everything)
    yield run("1001 words", 70, 1001, label_smoothing=0.1)
    yield run("7 words", 40, 7, label_smoothing=0.1)
    yield run("1 word", 40, 1, label_smoothing=0.1)
    yield run("2 words", 40, 2)
    yield run("9001 words", 3, 9001, **everything)
    yield run("logits of a thousand", 40, 1008, offset=1000.0)
    yield run(f"{dtype.itemsize} bytes off", 40, 1001, off=dtype.itemsize)
