"""Packed attention against its definition in float64, and that no sequence reads what is not its own."""

import pytest
import torch
from torch import Tensor

from parity import assert_as_accurate
from trunkline.engine.packing import PackPlan, _plan
from trunkline.kernels.attention import _backward, _forward, attention, attention_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
RAGGED = [[63], [64], [65], [1, 30, 0, 33], [127], [128], [90, 0, 38], [129], [300]]
RUNS = {  # lengths of the sequences, those of a tile in one list; one of more than 128 tokens stands alone
    "ragged": RAGGED,
    "one token": [[1]],
    "one short": [[37]],
    "one tile": [[5, 1, 0, 58]],
    "one long": [[257]],
    "no token": [[0]],
}
WIDTH = 16


def make(
    runs: list[list[int]], heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, PackPlan]:
    """q, k, v and the plan of a stream."""
    plan = _plan(runs)
    T = int(plan.cu_seqlens[-1])
    q, k, v = (torch.randn(T, n, WIDTH).to(device, dtype) for n in (heads, kv_heads, kv_heads))
    return q, k, v, plan.to(device)


def assert_matches(
    q: Tensor, k: Tensor, v: Tensor, plan: PackPlan, causal: bool, scale: float | None = None, slack: float = 2.0
) -> None:
    assert_as_accurate(
        lambda q, k, v: attention(q, k, v, plan, causal=causal, scale=scale),
        lambda q, k, v: attention_reference(q, k, v, plan.cu_seqlens, causal, scale or WIDTH**-0.5),
        (q, k, v),
        slack=slack,
    )


def results(q: Tensor, k: Tensor, v: Tensor, plan: PackPlan, causal: bool, dout: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, plan, causal=causal)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_matches_definition(runs, causal, device):
    assert_matches(*make(runs, device=device), causal)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_half_precision(causal, dtype, device):
    # sums in float32: better than the definition, which rounds the scores and the probabilities
    assert_matches(*make(RAGGED, dtype=dtype, device=device), causal, slack=0.5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (4, 1)])
def test_heads_that_share_keys(heads, kv_heads):
    assert_matches(*make([[40, 20], [70, 50], [140]], heads, kv_heads), causal=True)


def test_scale():
    assert_matches(*make([[40, 20], [130]]), causal=True, scale=0.05)


def test_scores_of_a_thousand():
    q, k, v, plan = make([[40, 20], [130]])
    offset = torch.zeros(WIDTH)
    offset[0] = 1000.0
    q[..., 0] = 4.0  # every score grows by scale * 4 * 1000 = 1000
    # the definition scales the scores, ours the queries: one more rounding of what the scores are made of
    assert_matches(q, k + offset, v, plan, causal=True, slack=4.0)
    assert_matches(q, k - offset, v, plan, causal=True, slack=4.0)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_gradcheck(causal):
    q, k, v, plan = make([[3, 0, 1], [2]], heads=2, kv_heads=1, dtype=torch.float64)
    leaves = [x[..., :2].clone().requires_grad_() for x in (q, k, v)]
    torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, plan, causal=causal), leaves)
    q, k, v, plan = make([[130]], heads=2, kv_heads=1, dtype=torch.float64)
    leaves = [x[..., :2].clone().requires_grad_() for x in (q, k, v)]
    torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, plan, causal=causal), leaves, fast_mode=True)


def test_views_of_a_fused_projection():
    _, _, _, plan = make(RAGGED)
    T = int(plan.cu_seqlens[-1])
    q, k, v = torch.randn(T, 8, WIDTH).split([4, 2, 2], 1)
    assert not q.is_contiguous()
    assert_matches(q, k, v, plan, causal=True)


def test_views_in_the_layout_of_hugging_face():
    q, k, v, plan = make(RAGGED)
    q, k, v = (x.transpose(0, 1).contiguous()[None].transpose(1, 2)[0] for x in (q, k, v))  # (1, H, T, D) -> (T, H, D)
    assert not q.is_contiguous()
    assert_matches(q, k, v, plan, causal=False)


