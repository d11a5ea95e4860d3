"""report.html of a run: one self-contained page with scores, curves, samples and configuration.

Everything is read from the run's folder, so a report can be written while the run goes on and after it crashed. The
charts are inline SVG; the page loads nothing and needs no script.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from io import StringIO
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from trunkline.training.metrics import higher_is_better

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SAMPLES = 6
"""Samples shown per task."""

_BLUE, _PALE_BLUE, _ORANGE, _GREY, _GREEN = "#2563a8", "#b4cbe4", "#d97706", "#7c8696", "#15803d"
_PALETTE = (
    "#2563a8", "#e08a2e", "#3b9a6d", "#c2504d", "#7d63b8", "#8c6d57",
    "#d67fb0", "#5fb0c9", "#b3a642", "#4a5a8a", "#93b84f", "#c3c8d0",
)  # fmt: skip
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "trunkline",  # ids, and so the page, depend on the content alone
    "font.family": "DejaVu Sans",  # matplotlib's own: the sizes are the same everywhere
    "font.size": 8,
    "text.color": "#4b5563",
    "axes.edgecolor": "#c9ced6",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceff3",
    "grid.linewidth": 0.6,
    "xtick.color": "#c9ced6",
    "ytick.color": "#c9ced6",
    "xtick.labelcolor": "#6b7280",
    "ytick.labelcolor": "#6b7280",
    "xtick.major.size": 2.5,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class _Run:
    """What the files of a run's folder say."""

    name: str
    config: str
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summary: dict[str, Any] | None
    """None while the run is unfinished."""
    samples: dict[str, list[dict[str, Any]]]
    tasks: dict[str, dict[str, Any]]
    """As in summary.json; as far as metrics.jsonl tells while the run is unfinished."""


def write_report(run: Path) -> Path:
    """Write `run`/report.html from config.yaml, metrics.jsonl, summary.json and samples.json and return its path.

    The same files give the same page, byte for byte. Without summary.json the page says that the run is unfinished.

    Raises:
        ValueError: the folder holds no metrics.jsonl, or a line of it is not JSON.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from matplotlib import rc_context

    content = _read(run)
    rows = [_row(content, task) for task in content.tasks]
    columns = _columns(len(rows))
    with rc_context(_STYLE):
        charts = {
            "losses": {row["task"]: _loss_chart(content, row, columns) for row in rows},
            "scores": {row["task"]: _score_chart(row, columns) for row in rows if row["scores"]},
            "mix": _mix_chart(content) if content.steps else None,
            "throughput": _efficiency_charts(content) if content.steps else None,
        }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "quantity": _quantity, "duration": _duration, "plain": _plain}
    page = environment.get_template("report.html.jinja").render(
        run=content,
        rows=rows,
        columns=columns,
        verdict=_verdict(content, rows),
        figures=_key_figures(content),
        better=higher_is_better,
        samples={task: samples[:SAMPLES] for task, samples in content.samples.items()},
        **charts,
    )
    path = run / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _read(run: Path) -> _Run:
    log = run / "metrics.jsonl"
    if not log.is_file():
        raise ValueError(f"report: {run} is not the folder of a run: it holds no metrics.jsonl")
    events: dict[str, dict[int, dict[str, Any]]] = {"step": {}, "evaluation": {}}
    lines = log.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last line break is still being written
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"report: {log}, line {number}: expected a JSON object, got {line[:60]!r}") from error
        events[event["event"]][event["step"]] = event  # a resumed run repeats steps: the last one counts
    steps, evaluations = ([event for _, event in sorted(events[kind].items())] for kind in ("step", "evaluation"))

    def optional(name: str, missing: Any) -> Any:
        path = run / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else missing

    summary = optional("summary.json", None)
    return _Run(
        name=summary["name"] if summary else run.resolve().name,
        config=(run / "config.yaml").read_text(encoding="utf-8"),
        steps=steps,
        evaluations=evaluations,
        summary=summary,
        samples=optional("samples.json", {}),
        tasks=summary["tasks"] if summary else _tasks_so_far(steps, evaluations),
    )


def _tasks_so_far(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The tasks of an unfinished run in the form of summary.json."""
    names = dict.fromkeys(name for event in steps for name in event["examples"])
    names |= dict.fromkeys(name for event in evaluations for name in event["metrics"])
    tasks = {}
    for name in names:
        losses = [event["loss"][name] for event in steps if name in event["loss"]]
        metrics = [event["metrics"][name] for event in evaluations if name in event["metrics"]]
        tasks[name] = {
            "head": None,
            "metric": next((metric for metric in (metrics[-1] if metrics else {}) if metric != "loss"), None),
            "metrics": metrics[-1] if metrics else {},
            "baseline": None,
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "train_examples": None,
            "examples_seen": sum(event["examples"].get(name, 0) for event in steps),
            "dropped": None,
            "truncated": None,
        }
    return tasks


