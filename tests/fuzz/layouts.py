"""Strategies for tensors: every way in which PyTorch lets one lie in memory, and many in which one can be wrong."""

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = st.sampled_from(DTYPES)


def normal(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def tensors(draw: st.DrawFn, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Normal random numbers in memory that is NaN elsewhere: permuted, sliced, expanded, overlapping, negated."""
    values = normal(shape, draw(st.integers(0, 99))).to(dtype)
    if draw(st.integers(0, 9)) == 9:  # two elements may be one place in memory
        strides = [draw(st.integers(0, 3)) for _ in shape]
        span = 1 + sum(max(n - 1, 0) * stride for n, stride in zip(shape, strides, strict=True))
        memory = torch.cat([normal((span,), 0).to(dtype), torch.full((64,), torch.nan, dtype=dtype)])
        return memory.as_strided(shape, strides)
    x = placed(draw, values, torch.nan)
    for dim in range(x.ndim):
        if x.shape[dim] and draw(st.integers(0, 5)) == 5:
            x = x.narrow(dim, 0, 1).expand(shape)
    return torch._neg_view(x) if draw(st.integers(0, 9)) == 9 else x


@st.composite
def views(draw: st.DrawFn, values: Tensor) -> Tensor:
    """These values, which are no random numbers, as a slice of memory that holds something wild elsewhere."""
    return placed(draw, values, True if values.dtype == torch.bool else 2**30 - 1)


def placed(draw: st.DrawFn, values: Tensor, around: Any) -> Tensor:
    order = draw(st.permutations(range(values.ndim)))
    steps, margins = ([draw(st.integers(0, 2)) for _ in order] for _ in range(2))
    steps = [max(step, 1) for step in steps]
    sizes = [values.shape[dim] * step + 2 * margin for dim, step, margin in zip(order, steps, margins, strict=True)]
    memory = torch.full(sizes, around, dtype=values.dtype)
    inside = (
        slice(margin, margin + values.shape[dim] * step, step)
        for dim, step, margin in zip(order, steps, margins, strict=True)
    )
    x = memory[tuple(inside)].permute([order.index(dim) for dim in range(values.ndim)])
    return x.copy_(values)


@st.composite
def spoiled(draw: st.DrawFn, arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments but for one tensor, whose shape, dtype, device, type or values may be wrong."""
    name = draw(st.sampled_from(sorted(name for name, x in arguments.items() if isinstance(x, Tensor))))
    x = arguments[name]
    kind = draw(st.sampled_from(["shape", "dimensions", "dtype", "device", "type", "values"]))
    match kind:
        case "shape" if x.ndim:
            dim = draw(st.integers(0, x.ndim - 1))
            size = draw(st.integers(0, 5))
            wrong = x.new_ones([size if d == dim else n for d, n in enumerate(x.shape)])
        case "dimensions":
            wrong = draw(st.sampled_from([x[None], x[..., None], x.flatten(), x.new_ones(())]))
        case "dtype":
            others = [*DTYPES, torch.int64, torch.int32, torch.int8, torch.bool, torch.complex64]
            wrong = torch.zeros(x.shape).to(draw(st.sampled_from(others)))
        case "device":
            wrong = torch.empty(x.shape, dtype=x.dtype, device="meta")
        case "type":
            wrong = draw(st.sampled_from([None, 1.5, "x", x.tolist(), x.double().numpy(force=True)]))
        case _ if x.dtype in (torch.int32, torch.int64) and x.numel():
            wrong = x.clone()
            place = draw(st.integers(0, x.numel() - 1))
            wrong.view(-1)[place] = draw(st.sampled_from([-1, -100, 5, 10**6, 2**31 - 1]))
        case _:
            wrong = x
    return {**arguments, name: wrong}
