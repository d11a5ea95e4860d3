"""One batch: a flat stream of tokens from any mix of tasks, without padding.

    examples -> order by task, tiles by length -> tokens, positions, plan, rows

The stream has always `budget` tokens: what the examples leave free is one dummy sequence without labels.
Everything a layer has to know about sequence boundaries is in the `PackPlan`, made once a batch, on the host.

T tokens, S sequences, R labelled rows, N tasks
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trunkline.kernels.attention.on_device import OnDevice
from trunkline.kernels.attention.pack_plan import SHORT, TILE_SIZES
from trunkline.kernels.attention.pack_plan import PackPlan as PackPlan


@dataclass(frozen=True)
class LabelledRows(OnDevice):
    """What is learnt from a batch: rows of the trunk's output with a label, sorted by task."""

    token: Tensor  # (R,) int64, index into the packed stream
    task: Tensor  # (R,) int64, ascending
    target: Tensor  # (R,) int64, class or next token; 0 where the label is a number
    value: Tensor  # (R,) float32, the label of a regression; 0 elsewhere
    weight: Tensor  # (R,) float32, factor of the row's loss; a row of weight 0 does not count
    offsets: Tensor  # (N + 1,) int32, rows of task t are offsets[t] : offsets[t + 1]
    counts: tuple[int, ...]  # rows of every task, on the host


@dataclass(frozen=True)
class PackedBatch(OnDevice):
    """What the model takes: one stream of tokens, where its sequences lie, and which rows carry labels."""

    tokens: Tensor  # (T,) int64
    positions: Tensor  # (T,) int32, offset inside its own sequence
    plan: PackPlan
    rows: LabelledRows
    token_offsets: Tensor  # (N + 1,) int32, tokens of task t are token_offsets[t] : token_offsets[t + 1]
    order: tuple[int, ...]  # the examples in the order in which they lie in the stream
    examples: tuple[int, ...]  # of every task, (N,)
    real_tokens: int  # T less the dummy sequence
    types: Tensor | None = None  # (T,) uint8, token types; None: the trunk has none, or all tokens are of type 0

    @property
    def padding_waste(self) -> float:
        """Share of the budget that carries no example."""
        return 1.0 - self.real_tokens / len(self.tokens)

    def task_of_token(self) -> Tensor:
        """(T,) int64; N for the tokens of the dummy sequence."""
        places = torch.arange(len(self.tokens), dtype=torch.int32, device=self.tokens.device)
        return torch.bucketize(places, self.token_offsets[1:], right=True)


@dataclass(frozen=True)
class Example:
    """One encoded example of one task."""

    task: int
    tokens: np.ndarray  # (L,) int32
    rows: np.ndarray  # (r,) offsets of the labelled tokens inside the example
    targets: np.ndarray | None = None  # (r,) int; None: 0
    values: np.ndarray | None = None  # (r,) float; None: 0
    weights: np.ndarray | None = None  # (r,) float; None: 1
    types: np.ndarray | None = None  # (L,) uint8, token types; None: 0