def _row(run: _Run, task: str) -> dict[str, Any]:
    """What the table and the charts say of one task: its entry in summary.json and the scores over time."""
    about = run.tasks[task]
    metric = about["metric"]
    evaluations = [(event["step"], event["metrics"][task]) for event in run.evaluations if task in event["metrics"]]
    scores = [(step, metrics[metric]) for step, metrics in evaluations if metric in metrics]
    last = about["metrics"].get(metric)
    baseline = about["baseline"] and about["baseline"]["metrics"].get(metric)
    higher = metric is not None and higher_is_better(metric)
    finite = [point for point in scores if math.isfinite(point[1])]
    above = None
    if last is not None and baseline is not None:
        above = last > baseline if higher else last < baseline
    return about | {
        "task": task,
        "scores": scores,
        "losses": [(step, metrics["loss"]) for step, metrics in evaluations if "loss" in metrics],
        "best": (max if higher else min)(finite, key=lambda point: point[1], default=None),
        "last_score": last,
        "baseline_score": baseline,
        "above": above,
    }


def _verdict(run: _Run, rows: list[dict[str, Any]]) -> str:
    if run.summary is None:
        last = max((event["step"] for event in run.steps + run.evaluations), default=0)
        return f"Unfinished run: there is no summary.json yet; this is the state at step {last:,}."
    compared = [row for row in rows if row["above"] is not None]
    if not compared:
        return "No task has both a score and a trivial baseline to compare it with."
    above = sum(row["above"] for row in compared)
    rest = len(rows) - len(compared)
    note = f" ({rest} more without a baseline)" if rest else ""
    return f"{above} of {len(compared)} {'task' if len(compared) == 1 else 'tasks'} above the trivial baseline{note}."


def _key_figures(run: _Run) -> list[tuple[str, str]]:
    if run.summary is None:
        last = run.steps[-1] if run.steps else {"step": 0, "real_tokens": 0, "seconds": 0.0}
        return [
            ("steps", f"{last['step']:,}"),
            ("tokens", _quantity(last["real_tokens"])),
            ("training time", _duration(last["seconds"])),
        ]
    summary = run.summary
    return [
        ("steps", f"{summary['steps']:,}"),
        ("tokens", _quantity(summary["real_tokens"])),
        ("wall time", _duration(summary["wall_time_seconds"])),
        ("tokens a second", f"{summary['tokens_per_second']:,.0f}"),
        ("padding waste", f"{summary['padding_waste']:.1%}"),
        ("parameters", _quantity(summary["parameters"])),
        ("peak memory", _quantity(summary["peak_memory_bytes"], "B")),
        ("device", summary["device"]),
    ]


def _columns(tasks: int) -> int:
    """Panels in a row of small multiples: at most four, without leaving a lone panel in the last row."""
    return 3 if tasks in (3, 5, 6, 9) else max(1, min(tasks, 4))


