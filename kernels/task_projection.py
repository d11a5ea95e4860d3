"""One linear layer per task over rows sorted by task: y_r = act(x_r W[task(r)] + b[task(r)]).

Backward, with z the value before the activation and g = dy * act'(z):
    dx_r = g_r W[t]^T,   dW[t] = sum over rows of t of x_r^T g_r,   db[t] = sum over rows of t of g_r.
Saved for backward: x, weight and z.

R rows, N tasks, D width in, C width out
Source: the task-specific modules over a shared extractor of Collobert & Weston, ICML 2008.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.kernels.dispatch import register

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "gelu": F.gelu,
    "relu": F.relu,
    "tanh": torch.tanh,
}
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda dy, z: dy,
    "gelu": torch.ops.aten.gelu_backward,
    "relu": lambda dy, z: dy * (z > 0),
    "tanh": lambda dy, z: dy * (1 - z.tanh().square()),
}


def task_projection_reference(x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, activation: str) -> Tensor:
    """The definition: one task after the other."""
    bounds = offsets.tolist()
    parts = [x[a:b] @ weight[t] + bias[t] for t, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))]
    return _ACTIVATIONS[activation](torch.cat(parts))


def _present(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Tasks that have rows, and their rows."""
    bounds = offsets.tolist()
    return ((t, slice(a, b)) for t, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)) if b > a)


def _forward_reference(
    x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    z = x.new_empty(len(x), weight.shape[2])
    for t, rows in _present(offsets):
        z[rows] = torch.addmm(bias[t], x[rows], weight[t])  # (r, D) @ (D, C) -> (r, C)
    return _ACTIVATIONS[activation](z).clone(), z


def _backward_reference(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, z: Tensor, offsets: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    g = _DERIVATIVES[activation](dy, z)
    dx, dweight, dbias = torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
    for t, rows in _present(offsets):
        dx[rows] = g[rows] @ weight[t].T  # (r, C) @ (C, D) -> (r, D)
        dweight[t] = x[rows].T @ g[rows]  # (D, r) @ (r, C) -> (D, C)
        dbias[t] = g[rows].sum(0)
    return dx, dweight, dbias


def _forward_fake(x, weight, bias, offsets, activation):
    return x.new_empty(len(x), weight.shape[2]), x.new_empty(len(x), weight.shape[2])


_forward = register("task_projection_forward", reference=_forward_reference, fake=_forward_fake)
_backward = register(
    "task_projection_backward",
    reference=_backward_reference,
    fake=lambda dy, x, weight, bias, *rest: tuple(t.new_empty(t.shape) for t in (x, weight, bias)),
)


class _TaskProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, offsets, activation):
        y, z = _forward(x, weight, bias, offsets, activation)
        ctx.save_for_backward(x, weight, bias, z, offsets)
        ctx.activation = activation
        return y

    @staticmethod
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
        ValueError: shapes that do not fit one another, or an unknown activation.
    """
    N, D, C = weight.shape
    if x.shape[1:] != (D,) or bias.shape != (N, C) or offsets.shape != (N + 1,):
        raise ValueError(
            f"task_projection: with weight (N, D, C) = {list(weight.shape)}, x must be (R, {D}), bias ({N}, {C}) and "
            f"offsets ({N + 1},), got {list(x.shape)}, {list(bias.shape)} and {list(offsets.shape)}"
        )
    if activation not in _ACTIVATIONS:
        raise ValueError(f"task_projection: activation must be one of {', '.join(_ACTIVATIONS)}, got '{activation}'")
    return _TaskProjection.apply(x, weight, bias, offsets, activation)
