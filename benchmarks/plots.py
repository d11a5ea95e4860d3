"""Plots of what was measured: times beside the floor and the peers, and the roofline."""

from pathlib import Path
from typing import Any

from trunkline.benchmarks.floors import RATES

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
