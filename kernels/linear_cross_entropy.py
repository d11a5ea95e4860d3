"""Cross-entropy of vocabulary heads from hidden states: the logits are never whole in memory.

For row r with logits z = cap(x_r W^T + b), cap(z) = c * tanh(z / c), and the log-sum-exp L over the V words:
    l_r = L - (1 - s) * z[y] - s * mean_v z[v] + zeta * L^2,   s the label smoothing, zeta the z-loss
    dl_r/dz = softmax(z) * (1 + 2 * zeta * L) - (1 - s) * onehot(y) - s / V
and the loss of a task is sum_r w_r l_r. The gradient of the logits is computed anew in the backward pass.
Saved for backward: x, the weights and L (4 bytes a row).

R rows, D width, V vocabulary, N tasks
Source: Wijmans et al., Cut Your Losses, arXiv:2411.09009; z-loss as in PaLM, arXiv:2204.02311, section 5.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.kernels.dispatch import register
from trunkline.kernels.task_loss import LossSums, sum_by_task

CHUNK = 256  # rows whose logits exist at a time: 50 MiB of float32 at V = 50257
LOG2_E = math.log2(math.e)


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    task: Tensor,
    row_weight: Tensor,
    num_tasks: int,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """The definition, for one head and without ignored rows: all logits at once, (N,) loss sums."""
    logits = F.linear(x, weight, bias)
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    loss = F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
    loss = loss + z_loss * logits.logsumexp(-1).square()
    return sum_by_task(loss * row_weight.to(loss.dtype), task, num_tasks)


def _chunks(x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Chunks of rows with their logits (r, V) and the derivative of the soft cap (1 without it)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    for start in range(0, len(x), CHUNK):
        rows = slice(start, min(start + CHUNK, len(x)))
        logits = F.linear(x[rows], weight, bias).to(dtype)  # (r, D) @ (D, V) -> (r, V)
        slope = logits.new_ones(())
        if softcap:
            capped = (logits / softcap).tanh_()
            slope, logits = 1 - capped.square(), capped * softcap
        yield rows, logits, slope


def _forward_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    task: Tensor,
    row_weight: Tensor,
    num_tasks: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    loss, correct, lse = (torch.empty_like(row_weight, dtype=dtype) for _ in range(3))
    for rows, logits, _ in _chunks(x, weight, bias, softcap):
        y = target[rows, None]
        top, best = logits.max(-1, keepdim=True)
        logits.sub_(top)  # the loss is made of differences: large logits cost it no digits
        expected = (1 - label_smoothing) * logits.gather(1, y) + label_smoothing * logits.mean(-1, keepdim=True)
        log_total = logits.mul_(LOG2_E).exp2_().sum(-1, keepdim=True).log()  # exp2 is the cheaper exponential
        normaliser = top + log_total
        loss[rows] = (log_total - expected + z_loss * normaliser.square()).squeeze(1)
        correct[rows] = (best == y).to(loss.dtype).squeeze(1)
        lse[rows] = normaliser.squeeze(1)
    row_weight = row_weight.to(loss.dtype)
    counted = (row_weight > 0).to(loss.dtype)
    columns = (row_weight * loss, row_weight, counted, counted * correct)
    sums = LossSums(*(sum_by_task(values, task, num_tasks) for values in columns))
    return *sums, lse


def _backward_reference(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    task: Tensor,
    row_weight: Tensor,
    lse: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x)
    dweight = torch.zeros_like(weight, dtype=lse.dtype)  # sums over chunks stay in float32
    dbias = dweight.new_zeros(len(weight) if bias is not None else 0)
    scale = row_weight.to(lse.dtype) * dloss[task]  # (R,)
    for rows, logits, slope in _chunks(x, weight, bias, softcap):
        p = logits.softmax(-1)
        if z_loss:
            p.mul_(1 + 2 * z_loss * lse[rows, None])
        if label_smoothing:
            p.sub_(label_smoothing / len(weight))
        p.scatter_add_(1, target[rows, None], p.new_full((len(p), 1), label_smoothing - 1))
        dlogits = p.mul_(scale[rows, None]).mul_(slope)  # (r, V)
        if bias is not None:
            dbias += dlogits.sum(0)
        dlogits = dlogits.to(x.dtype)
        dx[rows] = dlogits @ weight  # (r, V) @ (V, D) -> (r, D)
        dweight += dlogits.T @ x[rows]  # (V, r) @ (r, D) -> (V, D)
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)


def _forward_fake(x, weight, bias, target, task, row_weight, num_tasks, label_smoothing, z_loss, softcap):
    dtype = torch.promote_types(x.dtype, torch.float32)
    return *(x.new_empty(num_tasks, dtype=dtype) for _ in range(4)), x.new_empty(len(x), dtype=dtype)


def _backward_fake(dloss, x, weight, bias, *rest):
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(len(weight) if bias is not None else 0),
    )


_forward = register("linear_cross_entropy_forward", reference=_forward_reference, fake=_forward_fake)
_backward = register("linear_cross_entropy_backward", reference=_backward_reference, fake=_backward_fake)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, target, task, row_weight, num_tasks, *options):
        loss, *sums, lse = _forward(x, weight, bias, target, task, row_weight, num_tasks, *options)
        ctx.save_for_backward(x, weight, bias, target, task, row_weight, lse)
        ctx.options = options
        ctx.mark_non_differentiable(*sums)
        return loss, *sums

    @staticmethod
    def backward(ctx, dloss, *_):
        dx, dweight, dbias = _backward(dloss.contiguous(), *ctx.saved_tensors, *ctx.options)
        return dx, dweight, dbias if ctx.saved_tensors[2] is not None else None, *[None] * 7


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    task: Tensor,
    row_weight: Tensor,
    *,
    num_tasks: int,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
) -> LossSums:
    """Next-token loss sums per task, from the hidden states of the rows that carry a label.

    Args:
        x: (R, D) hidden states; float32, float16, bfloat16 or float64.
        weight: (V, D) vocabulary matrix, tied to the embedding or not.
        target: (R,) int64, the token to predict, or `ignore_index`.
        task: (R,) int64, 0 <= task < num_tasks.
        row_weight: (R,) float32, factor of each row's loss.
        num_tasks: N
        bias: (V,)
        label_smoothing: share of the probability spread over the vocabulary.
        z_loss: factor of the squared log-sum-exp, which keeps the logits from drifting; 1e-4 is usual.
        softcap: logits are capped smoothly to +-softcap; 0: they are not.
        ignore_index: rows with this target do not count.

    Returns:
        `LossSums`; sums are taken in float32 at least. Gradients flow from `loss` to x, weight and bias.

    Raises:
        ValueError: shapes that do not fit one another.
    """
    R, D = x.shape
    if weight.shape[1] != D or (bias is not None and bias.shape != weight.shape[:1]):
        got = f"{list(weight.shape)}" + ("" if bias is None else f" and {list(bias.shape)}")
        raise ValueError(f"linear_cross_entropy: weight must be (V, {D}) and bias (V,), got {got}")
    for name, rows in (("target", target), ("task", task), ("row_weight", row_weight)):
        if rows.shape != (R,):
            raise ValueError(f"linear_cross_entropy: {name} must be (R,) = ({R},) to match x, got {list(rows.shape)}")
    ignored = target == ignore_index
    target, row_weight = target.masked_fill(ignored, 0), row_weight.masked_fill(ignored, 0.0)
    options = (float(label_smoothing), float(z_loss), float(softcap))
    return LossSums(*_LinearCrossEntropy.apply(x, weight, bias, target, task, row_weight, num_tasks, *options))
