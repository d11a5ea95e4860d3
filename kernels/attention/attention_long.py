"""Attention for the long sequences of a packed stream: tiles of queries against tiles of keys, one after the other.

With s_ij = scale * q_i k_j, soft-capped to c tanh(s_ij / c) where there is a cap c, m_i the log-sum-exp of the scores
that query i sees, P_ij = exp(s_ij - m_i), Z the dropout factors, 0 or 1 / (1 - p), and delta_i = sum_d dO_id O_id:
    O = (P * Z) V,   dV = (P * Z)^T dO,   dS = P * (Z * (dO V^T) - delta),   dQ = scale * dS K,   dK = scale * dS^T Q,
where a cap adds the factor 1 - tanh^2 to dS. Forward keeps a running maximum and a running sum of every query.
Saved for backward: q, k, v, O and the base-2 log-sum-exp (4 bytes a query and head).

Query i of a sequence with Lq queries and Lk keys stands at position i + Lk - Lq; it sees the keys from `left` before to
`right` behind that. Tiles that are seen whole, the bulk, are worked on without a mask; then those at the edges.

T queries, H query heads, G key heads, D head width; tiles of M queries (BLOCK_M) and N keys (BLOCK_N)
Source: Dao, FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2.
"""

from typing import Any

import torch
from torch import Tensor

from trunkline.kernels.attention.attention_blocks import at_head, cut, load_rows, store_rows, tile_of
from trunkline.kernels.attention.attention_scores import dropout_threshold, kept, tanh
from trunkline.kernels.attention.attention_tiles import block_tile, is_exact
from trunkline.kernels.attention.pack_plan import KEY_BLOCK, QUERY_BLOCK
from trunkline.kernels.dispatch import input_precision, padded_width, tl, triton

