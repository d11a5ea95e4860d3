"""What a comparison writes: comparison.json, .csv, .md and .html, all from the same results and records.

The same results give the same files, byte for byte. The page is self-contained, as a run's report is.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trunkline.training.compare.record import WARM_UP, of_task
from trunkline.training.compare.results import Finished
from trunkline.training.pages import figures
from trunkline.training.pages.report import columns_of, page_of
from trunkline.training.pages.units import duration, quantity
from trunkline.training.scoring.metrics import higher_is_better

SAMPLES = 3  # of each task, with what every system made of them


def write_comparison(results: dict[str, Any], finished: Mapping[tuple[str, int], Finished], run: Path) -> None:
    """Writes the four files into the comparison's folder.

    Args:
        results: what `collect` gives.
        finished: by system and seed, the parts that they come from, for curves and samples.
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
            if "scores" not in result:
                yield [system, seed, result["state"], "", "", "", *of, result.get("error", "")]
                continue
            for task, scores in result["scores"].items():
                for metric, value in scores.items():
                    yield [system, seed, result["state"], task, metric, value, *of, ""]
    for name, tasks in results["trivial"].items():
        for task, scores in tasks.items():
            for metric, value in scores.items():
                yield [name, "", "trivial", task, metric, value, *[""] * len(costs), ""]


def tables(results: dict[str, Any]) -> str:
    """Scores, multi-task gain and costs in Markdown; also for benchmarks/results."""
    tasks = results["tasks"]
    heads = [f"{name} ({metric_label(about['metric'])})" for name, about in tasks.items()]
    rows = [
        f"| {name} | {' | '.join(_marked(results, task, name) for task in tasks)} |" for name in _systems_of(results)
    ]
    gains = [_percent(results["gain"][name]) for name in (*tasks, "mean")]
    costs = ["parameters", "tokens", "FLOPs", "FLOPs/token", "training", "wall time", "seeds"]
    cost_rows = [f"| {name} | {' | '.join(costs_of(results, name).values())} |" for name in systems(results)]
    failed = [f"- {name}, seed {seed}: {error}" for name, seed, error in failures(results)]
    return f"""
Scores on the validation splits, {_over(results)}.

| system | {" | ".join(heads)} |
|---|{"---|" * len(heads)}
{chr(10).join(rows)}

Multi-task gain Δm over single-task models, per cent of their score, and its mean over the tasks.

| | {" | ".join(tasks)} | mean |
|---|{"---|" * (len(tasks) + 1)}
| Δm | {" | ".join(gains)} |

Costs{", means over the seeds" if len(results["seeds"]) > 1 else ""}; sizes matched by {results["match"]}.

| system | {" | ".join(costs)} |
|---|{"---|" * len(costs)}
{chr(10).join(cost_rows)}
{chr(10) + "Failed:" + chr(10) + chr(10) + chr(10).join(failed) + chr(10) if failed else ""}"""


def _over(results: dict[str, Any]) -> str:
    """What the scores are means of, and what bold says."""
    seeds = results["seeds"]
    if len(seeds) == 1:
        return f"of the one seed {seeds[0]}; no score is bold, for how far scores spread over seeds is not known"
    return (
        f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}; bold where the best is ahead of the "
        f"next by more than the larger of their standard deviations"
    )


def systems(results: dict[str, Any]) -> list[str]:
    return list(results["systems"])


def _systems_of(results: dict[str, Any]) -> list[str]:
    """The rows of the table."""
    return [*results["systems"], *results["trivial"]]


def metric_label(metric: str) -> str:
    return metric + ("" if higher_is_better(metric) else " ↓")


def cell(results: dict[str, Any], task: str, system: str) -> str:
    """A score as text."""
    score = results["table"][task]["scores"].get(system)
    if score is None:
        states = {result["state"] for result in results["systems"].get(system, {"seeds": {}})["seeds"].values()}
        return "failed" if "failed" in states else "unfinished" if states else "–"
    if system in results["trivial"]:
        return f"{score['mean']:.3f}"
    deviation = "" if score["deviation"] is None else f" ± {score['deviation']:.3f}"
    missing = "" if score["runs"] == len(results["seeds"]) else f" ({score['runs']} of {len(results['seeds'])} seeds)"
    return f"{score['mean']:.3f}{deviation}{missing}"


