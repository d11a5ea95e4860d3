"""How far a run has come: what it counts, and writes to metrics.jsonl."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trunkline.engine.network.packing import PackedBatch
from trunkline.training.distributed.ranks import Ranks


@dataclass
class Progress:
    """How far a run has come; saved with every checkpoint."""

    step: int = 0
    seconds: float = 0.0  # spent on steps
    wall_seconds: float = 0.0  # spent on everything
    compile_seconds: float = 0.0  # of these, on compiling the model
    tokens: int = 0
    real_tokens: int = 0
    flops: float = 0.0  # of training
    examples: dict[str, int] = field(default_factory=dict)
    first_loss: dict[str, float] = field(default_factory=dict)  # on the validation split, before the first step
    best_score: float = -math.inf
    best_step: int = 0
    left_out: int = 0  # steps whose loss or gradient was not finite
    left_out_in_a_row: int = 0
    uncompiled: int = 0  # batches that did not fit the compiled graph and went without it
    part_tokens: int = 0  # most tokens that memory has room for at a time; 0: a batch

    def add(self, interval: "Interval") -> None:
        self.tokens += interval.tokens
        self.real_tokens += interval.real_tokens
        self.flops += interval.flops
        for name, count in interval.examples.items():
            self.examples[name] = self.examples.get(name, 0) + count


class Interval:
    """What happened since the last line of metrics.jsonl."""

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names = names
        self.seconds = 0.0
        self.tokens = self.real_tokens = 0
        self.flops = 0.0
        self.examples = dict.fromkeys(names, 0)
        self.loss, self.weight = torch.zeros(2, len(names), device=device)

    def add(self, batches: Sequence[PackedBatch], loss: Tensor, weight: Tensor) -> None:
        """Counts a step: its batches, and the loss sums and row weights of every task, (N,)."""
        for batch in batches:
            self.tokens += len(batch.tokens)
            self.real_tokens += batch.real_tokens
            for name, count in zip(self.names, batch.examples, strict=True):
                self.examples[name] += count
        finite = loss.isfinite()
        self.loss += torch.where(finite, loss.detach(), 0.0)
        self.weight += torch.where(finite, weight, 0.0)

    def sum_over(self, ranks: Ranks, uncompiled: int) -> int:
        """Counts what all ranks did; the losses are of all of them already.

        `uncompiled`: batches of this rank that went without the graph; those of all come back.
        """
        counts = [self.tokens, self.real_tokens, self.flops, uncompiled, *self.examples.values()]
        tokens, real_tokens, self.flops, uncompiled, *examples = ranks.sum(torch.tensor(counts).double()).tolist()
        self.tokens, self.real_tokens = int(tokens), int(real_tokens)
        self.examples = {name: int(number) for name, number in zip(self.names, examples, strict=True)}
        return int(uncompiled)

    def losses(self) -> dict[str, float]:
        """Mean loss of every task that was seen, over the steps in which it was finite."""
        sums = zip(self.names, self.loss.tolist(), self.weight.tolist(), strict=True)
        return {name: loss / weight for name, loss, weight in sums if weight > 0}

    @property
    def tokens_per_second(self) -> float:
        return self.real_tokens / self.seconds

    @property
    def padding_waste(self) -> float:
        return 1.0 - self.real_tokens / self.tokens


class Log:
    """metrics.jsonl; a context manager."""

    def __init__(
        self,
        run: Path,
        step: int,
        tell: Callable[[str], None] = print,
        heard: Callable[[int, Mapping[str, Any]], None] = lambda step, values: None,
    ):
        """Lines after `step`, where a run is resumed, are forgotten; at step 0 all are. So are damaged ones.

        `heard` is told every line.
        """
        path, kept = run / "metrics.jsonl", run / ".metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if step and path.exists() else []  # whole lines
        steps = [_step_of(line) for line in lines]
        kept.write_bytes(
            b"".join(line + b"\n" for line, at in zip(lines, steps, strict=True) if at is not None and at <= step)
        )
        kept.replace(path)  # so that a kill costs no line
        if damaged := [number for number, at in enumerate(steps, start=1) if at is None]:
            tell(f"{path}: damaged lines are left out: {', '.join(map(str, damaged[:9]))}{' ...' * (len(damaged) > 9)}")
        self.file = path.open("a", encoding="utf-8")
        self.heard = heard

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, *, step: int, **values: Any) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        self.heard(step, values)


class NoLog:
    """In its place on the ranks that write nothing."""

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, *, step: int, **values: Any) -> None:
        pass


def _step_of(line: bytes) -> int | None:
    """The step that a line of metrics.jsonl is about; None for a damaged one."""
    try:
        match json.loads(line):
            case {"step": int(step), "event": str()}:
                return step
    except ValueError:  # also where it is not UTF-8
        pass
    return None
