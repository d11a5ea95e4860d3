"""Triton kernels of `task_projection`: two products, forward and dx by one kernel and dweight by another.

dx is cut into tiles of 128 x 256 outputs: at 64 columns of the inner dimension a step such a tile needs 48 KiB from the
L2 cache for 4.2 MFLOP, three quarters of what two tiles of 128 x 128 ask of it. The activation of a tile that large
does not fit the registers, so forward and dweight, which adds up partial sums, take 128 x 128; two such tiles share a
multiprocessor where their registers allow. Neighbouring programs share rows or weights (`tl.swizzle2d`), so that both
stay in the cache.

R rows, N tasks, D width in, C width out
"""

import torch
from torch import Tensor

from trunkline.kernels.decisions import decision
from trunkline.kernels.dispatch import input_precision, padded_width, tl, triton
from trunkline.kernels.tasks.task_tiles import rows_of_tile, search_block

SPILLS = {
    ("_product_kernel", 80): (
        32,
        "Triton 3.6: the outputs of a tile of 128 x 256 lie in registers on an A100, and operands with them",
    ),
    ("_product_kernel", 100): (6, "Triton 3.8: the offsets of 100 tasks are searched beside a tile's outputs"),
    ("_gradient_kernel", 100): (2, "Triton 3.6: erf and its derivative on 128 columns"),
    ("_weight_gradient_kernel", 100): (
        14,
        "Triton 3.9: narrow tiles of 16 or 32 rows are given 64 registers on a B200; of 64 rows 70, and none spills",
    ),
}
GROUP = 8  # tiles of rows that sweep the columns together
WHOLE = 256  # columns up to this, of a much longer inner dimension, are one tile: x is read once
NARROW = 64  # inner dimensions and widths up to this, of low-rank adapters, fill no large tile
MIN_CHUNK = 512  # rows of a task that one program of the weight gradient takes at least
PROGRAMS = 1024  # that the weight gradient is split into at least, where rows allow: several for each of 132 processors
GRADIENT_ROWS, GRADIENT_COLUMNS = 64, 128  # tile of the activation's derivative


@triton.jit
def _tanh(z):
    small = tl.exp(-2 * tl.abs(z))
    return tl.where(z < 0, -1.0, 1.0) * (1 - small) / (1 + small)


