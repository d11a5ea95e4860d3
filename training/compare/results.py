"""What the finished parts of a comparison say together: the table, its significance, the multi-task gain, the costs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trunkline.engine.tasks.task import Task
from trunkline.training.compare.record import COSTS, Record, learnt, of_task
from trunkline.training.compare.systems import FIRST
from trunkline.training.environment import command, environment
from trunkline.training.scoring.metrics import higher_is_better, metric_names
from trunkline.training.scoring.paired_bootstrap import drawn_scores, draws, interval

if TYPE_CHECKING:
    from trunkline.training.compare.comparison import Comparison


class Score(NamedTuple):
    """A system's scores on one task over the seeds."""

    mean: float
    deviation: float | None  # over the seeds; None where there is one alone
    runs: int  # 0: it is not trained, so that it is the same with every seed


class Finished(NamedTuple):
    """One system with one seed, as far as it has come."""

    parts: dict[str, Record]  # those that are finished, by name
    complete: bool
    failures: list[dict[str, Any]]  # of parts: 'part', 'error', 'traceback'


def collect(
    comparison: "Comparison",
    tasks_of: Sequence[Task],
    finished: Mapping[tuple[str, int], Finished],
    about: Mapping[str, str],
    untrained: Mapping[str, Mapping[str, Record]],
    before: Mapping[str, float],
) -> dict[str, Any]:
    """What comparison.json holds.

    Args:
        finished: by system and seed.
        about: of every system, what it is and starts from.
        untrained: by name and task, what other predictions without training there are, as entries of a record; or
            their 'error'.
        before: of systems with a causal checkpoint, its loss on held-out books before it learns.
    """
    failed = {name: {t: e["error"] for t, e in of.items() if "error" in e} for name, of in untrained.items()}
    untrained = {name: {t: e for t, e in of.items() if "error" not in e} for name, of in untrained.items()}
    tasks: dict[str, Any] = {
        task.name: {"metric": metric_names(task)[0], "metrics": list(metric_names(task)), "head": task.head}
        for task in tasks_of
    }
    systems: dict[str, Any] = {
        system: {
            "about": about[system],
            "seeds": {str(seed): result_of(of, tasks) for (name, seed), of in finished.items() if name == system},
        }
        for system in comparison.systems
    }
    trivial = _trivial(finished, untrained, tasks)
    samples = drawn(finished, untrained, tasks)
    table = {
        name: row(about["metric"], scores_of(name, about["metric"], systems, trivial), samples.get(name, {}))
        for name, about in tasks.items()
    }
    return {
        "name": Path(comparison.run).name,
        "command": command(),
        "match": comparison.match,
        "warm_up": comparison.warm_up,
        "budget": comparison.budget if comparison.start else "steps",
        "split": comparison.split,
        "seeds": list(comparison.seeds),
        "tasks": tasks,
        "systems": systems,
        "trivial": trivial,
        "failed": failed,
        "table": table,
        "forgetting": forgetting(finished, before),
        "gain": with_intervals(gain(systems, tasks), samples, tasks),
        "environment": environment(),
    }


def forgetting(finished: Mapping[tuple[str, int], Finished], before: Mapping[str, float]) -> dict[str, Any]:
    """By system, the loss on held-out books before, and after over the seeds; of several models their mean."""
    made: dict[str, Any] = {}
    for system, loss in before.items():
        of_seeds = [
            fmean(record["language_loss"] for record in learnt(of.parts))
            for (name, _), of in finished.items()
            if name == system and of.complete and all("language_loss" in record for record in learnt(of.parts))
        ]
        made[system] = {"before": loss, "after": summary_of(of_seeds)._asdict() if of_seeds else None}
    return made


def result_of(finished: Finished, tasks: Mapping[str, Any]) -> dict[str, Any]:
    """One system with one seed: its state, scores and costs."""
    parts = learnt(finished.parts)
    scores = {name: task["metrics"] for record in parts for name, task in record["summary"]["tasks"].items()}
    result: dict[str, Any] = {"scores": {name: scores[name] for name in tasks if name in scores}} if scores else {}
    if finished.failures:
        return {"state": "failed", **finished.failures[0], "failures": finished.failures, **result}
    if not finished.complete:
        return {"state": "unfinished", **result}
    summaries = {name: record["summary"] for name, record in finished.parts.items()}
    sizes = [record["summary"]["parameters"] for record in parts]
    return {
        "state": "finished",
        **result,
        "parameters": max(sizes),
        "models": len(sizes),
        "parts": {name: summary["steps"] for name, summary in summaries.items()},
        **{key: sum(summary[key] for summary in summaries.values()) for key in COSTS},
    }


