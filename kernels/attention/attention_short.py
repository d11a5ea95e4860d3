"""Attention over tiles of whole short sequences: in Triton, forward in one kernel and backward in one kernel.

A tile is 64 or 128 neighbouring tokens that hold whole sequences. A query sees the keys from `first` to `last`, bounds
that its sequence and the window around it give:

            keys of  a a a b b b b c          one tile of the sequences a, b and c, causal
    queries a        # . . . . . . .
            a        # # . . . . . .          All keys of a query are there at once: the softmax is taken in one go, and
            a        # # # . . . . .          the backward pass repeats it from q and k. Nothing but the inputs is kept
            b        . . . # . . . .          for it, delta_i = sum_j P_ij dP_ij needs no pass of its own, and dK and dV
            ...                               are complete in one program: no atomics, the same bits in every run.

One program does one tile and one key head, query head after query head of those that share it. The scores off the
diagonal are wasted arithmetic, of which a memory-bound kernel has enough to waste. There are two backward kernels,
because dK and dV of a tile and the scores of all its queries fit into registers only in the simplest case.

T tokens, H query heads, G key/value heads, D head width
Source: block-diagonal tiles as in Krell et al., arXiv:2107.02027.
"""

import torch
from torch import Tensor

from trunkline.kernels.attention.attention_scores import dropout_threshold, kept, tanh
from trunkline.kernels.attention.attention_tiles import short_backward, short_forward
from trunkline.kernels.attention.pack_plan import SHORT, TILE_SIZES
from trunkline.kernels.dispatch import INTERPRET, input_precision, padded_width, tl, triton

_WHY = "operands lie in registers on an A100: too much of 128 tokens beside heads wider than 64, or dropout"
SPILLS = {("_forward_kernel", 80): (180, _WHY), ("_backward_in_steps_kernel", 80): (40, _WHY)}


@triton.jit
def _queries(spans_ptr, start, end, left, right, ROWS: tl.constexpr):
    """Queries from `start` on, which of them the tile really has, and first and last key that each sees."""
    token = start + tl.arange(0, ROWS)
    in_tile = token < end
    # what fills the tile up sees itself, so that no row is without a maximum; nobody else sees it
    first = tl.load(spans_ptr + 2 * token, mask=in_tile, other=0)
    last = tl.load(spans_ptr + 2 * token + 1, mask=in_tile, other=0) - 1
    first = tl.where(in_tile, tl.maximum(first, token - left), token)
    last = tl.where(in_tile, tl.minimum(last, token + right), token)
    return token, in_tile, first, last


@triton.jit
def _pointers(ptr, start, head, token_stride, head_stride, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK, BLOCK_D) of one head; 32 bits reach over a tile, but not over T * H * D."""
    base = ptr + start.to(tl.int64) * token_stride + head.to(tl.int64) * head_stride
    return base + tl.arange(0, BLOCK)[:, None] * token_stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _scores(products, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores in units of log 2, and where there is a soft cap their tanh."""
    if HAS_SOFTCAP:
        squashed = tanh(products * (scale / softcap))
        return squashed * (softcap * 1.4426950408889634), squashed
    else:
        return products * (scale * 1.4426950408889634), products


# one compilation for all batches and settings: whatever the values of these, and however the lists of a plan lie
_jit = triton.jit(
    do_not_specialize=["left", "right", "threshold", "seed"], do_not_specialize_on_alignment=["tiles_ptr", "spans_ptr"]
)


