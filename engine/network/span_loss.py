"""The loss of spans: the cross-entropy of the first and of the last token over the rows of each text.

R rows of a batch, N tasks
"""

import torch
from torch import Tensor

from trunkline.engine.heads.span import END, START
from trunkline.kernels.tasks.task_loss import LossSums, sum_by_task


def span_loss(
    logits: "Tensor", task: "Tensor", target: "Tensor", row_weight: "Tensor", sequence: "Tensor", num_tasks: int
) -> LossSums:
    """Cross-entropy of first and last token over the rows of each sequence.

    Args:
        logits: (R, 2) for first and last.
        task: (R,) int64, 0 <= task < num_tasks.
        target: (R,) int64, bits START and END.
        row_weight: (R,), 0 where the row is neither.
        sequence: (R,) int64, number of each row's sequence, ascending, from 0.
        num_tasks: N
    """
    logits = logits.float()
    groups = sequence[:, None].expand_as(logits)
    top = torch.full_like(logits, float("-inf")).scatter_reduce(0, groups, logits.detach(), "amax")  # (R, 2)
    total = torch.zeros_like(logits).scatter_add(0, groups, (logits - top[sequence]).exp())
    log_p = logits - top[sequence] - total[sequence].log()
    is_answer = torch.stack([target & START, (target & END) // END], -1).to(logits.dtype)  # (R, 2)
    loss = -(is_answer * log_p).sum(-1) / is_answer.sum(-1).clamp(min=1)
    best = torch.full_like(logits, float("-inf")).scatter_reduce(0, groups, log_p.detach(), "amax")[sequence]
    correct = ((log_p == best) | (is_answer == 0)).all(-1) & (row_weight > 0)
    counted = (row_weight > 0).to(loss.dtype)
    # a right start counts half, a right end the other half
    sums = (row_weight * loss, row_weight, counted, row_weight * correct)
    return LossSums(*(sum_by_task(values, task, num_tasks) for values in sums))