SPILLS = {("_query_gradient_kernel", 90): (8, "Triton 3.9: 64-wide heads have 128 registers, see `block_tile`")}
UNLIMITED = 2**30  # a window wider than any sequence
# one compilation for all batches and settings: whatever the values of these, and however the lists of a plan lie
_jit = triton.jit(
    do_not_specialize=["statistics_stride", "left", "right", "seed", "threshold"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr", "cu_seqlens_k_ptr", "blocks_ptr"],
)


@_jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_seqlens_ptr, cu_seqlens_k_ptr, blocks_ptr,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, statistics_stride,
    H, group, scale, left, right, softcap, seed, threshold, kept_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head against all keys that it sees."""
    program, head = tl.program_id(0) // H, tl.program_id(0) % H  # heads that share keys run together: one cache line
    m, q_start, queries, k_start, keys = tile_of(blocks_ptr, cu_seqlens_ptr, cu_seqlens_k_ptr, program, PARTS, BLOCK_M)
    if m >= queries:
        return
    q_at = at_head(q_ptr, q_start + m, head, q_stride_t, q_stride_h)
    q = load_rows(q_at, queries - m, q_stride_t, BLOCK_M, D, BLOCK_D, True)
    factor = (softcap if SOFTCAP else scale) * 1.4426950408889634  # log2(e): exp2 is the cheaper exponential
    row = m + tl.arange(0, BLOCK_M)
    position = (row + keys - queries)[:, None]
    nearest, farthest = m + keys - queries, tl.minimum(m + BLOCK_M, queries) - 1 + keys - queries
    first, last = tl.maximum(nearest - left, 0), tl.minimum(farthest + right + 1, keys)
    before, full, edges = cut(first, farthest - left, tl.minimum(nearest + right + 1, keys), last, BLOCK_N)

    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -1e38, tl.float32)  # finite: to a query that sees nothing, -inf - -inf would be NaN
    for MASKED in tl.static_range(2):
        for tile in range(edges if MASKED else full):
            n = first + (tile + (tl.where(tile < before, 0, full) if MASKED else before)) * BLOCK_N
            key = n + tl.arange(0, BLOCK_N)[None, :]
            k_at = at_head(k_ptr, k_start + n, head // group, k_stride_t, k_stride_h)
            k = load_rows(k_at, keys - n, k_stride_t, BLOCK_N, D, BLOCK_D, MASKED)
            scores = tl.dot(q, k.T, input_precision=PRECISION)  # (M, D) @ (D, N) -> (M, N)
            if SOFTCAP:
                scores = tanh(scores * (scale / softcap))
            if MASKED:
                visible = (key >= position - left) & (key <= position + right) & (key < keys)
                scores = tl.where(visible, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1) * factor)
            weights = tl.math.exp2(scores * factor - higher[:, None])
            decay = tl.math.exp2(top - higher)
            total = total * decay + tl.sum(weights, 1)
            top = higher
            if DROPOUT:
                weights = tl.where(kept(seed, (q_start + row)[:, None], k_start + key, head, threshold), weights, 0.0)
            v_at = at_head(v_ptr, k_start + n, head // group, v_stride_t, v_stride_h)
            v = load_rows(v_at, keys - n, v_stride_t, BLOCK_N, D, BLOCK_D, MASKED)
            out = out * decay[:, None]
            out = tl.dot(weights.to(v.dtype), v, out, input_precision=PRECISION)  # (M, N) @ (N, D) -> (M, D)

    seeing = total > 0
    total = tl.where(seeing, total, 1.0)
    lse = tl.where(seeing, top + tl.math.log2(total), 0.0)
    tl.store(lse_ptr + head.to(tl.int64) * statistics_stride + q_start + row, lse, mask=row < queries)
    share = (kept_scale if DROPOUT else 1.0) / total
    out_at = at_head(out_ptr, q_start + m, head, H * D, D)
    store_rows(out_at, out * share[:, None], queries - m, H * D, BLOCK_M, D, BLOCK_D)


@_jit
def _query_gradient_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr, cu_seqlens_ptr, cu_seqlens_k_ptr, blocks_ptr,
    dout_stride_t, dout_stride_h, q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    dq_stride_t, statistics_stride, H, group, scale, left, right, softcap, seed, threshold, kept_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head against all keys that it sees: delta and dQ."""
    program, head = tl.program_id(0) // H, tl.program_id(0) % H
    m, q_start, queries, k_start, keys = tile_of(blocks_ptr, cu_seqlens_ptr, cu_seqlens_k_ptr, program, PARTS, BLOCK_M)
    if m >= queries:
        return
    q_at = at_head(q_ptr, q_start + m, head, q_stride_t, q_stride_h)
    q = load_rows(q_at, queries - m, q_stride_t, BLOCK_M, D, BLOCK_D, True)
    dout_at = at_head(dout_ptr, q_start + m, head, dout_stride_t, dout_stride_h)
    dout = load_rows(dout_at, queries - m, dout_stride_t, BLOCK_M, D, BLOCK_D, True)
    out = load_rows(at_head(out_ptr, q_start + m, head, H * D, D), queries - m, H * D, BLOCK_M, D, BLOCK_D, True)
    row = m + tl.arange(0, BLOCK_M)
    statistics = head.to(tl.int64) * statistics_stride + q_start + row
    lse = tl.load(lse_ptr + statistics, mask=row < queries, other=0.0)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + statistics, delta, mask=row < queries)
    factor = (softcap if SOFTCAP else scale) * 1.4426950408889634
    position = (row + keys - queries)[:, None]
    nearest, farthest = m + keys - queries, tl.minimum(m + BLOCK_M, queries) - 1 + keys - queries
    first, last = tl.maximum(nearest - left, 0), tl.minimum(farthest + right + 1, keys)
    before, full, edges = cut(first, farthest - left, tl.minimum(nearest + right + 1, keys), last, BLOCK_N)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for MASKED in tl.static_range(2):
        for tile in range(edges if MASKED else full):
            n = first + (tile + (tl.where(tile < before, 0, full) if MASKED else before)) * BLOCK_N
            key = n + tl.arange(0, BLOCK_N)[None, :]
            k_at = at_head(k_ptr, k_start + n, head // group, k_stride_t, k_stride_h)
            k = load_rows(k_at, keys - n, k_stride_t, BLOCK_N, D, BLOCK_D, MASKED)
            scores = tl.dot(q, k.T, input_precision=PRECISION)  # (M, D) @ (D, N) -> (M, N)
            if SOFTCAP:
                scores = tanh(scores * (scale / softcap))
            weights = tl.math.exp2(scores * factor - lse[:, None])
            if MASKED:
                visible = (key >= position - left) & (key <= position + right) & (key < keys)
                weights = tl.where(visible, weights, 0.0)
            v_at = at_head(v_ptr, k_start + n, head // group, v_stride_t, v_stride_h)
            v = load_rows(v_at, keys - n, v_stride_t, BLOCK_N, D, BLOCK_D, MASKED)
            dweights = tl.dot(dout, v.T, input_precision=PRECISION)
            if DROPOUT:
                keep = kept(seed, (q_start + row)[:, None], k_start + key, head, threshold)
                dweights = tl.where(keep, dweights * kept_scale, 0.0)
            dscores = weights * (dweights - delta[:, None])
            if SOFTCAP:
                dscores *= 1 - scores * scores
            dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)  # (M, N) @ (N, D) -> (M, D)

    dq_at = at_head(dq_ptr, q_start + m, head, dq_stride_t, D)
    store_rows(dq_at, dq * scale, queries - m, dq_stride_t, BLOCK_M, D, BLOCK_D)


@_jit
def _key_gradient_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_seqlens_ptr, cu_seqlens_k_ptr, blocks_ptr,
    dout_stride_t, dout_stride_h, q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    dk_stride_t, statistics_stride, G, group, scale, left, right, softcap, seed, threshold, kept_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one key head against all queries that see it, of all heads that share it: dK and dV.

    Scores are transposed, (N, M): weights and dscores then lie in registers as the next products read them.
    """
    program, key_head = tl.program_id(0) // G, tl.program_id(0) % G
    n, q_start, queries, k_start, keys = tile_of(blocks_ptr, cu_seqlens_ptr, cu_seqlens_k_ptr, program, PARTS, BLOCK_N)
    if n >= keys:
        return
    k_at = at_head(k_ptr, k_start + n, key_head, k_stride_t, k_stride_h)
    k = load_rows(k_at, keys - n, k_stride_t, BLOCK_N, D, BLOCK_D, True)
    v_at = at_head(v_ptr, k_start + n, key_head, v_stride_t, v_stride_h)
    v = load_rows(v_at, keys - n, v_stride_t, BLOCK_N, D, BLOCK_D, True)
    factor = (softcap if SOFTCAP else scale) * 1.4426950408889634
    key = (n + tl.arange(0, BLOCK_N))[:, None]
    nearest, farthest = n + queries - keys, tl.minimum(n + BLOCK_N, keys) - 1 + queries - keys  # as queries
    first, last = tl.maximum(nearest - right, 0), tl.minimum(farthest + left + 1, queries)
    before, full, edges = cut(first, farthest - right, tl.minimum(nearest + left + 1, queries), last, BLOCK_M)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for MASKED in tl.static_range(2):
        for step in range(group * (edges if MASKED else full)):  # a loop inside a loop would take more registers
            head, tile = key_head * group + step % group, step // group
            m = first + (tile + (tl.where(tile < before, 0, full) if MASKED else before)) * BLOCK_M
            row = m + tl.arange(0, BLOCK_M)  # those beyond the last query are zeros and add nothing
            q_at = at_head(q_ptr, q_start + m, head, q_stride_t, q_stride_h)
            q = load_rows(q_at, queries - m, q_stride_t, BLOCK_M, D, BLOCK_D, MASKED)
            dout_at = at_head(dout_ptr, q_start + m, head, dout_stride_t, dout_stride_h)
            dout = load_rows(dout_at, queries - m, dout_stride_t, BLOCK_M, D, BLOCK_D, MASKED)
            statistics = head.to(tl.int64) * statistics_stride + (q_start + m) + tl.arange(0, BLOCK_M)
            lse = tl.load(lse_ptr + statistics, mask=row < queries, other=0.0)
            delta = tl.load(delta_ptr + statistics, mask=row < queries, other=0.0)
            scores = tl.dot(k, q.T, input_precision=PRECISION)  # (N, D) @ (D, M) -> (N, M)
            if SOFTCAP:
                scores = tanh(scores * (scale / softcap))
            weights = tl.math.exp2(scores * factor - lse[None, :])
            if MASKED:
                position = (row + keys - queries)[None, :]
                weights = tl.where((key >= position - left) & (key <= position + right), weights, 0.0)
            dweights = tl.dot(v, dout.T, input_precision=PRECISION)
            kept_weights = weights
            if DROPOUT:
                keep = kept(seed, (q_start + row)[None, :], k_start + key, head, threshold)
                kept_weights = tl.where(keep, weights, 0.0)
                dweights = tl.where(keep, dweights * kept_scale, 0.0)
            dv = tl.dot(kept_weights.to(dout.dtype), dout, dv, input_precision=PRECISION)  # (N, M) @ (M, D)
            dscores = weights * (dweights - delta[None, :])
            if SOFTCAP:
                dscores *= 1 - scores * scores
            dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)  # (N, M) @ (M, D) -> (N, D)

    if DROPOUT:
        dv *= kept_scale
    dk_at = at_head(dk_ptr, k_start + n, key_head, dk_stride_t, D)
    store_rows(dk_at, dk * scale, keys - n, dk_stride_t, BLOCK_N, D, BLOCK_D)
    dv_at = at_head(dv_ptr, k_start + n, key_head, dk_stride_t, D)
    store_rows(dv_at, dv, keys - n, dk_stride_t, BLOCK_N, D, BLOCK_D)


def widest(dtype: torch.dtype) -> int:
    """Of the heads that the kernels hold in one piece."""
    return 128 if is_exact(dtype) else 256


def _settings(
    q: Tensor,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout: float,
    seed: int,
) -> dict[str, Any]:
    """The arguments that all kernels have in common."""
    D = q.shape[2]
    return {
        "scale": scale,
        "left": min(window_left, UNLIMITED) if window_left >= 0 else UNLIMITED,
        "right": min(window_right, UNLIMITED) if window_right >= 0 else UNLIMITED,
        "softcap": softcap,
        "seed": int(seed),
        "threshold": dropout_threshold(dropout),
        "kept_scale": 1 / (1 - dropout),
        "D": D,
        "BLOCK_D": padded_width(D),
        "SOFTCAP": softcap > 0,
        "DROPOUT": dropout > 0,
        "PRECISION": input_precision(q.dtype),
    }


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    blocks: Tensor,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout: float,
    seed: int,
) -> None:
    """Fills `out` and `lse` for the queries of `blocks`; other rows are left as they are.

    Args:
        q: (T, H, D) queries, float32, float16 or bfloat16; D up to 256. q, k and v may be views of dense heads.
        k: (Tk, G, D) keys; G divides H.
        v: (Tk, G, D) values.
        out: (T, H, D), contiguous, the dtype of `q`.
        lse: (H, T), contiguous, float32: base-2 log-sum-exp of the scores in units of log 2; 0 where no key is seen.
        cu_seqlens: (S + 1,) int32, first query of every sequence and the end of the last.
        cu_seqlens_k: (S + 1,) int32, the same for the keys.
        blocks: (n, 2) int32, sequence and block of 128 queries inside it.
        scale: factor of the scores, above 0.
        window_left: how many keys before its position a query sees; -1: all.
        window_right: the same behind it; 0: causal.
        softcap: c; 0: none.
        dropout: probability of leaving a weight out, below 1.
        seed: of dropout.
    """
    if not len(blocks):
        return
    H, G = q.shape[1], k.shape[1]
    tile = block_tile("forward", q.dtype, q.shape[2], not (softcap or dropout))
    parts = QUERY_BLOCK // tile["BLOCK_M"]  # programs that share a block
    settings = _settings(q, scale, window_left, window_right, softcap, dropout, seed)
    _forward_kernel[(len(blocks) * parts * H,)](
        q, k, v, out, lse, cu_seqlens, cu_seqlens_k, blocks, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        lse.shape[1], H, H // G, PARTS=parts, **settings, **tile,
    )  # fmt: skip


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    blocks: Tensor,
    key_blocks: Tensor,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout: float,
    seed: int,
) -> None:
    """Fills `dq` for the queries of `blocks`, `dk` and `dv` for the keys of `key_blocks`; other rows are left.

    dQ has a kernel of its own, which computes the scores anew: 7 products instead of 5. Summed up beside dK and dV, by
    atomics, it would need a float32 copy of twice the size of dQ, zeroed before and rounded after, and registers that
    a head dim of 128 does not leave. So the bits are the same in every run.

    Args as `forward`, and:
        dout: (T, H, D), a view of dense heads.
        dq: (T, H, D), contiguous or, as dk and dv, heads of one contiguous tensor.
        dk: (Tk, G, D).
        dv: (Tk, G, D).
        key_blocks: (n, 2) int32, sequence and block of 128 keys inside it.
    """
    H, G = q.shape[1], k.shape[1]
    strides = [stride for x in (dout, q, k, v) for stride in x.stride()[:2]]
    settings = _settings(q, scale, window_left, window_right, softcap, dropout, seed)
    delta = torch.empty_like(lse)
    if len(blocks):
        tile = block_tile("query gradient", q.dtype, q.shape[2], not (softcap or dropout))
        parts = QUERY_BLOCK // tile["BLOCK_M"]  # programs that share a block
        _query_gradient_kernel[(len(blocks) * parts * H,)](
            dout, q, k, v, out, lse, delta, dq, cu_seqlens, cu_seqlens_k, blocks, *strides,
            dq.stride(0), lse.shape[1], H, H // G, PARTS=parts, **settings, **tile,
        )  # fmt: skip
    if len(key_blocks):
        tile = block_tile("key gradient", q.dtype, q.shape[2], not (softcap or dropout))
        parts = KEY_BLOCK // tile["BLOCK_N"]
        _key_gradient_kernel[(len(key_blocks) * parts * G,)](
            dout, q, k, v, lse, delta, dk, dv, cu_seqlens, cu_seqlens_k, key_blocks, *strides,
            dk.stride(0), lse.shape[1], G, H // G, PARTS=parts, **settings, **tile,
        )  # fmt: skip
