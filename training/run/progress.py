"""How far a run has come: what it counts, writes to metrics.jsonl and shows."""

import importlib.util
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text
from torch import Tensor

from trunkline.engine.network.packing import PackedBatch

QUIET_SECONDS = 15.0  # between lines where the output is no terminal


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
    """metrics.jsonl, and TensorBoard where it is installed; a context manager."""

    def __init__(self, run: Path, step: int, tell: Callable[[str], None] = print):
        """Lines after `step`, where a run is resumed, are forgotten; at step 0 all are. So are damaged ones."""
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
        self.board = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(run / "tensorboard")

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        if self.board:
            self.board.close()

    def write(self, *, step: int, **values: Any) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.board:
            for name, value in _flat(values):
                self.board.add_scalar(f"{values['event']}/{name}", value, step)


def _step_of(line: bytes) -> int | None:
    """The step that a line of metrics.jsonl is about; None for a damaged one."""
    try:
        match json.loads(line):
            case {"step": int(step), "event": str()}:
                return step
    except ValueError:  # also where it is not UTF-8
        pass
    return None


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    flat = []
    for name, value in values.items():
        if isinstance(value, dict):
            flat += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            flat.append((prefix + name, float(value)))
    return flat


class Display:
    """A live table in a terminal, now and then a line elsewhere; a context manager."""

    def __init__(self, tasks: Mapping[str, str], steps: int, first: int):
        """`tasks`: names, each with the metric that is shown."""
        self.tasks, self.steps = tasks, steps
        self.console = Console()
        self.loss: dict[str, float] = {}
        self.scores: dict[str, float] = {}
        self.bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )
        self.work = self.bar.add_task("train", total=steps, completed=first, speed="")
        self.live = Live(self._table(), console=self.console, refresh_per_second=2, transient=False)
        self.spoke = time.monotonic()

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def tell(self, text: str) -> None:
        """A line as it is: brackets and colons in a user's text are no markup, and what cannot be shown is escaped."""
        encoding = self.console.encoding
        shown = text.encode(encoding, "backslashreplace").decode(encoding)
        self.console.print(Text(shown), highlight=False, soft_wrap=True)

    def step(self, step: int, loss: Mapping[str, float], tokens_per_second: float) -> None:
        self.loss |= loss
        self.bar.update(self.work, completed=step, speed=f"{tokens_per_second:,.0f} tokens/s")
        if self.console.is_terminal:
            self.live.update(self._table())
        elif time.monotonic() - self.spoke > QUIET_SECONDS or step == self.steps:
            self.spoke = time.monotonic()
            losses = "  ".join(f"{name} {value:.3f}" for name, value in self.loss.items())
            self.tell(f"step {step}/{self.steps}  {tokens_per_second:,.0f} tokens/s  loss: {losses}")

    def evaluation(self, step: int, metrics: Mapping[str, Mapping[str, float]]) -> None:
        self.scores |= {
            name: scores[self.tasks[name]] for name, scores in metrics.items() if self.tasks[name] in scores
        }
        if self.console.is_terminal:
            self.live.update(self._table())
        else:
            scores = "  ".join(f"{name} {self.tasks[name]} {value:.3f}" for name, value in self.scores.items())
            self.tell(f"step {step}/{self.steps}  {scores}")

    def _table(self) -> Group:
        table = Table("task", "loss", "metric", "score", box=None, header_style="dim")
        for name, metric in self.tasks.items():
            loss, score = self.loss.get(name), self.scores.get(name)
            table.add_row(
                name,
                "" if loss is None else f"{loss:.3f}",
                metric,
                "" if score is None else f"{score:.3f}",
            )
        return Group(table, self.bar)
