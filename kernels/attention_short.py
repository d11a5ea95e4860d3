"""Attention over tiles of whole short sequences: two Triton kernels, one forward and one backward.

A tile is 64 or 128 neighbouring tokens that hold whole sequences. A query sees the keys from `first` to `last`, bounds
that its sequence and the window around it give:

            keys of  a a a b b b b c          one tile of the sequences a, b and c, causal
    queries a        # . . . . . . .
            a        # # . . . . . .          All keys of a query are there at once: the softmax is taken in one go, and
            a        # # # . . . . .          the backward pass repeats it from q and k. Nothing but the inputs is kept
            b        . . . # . . . .          for it, delta_i = sum_j P_ij dP_ij needs no pass of its own, and dK and dV
            ...                               are complete in one program: no atomics, the same bits in every run.

One program does one tile and one key head, query head after query head of those that share it. The scores off the
diagonal are wasted arithmetic, of which a memory-bound kernel has enough to waste.

T tokens, H query heads, G key/value heads, D head width
Source: block-diagonal tiles as in Krell et al., arXiv:2107.02027.
"""

from torch import Tensor

from trunkline.kernels.attention_scores import dropout_threshold, kept, tanh
from trunkline.kernels.dispatch import input_precision, padded_width, tl, triton
from trunkline.kernels.pack_plan import SHORT, TILE_SIZES


@triton.jit
def _place(tiles_ptr, spans_ptr, tile, left, right, BLOCK: tl.constexpr):
    """Of a tile: its first token, its tokens, which of them it really has, and first and last key that each sees."""
    start, end = tl.load(tiles_ptr + 2 * tile), tl.load(tiles_ptr + 2 * tile + 1)
    token = start + tl.arange(0, BLOCK)
    in_tile = token < end
    # what fills the tile up sees itself, so that no row is without a maximum; nobody else sees it
    first = tl.load(spans_ptr + 2 * token, mask=in_tile, other=0)
    last = tl.load(spans_ptr + 2 * token + 1, mask=in_tile, other=0) - 1
    first = tl.where(in_tile, tl.maximum(first, token - left), token)
    last = tl.where(in_tile, tl.minimum(last, token + right), token)
    return start, token, in_tile, first, last


