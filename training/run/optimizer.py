"""AdamW: which parameter learns at which rate, which not at all, and how the rate goes over a run."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from trunkline.engine.network.bilstm import BiLSTM, Model
from trunkline.engine.network.trunk import Trunk
from trunkline.engine.settings import Optimizer
from trunkline.training.distributed.sharding import local
from trunkline.training.pages.units import quantity

FROM_SCRATCH, FROM_CHECKPOINT = 1e-3, 1e-4  # the rates of learning_rate: auto
HEADS = 1e-3  # of heads on a trunk that was trained by others
ADAPTERS = 1e-3  # of adapters, which start from nothing: about ten times the rate of what they are on
ERASES = 3e-4  # a rate from which a checkpoint is soon forgotten
EMBEDDINGS = ("tokens", "positions", "token_types", "match", "embedding_norm")  # of the trunk, before its blocks


def make_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """AdamW over the parameters that learn, in groups of one rate; only matrices are decayed.

    Every group has its highest rate as 'rate'; `share_of_rate` says how much of it a step takes.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim > 1 and not name.endswith("bias")
            key = _rate(name, model, settings), settings.weight_decay if is_matrix else 0.0
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise ValueError("optimizer: freeze leaves nothing to learn")
    return torch.optim.AdamW(
        [{"params": members, "lr": r, "rate": r, "weight_decay": decay} for (r, decay), members in groups.items()],
        betas=(settings.beta1, settings.beta2),
        fused=True,
    )


def rates(model: nn.Module, settings: Optimizer) -> tuple[float, float]:
    """The highest rates of the trunk's last block and of the heads."""
    foreign = is_foreign(model)
    rate = settings.learning_rate
    trunk = (FROM_CHECKPOINT if foreign else FROM_SCRATCH) if isinstance(rate, str) else rate
    heads = settings.head_learning_rate
    return trunk, (max(HEADS, trunk) if foreign else trunk) if heads is None else heads


def is_foreign(model: nn.Module) -> bool:
    """Whether the trunk comes from a checkpoint of others."""
    trunk = getattr(model, "trunk", None)
    return isinstance(trunk, Trunk) and trunk.origin is not None


def _rate(name: str, model: nn.Module, settings: Optimizer) -> float:
    """The highest rate of a parameter."""
    (rate, of_heads), trunk = rates(model, settings), getattr(model, "trunk", None)
    if not isinstance(trunk, Trunk):
        return rate
    _, *path = name.split(".")
    if name.startswith("adapters."):
        return ADAPTERS if settings.learning_rate == "auto" else rate
    if not name.startswith("trunk."):
        return of_heads
    if path[0] == "blocks":
        return rate * settings.layer_decay ** (len(trunk.blocks) - 1 - int(path[1]))
    return rate * settings.layer_decay ** len(trunk.blocks) if path[0] in EMBEDDINGS else rate


