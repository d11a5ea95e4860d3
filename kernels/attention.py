"""Packed attention: softmax(q k^T * scale) v inside every sequence of a packed batch, never across sequences.

Backward, with P the probabilities, O the output and delta_i = sum_d dO_id O_id:
    dV = P^T dO,   dS = P * (dO V^T - delta),   dQ = scale * dS K,   dK = scale * dS^T Q.
Saved for backward: q, k, v, the output and the base-2 log-sum-exp of every query and head (4 bytes).

T tokens, H query heads, G key/value heads (H a multiple of G), D head width, S sequences
Source: Dao, FlashAttention-2, arXiv:2307.08691, section 3.1; block-diagonal tiles as in Krell et al., arXiv:2107.02027.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trunkline.kernels.dispatch import register

if TYPE_CHECKING:
    from trunkline.engine.packing import PackPlan

QUERY_BLOCK = 128  # queries of a long sequence that are worked on together
LOG2_E = math.log2(math.e)  # scores are kept in units of log 2: exp2 is the cheaper exponential everywhere


def attention_reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float) -> Tensor:
    """The definition: one sequence after the other, all scores at once."""
    bounds, repeat = cu_seqlens.tolist(), q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        queries = q[start:end].transpose(0, 1)  # (H, L, D)
        keys, values = (x[start:end].transpose(0, 1).repeat_interleave(repeat, 0) for x in (k, v))
        scores = queries @ keys.transpose(1, 2) * scale  # (H, L, D) @ (H, D, L) -> (H, L, L)
        if causal:
            future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        out[start:end] = (scores.softmax(-1) @ values).transpose(0, 1)
    return out


Problem = tuple[Tensor | slice, Tensor | slice, Tensor | None, Tensor | None]


def _problems(cu_seqlens: Tensor, tiles: Tensor, blocks: Tensor, causal: bool, dtype: torch.dtype) -> Iterator[Problem]:
    """Splits packed attention into dense problems: (queries, keys, bias, filler), the first two by token.

    All tiles of one width are one problem of n small matrices: queries and keys are indices (n, M). Slots beyond a
    tile's end repeat its last token; as keys they are hidden, as queries they are `filler` (n, M) and do not count.
    A block of a long sequence is a problem of its own: queries and keys are slices, without filler.
    The bias (n, M, last keys) is 0 where a query sees a key and -inf where it does not; keys before those are seen.
    """
    versions = [-1 if x.is_inference() else x._version for x in (cu_seqlens, tiles)]  # counts changes in place
    yield from _tile_problems(cu_seqlens, tiles, *versions, causal, dtype)
    bounds = cu_seqlens.tolist()
    for s, block in blocks.tolist():
        first = bounds[s] + block * QUERY_BLOCK
        last = min(first + QUERY_BLOCK, bounds[s + 1])
        if causal:
            yield slice(first, last), slice(bounds[s], last), _future(last - first, dtype, cu_seqlens.device), None
        else:
            yield slice(first, last), slice(bounds[s], bounds[s + 1]), None, None


@lru_cache(maxsize=2)  # every layer asks for the same, forward and backward
def _tile_problems(
    cu_seqlens: Tensor, tiles: Tensor, cu_version: int, tiles_version: int, causal: bool, dtype: torch.dtype
) -> list[Problem]:
    problems: list[Problem] = []
    device = cu_seqlens.device
    sequence = torch.bucketize(torch.arange(int(cu_seqlens[-1]), device=device), cu_seqlens[1:], right=True)  # (T,)
    length = tiles[:, 1] - tiles[:, 0]
    for low, high in ((0, 64), (64, 128)):
        start, end = tiles[(length > low) & (length <= high)].long().unbind(1)
        if len(start):
            slot = start[:, None] + torch.arange(high, device=device)  # (n, M)
            filler = slot >= end[:, None]
            index = slot.minimum(end[:, None] - 1)
            hidden = (sequence[index][:, :, None] != sequence[index][:, None]) | filler[:, None]  # (n, M, M)
            if causal:
                hidden |= slot[:, :, None] < slot[:, None]
            bias = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
            problems.append((index, index, bias, filler))
    return problems


@lru_cache(maxsize=8)
def _future(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(1, size, size): hides from every query the keys after it."""
    return torch.full((1, size, size), float("-inf"), dtype=dtype, device=device).triu_(1)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(T, G, D) -> (H, T, D), in float32 at least; key heads are repeated for the query heads that share them."""
    x = x.transpose(0, 1).to(torch.promote_types(x.dtype, torch.float32))
    return x.repeat_interleave(heads // len(x), 0) if len(x) < heads else x.contiguous()


def _take(x: Tensor, where: Tensor | slice) -> Tensor:
    """(H, T, D) -> (H * n, M, D)"""
    if isinstance(where, slice):
        return x[:, where]
    return x.index_select(1, where.flatten()).view(-1, where.shape[1], x.shape[2])


def _add(total: Tensor, where: Tensor | slice, x: Tensor) -> None:
    """Adds (H * n, M, D) to `total` (H, T, D)."""
    if isinstance(where, slice):
        total[:, where] += x
    else:
        total.index_add_(1, where.flatten(), x.view(len(total), -1, x.shape[2]))


def _scores(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    scores = q @ k.transpose(1, 2)  # (H * n, M, D) @ (H * n, D, N) -> (H * n, M, N)
    if bias is not None:
        n, M, seen_by_some = bias.shape
        scores.view(-1, n, M, scores.shape[2])[..., -seen_by_some:].add_(bias)
    return scores


def _clear(x: Tensor, filler: Tensor | None) -> Tensor:
    """Zeros the rows of (H * n, M, D) that are filler."""
    if filler is not None:
        x.view(-1, *filler.shape, x.shape[2]).masked_fill_(filler[:, :, None], 0.0)
    return x


def _forward_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, tiles: Tensor, blocks: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    dtype, H = q.dtype, q.shape[1]
    q, k, v = _by_head(q, H) * (scale * LOG2_E), _by_head(k, H), _by_head(v, H)
    out, lse = torch.zeros_like(q), torch.zeros_like(q[..., :1])
    for queries, keys, bias, filler in _problems(cu_seqlens, tiles, blocks, causal, q.dtype):
        scores = _scores(_take(q, queries), _take(k, keys), bias)
        top = scores.amax(-1, keepdim=True)
        weights = scores.sub_(top).exp2_()
        total = weights.sum(-1, keepdim=True)
        _add(out, queries, _clear((weights @ _take(v, keys)).div_(total), filler))
        _add(lse, queries, _clear(top + total.log2(), filler))
    return out.transpose(0, 1).to(dtype).contiguous(), lse.squeeze(-1)


def _backward_reference(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    tiles: Tensor,
    blocks: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, H, G = q.dtype, q.shape[1], k.shape[1]
    q, k, v, dout, out = (_by_head(x, H) for x in (q, k, v, dout, out))
    q = q * (scale * LOG2_E)
    delta, lse = (dout * out).sum(-1, keepdim=True), lse[..., None]  # (H, T, 1)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for queries, keys, bias, filler in _problems(cu_seqlens, tiles, blocks, causal, q.dtype):
        block_q, block_k = _take(q, queries), _take(k, keys)
        probabilities = _scores(block_q, block_k, bias).sub_(_take(lse, queries)).exp2_()
        block_dout, block_delta = _clear(_take(dout, queries), filler), _clear(_take(delta, queries), filler)
        _add(dv, keys, probabilities.transpose(1, 2) @ block_dout)
        dscores = (block_dout @ _take(v, keys).transpose(1, 2)).sub_(block_delta).mul_(probabilities)
        _add(dq, queries, dscores @ block_k)
        _add(dk, keys, dscores.transpose(1, 2) @ block_q)
    dq.mul_(scale)
    dk, dv = (x.unflatten(0, (G, H // G)).sum(1) for x in (dk.div_(LOG2_E), dv))
    dq, dk, dv = (x.transpose(0, 1).to(dtype).contiguous() for x in (dq, dk, dv))
    return dq, dk, dv


def _forward_fake(q, k, v, cu_seqlens, tiles, blocks, causal, scale):
    statistics = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[1::-1], dtype=statistics)


_forward = register("attention_forward", reference=_forward_reference, fake=_forward_fake)
_backward = register(
    "attention_backward",
    reference=_backward_reference,
    fake=lambda dout, q, k, v, *rest: tuple(x.new_empty(x.shape) for x in (q, k, v)),
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, tiles, blocks, causal, scale):
        out, lse = _forward(q, k, v, cu_seqlens, tiles, blocks, causal, scale)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, tiles, blocks)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    def backward(ctx, dout):
        return *_backward(dout, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None, None, None, None


def attention(q: Tensor, k: Tensor, v: Tensor, plan: "PackPlan", *, causal: bool, scale: float | None = None) -> Tensor:
    """Attention inside every sequence of a packed batch; nothing passes from one sequence to another.

    Args:
        q: (T, H, D) queries; float32, float16, bfloat16 or float64. Views are fine.
        k: (T, G, D) keys; G divides H: grouped-query attention.
        v: (T, G, D) values.
        plan: the batch's `PackPlan`; tokens outside all of its tiles and blocks get 0.
        causal: a token sees itself and what stands before it in its sequence; otherwise all of its sequence.
        scale: factor of the scores; default 1 / sqrt(D).

    Returns:
        (T, H, D), contiguous, the dtype of `q`. Sums are taken in float32 at least. Gradients flow to q, k and v.

    Raises:
        ValueError: shapes or dtypes that do not fit one another.
    """
    fits = q.ndim == 3 and k.shape == v.shape and k.shape[::2] == q.shape[::2]
    if not fits or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "attention: q must be (T, H, D) and k, v (T, G, D) with H a multiple of G, "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _Attention.apply(q, k, v, plan.cu_seqlens, plan.tiles, plan.blocks, causal, scale)