def batches_of(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Places of sequences in batches of at most so many tokens, shortest first; one that is longer is alone."""
    batches: list[list[int]] = []
    room = 0
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        if lengths[place] > room:
            batches.append([])
            room = tokens
        batches[-1].append(place)
        room -= lengths[place]
    return batches


def tiles_of(lengths: Sequence[int]) -> list[list[int]]:
    """Short sequences in tiles, first-fit decreasing: indices of `lengths`, each tile at most 64 or 128 tokens.

    A sequence of more than 64 tokens opens a tile of 128; shorter ones fill it up before they open tiles of 64.
    """
    narrow, wide = TILE_SIZES
    tiles: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        tile = next((t for t, free in enumerate(room) if length <= free), None)
        if tile is None:
            tile = len(tiles)
            tiles.append([])
            room.append(narrow if length <= narrow else wide)
        tiles[tile].append(index)
        room[tile] -= length
    return tiles


def pack(examples: Sequence[Example], num_tasks: int, budget: int | None = None) -> PackedBatch:
    """Packs examples of any mix of tasks into one batch: grouped by task, in each task tiles first, then long ones.

    Args:
        examples: at least one, in any order; `PackedBatch.order` tells where each went.
        num_tasks: N, the length of `LabelledRows.counts`.
        budget: T; None takes just the tokens there are.

    Raises:
        ValueError: no examples, or more tokens than the budget.
    """
    assert all(example.task < num_tasks for example in examples)
    lengths = [len(example.tokens) for example in examples]
    total = sum(lengths)
    budget = total if budget is None else budget
    if not examples or total > budget:
        raise ValueError(f"pack: {len(examples)} examples hold {total} tokens; the budget is {budget}")

    runs: list[list[int]] = []  # sequences that lie side by side: the members of a tile, or one long sequence
    for task in range(num_tasks):
        members = [i for i, example in enumerate(examples) if example.task == task]
        short = [i for i in members if lengths[i] <= SHORT]
        runs += [[short[i] for i in tile] for tile in tiles_of([lengths[i] for i in short])]
        runs += [[i] for i in members if lengths[i] > SHORT]
    order = [i for run in runs for i in run]
    tokens = [examples[i].tokens for i in order]
    positions = [np.arange(lengths[i]) for i in order]
    if total < budget:  # the tail: one sequence without labels, all at position 0 so that any length is valid
        runs.append([len(lengths)])
        lengths.append(budget - total)
        tokens.append(np.zeros(budget - total, np.int64))
        positions.append(np.zeros(budget - total, np.int64))

    tokens_of_task = np.bincount([e.task for e in examples], [len(e.tokens) for e in examples], num_tasks)
    return PackedBatch(
        tokens=torch.from_numpy(np.concatenate(tokens).astype(np.int64)),
        positions=torch.from_numpy(np.concatenate(positions).astype(np.int32)),
        plan=PackPlan.of_runs([lengths[i] for i in run] for run in runs),
        rows=_rows([examples[i] for i in order], num_tasks),
        token_offsets=torch.from_numpy(np.cumsum([0, *tokens_of_task]).astype(np.int32)),
        order=tuple(order),
        examples=tuple(sum(example.task == task for example in examples) for task in range(num_tasks)),
        real_tokens=total,
        types=_types([examples[i] for i in order], budget),
    )


def _types(examples: Sequence[Example], budget: int) -> Tensor | None:
    """(T,) token types of examples that lie one after the other; None where no example has any."""
    if all(example.types is None for example in examples):
        return None
    types, end = np.zeros(budget, np.uint8), 0
    for example in examples:
        begin, end = end, end + len(example.tokens)
        if example.types is not None:
            types[begin:end] = example.types
    return torch.from_numpy(types)


def _rows(examples: Sequence[Example], num_tasks: int) -> LabelledRows:
    """The labelled rows of examples that lie one after the other, already in the order of their tasks."""
    starts = np.cumsum([0] + [len(example.tokens) for example in examples])
    counts = np.zeros(num_tasks, np.int64)
    for example in examples:
        counts[example.task] += len(example.rows)

    def joined(parts: list[np.ndarray], dtype: type) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(dtype))

    def filled(field: str, default: float) -> list[np.ndarray]:
        values = [getattr(example, field) for example in examples]
        return [np.full(len(e.rows), default) if v is None else v for e, v in zip(examples, values, strict=True)]

    return LabelledRows(
        token=joined([start + example.rows for start, example in zip(starts, examples, strict=False)], np.int64),
        task=torch.from_numpy(np.repeat(np.arange(num_tasks), counts)),
        target=joined(filled("targets", 0), np.int64),
        value=joined(filled("values", 0.0), np.float32),
        weight=joined(filled("weights", 1.0), np.float32),
        offsets=torch.from_numpy(np.cumsum([0, *counts]).astype(np.int32)),
        counts=tuple(counts.tolist()),
    )
