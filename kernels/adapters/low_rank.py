"""Low-rank adapters of one linear layer, a segment of rows each: y_r = base_r + scale * (x_r A[t(r)]) B[t(r)].

A linear layer may be several in one, such as queries, keys and values: then each part p of its columns has its own A_p
and B_p. The A_p lie side by side, so that x is read once for all parts; the B_p do, too.

    h = x A                       (R, D) @ (D, P K) -> (R, P K)
    y[:, p] = base[:, p] + scale * h_p B_p           (R, K) @ (K, C_p) -> (R, C_p)
Backward:
    dbase = dy,   dh_p = scale * dy[:, p] B_p^T,   dB_p = scale * h_p^T dy[:, p],   dx = dh A^T,   dA = x^T dh
Saved for backward: x, h, A and B.

R rows, T adapters, D width in, C width out, K rank, P parts with C_p columns, W the sum of these
Source: Hu et al., LoRA, arXiv:2106.09685; rows sorted by adapter, as in LoRAFusion, arXiv:2510.00206.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from trunkline.kernels.adapters import low_rank_triton
from trunkline.kernels.arguments import can_look, check_offsets, check_tensors
from trunkline.kernels.dispatch import register
from trunkline.kernels.once_differentiable import once_differentiable
from trunkline.kernels.products import mm
from trunkline.kernels.tasks.task_tiles import random_offsets


def low_rank_reference(
    base: Tensor, x: Tensor, down: Tensor, up: Tensor, offsets: Tensor, parts: Sequence[int], scale: float
) -> Tensor:
    """The definition: one adapter after the other, one part after the other."""
    ends = offsets.tolist()
    rows = []
    for t, (first, last) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        y = base[first:last]
        for hidden, columns, own in _parts(parts, down.shape[2]):
            added = scale * (x[first:last] @ down[t][:, hidden]) @ up[t][:, own]
            y = torch.cat([y[:, : columns.start], y[:, columns] + added, y[:, columns.stop :]], 1)
        rows.append(y)
    return torch.cat(rows)


def _parts(parts: Sequence[int], hidden: int) -> Iterator[tuple[slice, slice, slice]]:
    """Of every part: its columns of h, of y, and of up."""
    rank, end = hidden // (len(parts) // 2), 0
    for p, (first, last) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        begin, end = end, end + last - first
        yield slice(p * rank, (p + 1) * rank), slice(first, last), slice(begin, end)


def _segments(offsets: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Of every adapter that has rows: its part of each tensor, (T, ...) or (R, ...). Views, all made at once: with a
    hundred adapters of twenty rows each, to cut them out one by one takes as long as the products."""
    counts = offsets.diff().tolist()
    cut = [x.unbind() if x.ndim == 3 else x.split(counts) for x in tensors]
    return (tuple(views) for count, *views in zip(counts, *cut, strict=True) if count)


