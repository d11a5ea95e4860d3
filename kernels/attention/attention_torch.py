"""Packed attention in plain PyTorch: the reference that serves where no kernel does, fast on a CPU.

A packed batch is split into dense problems, each a call of PyTorch's own attention for CPUs: all tiles of one width are
one batched problem, a longer sequence is one of its own, and sequences that all have one length are one as they lie.
With a window or other positions of the keys, a sequence is cut into blocks, each with only the keys that some of its
queries see. Where the queries of some tokens only, `rows`, are asked for, every problem has those alone. What PyTorch's
attention cannot do (dropout that does not depend on the tiling, soft-capping, a GPU) is done here block by block.

T queries (of all tokens, or of `rows`), K keys, S sequences, H query heads, G key/value heads, D head width
n problems of one shape, of M queries and N keys
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, Self

import torch
from torch import Tensor

from trunkline.kernels.attention.attention_scores import kept_reference
from trunkline.kernels.attention.pack_plan import QUERY_BLOCK, Layout
from trunkline.kernels.dispatch import versions

# PyTorch's public attention keeps nothing that a backward pass of our own could start from
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Lengths at which that multiplies the hidden half of a causal sequence, too, for it takes 512 keys at a time, and which
# blocks make a tenth to a fifth faster. Shorter ones are as fast as they are; longer ones would be slower in blocks.
MIDDLING = range(257, 513)


class Tiles(NamedTuple):
    """Where the tokens of tiles of one width are, and where they go."""

    token: Tensor  # (n, M) the token in every slot; slots beyond a tile's end repeat its last token
    filler: Tensor  # (n, M) those slots
    slots: Tensor  # which slots, of all, hold a token of their own
    tokens: Tensor  # these tokens

    @classmethod
    def of(cls, token: Tensor, filler: Tensor) -> Self:
        return cls(token, filler, (~filler).flatten().nonzero()[:, 0], token[~filler])


class Problem(NamedTuple):
    """n small attention problems of one shape."""

    queries: Tiles | slice  # by token, or by place in `rows`; a slice has those of all n, one after the other
    keys: Tiles | slice  # by token
    bias: Tensor | None = None  # (n, 1, M, N): 0 where a query sees a key, -inf where it does not; None: all are seen
    causal: bool = False  # instead of a bias: a query sees the keys up to its own
    n: int = 1  # of slices


def _problems(
    layout: list[Tensor],
    narrow_tiles: int,
    left: int,
    right: int,
    rows: Tensor | None,
    dtype: torch.dtype,
    in_blocks: bool,
) -> Iterator[Problem]:
    """Those of a packed batch; `in_blocks` of at most 128 queries."""
    settings = (narrow_tiles, left, right, dtype, in_blocks)
    if rows is None:
        equal = None if in_blocks else _equal_sequences(layout, left, right)
        return iter([equal]) if equal else _all_problems(layout, *settings, cut=MIDDLING)
    return iter(_problems_of_rows(rows, tuple(layout), versions(rows, *layout), *settings))


def _is_whole(size: int, size_k: int, left: int, right: int, cut: range) -> bool:
    """Whether a sequence is one problem without a bias; causal ones of a length in `cut` are not."""
    return left < 0 and (right < 0 or (right == 0 and size == size_k and size not in cut))


def _equal_sequences(layout: list[Tensor], left: int, right: int) -> Problem | None:
    """All sequences at once where they have one length: nothing has to be moved, and no tile to be filled."""
    cu_seqlens, cu_seqlens_k = Layout.of(layout).cu_seqlens, Layout.of(layout).cu_seqlens_k
    sizes = [(q, k) for q, k in zip(*(x.diff().tolist() for x in (cu_seqlens, cu_seqlens_k)), strict=True) if q or k]
    size, size_k = sizes[0] if len(set(sizes)) == 1 else (0, 0)
    if not (size and size_k and _is_whole(size, size_k, left, right, cut=MIDDLING)):
        return None
    n = len(sizes)
    return Problem(slice(0, n * size), slice(0, n * size_k), causal=right == 0, n=n)


@lru_cache(maxsize=2)  # backward asks for what forward did
def _problems_of_rows(
    rows: Tensor,
    layout: tuple[Tensor, ...],
    versions: tuple[int, ...],
    narrow_tiles: int,
    left: int,
    right: int,
    dtype: torch.dtype,
    in_blocks: bool,
) -> list[Problem]:
    tokens, places = rows.sort(stable=True)
    problems = _all_problems(layout, narrow_tiles, left, right, dtype, in_blocks, cut=range(0))
    of_rows = (_of_rows(problem, tokens, places, dtype) for problem in problems)
    return [problem for problem in of_rows if problem is not None]


def _of_rows(problem: Problem, tokens: Tensor, places: Tensor, dtype: torch.dtype) -> Problem | None:
    """The problem with the queries of `tokens` (R,) alone, which ascend; `places` is where in `rows` they stand."""
    queries, keys, bias, causal, _ = problem
    if isinstance(queries, slice):
        start, end = tokens.new_tensor([[queries.start], [queries.stop]])
    else:
        start = queries.token[:, 0]
        end = start + (~queries.filler).sum(1)
    first, last = torch.searchsorted(tokens, torch.stack([start, end]))  # (n,) each
    count = (last - first)[:, None]
    slot = torch.arange(int(count.max()), device=tokens.device)  # (M,)
    if not len(slot):
        return None
    chosen = first[:, None] + slot.minimum(count - 1)  # (n, M)
    query = tokens[chosen] - start[:, None]
    if causal and isinstance(keys, slice):  # nobody sees a key after the last of them
        keys = slice(keys.start, keys.start + int(query.max()) + 1)
        bias = _bias(torch.arange(keys.stop - keys.start, device=tokens.device) > query[:, :, None], dtype)
    elif bias is not None:  # fillers of a tile without rows may have any query of it
        bias = bias.take_along_dim(query.clamp(0, bias.shape[2] - 1)[:, None, :, None], 2)
    return Problem(Tiles.of(places[chosen], slot >= count), keys, bias)


def _all_problems(
    layout: Sequence[Tensor],
    narrow_tiles: int,
    left: int,
    right: int,
    dtype: torch.dtype,
    in_blocks: bool,
    cut: range,  # lengths of causal sequences that are cut into blocks in any case
) -> Iterator[Problem]:
    spans, tiles, blocks, cu_seqlens, _, cu_seqlens_k = Layout.of(layout)
    if len(tiles):
        yield from _tile_problems(spans, tiles, versions(spans, tiles), narrow_tiles, left, right, dtype)
    bounds, bounds_k = cu_seqlens.tolist(), cu_seqlens_k.tolist()
    for s, block in blocks.tolist():
        queries, keys = slice(bounds[s], bounds[s + 1]), slice(bounds_k[s], bounds_k[s + 1])
        size, size_k = queries.stop - queries.start, keys.stop - keys.start
        if not in_blocks and _is_whole(size, size_k, left, right, cut):
            if block == 0 and size and size_k:
                yield Problem(queries, keys, causal=right == 0)
            continue
        first = queries.start + block * QUERY_BLOCK
        last = min(first + QUERY_BLOCK, queries.stop)
        stands = first + keys.stop - queries.stop  # at which key; the last query stands at the last key
        if right >= 0 and stands + right < keys.start:  # queries before all keys see nothing: their output stays 0
            first, stands = first + keys.start - right - stands, keys.start - right
        first_k = max(stands - left, keys.start) if left >= 0 else keys.start
        last_k = min(stands + last - first + right, keys.stop) if right >= 0 else keys.stop
        if last > first and last_k > first_k:
            bias = _block_bias(last - first, last_k - first_k, stands - first_k, left, right, dtype, tiles.device)
            yield Problem(slice(first, last), slice(first_k, last_k), bias)


@lru_cache(maxsize=2)  # every layer asks for the same, forward and backward
def _tile_problems(
    spans: Tensor,
    tiles: Tensor,
    versions: tuple[int, ...],
    narrow_tiles: int,
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
            token = start[:, None] + torch.arange(width, device=device)  # (n, M)
            filler = token >= end[:, None]
            index = token.minimum(end[:, None] - 1)
            sequence = spans[index, 0]  # named by its first token
            hidden = (sequence[:, :, None] != sequence[:, None]) | filler[:, None]  # (n, M, M)
            hidden |= _outside(index[:, :, None], index[:, None], left, right)
            where = Tiles.of(index, filler)
            problems.append(Problem(where, where, _bias(hidden, dtype)))
    return problems


@lru_cache(maxsize=64)  # most blocks of a batch have the same
def _block_bias(
    queries: int, keys: int, stands: int, left: int, right: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(1, 1, queries, keys) of a block whose first query stands at key `stands`."""
    query, key = stands + torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)
    return _bias(_outside(query, key, left, right)[None], dtype)


