"""Plans for batches that are not ours: rows of slots with padding, and streams whose boundaries are on the device.

    attention_mask   0 0 1 1 1      ->      bounds of the row (2, 5)      ->      PackPlan
                     1 1 1 0 0                                (0, 3)

A padded batch (B, S) is taken as it lies, as a stream of B * S slots: nothing is gathered or scattered. Its plan is
made of tensor operations whose shapes follow from B and S alone. So nothing waits for the device, and the same code
runs in a compiled graph and in a CUDA graph. What that costs: a row has blocks for all its slots, and those without a
token only find that out on the device; a short row shares a tile only with the rows it has room for at full length.

B rows, Q query slots a row, K key slots a row, T = B * Q
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from trunkline.kernels.attention.pack_plan import KEY_BLOCK, QUERY_BLOCK, SHORT, TILE_SIZES, PackPlan
from trunkline.kernels.dispatch import register

Build = TypeVar("Build", bound=Callable[..., PackPlan | None])


def once_a_batch(build: Build) -> Build:
    """Makes the plan of the same tensors once, though every layer asks for it.

    A tensor is the same if it is the same object and was not written to. A compiled graph needs no memory: in it, equal
    operations on the same tensors are one.
    """

    @lru_cache(maxsize=8)  # a model has few masks: of encoder, decoder and what lies between, full and windowed
    def remembered(versions: tuple[int, ...], *arguments: Any) -> PackPlan | None:
        with torch.inference_mode(False), torch.no_grad():  # the plan may be used again, then with gradients
            return build(*arguments)

    def plan(*arguments: Any) -> PackPlan | None:
        if torch.compiler.is_compiling():
            return build(*arguments)
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        return remembered(tuple(-1 if x.is_inference() else x._version for x in tensors), *arguments)

    return cast(Build, plan)


def bounds_of(keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First token and end of every row of `keep` (B, S), and whether all between them are kept in every row.

    Returns:
        first (B,) and end (B,), both 0 for a row without tokens; a scalar of bool.
    """
    slot = torch.arange(keep.shape[1], device=keep.device)
    end = torch.where(keep, slot + 1, 0).amax(1)
    first = end - keep.sum(1)
    return first, end, ~(keep & (slot < first[:, None])).any()


def padded_plan(bounds: Tensor, queries: int, keys: int) -> PackPlan:
    """The plan of a padded batch.

    Args:
        bounds: (B, 2) int: first token and end of every row, the same for its queries and its keys. What comes out at
            the other slots is of no use. Or (B, 4) int: first query, end of queries, first key, end of keys; queries
            outside get 0, and so do those of a row without keys.
        queries: Q, slots of a row.
        keys: K; Q where bounds are (B, 2).
    """
    if bounds.shape[1] == 2 and queries <= SHORT:
        return _tiled(bounds, queries)
    first, end, first_k, end_k = bounds.unbind(1) if bounds.shape[1] == 4 else (*bounds.unbind(1), *bounds.unbind(1))
    B, none = len(bounds), torch.zeros_like(first)
    # a row is five sequences: queries before, keys before, the tokens, queries after, keys after
    ends = torch.stack([first, first, end, none + queries, none + queries], 1)  # (B, 5)
    ends_k = torch.stack([none, first_k, end_k, end_k, none + keys], 1)
    blocks = _blocks(torch.stack([first, end - first, queries - end], 1), (0, 2, 3), queries, QUERY_BLOCK)
    key_blocks = _blocks(torch.stack([first_k, end_k - first_k, keys - end_k], 1), (1, 2, 4), keys, KEY_BLOCK)
    cu_seqlens = _boundaries(ends, queries)
    return PackPlan(
        cu_seqlens=cu_seqlens,
        cu_seqlens_k=_boundaries(ends_k, keys),
        spans=_spans(cu_seqlens, B * queries),
        tiles=blocks.new_empty(0, 2),
        blocks=blocks,
        key_blocks=key_blocks,
        narrow_tiles=0,
        num_tokens=B * queries,
        num_keys=B * keys,
        max_seqlen=queries,
    )


