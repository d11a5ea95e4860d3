"""Packed attention in plain PyTorch: the reference that serves where no kernel does, fast on a CPU.

A packed batch is split into dense problems. All tiles of one width are one batched problem; a block of a longer
sequence is one of its own, with only the keys that some of its queries see. Every problem is a handful of operations.

T tokens, K keys, S sequences, H query heads, G key/value heads, D head width, M queries and N keys of a problem
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from trunkline.kernels.attention_scores import kept_reference
from trunkline.kernels.pack_plan import QUERY_BLOCK, Layout

LOG2_E = math.log2(math.e)  # scores are kept in units of log 2: exp2 is the cheaper exponential everywhere


class Problem(NamedTuple):
    """n small attention problems of one shape."""

    queries: Tensor | slice  # by token: (n, M), or a slice where n is 1
    keys: Tensor | slice  # (n, N)
    bias: Tensor | None  # (n, M, last keys): 0 where a query sees a key, -inf where it does not; keys before are seen
    filler: Tensor | None = None  # (n, M) slots beyond a tile's end: they repeat its last token and do not count


def _problems(layout: list[Tensor], narrow_tiles: int, left: int, right: int, dtype: torch.dtype) -> Iterator[Problem]:
    spans, tiles, blocks, cu_seqlens, _, cu_seqlens_k = Layout.of(layout)
    if len(tiles):
        versions = [-1 if x.is_inference() else x._version for x in (spans, tiles)]  # counts changes in place
        yield from _tile_problems(spans, tiles, narrow_tiles, *versions, left, right, dtype)
    bounds, bounds_k = cu_seqlens.tolist(), cu_seqlens_k.tolist()
    for s, block in blocks.tolist():
        first = bounds[s] + block * QUERY_BLOCK
        last = min(first + QUERY_BLOCK, bounds[s + 1])
        stands = first + bounds_k[s + 1] - bounds[s + 1]  # at which key; the last query stands at the last key
        if right >= 0 and stands + right < bounds_k[s]:  # queries before all keys see nothing: their output stays 0
            first, stands = first + bounds_k[s] - right - stands, bounds_k[s] - right
        first_k = max(stands - left, bounds_k[s]) if left >= 0 else bounds_k[s]
        last_k = min(stands + last - first + right, bounds_k[s + 1]) if right >= 0 else bounds_k[s + 1]
        if last > first and last_k > first_k:
            bias = _edge(last - first, last_k - first_k, stands - first_k, left, right, dtype, tiles.device)
            yield Problem(slice(first, last), slice(first_k, last_k), bias)


@lru_cache(maxsize=2)  # every layer asks for the same, forward and backward
def _tile_problems(
    spans: Tensor,
    tiles: Tensor,
    narrow_tiles: int,
    spans_version: int,
    tiles_version: int,
    left: int,
    right: int,
    dtype: torch.dtype,
) -> list[Problem]:
    problems: list[Problem] = []
    device = tiles.device
    for width, of_width in ((64, tiles[:narrow_tiles]), (128, tiles[narrow_tiles:])):
        of_width = of_width[of_width[:, 0] < of_width[:, 1]]  # empty ones fill a plan up to a fixed shape
        if len(of_width):
            start, end = of_width.long().unbind(1)
            slot = start[:, None] + torch.arange(width, device=device)  # (n, M)
            filler = slot >= end[:, None]
            index = slot.minimum(end[:, None] - 1)
            sequence = spans[index, 0]  # named by its first token
            hidden = (sequence[:, :, None] != sequence[:, None]) | filler[:, None]  # (n, M, M)
            hidden |= _outside(index[:, :, None], index[:, None], left, right)
            bias = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
            problems.append(Problem(index, index, bias, filler))
    return problems


def _edge(
    queries: int, keys: int, stands: int, left: int, right: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """The bias (1, queries, last keys) of a block whose first query stands at key `stands`; None where all are seen."""
    seen_by_all = 0 if left >= 0 else keys if right < 0 else min(max(stands + right + 1, 0), keys)
    if seen_by_all == keys:
        return None
    return _bias(queries, keys - seen_by_all, stands - seen_by_all, left, right, dtype, device)


@lru_cache(maxsize=64)  # most blocks of a batch have the same
def _bias(
    queries: int, keys: int, stands: int, left: int, right: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    query, key = stands + torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)
    hidden = _outside(query, key, left, right)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))[None]


def _outside(query: Tensor, key: Tensor, left: int, right: int) -> Tensor:
    """Which keys lie outside the window around the position of a query; -1 is no bound."""
    hidden = torch.zeros_like(query - key, dtype=torch.bool)
    if left >= 0:
        hidden |= key < query - left
    if right >= 0:
        hidden |= key > query + right
    return hidden


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


def _hide(scores: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        n, M, edge = bias.shape
        scores.view(-1, n, M, scores.shape[2])[..., -edge:].add_(bias)
    return scores


def _clear(x: Tensor, filler: Tensor | None) -> Tensor:
    """Zeros the rows of (H * n, M, D) that are filler."""
    if filler is not None:
        x.view(-1, *filler.shape, x.shape[2]).masked_fill_(filler[:, :, None], 0.0)
    return x


def _kept(problem: Problem, heads: int, dropout: float, seed: Tensor, device: torch.device) -> Tensor:
    """(H * n, M, N): 1 / (1 - dropout) for the weights that dropout keeps, 0 for the others."""
    query, key = (
        torch.arange(x.start, x.stop, device=device)[None] if isinstance(x, slice) else x
        for x in (problem.queries, problem.keys)
    )
    head = torch.arange(heads, device=device)[:, None, None, None]
    kept = kept_reference(int(seed), query[:, :, None], key[:, None], head, dropout)
    return kept.flatten(0, 1) / (1 - dropout)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: list[Tensor],
    narrow_tiles: int,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dtype, H = q.dtype, q.shape[1]
    q, k, v = _by_head(q, H) * (scale / softcap if softcap else scale * LOG2_E), _by_head(k, H), _by_head(v, H)
    out, lse = torch.zeros_like(q), torch.zeros_like(q[..., :1])
    for problem in _problems(layout, narrow_tiles, left, right, q.dtype):
        queries, keys, bias, filler = problem
        scores = _take(q, queries) @ _take(k, keys).transpose(1, 2)  # (H * n, M, D) @ (H * n, D, N) -> (H * n, M, N)
        if softcap:
            scores.tanh_().mul_(softcap * LOG2_E)
        scores = _hide(scores, bias)
        top = scores.amax(-1, keepdim=True)
        weights = scores.sub_(top).exp2_()
        total = weights.sum(-1, keepdim=True)
        if seed is not None:
            weights.mul_(_kept(problem, H, dropout, seed, q.device))
        _add(out, queries, _clear((weights @ _take(v, keys)).div_(total), filler))
        _add(lse, queries, _clear(top + total.log2(), filler))
    return out.transpose(0, 1).to(dtype).contiguous(), lse.squeeze(-1)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: list[Tensor],
    narrow_tiles: int,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout: float,
    seed: Tensor | None,
    deterministic: bool,  # it always is
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, H, G = q.dtype, q.shape[1], k.shape[1]
    q, k, v, dout, out = (_by_head(x, H) for x in (q, k, v, dout, out))
    factor = scale / softcap if softcap else scale * LOG2_E
    q = q * factor
    delta, lse = (dout * out).sum(-1, keepdim=True), lse[..., None]  # (H, T, 1)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for problem in _problems(layout, narrow_tiles, left, right, q.dtype):
        queries, keys, bias, filler = problem
        block_q, block_k = _take(q, queries), _take(k, keys)
        scores = block_q @ block_k.transpose(1, 2)
        if softcap:
            slope = 1 - scores.tanh_().square()
            scores.mul_(softcap * LOG2_E)
        probabilities = _hide(scores, bias).sub_(_take(lse, queries)).exp2_()
        block_dout, block_delta = _clear(_take(dout, queries), filler), _clear(_take(delta, queries), filler)
        dweights = block_dout @ _take(v, keys).transpose(1, 2)
        if seed is None:
            weights = probabilities
        else:
            kept = _kept(problem, H, dropout, seed, q.device)
            weights = probabilities * kept
            dweights.mul_(kept)
        _add(dv, keys, weights.transpose(1, 2) @ block_dout)
        dscores = dweights.sub_(block_delta).mul_(probabilities)
        if softcap:
            dscores.mul_(slope)
        _add(dq, queries, dscores @ block_k)
        _add(dk, keys, dscores.transpose(1, 2) @ block_q)
    dq.mul_(scale)
    dk, dv = (x.unflatten(0, (G, H // G)).sum(1) for x in (dk.mul_(scale / factor), dv))
    dq, dk, dv = (x.transpose(0, 1).to(dtype).contiguous() for x in (dq, dk, dv))
    return dq, dk, dv
