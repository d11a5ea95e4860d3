"""A plan covers every token once, whatever the order of the lengths, and refuses boundaries that are none."""

import pytest
import torch
from torch import Tensor

from trunkline.kernels.attention.pack_plan import PackPlan

LENGTHS = {
    "mixed": [5, 300, 64, 1, 0, 65, 128, 129, 63, 17, 256, 40, 127, 3, 90, 33, 31, 8, 513, 2, 77, 128, 64, 12, 0],
    "one": [7],
    "short": [10, 20, 30, 40] * 8,
    "long": [130, 500, 200],
    "empty": [0, 0],
    "nothing": [],
}


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def covered(plan: PackPlan) -> Tensor:
    """How many tiles and blocks each token is in."""
    times, ends = torch.zeros(plan.num_tokens, dtype=torch.int64), plan.cu_seqlens.tolist()
    for start, end in plan.tiles.tolist():
        times[start:end] += 1
    for sequence, block in plan.blocks.tolist():
        times[ends[sequence] + 128 * block : min(ends[sequence] + 128 * block + 128, ends[sequence + 1])] += 1
    return times


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_every_token_is_in_one_tile_or_block(lengths):
    plan = PackPlan.of(bounds(lengths))
    assert covered(plan).eq(1).all()
    assert plan.cu_seqlens.tolist() == bounds(lengths).tolist()
    ends = bounds(lengths).tolist()
    assert plan.spans.tolist() == [ends[s : s + 2] for s, length in enumerate(lengths) for _ in range(length)]
    assert (plan.num_tokens, plan.num_keys) == (sum(lengths), sum(lengths))
    assert plan.max_seqlen == max(lengths, default=0)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_tiles_hold_whole_short_sequences_narrow_ones_first(lengths):
    plan = PackPlan.of(bounds(lengths))
    assert set(plan.tiles.flatten().tolist()) <= set(plan.cu_seqlens.tolist())
    widths = plan.tiles.diff().flatten().tolist()
    assert all(0 < width <= 64 for width in widths[: plan.narrow_tiles])
    assert all(64 < width <= 128 for width in widths[plan.narrow_tiles :])
    assert all(lengths[s] > 128 for s in plan.blocks[:, 0])


def test_short_neighbours_share_a_tile():
    plan = PackPlan.of(bounds([30, 30, 10, 0, 50, 5, 100, 20, 20, 129, 1]))
    assert plan.tiles.tolist() == [[0, 60], [60, 120], [120, 125], [245, 265], [394, 395], [125, 245]]
    assert plan.narrow_tiles == 5


def test_most_work_comes_first():
    plan = PackPlan.of(bounds([130, 500, 200]))
    assert plan.blocks.tolist() == [[1, 0], [1, 1], [1, 2], [1, 3], [2, 0], [2, 1], [0, 0], [0, 1]]
    plan = PackPlan.of(bounds([1, 200, 1]), bounds([5, 7, 300]))
    assert plan.blocks.tolist() == [[2, 0], [1, 0], [1, 1], [0, 0]]
    assert plan.key_blocks.tolist() == [[1, 0], [0, 0], [2, 0], [2, 1], [2, 2]]
    assert not len(plan.tiles)


def test_keys_of_the_same_lengths_are_self_attention():
    plan = PackPlan.of(bounds([5, 300]), bounds([5, 300]))
    assert plan.cu_seqlens_k is plan.cu_seqlens
    assert plan.key_blocks is plan.blocks
    assert len(plan.layout) == 4
    moved = plan.to("meta")
    assert moved.cu_seqlens_k is moved.cu_seqlens
    assert moved.cu_seqlens.device.type == "meta"


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([0, 3]), r"cu_seqlens must be int32.*got torch.int64 of shape \(2,\)"),
        (torch.tensor([[0, 3]], dtype=torch.int32), r"got torch.int32 of shape \(1, 2\)"),
        (torch.tensor([], dtype=torch.int32), r"got torch.int32 of shape \(0,\)"),
        (torch.tensor([1, 3], dtype=torch.int32), "cu_seqlens must start at 0, got 1"),
        (torch.tensor([0, 3, 2, 4], dtype=torch.int32), "must be sorted, got 3 before 2 at index 1"),
    ],
)
def test_boundaries_that_are_none_are_named(cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        PackPlan.of(cu_seqlens)
    with pytest.raises(ValueError, match=message.replace("cu_seqlens", "cu_seqlens_k")):
        PackPlan.of(bounds([3]), cu_seqlens)


def test_queries_and_keys_of_other_sequences_are_named():
    with pytest.raises(ValueError, match="same sequences, got 2 of queries and 3 of keys"):
        PackPlan.of(bounds([1, 2]), bounds([1, 2, 3]))


def test_boundaries_that_end_elsewhere_are_named_before_anything_is_made_of_them():
    huge = torch.tensor([0, 1, 2**31 - 1], dtype=torch.int32)
    with pytest.raises(ValueError, match="PackPlan: cu_seqlens must end at 3 tokens, got 2147483647"):
        PackPlan.of(huge, bounds([1, 2]), num_tokens=3, num_keys=3)
    with pytest.raises(ValueError, match="PackPlan: cu_seqlens_k must end at 3 tokens, got 2147483647"):
        PackPlan.of(bounds([1, 2]), huge, num_tokens=3, num_keys=3)