@triton.jit
def _pointers(ptr, start, head, token_stride, head_stride, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK, BLOCK_D) of one head; 32 bits reach over a tile, but not over T * H * D."""
    base = ptr + start.to(tl.int64) * token_stride + head.to(tl.int64) * head_stride
    return base + tl.arange(0, BLOCK)[:, None] * token_stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _scores(q, k, token, first, last, scale, softcap, HAS_SOFTCAP: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """Scores in units of log 2, -inf where a query does not see a key, and tanh where there is a soft cap."""
    scores = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION) * scale  # (BLOCK, BLOCK_D) -> (BLOCK, BLOCK)
    squashed = scores
    if HAS_SOFTCAP:
        squashed = tanh(scores / softcap)
        scores = squashed * softcap
    seen = (token[None, :] >= first[:, None]) & (token[None, :] <= last[:, None])
    return tl.where(seen, scores * 1.4426950408889634, float("-inf")), squashed


_SCALARS = ["left", "right", "threshold", "seed"]  # one kernel for all their values
_jit = triton.jit(do_not_specialize=_SCALARS, do_not_specialize_on_alignment=["tiles_ptr"])


@_jit
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    tiles_ptr,
    spans_ptr,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    G,
    scale,
    left,
    right,
    softcap,
    dropout_factor,
    threshold,
    seed,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile, key_head = tl.program_id(0) // G, tl.program_id(0) % G  # heads of a tile lie side by side in memory
    start, token, in_tile, first, last = _place(tiles_ptr, spans_ptr, tile, left, right, BLOCK)
    inside = in_tile[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    k = tl.load(_pointers(k_ptr, start, key_head, k_token_stride, k_head_stride, BLOCK, BLOCK_D), inside, 0.0)
    v = tl.load(_pointers(v_ptr, start, key_head, v_token_stride, v_head_stride, BLOCK, BLOCK_D), inside, 0.0)
    for member in range(GROUP):
        head = key_head * GROUP + member
        q = tl.load(_pointers(q_ptr, start, head, q_token_stride, q_head_stride, BLOCK, BLOCK_D), inside, 0.0)
        scores, _ = _scores(q, k, token, first, last, scale, softcap, HAS_SOFTCAP, INPUT_PRECISION)
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
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    tiles_ptr,
    spans_ptr,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    G,
    scale,
    left,
    right,
    softcap,
    dropout_factor,
    threshold,
    seed,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile, key_head = tl.program_id(0) // G, tl.program_id(0) % G
    start, token, in_tile, first, last = _place(tiles_ptr, spans_ptr, tile, left, right, BLOCK)
    inside = in_tile[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    k = tl.load(_pointers(k_ptr, start, key_head, k_token_stride, k_head_stride, BLOCK, BLOCK_D), inside, 0.0)
    v = tl.load(_pointers(v_ptr, start, key_head, v_token_stride, v_head_stride, BLOCK, BLOCK_D), inside, 0.0)
    dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for member in range(GROUP):
        head = key_head * GROUP + member
        q = tl.load(_pointers(q_ptr, start, head, q_token_stride, q_head_stride, BLOCK, BLOCK_D), inside, 0.0)
        dout = tl.load(_pointers(dout_ptr, start, head, G * GROUP * D, D, BLOCK, BLOCK_D), inside, 0.0)
        scores, squashed = _scores(q, k, token, first, last, scale, softcap, HAS_SOFTCAP, INPUT_PRECISION)
        weights = tl.math.exp2(scores - tl.max(scores, 1)[:, None])
        weights = weights * (1.0 / tl.sum(weights, 1))[:, None]
        dweights = tl.dot(dout, tl.trans(v), input_precision=INPUT_PRECISION)
        dropped = weights
        if HAS_DROPOUT:
            keep = kept(seed, token[:, None], token[None, :], head, threshold)
            dropped = tl.where(keep, weights * dropout_factor, 0.0)
            dweights = tl.where(keep, dweights * dropout_factor, 0.0)
        dv = tl.dot(tl.trans(dropped.to(v.dtype)), dout, dv, input_precision=INPUT_PRECISION)
        delta = tl.sum(weights * dweights, 1)
        dscores = weights * (dweights - delta[:, None])
        if HAS_SOFTCAP:
            dscores = dscores * (1.0 - squashed * squashed)
        dscores = dscores.to(v.dtype)
        dq = tl.dot(dscores, k, input_precision=INPUT_PRECISION) * scale
        dq_at = _pointers(dq_ptr, start, head, G * GROUP * D, D, BLOCK, BLOCK_D)
        tl.store(dq_at, dq.to(dq_ptr.dtype.element_ty), inside)
        dk = tl.dot(tl.trans(dscores), q, dk, input_precision=INPUT_PRECISION)
    dk_at = _pointers(dk_ptr, start, key_head, G * D, D, BLOCK, BLOCK_D)
    tl.store(dk_at, (dk * scale).to(dk_ptr.dtype.element_ty), inside)
    dv_at = _pointers(dv_ptr, start, key_head, G * D, D, BLOCK, BLOCK_D)
    tl.store(dv_at, dv.to(dv_ptr.dtype.element_ty), inside)


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
    for part, block in _by_width(tiles, narrow_tiles):
        grid, options = _launch(part, q, k, block, softcap, dropout)
        _forward_kernel[grid](q, k, v, out, part, spans, *arguments, **options)


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
    """Fills the rows of dq, dk and dv that lie in tiles; `dout` is contiguous."""
    arguments = _arguments(q, k, v, scale, left, right, softcap, dropout, seed)
    for part, block in _by_width(tiles, narrow_tiles):
        grid, options = _launch(part, q, k, block, softcap, dropout)
        _backward_kernel[grid](dout, q, k, v, dq, dk, dv, part, spans, *arguments, **options)


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
        "GROUP": q.shape[1] // k.shape[1],
        "D": q.shape[2],
        "HAS_SOFTCAP": softcap > 0,
        "HAS_DROPOUT": dropout > 0,
        "INPUT_PRECISION": input_precision(q.dtype),
        "BLOCK": block,
        "BLOCK_D": padded_width(q.shape[2]),
        "num_warps": block // 16,
        "num_stages": 1,  # query heads that are loaded ahead cost registers that the backward pass does not have
    }
    return (len(part) * k.shape[1],), options
