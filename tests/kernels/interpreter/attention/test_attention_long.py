"""Attention of long sequences against the definition in float64; what is not of its blocks is neither read nor written.

On a GPU the same with more lengths and dtypes.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from parity import check, upstream_gradient
from trunkline.kernels.attention import attention_long
from trunkline.kernels.attention.attention import attention_reference
from trunkline.kernels.attention.pack_plan import PackPlan

UNTOUCHED = 77.0
SEED = 2**40 + 11


@dataclass(frozen=True)
class Case:
    lengths: tuple[int | tuple[int, int], ...]  # queries of every sequence, and its keys where they are more or fewer
    dtype: torch.dtype = torch.float32
    heads: tuple[int, int] = (2, 1)  # of queries, of keys
    width: int = 32
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    dropout: float = 0.0
    transposed: bool = False  # as Hugging Face has it: heads before tokens in memory

    @property
    def settings(self) -> dict[str, Any]:
        """What `attention_reference` takes."""
        names = ("causal", "window", "softcap", "dropout")
        return {name: getattr(self, name) for name in names} | {"scale": self.width**-0.5, "seed": SEED}

    @property
    def flags(self) -> tuple[Any, ...]:
        """The same as the kernels take it."""
        left, right = self.window
        return (self.width**-0.5, left, 0 if self.causal else right, self.softcap, self.dropout, SEED)


def bounds_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def blocks_of(lengths: list[int], sequences: list[int]) -> Tensor:
    longest_first = sorted(sequences, key=lambda s: -lengths[s])
    blocks = [(s, block) for s in longest_first for block in range(-(-lengths[s] // 128))]
    return torch.tensor(blocks, dtype=torch.int32).view(-1, 2)


def verify(case: Case, device: str) -> None:
    """Every sequence but the first and the last, which are somebody else's: there NaN is read and nothing written."""
    pairs = [pair if isinstance(pair, tuple) else (pair, pair) for pair in (20, *case.lengths, 30)]
    lengths, lengths_k = ([pair[side] for pair in pairs] for side in (0, 1))
    cu_seqlens, cu_seqlens_k = bounds_of(lengths), bounds_of(lengths_k)
    ours = range(1, len(pairs) - 1)
    rows, rows_k = slice(20, sum(lengths) - 30), slice(20, sum(lengths_k) - 30)

    def draw(tokens: int, heads: int, factor: float = 1.0) -> Tensor:
        x = (factor * torch.randn(tokens, heads, case.width)).to(device, case.dtype)
        return x.transpose(0, 1).contiguous().transpose(0, 1) if case.transposed else x

    H, G = case.heads
    q, k, v = draw(sum(lengths), H, 2.0), draw(sum(lengths_k), G), draw(sum(lengths_k), G)
    dout = upstream_gradient(q, seed=0)
    plan = PackPlan.of(cu_seqlens, cu_seqlens_k)

    def define(dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = attention_reference(*leaves, plan, **case.settings)
        dq, dk, dv = torch.autograd.grad(out, leaves, dout.to(dtype))
        return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}

    plain, exact = define(case.dtype), define(torch.float64)
    for x, own in ((q, rows), (dout, rows), (k, rows_k), (v, rows_k)):
        x[: own.start] = x[own.stop :] = torch.nan
    out, dq, dk, dv = (torch.full(x.shape, UNTOUCHED, dtype=x.dtype, device=device) for x in (q, q, k, v))
    lse = torch.full((H, len(q)), UNTOUCHED, device=device)
    blocks, key_blocks = blocks_of(lengths, [*ours]).to(device), blocks_of(lengths_k, [*ours]).to(device)
    bounds = (cu_seqlens.to(device), cu_seqlens_k.to(device))
    attention_long.forward(q, k, v, out, lse, *bounds, blocks, *case.flags)
    gradients = (dq, dk, dv, *bounds, blocks, key_blocks)
    attention_long.backward(dout, q, k, v, out, lse, *gradients, *case.flags)

    results = {"out": (out, rows), "dq": (dq, rows), "dk": (dk, rows_k), "dv": (dv, rows_k)}
    for name, (x, own) in results.items():
        assert (x[: own.start] == UNTOUCHED).all(), f"{name}: wrote rows before its blocks"
        assert (x[own.stop :] == UNTOUCHED).all(), f"{name}: wrote rows behind its blocks"
        check(name, x[own], plain[name][own], exact[name][own], slack=2.0, floor=1e-5)
    assert (lse[:, : rows.start] == UNTOUCHED).all()
    assert (lse[:, rows.stop :] == UNTOUCHED).all()