@triton.jit
def _activation(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        z = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "relu":
        z = tl.maximum(z, 0.0)
    elif ACTIVATION == "tanh":
        z = _tanh(z)
    return z


@triton.jit
def _product_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    offsets_ptr,
    y_ptr,
    z_ptr,
    tiles,
    N,
    K,
    C,
    stride_task,
    stride_k,
    stride_c,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE_Z: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y = act(x W[t] + b[t]) for one tile of rows and columns; K is the inner dimension."""
    columns = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0)
    tile, column = tl.swizzle2d(program // columns, program % columns, tiles, columns, GROUP)
    task, begin, end = rows_of_tile(offsets_ptr, tile, N, BLOCK_R, False, BLOCK_N)
    if begin >= end:
        return
    r = tl.arange(0, BLOCK_R)
    c = column * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    in_rows, in_columns = (begin + r < end)[:, None], (c < C)[None, :]
    first = begin.to(tl.int64)  # R * D passes 2^31 at 1M rows x 4096
    x_ptrs = x_ptr + first * K + (r[:, None] * K + k[None, :])
    weight_ptrs = weight_ptr + task.to(tl.int64) * stride_task + (k[:, None] * stride_k + c[None, :] * stride_c)
    z = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_ptrs, mask=in_rows & (start + k < K)[None, :], other=0.0)  # (BLOCK_R, BLOCK_K)
        weight = tl.load(weight_ptrs, mask=(start + k < K)[:, None] & in_columns, other=0.0)  # (BLOCK_K, BLOCK_C)
        z = tl.dot(x, weight, z, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K * stride_k
    if HAS_BIAS:
        z += tl.load(bias_ptr + task.to(tl.int64) * C + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    place = r[:, None] * C + c[None, :]
    if SAVE_Z:
        tl.store(z_ptr + first * C + place, z.to(z_ptr.dtype.element_ty), mask=in_rows & in_columns)
    y = _activation(z, ACTIVATION).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + first * C + place, y, mask=in_rows & in_columns)


@triton.jit
def _gradient_kernel(
    dy_ptr,
    saved_ptr,
    offsets_ptr,
    g_ptr,
    partial_ptr,
    N,
    C,
    ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """g = dy * act'(z), and its sum over the tile's rows."""
    tile = tl.program_id(0)
    _, begin, end = rows_of_tile(offsets_ptr, tile, N, BLOCK_R, False, BLOCK_N)
    if begin >= end:
        return
    r = tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (begin + r < end)[:, None] & (c < C)[None, :]
    first = begin.to(tl.int64) * C
    place = r[:, None] * C + c[None, :]
    g = tl.load(dy_ptr + first + place, mask=inside, other=0.0).to(tl.float32)  # (BLOCK_R, BLOCK_C)
    if ACTIVATION != "none":
        saved = tl.load(saved_ptr + first + place, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATION == "gelu":
            density = 0.3989422804014327 * tl.exp(-0.5 * saved * saved)
            g *= 0.5 * (1 + tl.erf(saved * 0.7071067811865476)) + saved * density
        elif ACTIVATION == "relu":
            g = tl.where(saved > 0, g, 0.0)
        else:
            g *= 1 - saved * saved
        tl.store(g_ptr + first + place, g.to(g_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + tile.to(tl.int64) * C + c, tl.sum(g, 0), mask=c < C)


@triton.jit
def _bias_gradient_kernel(
    partial_ptr, offsets_ptr, dbias_ptr, C, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    """db[t]: the sum over the tiles of t, always in the same order."""
    task = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start, end = tl.load(offsets_ptr + task), tl.load(offsets_ptr + task + 1)
    first, count = start // BLOCK_R + task, tl.cdiv(end - start, BLOCK_R)
    total = tl.zeros([BLOCK_C], tl.float32)
    for done in range(0, count, BLOCK_T):
        i = done + tl.arange(0, BLOCK_T)
        place = (first + i).to(tl.int64)[:, None] * C + c[None, :]
        total += tl.sum(tl.load(partial_ptr + place, mask=(i < count)[:, None] & (c < C)[None, :], other=0.0), 0)
    tl.store(dbias_ptr + task.to(tl.int64) * C + c, total.to(dbias_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def _weight_gradient_kernel(
    x_ptr,
    g_ptr,
    offsets_ptr,
    partial_ptr,
    dweight_ptr,
    N,
    D,
    C,
    CHUNK,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of x^T g over one chunk of a task's rows.

    The first chunk of every task adds up what the others left in `partial_ptr`, and writes dW[t].
    """
    tiles, columns = tl.cdiv(D, BLOCK_D), tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0)
    chunk, tile = program // (tiles * columns), program % (tiles * columns)
    tile, column = tl.swizzle2d(tile // columns, tile % columns, tiles, columns, GROUP)
    if FIRST:
        task = chunk
        begin, end = tl.load(offsets_ptr + task), tl.load(offsets_ptr + task + 1)
    else:
        task, begin, end = rows_of_tile(offsets_ptr, chunk, N, CHUNK, True, BLOCK_N)
        if begin >= end:
            return
    d = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    c = column * BLOCK_C + tl.arange(0, BLOCK_C)
    in_d, in_c = (d < D)[None, :], (c < C)[None, :]
    place = d[:, None] * C + c[None, :]
    inside = (d < D)[:, None] & in_c
    total = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    if FIRST:
        others = tl.cdiv(end - begin, CHUNK) - 1
        for i in range(0, others):
            other_ptr = partial_ptr + (begin // CHUNK + i).to(tl.int64) * D * C
            total += tl.load(other_ptr + place, mask=inside, other=0.0)
    r = tl.arange(0, BLOCK_R)
    first = begin.to(tl.int64)
    x_ptrs = x_ptr + first * D + (r[:, None] * D + d[None, :])
    g_ptrs = g_ptr + first * C + (r[:, None] * C + c[None, :])
    rows = tl.minimum(end - begin, CHUNK)
    for start in range(0, rows, BLOCK_R):
        in_rows = (start + r < rows)[:, None]
        x = tl.load(x_ptrs, mask=in_rows & in_d, other=0.0)  # (BLOCK_R, BLOCK_D)
        g = tl.load(g_ptrs, mask=in_rows & in_c, other=0.0)  # (BLOCK_R, BLOCK_C)
        total = tl.dot(tl.trans(x), g, total, input_precision=PRECISION)
        x_ptrs += BLOCK_R * D
        g_ptrs += BLOCK_R * C
    if FIRST:
        dweight_ptrs = dweight_ptr + task.to(tl.int64) * D * C + place
        tl.store(dweight_ptrs, total.to(dweight_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(partial_ptr + chunk.to(tl.int64) * D * C + place, total, mask=inside)


def _is_large(rows: int, inner: int, columns: int) -> bool:
    """Whether there are enough large tiles to occupy a GPU, and enough to do in each."""
    return rows * columns >= 128 * 256 * 132 and inner > NARROW


def _tile(R: int, C: int, K: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_R": R, "BLOCK_C": C, "BLOCK_K": K, "num_warps": warps, "num_stages": stages}


def _whole(inner: int, columns: int, plain: bool) -> int:
    """Columns of a tile that has all of a row's, so that x is read once; 0: several are better. `plain`: as below."""
    return padded_width(columns) if plain and NARROW < columns <= WHOLE and inner >= 4 * columns else 0


def _other_products(dtype: torch.dtype, large: bool, whole: int, plain: bool) -> list[dict[str, int]]:
    if dtype == torch.float32:
        return []
    if large:
        return [_tile(128, 128, 64, 8, 3), _tile(128, 128, 64, 8, 4), _tile(64, 128, 64, 4, 4)]
    return [_tile(64, 64, 64, 4, 4), _tile(64, 64, 64, 4, 3), _tile(64, 128, 64, 4, 3), _tile(64, 64, 32, 4, 4)]


@decision(_other_products)
def _product_tile(dtype: torch.dtype, large: bool, whole: int, plain: bool) -> dict[str, int]:
    """Of the outputs of `product`. `plain`: without activation."""
    if dtype == torch.float32:
        return _tile(64, 64, 16, 4, 3)
    if large:
        return _tile(128, 256 if plain else 128, 64, 8, 3)
    return _tile(64, whole, 64, whole // 32, 3) if whole else _tile(64, 64, 64, 4, 4)


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    activation: str = "none",
    save_z: bool = False,
) -> tuple[Tensor, Tensor]:
    """(R, K) and (N, K, C) of any strides -> y (R, C) and, if wanted, z (R, C)."""
    (R, _), (N, K, C) = x.shape, weight.shape
    y, z = x.new_empty(R, C), x.new_empty((R, C) if save_z else (0, C))
    plain = bias is None
    tile = _product_tile(x.dtype, _is_large(R, K, C), _whole(K, C, plain), plain)
    tiles = R // tile["BLOCK_R"] + N
    _product_kernel[(tiles * triton.cdiv(C, tile["BLOCK_C"]),)](
        x,
        weight,
        bias,
        offsets,
        y,
        z,
        tiles,
        N,
        K,
        C,
        *weight.stride(),
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        SAVE_Z=save_z,
        PRECISION=input_precision(x.dtype),
        BLOCK_N=search_block(N),
        GROUP=GROUP,
        **tile,
    )
    return y, z


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, activation: str, save_z: bool
) -> tuple[Tensor, Tensor]:
    return product(x.contiguous(), weight, bias.contiguous(), offsets, activation, save_z)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, saved: Tensor, offsets: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    g, dbias = _activation_gradient(dy, bias, saved, offsets, activation)
    dx, _ = product(g, weight.mT, None, offsets)
    return dx, weight_gradient(x.contiguous(), g, weight, offsets), dbias


def _activation_gradient(
    dy: Tensor, bias: Tensor, saved: Tensor, offsets: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """g (R, C), which is dy where there is no activation, and dbias (N, C)."""
    (R, C), N = dy.shape, len(bias)
    g = dy if activation == "none" else torch.empty_like(dy)
    dbias = bias.new_empty(N, C)
    tiles, columns = R // GRADIENT_ROWS + N, triton.cdiv(C, GRADIENT_COLUMNS)
    partial = dy.new_empty(tiles, C, dtype=torch.float32)
    _gradient_kernel[(tiles, columns)](
        dy,
        saved,
        offsets,
        g,
        partial,
        N,
        C,
        ACTIVATION=activation,
        BLOCK_R=GRADIENT_ROWS,
        BLOCK_C=GRADIENT_COLUMNS,
        BLOCK_N=search_block(N),
    )
    _bias_gradient_kernel[(N, columns)](
        partial, offsets, dbias, C, BLOCK_R=GRADIENT_ROWS, BLOCK_T=32, BLOCK_C=GRADIENT_COLUMNS
    )
    return g, dbias


def _other_weight_gradients(dtype: torch.dtype, narrow: bool) -> list[dict[str, int]]:
    if dtype == torch.float32:
        return []
    if narrow:
        return [_gradient_tile(64, 16, 4, 3), _gradient_tile(64, 32, 4, 2), _gradient_tile(64, 64, 4, 2)]
    return [_gradient_tile(128, 64, 8, 2), _gradient_tile(128, 32, 8, 4), _gradient_tile(64, 64, 4, 3)]


def _gradient_tile(block: int, R: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_D": block, "BLOCK_C": block, "BLOCK_R": R, "num_warps": warps, "num_stages": stages}


@decision(_other_weight_gradients)
def _weight_gradient_tile(dtype: torch.dtype, narrow: bool) -> dict[str, int]:
    if narrow or dtype == torch.float32:
        return _gradient_tile(64, 16, 4, 2)
    return _gradient_tile(128, 64, 8, 3)


def weight_gradient(x: Tensor, g: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """(N, D, C). Rows beyond a task's first chunk go to programs of their own, whose sums are added in order."""
    (R, _), (N, D, C) = x.shape, weight.shape
    tile = _weight_gradient_tile(x.dtype, min(D, C) <= NARROW)
    tiles = triton.cdiv(D, tile["BLOCK_D"]) * triton.cdiv(C, tile["BLOCK_C"])
    chunk = max(MIN_CHUNK, triton.cdiv(R * tiles, PROGRAMS))  # the partial sums take at most PROGRAMS tiles: 64 MiB
    dweight = weight.new_empty(N, D, C)
    partial = x.new_empty(R // chunk, D, C, dtype=torch.float32)
    for chunks, first in ((R // chunk, False), (N, True)):
        if chunks:
            _weight_gradient_kernel[(chunks * tiles,)](
                x,
                g,
                offsets,
                partial,
                dweight,
                N,
                D,
                C,
                chunk,
                FIRST=first,
                PRECISION=input_precision(x.dtype),
                BLOCK_N=search_block(N),
                GROUP=GROUP,
                **tile,
            )
    return dweight