@_jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, tiles_ptr, spans_ptr,
    q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride,
    G, scale, left, right, softcap, dropout_factor, threshold, seed,
    GROUP: tl.constexpr, D: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile, key_head = tl.program_id(0) // G, tl.program_id(0) % G  # heads of a tile lie side by side in memory
    start, end = tl.load(tiles_ptr + 2 * tile), tl.load(tiles_ptr + 2 * tile + 1)
    token, in_tile, first, last = _queries(spans_ptr, start, end, left, right, BLOCK)
    inside = in_tile[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    k = tl.load(_pointers(k_ptr, start, key_head, k_token_stride, k_head_stride, BLOCK, BLOCK_D), inside, 0.0)
    v = tl.load(_pointers(v_ptr, start, key_head, v_token_stride, v_head_stride, BLOCK, BLOCK_D), inside, 0.0)
    for member in range(GROUP):
        head = key_head * GROUP + member
        q = tl.load(_pointers(q_ptr, start, head, q_token_stride, q_head_stride, BLOCK, BLOCK_D), inside, 0.0)
        products = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)  # (BLOCK, BLOCK_D) -> (BLOCK, BLOCK)
        scores, _ = _scores(products, scale, softcap, HAS_SOFTCAP)
        seen = (token[None, :] >= first[:, None]) & (token[None, :] <= last[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        weights = tl.math.exp2(scores - tl.max(scores, 1)[:, None])
        total = tl.sum(weights, 1)
        if HAS_DROPOUT:
            weights = tl.where(kept(seed, token[:, None], token[None, :], head, threshold), weights, 0.0)
            total = total / dropout_factor
        out = tl.dot(weights.to(v.dtype), v, input_precision=INPUT_PRECISION) / total[:, None]
        out_at = _pointers(out_ptr, start, head, G * GROUP * D, D, BLOCK, BLOCK_D)
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), inside)


