"""What a run shows while it goes on: a live table in a terminal or a notebook, now and then a line elsewhere."""

import sys
import time
from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from trunkline.engine.console import harmless

QUIET_SECONDS = 15.0  # between lines where the output is no terminal


class Display:
    """Lines; a context manager.

    Args:
        tasks: names, each with the metric that is shown.
        first: the step that the run begins after.
    """

    def __init__(self, tasks: Mapping[str, str], steps: int, first: int):
        self.tasks, self.steps, self.now = tasks, steps, first
        self.console = Console()
        self.loss: dict[str, float] = {}
        self.scores: dict[str, float] = {}
        self.speed = 0.0
        self.spoke = time.monotonic()

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def tell(self, text: str) -> None:
        """A line as it is: brackets and colons in a user's text are no markup, and what a terminal obeys or
        cannot show is escaped."""
        encoding = self.console.encoding
        shown = harmless(text).encode(encoding, "backslashreplace").decode(encoding)
        self.console.print(Text(shown), highlight=False, soft_wrap=True)

    def step(self, step: int, loss: Mapping[str, float], tokens_per_second: float) -> None:
        self.now, self.speed = step, tokens_per_second
        self.loss |= loss
        self.show_step()

    def evaluation(self, step: int, metrics: Mapping[str, Mapping[str, float]]) -> None:
        self.now = step
        self.scores |= {
            name: scores[self.tasks[name]] for name, scores in metrics.items() if self.tasks[name] in scores
        }
        self.show_scores()

    def show_step(self) -> None:
        if time.monotonic() - self.spoke > QUIET_SECONDS or self.now == self.steps:
            self.spoke = time.monotonic()
            losses = "  ".join(f"{name} {value:.3f}" for name, value in self.loss.items())
            self.tell(f"step {self.now}/{self.steps}  {self.speed:,.0f} tokens/s  loss: {losses}")

    def show_scores(self) -> None:
        scores = "  ".join(f"{name} {self.tasks[name]} {value:.3f}" for name, value in self.scores.items())
        self.tell(f"step {self.now}/{self.steps}  {scores}")


class TerminalDisplay(Display):
    """A table that changes in place."""

    def __init__(self, tasks: Mapping[str, str], steps: int, first: int):
        super().__init__(tasks, steps, first)
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )
        self.work = self.bar.add_task("train", total=steps, completed=first, speed="")
        self.live = Live(self._table(), console=self.console, refresh_per_second=2, transient=False)

    def __enter__(self) -> "Display":
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def show_step(self) -> None:
        self.bar.update(self.work, completed=self.now, speed=f"{self.speed:,.0f} tokens/s")
        self.live.update(self._table())

    def show_scores(self) -> None:
        self.live.update(self._table())

    def _table(self) -> Group:
        table = Table("task", "loss", "metric", "score", box=None, header_style="dim")
        for name, metric in self.tasks.items():
            table.add_row(name, in_digits(self.loss.get(name)), metric, in_digits(self.scores.get(name)))
        return Group(table, self.bar)


def in_digits(value: float | None) -> str:
    """A loss or a score; empty: there is none yet."""
    return "" if value is None else f"{value:.3f}"


def make_display(tasks: Mapping[str, str], steps: int, first: int) -> Display:
    """The one that fits where this runs; arguments as of `Display`."""
    if in_notebook():
        from trunkline.training.watching.notebook import NotebookDisplay

        return NotebookDisplay(tasks, steps, first)
    kind = TerminalDisplay if Console().is_terminal else Display
    return kind(tasks, steps, first)


def in_notebook() -> bool:
    """Whether output goes to a notebook, which shows HTML."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")
