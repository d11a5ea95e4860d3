"""Where the time of a step goes: a trace for chrome://tracing or Perfetto, and a table.

A few steps are recorded once everything is warm. The parts of a step are timed where their work is done: by the clock
on a CPU, by events in the stream on a GPU, so that nobody waits in between.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import record_function

WARM_UP, RECORDED = 5, 3  # steps
OPERATIONS = 20  # rows of the table


def moment(device: torch.device) -> Any:
    """Now: by the clock, or on a GPU the event of everything before being done."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first: Any, second: Any) -> float:
    """Seconds from one moment to the other; on a GPU once both have come."""
    return second - first if isinstance(first, float) else first.elapsed_time(second) / 1000


class Profile:
    """Writes RUN/profile/trace.json and RUN/profile/table.txt; a context around a run's steps.

    Args:
        on: False: nothing is recorded, at no cost.
        run: the run's folder.
        device: where the steps run.
        tell: is told the table.
    """

    def __init__(self, on: bool, run: Path, device: torch.device, tell: Callable[[str], None]):
        self.on, self.folder, self.device, self.tell = on, run / "profile", device, tell
        self.steps = 0
        self.recorder: Any = None  # torch.profiler.profile, while it records
        self.parts: list[tuple[str, Any, Any]] = []  # name, begin and end
        self.began = 0.0

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self.recorder:  # the run ended in between
            self.recorder.stop()
            self.recorder = None

    def part(self, name: str) -> AbstractContextManager:
        """A context around a part of a step."""
        return self._timed(name) if self.recorder else nullcontext()

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begin = moment(self.device)
        with record_function(name):
            yield
        self.parts.append((name, begin, moment(self.device)))

    def step(self) -> None:
        """Is called after every step."""
        self.steps += self.on
        if self.on and self.steps == WARM_UP:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.recorder = torch.profiler.profile(activities=activities, acc_events=True)
            self.recorder.start()
            self.began = time.perf_counter()
        elif self.recorder and self.steps == WARM_UP + RECORDED:
            self._write()
            self.on = False

    def _write(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - self.began
        recorder, self.recorder = self.recorder, None
        recorder.stop()
        self.folder.mkdir(exist_ok=True)
        recorder.export_chrome_trace(str(self.folder / "trace.json"))
        order = f"self_{self.device.type}_time_total"
        operations = recorder.key_averages().table(sort_by=order, row_limit=OPERATIONS, max_name_column_width=48)
        parts = self._table(seconds)
        (self.folder / "table.txt").write_text(f"{parts}\n{operations}", encoding="utf-8")
        self.tell(f"{parts}\noperations: {self.folder / 'table.txt'}; trace: {self.folder / 'trace.json'}")

    def _table(self, seconds: float) -> str:
        """Milliseconds of a step in each of its parts, and the rest: logging, evaluation, waiting."""
        totals: dict[str, float] = {}
        for name, begin, end in self.parts:
            totals[name] = totals.get(name, 0.0) + between(begin, end)
        totals["rest"] = seconds - sum(totals.values())
        lines = [f"{name:12}{1e3 * took / RECORDED:10.2f} ms{took / seconds:8.1%}" for name, took in totals.items()]
        return "\n".join([f"of a step's {1e3 * seconds / RECORDED:.2f} ms, mean of {RECORDED} steps:", *lines])
