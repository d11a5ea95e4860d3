"""What a comparison's files say of its scores, in words: nothing that one seed, or one point, does not bear out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trunkline.training.compare.comparison_page import _verdict, write_comparison
from trunkline.training.compare.comparison_tables import tables
from trunkline.training.compare.results import (
    Finished,
    Score,
    best_of,
    gain,
    row,
    scores_of,
    summary_of,
    with_intervals,
)

TASKS = {
    "colour": {"metric": "accuracy", "metrics": ["accuracy"], "head": "classify"},
    "retell": {"metric": "rouge1", "metrics": ["rouge1"], "head": "generate"},
}
COSTS = {"parameters": 1, "models": 1, "steps": 4, "real_tokens": 9, "training_flops": 9.0}
SECONDS = {"training_seconds": 1.0, "wall_time_seconds": 2.0}
SCORES = {"multitask": (0.5, 0.2), "single-task": (0.4, 0.1)}
TRIVIAL = {
    "majority class": {"colour": {"accuracy": 0.9}},
    "all classes": {"colour": {"accuracy": 0.7}},
    "first line": {"retell": {"rouge1": 0.05}},
}


def results_of(seeds: int) -> dict[str, Any]:
    """Of two systems; the first is ahead of the other, and on one task less than the majority class."""
    systems = {
        name: {
            "about": name,
            "seeds": {
                str(seed): {
                    "state": "finished",
                    "scores": {"colour": {"accuracy": colour + seed / 100}, "retell": {"rouge1": retell + seed / 100}},
                    **COSTS,
                    **SECONDS,
                }
                for seed in range(seeds)
            },
        }
        for name, (colour, retell) in SCORES.items()
    }
    return {
        "name": "farm",
        "command": "trunkline compare farm.yaml",
        "match": "parameters",
        "warm_up": 0.25,
        "seeds": list(range(seeds)),
        "tasks": TASKS,
        "systems": systems,
        "trivial": TRIVIAL,
        "failed": {},
        "forgetting": {},
        "budget": "steps",
        "split": "validation",
        "table": {
            name: row(about["metric"], scores_of(name, about["metric"], systems, TRIVIAL), {})
            for name, about in TASKS.items()
        },
        "gain": gain(systems, TASKS),
        "environment": {"torch": "2.13.0"},
    }


def page_of(results: dict[str, Any], run: Path, losses: int = 2) -> str:
    """The page of a comparison whose runs have logged so many losses."""
    curves = {"loss": [[8.0 * (step + 1), 1.0] for step in range(losses)], "score": []}
    record = {"summary": {"tasks": TASKS}, "curves": dict.fromkeys(TASKS, curves)}
    finished = {(system, seed): Finished({"all": record}, True, None) for system in SCORES for seed in results["seeds"]}
    (run / "comparison.yaml").write_text("seeds: [0]\n")
    write_comparison(results, finished, run)
    return (run / "comparison.html").read_text()


def test_with_one_seed_nothing_is_bold_or_said_to_be_ahead(tmp_path):
    results = results_of(1)
    text, page = tables(results), page_of(results, tmp_path)
    assert "**" not in text
    assert "Scores on the validation splits, of the one seed 0; no score is bold" in text
    assert " best" not in page.partition("<body>")[2].partition('id="gain"')[0].replace("where the best", "")
    assert "With one seed no system is said to be ahead" in page
    for words in ("learly ahead", "over the seeds", "over seeds 0", "standard deviation", "without training: majority"):
        assert words not in text + page


def test_with_several_seeds_what_is_ahead_is_bold(tmp_path):
    results = results_of(3)
    text, page = tables(results), page_of(results, tmp_path)
    assert "mean ± standard deviation over seeds 0, 1, 2; bold where" in text
    assert "| multitask | 0.510 ± 0.010 | **0.210 ± 0.010** |" in text
    assert "| majority class | **0.900** | – |" in text
    assert page.count('class="n best"') == 2
    assert "Clearly ahead: multitask on retell. Better than every system, without training: majority class" in page


@pytest.mark.parametrize(
    ("best", "verdict"),
    [
        (("multitask", "multitask"), "Clearly ahead: multitask on colour, retell."),
        (
            ("multitask", None),
            "Clearly ahead: multitask on colour. On 1 of 2 tasks the best is within the spread of the next.",
        ),
        (
            ("majority class", None),
            "No system is clearly ahead of the next one on any task. Better than every system, without training: "
            "majority class on colour. On 1 of 2 tasks the best is within the spread of the next.",
        ),
        ((None, None), "No system is clearly ahead of the next one on any task."),
    ],
)
def test_the_verdict_tells_systems_from_what_needs_no_model(best, verdict):
    results = results_of(2)
    for of_task, name in zip(results["table"].values(), best, strict=True):
        of_task["best"] = name
    assert _verdict(results) == verdict


def test_a_loss_that_was_logged_once_is_no_curve(tmp_path):
    page = page_of(results_of(1), tmp_path, losses=1)
    assert page.count("<svg") == 2  # the scores
    assert page.count("fewer than two losses were logged") == 2


@pytest.mark.parametrize(
    ("scores", "higher", "best"),
    [
        ({"a": (0.80, 0.02), "b": (0.75, 0.04)}, True, "a"),
        ({"a": (0.80, 0.02), "b": (0.75, 0.06)}, True, None),  # within the spread of the next
        ({"a": (0.80, 0.06), "b": (0.75, 0.02)}, True, None),  # within its own
        ({"a": (0.80, 0.02), "b": (0.75, 0.04)}, False, "b"),
        ({"a": (0.80, None), "b": (0.75, 0.0)}, True, None),  # one seed: no spread is known
        ({"a": (0.80, 0.01), "b": (0.75, None)}, True, None),
        ({"a": (0.80, 0.01)}, True, None),
        ({"a": (0.70, 0.01), "b": (0.80, 0.01), "c": (0.795, 0.001)}, True, None),
        ({"a": (0.70, 0.01), "majority": (0.72, 0.0)}, True, "majority"),
    ],
)
def test_only_what_is_ahead_by_more_than_the_spread_is_bold(scores, higher, best):
    named = {name: Score(mean, deviation, 3) for name, (mean, deviation) in scores.items()}
    assert best_of(named, higher) == best


def test_what_needs_no_model_is_compared_with_the_best_system():
    trivial = {"first line": Score(0.9, 0.0, 0), "first three lines": Score(0.95, 0.0, 0)}
    one_seed = {"a": Score(0.4, None, 1), "b": Score(0.3, None, 1), **trivial}
    assert best_of(one_seed, higher=True) is None
    assert best_of({**one_seed, "a": Score(0.4, 0.01, 3)}, higher=True) == "first three lines"
    assert best_of({**one_seed, "a": Score(0.94, 0.02, 3)}, higher=True) is None
    assert best_of(trivial, higher=True) is None


def test_mean_and_deviation_are_those_of_a_sample():
    assert summary_of([1.0, 3.0]) == (2.0, pytest.approx(2**0.5), 2)
    assert summary_of([1.5]) == (1.5, None, 1)


def test_gain_over_single_task_models():
    tasks = {"a": {"metric": "accuracy"}, "b": {"metric": "perplexity"}, "c": {"metric": "matthews"}}

    def system(*seeds: tuple[float, float, float]) -> dict[str, Any]:
        names = [("a", "accuracy"), ("b", "perplexity"), ("c", "matthews")]
        return {
            "seeds": {
                str(seed): {
                    "scores": {task: {metric: value} for (task, metric), value in zip(names, values, strict=True)}
                }
                for seed, values in enumerate(seeds)
            }
        }

    systems = {
        "multitask": system((0.6, 90.0, 0.1), (0.5, 120.0, 0.1)),
        "single-task": system((0.5, 100.0, 0.0), (0.5, 100.0, 0.0)),
    }
    gains = gain(systems, tasks)
    assert gains["a"] == {"mean": pytest.approx(10.0), "deviation": pytest.approx(20 / 2**0.5), "runs": 2}
    assert gains["b"]["mean"] == pytest.approx((10 - 20) / 2)  # less is better
    assert gains["c"] is None  # 0 cannot be divided by
    assert gains["mean"]["mean"] == pytest.approx(((20 + 10) / 2 + (0 - 20) / 2) / 2)
    systems["single-task"]["seeds"]["1"] = {"state": "failed"}
    assert gain(systems, tasks)["a"] == {"mean": pytest.approx(20.0), "deviation": None, "runs": 1}
    del systems["single-task"]
    assert gain(systems, tasks)["mean"] is None


def test_what_the_examples_do_not_bear_out_is_not_bold():
    scores = {"multitask": Score(0.80, 0.01, 3), "bert": Score(0.75, 0.01, 3)}
    spread = np.linspace(-1, 1, 1000)

    def drawn(deviation: float) -> dict[str, np.ndarray]:
        """(seeds, draws), the first of them of all examples; the systems differ by 0.05, and more or less in draws."""
        return {
            "multitask": np.tile([0.80, *(0.80 + deviation * spread)], (3, 1)),
            "bert": np.tile([0.75] * 1001, (3, 1)),
        }

    sure, unsure = row("accuracy", scores, drawn(0.04)), row("accuracy", scores, drawn(0.06))
    assert (sure["best"], unsure["best"]) == ("multitask", None)
    assert unsure["ahead"]["bert"] == pytest.approx({"mean": 0.05, "low": 0.05 - 0.057, "high": 0.05 + 0.057}, abs=1e-4)
    worse = row("perplexity", {"multitask": Score(3.0, 0.1, 3), "bert": Score(9.0, 0.1, 3)}, drawn(0.0))
    assert worse["ahead"]["bert"]["mean"] == pytest.approx(-0.05)  # less is better


def test_gain_has_the_interval_of_its_draws():
    tasks = {"a": {"metric": "accuracy"}, "b": {"metric": "perplexity"}}
    spread = np.linspace(-1, 1, 1000)
    drawn = {
        "a": {
            "multitask": np.array([[0.6, *(0.6 + 0.1 * spread)]]),
            "single-task": np.full((1, 1001), 0.5),
        },
        "b": {"multitask": np.full((1, 1001), 90.0), "single-task": np.full((1, 1001), 100.0)},
    }
    gains = {name: {"mean": mean, "deviation": None, "runs": 1} for name, mean in (("a", 20), ("b", 10), ("mean", 15))}
    found = with_intervals(gains, drawn, tasks)
    assert (found["a"]["low"], found["a"]["high"]) == pytest.approx((20 - 19, 20 + 19), abs=0.1)
    assert (found["mean"]["low"], found["mean"]["high"]) == pytest.approx((15 - 9.5, 15 + 9.5), abs=0.1)
    drawn["a"]["single-task"][0, 5] = 0.0  # which nothing can be divided by
    found = with_intervals(gains, drawn, tasks)
    assert "low" not in found["a"]
    assert "low" not in found["mean"]
    assert found["b"]["low"] == pytest.approx(10)
