"""Attention under the names of other libraries on every layout and size, against the formula and against PyTorch."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

pytest.importorskip("hypothesis")

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import trunkline
from fuzz.layouts import dtypes, spoiled, tensors, views
from fuzz.outcomes import assert_right, assert_right_or_refused

pytestmark = [
    pytest.mark.usefixtures("one_thread", "fresh_counts"),
    pytest.mark.filterwarnings("ignore:trunkline leaves"),
]
sizes = st.sampled_from([0, 1, 2, 5, 130])
LEAVES = st.sets(st.sampled_from("qkv"))


def formula(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float | None, softcap: float = 0.0
) -> Tensor:
    """(B, H, S, D) and (B, G, K, D) -> (B, H, S, D); a query that sees no key gets 0."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = torch.zeros_like(scores, dtype=torch.bool) if hidden is None else hidden.expand_as(scores)
    blind = hidden.all(-1, keepdim=True)
    weights = scores.masked_fill(hidden, -math.inf).masked_fill(blind, 0.0).softmax(-1)
    return weights.masked_fill(blind, 0.0) @ v


def flash_hidden(S: int, K: int, causal: bool, window: tuple[int, int]) -> Tensor:
    """(S, K); the last query stands at the last key."""
    ahead = torch.arange(K) - (torch.arange(S)[:, None] + K - S)
    left, right = window
    return ((ahead > 0) & causal) | ((ahead < -left) & (left >= 0)) | ((ahead > right) & (right >= 0))


@st.composite
def flash_settings(draw: st.DrawFn) -> dict[str, Any]:
    window = draw(st.sampled_from([(-1, -1), (3, 1), (0, 0), (2, -1)]))
    settings = {"causal": draw(st.booleans()), "softmax_scale": draw(st.sampled_from([None, 0.3]))}
    return settings | {"window_size": window, "softcap": draw(st.sampled_from([0.0, 0.7]))}


def floor_of(dtype: torch.dtype) -> float:
    """Of gradients, which are had from outputs that were rounded."""
    return max(1e-5, 16 * torch.finfo(dtype).eps)


@st.composite
def flash_calls(draw: st.DrawFn, packed: bool) -> tuple[Callable, Callable, dict[str, Tensor], float]:
    dtype, D, G, settings = draw(dtypes), draw(st.integers(1, 9)), draw(st.integers(1, 2)), draw(flash_settings())
    H = G * draw(st.integers(1, 2))
    pairs = draw(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=3))
    if not packed:
        pairs = pairs[:1] * draw(st.integers(0, 2))
        S, K = pairs[0] if pairs else (draw(sizes), draw(sizes))
    cu, cu_k = (torch.tensor(lengths).cumsum(0).int() for lengths in zip((0, 0), *pairs, strict=True))
    T, keys, B = int(cu[-1]), int(cu_k[-1]), len(pairs)
    shapes = ([T], [keys]) if packed else ([B, S], [B, K])
    arguments = {name: draw(tensors([*shapes[name != "q"], H if name == "q" else G, D], dtype)) for name in "qkv"}

    def definition(q: Tensor, k: Tensor, v: Tensor, **bounds: Tensor) -> Tensor:
        flat = [x if packed else x.flatten(0, 1) for x in (q, k, v)]
        if not packed:
            bounds = {
                name: torch.arange(len(x) + 1) * x.shape[1] for name, x in (("cu_seqlens_q", q), ("cu_seqlens_k", k))
            }
        rows = [flat[0][:0] + flat[1][:0].sum() + flat[2][:0].sum()]  # which has gradients, if only of zeros
        for (a, b), (c, d) in zip(*(pairwise(ends.tolist()) for ends in bounds.values()), strict=True):
            mask = flash_hidden(b - a, d - c, settings["causal"], settings["window_size"])
            parts = (flat[0][a:b], flat[1][c:d], flat[2][c:d])
            parts = [x.transpose(0, 1)[None] for x in parts]
            rows.append(formula(*parts, mask, settings["softmax_scale"], settings["softcap"])[0].transpose(0, 1))
        return torch.cat(rows).view(q.shape)

    def op(**given: Tensor) -> Tensor:
        if packed:
            return trunkline.flash_attn_varlen_func(**given, max_seqlen_q=130, max_seqlen_k=130, **settings)
        return trunkline.flash_attn_func(**given, **settings)

    if packed:
        arguments |= {"cu_seqlens_q": draw(views(cu)), "cu_seqlens_k": draw(views(cu_k))}
    return op, definition, arguments, floor_of(dtype)


