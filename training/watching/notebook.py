"""A run's table in a notebook: HTML that changes in place, with a curve of every loss and score."""

import time
from collections.abc import Mapping, Sequence
from html import escape
from math import isfinite

from trunkline.training.watching.display import Display, in_digits

SECONDS = 0.5  # between two pictures
WIDTH, HEIGHT = 120, 22  # of a curve, in pixels


class NotebookDisplay(Display):
    """An output cell's table; lines stand below it."""

    def __init__(self, tasks: Mapping[str, str], steps: int, first: int):
        super().__init__(tasks, steps, first)
        self.losses: dict[str, list[float]] = {name: [] for name in tasks}
        self.scored: dict[str, list[float]] = {name: [] for name in tasks}
        self.began, self.first, self.shown = time.monotonic(), first, 0.0

    def __enter__(self) -> "Display":
        from IPython.display import HTML, display

        self.html = HTML
        self.handle = display(HTML(self.page()), display_id=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._show()

    def tell(self, text: str) -> None:
        print(text)

    def show_step(self) -> None:
        for name, value in self.loss.items():
            self.losses[name].append(value)
        if time.monotonic() - self.shown > SECONDS:
            self._show()

    def show_scores(self) -> None:
        for name, value in self.scores.items():
            self.scored[name].append(value)
        self._show()

    def _show(self) -> None:
        self.shown = time.monotonic()
        self.handle.update(self.html(self.page()))

    def page(self) -> str:
        """The table as HTML."""
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{in_digits(self.loss.get(name))}</td><td>{sparkline(self.losses[name])}</td>"
            f"<td>{escape(metric)}</td><td>{in_digits(self.scores.get(name))}</td><td>{sparkline(self.scored[name])}</td></tr>"
            for name, metric in self.tasks.items()
        )
        titles = "".join(f"<th>{title}</th>" for title in ("task", "loss", "", "metric", "score", ""))
        return (
            f"<div>step {self.now:,} of {self.steps:,} <progress max={self.steps} value={self.now}></progress> "
            f"{self.speed:,.0f} tokens/s{self._left()}</div>"
            f"<table><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table>"
        )

    def _left(self) -> str:
        """How long it will go on, in words."""
        done = self.now - self.first
        if done <= 0 or self.now >= self.steps:
            return ""
        left = (time.monotonic() - self.began) / done * (self.steps - self.now)
        return f", {left / 60:.0f} minutes left" if left >= 90 else f", {left:.0f} seconds left"


def sparkline(values: Sequence[float]) -> str:
    """A small curve as SVG; nothing for fewer than two finite values."""
    values = [value for value in values if isfinite(value)]
    if len(values) < 2:
        return ""
    values = values[:: max(1, len(values) // WIDTH)]
    low, high = min(values), max(values)
    step, scale = (WIDTH - 2) / (len(values) - 1), (HEIGHT - 4) / ((high - low) or 1)
    points = " ".join(f"{1 + i * step:.1f},{HEIGHT - 2 - (value - low) * scale:.1f}" for i, value in enumerate(values))
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="from {values[0]:.3g} to {values[-1]:.3g}">'
        f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/></svg>'
    )
