"""Triton kernels of `task_loss`: one over tiles of rows forward, and one that makes dx, dweight and dbias together.

Both see one task at a time, so a tile's logits are one small product. Nothing is added by several programs to one
place: sums over tiles are taken afterwards in their order, and two runs give the same bits.

R rows, D width, N tasks, K columns of the table, C columns of the widest task
"""

import torch
from torch import Tensor

from trunkline.kernels.decisions import decision
from trunkline.kernels.dispatch import input_precision, padded_width, tl, triton
from trunkline.kernels.tasks.task_tiles import rows_of_tile, search_block

WIDEST = 256  # C that a tile can hold
FEW = 4096  # rows that make few tiles
PROGRAMS = 512  # that the backward pass is split into at least, where rows allow
MIN_CHUNK = 1024  # rows of a task that one program of the backward pass takes at least


@triton.jit
def _several(logits, holds, in_classes, classes, smoothing):
    """Losses (r,), gradient of the logits (r, C) and correctness (r,) of rows with several labels."""
    z = tl.where(in_classes[None, :], logits, 0.0)
    wrong = tl.where(holds, -z, z)  # how far on the wrong side
    t = tl.exp(-tl.abs(wrong))
    u = 1 + t
    log1p = tl.where(u == 1, t, tl.log(u) * (t / tl.where(u == 1, 1.0, u - 1)))  # Kahan's: exact for small t, too
    # log(1 + exp(wrong)); s / 2 of the target stands on the other side, where the loss is less by `wrong`
    loss = tl.maximum(wrong, 0.0) + log1p - smoothing / 2 * wrong
    slope = tl.where(wrong > 0, 1 / u, t / u) - smoothing / 2
    gradient = tl.where(in_classes[None, :], tl.where(holds, -slope, slope) / classes, 0.0)
    agrees = ((z > 0) == holds) | (in_classes == 0)[None, :]
    return tl.sum(tl.where(in_classes[None, :], loss, 0.0), 1) / classes, gradient, tl.min(agrees.to(tl.int32), 1) > 0


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    offsets_ptr,
    target_ptr,
    value_ptr,
    row_weight_ptr,
    class_offsets_ptr,
    kinds_ptr,
    out_ptr,
    partial_ptr,
    tiles,
    N,
    D,
    C,
    smoothing,
    ONLY_LOGITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile: row weight times dl/dlogits, and its sums of loss, weight, counted and correct rows; or its logits."""
    tile = tl.program_id(0)
    task, begin, end = rows_of_tile(offsets_ptr, tile, N, BLOCK_R, False, BLOCK_N)
    if begin >= end:
        return
    first_class = tl.load(class_offsets_ptr + task)
    classes = tl.load(class_offsets_ptr + task + 1) - first_class
    first = begin.to(tl.int64)  # R * D passes 2^31 at 1M rows x 4096
    r, c, d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    in_rows, in_classes = begin + r < end, c < classes
    x_ptrs = x_ptr + first * D + (r[:, None] * D + d[None, :])
    weight_ptrs = weight_ptr + first_class.to(tl.int64) * D + (c[None, :] * D + d[:, None])
    logits = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, D, BLOCK_D):
        x = tl.load(x_ptrs, mask=in_rows[:, None] & (start + d < D)[None, :], other=0.0)
        weight = tl.load(weight_ptrs, mask=(start + d < D)[:, None] & in_classes[None, :], other=0.0)
        logits = tl.dot(x, weight, logits, input_precision=PRECISION)  # (r, D) @ (D, C) -> (r, C)
        x_ptrs += BLOCK_D
        weight_ptrs += BLOCK_D
    logits += tl.load(bias_ptr + first_class + c, mask=in_classes, other=0.0).to(tl.float32)[None, :]
    logits = tl.where(in_classes[None, :], logits, float("-inf"))
    out_ptrs = out_ptr + first * C + (r[:, None] * C + c[None, :])
    inside = in_rows[:, None] & (c < C)[None, :]
    if ONLY_LOGITS:
        tl.store(out_ptrs, logits, mask=inside)
    else:
        target = tl.load(target_ptr + begin + r, mask=in_rows, other=0)  # int64
        row_weight = tl.load(row_weight_ptr + begin + r, mask=in_rows, other=0.0)
        value = tl.load(value_ptr + begin + r, mask=in_rows, other=0.0)
        kind = tl.load(kinds_ptr + task)
        is_number, has_several = kind == 1, kind == 2  # REGRESSION, SEVERAL

        top, best = tl.max(logits, 1, return_indices=True)  # of equal logits the first
        shifted = logits - top[:, None]
        p = tl.exp(shifted)
        total = tl.sum(p, 1)
        log_p = tl.where(in_classes[None, :], shifted - tl.log(total)[:, None], 0.0)
        share = (c[None, :] == target[:, None]).to(tl.float32) * (1 - smoothing) + smoothing / classes
        expected = tl.where(in_classes[None, :], share, 0.0)
        difference = tl.sum(tl.where(c[None, :] == 0, logits, 0.0), 1) - value

        loss = tl.where(is_number, difference * difference, -tl.sum(expected * log_p, 1))
        slope = tl.where(c[None, :] == 0, 2 * difference[:, None], 0.0)
        gradient = tl.where(is_number, slope, p / total[:, None] - expected)
        right = best == target
        if has_several:
            holds = (target[:, None] >> tl.minimum(c, 62).to(tl.int64)[None, :]) & 1 != 0  # at most 63 labels
            loss, gradient, right = _several(logits, holds, in_classes, classes, smoothing)
        tl.store(out_ptrs, gradient * row_weight[:, None], mask=inside)
        counted = (row_weight > 0).to(tl.float32)
        correct = tl.where(is_number, 0.0, counted * right.to(tl.float32))
        tl.store(partial_ptr + tile, tl.sum(row_weight * loss, 0))
        tl.store(partial_ptr + tiles + tile, tl.sum(row_weight, 0))
        tl.store(partial_ptr + 2 * tiles + tile, tl.sum(counted, 0))
        tl.store(partial_ptr + 3 * tiles + tile, tl.sum(correct, 0))


@triton.jit
def _sum_kernel(
    partial_ptr,
    offsets_ptr,
    loss_ptr,
    weight_ptr,
    count_ptr,
    correct_ptr,
    tiles,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Adds up the tiles of one task."""
    task = tl.program_id(0)
    start, end = tl.load(offsets_ptr + task), tl.load(offsets_ptr + task + 1)
    ptr, count = partial_ptr + start // BLOCK_R + task, tl.cdiv(end - start, BLOCK_R)
    i = tl.arange(0, BLOCK_T)
    loss, weight = tl.zeros([BLOCK_T], tl.float32), tl.zeros([BLOCK_T], tl.float32)
    counted, correct = tl.zeros([BLOCK_T], tl.float32), tl.zeros([BLOCK_T], tl.float32)
    for done in range(0, count, BLOCK_T):
        inside = done + i < count
        loss += tl.load(ptr + done + i, mask=inside, other=0.0)
        weight += tl.load(ptr + tiles + done + i, mask=inside, other=0.0)
        counted += tl.load(ptr + 2 * tiles + done + i, mask=inside, other=0.0)
        correct += tl.load(ptr + 3 * tiles + done + i, mask=inside, other=0.0)
    tl.store(loss_ptr + task, tl.sum(loss, 0))
    tl.store(weight_ptr + task, tl.sum(weight, 0))
    tl.store(count_ptr + task, tl.sum(counted, 0))
    tl.store(correct_ptr + task, tl.sum(correct, 0))