def test_upstream_gradient_may_be_expanded():
    q, k, v, plan = make(RAGGED)
    whole = results(q, k, v, plan, True, torch.full_like(q, 0.5))
    for got, expected in zip(results(q, k, v, plan, True, torch.tensor(0.5).expand_as(q)), whole, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_memory_around_the_stream_is_never_read(causal, device):
    def amid_nan(x: Tensor) -> Tensor:
        buffer = x.new_full((len(x) + 256, *x.shape[1:]), float("nan"))
        buffer[128:-128] = x
        return buffer[128:-128]

    q, k, v, plan = make(RAGGED, device=device)
    dout = torch.randn_like(q)
    clean = results(q, k, v, plan, causal, dout)
    for got, expected in zip(results(*map(amid_nan, (q, k, v)), plan, causal, amid_nan(dout)), clean, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("run", range(len(RAGGED)), ids=[str(run) for run in RAGGED])
def test_other_tiles_and_long_sequences_are_never_read(run, causal, device):
    q, k, v, plan = make(RAGGED, device=device)
    inputs = [q, k, v, torch.randn_like(q)]
    first = sum(map(sum, RAGGED[:run]))
    theirs = torch.zeros(len(q), dtype=torch.bool, device=device)
    theirs[first : first + sum(RAGGED[run])] = True
    q, k, v, dout = (x.masked_fill(theirs[:, None, None], float("nan")) for x in inputs)
    clean = results(*inputs[:3], plan, causal, inputs[3])
    for got, expected in zip(results(q, k, v, plan, causal, dout), clean, strict=True):
        assert torch.equal(got[~theirs], expected[~theirs])


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_neighbours_in_a_tile_do_not_matter(causal):
    q, k, v, plan = make(RAGGED)
    inputs = [q, k, v, torch.randn_like(q)]
    clean = results(*inputs[:3], plan, causal, inputs[3])
    sequences = torch.arange(len(plan.cu_seqlens) - 1).repeat_interleave(plan.cu_seqlens.diff())
    for sequence in sequences.unique():
        theirs = sequences == sequence
        q, k, v, dout = (torch.where(theirs[:, None, None], 100 * torch.randn_like(x), x) for x in inputs)
        for got, expected in zip(results(q, k, v, plan, causal, dout), clean, strict=True):
            assert torch.equal(got[~theirs], expected[~theirs])


def test_tokens_outside_the_plan_get_zero():
    q, k, v, plan = make([[30, 20], [70], [129]])
    without = PackPlan(plan.cu_seqlens, plan.tiles[1:], plan.blocks[:1], plan.max_seqlen)
    for got in results(q, k, v, without, True, torch.randn_like(q))[:2]:  # out and dq
        assert got[50:248].any()
        assert not got[:50].any()
        assert not got[248:].any()


def test_single_token_gets_its_own_value():
    q, k, v, plan = make([[1, 1], [1]], heads=4, kv_heads=4)
    assert torch.equal(attention(q, k, v, plan, causal=True), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["tokens first", "heads first"])
def test_op_contract(layout, dtype):
    q, k, v, plan = make([[3, 0, 5], [66], [130]], dtype=dtype)
    dout = torch.randn_like(q)
    if layout == "heads first":
        q, k, v, dout = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v, dout))
    where = (plan.cu_seqlens, plan.tiles, plan.blocks)
    torch.library.opcheck(_forward, (q, k, v, *where, True, 0.25))
    out, lse = _forward(q, k, v, *where, True, 0.25)
    torch.library.opcheck(_backward, (dout, q, k, v, out, lse, *where, True, 0.25))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
def test_compiles():
    q, k, v, plan = make([[3, 5], [66], [130]])
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q * 2, k, v, plan, causal=True).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
    eager = function(*leaves)
    torch.testing.assert_close(compiled, eager)
    for got, expected in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves), strict=True):
        torch.testing.assert_close(got, expected)


def test_same_bits_every_time():
    q, k, v, plan = make(RAGGED)
    dout = torch.randn_like(q)
    first = results(q, k, v, plan, False, dout)
    assert all(map(torch.equal, first, results(q, k, v, plan, False, dout)))


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((5, 4), (5, 2, 8), (5, 2, 8)),
        ((5, 4, 8), (5, 2, 8), (5, 4, 8)),
        ((5, 4, 8), (6, 2, 8), (6, 2, 8)),
        ((5, 4, 8), (5, 2, 4), (5, 2, 4)),
        ((5, 4, 8), (5, 3, 8), (5, 3, 8)),
        ((5, 4, 8), (5, 0, 8), (5, 0, 8)),
    ],
)
def test_wrong_shapes_are_named(q, k, v):
    message = rf"attention: q must be \(T, H, D\).*got q \[{str(q)[1:-1]}\], k \[{str(k)[1:-1]}\], v \[{str(v)[1:-1]}\]"
    with pytest.raises(ValueError, match=message):
        attention(torch.zeros(q), torch.zeros(k), torch.zeros(v), _plan([[5]]), causal=True)


def test_mixed_dtypes_are_named():
    q, k, v, plan = make([[5]])
    with pytest.raises(ValueError, match=r"one dtype, got torch\.float32, torch\.float16, torch\.float32"):
        attention(q, k.half(), v, plan, causal=True)
