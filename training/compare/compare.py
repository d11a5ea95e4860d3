"""Several systems side by side: same data, tokenizer and budget, several seeds, one table.

    RUN/comparison.yaml          what is compared; a comparison is only continued with the same settings
    RUN/tokenizer.json           of all runs
    RUN/<system>/seed-<n>/<part> run folders, each finished, resumed or begun on its own
    RUN/comparison.{json,csv,md,html}   written anew after every system and seed

What the systems are, and how the budget is shared out, is said in `trunkline.training.compare.systems`.
"""

import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import yaml

from trunkline.engine import checkpoint
from trunkline.engine.config import Config, with_tokenizer
from trunkline.engine.console import harmless, tell
from trunkline.engine.engine import Engine
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.text.tokenizer import FILE
from trunkline.training.compare.systems import SYSTEMS, Basis, Match, Part, ordinary
from trunkline.training.config_file import load_config, save_config
from trunkline.training.data.corpus import load_corpus
from trunkline.training.environment import command, environment
from trunkline.training.scoring.metrics import higher_is_better, metric_names

FAILURE = "failure.json"
EXTRA = ("seeds", "systems")  # of which a comparison may be given more, or fewer, when it goes on
PLACES = ("run", "base", "data", "device")  # where things lie may change too


@dataclass(frozen=True)
class Comparison(Config):
    """The settings of a comparison: those of the multi-task run, and what is compared.

    Raises:
        ValueError: an unknown system, a seed that is given twice, or a task that a system cannot learn.
    """

    systems: tuple[str, ...] = tuple(SYSTEMS)
    """Which are compared; all of them are the default."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every system is trained once with each; they decide on weights, order, dropout and generated data."""
    match: Match = "parameters"
    """What bert and bilstm-attention have in common with multitask: parameters, or operations of training a token."""
    warm_up: float = 0.25
    """Part of bert's steps that it spends on guessing masked words before it sees a label."""

    def __post_init__(self):
        super().__post_init__()
        for system in self.systems:
            if system not in SYSTEMS:
                near = get_close_matches(system, SYSTEMS, n=1, cutoff=0.0)[0]
                raise ValueError(f"compare: unknown system '{system}'; did you mean '{near}'?")
        for name, values in (("systems", self.systems), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"compare: {name} must be different ones, at least one; got {list(values)}")
        if min(self.seeds) < 0:
            raise ValueError(f"compare: seeds must be at least 0, got {list(self.seeds)}")
        if not 0 <= self.warm_up < 1:
            raise ValueError(f"compare: warm_up must be at least 0 and below 1, got {self.warm_up}")
        if self.architecture != "trunk" or not self.trunk.causal or self.seed:
            raise ValueError("compare: architecture, trunk.causal and seed are set for every system; leave them out")
        if self.devices != 1:
            raise ValueError(
                f"compare: its runs follow one another on one device, and devices is {self.devices}: leave it out"
            )
        if language := [task.name for task in self.all_tasks if not HEADS[task.head].labelled]:
            raise ValueError(f"compare: '{language[0]}' is a language model, which not every system can be")
        if self.steps < 2 * len(self.tasks):
            raise ValueError(
                f"compare: steps must be at least {2 * len(self.tasks)}, for each task has a model of its own in "
                f"'single-task'; got {self.steps}"
            )


def load_comparison(path: Path, overrides: Sequence[str] = ()) -> Comparison:
    """As `load_config`."""
    comparison = load_config(path, overrides, Comparison)
    assert isinstance(comparison, Comparison)
    return comparison


def compare(comparison: Comparison) -> dict[str, Any]:
    """Trains what is not there yet, and writes the comparison's files. A system that fails does not stop the others.

    Returns:
        What comparison.json holds.

    Raises:
        ValueError: data or settings that cannot be used, or a folder with another comparison; before any training.
    """
    from trunkline.training.compare.comparison_page import write_comparison

    run = Path(comparison.run)
    _check_folder(comparison, run)
    basis = _basis(comparison, run)
    plan = {
        (system, seed): SYSTEMS[system](basis, run / system / f"seed-{seed}", seed)
        for seed in comparison.seeds
        for system in comparison.systems
    }
    save_config(comparison, run / "comparison.yaml")
    results: dict[str, Any] = {}
    for number, ((system, seed), parts) in enumerate(plan.items(), start=1):
        print(f"\n{system}, seed {seed} ({number} of {len(plan)})", flush=True)
        if train_system(parts, run / system / f"seed-{seed}") or number == len(plan):
            results = collect(comparison, basis, plan)
            write_comparison(results, run)
    return results


def _check_folder(comparison: Comparison, run: Path) -> None:
    """Makes the folder, or says why it is not to be used."""
    file = run / "comparison.yaml"
    if file.is_file():
        saved = yaml.safe_load(file.read_text(encoding="utf-8"))
        current = json.loads(json.dumps(asdict(comparison)))
        for key in (*EXTRA, *PLACES):
            saved.pop(key, None)
            current.pop(key)
        try:
            checkpoint.check_same(saved, current)
        except ValueError as error:
            raise ValueError(f"comparison {run} was begun with other settings, name another run=: {error}") from error
    elif run.exists() and (not run.is_dir() or any(path.name != FILE for path in run.iterdir())):
        raise ValueError(f"comparison folder {run} holds something else: name another run=")
    run.mkdir(parents=True, exist_ok=True)


def _basis(comparison: Comparison, run: Path) -> Basis:
    """Reads and checks all data, and makes the tokenizer that all systems use."""
    if not (run / "comparison.yaml").exists():
        tokenizer = load_corpus(comparison, tell=tell).tokenizer
        if "bert" in comparison.systems:
            tokenizer.mask()
        tokenizer.save(run)
    config = with_tokenizer(ordinary(comparison), run)
    return Basis(config, load_corpus(config, tell=tell), comparison.match, comparison.warm_up)


def train_system(parts: Sequence[Part], folder: Path) -> bool:
    """Runs what is not finished of one system with one seed, and says whether there was anything.

    A failure is recorded, and tried again the next time.
    """
    failure, anything = folder / FAILURE, False
    failure.unlink(missing_ok=True)
    for part in parts:
        own = Path(part.config.run)
        if (own / "summary.json").is_file():
            tell(f"{own} is finished")
            continue
        anything = True
        try:
            begun = (own / "checkpoints").is_dir()
            resume = begun and checkpoint.newest(own / "checkpoints", warn=tell) is not None
            Engine.from_config(part.config).fit(resume=resume, overwrite=begun and not resume)
        except Exception as error:  # whatever it is, the other systems have their own run, and the table says it
            folder.mkdir(parents=True, exist_ok=True)
            text = f"{type(error).__name__}: {error}"
            content = {"part": part.name, "error": text, "traceback": traceback.format_exc()}
            failure.write_text(json.dumps(content, indent=1), encoding="utf-8")
            print(harmless(f"failed: {text}"), file=sys.stderr)
            break
    return anything


class Score(NamedTuple):
    """A system's scores on one task over the seeds."""

    mean: float
    deviation: float | None  # over the seeds; None where there is one alone
    runs: int  # 0: it needs no model, so that it is the same with every seed


def collect(comparison: Comparison, basis: Basis, plan: dict[tuple[str, int], list[Part]]) -> dict[str, Any]:
    """What is in the run folders by now, as comparison.json."""
    tasks: dict[str, Any] = {
        task.name: {"metric": metric_names(task)[0], "metrics": list(metric_names(task)), "head": task.head}
        for task in basis.corpus.tasks
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