CASES = {
    "causal": Case((129, 257), causal=True),
    "bidirectional": Case((200,), torch.float16, width=64, heads=(4, 2)),
    "window": Case((257,), window=(70, 20), heads=(1, 1), transposed=True),
    "soft cap": Case((130,), torch.float16, causal=True, softcap=3.0),
    "dropout": Case((129,), dropout=0.3, softcap=20.0),
    "cross": Case(((1, 200), (130, 70)), causal=True, heads=(1, 1), dropout=0.1),
    "padded width": Case((129,), torch.float16, width=96, heads=(1, 1), causal=True),
    "no key": Case(((3, 0), (0, 3)), heads=(1, 1)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_definition(case, device):
    verify(case, device)


def test_logsumexp(device):
    q, k, v = torch.randn(140, 1, 32), torch.randn(140, 1, 32), torch.randn(140, 1, 32)
    q, k, v = (x.to(device) for x in (q, k, v))
    out, lse, bounds = torch.empty_like(q), torch.empty(1, 140, device=device), bounds_of([140]).to(device)
    blocks = blocks_of([140], [0]).to(device)
    attention_long.forward(q, k, v, out, lse, bounds, bounds, blocks, 0.3, -1, -1, 0.0, 0.0, 0)
    scores = q[:, 0].double() @ k[:, 0].double().T * 0.3
    torch.testing.assert_close(lse[0].double(), scores.logsumexp(1) / torch.tensor(2.0).log(), rtol=1e-6, atol=1e-6)


RAGGED = (0, 1, 2, 63, 64, 65, 127, 128, 129, 500, 1025)
CROSS = ((1, 1025), (65, 500), (500, 65), (0, 64), (64, 0), (129, 128), (1025, 2))
FLAGS = {
    "bidirectional": Case(RAGGED),
    "causal": Case(RAGGED, causal=True),
    "window": Case(RAGGED, window=(100, 30)),
    "sliding": Case(RAGGED, window=(64, -1), causal=True),
    "soft cap": Case(RAGGED, causal=True, softcap=5.0),
    "dropout": Case(RAGGED, causal=True, dropout=0.2),
    "cross": Case(CROSS),
    "cross causal": Case(CROSS, causal=True, dropout=0.1, softcap=10.0),
    "transposed": Case(RAGGED, causal=True, transposed=True),
    "key heads": Case(RAGGED, causal=True, heads=(3, 3)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_every_flag_on_a_gpu(flags, dtype):
    verify(replace(flags, width=64, dtype=dtype), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("flags", ["causal", "cross causal"])
@pytest.mark.parametrize("width", [32, 80, 96, 128, 192, 256])
def test_every_width_on_a_gpu(width, flags):
    verify(replace(FLAGS[flags], width=width, dtype=torch.bfloat16), "cuda")


@pytest.mark.gpu
def test_scores_beyond_31_bits():
    """Offsets of the last rows pass 2^31 elements."""
    tokens, H, D = 2**31 // (32 * 128) + 1000, 32, 128
    q, k, v, out, dq, dk, dv = (torch.zeros(tokens, H, D, dtype=torch.bfloat16, device="cuda") for _ in range(7))
    for x in (q, k, v):
        x[-300:] = torch.randn(300, H, D)
    lse = torch.zeros(H, tokens, device="cuda")
    bounds = torch.tensor([0, tokens - 300, tokens], dtype=torch.int32, device="cuda")
    blocks = torch.tensor([[1, 0], [1, 1], [1, 2]], dtype=torch.int32, device="cuda")
    case = Case((300,), heads=(H, H), width=D, causal=True)
    attention_long.forward(q, k, v, out, lse, bounds, bounds, blocks, *case.flags)
    attention_long.backward(q, q, k, v, out, lse, dq, dk, dv, bounds, bounds, blocks, blocks, *case.flags)
    leaves = [x[-300:].float().requires_grad_() for x in (q, k, v)]
    expected = attention_reference(*leaves, PackPlan.of(bounds_of([300])), **case.settings)
    gradients = torch.autograd.grad(expected, leaves, q[-300:].float())
    for ours, exact in zip((out, dq, dk, dv), (expected, *gradients), strict=True):
        torch.testing.assert_close(ours[-300:].float(), exact.detach(), rtol=0.02, atol=0.02)
        assert not ours[:-300].any()