def _forward_reference(
    base: Tensor, x: Tensor, down: Tensor, up: Tensor, offsets: Tensor, parts: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    if can_look(offsets):
        check_offsets("low_rank", offsets, len(x))
    y, h = base.clone(), x.new_empty(len(x), down.shape[2])
    for x_t, down_t, h_t in _segments(offsets, x, down, h):
        mm(x_t, down_t, out=h_t)  # (r, D) @ (D, P K) -> (r, P K)
    for hidden, columns, own in _parts(parts, down.shape[2]):
        for y_t, h_t, up_t in _segments(offsets, y[:, columns], h[:, hidden], up[:, :, own]):
            y_t.addmm_(h_t, up_t, alpha=scale)  # (r, K) @ (K, C_p) -> (r, C_p)
    return y, h


def _backward_reference(
    dy: Tensor, x: Tensor, h: Tensor, down: Tensor, up: Tensor, offsets: Tensor, parts: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dh, scaled = torch.empty_like(x), torch.empty_like(h), scale * h
    ddown, dup = torch.empty_like(down), torch.empty_like(up)
    for absent in (offsets.diff() == 0).nonzero()[:, 0].tolist():
        ddown[absent], dup[absent] = 0, 0
    for hidden, columns, own in _parts(parts, down.shape[2]):
        cut = _segments(offsets, dy[:, columns], scaled[:, hidden], dh[:, hidden], up[:, :, own], dup[:, :, own])
        for dy_t, h_t, dh_t, up_t, dup_t in cut:
            mm(dy_t, up_t.T, out=dh_t)  # (r, C_p) @ (C_p, K) -> (r, K)
            mm(h_t.T, dy_t, out=dup_t)  # (K, r) @ (r, C_p) -> (K, C_p)
    dh *= scale
    for x_t, dx_t, dh_t, down_t, ddown_t in _segments(offsets, x, dx, dh, down, ddown):
        mm(dh_t, down_t.T, out=dx_t)  # (r, P K) @ (P K, D) -> (r, D)
        mm(dh_t.T, x_t, out=ddown_t.T)  # (P K, r) @ (r, D) -> (P K, D); the other way round takes four times as long
    return dx, ddown, dup


def _forward_triton(
    base: Tensor, x: Tensor, down: Tensor, up: Tensor, offsets: Tensor, parts: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    if x.dtype == torch.float64:  # which Triton does not multiply
        return _forward_reference(base, x, down, up, offsets, parts, scale)
    if can_look(offsets):
        check_offsets("low_rank", offsets, len(x))
    return low_rank_triton.forward(base, x, down, up, offsets, parts, scale)


def _backward_triton(
    dy: Tensor, x: Tensor, h: Tensor, down: Tensor, up: Tensor, offsets: Tensor, parts: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype == torch.float64:
        return _backward_reference(dy, x, h, down, up, offsets, parts, scale)
    return low_rank_triton.backward(dy, x, h, down, up, offsets, parts, scale)


_forward = register(
    "low_rank_forward",
    triton=_forward_triton,
    reference=_forward_reference,
    fake=lambda base, x, down, *_: (base.new_empty(base.shape), x.new_empty(len(x), down.shape[2])),
)
_backward = register(
    "low_rank_backward",
    triton=_backward_triton,
    reference=_backward_reference,
    fake=lambda dy, x, h, down, up, *_: tuple(t.new_empty(t.shape) for t in (x, down, up)),
)


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, base, x, down, up, offsets, parts, scale):
        y, h = _forward(base, x, down, up, offsets, parts, scale)
        ctx.save_for_backward(x, h, down, up, offsets)
        ctx.parts, ctx.scale = parts, scale
        return y

    @staticmethod
    @once_differentiable("low_rank")
    def backward(ctx, dy):
        dx, ddown, dup = _backward(dy.contiguous(), *ctx.saved_tensors, ctx.parts, ctx.scale)
        return dy, dx, ddown, dup, None, None, None


def low_rank(
    base: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    offsets: Tensor,
    parts: Sequence[int] | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Adds to a linear layer's output what the adapter of each row makes of its input, all adapters in one call.

    Args:
        base: (R, C) what the layer gives; float32, float16, bfloat16 or float64, as all others.
        x: (R, D) what adapters get, sorted by adapter.
        down: (T, D, P * K) the A of each adapter, those of the parts side by side.
        up: (T, K, W) the B of each, those of the parts side by side.
        offsets: (T + 1,) int32; rows of adapter t are offsets[t] : offsets[t + 1]. An adapter may have none.
        parts: first column and end of each of P parts of y, one after the other; None: one part, all columns.
        scale: of what is added: alpha / K.

    Returns:
        (R, C), a new tensor. Gradients flow to base, x, down and up.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit one another, parts that are none of y, or offsets that do
            not rise from 0 to R (looked at on the CPU, and on a GPU with TRUNKLINE_CHECK=1).
    """
    tensors = {"base": base, "x": x, "down": down, "up": up}
    check_tensors("low_rank", tensors, integers={"offsets": offsets})
    if base.ndim != 2 or down.ndim != 3 or up.ndim != 3 or not len(down):
        raise ValueError(
            f"low_rank: base must be (R, C), down (T, D, P * K) and up (T, K, W) of at least one adapter, "
            f"got {list(base.shape)}, {list(down.shape)} and {list(up.shape)}"
        )
    (R, C), (T, D, _), (_, K, _) = base.shape, down.shape, up.shape
    parts = [0, C] if parts is None else list(parts)
    widths = [last - first for first, last in zip(parts[::2], parts[1::2], strict=False)]
    ascending = all(a <= b for a, b in zip([0, *parts], [*parts, C], strict=True))
    if len(parts) % 2 or not parts or not ascending or min(widths) < 1:
        raise ValueError(f"low_rank: parts must be first columns and ends that rise from 0 to C = {C}, got {parts}")
    expected = {"x": [R, D], "down": [T, D, len(widths) * K], "up": [T, K, sum(widths)], "offsets": [T + 1]}
    given = {"x": x, "down": down, "up": up, "offsets": offsets}
    if wrong := [name for name, shape in expected.items() if list(given[name].shape) != shape]:
        name = wrong[0]
        raise ValueError(
            f"low_rank: with base {list(base.shape)}, down {list(down.shape)}, up {list(up.shape)} and parts {parts}, "
            f"{name} must be {expected[name]}, got {list(given[name].shape)}"
        )
    return _LowRank.apply(base, x, down, up, offsets, parts, float(scale))


SHAPES = {
    "8 adapters": {"rows": 16384, "tasks": 8, "width": 4096, "columns": 4096, "rank": 16},
    "rank 64": {"rows": 16384, "tasks": 8, "width": 4096, "columns": 4096, "rank": 64},
    "queries, keys and values": {"rows": 16384, "tasks": 8, "width": 768, "columns": 768, "rank": 16, "num_parts": 3},
    "100 adapters": {"rows": 16384, "tasks": 100, "width": 768, "columns": 3072, "rank": 8},
}
ALSO_CERTIFIED = {
    "rank 128": {"rows": 16384, "tasks": 8, "width": 4096, "columns": 4096, "rank": 128},
    "rank 64, parts": {"rows": 2048, "tasks": 8, "width": 4096, "columns": 1024, "rank": 64, "num_parts": 3},
    "rank 64, two parts": {"rows": 2048, "tasks": 8, "width": 4096, "columns": 1024, "rank": 64, "num_parts": 2},
}


def example(
    device: torch.device | str,
    dtype: torch.dtype,
    rows: int = 512,
    tasks: int = 9,
    width: int = 768,
    columns: int = 768,
    rank: int = 16,
    num_parts: int = 1,
) -> dict[str, Any]:
    """Arguments of `low_rank`: `rows` spread at random over `tasks` adapters; `columns` of each of the parts."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    ends = [columns * (p + side) for p in range(num_parts) for side in (0, 1)]
    return {
        "base": normal(rows, num_parts * columns),
        "x": normal(rows, width),
        "down": normal(tasks, width, num_parts * rank) / width**0.5,
        "up": normal(tasks, rank, num_parts * columns) / rank**0.5,
        "offsets": random_offsets(rows, tasks, device, generator),
        "parts": ends,
        "scale": 2.0,
    }
