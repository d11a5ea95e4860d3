"""Packed attention against its definition in float64, and that no sequence reads what is not its own."""

from typing import Any

import pytest
import torch
from torch import Tensor

from parity import assert_as_accurate
from streams import WIDTH, bounds, kernel_dtype, make
from trunkline.kernels.attention.attention import SHAPES, _backward, _forward, attention, attention_reference, example
from trunkline.kernels.attention.pack_plan import PackPlan

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
RAGGED = [[63], [64], [65], [1, 30, 0, 33], [127], [128], [90, 0, 38], [129], [300]]
RUNS = {  # lengths of the sequences, those of a tile in one list; one of more than 128 tokens stands alone
    "ragged": RAGGED,
    "one token": [[1]],
    "one short": [[37]],
    "one tile": [[5, 1, 0, 58]],
    "long": [[140]],
    "longer": [[257]],
    "very long": [[500], [2], [1025]],
    "equal": [[32, 32], [32, 0], [32]],
    "equal, long": [[150], [150]],
    "equal, longer": [[300], [300]],
    "no token": [[0]],
}


def assert_matches(
    q: Tensor, k: Tensor, v: Tensor, plan: PackPlan, slack: float = 2.0, floor: float = 1e-6, **settings: Any
) -> None:
    assert_as_accurate(
        lambda q, k, v: attention(q, k, v, plan, **settings),
        lambda q, k, v: attention_reference(q, k, v, plan, **settings),
        (q, k, v),
        slack=slack,
        floor=floor,
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
    assert_matches(*make(runs, device=device), causal=causal)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_half_precision(causal, dtype, device):
    # sums in float32: better than the definition, which rounds the scores and the probabilities
    assert_matches(*make(RAGGED, dtype=dtype, device=device), causal=causal, slack=0.5)


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


LAYOUTS = {  # of (T, heads, WIDTH)
    "heads apart": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "every second number": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0],
    "one number a head": lambda x: x[..., :1].expand_as(x),
    "one token": lambda x: x[:1].expand_as(x),
    "tokens that overlap": lambda x: x.flatten().as_strided(x.shape, (1, 3, 1)),
    "negated": lambda x: torch._neg_view(x),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", range(3), ids="qkv")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_of_memory(layout, which, device):
    *tensors, plan = make([[40, 20], [300], [140]], kv_heads=4, device=device)
    tensors[which] = layout(tensors[which])
    assert_matches(*tensors, plan, causal=True)


def test_upstream_gradient_may_lie_in_any_way():
    q, k, v, plan = make([[40, 20], [300], [140]])
    dout = torch.randn(1, 4, WIDTH).expand_as(q).transpose(0, 2).contiguous().transpose(0, 2)
    whole = results(q, k, v, plan, False, dout.contiguous())
    for got, expected in zip(results(q, k, v, plan, False, dout), whole, strict=True):
        torch.testing.assert_close(got, expected)


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


SETTINGS: dict[str, dict] = {
    "window": {"causal": False, "window": (9, 4)},
    "window of one": {"causal": False, "window": (0, 0)},
    "window to the left": {"causal": False, "window": (100, -1)},
    "window to the right": {"causal": False, "window": (-1, 3)},
    "causal window": {"causal": True, "window": (70, 5)},
    "soft cap": {"causal": True, "softcap": 0.4},
    "dropout": {"causal": True, "dropout": 0.3, "seed": 2**40 + 7},
    "everything": {"causal": True, "window": (30, 0), "softcap": 0.7, "scale": 0.5, "dropout": 0.2, "seed": 3},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


@pytest.mark.parametrize("device", DEVICES)
@every_setting
def test_settings_match_definition(settings, device):
    assert_matches(*make(RAGGED, device=device), **settings, floor=1e-5)


EVERY_LENGTH = [0, 1, 2, 63, 64, 65, 127, 128, 129, 500, 1025]  # around the tiles' sizes, and far beyond


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("settings", [{"causal": True}, {"causal": False}, *SETTINGS.values()], ids=str)
def test_every_length_matches_definition(settings, device):
    plan = PackPlan.of(bounds(EVERY_LENGTH)).to(device)
    q, k, v = (torch.randn(plan.num_tokens, n, 4).to(device, kernel_dtype(device)) for n in (2, 1, 1))
    assert_matches(q, k, v, plan, **settings, floor=1e-5)


CROSS = {  # queries and keys of every sequence
    "decoding": ([1, 1, 1, 1], [5, 1, 300, 129]),
    "chunks": ([20, 130, 7], [50, 400, 7]),
    "more queries than keys": ([20, 300, 5], [7, 30, 0]),
    "no queries": ([0, 4, 0], [9, 0, 200]),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("settings", [{"causal": True}, {"causal": False}, *SETTINGS.values()], ids=str)
@pytest.mark.parametrize(("lengths", "lengths_k"), CROSS.values(), ids=CROSS)
def test_keys_of_other_lengths_match_definition(lengths, lengths_k, settings, device):
    plan = PackPlan.of(bounds(lengths), bounds(lengths_k)).to(device)
    shapes, dtype = ((lengths, 4), (lengths_k, 2), (lengths_k, 2)), kernel_dtype(device)
    q, k, v = (torch.randn(sum(n), h, WIDTH).to(device, dtype) for n, h in shapes)
    assert_matches(q, k, v, plan, **settings, floor=1e-5)


def test_query_without_keys_gets_zero_and_gives_no_gradient():
    plan = PackPlan.of(bounds([3, 2]), bounds([1, 0]))  # causal: only the third query sees the key
    q, k, v = torch.randn(5, 1, 8), torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    out, dq, dk, dv = results(q, k, v, plan, True, torch.randn(5, 1, 8))
    assert torch.equal(out[2], v[0])
    assert not out[[0, 1, 3, 4]].any()
    assert not dq[[0, 1, 3, 4]].any()
    assert dk.isfinite().all()
    assert dv.any()


def test_dropout_does_not_depend_on_the_tiling():
    lengths = [40, 20, 70]
    q, k, v = (torch.randn(130, 2, WIDTH, dtype=torch.float64) for _ in range(3))
    settings = {"causal": True, "dropout": 0.5, "seed": 1}
    tiles = attention(q, k, v, PackPlan.of_runs([[40, 20], [70]]), **settings)
    wide = attention(q, k, v, PackPlan.of_runs([[40], [20, 70]]), **settings)
    blocks = attention(q, k, v, PackPlan._cross(lengths, lengths), **settings)
    torch.testing.assert_close(tiles, wide)
    torch.testing.assert_close(tiles, blocks)


def test_dropout_leaves_out_the_share_it_should():
    q, k = torch.zeros(2, 400, 1, 4)  # every weight is the same
    plan = PackPlan.of(bounds([400]))
    for dropout in (0.1, 0.7):
        out = attention(q, k, torch.ones_like(k), plan, causal=False, dropout=dropout)  # share of kept / (1 - dropout)
        assert out.mean() == pytest.approx(1.0, abs=0.02)
        assert out.std() == pytest.approx((dropout / (1 - dropout) / 400) ** 0.5, rel=0.2)


def test_seed_of_dropout():
    q, k, v, plan = make([[60], [200]])

    def drop(**seed: int) -> Tensor:
        return attention(q, k, v, plan, causal=True, dropout=0.3, **seed)

    assert torch.equal(drop(seed=5), drop(seed=5))
    assert not torch.equal(drop(seed=5), drop(seed=6))
    assert not torch.equal(drop(seed=5), drop(seed=5 + 2**32))  # all 64 bits count
    assert not torch.equal(drop(), drop())
    torch.manual_seed(1)
    first = drop()
    torch.manual_seed(1)
    assert torch.equal(first, drop())


@every_setting
def test_gradcheck_of_settings(settings):
    for lengths, lengths_k in (([3, 0, 4], [3, 0, 4]), ([2, 4, 1], [5, 3, 0])):
        plan = PackPlan.of(bounds(lengths), bounds(lengths_k))
        shapes = ((sum(lengths), 2, 3), (sum(lengths_k), 1, 3), (sum(lengths_k), 1, 3))
        leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, plan, **settings), leaves)  # noqa: B023


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
    layout = list(plan.layout)
    settings = (plan.narrow_tiles, 0.25, -1, 0, 0.0, 0.0, None, None)
    torch.library.opcheck(_forward, (q, k, v, layout, *settings))
    out, lse = _forward(q, k, v, layout, *settings)
    for joined in (False, True):
        torch.library.opcheck(_backward, (dout, q, k, v, out, lse, layout, *settings, False, joined))
    rows = torch.tensor([0, 7, 9, 203])
    settings = (*settings[:-1], rows)
    torch.library.opcheck(_forward, (q[rows], k, v, layout, *settings))
    out, lse = _forward(q[rows], k, v, layout, *settings)
    torch.library.opcheck(_backward, (dout[rows], q[rows], k, v, out, lse, layout, *settings, False, False))


@pytest.mark.parametrize("rows", [None, torch.tensor([3, 100])], ids=["all", "rows"])
def test_gradient_of_one_tensor_is_that_of_its_heads(rows):
    plan = PackPlan.of_runs([[40, 20], [140]])
    whole = torch.randn(200, 4 + 2 + 2, WIDTH, requires_grad=True)
    heads = whole.split([4, 2, 2], 1)
    joined, apart = (attention(*heads, plan, causal=True, rows=rows, whole=x) for x in (whole, None))
    dout = torch.randn_like(joined)
    assert torch.equal(*(torch.autograd.grad(out, whole, dout)[0] for out in (joined, apart)))


ROWS = {
    "last of every sequence": lambda plan: plan.cu_seqlens[1:][plan.cu_seqlens.diff() > 0].long() - 1,
    "any order, some twice": lambda plan: torch.randint(
        plan.num_tokens, (40,), generator=torch.Generator().manual_seed(0)
    ),
    "of two sequences": lambda plan: torch.cat(
        [torch.arange(63), torch.arange(plan.num_tokens - 9, plan.num_tokens - 2)]
    ),
    "all": lambda plan: torch.arange(plan.num_tokens),
    "none": lambda plan: torch.zeros(0, dtype=torch.int64),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "settings",
    [
        {"causal": True},
        {"causal": False},
        {"causal": False, "window": (20, 3)},
        {"causal": True, "dropout": 0.3, "seed": 7},
        {"causal": False, "softcap": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_rows_are_those_of_all_outputs(rows, settings, device):
    q, k, v, plan = make(RAGGED, device=device)
    rows = rows(plan.to("cpu")).to(device)
    assert_as_accurate(
        lambda q, k, v: attention(q, k, v, plan, rows=rows, **settings),
        lambda q, k, v: attention_reference(q, k, v, plan, **settings)[rows],
        (q, k, v),
        slack=2.0,
        floor=1e-6,
    )


def test_rows_of_a_cache():
    plan = PackPlan.of(bounds([1, 30, 140]), bounds([9, 200, 150]))
    q, k, v = torch.randn(171, 4, WIDTH), torch.randn(359, 2, WIDTH), torch.randn(359, 2, WIDTH)
    rows = torch.tensor([0, 5, 30, 31, 170])
    for causal in (True, False):
        whole = attention(q, k, v, plan, causal=causal)
        torch.testing.assert_close(attention(q, k, v, plan, causal=causal, rows=rows), whole[rows])


@pytest.mark.parametrize("rows", [torch.zeros(2, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int64)], ids=str)
def test_rows_are_integers(rows):
    q, k, v, plan = make([[3, 5]])
    with pytest.raises(ValueError, match=r"attention: rows must be \(R,\) int64 on cpu, got torch.int"):
        attention(q, k, v, plan, causal=True, rows=rows)


@pytest.mark.parametrize("rows", [[0, 8], [-1], [8] * 9, [-1] * 9], ids=str)
def test_rows_that_there_are_not_are_an_error(rows):
    q, k, v, plan = make([[3, 5]])
    with pytest.raises(ValueError, match=r"attention: rows must be in \[0, 8\): .*out of"):
        attention(q, k, v, plan, causal=True, rows=torch.tensor(rows))


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


def test_example_is_what_the_function_takes():
    sizes = {"lengths": [48, 3, 200], "heads": 4, "head_dim": 32, "kv_heads": 2, "causal": True}
    arguments = example("cpu", torch.bfloat16, **sizes)
    assert attention(**arguments).shape == (251, 4, 32)
    assert torch.equal(arguments["q"], example("cpu", torch.bfloat16, **sizes)["q"])
    assert set(SHAPES["1024 x 32"]) == set(sizes) - {"kv_heads"}