def share_of_rate(settings: Optimizer, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine that would reach 0 at the step after the last."""
    warmup = max(1, round(settings.warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 + 0.5 * math.cos(math.pi * progress)


def freeze(model: Model, parts: Sequence[str], dtype: torch.dtype | None = None) -> None:
    """Parts of the trunk get no gradient, and so no optimizer state; everything else does.

    Args:
        parts: as `Optimizer.freeze`.
        dtype: of what is frozen; None: as it is.

    Raises:
        ValueError: a part that the trunk does not have; names those it has.
    """
    model.requires_grad_(True)
    if isinstance(model, BiLSTM):
        if parts:
            raise ValueError("optimizer.freeze is for a trunk; architecture bilstm has none")
        return
    tasks = [task.name for task in model.tasks]  # of which `untouched` knows
    frozen = [*_members(model.trunk, [part for part in parts if part not in tasks])]
    if model.adapters is not None:
        frozen += [parameter for _, parameter in model.frozen_by_adapters()]
    for parameter in frozen:
        parameter.requires_grad_(False)
        if dtype is not None and parameter.ndim > 1:
            parameter.data = parameter.data.to(dtype)


def _members(trunk: Trunk, parts: Sequence[str]) -> Iterator[nn.Parameter]:
    """The parameters of the parts of a trunk."""
    for part in parts:
        prefixes = _prefixes(part, len(trunk.blocks))
        found = [p for name, p in trunk.named_parameters() if any(f"{name}.".startswith(f"{q}.") for q in prefixes)]
        if not found and part != "trunk":
            names = ["trunk", "embeddings", f"blocks.0-{len(trunk.blocks) - 1}", *dict(trunk.named_children())]
            raise ValueError(f"optimizer.freeze: the trunk has no '{part}'; there are {', '.join(names)}")
        yield from trunk.parameters() if part == "trunk" else found


def _prefixes(part: str, blocks: int) -> Iterable[str]:
    if part == "embeddings":
        return EMBEDDINGS
    if span := re.fullmatch(r"blocks\.(\d+)-(\d+)", part):
        first, last = map(int, span.groups())
        if not first <= last < blocks:
            raise ValueError(f"optimizer.freeze: '{part}': the blocks are 0 to {blocks - 1}")
        return [f"blocks.{number}" for number in range(first, last + 1)]
    return [part]


@contextmanager
def untouched(
    optimizer: torch.optim.AdamW, model: Model, examples: Sequence[int], frozen: Sequence[str] = ()
) -> Iterator[None]:
    """Around a step: what must not change in it stays as it is to the bit.

    These are adapters of tasks without examples, and what AdamW keeps of them: their gradients are 0, but the moments
    of earlier ones and the weight decay would go on moving them. And the heads and adapters of frozen tasks.

    Args:
        examples: of each task in the step, (N,).
        frozen: parts, as `Optimizer.freeze`; names of tasks among them.
    """
    held: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # a tensor, rows of it, what is in them
    if not isinstance(model, BiLSTM):
        rests = torch.tensor([task.name in frozen for task in model.tasks], device=model.device)
        if any(task.name in frozen for task in model.tasks):
            heads = [(parameter.detach(), rests[task].nonzero()[:, 0]) for parameter, task in model.task_parameters()]
            held += [(parameter, rows, parameter[rows]) for parameter, rows in heads if len(rows)]
        adapters = model.adapters
        if adapters is not None:
            learning = [0 if task.name in frozen else n for task, n in zip(model.tasks, examples, strict=True)]
            rows = torch.tensor(adapters.absent(learning), dtype=torch.int64, device=model.device)
            for parameter in adapters.parameters() if len(rows) else ():
                state = optimizer.state.get(parameter, {})
                moments = [local(state[key]) for key in ("exp_avg", "exp_avg_sq") if key in state]
                held += [(tensor, rows, tensor[rows]) for tensor in (local(parameter.detach()), *moments)]
    yield
    for tensor, rows, values in held:
        tensor[rows] = values


def in_words(model: Model, optimizer: torch.optim.AdamW, settings: Optimizer) -> list[str]:
    """What learns at which rate, what does not, and what speaks against it: a line each."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    learning: dict[float, dict[str, int]] = {}
    for group in optimizer.param_groups:
        parts = learning.setdefault(group["rate"], {})
        for parameter in group["params"]:
            room = names[parameter].partition(".")[0]
            part = room if room in ("trunk", "adapters") else "heads"
            parts[part] = parts.get(part, 0) + parameter.numel()
    lines = [
        f"learns at {rate:.1e}: " + ", ".join(f"{part} ({quantity(count)} parameters)" for part, count in parts.items())
        for rate, parts in sorted(learning.items())
    ]
    frozen = sum(parameter.numel() for parameter in names if not parameter.requires_grad)
    if frozen:
        lines.append(f"frozen: {quantity(frozen)} parameters of the trunk")
    rate = rates(model, settings)[0]
    if is_foreign(model) and rate >= ERASES and any(p.requires_grad and names[p].startswith("trunk.") for p in names):
        lines.append(
            f"optimizer.learning_rate {rate:.1e} soon erases what the checkpoint has learnt; "
            f"{FROM_CHECKPOINT:.0e} is usual (learning_rate: auto)"
        )
    return lines
