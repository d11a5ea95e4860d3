"""A packed batch holds every token once, and its plan every sequence: whole in a tile, or cut into blocks."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from trunkline.engine.network.packing import Example, PackedBatch, pack, tiles_of

LENGTHS = {
    "mixed": [5, 300, 64, 1, 65, 128, 129, 63, 17, 256, 40, 0, 127, 3, 90, 33, 31, 8, 513, 2, 77, 128, 64, 12],
    "one": [7],
    "one long": [129],
    "short": [10, 20, 30, 40] * 8,
    "long": [130, 500, 200],
}
TASKS = 4
ABSENT = 2

every_mix = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)


def make(lengths: list[int], seed: int = 0) -> list[Example]:
    """Examples of random tasks. No token occurs twice, and the label of a row is the token there, as is its value."""
    random, examples = np.random.default_rng(seed), []
    for tokens in np.split(np.arange(1, sum(lengths) + 1), np.cumsum(lengths)[:-1]):
        task = random.choice([t for t in range(TASKS) if t != ABSENT])
        rows = np.sort(random.choice(len(tokens), random.integers(min(len(tokens), 4) + 1), replace=False))
        examples.append(Example(task, tokens, rows, tokens[rows], tokens[rows] + 0.5, tokens[rows] + 0.25))
    return examples


def bounds(batch: PackedBatch) -> list[tuple[int, int]]:
    """First token and end of every sequence."""
    return list(map(tuple, batch.plan.cu_seqlens.unfold(0, 2, 1).tolist()))


def covered(batch: PackedBatch) -> Tensor:
    """How many tiles and blocks each token of the stream is in."""
    times = torch.zeros(len(batch.tokens), dtype=torch.int64)
    for start, end in batch.plan.tiles.tolist():
        times[start:end] += 1
    for sequence, block in batch.plan.blocks.tolist():
        start, end = bounds(batch)[sequence]
        assert 0 <= block * 128 < end - start
        times[start + block * 128 : min(start + block * 128 + 128, end)] += 1
    return times


@every_mix
def test_stream_holds_every_example_once(lengths):
    examples = make(lengths)
    batch = pack(examples, TASKS)
    assert sorted(batch.order) == list(range(len(examples)))
    assert len(batch.tokens) == batch.real_tokens == sum(lengths)
    assert batch.padding_waste == 0.0
    for example, (start, end) in zip(batch.order, bounds(batch), strict=True):
        assert batch.tokens[start:end].tolist() == examples[example].tokens.tolist()
        assert batch.positions[start:end].tolist() == list(range(lengths[example]))
    assert batch.plan.max_seqlen == max(lengths)


@every_mix
@pytest.mark.parametrize("tail", [0, 1, 128, 129, 1000])
def test_tiles_and_blocks_cover_the_stream_once(lengths, tail):
    batch = pack(make(lengths), TASKS, sum(lengths) + tail)
    assert (covered(batch) == 1).all()
    ends = {0, *(end for _, end in bounds(batch))}
    for start, end in batch.plan.tiles.tolist():
        assert {start, end} <= ends  # sequences are whole
        assert end - start <= 128
    assert all(end - start > 128 for start, end in (bounds(batch)[s] for s in batch.plan.blocks[:, 0]))


@every_mix
def test_longest_sequences_come_first_among_blocks(lengths):
    batch = pack(make(lengths), TASKS, sum(lengths) + 400)
    of_block = [bounds(batch)[s][1] - bounds(batch)[s][0] for s in batch.plan.blocks[:, 0]]
    assert of_block == sorted(of_block, reverse=True)


@every_mix
def test_examples_are_grouped_by_task(lengths):
    examples = make(lengths)
    tasks = [examples[i].task for i in pack(examples, TASKS).order]
    assert tasks == sorted(tasks)


@every_mix
def test_rows_point_at_their_tokens(lengths):
    examples = make(lengths)
    batch = pack(examples, TASKS, sum(lengths) + 50)
    rows = batch.rows
    assert torch.equal(batch.tokens[rows.token], rows.target)
    assert torch.equal(rows.value, rows.target + 0.5)
    assert torch.equal(rows.weight, rows.target + 0.25)
    expected = {int(token): example.task for example in examples for token in example.targets}
    assert dict(zip(rows.target.tolist(), rows.task.tolist(), strict=True)) == expected
    assert rows.counts == tuple(sum(len(e.rows) for e in examples if e.task == t) for t in range(TASKS))
    assert rows.counts[ABSENT] == 0
    for task, (first, end) in enumerate(rows.offsets.unfold(0, 2, 1).tolist()):
        assert rows.task[first:end].tolist() == [task] * rows.counts[task]
    assert rows.offsets[-1] == len(rows.task)


def test_labels_left_out_are_zero_and_weigh_one():
    rows = pack([Example(1, np.arange(9), np.array([2, 8])), Example(0, np.arange(3), np.array([1]))], 2).rows
    assert rows.token.tolist() == [1, 5, 11]
    assert rows.target.tolist() == [0, 0, 0]
    assert rows.value.tolist() == [0.0, 0.0, 0.0]
    assert rows.weight.tolist() == [1.0, 1.0, 1.0]


def test_batch_without_rows():
    rows = pack([Example(0, np.arange(9), np.array([], np.int64))], 2).rows
    assert rows.counts == (0, 0)
    assert rows.offsets.tolist() == [0, 0, 0]
    assert rows.token.numel() == rows.task.numel() == rows.target.numel() == rows.weight.numel() == 0


@pytest.mark.parametrize("tail", [1, 100, 128, 129, 5000])
def test_dummy_sequence_fills_the_budget(tail):
    lengths = LENGTHS["mixed"]
    examples, real = make(lengths), sum(lengths)
    batch, without = pack(examples, TASKS, real + tail), pack(examples, TASKS)
    assert batch.tokens.tolist() == without.tokens.tolist() + [0] * tail
    assert batch.positions.tolist() == without.positions.tolist() + [0] * tail  # valid whatever max_positions is
    assert batch.plan.cu_seqlens.tolist() == [*without.plan.cu_seqlens.tolist(), real + tail]
    assert batch.plan.max_seqlen == max(*lengths, tail)
    assert batch.order == without.order
    assert batch.real_tokens == real
    assert batch.padding_waste == pytest.approx(tail / (real + tail))
    for field in dataclasses.fields(batch.rows):
        got, expected = (getattr(rows, field.name) for rows in (batch.rows, without.rows))
        assert got == expected if field.name == "counts" else torch.equal(got, expected)


def test_dtypes():
    batch = pack(make(LENGTHS["mixed"]), TASKS)
    plan, rows = batch.plan, batch.rows
    assert [x.dtype for x in (batch.tokens, rows.token, rows.task, rows.target)] == [torch.int64] * 4
    small = (batch.positions, plan.cu_seqlens, plan.tiles, plan.blocks, rows.offsets)
    assert [x.dtype for x in small] == [torch.int32] * 5
    assert [x.dtype for x in (rows.value, rows.weight)] == [torch.float32] * 2


def test_first_fit_decreasing():
    lengths = [30, 100, 20, 28, 70, 50, 60, 14, 4]
    # 100 and 70 open tiles of 128; 60 and 30 find no room in those and open tiles of 64
    assert tiles_of(lengths) == [[1, 3], [4, 5, 8], [6], [0, 2, 7]]


def test_no_tile_is_overfull():
    random = np.random.default_rng(0)
    for _ in range(50):
        lengths = random.integers(0, 129, 60).tolist()
        tiles = tiles_of(lengths)
        assert sorted(i for tile in tiles for i in tile) == list(range(60))
        for tile in tiles:
            assert sum(lengths[i] for i in tile) <= (128 if max(lengths[i] for i in tile) > 64 else 64)


def test_tiles_are_well_filled():
    """Of the 64 or 128 places of a tile, over 512 sentences and pairs whose lengths spread as those of GLUE do."""
    lengths = np.random.default_rng(0).lognormal(3.3, 0.6, 512).astype(int).clip(4, 128).tolist()
    batch = pack([Example(0, np.zeros(length, np.int64), np.array([0])) for length in lengths], 1)
    used = batch.plan.tiles.diff().flatten()
    places = torch.where(used <= 64, 64, 128)
    assert used.sum() / places.sum() > 0.95


def test_to_moves_every_tensor():
    batch = pack(make(LENGTHS["mixed"]), TASKS, 4000)
    moved = batch.to("meta")
    for part, original in ((moved, batch), (moved.plan, batch.plan), (moved.rows, batch.rows)):
        for field in dataclasses.fields(part):
            got, expected = getattr(part, field.name), getattr(original, field.name)
            if isinstance(expected, Tensor):
                assert (got.device.type, got.dtype, got.shape) == ("meta", expected.dtype, expected.shape)
                assert expected.device.type == "cpu"
            elif not dataclasses.is_dataclass(expected):
                assert got == expected


def test_over_budget_is_named():
    with pytest.raises(ValueError, match="pack: 2 examples hold 30 tokens; the budget is 29"):
        pack(make([10, 20]), TASKS, 29)
    assert len(pack(make([10, 20]), TASKS, 30).plan.cu_seqlens) == 3  # no dummy


def test_no_examples_is_named():
    with pytest.raises(ValueError, match="pack: 0 examples hold 0 tokens; the budget is 8"):
        pack([], TASKS, 8)