@_jit
def _backward_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, tiles_ptr, spans_ptr,
    dq_token_stride, dk_token_stride,
    q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride,
    G, scale, left, right, softcap, dropout_factor, threshold, seed,
    D: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All queries of a tile at once, where no other head has the same keys."""
    tile, head = tl.program_id(0) // G, tl.program_id(0) % G
    start, end = tl.load(tiles_ptr + 2 * tile), tl.load(tiles_ptr + 2 * tile + 1)
    token, in_tile, first, last = _queries(spans_ptr, start, end, left, right, BLOCK)
    inside = in_tile[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    k = tl.load(_pointers(k_ptr, start, head, k_token_stride, k_head_stride, BLOCK, BLOCK_D), inside, 0.0)
    v = tl.load(_pointers(v_ptr, start, head, v_token_stride, v_head_stride, BLOCK, BLOCK_D), inside, 0.0)
    q = tl.load(_pointers(q_ptr, start, head, q_token_stride, q_head_stride, BLOCK, BLOCK_D), inside, 0.0)
    dout = tl.load(_pointers(dout_ptr, start, head, G * D, D, BLOCK, BLOCK_D), inside, 0.0)
    products = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)  # (BLOCK, BLOCK_D) -> (BLOCK, BLOCK)
    scores, squashed = _scores(products, scale, softcap, HAS_SOFTCAP)
    seen = (token[None, :] >= first[:, None]) & (token[None, :] <= last[:, None])
    scores = tl.where(seen, scores, float("-inf"))
    weights = tl.math.exp2(scores - tl.max(scores, 1)[:, None])
    weights = weights * (1.0 / tl.sum(weights, 1))[:, None]
    dweights = tl.dot(dout, tl.trans(v), input_precision=INPUT_PRECISION)
    dropped = weights
    if HAS_DROPOUT:
        keep = kept(seed, token[:, None], token[None, :], head, threshold)
        dropped = tl.where(keep, weights * dropout_factor, 0.0)
        dweights = tl.where(keep, dweights * dropout_factor, 0.0)
    dv = tl.dot(tl.trans(dropped.to(v.dtype)), dout, input_precision=INPUT_PRECISION)
    delta = tl.sum(weights * dweights, 1)
    dscores = weights * (dweights - delta[:, None])
    if HAS_SOFTCAP:
        dscores = dscores * (1.0 - squashed * squashed)
    dscores = dscores.to(v.dtype)
    dq = tl.dot(dscores, k, input_precision=INPUT_PRECISION) * scale
    dk = tl.dot(tl.trans(dscores), q, input_precision=INPUT_PRECISION) * scale
    tl.store(_pointers(dq_ptr, start, head, dq_token_stride, D, BLOCK, BLOCK_D), dq.to(dq_ptr.dtype.element_ty), inside)
    tl.store(_pointers(dk_ptr, start, head, dk_token_stride, D, BLOCK, BLOCK_D), dk.to(dk_ptr.dtype.element_ty), inside)
    tl.store(_pointers(dv_ptr, start, head, dk_token_stride, D, BLOCK, BLOCK_D), dv.to(dv_ptr.dtype.element_ty), inside)


@_jit
def _backward_in_steps_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, tiles_ptr, spans_ptr,
    dq_token_stride, dk_token_stride,
    q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride,
    G, scale, left, right, softcap, dropout_factor, threshold, seed,
    GROUP: tl.constexpr, D: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A few queries at a time, of all heads that share the keys: beside them dK and dV of the tile fit into registers.

    Scores are transposed, (BLOCK, ROWS): weights and dscores then lie in registers as the products for dV and dK read
    them, and keys, not the few queries, fill the rows of the matrix units.
    """
    tile, key_head = tl.program_id(0) // G, tl.program_id(0) % G
    start, end = tl.load(tiles_ptr + 2 * tile), tl.load(tiles_ptr + 2 * tile + 1)
    key = start + tl.arange(0, BLOCK)
    in_head = (tl.arange(0, BLOCK_D) < D)[None, :]
    has_key = (key < end)[:, None] & in_head
    k = tl.load(_pointers(k_ptr, start, key_head, k_token_stride, k_head_stride, BLOCK, BLOCK_D), has_key, 0.0)
    v = tl.load(_pointers(v_ptr, start, key_head, v_token_stride, v_head_stride, BLOCK, BLOCK_D), has_key, 0.0)
    dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for step in range(GROUP * (BLOCK // ROWS)):
        head, row = key_head * GROUP + step % GROUP, start + step // GROUP * ROWS
        token, in_tile, first, last = _queries(spans_ptr, row, end, left, right, ROWS)
        inside = in_tile[:, None] & in_head
        q = tl.load(_pointers(q_ptr, row, head, q_token_stride, q_head_stride, ROWS, BLOCK_D), inside, 0.0)
        dout = tl.load(_pointers(dout_ptr, row, head, G * GROUP * D, D, ROWS, BLOCK_D), inside, 0.0)
        products = tl.dot(k, tl.trans(q), input_precision=INPUT_PRECISION)  # (BLOCK, BLOCK_D) -> (BLOCK, ROWS)
        scores, squashed = _scores(products, scale, softcap, HAS_SOFTCAP)
        seen = (key[:, None] >= first[None, :]) & (key[:, None] <= last[None, :])
        scores = tl.where(seen, scores, float("-inf"))
        weights = tl.math.exp2(scores - tl.max(scores, 0)[None, :])
        weights = weights * (1.0 / tl.sum(weights, 0))[None, :]
        dweights = tl.dot(v, tl.trans(dout), input_precision=INPUT_PRECISION)
        dropped = weights
        if HAS_DROPOUT:
            keep = kept(seed, token[None, :], key[:, None], head, threshold)
            dropped = tl.where(keep, weights * dropout_factor, 0.0)
            dweights = tl.where(keep, dweights * dropout_factor, 0.0)
        dv = tl.dot(dropped.to(v.dtype), dout, dv, input_precision=INPUT_PRECISION)
        delta = tl.sum(weights * dweights, 0)
        dscores = weights * (dweights - delta[None, :])
        if HAS_SOFTCAP:
            dscores = dscores * (1.0 - squashed * squashed)
        dscores = dscores.to(v.dtype)
        dk = tl.dot(dscores, q, dk, input_precision=INPUT_PRECISION)
        dq = tl.trans(tl.dot(tl.trans(k), dscores, input_precision=INPUT_PRECISION)) * scale  # (BLOCK_D, ROWS)
        dq_at = _pointers(dq_ptr, row, head, dq_token_stride, D, ROWS, BLOCK_D)
        tl.store(dq_at, dq.to(dq_ptr.dtype.element_ty), inside)
    dk_at = _pointers(dk_ptr, start, key_head, dk_token_stride, D, BLOCK, BLOCK_D)
    tl.store(dk_at, (dk * scale).to(dk_ptr.dtype.element_ty), has_key)
    dv_at = _pointers(dv_ptr, start, key_head, dk_token_stride, D, BLOCK, BLOCK_D)
    tl.store(dv_at, dv.to(dv_ptr.dtype.element_ty), has_key)


def widest(dtype: torch.dtype) -> int:
    """Of the heads that a tile holds: more would not fit into shared memory. 0: exact products of float32 are for no
    matrix unit, and what they need of a tile in registers is more than there is."""
    if dtype != torch.float32:
        return 128
    return 64 if INTERPRET or input_precision(dtype) == "tf32" else 0


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    spans: Tensor,
    tiles: Tensor,
    narrow_tiles: int,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout: float,
    seed: int,
) -> None:
    """Fills the rows of `out` that lie in tiles."""
    arguments = _arguments(q, k, v, scale, left, right, softcap, dropout, seed)
    group, plain = q.shape[1] // k.shape[1], not (softcap or dropout)
    for part, block in _by_width(tiles, narrow_tiles):
        grid, options = _launch(part, q, k, block, softcap, dropout)
        tile = short_forward(q.dtype, block, q.shape[2], group, plain)
        _forward_kernel[grid](q, k, v, out, part, spans, *arguments, GROUP=group, **options, **tile)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    spans: Tensor,
    tiles: Tensor,
    narrow_tiles: int,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout: float,
    seed: int,
) -> None:
    """Fills the rows of dq, dk and dv that lie in tiles; `dout` is contiguous, dq, dk and dv are so or parts of one."""
    arguments = _arguments(q, k, v, scale, left, right, softcap, dropout, seed)
    group, D = q.shape[1] // k.shape[1], q.shape[2]
    for part, block in _by_width(tiles, narrow_tiles):
        grid, options = _launch(part, q, k, block, softcap, dropout)
        tensors = (dout, q, k, v, dq, dk, dv, part, spans, dq.stride(0), dk.stride(0))
        tile = short_backward(q.dtype, block, D, group, softcap > 0, dropout > 0)
        if tile["ROWS"]:
            _backward_in_steps_kernel[grid](*tensors, *arguments, GROUP=group, **options, **tile)
        else:
            _backward_kernel[grid](*tensors, *arguments, **options, num_warps=tile["num_warps"])


