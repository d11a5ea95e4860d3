"""A tiny product with a Triton kernel, at shapes that certification must pass or find a certain fault in."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trunkline.kernels.dispatch import register

SHAPES = {
    "clean": {"width": 64, "warps": 4},
    "clean again": {"width": 64, "warps": 4},  # the same launch as before
    "spills": {"width": 128, "warps": 1},
    "no wgmma": {"width": 64, "warps": 2},
    "too much shared memory": {"width": 512, "warps": 8},
    "does not compile": {"width": 48, "warps": 4},
}
SPILLS = {
    ("_tuned_kernel", 90): (10_000, "one warp holds too much, on purpose"),
    ("_product_kernel", 80): (10_000, "the same, but not on the architecture that the tests look at"),
}


@triton.jit
def _product_kernel(a_ptr, b_ptr, c_ptr, rows, WIDTH: tl.constexpr):
    m = tl.program_id(0) * 64 + tl.arange(0, 64)
    k = tl.arange(0, WIDTH)
    a = tl.load(a_ptr + m[:, None] * WIDTH + k[None, :], mask=m[:, None] < rows, other=0.0)
    b = tl.load(b_ptr + k[:, None] * WIDTH + k[None, :])
    c = tl.dot(a, b)  # (64, WIDTH) @ (WIDTH, WIDTH)
    tl.store(c_ptr + m[:, None] * WIDTH + k[None, :], c.to(c_ptr.dtype.element_ty), mask=m[:, None] < rows)


@triton.autotune([triton.Config({}, num_warps=warps) for warps in (1, 4)], key=["rows"])
@triton.jit
def _tuned_kernel(a_ptr, b_ptr, c_ptr, rows, WIDTH: tl.constexpr):
    _product_kernel(a_ptr, b_ptr, c_ptr, rows, WIDTH)


def _forward_triton(a: Tensor, b: Tensor, warps: int) -> Tensor:
    c = torch.empty_like(a)
    _product_kernel[(triton.cdiv(len(a), 64),)](a, b, c, len(a), WIDTH=a.shape[1], num_warps=warps)
    return c


def _backward_triton(dc: Tensor, b: Tensor, warps: int) -> Tensor:
    da = torch.empty_like(dc)
    _tuned_kernel[(triton.cdiv(len(dc), 64),)](dc, b.T.contiguous(), da, len(dc), WIDTH=min(dc.shape[1], 128))
    return da


def _reference(a: Tensor, b: Tensor, warps: int) -> Tensor:
    raise AssertionError("certification runs the Triton implementation")


_forward = register("seeded_forward", reference=_reference, fake=_reference, triton=_forward_triton)
_backward = register("seeded_backward", reference=_reference, fake=_reference, triton=_backward_triton)


class _Seeded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, warps):
        ctx.save_for_backward(b)
        ctx.warps = warps
        return _forward(a, b, warps)

    @staticmethod
    def backward(ctx, dc):
        return _backward(dc, *ctx.saved_tensors, ctx.warps), None, None


def seeded_kernels(a: Tensor, b: Tensor, warps: int) -> Tensor:
    return _Seeded.apply(a, b, warps)


def example(device: torch.device, dtype: torch.dtype, width: int, warps: int) -> dict:
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, width, generator=generator, device=device).to(dtype) for n in (1000, width))
    return {"a": a, "b": b, "warps": warps}
