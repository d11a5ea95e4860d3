"""Random streams of packed sequences, as attention takes them."""

import os

import torch
from torch import Tensor

from trunkline.kernels.attention.pack_plan import PackPlan

WIDTH = 16


def kernel_dtype(device: str) -> torch.dtype:
    """What a test of kernels draws its inputs in: on a GPU those for matrix units."""
    on_gpu = device == "cuda" or "TRUNKLINE_VIRTUAL_GPU" in os.environ
    return torch.bfloat16 if on_gpu else torch.float32


def make(
    runs: list[list[int]],
    heads: int = 4,
    kv_heads: int = 2,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, PackPlan]:
    """q, k, v and the plan of a stream; `dtype` None: that of the device's kernels."""
    dtype = dtype or kernel_dtype(device)
    plan = PackPlan.of_runs(runs)
    T = int(plan.cu_seqlens[-1])
    q, k, v = (torch.randn(T, n, WIDTH).to(device, dtype) for n in (heads, kv_heads, kv_heads))
    return q, k, v, plan.to(device)


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