def _tiled(bounds: Tensor, slots: int) -> PackPlan:
    """Whole rows in tiles; a row is three sequences: padding, its tokens, padding."""
    B, device = len(bounds), bounds.device
    size = next(size for size in TILE_SIZES if slots <= size)
    filled = size // max(slots, 1) * max(slots, 1)  # by as many whole rows as a tile holds
    start = torch.arange(0, B * slots, filled, device=device, dtype=torch.int32)
    tiles = torch.stack([start, (start + filled).clamp(max=B * slots)], 1)
    cu_seqlens = _boundaries(torch.cat([bounds, torch.full_like(bounds[:, :1], slots)], 1), slots)
    no_blocks = tiles.new_empty(0, 2)
    return PackPlan(
        cu_seqlens=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        spans=_spans(cu_seqlens, B * slots),
        tiles=tiles,
        blocks=no_blocks,
        key_blocks=no_blocks,
        narrow_tiles=len(tiles) if size == TILE_SIZES[0] else 0,
        num_tokens=B * slots,
        num_keys=B * slots,
        max_seqlen=slots,
    )


def _boundaries(ends: Tensor, slots: int) -> Tensor:
    """cu_seqlens of rows whose sequences have these ends (B, n), counted inside the row."""
    row = torch.arange(len(ends), device=ends.device)[:, None] * slots
    return torch.nn.functional.pad((row + ends).flatten(), (1, 0)).int()


def _spans(cu_seqlens: Tensor, tokens: int) -> Tensor:
    slot = torch.arange(tokens, device=cu_seqlens.device, dtype=torch.int32)
    sequence = torch.bucketize(slot, cu_seqlens[1:], right=True)
    return torch.stack([cu_seqlens[sequence], cu_seqlens[sequence + 1]], 1)


