"""One linear layer per task over rows sorted by task: y_r = act(x_r W[task(r)] + b[task(r)]).

Backward, with z the value before the activation and g = dy * act'(z):
    dx_r = g_r W[t]^T,   dW[t] = sum over rows of t of x_r^T g_r,   db[t] = sum over rows of t of g_r.
Saved for backward: x, weight and what gives act'(z): y for relu and tanh, z for gelu, nothing without an activation. To
compute z anew would cost a third product, 2 D operations an element, where to keep it costs 4 bytes of traffic: on an
H200 that is the same time at D = 370, and the product takes longer from there on.

R rows, N tasks, D width in, C width out
Source: the task-specific modules over a shared extractor of Collobert & Weston, ICML 2008.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.kernels.arguments import can_look, check_offsets, check_tensors
from trunkline.kernels.dispatch import register
from trunkline.kernels.once_differentiable import once_differentiable
from trunkline.kernels.products import mm
from trunkline.kernels.tasks import task_projection_triton
from trunkline.kernels.tasks.task_tiles import random_offsets

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "gelu": F.gelu,
    "relu": F.relu,
    "tanh": torch.tanh,
}
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of dy and what was saved
    "none": lambda dy, _: dy,
    "gelu": torch.ops.aten.gelu_backward,
    "relu": lambda dy, y: dy * (y > 0),
    "tanh": lambda dy, y: dy * (1 - y.square()),
}


def task_projection_reference(x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, activation: str) -> Tensor:
    """The definition: one task after the other."""
    parts = zip(x.split(offsets.diff().tolist()), weight.unbind(), bias.unbind(), strict=True)
    return _ACTIVATIONS[activation](torch.cat([rows @ w + b for rows, w, b in parts]))


def _present(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Tasks that have rows, and their rows."""
    bounds = offsets.tolist()
    return ((t, slice(a, b)) for t, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)) if b > a)


def _forward_reference(
    x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    if can_look(offsets):
        check_offsets("task_projection", offsets, len(x))
    z = x.new_empty(len(x), weight.shape[2])
    for t, rows in _present(offsets):
        z[rows] = mm(x[rows], weight[t], bias[t])  # (r, D) @ (D, C) -> (r, C)
    y = _ACTIVATIONS[activation](z)
    return y, z if activation == "gelu" else z.new_empty(0, z.shape[1])


def _backward_reference(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, saved: Tensor, offsets: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    g = _DERIVATIVES[activation](dy, saved)
    dx, dweight, dbias = torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
    for t, rows in _present(offsets):
        mm(g[rows], weight[t].T, out=dx[rows])  # (r, C) @ (C, D) -> (r, D)
        mm(x[rows].T, g[rows], out=dweight[t])  # (D, r) @ (r, C) -> (D, C)
        dbias[t] = g[rows].sum(0)
    return dx, dweight, dbias


def _forward_triton(x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    if x.dtype == torch.float64:  # which Triton does not multiply
        return _forward_reference(x, weight, bias, offsets, activation)
    if can_look(offsets):
        check_offsets("task_projection", offsets, len(x))
    return task_projection_triton.forward(x, weight, bias, offsets, activation, save_z=activation == "gelu")


def _backward_triton(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, saved: Tensor, offsets: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype == torch.float64:
        return _backward_reference(dy, x, weight, bias, saved, offsets, activation)
    return task_projection_triton.backward(dy, x, weight, bias, saved, offsets, activation)


def _forward_fake(x, weight, bias, offsets, activation):
    R, C = len(x), weight.shape[2]
    return x.new_empty(R, C), x.new_empty(R if activation == "gelu" else 0, C)


_forward = register("task_projection_forward", triton=_forward_triton, reference=_forward_reference, fake=_forward_fake)
_backward = register(
    "task_projection_backward",
    triton=_backward_triton,
    reference=_backward_reference,
    fake=lambda dy, x, weight, bias, *rest: tuple(t.new_empty(t.shape) for t in (x, weight, bias)),
)


class _TaskProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, offsets, activation):
        y, z = _forward(x, weight, bias, offsets, activation)
        ctx.save_for_backward(x, weight, bias, y if activation in ("relu", "tanh") else z, offsets)
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable("task_projection")
    def backward(ctx, dy):
        return *_backward(dy.contiguous(), *ctx.saved_tensors, ctx.activation), None, None


def task_projection(x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, activation: str = "none") -> Tensor:
    """Applies to every row the linear layer and activation of its task, all tasks in one call.

    Args:
        x: (R, D) rows sorted by task; float32, float16, bfloat16 or float64.
        weight: (N, D, C), the dtype of `x`.
        bias: (N, C)
        offsets: (N + 1,) int32; rows of task t are offsets[t] : offsets[t + 1]. A task may have none.
        activation: 'none', 'gelu', 'relu' or 'tanh'.

    Returns:
        (R, C), the dtype of `x`. Gradients flow to x, weight and bias.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit one another, an unknown activation, or offsets that do not
            rise from 0 to R (looked at on the CPU, and on a GPU with TRUNKLINE_CHECK=1).
    """
    tensors = {"x": x, "weight": weight, "bias": bias}
    check_tensors("task_projection", tensors, integers={"offsets": offsets})
    if weight.ndim != 3 or not len(weight):
        raise ValueError(f"task_projection: weight must be (N, D, C) of at least one task, got {list(weight.shape)}")
    N, D, C = weight.shape
    if x.shape[1:] != (D,) or bias.shape != (N, C) or offsets.shape != (N + 1,):
        raise ValueError(
            f"task_projection: with weight (N, D, C) = {list(weight.shape)}, x must be (R, {D}), bias ({N}, {C}) and "
            f"offsets ({N + 1},), got {list(x.shape)}, {list(bias.shape)} and {list(offsets.shape)}"
        )
    if activation not in _ACTIVATIONS:
        raise ValueError(f"task_projection: activation must be one of {', '.join(_ACTIVATIONS)}, got '{activation}'")
    return _TaskProjection.apply(x, weight, bias, offsets, activation)


SHAPES = {
    "module of 8 tasks": {"rows": 65536, "tasks": 8, "width": 768, "columns": 768},
    "labelled rows of 9 tasks": {"rows": 512, "tasks": 9, "width": 768, "columns": 768},
    "1000 tasks": {"rows": 65536, "tasks": 1000, "width": 768, "columns": 768},
    "width 8192": {"rows": 8192, "tasks": 4, "width": 8192, "columns": 8192},
}


def example(
    device: torch.device | str,
    dtype: torch.dtype,
    rows: int = 512,
    tasks: int = 9,
    width: int = 768,
    columns: int = 768,
    activation: str = "gelu",
) -> dict[str, Any]:
    """Arguments of `task_projection`: R `rows` spread at random over N `tasks`, D `width`, C `columns`."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    return {
        "x": normal(rows, width),
        "weight": normal(tasks, width, columns) / width**0.5,
        "bias": normal(tasks, columns),
        "offsets": random_offsets(rows, tasks, device, generator),
        "activation": activation,
    }
