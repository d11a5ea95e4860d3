"""AdamW and its learning rate."""

import math

import torch
from torch import nn

from trunkline.engine.settings import Optimizer


def make_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """AdamW; only matrices are decayed."""
    is_matrix = {p: p.ndim > 1 and not name.endswith("bias") for name, p in model.named_parameters()}
    matrices = [p for p in model.parameters() if is_matrix[p]]
    others = [p for p in model.parameters() if not is_matrix[p]]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, settings.learning_rate, (settings.beta1, settings.beta2), fused=True)


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine that would reach 0 at the step after the last."""
    warmup = max(1, round(settings.warmup * steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return settings.learning_rate * (0.5 + 0.5 * math.cos(math.pi * progress))
