"""Where the sequences of a packed stream lie, arranged for attention: short ones in tiles, long ones in blocks.

    cu_seqlens   0     40  50          200
    stream       |  a  | b |     c      |        a and b share a tile of 64 slots; c is cut into blocks of 128 queries

T tokens (queries), K keys (T for self-attention), S sequences
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from trunkline.kernels.attention.on_device import OnDevice

SHORT = 128  # longest sequence that fits a tile
TILE_SIZES = (64, 128)  # powers of two that keep the matrix units busy; sequences up to 64 share the smaller tile
QUERY_BLOCK = KEY_BLOCK = 128  # queries, and in the backward pass keys, of a long sequence that are worked on together


@dataclass(frozen=True)
class PackPlan(OnDevice):
    """Which tokens of a packed batch attention works on together.

    Short sequences (up to 128 tokens) are worked on in tiles: contiguous runs of whole sequences. Longer ones are cut
    into blocks of 128 queries, those with the most work first. Where keys are not those of the queries (a cache, cross
    attention), every sequence is cut into blocks. Every token is in one tile or one block.
    """

    cu_seqlens: Tensor  # (S + 1,) int32, first token of every sequence and the end of the last
    cu_seqlens_k: Tensor  # (S + 1,) int32, the same for the keys; the same tensor for self-attention
    spans: Tensor  # (T, 2) int32, of every token: first token and end of its sequence
    tiles: Tensor  # (tiles, 2) int32, first token and end of each tile; those of at most 64 tokens come first
    blocks: Tensor  # (blocks, 2) int32, sequence and block of queries inside it
    key_blocks: Tensor  # (key blocks, 2) int32, sequence and block of keys; `blocks` itself for self-attention
    narrow_tiles: int  # tiles of at most 64 tokens; numbers are on the host, so that nobody has to ask the device
    num_tokens: int  # T
    num_keys: int  # K
    max_seqlen: int  # most tokens in a sequence

    @property
    def layout(self) -> tuple[Tensor, ...]:
        """The tensors as ops take them: none twice, which torch.compile does not allow. `Layout` names them again."""
        of_queries = (self.spans, self.tiles, self.blocks, self.cu_seqlens)
        is_cross = self.cu_seqlens_k is not self.cu_seqlens
        return (*of_queries, self.key_blocks, self.cu_seqlens_k) if is_cross else of_queries

    @classmethod
    def of(
        cls,
        cu_seqlens: Tensor,
        cu_seqlens_k: Tensor | None = None,
        num_tokens: int | None = None,
        num_keys: int | None = None,
    ) -> Self:
        """The plan of sequences that lie in the stream in any order; short neighbours share a tile.

        Reads the boundaries on the host: on a GPU this waits for the device, so make one plan a batch, not one a layer.

        Args:
            cu_seqlens: (S + 1,) int32, first token of every sequence and the end of the last. Lengths may be 0.
            cu_seqlens_k: (S + 1,) int32, the same for the keys; None: queries and keys are the same tokens.
            num_tokens, num_keys: where the boundaries have to end, if that is known.

        Returns:
            The plan, on the device of `cu_seqlens`.

        Raises:
            ValueError: boundaries that are not int32, one-dimensional, start at 0, never fall and end where they must.
        """
        lengths = _lengths("cu_seqlens", cu_seqlens)
        lengths_k = lengths if cu_seqlens_k is None else _lengths("cu_seqlens_k", cu_seqlens_k)
        if len(lengths) != len(lengths_k):
            raise ValueError(
                f"PackPlan: cu_seqlens and cu_seqlens_k must be of the same sequences, got {len(lengths)} of queries "
                f"and {len(lengths_k)} of keys"
            )
        ends = (("cu_seqlens", lengths, num_tokens), ("cu_seqlens_k", lengths_k, num_keys))
        for name, of_sequences, end in ends:  # before anything is made for each of the tokens
            if end is not None and sum(of_sequences) != end:
                raise ValueError(f"PackPlan: {name} must end at {end} tokens, got {sum(of_sequences)}")
        plan = cls.of_runs(_runs(lengths)) if lengths == lengths_k else cls._cross(lengths, lengths_k)
        return plan.to(cu_seqlens.device)

    @classmethod
    def of_runs(cls, runs: Iterable[Sequence[int]]) -> Self:
        """The plan of a stream given by lengths: of the sequences of one tile, or of one sequence above 128 tokens."""
        lengths: list[int] = []
        tiles, long, start = [], [], 0
        for run in runs:
            if sum(run) > SHORT:
                long.append(len(lengths))
            elif sum(run):
                tiles.append((start, start + sum(run)))
            lengths += run
            start += sum(run)
        tiles.sort(key=lambda tile: tile[1] - tile[0] > TILE_SIZES[0])
        narrow = sum(end - start <= TILE_SIZES[0] for start, end in tiles)
        blocks = _blocks(QUERY_BLOCK, long, lengths, lengths)
        return cls._make(lengths, lengths, tiles, narrow, blocks, blocks)

    @classmethod
    def _cross(cls, lengths: list[int], lengths_k: list[int]) -> Self:
        everything = range(len(lengths))
        blocks = _blocks(QUERY_BLOCK, everything, lengths, work=lengths_k)
        return cls._make(lengths, lengths_k, [], 0, blocks, _blocks(KEY_BLOCK, everything, lengths_k, work=lengths))

    @classmethod
    def _make(
        cls,
        lengths: list[int],
        lengths_k: list[int],
        tiles: list[tuple[int, int]],
        narrow_tiles: int,
        blocks: list[tuple[int, int]],
        key_blocks: list[tuple[int, int]],
    ) -> Self:
        bounds = np.cumsum([0, *lengths])
        cu_seqlens, block_tensor = _int32(bounds), _int32(blocks).view(-1, 2)
        return cls(
            cu_seqlens=cu_seqlens,
            cu_seqlens_k=cu_seqlens if lengths_k is lengths else _int32(np.cumsum([0, *lengths_k])),
            spans=_int32(np.repeat(np.stack([bounds[:-1], bounds[1:]], 1), lengths, axis=0)),
            tiles=_int32(tiles).view(-1, 2),
            blocks=block_tensor,
            key_blocks=block_tensor if key_blocks is blocks else _int32(key_blocks).view(-1, 2),
            narrow_tiles=narrow_tiles,
            num_tokens=sum(lengths),
            num_keys=sum(lengths_k),
            max_seqlen=max(lengths, default=0),
        )


class Layout(NamedTuple):
    """The tensors of a `PackPlan`, inside an op."""

    spans: Tensor
    tiles: Tensor
    blocks: Tensor
    cu_seqlens: Tensor
    key_blocks: Tensor
    cu_seqlens_k: Tensor

    @classmethod
    def of(cls, layout: Sequence[Tensor]) -> Self:
        return cls(*layout) if len(layout) == 6 else cls(*layout, *layout[2:])


def _lengths(name: str, cu_seqlens: Tensor) -> list[int]:
    """Lengths of the sequences between checked boundaries."""
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or not len(cu_seqlens):
        raise ValueError(
            f"PackPlan: {name} must be int32 of shape (sequences + 1,), "
            f"got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    if bounds[0]:
        raise ValueError(f"PackPlan: {name} must start at 0, got {bounds[0]}")
    if min(lengths, default=0) < 0:
        at = next(i for i, length in enumerate(lengths) if length < 0)
        raise ValueError(f"PackPlan: {name} must be sorted, got {bounds[at]} before {bounds[at + 1]} at index {at}")
    return lengths


def _runs(lengths: list[int]) -> list[list[int]]:
    """Neighbours share a tile as long as they fit. As in a packed batch, only a sequence above 64 opens a wide one."""
    runs: list[list[int]] = []
    room = -1  # no tile is open
    for length in lengths:
        if length <= room:
            runs[-1].append(length)
            room -= length
        else:
            runs.append([length])
            room = next((size - length for size in TILE_SIZES if length <= size), -1)
    return runs


def _blocks(size: int, sequences: Iterable[int], lengths: list[int], work: list[int]) -> list[tuple[int, int]]:
    """Sequence and block inside it, most work first: the last blocks to finish are then small ones."""
    blocks = [(s, block) for s in sequences for block in range(-(-lengths[s] // size))]
    return sorted(blocks, key=lambda item: -work[item[0]])


def _int32(values: Any) -> Tensor:
    return torch.from_numpy(np.array(values, np.int32))
