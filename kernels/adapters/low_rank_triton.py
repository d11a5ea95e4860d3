"""Triton kernels of `low_rank`: what the adapters' B do, on all parts of a layer in one launch.

    _up_kernel                y[:, p] = base[:, p] + scale * h_p B_p
    _hidden_gradient_kernel   dh_p = scale * dy[:, p] B_p^T
    _up_gradient_kernel       dB_p = scale * h_p^T dy[:, p]

The products with A, whose parts lie side by side, are those of `task_projection`: h = x A reads x once for all parts.

Why so: of D numbers in and C out a row, forward moves D + 2 C, and backward 2 C + 2 D, in 2 and 6 launches. A product
of its own for each part, whose result is scaled and added to a copy of `base`, moves D + 6 C and 4 C + 2 D in 2 + 3 P
and 3 + 7 P: where D = C nearly twice as much. That y is a new tensor costs nothing but its memory: to add in place
reads and writes as much. Backward reads dy twice. In one pass a tile of rows would have to write its own share of dB,
K C numbers of float32: with 128 rows and K = 32 that is as much as the second reading.

R rows, T adapters, D width in, C width out, K rank, P parts, W the sum of their columns, H = P K
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trunkline.kernels.dispatch import input_precision, padded_width, tl, triton
from trunkline.kernels.tasks.task_projection_triton import GROUP, MIN_CHUNK, PROGRAMS, product, weight_gradient
from trunkline.kernels.tasks.task_tiles import rows_of_tile, search_block

WIDEST = 128  # columns of h that a program has at once: all of a part's, up to this rank


@triton.jit
def _part_of(tile, W, PARTS: tl.constexpr, NUM_PARTS: tl.constexpr):
    """Of a tile of columns: its part, this part's first column, width and beginning in B, and its first tile.

    W says where the last part ends, though its width is known, too: with a constant number of turns LLVM peels the
    first of a loop, and sets its sums to 0 behind the wgmma.fence that must follow.
    """
    part, first, width, own, start = 0, 0, 0, 0, 0
    for p in tl.static_range(NUM_PARTS):
        here = tile >= PARTS[4 * p + 3]
        part = tl.where(here, p, part)
        first = tl.where(here, PARTS[4 * p], first)
        if p + 1 < NUM_PARTS:
            width = tl.where(here, PARTS[4 * p + 1], width)
        else:
            width = tl.where(here, W - PARTS[4 * p + 2], width)
        own = tl.where(here, PARTS[4 * p + 2], own)
        start = tl.where(here, PARTS[4 * p + 3], start)
    return part, first, width, own, start


@triton.jit
def _up_kernel(
    base_ptr,
    h_ptr,
    up_ptr,
    offsets_ptr,
    y_ptr,
    tiles,
    T,
    K,
    C,
    W,
    scale,
    PARTS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y = base + scale h_p B_p for one tile of rows, and of columns of one part; COLUMNS: such tiles of all parts."""
    program = tl.program_id(0)
    tile, column = tl.swizzle2d(program // COLUMNS, program % COLUMNS, tiles, COLUMNS, GROUP)
    adapter, begin, end = rows_of_tile(offsets_ptr, tile, T, BLOCK_R, False, BLOCK_T)
    if begin >= end:
        return
    part, first_column, width, own, start_tile = _part_of(column, W, PARTS, NUM_PARTS)
    r, k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    c = (column - start_tile) * BLOCK_C + tl.arange(0, BLOCK_C)  # of the part's
    in_rows, in_columns = (begin + r < end)[:, None], (c < width)[None, :]
    first, inside = begin.to(tl.int64), in_rows & in_columns  # R * C passes 2^31 at 1M rows x 4096
    place = first * C + first_column + (r[:, None] * C + c[None, :])
    base = tl.load(base_ptr + place, mask=inside, other=0.0)  # on its way while the products are made
    h_ptrs = h_ptr + first * (NUM_PARTS * K) + part * K + (r[:, None] * (NUM_PARTS * K) + k[None, :])
    up_ptrs = up_ptr + adapter.to(tl.int64) * K * W + own + (k[:, None] * W + c[None, :])
    added = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for done in range(0, K, BLOCK_K):
        h = tl.load(h_ptrs, mask=in_rows & (done + k < K)[None, :], other=0.0)  # (BLOCK_R, BLOCK_K)
        up = tl.load(up_ptrs, mask=(done + k < K)[:, None] & in_columns, other=0.0)  # (BLOCK_K, BLOCK_C)
        added = tl.dot(h, up, added, input_precision=PRECISION)
        h_ptrs += BLOCK_K
        up_ptrs += BLOCK_K * W
    y = base.to(tl.float32) + scale * added
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _hidden_gradient_kernel(
    dy_ptr,
    up_ptr,
    offsets_ptr,
    dh_ptr,
    T,
    K,
    C,
    W,
    scale,
    PARTS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """dh_p = scale dy[:, p] B_p^T for one tile of rows, one part, and BLOCK_K of its columns of h."""
    adapter, begin, end = rows_of_tile(offsets_ptr, tl.program_id(0), T, BLOCK_R, False, BLOCK_T)
    if begin >= end:
        return
    part, first_column, width, own, _ = _part_of(tl.program_id(1), W, PARTS, NUM_PARTS)
    r, c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_rows, in_k, first = (begin + r < end)[:, None], (k < K)[None, :], begin.to(tl.int64)
    dy_ptrs = dy_ptr + first * C + first_column + (r[:, None] * C + c[None, :])
    up_ptrs = up_ptr + adapter.to(tl.int64) * K * W + own + (c[:, None] + k[None, :] * W)  # of B^T
    dh = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for done in range(0, width, BLOCK_C):
        in_columns = done + c < width
        dy = tl.load(dy_ptrs, mask=in_rows & in_columns[None, :], other=0.0)  # (BLOCK_R, BLOCK_C)
        up = tl.load(up_ptrs, mask=in_columns[:, None] & in_k, other=0.0)  # (BLOCK_C, BLOCK_K)
        dh = tl.dot(dy, up, dh, input_precision=PRECISION)
        dy_ptrs += BLOCK_C
        up_ptrs += BLOCK_C
    dh_ptrs = dh_ptr + first * (NUM_PARTS * K) + part * K + (r[:, None] * (NUM_PARTS * K) + k[None, :])
    tl.store(dh_ptrs, (scale * dh).to(dh_ptr.dtype.element_ty), mask=in_rows & in_k)


@triton.jit
def _up_gradient_kernel(
    dy_ptr,
    h_ptr,
    offsets_ptr,
    partial_ptr,
    dup_ptr,
    T,
    K,
    C,
    W,
    CHUNK,
    scale,
    FIRST: tl.constexpr,
    PARTS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A tile of dB^T = scale dy[:, p]^T h_p over one chunk of an adapter's rows.

    The first chunk of every adapter adds up what the others left in `partial_ptr`, always in the same order.
    """
    program = tl.program_id(0)
    chunk, column = program // COLUMNS, program % COLUMNS
    if FIRST:
        adapter = chunk
        begin, end = tl.load(offsets_ptr + adapter), tl.load(offsets_ptr + adapter + 1)
    else:
        adapter, begin, end = rows_of_tile(offsets_ptr, chunk, T, CHUNK, True, BLOCK_T)
        if begin >= end:
            return
    part, first_column, width, own, start_tile = _part_of(column, W, PARTS, NUM_PARTS)
    c = (column - start_tile) * BLOCK_C + tl.arange(0, BLOCK_C)  # of the part's
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    in_columns, in_k, first = c < width, (k < K)[None, :], begin.to(tl.int64)
    place, inside = own + c[:, None] + k[None, :] * W, in_columns[:, None] & in_k
    total = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    if FIRST:
        others = tl.cdiv(end - begin, CHUNK) - 1
        for i in range(0, others):
            other_ptr = partial_ptr + (begin // CHUNK + i).to(tl.int64) * K * W
            total += tl.load(other_ptr + place, mask=inside, other=0.0)
    dy_ptrs = dy_ptr + first * C + first_column + (r[:, None] * C + c[None, :])
    h_ptrs = h_ptr + first * (NUM_PARTS * K) + part * K + (r[:, None] * (NUM_PARTS * K) + k[None, :])
    rows = tl.minimum(end - begin, CHUNK)
    for done in range(0, rows, BLOCK_R):
        in_rows = (done + r < rows)[:, None]
        dy = tl.load(dy_ptrs, mask=in_rows & in_columns[None, :], other=0.0)  # (BLOCK_R, BLOCK_C)
        h = tl.load(h_ptrs, mask=in_rows & in_k, other=0.0)  # (BLOCK_R, BLOCK_K)
        total = tl.dot(tl.trans(dy), h, total, input_precision=PRECISION)
        dy_ptrs += BLOCK_R * C
        h_ptrs += BLOCK_R * (NUM_PARTS * K)
    if FIRST:
        dup_ptrs = dup_ptr + adapter.to(tl.int64) * K * W + place
        tl.store(dup_ptrs, (scale * total).to(dup_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(partial_ptr + chunk.to(tl.int64) * K * W + place, total, mask=inside)


def _table(parts: Sequence[int], block: int) -> tuple[tuple[int, ...], int]:
    """What `_part_of` reads: of every part its first column, width, beginning in B and first tile; and tiles of all."""
    table: list[int] = []
    own = tiles = 0
    for first, end in zip(parts[::2], parts[1::2], strict=True):
        table += first, end - first, own, tiles
        own, tiles = own + end - first, tiles + triton.cdiv(end - first, block)
    return tuple(table), tiles


def forward(
    base: Tensor, x: Tensor, down: Tensor, up: Tensor, offsets: Tensor, parts: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """y (R, C) and h (R, P K)."""
    (R, C), (T, K, W) = base.shape, up.shape
    h, _ = product(x.contiguous(), down, None, offsets)
    y = base.new_empty(R, C)
    for first, end in zip([0, *parts[1::2]], [*parts[::2], C], strict=True):
        if first < end:  # of no part
            y[:, first:end] = base[:, first:end]
    block_r, block_c = 64, 64 if x.dtype == torch.float32 else 128
    (table, columns), tiles = _table(parts, block_c), R // block_r + T
    _up_kernel[(tiles * columns,)](
        base.contiguous(),
        h,
        up.contiguous(),
        offsets,
        y,
        tiles,
        T,
        K,
        C,
        W,
        scale,
        PARTS=table,
        NUM_PARTS=len(parts) // 2,
        COLUMNS=columns,
        PRECISION=input_precision(x.dtype),
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        BLOCK_K=min(16 if x.dtype == torch.float32 else 64, padded_width(K)),
        BLOCK_T=search_block(T),
        GROUP=GROUP,
        num_warps=4,
        num_stages=2,
    )
    return y, h


def backward(
    dy: Tensor, x: Tensor, h: Tensor, down: Tensor, up: Tensor, offsets: Tensor, parts: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (R, D), dA (T, D, P K) and dB (T, K, W)."""
    dy, up = dy.contiguous(), up.contiguous()
    dh = _hidden_gradient(dy, up, h, offsets, parts, scale)
    dup = _up_gradient(dy, up, h, offsets, parts, scale)
    dx, _ = product(dh, down.mT, None, offsets)
    return dx, weight_gradient(x.contiguous(), dh, down, offsets), dup


def _hidden_gradient(dy: Tensor, up: Tensor, h: Tensor, offsets: Tensor, parts: list[int], scale: float) -> Tensor:
    (R, C), (T, K, W), P = dy.shape, up.shape, len(parts) // 2
    dh, block_r, block_k = torch.empty_like(h), 64, min(WIDEST, padded_width(K))
    table, _ = _table(parts, max(parts))  # a tile is a part
    _hidden_gradient_kernel[(R // block_r + T, P, triton.cdiv(K, block_k))](
        dy,
        up,
        offsets,
        dh,
        T,
        K,
        C,
        W,
        scale,
        PARTS=table,
        NUM_PARTS=P,
        PRECISION=input_precision(dy.dtype),
        BLOCK_R=block_r,
        BLOCK_C=16 if dy.dtype == torch.float32 else 64,
        BLOCK_K=block_k,
        BLOCK_T=search_block(T),
        num_warps=4,
        num_stages=3,
    )
    return dh


def _up_gradient(dy: Tensor, up: Tensor, h: Tensor, offsets: Tensor, parts: list[int], scale: float) -> Tensor:
    """Rows beyond an adapter's first chunk go to programs of their own, whose sums are added in order."""
    (R, C), (T, K, W) = dy.shape, up.shape
    block_c, block_k = 64, min(WIDEST, padded_width(K))
    (table, columns), across = _table(parts, block_c), triton.cdiv(K, block_k)
    chunk = max(MIN_CHUNK, triton.cdiv(R * columns * across, PROGRAMS))
    dup = torch.empty_like(up)
    partial = dy.new_empty(R // chunk, K, W, dtype=torch.float32)
    for chunks, first in ((R // chunk, False), (T, True)):
        if chunks:
            _up_gradient_kernel[(chunks * columns, across)](
                dy,
                h,
                offsets,
                partial,
                dup,
                T,
                K,
                C,
                W,
                chunk,
                scale,
                FIRST=first,
                PARTS=table,
                NUM_PARTS=len(parts) // 2,
                COLUMNS=columns,
                PRECISION=input_precision(dy.dtype),
                BLOCK_R=16 if dy.dtype == torch.float32 else 32,
                BLOCK_C=block_c,
                BLOCK_K=block_k,
                BLOCK_T=search_block(T),
                num_warps=4,
                num_stages=2,
            )
    return dup
