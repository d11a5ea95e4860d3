"""The charts of conflicts and weights; those of every run are looked at with the page, in test_report.py."""

import re
from random import Random

import pytest
from matplotlib import rc_context

from trunkline.training.pages import figures


@pytest.fixture(autouse=True)
def style():
    with rc_context(figures.STYLE):
        yield


def steps(tasks: int, count: int = 100) -> list[dict]:
    """Steps of a run: task 0 and task 1 in conflict, the last one absent all the time, looks at every second step."""
    random, names = Random(0), [f"<task> {t}" for t in range(tasks)]
    events = []
    for step in range(count):
        cosines: list[list[float | None]] = [
            [1.0 if i == j else round(0.1 + 0.05 * random.random(), 4) for j in range(tasks)] for i in range(tasks)
        ]
        if tasks > 1:
            cosines[0][1] = cosines[1][0] = -0.62
        for t in range(tasks):
            cosines[t][-1] = cosines[-1][t] = None
        event = {"step": step, "examples": dict.fromkeys(names, 1), "task_weights": {names[0]: 1 + step / count}}
        events.append(event | ({"cosines": cosines} if step % 2 else {}))
    return events


def test_conflicts():
    charts = figures.conflicts(steps(5))
    assert charts is not None
    assert charts["limit"] == 0.62
    assert charts["left_out"] == 0
    assert ">-0.62<" in charts["mean"].replace("\N{MINUS SIGN}", "-")
    assert "&lt;task&gt; 1 · &lt;task&gt; 0" in charts["over_time"]
    assert charts["over_time"].index("task&gt; 1 · &lt;task&gt; 0") < charts["over_time"].index(
        "task&gt; 3 ·"
    )  # the worst on top
    assert "task&gt; 4 ·" not in charts["over_time"]  # never met the others
    ids = [set(re.findall(r'\bid="([^"]+)"', charts[name])) for name in ("mean", "over_time")]
    assert not ids[0] & ids[1]


@pytest.mark.parametrize("cosines", [[[1.0]], [[1.0, None], [None, None]]], ids=["one task", "never together"])
def test_no_conflicts_without_two_tasks_in_a_step(cosines):
    event = {"step": 1, "examples": dict.fromkeys("ab"[: len(cosines)], 1), "cosines": cosines}
    assert figures.conflicts([event]) is None


def test_more_pairs_than_can_be_shown():
    charts = figures.conflicts(steps(10))
    assert charts is not None
    assert charts["left_out"] == 36 - figures.PAIRS
    assert charts["over_time"].count(" · ") == figures.PAIRS


def test_the_same_steps_give_the_same_chart():
    assert figures.conflicts(steps(4)) == figures.conflicts(steps(4))


@pytest.mark.parametrize("events", [[], steps(1), [{"step": 1, "examples": {"a": 1}}]], ids=["no step", "one", "none"])
def test_nothing_to_compare(events):
    assert figures.conflicts(events) is None


def test_weights():
    charts = figures.weights(steps(3), columns=3)
    assert list(charts) == ["<task> 0"]
    assert "Weight of &lt;task&gt; 0" in charts["<task> 0"]
    assert figures.weights([{"step": 1}], columns=3) == {}
