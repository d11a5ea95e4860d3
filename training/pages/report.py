"""report.html of a run: one self-contained page with scores, curves, samples and configuration.

Everything is read from the run's folder, so a report can be written while the run goes on and after it crashed. The
charts are inline SVG; the page loads nothing and needs no script.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trunkline.training.pages import figures
from trunkline.training.pages.units import duration, quantity
from trunkline.training.scoring.metrics import higher_is_better

SAMPLES = 6
"""Samples shown per task."""


@dataclass(frozen=True)
class _Run:
    """What the files of a run's folder say."""

    name: str
    config: str
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    choices: list[dict[str, Any]]
    """Of a mix that reacts to training, at the evaluations."""
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
    from matplotlib import rc_context

    content = _read(run)
    rows = [_row(content, task) for task in content.tasks]
    columns = columns_of(len(rows))
    with rc_context(figures.STYLE):
        charts = {
            "losses": {row["task"]: figures.loss(content.steps, row, columns) for row in rows},
            "scores": {row["task"]: figures.score(row, columns) for row in rows if row["scores"]},
            "reliability": {row["task"]: figures.reliability(row, columns) for row in rows if row["calibration"]},
            "weights": figures.weights(content.steps, columns),
            "conflicts": figures.conflicts(content.steps),
            "mix": figures.mix(content.steps, content.choices, list(content.tasks)) if content.steps else None,
            "throughput": figures.efficiency(content.steps) if content.steps else None,
        }
    page = page_of(
        "report.html.jinja",
        run=content,
        rows=rows,
        columns=columns,
        verdict=_verdict(content, rows),
        figures=_key_figures(content),
        better=higher_is_better,
        stopped=content.choices[-1]["stopped"] if content.choices else {},
        samples={task: samples[:SAMPLES] for task, samples in content.samples.items()},
        **charts,
    )
    path = run / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def page_of(template: str, **content: Any) -> str:
    """A page from one of the templates beside this file."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number,
        "interval": _interval,
        "quantity": quantity,
        "duration": duration,
        "plain": _plain,
    }
    return environment.get_template(template).render(content)


def _read(run: Path) -> _Run:
    log = run / "metrics.jsonl"
    if not log.is_file():
        raise ValueError(f"report: {run} is not the folder of a run: it holds no metrics.jsonl")
    events: dict[str, dict[int, dict[str, Any]]] = {"step": {}, "evaluation": {}, "mix": {}, "left_out": {}}
    lines = log.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last line break is still being written
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"report: {log}, line {number}: expected a JSON object, got {line[:60]!r}") from error
        events[event["event"]][event["step"]] = event  # a resumed run repeats steps: the last one counts
    steps, evaluations, choices, _ = ([event for _, event in sorted(of_kind.items())] for of_kind in events.values())

    def optional(name: str, missing: Any) -> Any:
        path = run / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else missing

    summary = optional("summary.json", None)
    return _Run(
        name=summary["name"] if summary else run.resolve().name,
        config=(run / "config.yaml").read_text(encoding="utf-8"),
        steps=steps,
        evaluations=evaluations,
        choices=choices,
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
        metrics = [event["metrics"][name] for event in evaluations if name in event["metrics"]]
        tasks[name] = {
            "head": None,
            "metric": next((metric for metric in (metrics[-1] if metrics else {}) if metric != "loss"), None),
            "metrics": metrics[-1] if metrics else {},
            "baseline": None,
            "first_loss": metrics[0]["loss"] if metrics else None,
            "last_loss": metrics[-1]["loss"] if metrics else None,
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
    counts = {event["step"]: event["counts"][task] for event in run.evaluations if task in event.get("counts", {})}
    training = [event["loss"][task] for event in run.steps if task in event["loss"]]
    scores = [(step, metrics[metric]) for step, metrics in evaluations if metric in metrics]
    losses_of = [_examples(counts, "loss", step) for step, _ in (evaluations[:1] + evaluations[-1:])]
    of_all = f"all {about['validation_examples']:,}" if run.summary else ""
    last = about["metrics"].get(metric)
    baseline = about["baseline"] and about["baseline"]["metrics"].get(metric)
    higher = metric is not None and higher_is_better(metric)
    if of_all:
        losses_of = [*losses_of[:1], of_all]
    learnt = [point for point in scores if point[0] and math.isfinite(point[1])]  # before step 1 it is luck
    best = (max if higher else min)(learnt, key=lambda point: point[1], default=None)
    above = None
    if last is not None and baseline is not None:
        above = last > baseline if higher else last < baseline
    return about | {
        "task": task,
        "scores": scores,
        "losses": [(step, metrics["loss"]) for step, metrics in evaluations if "loss" in metrics],
        "best": best,
        "first_of": _number_of(counts, "scores", scores[0][0]) if scores else "",
        "best_of": _number_of(counts, "scores", best[0]) if best else "",
        "last_of": of_all or (_number_of(counts, "scores", scores[-1][0]) if scores else ""),
        "training_loss": (training[0], training[-1]) if training else (None, None),
        "losses_of": " → ".join(filter(None, losses_of)),
        "last_score": last,
        "intervals": about.get("intervals", {}),
        "references": about.get("references"),
        "calibration": about.get("calibration"),
        "validation_dropped": about.get("validation_dropped") or {},
        "validation_truncated": about.get("validation_truncated", 0),
        "baseline_score": baseline,
        "above": above,
    }


def _examples(counts: dict[int, dict[str, int]], of: str, step: int) -> str:
    """How many examples an evaluation took; '' of a run that did not log it."""
    return f"of {counts[step][of]:,}" if step in counts else ""


def _number_of(counts: dict[int, dict[str, int]], of: str, step: int) -> str:
    """When an evaluation was, and of how many examples."""
    return ", ".join(filter(None, (f"step {step:,}", _examples(counts, of, step))))


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
            ("tokens", quantity(last["real_tokens"])),
            ("training time", duration(last["seconds"])),
        ]
    summary = run.summary
    return [
        ("steps", f"{summary['steps']:,}"),
        ("tokens", quantity(summary["real_tokens"])),
        ("wall time", duration(summary["wall_time_seconds"])),
        ("tokens a second", f"{summary['tokens_per_second']:,.0f}"),
        ("padding waste", f"{summary['padding_waste']:.1%}"),
        ("parameters", quantity(summary["parameters"])),
        ("peak memory", quantity(summary["peak_memory_bytes"], "B")),
        ("device", summary["device"]),
        *([("steps left out", f"{summary['steps_left_out']:,}")] if summary.get("steps_left_out") else []),
    ]


def columns_of(tasks: int) -> int:
    """Panels in a row of small multiples: at most four, without leaving a lone panel in the last row."""
    return 3 if tasks in (3, 5, 6, 9) else max(1, min(tasks, 4))


def _number(value: float | None) -> str:
    """A score or a loss: three decimals, one from 10 on."""
    if value is None:
        return "–"
    return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.1f}"


def _interval(bounds: list[float] | None) -> str:
    """A 95 % confidence interval beside its score."""
    return f"{_number(bounds[0])} to {_number(bounds[1])}" if bounds else ""


def _plain(value: Any) -> str:
    """A sample's text, number or list as one text."""
    if isinstance(value, list):
        return "\n".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
