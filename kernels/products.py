"""Products of float32 matrices on a CPU, by the faster of the two libraries that torch has for them.

torch multiplies with MKL, which keeps AVX-512 for Intel's own processors: on AMD's it does half of what they can.
oneDNN, which torch has too, does all of it. `torch.backends.mkldnn.enabled = False` leaves everything to MKL.
"""

import os
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline.kernels.dispatch import register

SMALLEST = 1 << 20  # multiplications of a product; in smaller ones oneDNN's longer call takes up what it gains


def _processor() -> str:
    about = Path("/proc/cpuinfo")
    return about.read_text() if about.exists() else platform.processor()


FASTER = (  # whether oneDNN is, on this processor
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and "AuthenticAMD" in _processor()
)
if FASTER:
    # of which a packed batch needs a few for its number of rows; the thousand that it would keep take 60 MiB
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


def mm(a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """a @ b + bias, of (M, K), (K, N) and (N,). It has no gradient: it is for what is below autograd.

    Args:
        out: (M, N), which then holds the product and is what is returned.
    """
    if _by_onednn(a, b.shape[1]) and b.dtype == a.dtype:
        y = _multiply(a, b, bias)
        return y if out is None else out.copy_(y)
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


class Linear(nn.Linear):
    """nn.Linear, whose product and whose gradients' products are as `mm` makes them."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or not _by_onednn(x, self.out_features) or self.weight.dtype != x.dtype:
            return F.linear(x, self.weight, self.bias)
        return _Linear.apply(x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight.T, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        # gradients that have gradients, of create_graph, are for torch's own; a compiled graph refuses them by itself
        mm = torch.mm if torch.is_grad_enabled() and not torch.compiler.is_compiling() else product
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            mm(dy, weight) if of_x else None,
            mm(dy.T, x) if of_weight else None,
            dy.sum(0) if of_bias else None,
        )


def _by_onednn(x: Tensor, columns: int) -> bool:
    """Of (M, K) by (K, columns)."""
    return (
        FASTER
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() * columns >= SMALLEST
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
    )


def _multiply(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    if not (b.is_contiguous() or b.T.is_contiguous()):
        b = b.contiguous()  # oneDNN takes a thousand times as long with a part of a matrix
    if bias is not None:
        bias = bias.contiguous()  # and reads a part of a vector as if it were all of it
    return torch.ops.mkldnn._linear_pointwise(a, b.T, bias, "none", [], "")


def _multiply_fake(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return a.new_empty(len(a), b.shape[1])


# Inductor knows oneDNN's own op, but for constant weights alone
product = register("product", reference=_multiply, fake=_multiply_fake)