def _panel(columns: int) -> tuple["Figure", "Axes"]:
    """A chart that fills one of `columns` columns of the page, with a horizontal axis of steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    rounded = [1, 2, 2.5, 5, 10]
    width, height = 11.0 / columns - 0.3, 1.2 + 1.6 / columns  # inches
    figure = Figure(figsize=(width, height))
    left, right, bottom, top = 0.44, 0.18, 0.26, 0.08
    axes = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))
    axes.patch.set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(4 if columns > 2 else 8, integer=True, steps=rounded))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=rounded))
    return figure, axes


def _loss_chart(run: _Run, row: dict[str, Any], columns: int) -> "Markup":
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    task = row["task"]
    points = [(event["step"], event["loss"][task]) for event in run.steps if task in event["loss"]]
    figure, axes = _panel(columns)
    _curve(axes, points)
    axes.plot(*_coordinates(row["losses"]), color=_ORANGE, linewidth=1, marker="o", markersize=2.2)
    finite = [loss for _, loss in points + row["losses"] if math.isfinite(loss)]
    if finite and min(finite) > 0 and max(finite) > 10 * min(finite):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(finite) < 100 * min(finite) else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    return _svg(figure, f"loss-{task}", f"Loss of {task} against the step")


def _score_chart(row: dict[str, Any], columns: int) -> "Markup":
    figure, axes = _panel(columns)
    if row["baseline_score"] is not None:
        axes.axhline(row["baseline_score"], color=_GREY, linewidth=1, linestyle=(0, (4, 3)))
    markers = "o" if len(row["scores"]) <= 30 else None
    axes.plot(*_coordinates(row["scores"]), color=_BLUE, linewidth=1.4, marker=markers, markersize=2.6)
    if row["best"]:
        axes.plot(*row["best"], marker="o", markersize=6, markerfacecolor="none", markeredgecolor=_GREEN)
    axes.margins(y=0.12)
    return _svg(figure, f"score-{row['task']}", f"{row['metric']} of {row['task']} against the step")


def _mix_chart(run: _Run) -> dict[str, Any]:
    """Shares of the examples over time, each over several logged intervals, and the legend with the overall shares."""
    from matplotlib.ticker import PercentFormatter

    totals = {task: sum(event["examples"].get(task, 0) for event in run.steps) for task in run.tasks}
    named = sorted(totals, key=lambda task: -totals[task])
    if len(named) > len(_PALETTE):  # more colours could not be told apart
        named = named[: len(_PALETTE) - 1]
    groups = {task: [task] for task in run.tasks if task in named}
    if len(groups) < len(totals):
        groups[f"{len(totals) - len(groups)} others"] = [task for task in totals if task not in groups]

    count = min(40, len(run.steps))
    ends = [len(run.steps) * part // count for part in range(count + 1)]
    bins = [run.steps[start:end] for start, end in pairwise(ends)]
    edges = [0] + [part[-1]["step"] for part in bins]
    seen = [sum(sum(event["examples"].values()) for event in part) for part in bins]

    figure, axes = _panel(1)
    below = [0.0] * count
    for (_, members), colour in zip(groups.items(), _PALETTE, strict=False):
        examples = [sum(event["examples"].get(task, 0) for event in part for task in members) for part in bins]
        above = [start + number / max(total, 1) for start, number, total in zip(below, examples, seen, strict=True)]
        axes.stairs(above, edges, baseline=below, fill=True, color=colour)
        below = above
    axes.set_xlim(0, edges[-1])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    overall = max(sum(totals.values()), 1)
    legend = [
        (name, colour, sum(totals[task] for task in members) / overall)
        for (name, members), colour in zip(groups.items(), _PALETTE, strict=False)
    ]
    return {"svg": _svg(figure, "mix", "Share of each task in the examples over time"), "legend": legend}


def _efficiency_charts(run: _Run) -> list[tuple[str, "Markup"]]:
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    charts = []
    for title, key, formatter in (
        ("Real tokens a second", "tokens_per_second", FuncFormatter(_tick)),
        ("Padding waste", "padding_waste", PercentFormatter(1)),
    ):
        figure, axes = _panel(2)
        _curve(axes, [(event["step"], event[key]) for event in run.steps])
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(formatter)
        charts.append((title, _svg(figure, key, f"{title} against the step")))
    return charts


def _tick(value: float, _: int) -> str:
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"


def _coordinates(points: Iterable[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _curve(axes: "Axes", points: list[tuple[int, float]]) -> None:
    """A noisy curve: the values faint, and over them the mean of a twentieth of them around each step."""
    steps, values = _coordinates(points)
    every = len(values) // 400 + 1  # more points could not be told apart and would only swell the page
    half = len(values) // 40
    smooth = [fmean(values[max(0, index - half) : index + half + 1]) for index in range(0, len(values), every)]
    axes.plot(steps[::every], values[::every], color=_PALE_BLUE, linewidth=0.8)
    axes.plot(steps[::every], smooth, color=_BLUE, linewidth=1.6)


def _svg(figure: "Figure", name: str, label: str) -> "Markup":
    """The figure as an inline SVG element whose ids no other chart of the page has."""
    from markupsafe import Markup

    buffer = StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().partition("<svg")[2].partition(">")[2]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    width, height = 72 * figure.get_size_inches()  # points
    opening = Markup('<svg viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">').format(width, height, label)
    return opening + Markup(svg)


def _number(value: float | None) -> str:
    """A score or a loss: three decimals, one from 10 on."""
    if value is None:
        return "–"
    return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.1f}"


def _quantity(value: float | None, unit: str = "") -> str:
    """1234567 as '1.23 M', with the unit after the prefix."""
    if value is None:
        return "–"
    prefix, size = next(((prefix, size) for prefix, size in _PREFIXES if value >= size), ("", 1))
    number = value / size
    decimals = 0 if size == 1 or number >= 100 else 1 if number >= 10 else 2
    return f"{number:.{decimals}f} {prefix}{unit}".strip()


_PREFIXES = (("G", 1e9), ("M", 1e6), ("k", 1e3))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _plain(value: Any) -> str:
    """A sample's text, number or list as one text."""
    if isinstance(value, list):
        return "\n".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
