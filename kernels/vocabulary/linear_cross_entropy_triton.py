"""Triton kernels of the vocabulary loss: a chunk of rows, and the sums over the rows of each task.

linear_cross_entropy.py has the mathematics. A row is read twice: once for the log-sum-exp, with a running maximum, and
once, from the cache, to put the gradient in its place.

r rows of the chunk, R rows, V vocabulary, N tasks
"""

from torch import Tensor

from trunkline.kernels.decisions import decision
from trunkline.kernels.dispatch import tl, triton


@triton.jit
def _load_logits(row_ptr, bias_ptr, v, inside, outside, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """Logits of words v in float32, `outside` where they are none, and the slope of the soft cap."""
    z = tl.load(row_ptr + v, mask=inside, other=outside).to(tl.float32)
    slope = 1.0
    if HAS_BIAS:
        z += tl.load(bias_ptr + v, mask=inside, other=0.0).to(tl.float32)
    if HAS_CAP:
        share = 1 - 2 / (1 + tl.exp(2 * z / softcap))  # tanh; where exp overflows, it is 1
        z = tl.where(inside, softcap * share, z)
        slope = 1 - share * share
    return z, slope


@triton.jit
def _row_kernel(
    logits_ptr,
    stride,
    bias_ptr,
    target_ptr,
    row_weight_ptr,
    dloss_ptr,
    loss_ptr,
    correct_ptr,
    V,
    label_smoothing,
    z_loss,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One row: its weighted loss, whether the label has the highest logit, and the gradient in place of the logits."""
    r = tl.program_id(0)
    row_ptr = logits_ptr + r.to(tl.int64) * stride
    y = tl.load(target_ptr + r)
    row_weight = tl.load(row_weight_ptr + r).to(tl.float32)
    counts = row_weight != 0
    is_word = (y >= 0) & (y < V)
    tl.device_assert(is_word, "linear_cross_entropy: target outside of the vocabulary")  # with TRITON_DEBUG=1
    # rows that do not count are not read here either: no reduction would stand between this and the gradient's stores
    own = _load_logits(row_ptr, bias_ptr, y, is_word & counts, float("nan"), softcap, HAS_BIAS, HAS_CAP)[0]

    top, others, gap = -3.0e38, 0.0, 0.0  # finite, so that -inf - top is no NaN
    for first in range(0, tl.where(counts, V, 0), BLOCK_V):  # rows that do not count are not read
        v = first + tl.arange(0, BLOCK_V)
        z = _load_logits(row_ptr, bias_ptr, v, v < V, float("-inf"), softcap, HAS_BIAS, HAS_CAP)[0]
        if HAS_SMOOTHING:
            gap += tl.sum(tl.where(v < V, own - z, 0.0), 0)
        z = tl.where(v == y, float("-inf"), z)
        higher = tl.maximum(top, tl.max(z, 0))
        others = others * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
        top = higher

    log_others = tl.log(others)  # above top; -inf for a vocabulary of one word
    margin = (top - own) + log_others  # differences first: large logits cost no digits
    softplus = tl.maximum(margin, 0.0) + tl.log(1 + tl.exp(-tl.abs(margin)))
    total = own + softplus  # the log-sum-exp of all
    loss = softplus + label_smoothing / V * gap + z_loss * total * total
    tl.store(loss_ptr + r, tl.where(counts, row_weight * loss, 0.0))
    tl.store(correct_ptr + r, tl.where(counts & (own > top), 1.0, 0.0))

    if HAS_GRADIENT:
        row_weight *= tl.load(dloss_ptr + r)
        doubt = 1 / (1 + tl.exp(-margin))  # 1 - p[y]
        drift = 2 * z_loss * total
        own_gradient = drift * (1 - doubt) - doubt + label_smoothing - label_smoothing / V
        for first in range(0, V, BLOCK_V):  # the second read comes from the cache
            v = first + tl.arange(0, BLOCK_V)
            z, slope = _load_logits(row_ptr, bias_ptr, v, v < V, float("-inf"), softcap, HAS_BIAS, HAS_CAP)
            gradient = doubt * (1 + drift) * tl.exp((z - top) - log_others) - label_smoothing / V
            gradient = tl.where(v == y, own_gradient, gradient) * slope * row_weight
            tl.store(row_ptr + v, tl.where(counts, gradient, 0.0), mask=v < V)


@triton.jit
def _sum_kernel(
    loss_ptr,
    correct_ptr,
    row_weight_ptr,
    task_ptr,
    loss_sum_ptr,
    weight_ptr,
    count_ptr,
    sum_ptr,
    R,
    BLOCK_R: tl.constexpr,
):
    """The sums of one task, always added in the same order."""
    t = tl.program_id(0)
    loss = tl.zeros([BLOCK_R], tl.float32)
    weight, count, correct = loss, loss, loss
    for first in range(0, R, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        mine = tl.load(task_ptr + r, mask=r < R, other=-1) == t
        row_weight = tl.load(row_weight_ptr + r, mask=mine, other=0.0).to(tl.float32)
        counted = tl.where(row_weight > 0, 1.0, 0.0)
        loss += tl.load(loss_ptr + r, mask=mine, other=0.0)
        weight += row_weight
        count += counted
        correct += counted * tl.load(correct_ptr + r, mask=mine, other=0.0)
    tl.store(loss_sum_ptr + t, tl.sum(loss, 0))
    tl.store(weight_ptr + t, tl.sum(weight, 0))
    tl.store(count_ptr + t, tl.sum(count, 0))
    tl.store(sum_ptr + t, tl.sum(correct, 0))


def _row_tile(block: int, warps: int) -> dict[str, int]:
    return {"BLOCK_V": block, "num_warps": warps}


def _other_rows(V: int) -> list[dict[str, int]]:
    return [_row_tile(8192, 8), _row_tile(4096, 4), _row_tile(2048, 8)] if V >= 8192 else []


@decision(_other_rows)
def row_tile(V: int) -> dict[str, int]:
    block = min(4096, triton.next_power_of_2(V))
    return _row_tile(block, min(8, max(1, block // 32)))  # with more warps, several would read and one write a word


def rows_triton(
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
    r, V = logits.shape
    _row_kernel[(r,)](
        logits,
        logits.stride(0),
        bias,
        target,
        row_weight,
        dloss,
        loss,
        correct,
        V,
        label_smoothing,
        z_loss,
        softcap,
        HAS_BIAS=bias is not None,
        HAS_SMOOTHING=label_smoothing != 0,
        HAS_CAP=softcap != 0,
        HAS_GRADIENT=dloss is not None,
        **row_tile(V),
    )


def sums_triton(
    loss: Tensor, correct: Tensor, row_weight: Tensor, task: Tensor, num_tasks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(R,) weighted losses and correct rows -> (N,) sums of loss, weight, rows with weight > 0 and correct ones."""
    totals, weights, counts, right = (loss.new_empty(num_tasks) for _ in range(4))
    outputs = (totals, weights, counts, right)
    _sum_kernel[(num_tasks,)](loss, correct, row_weight, task, *outputs, len(loss), BLOCK_R=1024)
    return outputs
