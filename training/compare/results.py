"""What the finished runs of a comparison say together: the table, the multi-task gain, the costs."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from trunkline.engine.tasks.task import Task
from trunkline.training.compare.systems import SYSTEMS, Part
from trunkline.training.environment import command, environment
from trunkline.training.scoring.metrics import higher_is_better, metric_names

if TYPE_CHECKING:
    from trunkline.training.compare.compare import Comparison

FAILURE = "failure.json"


class Score(NamedTuple):
    """A system's scores on one task over the seeds."""

    mean: float
    deviation: float | None  # over the seeds; None where there is one alone
    runs: int  # 0: it needs no model, so that it is the same with every seed


def collect(
    comparison: "Comparison", tasks_of: Sequence[Task], plan: dict[tuple[str, int], list[Part]]
) -> dict[str, Any]:
    """What is in the run folders by now, as comparison.json."""
    tasks: dict[str, Any] = {
        task.name: {"metric": metric_names(task)[0], "metrics": list(metric_names(task)), "head": task.head}
        for task in tasks_of
    }
    systems: dict[str, Any] = {
        system: {
            "about": (SYSTEMS[system].__doc__ or "").strip(),
            "seeds": {str(seed): _result(parts, tasks) for (of, seed), parts in plan.items() if of == system},
        }
        for system in comparison.systems
    }
    trivial = _trivial(plan, tasks)
    table = {name: _row(name, about["metric"], systems, trivial) for name, about in tasks.items()}
    return {
        "name": Path(comparison.run).name,
        "command": command(),
        "match": comparison.match,
        "warm_up": comparison.warm_up,
        "seeds": list(comparison.seeds),
        "tasks": tasks,
        "systems": systems,
        "trivial": trivial,
        "table": table,
        "gain": gain(systems, tasks),
        "environment": environment(),
    }


def _result(parts: Sequence[Part], tasks: dict[str, Any]) -> dict[str, Any]:
    """One system with one seed: its state, scores and costs."""
    summaries = {}
    for part in parts:
        path = Path(part.config.run) / "summary.json"
        if path.is_file():
            summaries[part.name] = json.loads(path.read_text(encoding="utf-8"))
    failure = Path(parts[0].config.run).parent / FAILURE
    result: dict[str, Any] = {"state": "finished" if len(summaries) == len(parts) else "unfinished"}
    if failure.is_file():
        result |= {"state": "failed", **json.loads(failure.read_text(encoding="utf-8"))}
    if result["state"] != "finished":
        return result
    learnt = [summary for name, summary in summaries.items() if name != "warm-up"]
    scores = {name: about["metrics"] for summary in learnt for name, about in summary["tasks"].items()}
    totals = {
        key: sum(summary[key] for summary in summaries.values())
        for key in ("steps", "real_tokens", "training_flops", "training_seconds", "wall_time_seconds")
    }
    sizes = [summary["parameters"] for summary in learnt]
    return result | {
        "scores": {name: scores[name] for name in tasks},
        "parameters": max(sizes),
        "models": len(sizes),
        "parts": {name: summary["steps"] for name, summary in summaries.items()},
        **totals,
    }


def _trivial(plan: dict[tuple[str, int], list[Part]], tasks: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Scores of what needs no model, by its name and task; the same for every system, so those of any finished run."""
    found: dict[str, dict[str, Any]] = {}
    for parts in plan.values():
        for part in parts:
            path = Path(part.config.run) / "summary.json"
            if part.name == "warm-up" or not path.is_file():
                continue
            for task, about in json.loads(path.read_text(encoding="utf-8"))["tasks"].items():
                for name, baseline in about["baselines"].items():
                    found.setdefault(name, {}).setdefault(task, baseline["metrics"])
    return {name: {task: of[task] for task in tasks if task in of} for name, of in found.items()}


def _row(task: str, metric: str, systems: dict[str, Any], trivial: dict[str, Any]) -> dict[str, Any]:
    """One task of the table: the score of every system, and which of them is the best, if one is."""
    scores: dict[str, Score] = {}
    for name, system in systems.items():
        finished = [result["scores"][task][metric] for result in system["seeds"].values() if "scores" in result]
        if finished:
            scores[name] = summary_of(finished)
    scores |= {name: Score(of[task][metric], 0.0, 0) for name, of in trivial.items() if task in of}
    best = best_of(scores, higher_is_better(metric))
    return {"scores": {name: score._asdict() for name, score in scores.items()}, "best": best}


def summary_of(values: Sequence[float]) -> Score:
    """Mean and standard deviation (of a sample, n - 1)."""
    return Score(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def best_of(scores: dict[str, Score], higher: bool) -> str | None:
    """The best, if it is better than the next one by more than the spread: the larger of the two's standard deviations
    over the seeds. None otherwise, and where one of them has a single seed: its spread is not known.

    What needs no model has no spread; the next one is then the best system.
    """
    ranked = sorted(scores, key=lambda name: scores[name].mean, reverse=higher)
    following = [name for name in ranked[1:] if scores[ranked[0]].runs or scores[name].runs]
    if not following:
        return None
    best, second = scores[ranked[0]], scores[following[0]]
    if best.deviation is None or second.deviation is None:
        return None
    return ranked[0] if abs(best.mean - second.mean) > max(best.deviation, second.deviation) else None


def gain(systems: dict[str, Any], tasks: dict[str, Any]) -> dict[str, Any]:
    """Multi-task gain over a model for each task, in per cent of the latter's score, by task and ('mean') over tasks.

    Of every seed by itself, then mean and deviation over the seeds. A task on which the single-task model has no score
    above 0 to compare with (a correlation of 0, say) has None and is left out of the mean.
    Source: delta m of Maninis et al., arXiv:1904.08918, equation 1.
    """
    pairs = []
    if {"multitask", "single-task"} <= systems.keys():
        both = (systems["multitask"]["seeds"], systems["single-task"]["seeds"])
        pairs = [
            (both[0][seed]["scores"], both[1][seed]["scores"])
            for seed in both[0]
            if all("scores" in of[seed] for of in both)
        ]
    gains: dict[str, list[float]] = {name: [] for name in (*tasks, "mean")}
    for together, alone in pairs:
        of_seed = []
        for name, about in tasks.items():
            metric = about["metric"]
            sign = 1 if higher_is_better(metric) else -1
            if alone[name][metric] > 0:
                percent = sign * 100 * (together[name][metric] / alone[name][metric] - 1)
                gains[name].append(percent)
                of_seed.append(percent)
        if of_seed:
            gains["mean"].append(fmean(of_seed))
    return {name: summary_of(values)._asdict() if values else None for name, values in gains.items()}
