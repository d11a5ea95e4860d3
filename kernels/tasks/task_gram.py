"""The gradients that every task alone gives the weight of a shared linear layer, and their inner products.

For y = x W^T + b over tokens sorted by task, with dy the gradient that arrived at y:
    dW_t = sum over the tokens of t of dy_r^T x_r,        G_ts = <dW_t, dW_s>
         and without any dW_t:                            G_ts = sum over r of t, q of s of (dy_r . dy_q) (x_r . x_q).
The first form costs what the one product dW = dy^T x costs and leaves every weighted sum of the dW_t nearly for free.
The second takes 2 R^2 (C + D) operations and is the cheaper one for few rows.

R tokens or rows, N tasks, D width in, C width out
Source: G is the matrix that MGDA, PCGrad, CAGrad and others need, usually had by N backward passes. The second form is
the Gram matrix of gradients of Goodfellow, arXiv:1510.01799, beyond its diagonal.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trunkline.kernels.arguments import can_look, check_tensors
from trunkline.kernels.decisions import decision
from trunkline.kernels.dispatch import register, tl, triton

KEPT = 1 << 28  # elements of all dW_t together, up to which they are kept: 1 GiB of float32
PRODUCTS_PER_ELEMENT = 40  # multiplications that take as long as one element of a dW_t more; measured on a CPU


class TaskGradients(NamedTuple):
    """What the tasks' gradients of one layer are like."""

    gram: Tensor  # (N, N) float32 at least; rows and columns of absent tasks are 0
    gradients: Tensor | None  # (N, C, D) the dW_t, float32 at least; None where the Gram matrix was had without them