def _marked(results: dict[str, Any], task: str, system: str) -> str:
    text = cell(results, task, system)
    return f"**{text}**" if results["table"][task]["best"] == system else text


def _percent(gain: dict[str, Any] | None) -> str:
    if gain is None:
        return "–"
    return f"{gain['mean']:+.1f} %" + ("" if gain["deviation"] is None else f" ± {gain['deviation']:.1f}")


def costs_of(results: dict[str, Any], system: str) -> dict[str, str]:
    """What a system takes, in words; means over the seeds that finished."""
    seeds = results["systems"][system]["seeds"].values()
    finished = [result for result in seeds if result["state"] == "finished"]
    count = f"{len(finished)} of {len(seeds)}"
    if not finished:
        return dict.fromkeys(("parameters", "tokens", "FLOPs", "per_token", "training", "wall"), "–") | {"seeds": count}

    def mean(key: str) -> float:
        return sum(result[key] for result in finished) / len(finished)

    models = finished[0]["models"]
    return {
        "parameters": (f"{models} × " if models > 1 else "") + quantity(finished[0]["parameters"]),
        "tokens": quantity(mean("real_tokens")),
        "FLOPs": quantity(mean("training_flops")),
        "per_token": quantity(mean("training_flops") / mean("real_tokens")),
        "training": duration(mean("training_seconds")),
        "wall": duration(mean("wall_time_seconds")),
        "seeds": count,
    }


def failures(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """System, seed and error of what failed."""
    return [
        (system, seed, f"{result['error']} (in part '{result['part']}')")
        for system, about in results["systems"].items()
        for seed, result in about["seeds"].items()
        if result["state"] == "failed"
    ]


def _page(results: dict[str, Any], finished: Mapping[tuple[str, int], Finished], run: Path) -> str:
    from matplotlib import rc_context

    tasks, names = list(results["tasks"]), systems(results)
    columns = columns_of(len(tasks))
    with rc_context(figures.STYLE):
        colours = figures.colours(names)
        scores = {task: figures.system_scores(results, task, colours, columns) for task in tasks}
        curves = {task: _curves(results, finished, task) for task in tasks}
        losses = {
            task: figures.system_losses(of_task, task, colours, columns)
            for task, of_task in curves.items()
            if any(len(points) > 1 for seeds in of_task.values() for points in seeds)
        }
    return page_of(
        "comparison.html.jinja",
        results=results,
        tasks=results["tasks"],
        names=names,
        rows=_systems_of(results),
        colours=colours,
        columns=columns,
        cell=lambda task, system: cell(results, task, system),
        label=metric_label,
        percent=_percent,
        costs={name: costs_of(results, name) for name in names},
        failures=failures(results),
        scores=scores,
        losses=losses,
        verdict=_verdict(results),
        samples={task: _samples(results, finished, task) for task in tasks},
        config=(run / "comparison.yaml").read_text(encoding="utf-8"),
        over=_over(results),
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
        text += f" Better than every system, without a model: {trivial}."
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


def _samples(results: dict[str, Any], finished: Mapping[tuple[str, int], Finished], task: str) -> list[dict[str, Any]]:
    """Validation examples with what each system said of them, with the first seed."""
    shown: list[dict[str, Any]] = []
    for system in systems(results):
        of = finished.get((system, results["seeds"][0]))
        record = of_task(of.parts, task) if of else None
        for place, sample in enumerate((record["samples"].get(task, []) if record else [])[:SAMPLES]):
            if place == len(shown):
                shown.append({"input": sample["input"], "reference": sample["reference"], "predictions": {}})
            shown[place]["predictions"][system] = sample["prediction"]
    return shown
