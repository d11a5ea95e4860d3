"""The charts of a report, each as inline SVG: losses, scores, reliability, weights, conflicts, mix, throughput.

They are drawn from the 'step' and 'mix' events of metrics.jsonl, within `matplotlib.rc_context(STYLE)`.
"""

import math
import re
from collections.abc import Iterable, Sequence
from io import StringIO
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Steps = Sequence[dict[str, Any]]

PAIRS = 24
"""Pairs of tasks whose conflict is shown over time: those that differ most and those that agree most."""

_RED = "#b4381f"
_BLUE, _PALE_BLUE, _ORANGE, _GREY, _GREEN = "#2563a8", "#b4cbe4", "#d97706", "#7c8696", "#15803d"
_PALETTE = (
    "#2563a8", "#e08a2e", "#3b9a6d", "#c2504d", "#7d63b8", "#8c6d57",
    "#d67fb0", "#5fb0c9", "#b3a642", "#4a5a8a", "#93b84f", "#c3c8d0",
)  # fmt: skip
STYLE: dict[Any, Any] = {
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


def loss(steps: Steps, row: dict[str, Any], columns: int) -> "Markup | None":
    """Training and validation loss; None where neither has two points."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    task = row["task"]
    points = [(event["step"], event["loss"][task]) for event in steps if task in event["loss"]]
    if len(points) < 2 and len(row["losses"]) < 2:
        return None
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


def score(row: dict[str, Any], columns: int) -> "Markup | None":
    """The scores of the evaluations; None of a single one."""
    if len(row["scores"]) < 2:
        return None
    figure, axes = _panel(columns)
    if row["baseline_score"] is not None:
        axes.axhline(row["baseline_score"], color=_GREY, linewidth=1, linestyle=(0, (4, 3)))
    markers = "o" if len(row["scores"]) <= 30 else None
    axes.plot(*_coordinates(row["scores"]), color=_BLUE, linewidth=1.4, marker=markers, markersize=2.6)
    if row["best"]:
        axes.plot(*row["best"], marker="o", markersize=6, markerfacecolor="none", markeredgecolor=_GREEN)
    axes.margins(y=0.12)
    return _svg(figure, f"score-{row['task']}", f"{row['metric']} of {row['task']} against the step")


def mix(steps: Steps, choices: Steps, tasks: Sequence[str]) -> dict[str, Any]:
    """Shares of the examples over time, each over several logged intervals, and the legend with the overall shares.

    `choices`, the 'mix' events of a run whose shares react to training, are drawn too, from each to the next.
    """
    totals = {task: sum(event["examples"].get(task, 0) for event in steps) for task in tasks}
    named = sorted(totals, key=lambda task: -totals[task])
    if len(named) > len(_PALETTE):  # more colours could not be told apart
        named = named[: len(_PALETTE) - 1]
    groups = {task: [task] for task in tasks if task in named}
    if len(groups) < len(totals):
        groups[f"{len(totals) - len(groups)} others"] = [task for task in totals if task not in groups]

    count = min(40, len(steps))
    ends = [len(steps) * part // count for part in range(count + 1)]
    bins = [steps[start:end] for start, end in pairwise(ends)]
    edges = [0] + [part[-1]["step"] for part in bins]
    examples = [[sum(event["examples"].get(task, 0) for event in part) for part in bins] for task in totals]
    seen = dict(zip(totals, examples, strict=True))
    overall = max(sum(totals.values()), 1)
    charts = {
        "svg": _stack(groups, seen, edges, "mix", "Share of each task in the examples over time"),
        "legend": [
            (name, colour, sum(totals[task] for task in members) / overall)
            for (name, members), colour in zip(groups.items(), _PALETTE, strict=False)
        ],
        "chosen": None,
    }
    begun = [event for event in choices if event["step"] < edges[-1]]
    if begun:
        chosen = {task: [event["shares"].get(task, 0.0) for event in begun] for task in totals}
        until = [*(event["step"] for event in begun), edges[-1]]
        charts["chosen"] = _stack(groups, chosen, until, "chosen", "Share of each task as chosen at the evaluations")
    return charts


def reliability(row: dict[str, Any], columns: int) -> "Markup":
    """How often predictions of like confidence were right, against that confidence; larger marks stand for more."""
    task, bins = row["task"], row["calibration"]["bins"]
    figure, axes = _panel(columns)
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle=(0, (4, 3)))
    confidence, accuracy = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
    most = max(b["count"] for b in bins)
    axes.plot(confidence, accuracy, color=_BLUE, linewidth=1)
    axes.scatter(confidence, accuracy, [6 + 30 * b["count"] / most for b in bins], color=_BLUE, linewidths=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
    axes.set(xlim=(0, 1.02), ylim=(-0.02, 1.04))
    return _svg(figure, f"reliability-{task}", f"Share of right predictions of {task} against their confidence")


def _stack(
    groups: dict[str, list[str]], amounts: dict[str, list[float]], edges: Sequence[int], name: str, label: str
) -> "Markup":
    """Shares of the groups of tasks, one upon the other, between every two edges."""
    from matplotlib.ticker import PercentFormatter

    count = len(edges) - 1
    total = [sum(of_task[part] for of_task in amounts.values()) for part in range(count)]
    figure, axes = _panel(1)
    below = [0.0] * count
    for members, colour in zip(groups.values(), _PALETTE, strict=False):
        shares = [sum(amounts[task][part] for task in members) / max(total[part], 1e-12) for part in range(count)]
        above = [start + share for start, share in zip(below, shares, strict=True)]
        axes.stairs(above, edges, baseline=below, fill=True, color=colour)
        below = above
    axes.set_xlim(0, edges[-1])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return _svg(figure, name, label)


def efficiency(steps: Steps) -> list[tuple[str, "Markup | None"]]:
    """Throughput and waste, each with its title; None instead of a single point."""
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    charts: list[tuple[str, Markup | None]] = []
    for title, key, formatter in (
        ("Real tokens a second", "tokens_per_second", FuncFormatter(_tick)),
        ("Padding waste", "padding_waste", PercentFormatter(1)),
    ):
        if len(steps) < 2:
            charts.append((title, None))
            continue
        figure, axes = _panel(2)
        _curve(axes, [(event["step"], event[key]) for event in steps])
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(formatter)
        charts.append((title, _svg(figure, key, f"{title} against the step")))
    return charts


def weights(steps: Steps, columns: int) -> dict[str, "Markup"]:
    """The weight of every task over time, where something was balanced."""
    charts = {}
    for task in dict.fromkeys(task for event in steps for task in event.get("task_weights", {})):
        figure, axes = _panel(columns)
        weighed = [event for event in steps if task in event.get("task_weights", {})]
        _curve(axes, [(event["step"], event["task_weights"][task]) for event in weighed])
        charts[task] = _svg(figure, f"weight-{task}", f"Weight of {task} against the step")
    return charts


def conflicts(steps: Steps) -> dict[str, Any] | None:
    """Cosines between the gradients of every two tasks: their means as a matrix, and those of the pairs over time.

    None where no two tasks were ever seen together.
    """
    looks = [event for event in steps if "cosines" in event]
    if not looks:
        return None
    names = list(looks[0]["examples"])  # in the order of the matrix
    pairs = [(i, j) for i in range(len(names)) for j in range(i)]

    def mean(events: Steps, i: int, j: int) -> float:
        values = [event["cosines"][i][j] for event in events if event["cosines"][i][j] is not None]
        return fmean(values) if values else math.nan

    overall = {pair: mean(looks, *pair) for pair in pairs}
    known = sorted((pair for pair in pairs if not math.isnan(overall[pair])), key=lambda pair: overall[pair])
    if not known:
        return None
    half = PAIRS // 2
    shown = known if len(known) <= PAIRS else known[:half] + known[-half:]
    count = min(40, len(looks))
    ends = [len(looks) * part // count for part in range(count + 1)]
    bins = [looks[start:end] for start, end in pairwise(ends)]
    over_time = [[mean(part, *pair) for part in bins] for pair in shown]
    # white is 0, the fullest colours are the largest cosine; single looks differ more than means over the run
    mean_limit, limit = _largest(overall.values()), _largest(value for values in over_time for value in values)

    matrix = [[overall[i, j] if j < i else math.nan for j in range(len(names) - 1)] for i in range(1, len(names))]
    square, axes = _heat_map(matrix, names[1:], mean_limit, width=5.2, row_height=max(0.19, 4 / len(names)))
    axes.set_xticks(
        [j + 0.5 for j in range(len(names) - 1)], names[:-1], rotation=40, ha="right", rotation_mode="anchor"
    )
    for (i, j), value in overall.items():
        if not math.isnan(value) and len(names) <= 12:
            shown_value = round(value, 2) + 0.0  # without the sign of -0.00
            colour = "white" if abs(value) > 0.6 * mean_limit else STYLE["text.color"]
            axes.text(j + 0.5, i - 0.5, f"{shown_value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    labels = [f"{names[i]} · {names[j]}" for i, j in shown]
    strip, axes = _heat_map(over_time, labels, limit, width=5.2, row_height=0.19)
    marks = sorted({0, count // 2, count - 1})
    axes.set_xticks([mark + 0.5 for mark in marks], [f"{bins[mark][-1]['step']:,}" for mark in marks])
    return {
        "mean": _svg(square, "conflicts", "Mean cosine between the gradients of every two tasks"),
        "over_time": _svg(strip, "conflicts-over-time", "Cosine between the gradients of two tasks against the step"),
        "mean_limit": mean_limit,
        "limit": limit,
        "left_out": len(known) - len(shown),
    }


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for every system of a comparison."""
    return dict(zip(names, _PALETTE, strict=False))


def system_scores(results: dict[str, Any], task: str, colours: dict[str, str], columns: int) -> "Markup":
    """Every system's score on a task: each seed, their mean and standard deviation; dashed, what needs no model."""
    from matplotlib.figure import Figure

    metric, table = results["tasks"][task]["metric"], results["table"][task]["scores"]
    names = list(colours)
    width, height = 11.0 / columns - 0.3, 0.42 + 0.22 * len(names)  # inches
    left, right, bottom, top = 1.12, 0.16, 0.26, 0.08
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))
    axes.patch.set_visible(False)
    for name in results["trivial"]:
        if name in table:
            axes.axvline(table[name]["mean"], color=_GREY, linewidth=1, linestyle=(0, (4, 3)))
    for place, name in enumerate(names):
        if name not in table:
            continue
        seeds = results["systems"][name]["seeds"].values()
        each = [result["scores"][task][metric] for result in seeds if "scores" in result]
        mean, deviation = table[name]["mean"], table[name]["deviation"] or 0.0
        axes.plot([mean - deviation, mean + deviation], [place, place], color=colours[name], linewidth=2.2, alpha=0.45)
        axes.plot(each, [place] * len(each), color=colours[name], marker="|", markersize=7, linewidth=0)
        axes.plot(mean, place, color=colours[name], marker="o", markersize=5)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=4)
    return _svg(figure, f"scores-{task}", f"{metric} of every system on {task}")


