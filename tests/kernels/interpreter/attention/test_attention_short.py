"""Attention of short sequences, the kernels against the definition in float64."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from parity import assert_as_accurate
from streams import kernel_dtype
from trunkline.kernels.attention import attention_short
from trunkline.kernels.attention.attention import attention, attention_reference
from trunkline.kernels.attention.pack_plan import PackPlan

LENGTHS = [63, 64, 1, 0, 2, 30, 65, 40, 127, 128]  # in tiles of both widths, full and ragged


def make(
    device: str, dtype: torch.dtype | None = None, heads: tuple[int, int] = (2, 1), width: int = 32
) -> tuple[Tensor, Tensor, Tensor, PackPlan]:
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)
    dtype = dtype or kernel_dtype(device)
    q, k, v = (torch.randn(sum(LENGTHS), n, width).to(device, dtype) for n in (heads[0], heads[1], heads[1]))
    return q, k, v, PackPlan.of(bounds).to(device)


def assert_matches(q: Tensor, k: Tensor, v: Tensor, plan: PackPlan, **settings: Any) -> None:
    assert_as_accurate(
        lambda q, k, v: attention(q, k, v, plan, **settings),
        lambda q, k, v: attention_reference(q, k, v, plan, **settings),
        (q, k, v),
        floor=1e-5,
    )


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_matches_definition(causal, dtype, device):
    assert_matches(*make(device, dtype), causal=causal)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [8, 32, 64, 80, 96, 128])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2)], ids=str)
def test_matches_definition_on_a_gpu(heads, width, dtype, device):
    assert_matches(*make(device, dtype, heads, width), causal=True)


@pytest.mark.parametrize(("heads", "width"), [((3, 3), 16), ((4, 2), 40)], ids=str)
def test_heads(heads, width, device):
    assert_matches(*make(device, heads=heads, width=width), causal=True)


def test_heads_wider_than_64(device):
    assert_matches(*make(device, torch.float16, heads=(1, 1), width=72), causal=True, softcap=5.0)


@pytest.mark.parametrize(
    ("heads", "settings"),
    [
        ((2, 1), {"causal": False, "window": (9, 4)}),
        ((2, 1), {"causal": True, "window": (200, -1), "scale": 0.4}),
        ((1, 1), {"causal": False, "window": (-1, 0), "softcap": 0.7}),
        ((2, 1), {"causal": True, "window": (30, 0), "softcap": 0.7, "dropout": 0.3, "seed": 2**40 + 7}),
    ],
    ids=str,
)
def test_settings(heads, settings, device):
    assert_matches(*make(device, heads=heads), **settings)


def test_dropout_with_small_and_large_seeds(device):
    for seed in (0, 1, 2**63 - 1):
        assert_matches(*make(device, heads=(1, 1), width=16), causal=False, dropout=0.5, seed=seed)


BUGS: dict[str, tuple[str, str, Callable]] = {
    "boundaries that nobody minds": ("forward", "spans", lambda spans: torch.tensor([0, len(spans)]).expand_as(spans)),
    "one key too many": ("forward", "right", lambda right: right + 1),
    "one key too few in backward": ("backward", "left", lambda left: 62),
    "wrong scale in backward": ("backward", "scale", lambda scale: 1.01 * scale),
}


@pytest.mark.parametrize(("function", "argument", "wrong"), BUGS.values(), ids=BUGS)
def test_bugs_are_found(function, argument, wrong, device, monkeypatch):
    right = getattr(attention_short, function)

    def with_bug(*arguments: Any) -> None:
        bound = inspect.signature(right).bind(*arguments)
        changed = wrong(bound.arguments[argument])
        bound.arguments[argument] = changed.to(device).int().contiguous() if isinstance(changed, Tensor) else changed
        right(*bound.args)

    inputs = make(device, heads=(1, 1), width=16)
    assert_matches(*inputs, causal=True, window=(63, 0))
    monkeypatch.setattr(attention_short, function, with_bug)
    with pytest.raises(AssertionError):
        assert_matches(*inputs, causal=True, window=(63, 0))


def results(q: Tensor, k: Tensor, v: Tensor, plan: PackPlan, dout: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, plan, causal=True)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def test_layout_and_surroundings_do_not_matter(device):
    q, k, v, plan = make(device)
    dout = torch.randn_like(q)
    clean = results(q, k, v, plan, dout)

    def amid_nan(x: Tensor) -> Tensor:  # heads before tokens in memory, and more of both than are ours
        buffer = x.new_full((x.shape[1] + 2, len(x) + 256, x.shape[2]), float("nan"))
        buffer[1:-1, 128:-128] = x.transpose(0, 1)
        return buffer[1:-1, 128:-128].transpose(0, 1)

    for got, expected in zip(results(*map(amid_nan, (q, k, v)), plan, amid_nan(dout)), clean, strict=True):
        assert torch.equal(got, expected)
    flipped = [x.flip(2).contiguous().flip(2).transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert flipped[0].stride(2) != 1
    for got, expected in zip(results(*flipped, plan, dout.mean((0, 1)).expand_as(dout)), clean, strict=True):
        assert got.shape == expected.shape
    assert torch.equal(attention(*flipped, plan, causal=True), clean[0])


def test_only_rows_of_tiles_are_written(device):
    q, k, v, plan = make(device)
    out = torch.full_like(q, 7.0)
    settings = (0.25, -1, 0, 0.0, 0.0, 0)
    attention_short.forward(q, k, v, out, plan.spans, plan.tiles[1:], plan.narrow_tiles - 1, *settings)
    start, end = plan.tiles[0].tolist()
    assert out[start:end].eq(7.0).all()
    assert not out[end:].eq(7.0).any()


def test_neighbours_in_a_tile_do_not_matter(device):
    q, k, v, plan = make(device)
    inputs = [q, k, v, torch.randn_like(q)]
    clean = results(*inputs[:3], plan, inputs[3])
    theirs = torch.zeros(len(q), dtype=torch.bool, device=device)
    for sequence, (start, end) in enumerate(plan.cu_seqlens.unfold(0, 2, 1).tolist()):
        theirs[start:end] = sequence % 2
    q, k, v, dout = (torch.where(theirs[:, None, None], 100 * torch.randn_like(x), x) for x in inputs)
    for got, expected in zip(results(q, k, v, plan, dout), clean, strict=True):
        assert torch.equal(got[~theirs], expected[~theirs])