def _blocks(lengths: Tensor, sequences: tuple[int, int, int], slots: int, size: int) -> Tensor:
    """Blocks of three of the five sequences of every row: (B * most, 2), sequence and block inside it.

    Three sequences in `slots` slots have at most two blocks more than one has. The blocks that a row does not need lie
    beyond the end of its last sequence. Causal queries have most keys to look at in their last blocks: they come first.
    """
    last = (-(-lengths // size)).cumsum(1)  # (B, 3) blocks of the row up to the end of each sequence
    block = torch.arange(-(-slots // size) + 1, -1, -1, device=lengths.device)[:, None]  # (most, 1)
    which = (block >= last[:, 0]).int() + (block >= last[:, 1]).int()  # (most, B)
    before = torch.where(which == 0, 0, torch.where(which == 1, last[:, 0], last[:, 1]))
    sequence = torch.arange(len(lengths), device=lengths.device) * 5 + torch.where(
        which == 0, sequences[0], torch.where(which == 1, sequences[1], sequences[2])
    )
    return torch.stack([sequence, block - before], 2).flatten(0, 1).int()


@once_a_batch
def whole_rows_plan(B: int, queries: int, keys: int, device: torch.device) -> PackPlan:
    """The plan of B rows without padding; where queries and keys differ, the last query stands at the last key."""
    none = torch.zeros(B, dtype=torch.int64, device=device)
    bounds = [none, none + queries] if queries == keys else [none, none + queries, none, none + keys]
    return padded_plan(torch.stack(bounds, 1), queries, keys)


@once_a_batch
def stream_plan(cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, queries: int, keys: int) -> PackPlan:
    """The plan of a packed stream; reads the boundaries on the host, which waits for the device once a batch.

    A compiled graph does so too, inside an op whose outputs have room for the worst case: tiles and blocks that are not
    needed are empty.

    Args:
        cu_seqlens: (S + 1,) int32, first token of every sequence and the end of the last, T.
        cu_seqlens_k: (S + 1,) int32, the same for the keys; None: queries and keys are the same tokens.
        queries: T.
        keys: number of keys.

    Raises:
        ValueError: boundaries that are not int32, do not start at 0 or fall.
    """
    if not torch.compiler.is_compiling():
        return PackPlan.of(cu_seqlens, cu_seqlens_k, queries, keys)
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    cross = cu_seqlens_k is not cu_seqlens
    spans, tiles, blocks, key_blocks = _stream_plan(cu_seqlens, cu_seqlens_k, queries, keys, cross)
    return PackPlan(
        cu_seqlens=cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        spans=spans,
        tiles=tiles,
        blocks=blocks,
        key_blocks=key_blocks if cross else blocks,
        narrow_tiles=_most_narrow_tiles(queries),
        num_tokens=queries,
        num_keys=keys,
        max_seqlen=queries,
    )


def boundaries_of_starts(starts: Tensor) -> Tensor:
    """cu_seqlens of a stream in which `starts` (T,) marks the first token of every sequence.

    In a compiled graph, whose shapes may not depend on values, T empty sequences may follow the last one.
    """
    tokens = len(starts)
    if torch.compiler.is_compiling():
        slot = torch.arange(tokens, device=starts.device)
        first = torch.where(starts, slot, tokens).sort().values
    else:
        first = starts.nonzero().flatten()
    return torch.nn.functional.pad(first, (0, 1), value=tokens).int()


def _most_narrow_tiles(tokens: int) -> int:
    return tokens // 32 + 1  # a tile of 64 is closed by a neighbour that no longer fits: the two are above 64 together


def _most_wide_tiles(tokens: int) -> int:
    return tokens // 65  # one holds a sequence of more than 64 tokens


def _most_blocks(tokens: int, size: int, sequences: int, cross: bool) -> int:
    """Sequences in blocks are longer than `size`, so they have fewer than 2 * tokens / size; but where keys are others
    than queries, all sequences are in blocks."""
    return 2 * tokens // size + 1 + (sequences if cross else 0)


def _stream_plan_reference(
    cu_seqlens: Tensor, cu_seqlens_k: Tensor, queries: int, keys: int, cross: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan = PackPlan.of(cu_seqlens.cpu(), cu_seqlens_k.cpu() if cross else None)
    if (plan.num_tokens, plan.num_keys) != (queries, keys):
        raise ValueError(
            f"stream_plan: the boundaries end at {plan.num_tokens} queries and {plan.num_keys} keys, "
            f"got {queries} and {keys}"
        )
    beyond = [0, int(-(-plan.cu_seqlens[1] // QUERY_BLOCK))]  # a block after the last of the first sequence
    beyond_k = [0, int(-(-plan.cu_seqlens_k[1] // KEY_BLOCK))]
    sequences = len(cu_seqlens)

    def filled(x: Tensor, length: int, value: list[int]) -> Tensor:
        return torch.cat([x, torch.tensor(value, dtype=torch.int32).expand(length - len(x), 2)])

    tiles = [
        filled(plan.tiles[: plan.narrow_tiles], _most_narrow_tiles(queries), [1, 1]),
        filled(plan.tiles[plan.narrow_tiles :], _most_wide_tiles(queries), [1, 1]),
    ]
    blocks = filled(plan.blocks, _most_blocks(queries, QUERY_BLOCK, sequences, cross), beyond)
    key_blocks = filled(plan.key_blocks, _most_blocks(keys, KEY_BLOCK, sequences, cross), beyond_k)
    device = cu_seqlens.device
    return plan.spans.to(device), torch.cat(tiles).to(device), blocks.to(device), key_blocks.to(device)


def _stream_plan_fake(cu_seqlens, cu_seqlens_k, queries, keys, cross):
    sequences = len(cu_seqlens)
    tiles = _most_narrow_tiles(queries) + _most_wide_tiles(queries)
    blocks = _most_blocks(queries, QUERY_BLOCK, sequences, cross)
    key_blocks = _most_blocks(keys, KEY_BLOCK, sequences, cross)
    return tuple(cu_seqlens.new_empty(shape) for shape in ([queries, 2], [tiles, 2], [blocks, 2], [key_blocks, 2]))


_stream_plan = register("stream_plan", reference=_stream_plan_reference, fake=_stream_plan_fake)
