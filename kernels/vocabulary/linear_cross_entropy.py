"""Cross-entropy of vocabulary heads from hidden states: the logits are never whole in memory.

For row r with logits z = cap(x_r W^T + b), cap(z) = c * tanh(z / c), the question is: the label y or another word? With
o = log sum_{v != y} exp(z[v]), the margin m = o - z[y] by which the others win, and L = z[y] + softplus(m), which is
the log-sum-exp of all V logits:
    l_r = softplus(m) + s * mean_v (z[y] - z[v]) + zeta * L^2,   s the label smoothing, zeta the z-loss
    dl_r/dz[v] = sigmoid(m) * (1 + 2 * zeta * L) * exp(z[v] - o) - s / V   for v != y
    dl_r/dz[y] = -sigmoid(m) + 2 * zeta * L * (1 - sigmoid(m)) + s - s / V
and the loss of a task is sum_r w_r l_r. No probability near 1 is subtracted from 1: sure predictions lose no digits.

The logits of a chunk of rows are made, become their own gradient in place, and give dX and a summand of dW (float32).
The gradients are formed in the forward pass, 6 R V D FLOP, where the dloss of the tasks is known by then: because the
caller says it, as training with fixed weights can, or because those of a single task are its dloss times the gradients
for dloss = 1. Several tasks on one head of which nobody knows dloss before the backward pass have their chunks computed
again there: 8 R V D FLOP, and exact whatever arrives.
Saved for backward: dX, dW and db where they are formed; otherwise x, W, b and the labels.

Chunks in memory and not tiles on the chip, because tiles need 8 R V D FLOP always. On an H200 (790 TFLOP/s, 4.3 TB/s) a
16-bit logit costs 10 bytes of traffic, as much as 1.2 of the 3 products at D = 768 and 0.2 at D = 4096 if nothing is
found in the cache; the sum of dW costs 8 V D bytes a chunk, at 1000 rows a quarter of the chunk's products, whatever V
and D. Tiles would win below D = 256.

R rows, D width, V vocabulary, N tasks
Source: Wijmans et al., Cut Your Losses, arXiv:2411.09009; Hsu et al., Liger Kernel, arXiv:2410.10989; z-loss as in
PaLM, arXiv:2204.02311, section 5; soft cap as in Gemma 2, arXiv:2408.00118, section 2.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.kernels.arguments import can_look, check_tensors
from trunkline.kernels.dispatch import register
from trunkline.kernels.once_differentiable import once_differentiable
from trunkline.kernels.tasks.task_loss import LossSums, sum_by_task
from trunkline.kernels.vocabulary.chunks import in_chunks, rows_reference
from trunkline.kernels.vocabulary.linear_cross_entropy_triton import rows_triton, sums_triton


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
    return loss_of_logits(
        F.linear(x, weight, bias), target, task, row_weight, num_tasks, label_smoothing, z_loss, softcap
    )


def loss_of_logits(
    logits: Tensor,
    target: Tensor,
    task: Tensor,
    row_weight: Tensor,
    num_tasks: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """The definition from the logits (R, V) on."""
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    loss = F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
    loss = loss + z_loss * logits.logsumexp(-1).square()
    return sum_by_task(loss * row_weight.to(loss.dtype), task, num_tasks)


def _check_labels(target: Tensor, task: Tensor, row_weight: Tensor, vocabulary: int, num_tasks: int) -> None:
    """Raises ValueError for a task that there is not, and for such a word in a row that counts."""
    wrong = (task < 0) | (task >= num_tasks)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"linear_cross_entropy: tasks must be in [0, {num_tasks}), got {int(task[row])} in row {row}")
    wrong = ((target < 0) | (target >= vocabulary)) & (row_weight != 0)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"linear_cross_entropy: targets must be in [0, {vocabulary}), got {int(target[row])} "
            f"in row {row}, of task {int(task[row])}"
        )


def _forward_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    task: Tensor,
    row_weight: Tensor,
    dloss: Tensor | None,
    of_weight: bool,
    num_tasks: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = (label_smoothing, z_loss, softcap)
    if x.dtype == torch.float64:  # the kernel computes in float32
        return _forward_reference(x, weight, bias, target, task, row_weight, dloss, of_weight, num_tasks, *options)
    if can_look(target):
        _check_labels(target, task, row_weight, len(weight), num_tasks)
    bias = None if bias is None else bias.contiguous()
    target, task, row_weight = target.contiguous(), task.contiguous(), row_weight.float().contiguous()
    dloss = None if dloss is None else dloss.float()[task]
    inputs = (x, weight, bias, target, row_weight, dloss, of_weight)
    loss, correct, dx, dweight, dbias = in_chunks(rows_triton, *inputs, *options)
    return *sums_triton(loss, correct, row_weight, task, num_tasks), dx, dweight, dbias


def _forward_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    task: Tensor,
    row_weight: Tensor,
    dloss: Tensor | None,
    of_weight: bool,
    num_tasks: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if can_look(target):
        _check_labels(target, task, row_weight, len(weight), num_tasks)
    kept = row_weight.nonzero().squeeze(1)  # the others cost nothing
    target, task = target[kept], task[kept]
    row_weight = row_weight[kept].to(torch.promote_types(x.dtype, torch.float32))
    dloss = None if dloss is None else dloss.to(row_weight.dtype)[task]
    inputs = (x[kept], weight, bias, target, row_weight, dloss, of_weight)
    loss, correct, dx, dweight, dbias = in_chunks(rows_reference, *inputs, label_smoothing, z_loss, softcap)
    if dloss is not None:
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format).index_copy_(0, kept, dx)
    counted = (row_weight > 0).to(loss.dtype)
    sums = LossSums(
        *(sum_by_task(values, task, num_tasks) for values in (loss, row_weight, counted, counted * correct))
    )
    return *sums, dx, dweight, dbias


def _forward_fake(x, weight, bias, target, task, row_weight, dloss, of_weight, num_tasks, *options):
    dtype = torch.promote_types(x.dtype, torch.float32)
    (R, D), V, with_gradient = x.shape, len(weight), dloss is not None
    return (
        *(x.new_empty(num_tasks, dtype=dtype) for _ in range(4)),
        x.new_empty((R, D) if with_gradient else (0, D)),
        x.new_empty((V, D) if with_gradient and of_weight else (0, D), dtype=dtype),
        x.new_empty(V if with_gradient and bias is not None else 0, dtype=dtype),
    )


_forward = register("linear_cross_entropy", reference=_forward_reference, triton=_forward_triton, fake=_forward_fake)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, target, task, row_weight, dloss, num_tasks, differentiated, *options):
        ctx.known, ctx.num_tasks, ctx.options = dloss is not None, num_tasks, options
        ctx.dtypes = [t.dtype for t in (x, weight, weight if bias is None else bias)]
        if not differentiated:
            dloss = None
        elif dloss is None and num_tasks == 1:
            dloss = row_weight.new_ones(1)
        ctx.formed = dloss is not None
        inputs = (x, weight, bias, target, task, row_weight)
        ctx.of_weight = ctx.needs_input_grad[1]  # a frozen vocabulary has no gradient
        *sums, dx, dweight, dbias = _forward(*inputs, dloss, ctx.of_weight, num_tasks, *options)
        ctx.save_for_backward(*((dloss, dx, dweight, dbias) if ctx.formed else inputs))
        ctx.mark_non_differentiable(*sums[1:])
        return tuple(sums)

    @staticmethod
    @once_differentiable("linear_cross_entropy")
    def backward(ctx, dloss, *_):
        if not ctx.formed:
            gradients = _forward(*ctx.saved_tensors, dloss, ctx.of_weight, ctx.num_tasks, *ctx.options)[4:]
        else:
            expected, *gradients = ctx.saved_tensors
            if not ctx.known:
                gradients = [dloss * gradient for gradient in gradients]
            elif can_look(dloss) and not torch.compiler.is_compiling() and not torch.equal(dloss, expected):
                raise ValueError(
                    "linear_cross_entropy: the gradient of loss must be the dloss that was given, "
                    f"{expected.tolist()}, got {dloss.tolist()}"
                )
        dx, dweight, dbias = (gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True))
        return dx, dweight if ctx.of_weight else None, dbias if ctx.needs_input_grad[2] else None, *[None] * 9


def _check_tensors(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    task: Tensor,
    row_weight: Tensor,
    dloss: Tensor | None,
) -> None:
    check_tensors(
        "linear_cross_entropy",
        {"x": x},
        integers={"target": target, "task": task},
        others={"weight": weight, "row_weight": row_weight},
        optional={"bias": bias, "dloss": dloss},
    )
    fitting = (x.dtype, torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else (x.dtype,)
    if weight.dtype not in fitting or (bias is not None and bias.dtype not in fitting):
        got = [str(t.dtype) for t in (x, weight, bias) if t is not None]
        raise ValueError(
            "linear_cross_entropy: x, weight and bias must have one dtype, or weight and bias float32 with x in 16 "
            f"bits, got {', '.join(got)}"
        )


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    target: Tensor,
    task: Tensor,
    row_weight: Tensor,
    *,
    num_tasks: int | Sequence[int],
    bias: Tensor | Sequence[Tensor | None] | None = None,
    rows: Sequence[int] | None = None,
    dloss: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
) -> LossSums:
    """Next-token loss sums per task, from the hidden states of the rows that carry a label.

    Several heads in one call: `weight`, `num_tasks` and `rows` hold one entry for each head, and rows and tasks stand
    in the order of the heads.

    Args:
        x: (R, D) hidden states; float32, float16, bfloat16 or float64, which is for checks: no kernel computes in it.
        weight: (V, D) vocabulary matrix, tied to the embedding or not; in the dtype of x or, with x in 16 bits, in
            float32: its products are then taken in 16 bits, its gradient is not rounded.
        target: (R,) int64, the token to predict, 0 <= target < V, or `ignore_index`. Others raise on the CPU and, with
            TRUNKLINE_CHECK=1, on a GPU, where the loss is NaN otherwise.
        task: (R,) int64, 0 <= task < num_tasks.
        row_weight: (R,) float32, factor of each row's loss.
        num_tasks: N
        bias: (V,)
        rows: how many rows each head has, R in all; may be left out for a single head.
        dloss: (N,) float32, the gradient that `loss` will get, where that is known already. The gradients of several
            tasks on one head then take a quarter less arithmetic, as those of a single task always do. In the backward
            pass nothing else may arrive: looked at on the CPU, and on a GPU with TRUNKLINE_CHECK=1.
        label_smoothing: share of the probability spread over the vocabulary.
        z_loss: factor of the squared log-sum-exp, which keeps the logits from drifting; 1e-4 is usual.
        softcap: logits are capped smoothly to +-softcap; 0: they are not.
        ignore_index: rows with this target do not count.

    Returns:
        `LossSums`; sums are taken in float32 at least. A row is correct if no other logit is as high as its target's.
        Gradients flow from `loss` to x, weight and bias.

    Raises:
        ValueError: shapes that do not fit one another, targets that are no integers or not in the vocabulary, or a
            gradient that is not `dloss`.
    """
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    biases = [bias] * len(weights) if bias is None or isinstance(bias, Tensor) else list(bias)
    tasks = [num_tasks] if isinstance(num_tasks, int) else list(num_tasks)
    for w, b in zip(weights, biases, strict=False):
        _check_tensors(x, w, b, target, task, row_weight, dloss)
    if x.ndim != 2:
        raise ValueError(f"linear_cross_entropy: x must be (R, D), got {list(x.shape)}")
    (R, D), counts = x.shape, [len(x)] if rows is None else list(rows)
    if not len(weights) == len(biases) == len(tasks) == len(counts) > 0 or sum(counts) != R:
        raise ValueError(
            "linear_cross_entropy: weight, bias, num_tasks and rows must have one entry for each head, and rows must "
            f"add up to {R}, got {len(weights)}, {len(biases)}, {len(tasks)} and rows {counts}"
        )
    for w, b in zip(weights, biases, strict=True):
        if w.ndim != 2 or w.shape[1] != D or (b is not None and b.shape != w.shape[:1]):
            got = f"{list(w.shape)}" + ("" if b is None else f" and {list(b.shape)}")
            raise ValueError(f"linear_cross_entropy: weight must be (V, {D}) and bias (V,), got {got}")
        if not len(w):
            raise ValueError("linear_cross_entropy: the vocabulary must have words, got V = 0")
    for name, labels in (("target", target), ("task", task), ("row_weight", row_weight)):
        if labels.shape != (R,):
            raise ValueError(f"linear_cross_entropy: {name} must be (R,) = ({R},) to match x, got {list(labels.shape)}")
    if dloss is not None and dloss.shape != (sum(tasks),):
        raise ValueError(f"linear_cross_entropy: dloss must be (N,) = ({sum(tasks)},), got {list(dloss.shape)}")

    ignored = target == ignore_index
    target, row_weight = target.masked_fill(ignored, 0).long(), row_weight.masked_fill(ignored, 0.0)
    options = (float(label_smoothing), float(z_loss), float(softcap))
    known = [None] * len(tasks) if dloss is None else dloss.to(torch.promote_types(x.dtype, torch.float32)).split(tasks)

    def sums(head: int, x: Tensor, target: Tensor, task: Tensor, row_weight: Tensor) -> LossSums:
        w, b = weights[head], biases[head]
        differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, b))
        inputs = (x, w, b, target, task.long() - sum(tasks[:head]), row_weight)
        return LossSums(*_LinearCrossEntropy.apply(*inputs, known[head], tasks[head], differentiated, *options))

    inputs = (x, target, task, row_weight)
    if len(weights) == 1:
        return sums(0, *inputs)
    parts = zip(*(t.split(counts) for t in inputs), strict=True)
    heads = [sums(head, *part) for head, part in enumerate(parts)]
    return LossSums(*(torch.cat(values) for values in zip(*heads, strict=True)))


SHAPES: dict[str, dict[str, Any]] = {
    "8192 x 768 x 50257": {"rows": 8192, "width": 768, "vocabulary": 50257},
    "16384 x 4096 x 128256": {"rows": 16384, "width": 4096, "vocabulary": 128256},
    "1024 x 256 x 8192": {"rows": 1024, "width": 256, "vocabulary": 8192},
    "1024 x 256 x 8192, 2 tasks": {"rows": 1024, "width": 256, "vocabulary": 8192, "tasks": 2},
    "1024 x 256 x 8192, all options": {
        "rows": 1024, "width": 256, "vocabulary": 8192, "bias": True,
        "label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0,
    },
}  # fmt: skip


def example(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    rows: int,
    width: int,
    vocabulary: int,
    tasks: int = 1,
    bias: bool = False,
    **options: float,
) -> dict[str, Any]:
    """Arguments of `linear_cross_entropy`: rows sorted by task, logits of about the size of a trained model's."""
    generator = torch.Generator(device).manual_seed(0)  # a host would draw the largest for a minute

    def normal(*shape: int, std: float) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=std, generator=generator)

    return {
        "x": normal(rows, width, std=1.0),
        "weight": normal(vocabulary, width, std=2 / width**0.5),
        "target": torch.randint(vocabulary, (rows,), generator=generator, device=device),
        "task": (torch.arange(rows) * tasks // rows).to(device),
        "row_weight": torch.ones(rows).to(device),
        "num_tasks": tasks,
        "bias": normal(vocabulary, std=1.0) if bias else None,
        **options,
    }