@triton.jit
def _backward_kernel(
    dloss_ptr,
    gradient_ptr,
    x_ptr,
    weight_ptr,
    offsets_ptr,
    class_offsets_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    partial_weight_ptr,
    partial_bias_ptr,
    N,
    D,
    C,
    CHUNK,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A block of D columns of dx for one chunk of a task's rows, and their part of dweight and dbias.

    The first chunk of every task adds up what the others left in the partial sums, and writes the task's gradients.
    """
    blocks = tl.cdiv(D, BLOCK_D)
    program = tl.program_id(0)
    chunk, block = program // blocks, program % blocks
    if FIRST:
        task = chunk
        begin, end = tl.load(offsets_ptr + task), tl.load(offsets_ptr + task + 1)
    else:
        task, begin, end = rows_of_tile(offsets_ptr, chunk, N, CHUNK, True, BLOCK_N)
        if begin >= end:
            return
    first_class = tl.load(class_offsets_ptr + task)
    classes = tl.load(class_offsets_ptr + task + 1) - first_class
    r, c, d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C), block * BLOCK_D + tl.arange(0, BLOCK_D)
    in_classes, in_d = c < classes, d < D
    place, inside = c[:, None] * D + d[None, :], in_classes[:, None] & in_d[None, :]
    own = first_class.to(tl.int64) * D
    weight = tl.load(weight_ptr + own + place, mask=inside, other=0.0)  # (BLOCK_C, BLOCK_D)
    dloss = tl.load(dloss_ptr + task)
    dweight, dbias = tl.zeros([BLOCK_C, BLOCK_D], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    if FIRST:
        for i in range(0, tl.cdiv(end - begin, CHUNK) - 1):
            other = (begin // CHUNK + i).to(tl.int64)
            dweight += tl.load(partial_weight_ptr + other * C * D + place, mask=inside, other=0.0)
            dbias += tl.load(partial_bias_ptr + other * C + c, mask=in_classes, other=0.0)
    first = begin.to(tl.int64)
    gradient_ptrs = gradient_ptr + first * C + (r[:, None] * C + c[None, :])
    row_place = first * D + (r[:, None] * D + d[None, :])
    rows = tl.minimum(end - begin, CHUNK)
    for start in range(0, rows, BLOCK_R):
        in_rows = (start + r < rows)[:, None]
        # beyond the task's classes it is 0, too; asked for with a bound that Triton knows, four numbers are one load
        dlogits = dloss * tl.load(gradient_ptrs, mask=in_rows & (c < C)[None, :], other=0.0)
        dbias += tl.sum(dlogits, 0)
        dlogits = dlogits.to(weight.dtype)
        dx = tl.dot(dlogits, weight, input_precision=PRECISION)  # (r, C) @ (C, D) -> (r, D)
        tl.store(dx_ptr + row_place, dx.to(dx_ptr.dtype.element_ty), mask=in_rows & in_d[None, :])
        x = tl.load(x_ptr + row_place, mask=in_rows & in_d[None, :], other=0.0)
        dweight = tl.dot(tl.trans(dlogits), x, dweight, input_precision=PRECISION)  # (C, r) @ (r, D) -> (C, D)
        gradient_ptrs += BLOCK_R * C
        row_place += BLOCK_R * D
    if FIRST:
        tl.store(dweight_ptr + own + place, dweight.to(dweight_ptr.dtype.element_ty), mask=inside)
        if block == 0:
            tl.store(dbias_ptr + first_class + c, dbias.to(dbias_ptr.dtype.element_ty), mask=in_classes)
    else:
        tl.store(partial_weight_ptr + chunk.to(tl.int64) * C * D + place, dweight, mask=inside)
        if block == 0:
            tl.store(partial_bias_ptr + chunk * C + c, dbias, mask=in_classes)


def _run_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    offsets: Tensor,
    labels: tuple[Tensor | None, ...],
    class_offsets: Tensor,
    width: int,
    smoothing: float,
    partial: Tensor | None,
    block_r: int,
) -> Tensor:
    """(R, C): the gradient of the logits; without `labels` the logits."""
    (R, D), N = x.shape, len(class_offsets) - 1
    out, block_c = x.new_empty(R, width, dtype=torch.float32), padded_width(width)
    *rows, kinds = labels
    tiles = R // block_r + N
    _forward_kernel[(tiles,)](
        x.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        offsets,
        *rows,
        class_offsets,
        kinds,
        out,
        partial,
        tiles,
        N,
        D,
        width,
        smoothing,
        ONLY_LOGITS=partial is None,
        PRECISION=input_precision(x.dtype),
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        BLOCK_D=(128 if block_c <= 64 else 64) // (2 if x.dtype == torch.float32 else 1),
        BLOCK_N=search_block(N),
        num_warps=8 if block_c > 128 else 4,
    )
    return out


def logits(x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, class_offsets: Tensor, width: int) -> Tensor:
    return _run_forward(
        x, weight, bias, offsets, (None,) * 4, class_offsets, width, 0.0, None, _rows_block(len(x) <= FEW, width)
    )


@decision(lambda few, width: [16, 32] if width <= 128 else [])
def _rows_block(few: bool, width: int) -> int:
    """Rows of a tile: few where rows are few, since a GPU has 132 processors and more; the tile fits the registers."""
    return 16 if few or width > 128 else 32


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
    R, N = len(x), len(class_offsets) - 1
    block_r = _rows_block(R <= FEW, width)
    tiles = R // block_r + N
    partial = x.new_empty(4, tiles, dtype=torch.float32)
    rows = (target.contiguous(), value.float().contiguous(), row_weight.float().contiguous())
    labels = (*rows, kinds)
    gradient = _run_forward(x, weight, bias, offsets, labels, class_offsets, width, label_smoothing, partial, block_r)
    sums = x.new_empty(4, N, dtype=torch.float32)
    _sum_kernel[(N,)](partial, offsets, *sums, tiles, BLOCK_R=block_r, BLOCK_T=256)
    return sums, gradient


def backward(
    dloss: Tensor, gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, class_offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (R, D), C, N = x.shape, gradient.shape[1], len(class_offsets) - 1
    block_c = padded_width(C)
    block_d = min(256, 4096 // block_c) if block_c < 64 else 64
    if x.dtype == torch.float32:
        block_d = min(64, block_d)
    blocks = triton.cdiv(D, block_d)
    chunk = max(MIN_CHUNK, triton.cdiv(R * blocks, PROGRAMS))
    dx, dweight, dbias = x.new_empty(R, D), weight.new_empty(weight.shape), bias.new_empty(bias.shape)
    partial_weight = gradient.new_empty(R // chunk, C, D)
    partial_bias = gradient.new_empty(R // chunk, C)
    for chunks, first in ((R // chunk, False), (N, True)):
        if chunks:
            _backward_kernel[(chunks * blocks,)](
                dloss,
                gradient,
                x.contiguous(),
                weight.contiguous(),
                offsets,
                class_offsets,
                dx,
                dweight,
                dbias,
                partial_weight,
                partial_bias,
                N,
                D,
                C,
                chunk,
                FIRST=first,
                PRECISION=input_precision(x.dtype),
                BLOCK_R=32,
                BLOCK_C=block_c,
                BLOCK_D=block_d,
                BLOCK_N=search_block(N),
                num_warps=8 if block_c > 128 else 4,
                num_stages=1,
            )
    return dx, dweight, dbias