def _by_width(tiles: Tensor, narrow_tiles: int) -> list[tuple[Tensor, int]]:
    parts = zip((tiles[:narrow_tiles], tiles[narrow_tiles:]), TILE_SIZES, strict=True)
    return [(part, block) for part, block in parts if len(part)]


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout: float,
    seed: int,
) -> tuple[int | float, ...]:
    """What both kernels take besides tensors and compile-time arguments."""
    strides = [stride for x in (q, k, v) for stride in x.stride()[:2]]
    window = [SHORT if bound < 0 else min(bound, SHORT) for bound in (left, right)]  # SHORT reaches over any tile
    return *strides, k.shape[1], scale, *window, softcap, 1 / (1 - dropout), dropout_threshold(dropout), seed


def _launch(part: Tensor, q: Tensor, k: Tensor, block: int, softcap: float, dropout: float) -> tuple[tuple, dict]:
    """Grid and compile-time arguments for the tiles of one width."""
    options = {
        "D": q.shape[2],
        "HAS_SOFTCAP": softcap > 0,
        "HAS_DROPOUT": dropout > 0,
        "INPUT_PRECISION": input_precision(q.dtype),
        "BLOCK": block,
        "BLOCK_D": padded_width(q.shape[2]),
        "num_stages": 1,  # query heads that are loaded ahead cost registers that the backward pass does not have
    }
    return (len(part) * k.shape[1],), options