def _bias(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, M, N) -> (n, 1, M, N), for all heads"""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))[:, None]


def _outside(query: Tensor, key: Tensor, left: int, right: int) -> Tensor:
    """Which keys lie outside the window around the position of a query; -1 is no bound."""
    hidden = torch.zeros_like(query - key, dtype=torch.bool)
    if left >= 0:
        hidden |= key < query - left
    if right >= 0:
        hidden |= key > query + right
    return hidden


def _precise(x: Tensor) -> Tensor:
    """In float32 at least, and as PyTorch's attention for CPUs reads it, which looks at no stride inside a head."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x if x.stride(2) == 1 and x.stride(0) >= x.shape[2] else x.contiguous()


def _repeated(x: Tensor, heads: int) -> Tensor:
    """(n, G, N, D) -> (n, H, N, D): a key head for each of the query heads that share it."""
    return x.repeat_interleave(heads // x.shape[1], 1) if x.shape[1] < heads else x


def _summed(x: Tensor, heads: int) -> Tensor:
    """(n, H, N, D) -> (n, G, N, D), its derivative."""
    return x.unflatten(1, (heads, -1)).sum(2) if heads < x.shape[1] else x


def _take(x: Tensor, where: Tiles | slice, n: int) -> Tensor:
    """(T, H, ...) -> (n, H, M, ...)"""
    if isinstance(where, slice):
        return x[where].unflatten(0, (n, -1)).transpose(1, 2)
    return x.index_select(0, where.token.flatten()).unflatten(0, where.token.shape).transpose(1, 2)


class Total:
    """A sum over problems, (T, H, ...). It begins with zeros, unless the first problem has a term for every token."""

    def __init__(self, like: Tensor):
        self.like = like
        self.sum: Tensor | None = None

    def add(self, where: Tiles | slice, x: Tensor) -> None:
        """Adds (n, H, M, ...)."""
        x = x.transpose(1, 2).flatten(0, 1)
        if self.sum is None and where == slice(0, len(self.like)):
            self.sum = x.contiguous()
            return
        self.sum = self.value()
        if isinstance(where, slice):
            self.sum[where].add_(x)
        else:
            self.sum.index_copy_(0, where.tokens, x.index_select(0, where.slots))  # they are in no other problem

    def value(self) -> Tensor:
        return torch.zeros_like(self.like, memory_format=torch.contiguous_format) if self.sum is None else self.sum


def _kept(
    problem: Problem, rows: Tensor | None, heads: int, dropout: float, seed: Tensor, device: torch.device
) -> Tensor:
    """(n, H, M, N): 1 / (1 - dropout) for the weights that dropout keeps, 0 for the others."""
    query, key = (
        torch.arange(x.start, x.stop, device=device)[None] if isinstance(x, slice) else x.token
        for x in (problem.queries, problem.keys)
    )
    query = query if rows is None else rows[query]
    head = torch.arange(heads, device=device)[:, None, None]
    return kept_reference(int(seed), query[:, None, :, None], key[:, None, None], head, dropout) / (1 - dropout)


def _is_plain(q: Tensor, softcap: float, seed: Tensor | None) -> bool:
    """Whether PyTorch's attention for CPUs does it."""
    return q.device.type == "cpu" and not softcap and seed is None


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
    rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dtype, H, plain = q.dtype, q.shape[1], _is_plain(q, softcap, seed)
    q, k, v = map(_precise, (q, k, v))
    out, lse = Total(q), Total(q[:, :, 0])
    for problem in _problems(layout, narrow_tiles, left, right, rows, q.dtype, in_blocks=not plain):
        queries, keys, bias, causal, n = problem
        block_k, block_v = (_repeated(_take(x, keys, n), H) for x in (k, v))
        block = _take(q, queries, n), block_k, block_v
        if plain:
            block_out, block_lse = _flash(*block, 0.0, causal, attn_mask=bias, scale=scale)
        else:
            kept = None if seed is None else _kept(problem, rows, H, dropout, seed, q.device)
            block_out, block_lse = _forward_block(*block, bias, scale, softcap, kept)
        out.add(queries, block_out)
        lse.add(queries, block_lse)
    return out.value().to(dtype), lse.value().T.contiguous()


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, softcap: float) -> Tensor:
    """(n, H, M, N)"""
    scores = (q @ k.transpose(2, 3)).mul_(scale)
    if softcap:
        scores.div_(softcap).tanh_().mul_(softcap)
    return scores if bias is None else scores.add_(bias)


