"""What a comparison writes: comparison.json, .csv, .md and .html, all from the same results and records.

The same results give the same files, byte for byte. The page is self-contained, as a run's report is.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trunkline.training.compare.comparison_tables import (
    ahead_note,
    ahead_of,
    cell,
    costs_of,
    failures,
    failures_of,
    forgotten,
    metric_label,
    over,
    percent,
    rows_of,
    systems,
    tables,
)
from trunkline.training.compare.record import WARM_UP, of_task
from trunkline.training.compare.results import Finished
from trunkline.training.pages import figures
from trunkline.training.pages.report import columns_of, page_of

SPENT = ("tokens", "seconds")  # against which learning is shown
SAMPLES = 3  # of each task, with what every system made of them


def write_comparison(results: dict[str, Any], finished: Mapping[tuple[str, int], Finished], run: Path) -> None:
    """Writes the four files into the comparison's folder.

    Args:
        results: what `collect` gives.
        finished: by system and seed, the parts that they come from, for curves.
    """
    (run / "comparison.json").write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    with (run / "comparison.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(_lines(results))
    title = f"# Comparison {results['name']}\n\n`{results['command']}`\n"
    (run / "comparison.md").write_text(title + tables(results), encoding="utf-8")
    (run / "comparison.html").write_text(_page(results, finished, run), encoding="utf-8")


def _lines(results: dict[str, Any]) -> Iterator[list[Any]]:
    """A line for every system, seed, task and metric; costs are those of the system with that seed."""
    costs = ("parameters", "models", "steps", "real_tokens", "training_flops", "training_seconds", "wall_time_seconds")
    yield ["system", "seed", "state", "task", "metric", "score", *costs, "error"]
    for system, about in results["systems"].items():
        for seed, result in about["seeds"].items():
            of = [result.get(cost, "") for cost in costs]
            for failure in failures_of(result) or ([] if "scores" in result else [{"error": ""}]):
                yield [system, seed, result["state"], "", "", "", *of, failure["error"]]
            for task, scores in result.get("scores", {}).items():
                for metric, value in scores.items():
                    yield [system, seed, result["state"], task, metric, value, *of, ""]
    for name, tasks in results["trivial"].items():
        for task, scores in tasks.items():
            for metric, value in scores.items():
                yield [name, "", "trivial", task, metric, value, *[""] * len(costs), ""]


def _page(results: dict[str, Any], finished: Mapping[tuple[str, int], Finished], run: Path) -> str:
    from matplotlib import rc_context

    tasks, names = list(results["tasks"]), systems(results)
    columns = columns_of(len(tasks))
    with rc_context(figures.STYLE):
        colours = figures.colours(names)
        scores = {task: figures.system_scores(results, task, colours, columns) for task in tasks}
        curves = {task: _curves(results, finished, task) for task in tasks}
        learning = {
            task: [
                figures.system_curves(of, f"{spent}-{task}", f"Score on {task} against {spent}", colours, columns)
                for place, spent in enumerate(SPENT)
                if _make_a_curve(of := _learning(finished, task, place))
            ]
            for task in tasks
        }
        losses = {
            task: figures.system_curves(
                of_system, f"loss-{task}", f"Training loss on {task} against the examples seen", colours, columns
            )
            for task, of_system in curves.items()
            if _make_a_curve(of_system)
        }
    return page_of(
        "comparison.html.jinja",
        results=results,
        tasks=results["tasks"],
        names=names,
        rows=rows_of(results),
        colours=colours,
        columns=columns,
        cell=lambda task, system: cell(results, task, system),
        label=metric_label,
        percent=percent,
        costs={name: costs_of(results, name) for name in names},
        failures=failures(results),
        scores=scores,
        losses=losses,
        learning=learning,
        ahead=ahead_of(results),
        ahead_note=ahead_note(results),
        forgotten=forgotten(results),
        verdict=_verdict(results),
        samples={task: _samples(results, run, task) for task in tasks},
        config=(run / "comparison.yaml").read_text(encoding="utf-8"),
        over=over(results),
    )


def _verdict(results: dict[str, Any]) -> str:
    states = [result["state"] for about in results["systems"].values() for result in about["seeds"].values()]
    open_ones = len(states) - states.count("finished")
    ahead = {task: row["best"] for task, row in results["table"].items() if row["best"]}

    def said(names: Sequence[str]) -> str:
        on = {name: [task for task, best in ahead.items() if best == name] for name in names}
        return "; ".join(f"{name} on {', '.join(tasks)}" for name, tasks in on.items() if tasks)

    trained, trivial = said(systems(results)), said(list(results["trivial"]))
    if len(results["seeds"]) == 1:
        text = "With one seed no system is said to be ahead: how far scores spread over seeds is not known."
    else:
        text = f"Clearly ahead: {trained}." if trained else "No system is clearly ahead of the next one on any task."
    if trivial:
        text += f" Better than every system, without training: {trivial}."
    undecided = len(results["table"]) - len(ahead)
    if ahead and undecided:
        text += f" On {undecided} of {len(results['table'])} tasks the best is within the spread of the next."
    return text + (f" {open_ones} of {len(states)} runs are not finished." if open_ones else "")


def _curves(
    results: dict[str, Any], finished: Mapping[tuple[str, int], Finished], task: str
) -> dict[str, list[list[tuple[float, float]]]]:
    """By system, for every seed: how many examples of the task were seen, and its training loss then.

    A system whose loss is another one, for its summaries are extracted where others are written, has none.
    """
    curves: dict[str, list[list[tuple[float, float]]]] = {}
    for (system, _), of in finished.items():
        record = of_task(of.parts, task)
        if record is None or (system == "bert" and results["tasks"][task]["head"] == "generate"):
            continue
        if points := record["curves"][task]["loss"]:
            curves.setdefault(system, []).append([(seen, loss) for seen, loss in points])
    return curves


def _make_a_curve(of_systems: dict[str, list[list[tuple[float, float]]]]) -> bool:
    """Whether one of them has more than a point."""
    return any(len(points) > 1 for seeds in of_systems.values() for points in seeds)


def _learning(
    finished: Mapping[tuple[str, int], Finished], task: str, place: int
) -> dict[str, list[list[tuple[float, float]]]]:
    """By system, for every seed: what was spent (place 0: tokens, 1: seconds of training) and the task's score then.

    What a warm-up spends before comes first.
    """
    curves: dict[str, list[list[tuple[float, float]]]] = {}
    for (system, _), of in finished.items():
        record, warm_up = of_task(of.parts, task), of.parts.get(WARM_UP)
        if record is None:
            continue
        before = warm_up["summary"][("real_tokens", "training_seconds")[place]] if warm_up else 0.0
        if points := record["curves"][task]["score"]:
            curves.setdefault(system, []).append([(before + point[place], point[2]) for point in points])
    return curves


def _samples(results: dict[str, Any], run: Path, task: str) -> list[dict[str, Any]]:
    """Validation examples with what each system said of them, with the first seed, where its run lies here."""
    shown: list[dict[str, Any]] = []
    for system in systems(results):
        folder = run / system / f"seed-{results['seeds'][0]}"
        file = (folder / task if (folder / task).is_dir() else folder / "all") / "samples.json"
        found = json.loads(file.read_text(encoding="utf-8")).get(task, []) if file.is_file() else []
        for place, sample in enumerate(found[:SAMPLES]):
            if place == len(shown):
                shown.append({"input": sample["input"], "reference": sample["reference"], "predictions": {}})
            shown[place]["predictions"][system] = sample["prediction"]
    return shown