@given(flash_calls(packed=False), LEAVES)
def test_flash_attn_func(call, differentiable):
    *call, floor = call
    assert_right(*call, differentiable, floor=floor)


@given(flash_calls(packed=True), LEAVES)
def test_flash_attn_varlen_func(call, differentiable):
    *call, floor = call
    assert_right(*call, differentiable, floor=floor)


@pytest.mark.parametrize("packed", [True, False])
@given(st.data())
def test_wrong_arguments_of_flash_attention(packed, data):
    op, definition, arguments, floor = data.draw(flash_calls(packed))
    assert_right_or_refused(op, definition, data.draw(spoiled(arguments)), floor=floor)


@given(st.data(), LEAVES)
def test_scaled_dot_product_attention(data, differentiable):
    draw = data.draw
    dtype, D, G = draw(dtypes), draw(st.integers(1, 9)), draw(st.integers(1, 2))
    B, S, K, H = draw(st.integers(0, 3)), draw(sizes), draw(sizes), G * draw(st.integers(1, 2))
    causal, scale = draw(st.booleans()), draw(st.sampled_from([None, 0.3]))
    arguments = {name: draw(tensors((B, H if name == "q" else G, S if name == "q" else K, D), dtype)) for name in "qkv"}
    hidden = torch.ones(S, K, dtype=torch.bool).triu(1) if causal else torch.zeros(S, K, dtype=torch.bool)
    mask = None
    if not causal and draw(st.booleans()):
        shape = draw(st.sampled_from([(B, 1, 1, K), (S, K), (B, H, S, K)]))
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))) > 0.4
        if draw(st.booleans()):  # one stretch of keys in every row
            mask = mask.cummax(-1).values if mask.numel() else mask
        hidden, mask = ~mask, draw(views(mask))

    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return trunkline.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale, enable_gqa=H != G)

    assert_right(op, lambda q, k, v: formula(q, k, v, hidden, scale), arguments, differentiable, floor=floor_of(dtype))


@given(st.data())
def test_multihead_attention(data):
    draw = data.draw
    dtype, batch_first = draw(st.sampled_from([torch.float32, torch.float64])), draw(st.booleans())
    B, S, K = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 5, 130])), draw(st.sampled_from([1, 2, 5, 130]))
    other_widths = draw(st.booleans())
    settings = {"batch_first": batch_first, "bias": draw(st.booleans()), "dropout": 0.0}
    settings |= {"kdim": 5, "vdim": 6} if other_widths else {}
    ours, theirs = (of(8, 2, **settings).eval() for of in (trunkline.MultiheadAttention, nn.MultiheadAttention))
    widths = {"query": 8, "key": ours.kdim, "value": ours.vdim}
    lengths = {"query": S, "key": K, "value": K}
    arguments = {
        name: draw(tensors((B, lengths[name], width) if batch_first else (lengths[name], B, width), dtype))
        for name, width in widths.items()
    }
    call: dict[str, Any] = {"need_weights": draw(st.booleans())}
    if draw(st.booleans()):
        first = torch.tensor([draw(st.integers(0, K - 1)) for _ in range(B)])[:, None]
        call["key_padding_mask"] = draw(views(torch.arange(K) < first))
    parameters = {name: draw(tensors(p.shape, dtype)) for name, p in ours.named_parameters()}

    def calling(module: nn.Module) -> Callable[..., Tensor]:
        def function(query: Tensor, key: Tensor, value: Tensor, **parameters: Tensor) -> Tensor:
            named = {name.replace("__", "."): p for name, p in parameters.items()}
            return torch.func.functional_call(module, named, (query, key, value), call)[0]

        return function

    arguments |= {name.replace(".", "__"): p for name, p in parameters.items()}
    differentiable = draw(st.sets(st.sampled_from(sorted(arguments))))
    assert_right(calling(ours), calling(theirs), arguments, differentiable, slack=8.0)
