"""Plots of what was measured: times beside the floor and the peers, and the roofline."""

from pathlib import Path
from typing import Any

from trunkline.benchmarks.microbenchmarks.floors import RATES

PARTS = ("#d9d9d9", "#c8501e", "#e59a6f", "#8a9aa8")  # batching, forward, backward, optimizer
OURS, THEIRS, LINE = "#c8501e", "#8a9aa8", "#222222"


def plot_times(cases: list[dict[str, Any]], title: str, path: Path) -> None:
    """One panel a shape and direction: a bar for each system, and the floor as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 1.7 * len(cases)), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(len(cases), 1, squeeze=False)[:, 0]
    for panel, case in zip(panels, cases, strict=True):
        times = {name: 1000 * of["median"] for name, of in case["systems"].items() if "median" in of}
        colours = [OURS if name == "trunkline" else THEIRS for name in times]
        bars = panel.barh(list(times), list(times.values()), color=colours)
        panel.bar_label(bars, [f"{value:,.3g}" for value in times.values()], padding=3)
        panel.invert_yaxis()
        panel.margins(x=0.12)
        panel.set_title(f"{case['shape']}, {case['direction']}", loc="left", fontsize=10)
        if case["floor"]:
            panel.axvline(1000 * case["floor"], color=LINE, linestyle="--", label="floor")
            panel.legend(loc="lower right")
    panels[-1].set_xlabel("milliseconds a call")
    figure.savefig(path, dpi=90)


def plot_roofline(cases: list[dict[str, Any]], device: str | None, path: Path) -> bool:
    """Every case by operations a byte and operations a second, under the device's roof; False where that is unknown."""
    if device not in RATES:
        return False
    from matplotlib.figure import Figure

    rates = RATES[device]
    figure = Figure(figsize=(8, 5), layout="constrained")
    panel = figure.subplots()
    points = []
    for case in cases:
        work, outcome = case["work"], case["systems"]["trunkline"]
        if "median" in outcome and work["bytes"] and work["operations"]:
            name = f"{case['shape']}, {case['direction']}"
            points.append((name, work["operations"] / work["bytes"], work["operations"] / outcome["median"]))
    lowest = min([x for _, x, _ in points], default=1.0) / 4
    highest = max([x for _, x, _ in points], default=1.0) * 4
    ridge = rates.operations / rates.bytes
    xs = sorted({lowest, min(max(ridge, lowest), highest), highest})
    panel.plot(xs, [min(x * rates.bytes, rates.operations) / 1e12 for x in xs], color=LINE)
    for name, x, y in points:
        panel.scatter(x, y / 1e12, color=OURS)
        panel.annotate(name, (x, y / 1e12), xytext=(4, -10), textcoords="offset points", fontsize=7)
    panel.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s", title=device)
    figure.savefig(path, dpi=90)
    return True


def plot_step(content: dict[str, Any], path: Path) -> None:
    """A bar for each system: milliseconds for a thousand real tokens, in parts."""
    from matplotlib.figure import Figure

    systems = {name: of for name, of in content.get("systems", {}).items() if "heads" not in name}
    figure = Figure(figsize=(9, 1.4 + 0.45 * len(systems)), layout="constrained")
    panel = figure.subplots()
    done = [0.0] * len(systems)
    for part, colour in zip(("batching", "forward", "backward", "optimizer"), PARTS, strict=True):
        times = [1e6 * of["parts"][part] / of["tokens_per_step"] for of in systems.values()]
        panel.barh(list(systems), times, left=done, color=colour, label=part)
        done = [before + time for before, time in zip(done, times, strict=True)]
    for place, (total, rate) in enumerate(zip(done, (of["tokens_per_second"] for of in systems.values()), strict=True)):
        panel.text(total, place, f" {rate:,.0f} tokens/s", va="center", fontsize=9)
    panel.invert_yaxis()
    panel.margins(x=0.18)
    panel.set_xlabel("milliseconds for 1,000 real tokens")
    panel.legend(loc="upper right", fontsize=8)
    figure.suptitle(f"training steps of the shape {content.get('shape', 'tiny')}")
    figure.savefig(path, dpi=90)


def plot_scaling(content: dict[str, Any], path: Path) -> None:
    """One column a curve: time per token above, memory below."""
    from matplotlib.figure import Figure

    curves = content["curves"]
    figure = Figure(figsize=(3.1 * len(curves), 5), layout="constrained")
    panels = figure.subplots(2, len(curves), squeeze=False)
    for column, (name, points) in enumerate(curves.items()):
        xs = [point["x"] for point in points]
        for row, (values, label) in enumerate(
            (([1e6 * p["seconds"] for p in points], "µs a token"), ([p["memory"] / 2**20 for p in points], "MiB"))
        ):
            panel = panels[row, column]
            panel.plot(xs, values, color=OURS, marker="o", markersize=4)
            panel.set(xscale="log", ylim=(0, 1.15 * max(values)), xlabel=name)
            panel.minorticks_off()
            if column == 0:
                panel.set_ylabel(label)
    figure.savefig(path, dpi=90)