def system_curves(
    curves: dict[str, list[list[tuple[float, float]]]], name: str, label: str, colours: dict[str, str], columns: int
) -> "Markup":
    """Losses or scores against what was spent: of every system the mean over seeds, and faint their range."""
    figure, axes = _panel(columns)
    for system, seeds in curves.items():
        count = min(map(len, seeds))
        half = count // 30
        smooth = [
            [fmean(loss for _, loss in seed[max(0, place - half) : place + half + 1]) for place in range(count)]
            for seed in seeds
        ]
        seen = [fmean(seed[place][0] for seed in seeds) for place in range(count)]
        every = count // 300 + 1
        columns_of_seeds = list(zip(*smooth, strict=True))[::every]
        low, high = [min(values) for values in columns_of_seeds], [max(values) for values in columns_of_seeds]
        axes.fill_between(seen[::every], low, high, color=colours[system], alpha=0.15, linewidth=0)
        axes.plot(seen[::every], list(map(fmean, columns_of_seeds)), color=colours[system], linewidth=1.5)
    return _svg(figure, name, label)


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


def _largest(cosines: Iterable[float]) -> float:
    """The largest without its sign, of those there are."""
    return max([0.01, *(abs(cosine) for cosine in cosines if not math.isnan(cosine))])


def _heat_map(
    rows: list[list[float]], labels: Sequence[str], limit: float, width: float, row_height: float
) -> tuple["Figure", "Axes"]:
    """Cells from red, -limit, over white, 0, to blue; none where there is no number. Lengths in inches."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from numpy import array, ma

    left, right, bottom, top = 0.2 + 0.068 * max(map(len, labels)), 0.1, 0.75, 0.08
    height = max(row_height * len(rows), 1.0) + bottom + top
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))
    axes.patch.set_visible(False)
    colours = LinearSegmentedColormap.from_list("conflict", [_RED, "#ffffff", _BLUE])
    axes.pcolormesh(ma.masked_invalid(array(rows)), cmap=colours, vmin=-limit, vmax=limit)
    axes.set_yticks([row + 0.5 for row in range(len(rows))], labels)
    axes.invert_yaxis()
    axes.grid(False)
    return figure, axes


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
