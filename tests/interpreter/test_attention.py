"""Tiles and blocks together: what one kernel leaves out, the other fills in."""

from itertools import accumulate

import pytest
import torch

from parity import assert_as_accurate
from trunkline.kernels.attention import attention, attention_reference
from trunkline.kernels.pack_plan import PackPlan

MIXED = [5, 200, 64, 0, 131, 128]
CACHED = [5, 260, 64, 0, 131, 1]  # keys, where they are not as many as queries


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32)


@pytest.mark.parametrize(
    ("keys", "settings"),
    [
        (MIXED, {"causal": True}),
        (MIXED, {"causal": False, "window": (40, 10), "dropout": 0.2, "seed": 3}),
        (CACHED, {"causal": True}),
    ],
    ids=["causal", "window and dropout", "cached"],
)
def test_mixed_lengths_match_the_definition(keys, settings, device):
    plan = PackPlan.of(bounds(MIXED)) if keys is MIXED else PackPlan.of(bounds(MIXED), bounds(keys))
    plan = plan.to(device)
    assert len(plan.blocks) > 0
    assert bool(len(plan.tiles)) == (keys is MIXED)
    q = torch.randn(sum(MIXED), 2, 32, device=device)
    k, v = torch.randn(2, sum(keys), 1, 32, device=device)
    assert_as_accurate(
        lambda q, k, v: attention(q, k, v, plan, **settings),
        lambda q, k, v: attention_reference(q, k, v, plan, **settings),
        (q, k, v),
        floor=1e-5,
    )