def _trivial(
    finished: Mapping[tuple[str, int], Finished],
    untrained: Mapping[str, Mapping[str, Record]],
    tasks: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Scores of what is not trained, by its name and task; the same with every seed, and of the first system that has
    the task: another's tokenizer may not give back what a document is."""
    found: dict[str, dict[str, Any]] = {}
    for task in tasks:
        records = (of_task(of.parts, task) for of in finished.values())
        first = next((record for record in records if record), None)
        baselines = first["summary"]["tasks"][task]["baselines"] if first else {}
        for name, baseline in baselines.items():
            found.setdefault(name, {})[task] = baseline["metrics"]
    for name, of_tasks in untrained.items():
        found[name] = {task: entry["metrics"] for task, entry in of_tasks.items()}
    return found


def drawn(
    finished: Mapping[tuple[str, int], Finished],
    untrained: Mapping[str, Mapping[str, Record]],
    tasks: Mapping[str, Any],
) -> dict[str, dict[str, np.ndarray]]:
    """By task and system, (seeds, draws) scores of the same draws of examples; what is not trained has one row.

    Empty of a task whose parts were not scored on the same examples, or have left no predictions.
    """
    made: dict[str, dict[str, np.ndarray]] = {}
    for task, about in tasks.items():
        entries: dict[str, list[tuple[str, Record]]] = {}  # by system, the name of its values and an entry of a record
        for (system, _), of in finished.items():
            record = of_task(of.parts, task)
            if record:
                entry = record["predictions"].get(task)
                if not entries and entry:
                    names = entry["baselines"].items()
                    entries |= {n: [(n, {**entry, "predictions": given})] for n, given in names}
                entries.setdefault(system, []).append(("", entry or {"examples": []}))
        entries |= {name: [("", of_tasks[task])] for name, of_tasks in untrained.items() if task in of_tasks}
        scored = [(e["examples"], e.get("references")) for of_system in entries.values() for _, e in of_system]
        if not scored or not scored[0][0] or any(other != scored[0] for other in scored):
            continue
        counts = draws(len(scored[0][0]))
        made[task] = {
            system: np.stack(
                [
                    drawn_scores(
                        about["metric"],
                        entry["predictions"],
                        entry["references"],
                        counts,
                        entry["values"].get(name, ()),
                    )
                    for name, entry in of_system
                ]
            )
            for system, of_system in entries.items()
        }
    return made


def scores_of(task: str, metric: str, systems: Mapping[str, Any], trivial: Mapping[str, Any]) -> dict[str, Score]:
    """The score of every system on a task, and of what is not trained."""
    scores: dict[str, Score] = {}
    for name, system in systems.items():
        finished = [of[task][metric] for result in system["seeds"].values() if task in (of := result.get("scores", {}))]
        if finished:
            scores[name] = summary_of(finished)
    return scores | {name: Score(of[task][metric], 0.0, 0) for name, of in trivial.items() if task in of}


def row(metric: str, scores: dict[str, Score], drawn: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """One task of the table: the score of every system, which of them is the best, if one is, and how far the first
    system is ahead of each, with the interval of that."""
    higher = higher_is_better(metric)
    sign = 1 if higher else -1
    means = {name: of.mean(0) for name, of in drawn.items()}
    ahead = {
        name: dict(zip(("mean", "low", "high"), interval(sign * (means[FIRST] - of)), strict=True))
        for name, of in means.items()
        if FIRST in means and name != FIRST
    }

    def surely(best: str, next_best: str) -> bool:
        if best not in means or next_best not in means:
            return not means  # of runs that have left no predictions, the spread over seeds is all there is
        return interval(sign * (means[best] - means[next_best]))[1] > 0

    best = best_of(scores, higher)
    if best and not surely(best, following_of(scores, higher)[0]):
        best = None
    return {"scores": {name: score._asdict() for name, score in scores.items()}, "best": best, "ahead": ahead}


def summary_of(values: Sequence[float]) -> Score:
    """Mean and standard deviation (of a sample, n - 1)."""
    return Score(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def following_of(scores: Mapping[str, Score], higher: bool) -> list[str]:
    """What the best one is compared with, the next one first: where it needs no training, the systems."""
    ranked = sorted(scores, key=lambda name: scores[name].mean, reverse=higher)
    return [name for name in ranked[1:] if scores[ranked[0]].runs or scores[name].runs]


def best_of(scores: Mapping[str, Score], higher: bool) -> str | None:
    """The best, if it is better than the next one by more than the spread: the larger of the two's standard deviations
    over the seeds. None otherwise, and where one of them has a single seed: its spread is not known.

    What needs no model has no spread; the next one is then the best system.
    """
    following = following_of(scores, higher)
    if not following:
        return None
    first = (max if higher else min)(scores, key=lambda name: scores[name].mean)
    best, second = scores[first], scores[following[0]]
    if best.deviation is None or second.deviation is None:
        return None
    return first if abs(best.mean - second.mean) > max(best.deviation, second.deviation) else None


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
            if name in together and name in alone and alone[name][metric] > 0:
                percent = sign * 100 * (together[name][metric] / alone[name][metric] - 1)
                gains[name].append(percent)
                of_seed.append(percent)
        if of_seed:
            gains["mean"].append(fmean(of_seed))
    return {name: summary_of(values)._asdict() if values else None for name, values in gains.items()}


def with_intervals(
    gains: dict[str, Any], drawn: Mapping[str, Mapping[str, np.ndarray]], tasks: Mapping[str, Any]
) -> dict[str, Any]:
    """Gains with 'low' and 'high', the ends of the 95 % interval over examples, where it can be said.

    It cannot where a draw of examples leaves single-task without a score above 0, or seeds are missing.
    """
    of_tasks = {}
    for name, about in tasks.items():
        of_systems = drawn.get(name, {})
        if gains[name] is None or not {FIRST, "single-task"} <= of_systems.keys():
            continue
        together, alone = of_systems[FIRST], of_systems["single-task"]
        if together.shape == alone.shape and (alone > 0).all():
            sign = 1 if higher_is_better(about["metric"]) else -1
            of_tasks[name] = (sign * 100 * (together / alone - 1)).mean(0)
    known = [name for name in tasks if gains[name] is not None]
    if known and set(known) == set(of_tasks):
        of_tasks["mean"] = np.mean([of_tasks[name] for name in known], 0)
    ends = {name: dict(zip(("low", "high"), interval(of)[1:], strict=True)) for name, of in of_tasks.items()}
    return {name: of and of | ends.get(name, {}) for name, of in gains.items()}
