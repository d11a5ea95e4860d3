"""The ops that a config's training step calls, at the sizes of its own batches.

T tokens, R labelled rows, N tasks
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from trunkline.engine.network.adapters import AdaptedLayer
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.network.packing import PackedBatch
from trunkline.training.self_test import OPS, Check, Op
from trunkline.training.tuning.contest import Work


def workloads(model: MultiTaskModel, batch: PackedBatch, balances: bool, dtype: torch.dtype) -> Iterator[Work]:
    """One after the other: arguments and right results of a work take memory.

    Args:
        model: whose ops.
        batch: of training, as a step gets it.
        balances: whether tasks are weighed by their gradients.
        dtype: of the products.
    """
    device, by_name = model.device, {op.name: op for op in OPS}
    for name, sizes in sizes_of(model, batch, balances).items():
        yield work(by_name[name], sizes, device, dtype)


def sizes_of(model: MultiTaskModel, batch: PackedBatch, balances: bool) -> dict[str, dict[str, Any]]:
    """Of every op's `example`, by the op's name in `OPS`."""
    trunk, counts = model.trunk.config, batch.rows.counts
    small, spans, vocabulary = model.groups
    width, T, R = trunk.hidden_size, len(batch.tokens), len(batch.rows.token)
    lengths = batch.plan.cu_seqlens.diff().tolist()
    heads = {"heads": trunk.num_heads, "kv_heads": trunk.kv_heads, "head_dim": trunk.head_width}
    found: dict[str, dict[str, Any]] = {"attention": {"lengths": lengths, **heads, "causal": trunk.causal}}
    if model.activation and R:
        found["task_projection"] = {"rows": R, "tasks": len(counts), "width": width, "columns": width}
    if small and (rows := sum(counts[:small])):
        found["task_loss"] = {"rows": rows, "tasks": small, "width": width, "classes": model.width}
    if vocabulary and (rows := sum(counts[small + spans :])):
        entries = len(model.vocabulary_weight)
        found["linear_cross_entropy"] = {"rows": rows, "width": width, "vocabulary": entries, "tasks": vocabulary}
    if balances:
        found["task_gradients"] = {"tokens": T, "tasks": len(counts), "width_in": width, "width_out": 3 * width}
    if model.adapters is not None:
        layer = next(iter(model.adapters.layers.values()))
        assert isinstance(layer, AdaptedLayer)
        adapters, width_in, _ = layer.down.shape
        columns = layer.parts[0].end - layer.parts[0].first
        of_layer = {"columns": columns, "rank": layer.rank, "num_parts": len(layer.parts)}
        found["low_rank"] = {"rows": T, "tasks": adapters, "width": width_in, **of_layer}
    return found


def work(op: Op, sizes: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Work:
    """An op forward and, where there are gradients, backward; its definition is computed once, at the first look."""
    arguments = op.example(device, dtype, **sizes)
    checks: list[Check] = []

    def problem() -> str:
        if not checks:
            checks.append(Check(op, arguments, dtype))
        return checks[0].outcome().problem

    given = {name: x.detach() if isinstance(x, Tensor) else x for name, x in arguments.items()}
    leaves = [given[name].requires_grad_() for name in op.inputs if given[name] is not None]

    def call() -> Any:
        output = op.function(**given)
        return torch.autograd.grad(output, leaves, torch.ones_like(output)) if leaves else output

    return Work(op.name, call, problem)
