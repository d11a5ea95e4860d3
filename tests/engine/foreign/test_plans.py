"""Plans of padded batches and of streams inside a graph, against attention with the mask they stand for."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trunkline.engine.foreign.plans import boundaries_of_starts, bounds_of, padded_plan, stream_plan, whole_rows_plan
from trunkline.kernels.attention.attention import attention
from trunkline.kernels.attention.pack_plan import PackPlan

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
HEADS, WIDTH = 2, 8


def random(B: int, slots: int) -> Tensor:
    return torch.randn(B, slots, HEADS, WIDTH, dtype=torch.float64)


def by_rows(q: Tensor, k: Tensor, v: Tensor, plan: PackPlan, **settings) -> Tensor:
    return attention(*(x.flatten(0, 1) for x in (q, k, v)), plan, **settings).view(q.shape)


def by_mask(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, seen[:, None]).transpose(1, 2)


def assert_same(q: Tensor, k: Tensor, v: Tensor, plan: PackPlan, seen: Tensor, of_use: Tensor, **settings) -> None:
    """The output and the gradients, where `of_use` (B, Q); the rest gets no gradient from above."""
    upstream = torch.randn_like(q).masked_fill(~of_use[:, :, None, None], 0.0)
    results = []
    for function in (lambda *x: by_rows(*x, plan, **settings), lambda *x: by_mask(*x, seen)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        results.append((out[of_use], *torch.autograd.grad(out, leaves, upstream)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


ROWS = [(0, 5), (2, 9), (4, 4), (8, 9), (0, 9)]  # first token and end, in 9 slots


def padded(slots: int) -> tuple[Tensor, Tensor]:
    bounds = torch.tensor([(first * slots // 9, end * slots // 9) for first, end in ROWS])
    slot = torch.arange(slots)
    return bounds, (slot >= bounds[:, :1]) & (slot < bounds[:, 1:])


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("slots", [9, 31, 64, 65, 128, 129, 300])
def test_padded_rows(slots, causal):
    bounds, keep = padded(slots)
    q, k, v = (random(len(bounds), slots) for _ in range(3))
    seen = keep[:, None].expand(-1, slots, -1)
    seen = seen.tril() if causal else seen
    assert_same(q, k, v, padded_plan(bounds, slots, slots), seen, keep, causal=causal)


@pytest.mark.parametrize("queries", [1, 7, 140])
def test_all_queries_see_the_keys_of_their_row(queries):
    bounds, keep = padded(150)
    q, k, v = random(len(bounds), queries), random(len(bounds), 150), random(len(bounds), 150)
    none = torch.zeros(len(bounds), 1, dtype=torch.int64)
    plan = padded_plan(torch.cat([none, none + queries, bounds], 1), queries, 150)
    everything = torch.ones(len(bounds), queries, dtype=torch.bool)
    assert_same(q, k, v, plan, keep[:, None].expand(-1, queries, -1), everything, causal=False)
    assert not by_rows(q, k, v, plan, causal=False)[2].any()  # a row without keys


def test_slots_outside_the_rows_get_zero():
    bounds, keep = padded(300)
    q, k, v = (random(len(bounds), 300) for _ in range(3))
    out = by_rows(q, k, v, padded_plan(bounds, 300, 300), causal=True)
    assert not out[~keep].any()
    assert out[keep].all()


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (70, 70), (130, 130), (3, 140), (140, 3)])
def test_whole_rows(queries, keys):
    q, k, v = random(3, queries), random(3, keys), random(3, keys)
    seen = torch.ones(3, queries, keys, dtype=torch.bool).tril(keys - queries)
    plan = whole_rows_plan(3, queries, keys, q.device)
    assert_same(q, k, v, plan, seen, torch.ones(3, queries, dtype=torch.bool), causal=True)


def test_bounds_and_holes():
    keep = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]]).bool()
    first, end, whole = bounds_of(keep)
    assert first.tolist() == [1, 0, 0, 3]
    assert end.tolist() == [3, 4, 0, 4]
    assert whole
    keep[1, 2] = False
    assert not bounds_of(keep)[2]


def test_plan_of_one_mask_is_made_once():
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    plan = stream_plan(cu_seqlens, None, 7, 7)
    assert stream_plan(cu_seqlens, None, 7, 7) is plan
    assert stream_plan(cu_seqlens.clone(), None, 7, 7) is not plan
    cu_seqlens[1] = 4  # written to: no longer the same
    assert stream_plan(cu_seqlens, None, 7, 7).cu_seqlens.tolist() == [0, 4, 7]


def test_plan_made_without_gradients_can_be_used_with_them():
    q, k, v = (torch.randn(6, HEADS, WIDTH) for _ in range(3))
    with torch.inference_mode():
        attention(q, k, v, whole_rows_plan(2, 3, 3, q.device), causal=True)
    leaf = q.clone().requires_grad_()
    attention(leaf, k, v, whole_rows_plan(2, 3, 3, q.device), causal=True).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.any()


LENGTHS = {
    "ragged": [5, 64, 1, 65, 128, 129, 3, 300],
    "ones": [1] * 40,
    "narrow and wide": [1, 65] * 6,
    "long": [129] * 4,
    "one": [200],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_stream_in_a_graph(lengths):
    T = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    q, k, v = (torch.randn(T, HEADS, WIDTH) for _ in range(3))
    starts = torch.zeros(T, dtype=torch.bool).index_fill_(0, cu_seqlens[:-1].long(), True)

    def by_boundaries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, stream_plan(cu_seqlens, None, T, T), causal=True)

    def by_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, stream_plan(cu_seqlens, cu_seqlens.clone(), T, T), causal=True)

    def by_starts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, stream_plan(boundaries_of_starts(starts), None, T, T), causal=True)

    expected = by_boundaries(q, k, v)
    for function in (by_boundaries, by_keys, by_starts):
        torch.testing.assert_close(function(q, k, v), expected)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
        torch.testing.assert_close(compiled, expected)
        gradients = torch.autograd.grad(compiled.square().sum(), leaves)
        exact = torch.autograd.grad(function(*leaves).square().sum(), leaves)
        for got, wanted in zip(gradients, exact, strict=True):
            torch.testing.assert_close(got, wanted)


def test_stream_of_other_keys_in_a_graph():
    cu_seqlens, cu_seqlens_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 3, 10], [0, 140, 142, 150]))
    q, k, v = torch.randn(10, HEADS, WIDTH), torch.randn(150, HEADS, WIDTH), torch.randn(150, HEADS, WIDTH)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, stream_plan(cu_seqlens, cu_seqlens_k, 10, 150), causal=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(compiled, function(q, k, v))


def test_op_contract():
    from trunkline.engine.foreign.plans import _stream_plan

    cu_seqlens = torch.tensor([0, 5, 70, 200, 330], dtype=torch.int32)
    torch.library.opcheck(_stream_plan, (cu_seqlens, cu_seqlens, 330, 330, False))
    torch.library.opcheck(_stream_plan, (cu_seqlens, cu_seqlens.clone(), 330, 330, True))
