"""Where the tiles of long sequences lie in a packed stream, and how their rows are loaded and stored."""

from trunkline.kernels.dispatch import tl, triton


@triton.jit
def tile_of(blocks_ptr, cu_seqlens_ptr, cu_seqlens_k_ptr, program, PARTS: tl.constexpr, SIZE: tl.constexpr):
    """Where the program's tile begins in its sequence; the sequence's first query, queries, first key and keys."""
    item = blocks_ptr + 2 * (program // PARTS)
    sequence, block = tl.load(item), tl.load(item + 1)
    q_start, k_start = tl.load(cu_seqlens_ptr + sequence), tl.load(cu_seqlens_k_ptr + sequence)
    q_end, k_end = tl.load(cu_seqlens_ptr + sequence + 1), tl.load(cu_seqlens_k_ptr + sequence + 1)
    return (block * PARTS + program % PARTS) * SIZE, q_start, q_end - q_start, k_start, k_end - k_start


@triton.jit
def cut(first, full_first, full_last, last, SIZE: tl.constexpr):
    """Tiles of [first, last): at the edge before those in [full_first, full_last), in there, at the edge in all."""
    tiles = tl.cdiv(tl.maximum(last - first, 0), SIZE)
    before = tl.minimum(tl.cdiv(tl.maximum(full_first - first, 0), SIZE), tiles)
    full = tl.maximum(tl.maximum(full_last - first, 0) // SIZE - before, 0)
    return before, full, tiles - full


@triton.jit
def at_head(ptr, token, head, stride_t, stride_h):
    """Of a tile, and so anew for every tile: that of a sequence, kept for all its tiles, would take registers."""
    return ptr + token.to(tl.int64) * stride_t + head.to(tl.int64) * stride_h  # passes 2^31 in long streams


@triton.jit
def load_rows(ptr, rows, stride, SIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """The rows at `ptr` as (SIZE, BLOCK_D); zeros beyond column D and, if MASKED, beyond as many `rows`."""
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, BLOCK_D)[None, :]
    at = ptr + (row * stride + column)
    if MASKED:
        return tl.load(at, mask=(row < rows) & (column < D), other=0.0)
    elif D < BLOCK_D:
        return tl.load(at, mask=(row < SIZE) & (column < D), other=0.0)
    else:
        return tl.load(at)


@triton.jit
def store_rows(ptr, x, rows, stride, SIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, BLOCK_D)[None, :]
    at = ptr + (row * stride + column)
    tl.store(at, x.to(ptr.dtype.element_ty), mask=(row < rows) & (column < D))
