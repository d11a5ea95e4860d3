"""Other libraries' kernels for long sequences: what they are called with, by stand-ins that compute the same.

The stand-ins have the libraries' signatures, bottom-right causal semantics and garbage where nothing is asked of them;
the real ones need a GPU.
"""

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen

from trunkline.kernels import decisions
from trunkline.kernels.attention import attention_elsewhere
from trunkline.kernels.attention.attention import attention, attention_reference
from trunkline.kernels.attention.attention_elsewhere import LIBRARIES, NOT_COMPILED, OURS, chosen
from trunkline.kernels.attention.pack_plan import QUERY_BLOCK, PackPlan


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


class _Packed(torch.autograd.Function):
    """The definition, of a stream with room at its end: NaN there, in the output and in the gradients."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, cu_seqlens_k, settings):
        ends = int(cu_seqlens[-1]), int(cu_seqlens_k[-1])
        plan = PackPlan._cross(cu_seqlens.diff().tolist(), cu_seqlens_k.diff().tolist())
        with torch.enable_grad():
            leaves = [
                x.detach()[:end].requires_grad_() for x, end in zip((q, k, v), (ends[0], ends[1], ends[1]), strict=True)
            ]
            ctx.out, ctx.leaves = attention_reference(*leaves, plan, **settings), leaves
        ctx.sizes = len(q), len(k), len(v)
        return _padded(ctx.out.detach(), len(q))

    @staticmethod
    def backward(ctx, dout):
        assert not dout[len(ctx.out) :].any()  # no gradient comes from where nothing was asked
        gradients = torch.autograd.grad(ctx.out, ctx.leaves, dout[: len(ctx.out)])
        return *(_padded(x, size) for x, size in zip(gradients, ctx.sizes, strict=True)), None, None, None


def _padded(x: Tensor, rows: int) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 0, rows - len(x)), value=float("nan"))


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """As of flash-attn 2.8."""
    CALLS.append({"library": "flash_attn", **locals()})
    for cu_seqlens, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
        assert cu_seqlens.dtype == torch.int32
        assert longest == cu_seqlens.diff().max()
    settings = {"causal": causal, "scale": softmax_scale, "window": window_size, "softcap": softcap or None}
    return _Packed.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, settings)


def flash_attn_4_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
) -> tuple[Tensor, None]:
    """As of flash-attn-4 4.0.0b36."""
    CALLS.append({"library": "flash_attn_4", **locals()})
    assert window_size == (None, None)
    return _Packed.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, {"causal": causal, "scale": softmax_scale}), None


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """As of torch 2.13."""
    CALLS.append({"library": "varlen_attn", **locals()})
    assert max_q == max_k == cu_seq_q.diff().max()
    assert enable_gqa or query.shape[1] == key.shape[1]
    return _Packed.apply(query, key, value, cu_seq_q, cu_seq_k, {"causal": window_size == (-1, 0), "scale": scale})


CALLS: list[dict[str, Any]] = []


@pytest.fixture
def calls(monkeypatch) -> list[dict[str, Any]]:
    """Of the stand-ins, in place of the libraries."""
    CALLS.clear()
    of_flash = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", of_flash)
    interface = SimpleNamespace(flash_attn_varlen_func=flash_attn_4_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", SimpleNamespace(interface=interface))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", lambda backend: _Anything())
    return CALLS


class _Anything:
    """A choice of a kernel that a CPU does not have."""

    def __enter__(self) -> None:
        CALLS.append({"library": "cudnn"})

    def __exit__(self, *error: Any) -> None:
        pass


@pytest.fixture
def choose(monkeypatch):
    """Gives the long sequences to a library, as on a GPU."""

    def to(library: str) -> None:
        long = lambda q, k, plan, causal, plain: library if len(plan.blocks) else OURS  # noqa: E731
        monkeypatch.setattr(attention_elsewhere, "chosen", long)

    return to


PLANS = {
    "mixed": PackPlan.of(bounds([5, 200, 64, 0, 131, 128, 3])),
    "long at both ends": PackPlan.of(bounds([129, 7, 300])),
    "all long": PackPlan.of(bounds([200, 131])),
}
EVERYTHING = {"causal": False, "window": (30, 5), "softcap": 2.0, "scale": 0.3, "deterministic": True}


def results(plan: PackPlan, **settings: Any) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    shapes = [(plan.num_tokens, 4, 8), (plan.num_keys, 2, 8), (plan.num_keys, 2, 8)]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    out = attention(*leaves, plan, **settings)
    return out, *torch.autograd.grad(out, leaves, torch.randn(shapes[0], dtype=torch.float64))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_outputs_and_gradients_are_those_of_our_kernels(library, plan, causal, calls, choose):
    ours = results(plan, causal=causal, scale=0.3)
    choose(library)
    for theirs, expected in zip(results(plan, causal=causal, scale=0.3), ours, strict=True):
        torch.testing.assert_close(theirs, expected)
    assert [call["library"] for call in calls] == [library]


@pytest.mark.parametrize(
    "plan", [PLANS["mixed"], PackPlan.of(bounds([1, 7]), bounds([200, 30]))], ids=["mixed", "cache"]
)
def test_flash_attn_takes_every_setting_and_a_cache(plan, calls, choose):
    ours = results(plan, **EVERYTHING)
    choose("flash_attn")
    for theirs, expected in zip(results(plan, **EVERYTHING), ours, strict=True):
        torch.testing.assert_close(theirs, expected)
    (call,) = calls
    assert (call["causal"], call["window_size"], call["softmax_scale"]) == (False, (30, 5), 0.3)
    assert (call["softcap"], call["deterministic"], call["dropout_p"]) == (2.0, True, 0.0)


class _Unfilled(torch.autograd.Function):
    """x, and NaN in rows of a mask: in what passes, or in its gradient."""

    @staticmethod
    def forward(ctx, x, rows, of_gradient):
        ctx.save_for_backward(rows)
        ctx.of_gradient = of_gradient
        return x.clone() if of_gradient else x.masked_fill(rows, float("nan"))

    @staticmethod
    def backward(ctx, dx):
        (rows,) = ctx.saved_tensors
        return dx.masked_fill(rows, float("nan")) if ctx.of_gradient else dx, None, None


def test_what_the_kernels_of_tiles_leave_unfilled_reaches_nobody(calls):
    """They write the tokens in tiles alone: of the others there is what was in memory, in output and gradients."""
    plan, settings = PLANS["mixed"], {"causal": True, "scale": None, "window": None, "softcap": None}
    in_blocks = (attention_elsewhere.long_part(plan).slot >= 0)[:, None, None]

    def tiled(q: Tensor, k: Tensor, v: Tensor, plan: PackPlan) -> Tensor:
        q, k, v = (_Unfilled.apply(x, in_blocks, True) for x in (q, k, v))
        return _Unfilled.apply(attention(q, k, v, plan, causal=True), in_blocks, False)

    leaves = [torch.randn(plan.num_tokens, 2, 8, requires_grad=True) for _ in range(3)]
    others = {"dropout": 0.0, "deterministic": False}
    out = attention_elsewhere.attention("flash_attn", *leaves, plan, tiled, **settings, **others)
    assert out.isfinite().all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(out, leaves, torch.randn_like(out)))


def test_only_long_sequences_are_handed_over(calls, choose):
    choose("flash_attn")
    results(PLANS["mixed"], causal=True)
    assert CALLS[0]["cu_seqlens_q"].tolist() == [0, 200, 331]
    assert len(CALLS[0]["q"]) == 4 * QUERY_BLOCK


def test_compiled_it_is_one_graph_for_all_batches_of_a_shape(monkeypatch):
    """Mixes with as many sequences, tiles and blocks, and the long sequences elsewhere."""

    def plan_of(lengths: list[int]) -> PackPlan:
        plan = PackPlan.of(bounds(lengths))
        return PackPlan(**{**vars(plan), "max_seqlen": 256})

    def any_varlen_attn(q, k, v, cu_q, cu_k, longest, longest_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        return q * cu_q.sum() + k.repeat_interleave(2, 1) + v.repeat_interleave(2, 1)  # depends on all that it gets

    compiles: list[Any] = []

    def backend(graph, inputs):
        compiles.append(graph)
        return graph.forward

    monkeypatch.setattr(varlen, "varlen_attn", any_varlen_attn)
    library = lambda q, k, plan, *_: "varlen_attn" if len(plan.blocks) else OURS  # noqa: E731
    monkeypatch.setattr(attention_elsewhere, "chosen", library)
    function = torch.compile(attention, fullgraph=True, dynamic=False, backend=backend)
    for lengths in ([5, 200, 60, 135], [135, 60, 200, 5], [200, 5, 135, 60]):
        plan = plan_of(lengths)
        q, k, v = torch.randn(400, 4, 8), torch.randn(400, 2, 8), torch.randn(400, 2, 8)
        torch.testing.assert_close(function(q, k, v, plan, causal=True), attention(q, k, v, plan, causal=True))
    assert len(compiles) == 1


def test_rows_are_those_of_all_outputs(calls, choose):
    plan, rows = PLANS["mixed"], torch.tensor([0, 4, 204, 530])
    q, k, v = torch.randn(3, plan.num_tokens, 2, 8)
    choose("flash_attn")
    out = attention(q, k, v, plan, causal=True)
    assert torch.equal(attention(q, k, v, plan, causal=True, rows=rows), out[rows])
    assert len(calls) == 2


def test_dropout_is_refused(calls, choose):
    q = torch.randn(200, 2, 8)
    choose("flash_attn")
    with pytest.raises(ValueError, match=r"TRUNKLINE_LONG_ATTENTION=flash_attn dropout must be 0, got 0\.1"):
        attention(q, q, q, PackPlan.of(bounds([200])), causal=True, dropout=0.1)


@pytest.mark.parametrize("installed", [None, SimpleNamespace()], ids=["nothing", "another flash_attn"])
def test_not_installed_is_said(installed, calls, choose, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", installed)
    q = torch.randn(200, 2, 8)
    choose("flash_attn")
    with pytest.raises(ImportError, match="flash-attn 2 is not installed: pip install flash-attn"):
        attention(q, q, q, PackPlan.of(bounds([200])), causal=True)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", None)
    choose("flash_attn_4")
    with pytest.raises(ImportError, match="flash-attn 4 is not installed: pip install flash-attn-4"):
        attention(q, q, q, PackPlan.of(bounds([200])), causal=True)


LONG = PackPlan.of(bounds([200]))


def seen(dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Any:
    return SimpleNamespace(dtype=dtype, is_cuda=device == "cuda", shape=(200, 4, 64))


@pytest.mark.parametrize(
    ("dtype", "device", "served"),
    [(torch.bfloat16, "cuda", "flash_attn"), (torch.float32, "cuda", OURS), (torch.half, "cpu", OURS)],
)
def test_only_half_precision_on_a_gpu_is_concerned(dtype, device, served, monkeypatch):
    monkeypatch.setattr(attention_elsewhere, "FORCED", "flash_attn")
    q = seen(dtype, device)
    assert chosen(q, q, LONG, True, True) == served
    assert chosen(q, q, PackPlan.of(bounds([20])), True, True) == OURS


def test_what_was_tuned_serves_what_it_was_tuned_for(monkeypatch):
    q, name = seen(), attention_elsewhere.long_attention.name
    assert chosen(q, q, LONG, True, True) == OURS
    monkeypatch.setattr(decisions, "_used", {name: {"bfloat16, 64, 4, 4, True": "flash_attn_4"}})
    assert chosen(q, q, LONG, True, True) == "flash_attn_4"
    assert chosen(q, q, LONG, False, True) == OURS  # was not tuned
    assert chosen(q, q, LONG, True, False) == OURS  # a window, a soft cap or dropout
    assert chosen(q, q, PackPlan.of(bounds([200]), bounds([300])), True, True) == OURS
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert chosen(q, q, LONG, True, True) == OURS  # what cannot be traced
    assert set(NOT_COMPILED) < set(LIBRARIES)
    monkeypatch.setattr(attention_elsewhere, "FORCED", OURS)
    assert chosen(q, q, LONG, True, True) == OURS


def test_unknown_library_is_named():
    environment = {**os.environ, "TRUNKLINE_LONG_ATTENTION": "flash"}
    command = [sys.executable, "-c", "import trunkline.kernels.attention.attention"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "must be trunkline or flash_attn, got 'flash'" in result.stderr
