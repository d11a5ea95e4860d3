"""flash-attn as the backend of long sequences: what it is called with, by a stand-in that computes the same.

The stand-in has flash-attn 2's signature and bottom-right causal semantics; the real one needs a GPU.
"""

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trunkline.kernels.attention import attention_flash
from trunkline.kernels.attention.attention import attention
from trunkline.kernels.attention.pack_plan import PackPlan


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


@pytest.fixture
def calls(monkeypatch) -> list[dict[str, Any]]:
    """Of the stand-in, while flash-attn is chosen on this machine."""
    seen: list[dict[str, Any]] = []

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
        seen.append({"q": q, **locals()})
        for cu_seqlens, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
            assert cu_seqlens.dtype == torch.int32
            assert longest == cu_seqlens.diff().max()
        plan = PackPlan._cross(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist())
        with monkeypatch.context() as inside:
            inside.setattr(attention_flash, "serves", lambda q, plan: False)
            settings = {"scale": softmax_scale, "window": window_size, "softcap": softcap or None}
            return attention(q, k, v, plan, causal=causal, **settings)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    monkeypatch.setattr(attention_flash, "serves", lambda q, plan: len(plan.blocks) > 0)
    return seen


PLANS = {
    "mixed": (PackPlan.of(bounds([5, 200, 64, 0, 131, 128, 3])), 331),
    "all long": (PackPlan.of(bounds([200, 131])), 331),
    "cached": (PackPlan.of(bounds([1, 7]), bounds([200, 30])), 8),
}
SETTINGS: list[dict[str, Any]] = [
    {"causal": True},
    {"causal": False, "window": (30, 5), "softcap": 2.0, "scale": 0.3, "deterministic": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["causal", "everything"])
@pytest.mark.parametrize(("plan", "long"), PLANS.values(), ids=PLANS)
def test_outputs_and_gradients_are_those_of_our_kernels(plan, long, settings, calls, monkeypatch):
    shapes = [(plan.num_tokens, 4, 8), (plan.num_keys, 2, 8), (plan.num_keys, 2, 8)]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    upstream = torch.randn(shapes[0], dtype=torch.float64)
    results = []
    for backend in ("flash_attn", "ours"):
        if backend == "ours":
            monkeypatch.setattr(attention_flash, "serves", lambda q, plan: False)
        out = attention(*leaves, plan, **settings)
        results.append((out, *torch.autograd.grad(out, leaves, upstream)))
    for flash, ours in zip(*results, strict=True):
        torch.testing.assert_close(flash, ours)
    (call,) = calls
    assert len(call["q"]) == long  # sequences in tiles stay with us
    assert (call["causal"], call["window_size"]) == (settings["causal"], settings.get("window", (-1, -1)))
    assert (call["softmax_scale"], call["softcap"]) == (settings.get("scale"), settings.get("softcap", 0.0))
    assert call["deterministic"] is settings.get("deterministic", False)
    assert call["dropout_p"] == 0.0


def test_rows_are_those_of_all_outputs(calls):
    plan, rows = PLANS["mixed"][0], torch.tensor([0, 4, 204, 530])
    q, k, v = torch.randn(3, plan.num_tokens, 2, 8)
    out = attention(q, k, v, plan, causal=True)
    assert torch.equal(attention(q, k, v, plan, causal=True, rows=rows), out[rows])
    assert len(calls) == 2


def test_short_sequences_alone_stay_with_us(calls):
    q = torch.randn(60, 2, 8)
    attention(q, q, q, PackPlan.of(bounds([20, 40])), causal=True)
    assert not calls


def test_dropout_is_refused(calls):
    q = torch.randn(200, 2, 8)
    with pytest.raises(ValueError, match=r"TRUNKLINE_LONG_ATTENTION=flash_attn dropout must be 0, got 0\.1"):
        attention(q, q, q, PackPlan.of(bounds([200])), causal=True, dropout=0.1)


@pytest.mark.parametrize("installed", [None, SimpleNamespace()], ids=["nothing", "another flash_attn"])
def test_not_installed_is_said(installed, calls, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", installed)
    q = torch.randn(200, 2, 8)
    with pytest.raises(ImportError, match="TRUNKLINE_LONG_ATTENTION=flash_attn needs flash-attn 2"):
        attention(q, q, q, PackPlan.of(bounds([200])), causal=True)


@pytest.mark.parametrize(
    ("dtype", "device", "served"),
    [(torch.bfloat16, "cuda", True), (torch.float32, "cuda", False), (torch.half, "cpu", False)],
)
def test_only_half_precision_on_a_gpu_is_concerned(dtype, device, served, monkeypatch):
    monkeypatch.setattr(attention_flash, "BACKEND", "flash_attn")
    q = SimpleNamespace(dtype=dtype, is_cuda=device == "cuda")
    assert attention_flash.serves(q, PackPlan.of(bounds([200]))) is served
    assert not attention_flash.serves(q, PackPlan.of(bounds([20])))


def test_unknown_backend_is_named():
    environment = {**os.environ, "TRUNKLINE_LONG_ATTENTION": "flash"}
    command = [sys.executable, "-c", "import trunkline.kernels.attention.attention"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "must be trunkline or flash_attn, got 'flash'" in result.stderr
