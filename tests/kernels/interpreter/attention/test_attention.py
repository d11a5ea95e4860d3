"""Tiles and blocks together: what one kernel leaves out, the other fills in."""

import os
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from parity import assert_as_accurate
from streams import kernel_dtype
from trunkline.engine.foreign.plans import _most_narrow_tiles, _stream_plan
from trunkline.kernels.attention import attention_torch
from trunkline.kernels.attention.attention import attention, attention_reference
from trunkline.kernels.attention.pack_plan import PackPlan

MIXED = [5, 200, 64, 0, 131, 128]
CACHED = [5, 260, 64, 0, 131, 1]  # keys, where they are not as many as queries


def bounds(lengths: list[int]) -> Tensor:
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
    q = torch.randn(sum(MIXED), 2, 32, dtype=kernel_dtype(device), device=device)
    k, v = torch.randn(2, sum(keys), 1, 32, dtype=kernel_dtype(device), device=device)
    assert_as_accurate(
        lambda q, k, v: attention(q, k, v, plan, **settings),
        lambda q, k, v: attention_reference(q, k, v, plan, **settings),
        (q, k, v),
        floor=1e-5,
    )


@pytest.mark.parametrize(
    "settings", [{"causal": True}, {"causal": False, "window": (40, 10)}], ids=["causal", "window"]
)
def test_short_sequences_with_heads_too_wide_for_tiles_are_blocks(settings, device, monkeypatch):
    """The reference would look at the plan on the host, and launch a dozen kernels for each of its blocks."""
    D, dtype = (160, torch.bfloat16) if kernel_dtype(device) == torch.bfloat16 else (72, torch.float32)
    lengths = [5, 64, 0, 40, 131]
    plan = PackPlan.of(bounds(lengths)).to(device)
    assert len(plan.tiles)
    monkeypatch.delattr(attention_torch, "forward")
    monkeypatch.delattr(attention_torch, "backward")
    q = torch.randn(sum(lengths), 2, D, dtype=dtype, device=device)
    k, v = torch.randn(2, sum(lengths), 1, D, dtype=dtype, device=device)
    assert_as_accurate(
        lambda q, k, v: attention(q, k, v, plan, **settings),
        lambda q, k, v: attention_reference(q, k, v, plan, **settings),
        (q, k, v),
        floor=1e-5,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128])
def test_float32_in_full_precision_runs_on_kernels(D, monkeypatch):
    plan = PackPlan.of(bounds(MIXED)).to("cuda")
    monkeypatch.delattr(attention_torch, "forward")
    monkeypatch.delattr(attention_torch, "backward")
    assert_as_accurate(
        lambda q, k, v: attention(q, k, v, plan, causal=True),
        lambda q, k, v: attention_reference(q, k, v, plan, causal=True),
        tuple(torch.randn(sum(MIXED), n, D, device="cuda") for n in (4, 2, 2)),
        floor=1e-5,
    )


@pytest.mark.skipif("TRUNKLINE_VIRTUAL_GPU" in os.environ, reason="on a CPU the reference takes a few rows")
def test_rows_are_those_of_all_outputs(device):
    plan, rows = PackPlan.of(bounds(MIXED)).to(device), torch.tensor([527, 0, 204, 204], device=device)
    q, k, v = torch.randn(3, sum(MIXED), 1, 16, dtype=kernel_dtype(device), device=device)
    out = attention(q, k, v, plan, causal=True)
    assert torch.equal(attention(q, k, v, plan, causal=True, rows=rows), out[rows])


@pytest.mark.parametrize("heads", [(1, 1), (2, 1)], ids=str)
def test_gradient_of_one_tensor_is_that_of_its_heads(heads, device):
    """Of tiles whose queries are worked on at once or, where heads share keys, in steps, and of blocks."""
    lengths = [20, 100, 130]
    plan = PackPlan.of(bounds(lengths)).to(device)
    whole = torch.randn(sum(lengths), heads[0] + 2 * heads[1], 16, dtype=kernel_dtype(device), device=device)

    def results(joined: bool) -> tuple[Tensor, Tensor]:
        leaf = whole.clone().requires_grad_()
        out = attention(*leaf.split([*heads, heads[1]], 1), plan, causal=True, whole=leaf if joined else None)
        return out.detach(), *torch.autograd.grad(out, leaf, whole[:, : heads[0]] + 1)

    for got, expected in zip(results(joined=True), results(joined=False), strict=True):
        assert torch.equal(got, expected)


def results(q: Tensor, k: Tensor, v: Tensor, plan: PackPlan) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, plan, causal=True)
    return out.detach(), *torch.autograd.grad(out, leaves, q + 1)


@pytest.mark.parametrize("keys", [[70, 3, 130], [70, 200, 5]], ids=["tiles and blocks", "cached"])
def test_empty_tiles_and_blocks_do_nothing(keys, device):
    """A plan that is made inside a compiled graph has room for the worst case, and most of it is empty."""
    cu_seqlens, cu_seqlens_k = bounds([70, 3, 130]), bounds(keys)
    queries, keys, cross = 203, sum(keys), keys != [70, 3, 130]
    plan = PackPlan.of(cu_seqlens, cu_seqlens_k)
    spans, tiles, blocks, key_blocks = _stream_plan(cu_seqlens, cu_seqlens_k, queries, keys, cross)
    assert min(len(tiles) - len(plan.tiles), len(blocks) - len(plan.blocks)) > 1
    roomy = replace(
        plan,
        spans=spans,
        tiles=tiles,
        narrow_tiles=_most_narrow_tiles(queries),
        blocks=blocks,
        key_blocks=key_blocks if cross else blocks,
    )
    q = torch.randn(queries, 2, 16, dtype=kernel_dtype(device), device=device)
    k, v = torch.randn(2, keys, 1, 16, dtype=kernel_dtype(device), device=device)
    tight = results(q, k, v, plan.to(device))
    for got, expected in zip(results(q, k, v, roomy.to(device)), tight, strict=True):
        assert torch.equal(got, expected)
