"""Random streams of packed sequences, as attention takes them."""

import torch
from torch import Tensor

from trunkline.kernels.attention.pack_plan import PackPlan

WIDTH = 16


def make(
    runs: list[list[int]], heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, PackPlan]:
    """q, k, v and the plan of a stream."""
    plan = PackPlan.of_runs(runs)
    T = int(plan.cu_seqlens[-1])
    q, k, v = (torch.randn(T, n, WIDTH).to(device, dtype) for n in (heads, kv_heads, kv_heads))
    return q, k, v, plan.to(device)


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