def task_gradients_reference(x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    """The definition: one task after the other."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    bounds = offsets.tolist()
    gradients = x.new_zeros(len(bounds) - 1, dy.shape[1], x.shape[1], dtype=dtype)
    for t, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if b > a:
            torch.mm(dy[a:b].to(dtype).T, x[a:b].to(dtype), out=gradients[t])  # (C, r) @ (r, D) -> (C, D)
    return gradients


@triton.jit
def _gradients_kernel(
    x_ptr,
    dy_ptr,
    offsets_ptr,
    dw_ptr,
    D,
    C,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile (C, D) of one task's dW. Always summed in the same order, so two runs give the same bits."""
    tiles = tl.cdiv(D, BLOCK_D)
    c = tl.program_id(0) // tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    d = tl.program_id(0) % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    t = tl.program_id(1)
    first = tl.load(offsets_ptr + t)
    last = tl.load(offsets_ptr + t + 1)
    dw = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        row = r.to(tl.int64)[:, None]  # r * C passes 2^31 at 1M tokens x 4096
        own = (r < last)[:, None]
        dy = tl.load(dy_ptr + row * C + c[None, :], mask=own & (c < C)[None, :], other=0.0)  # (R, C)
        x = tl.load(x_ptr + row * D + d[None, :], mask=own & (d < D)[None, :], other=0.0)  # (R, D)
        dw = tl.dot(tl.trans(dy), x, dw, input_precision=PRECISION)
    place = (t.to(tl.int64) * C + c)[:, None] * D + d[None, :]
    tl.store(dw_ptr + place, dw, mask=(c < C)[:, None] & (d < D)[None, :])


def _tile(C: int, D: int, R: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_C": C, "BLOCK_D": D, "BLOCK_R": R, "num_warps": warps, "num_stages": stages}


def _other_tiles(dtype: torch.dtype) -> list[dict[str, int]]:
    sizes = [(128, 128, 64, 8, 2), (128, 128, 32, 8, 4), (128, 64, 64, 4, 3), (64, 64, 64, 4, 3)]
    return [] if dtype == torch.float32 else [_tile(*of_one) for of_one in sizes]


@decision(_other_tiles)
def gradient_tile(dtype: torch.dtype) -> dict[str, int]:
    """Of `_gradients_kernel`: without spills on sm_90, and the matrix units in use for the narrow dtypes."""
    return _tile(64, 64, 32, 8, 2) if dtype == torch.float32 else _tile(128, 128, 64, 8, 3)


def _gradients_triton(x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    (_, D), C, N = x.shape, dy.shape[1], len(offsets) - 1
    options = {**gradient_tile(x.dtype), "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32"}
    dw = x.new_empty(N, C, D, dtype=torch.float32)
    tiles = triton.cdiv(C, options["BLOCK_C"]) * triton.cdiv(D, options["BLOCK_D"])
    _gradients_kernel[(tiles, N)](x.contiguous(), dy.contiguous(), offsets, dw, D, C, **options)
    return dw


def _gradients_reference(x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    return task_gradients_reference(x, dy, offsets)


_gradients = register(
    "task_gradients",
    reference=_gradients_reference,
    triton=_gradients_triton,
    fake=lambda x, dy, offsets: x.new_empty(
        len(offsets) - 1, dy.shape[1], x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32)
    ),
)


def task_gradients(x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    """The weight gradient of a linear layer, apart for every task.

    Args:
        x: (R, D) what went into the layer, tokens sorted by task; float32, float16, bfloat16 or float64.
        dy: (R, C) gradient of what came out of it, the dtype of `x`.
        offsets: (N + 1,) int32; tokens of task t are offsets[t] : offsets[t + 1], those beyond the last are no task's.

    Returns:
        (N, C, D), summed in float32 at least; 0 for a task without tokens. Carries no gradients itself.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit one another; and, looked at on the CPU and on a GPU with
            TRUNKLINE_CHECK=1, offsets that do not rise from 0 or lead beyond the tokens.
    """
    _check(x, dy, offsets)
    return _gradients(x.detach(), dy.detach(), offsets)


def _check(x: Tensor, dy: Tensor, offsets: Tensor) -> None:
    check_tensors("task_gradients", {"x": x, "dy": dy}, integers={"offsets": offsets})
    if x.ndim != 2 or dy.ndim != 2 or len(x) != len(dy) or offsets.ndim != 1 or not len(offsets):
        raise ValueError(
            f"task_gradients: x must be (R, D), dy (R, C) and offsets (N + 1,), "
            f"got {list(x.shape)}, {list(dy.shape)} and {list(offsets.shape)}"
        )
    if can_look(offsets):
        bounds = offsets.tolist()
        if bounds[0] != 0 or bounds[-1] > len(x) or bounds != sorted(bounds):
            raise ValueError(f"task_gradients: offsets must rise from 0 to at most R = {len(x)}, got {bounds}")


def task_gram(x: Tensor, dy: Tensor, offsets: Tensor, total: Callable[[Tensor], Tensor] | None = None) -> TaskGradients:
    """The inner products of every two tasks' gradients of a linear layer's weight.

    Args:
        x, dy, offsets: as of `task_gradients`.
        total: sums a tensor over all processes, in place, where each has some of the tokens: the products are of the
            summed gradients, which have to be made for it. None: all tokens are here.

    Returns:
        `TaskGradients`; their `gradients` only where the Gram matrix was cheapest to have from them.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit one another; and, looked at on the CPU and on a GPU with
            TRUNKLINE_CHECK=1, offsets that do not rise from 0 or lead beyond the tokens.
    """
    _check(x, dy, offsets)
    (R, D), C, N = x.shape, dy.shape[1], len(offsets) - 1
    if total is None and R * R * (C + D) < PRODUCTS_PER_ELEMENT * N * C * D:
        return TaskGradients(_pairwise(x, dy, offsets), None)
    if total is None and N * C * D <= KEPT:
        gradients = task_gradients(x, dy, offsets)
        flat = gradients.flatten(1)
        return TaskGradients(flat @ flat.T, gradients)
    columns = max(1, KEPT // (N * D))  # the gradients of as many outputs at a time as may be kept
    gram = x.new_zeros(N, N, dtype=torch.promote_types(x.dtype, torch.float32))
    for part in dy.split(columns, 1):
        flat = task_gradients(x, part.contiguous(), offsets).flatten(1)
        if total is not None:
            total(flat)
        gram += flat @ flat.T
    return TaskGradients(gram, None)


def _pairwise(x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, dy = x.detach().to(dtype), dy.detach().to(dtype)
    products = (x @ x.T).mul_(dy @ dy.T)  # (R, R)
    row = torch.arange(len(x), device=x.device)[:, None]
    member = ((row >= offsets[:-1]) & (row < offsets[1:])).to(dtype)  # (R, N)
    return member.T @ (products @ member)


SHAPES = {
    "tiny, qkv": {"tokens": 2048, "tasks": 9, "width_in": 256, "width_out": 768},
    "tiny, mlp_in, rows": {"tokens": 192, "tasks": 9, "width_in": 256, "width_out": 1024},
    "small, qkv": {"tokens": 16384, "tasks": 9, "width_in": 768, "width_out": 2304},
    "small, mlp_out, rows": {"tokens": 4096, "tasks": 9, "width_in": 3072, "width_out": 768},
}


def example(
    device: torch.device | str,
    dtype: torch.dtype,
    tokens: int = 2048,
    tasks: int = 9,
    width_in: int = 256,
    width_out: int = 768,
) -> dict[str, Tensor]:
    """Arguments of `task_gradients` and `task_gram`: shares of the tokens from a few to many, the last task absent."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(tokens, width, generator=generator) for width in (width_in, width_out))
    shares = torch.linspace(1, 3, max(1, tasks - 1)).cumsum(0)
    ends = (shares / shares[-1] * tokens * 0.95).floor()
    offsets = torch.cat([torch.zeros(1), ends, ends[-1:]]) if tasks > 1 else torch.tensor([0.0, float(tokens)])
    return {"x": x.to(device, dtype), "dy": dy.to(device, dtype), "offsets": offsets.to(device, torch.int32)}