def _forward_block(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, softcap: float, kept: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What `_flash` returns: out (n, H, M, D) and the logarithm of every query's sum of exponentials, (n, H, M)."""
    scores = _scores(q, k, bias, scale, softcap)
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse[..., None]).exp_()
    return (weights if kept is None else weights.mul_(kept)) @ v, lse


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
    rows: Tensor | None,
    deterministic: bool,  # it always is
    joined: bool,
) -> list[Tensor]:
    """dQ, dK and dV; or, joined, one tensor of their heads in this order."""
    dtype, H, plain = q.dtype, q.shape[1], _is_plain(q, softcap, seed)
    q, k, v, dout, out = map(_precise, (q, k, v, dout, out))
    lse = lse.T  # (T, H)
    totals = [Total(x) for x in (q, k, v)]
    for problem in _problems(layout, narrow_tiles, left, right, rows, q.dtype, in_blocks=not plain):
        queries, keys, bias, causal, n = problem
        block_lse = _take(lse, queries, n)
        if isinstance(queries, Tiles):  # of weights that are 0 come gradients of 0
            block_lse = block_lse.masked_fill(queries.filler[:, None], float("inf"))
        block_dout, block_q, block_out = (_take(x, queries, n) for x in (dout, q, out))
        block_k, block_v = (_repeated(_take(x, keys, n), H) for x in (k, v))
        block = block_dout, block_q, block_k, block_v, block_out, block_lse
        if plain:
            gradients = _flash_backward(*block, 0.0, causal, attn_mask=bias, scale=scale)
        else:
            kept = None if seed is None else _kept(problem, rows, H, dropout, seed, q.device)
            gradients = _backward_block(*block, bias, scale, softcap, kept)
        for total, where, gradient in zip(totals, (queries, keys, keys), gradients, strict=True):
            total.add(where, _summed(gradient, total.like.shape[1]))
    gradients = [total.value().to(dtype) for total in totals]
    return [torch.cat(gradients, 1)] if joined else gradients


def _backward_block(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_flash_backward` returns: dq, dk, dv."""
    scores = _scores(q, k, bias, scale, softcap)
    weights = (scores - lse[..., None]).exp_()
    dweights = dout @ v.transpose(2, 3)
    if kept is None:
        dv = weights.transpose(2, 3) @ dout
    else:
        dv = (weights * kept).transpose(2, 3) @ dout
        dweights.mul_(kept)
    dscores = dweights.sub_((dout * out).sum(-1, keepdim=True)).mul_(weights).mul_(scale)
    if softcap:  # the derivative of softcap * tanh(x / softcap) is 1 - tanh^2; a hidden score has a weight of 0
        dscores.mul_(1 - scores.div_(softcap).nan_to_num_(neginf=0.0).square_())
    return dscores @ k, dscores.transpose(2, 3) @ q, dv
