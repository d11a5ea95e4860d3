"""Vocabulary logits, a chunk of rows at a time, which become their own gradient in place.

The mathematics, and why chunks, are in linear_cross_entropy.py.

R rows, r of a chunk, D width, V vocabulary
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trunkline.kernels.decisions import decision
from trunkline.kernels.products import mm

# Rows whose logits exist at a time: so many, or more while they have no more than these bytes. The CPU's stay cached.
# A GPU's are large: every chunk moves all of dW, 8 V D bytes, and few rows leave processors without a tile of dX.
CHUNKS = {"cpu": (256, 8 << 20), "cuda": (960, 512 << 20)}
MULTIPLE = 64  # of the rows of a chunk that is not the only one: a tile of a product has so many


def rows_reference(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor,
    dloss: Tensor | None,
    loss: Tensor,
    correct: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    """The weighted losses of a chunk and, with the dloss (r,) of its rows, its gradient in place of its logits.

    As few passes over the logits as can be.
    """
    z, y, row_weight = logits.to(loss.dtype), target[:, None], row_weight[:, None]
    if bias is not None:
        z.add_(bias)
    if softcap:
        share = z.div_(softcap).tanh_()
        slope, z = 1 - share.square(), share * softcap
    own = z.gather(1, y)  # (r, 1), like all that follows for a row
    gap = (own - z).mean(-1, keepdim=True) if label_smoothing else torch.zeros_like(own)
    z.scatter_(1, y, torch.finfo(z.dtype).min)
    top = z.amax(-1, keepdim=True)
    others = z.sub_(top).exp_().sum(-1, keepdim=True)
    margin = (top - own) + others.log()  # differences first: large logits cost no digits
    softplus = torch.logaddexp(margin, torch.zeros_like(margin))
    total = own + softplus
    loss[:, None] = row_weight * (softplus + label_smoothing * gap + z_loss * total.square())
    correct[:, None] = own > top
    if dloss is None:
        return

    V, row_weight = z.shape[1], row_weight * dloss[:, None]
    doubt, drift = margin.sigmoid(), 2 * z_loss * total  # 1 - p[y]
    z.mul_(row_weight * doubt * (1 + drift) / others)
    if label_smoothing:
        z.sub_(row_weight * (label_smoothing / V))
    own_gradient = drift * (1 - doubt) - doubt + label_smoothing - label_smoothing / V
    z.scatter_(1, y, row_weight * own_gradient)
    if softcap:
        z.mul_(slope)
    if z is not logits:
        logits.copy_(z)


@decision(lambda V, itemsize: [128 << 20, 256 << 20, 1 << 30])
def gpu_chunk(V: int, itemsize: int) -> int:
    """Bytes of a chunk's logits on a GPU, at most."""
    return CHUNKS["cuda"][1]


def chunk_rows(R: int, V: int, itemsize: int, device: str) -> int:
    """How many rows a chunk has: chunks are equal, but for the last, which may have some rows fewer."""
    at_least, most_bytes = CHUNKS.get(device, CHUNKS["cuda"])
    if device != "cpu":
        most_bytes = gpu_chunk(V, itemsize)
    most = max(at_least, most_bytes // (V * itemsize))
    if most >= R:
        return max(1, R)
    equal = -(-R // -(-R // most))
    return min(most, -(-equal // MULTIPLE) * MULTIPLE)


def in_chunks(
    rows_of_chunk: Callable[..., None],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_weight: Tensor,
    dloss: Tensor | None,
    of_weight: bool,
    *options: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weighted losses (R,), which rows are correct (R,) and, with the dloss (R,) of the rows, three gradients: those of
    x, bias and, if `of_weight`, weight, which is a third of the arithmetic and as large as the weight."""
    (R, D), V, with_gradient = x.shape, len(weight), dloss is not None
    loss, correct = (torch.empty_like(row_weight) for _ in range(2))
    dx = x.new_empty((R, D) if with_gradient else (0, D))
    dweight = loss.new_zeros((V, D) if with_gradient and of_weight else (0, D))
    dbias = loss.new_zeros(V if with_gradient and bias is not None else 0)
    weight = weight.to(x.dtype)
    size = chunk_rows(R, V, x.itemsize, x.device.type)
    buffer = x.new_empty(size, -(-V // 64) * 64)[:, :V]  # cuBLAS wants every row to start at a multiple of 16 bytes
    for start in range(0, R, size):
        rows = slice(start, min(start + size, R))
        logits = mm(x[rows], weight.T, out=buffer[: rows.stop - start])  # (r, D) @ (D, V) -> (r, V)
        known = None if dloss is None else dloss[rows]
        rows_of_chunk(logits, bias, target[rows], row_weight[rows], known, loss[rows], correct[rows], *options)
        if not with_gradient:
            continue
        mm(logits, weight, out=dx[rows])  # (r, V) @ (V, D) -> (r, D)
        if of_weight:
            _add_product(dweight, logits.T, x[rows])  # (V, r) @ (r, D) -> (V, D)
        if bias is not None:
            dbias += logits.sum(0, dtype=dbias.dtype)
    return loss, correct, dx, dweight, dbias


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total may be of higher precision."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)  # adds up in registers and never rounds
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
