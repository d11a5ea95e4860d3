"""The mix turns to the tasks that need it, stopped heads stay as they are, and all of it resumes to the same bits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import Finished
from run_folders import assert_same_checkpoints, lines, without_clock
from trunkline import Engine, Task, Trunk, TrunkConfig
from trunkline.engine import checkpoint
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.settings import Mixing
from trunkline.training.balancing.adaptive import Adaptive
from trunkline.training.config_file import load_config
from trunkline.training.data.mixing import Mixer
from trunkline.training.run.run import Run
from trunkline.training.scoring.metrics import metric_names

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS = (
    Task("colour", "classify", ("text",), "label", ("red", "green", "blue")),
    Task("size", "regress", ("text",), "label"),
    Task("parts", "tag", ("text",), "label", ("noun", "verb")),
    Task("where", "span", ("text",), "label"),
    Task("retell", "generate", ("text",), "label"),
)
EVERY = 40  # steps between evaluations


def made(mixing: Mixing, tied: bool = False, accumulate: int = 1) -> Adaptive:
    """For a run of 400 steps with five tasks of equal sizes and lengths."""
    shape = TrunkConfig(vocab_size=50, hidden_size=16, num_layers=1, num_heads=2, tie_vocabulary=tied)
    model = MultiTaskModel(Trunk(shape), TASKS, projection="gelu")
    lengths = [np.full(300, 20)] * len(TASKS)
    fixed = [mixing.shares.get(task.name, 0.0) for task in TASKS]
    mixer = Mixer(lengths, mixing, fixed, 512, 400 * accumulate, seed=0, every=EVERY * accumulate)
    return Adaptive(mixing, TASKS, model, mixer, accumulate)


def scores(losses: list[float], values: list[float] | None = None) -> dict[str, dict[str, float]]:
    """What an evaluation found: the loss and the first metric of every task."""
    values = values or [0.0] * len(TASKS)
    return {
        task.name: {"loss": loss, metric_names(task)[0]: value}
        for task, loss, value in zip(TASKS, losses, values, strict=True)
    }


def seen(adaptive: Adaptive, steps: range) -> np.ndarray:
    """(N,) shares of the examples in these batches."""
    tasks = [task for step in steps for task, _ in adaptive.mixer.batch(step)]
    return np.bincount(tasks, minlength=len(TASKS)) / len(tasks)


def test_progress_turns_to_the_losses_that_fall():
    adaptive = made(Mixing("progress"))
    start = adaptive.evaluated(0, scores([1.0, 1.0, 2.0, 4.0, 8.0]))
    assert list(start["shares"].values()) == pytest.approx([0.2] * 5)
    choice = adaptive.evaluated(EVERY, scores([0.8, 1.0, 1.9, 4.4, 7.2]))  # falls by 20, 0, 5, -10 and 10 %
    falls = np.array([0.2, 0.0, 0.05, 0.0, 0.1])
    factors = np.clip(falls / falls.mean(), 0.25, 4)
    assert list(choice["factors"].values()) == pytest.approx(factors)
    assert list(choice["shares"].values()) == pytest.approx(factors / factors.sum())
    assert seen(adaptive, range(EVERY, 2 * EVERY)) == pytest.approx(factors / factors.sum(), abs=0.02)
    choice = adaptive.evaluated(2 * EVERY, scores([0.8, 0.5, 1.9, 4.4, 7.2]))
    falls = np.array([0.1, 0.25, 0.025, 0.0, 0.05])  # the mean of two
    assert list(choice["factors"].values()) == pytest.approx(np.clip(falls / falls.mean(), 0.25, 4))


def test_without_any_progress_the_plan_holds():
    adaptive = made(Mixing("progress"))
    adaptive.evaluated(0, scores([1.0] * 5))
    assert set(adaptive.evaluated(EVERY, scores([1.5] * 5))["factors"].values()) == {1.0}


def test_loss_ratio_turns_to_the_losses_that_have_fallen_least():
    adaptive = made(Mixing("loss_ratio"), accumulate=2)
    first = [1.0, 1.0, 2.0, 4.0, 8.0]
    adaptive.evaluated(0, scores(first))
    adaptive.evaluated(EVERY, scores([0.7, 0.2, 1.0, 4.0, 9.0]))
    now = [0.5, 0.1, 1.0, 4.0, 12.0]
    choice = adaptive.evaluated(2 * EVERY, scores(now))
    ratios = np.array(now) / first
    factors = np.clip(ratios / ratios.mean(), 0.25, 4)
    assert factors[1] == 0.25  # no task is forgotten
    assert list(choice["factors"].values()) == pytest.approx(factors)
    assert seen(adaptive, range(4 * EVERY, 6 * EVERY)) == pytest.approx(factors / factors.sum(), abs=0.02)


@pytest.mark.parametrize("method", ["progress", "loss_ratio"])
def test_they_start_from_the_shares_that_are_given(method):
    given = {"colour": 4.0, "size": 1.0, "parts": 1.0, "where": 1.0, "retell": 1.0}
    adaptive = made(Mixing(method, shares=given))
    assert adaptive.evaluated(0, scores([1.0] * 5))["shares"]["colour"] == pytest.approx(0.5)
    assert seen(adaptive, range(EVERY)) == pytest.approx([0.5, 0.125, 0.125, 0.125, 0.125], abs=0.02)


def test_what_was_seen_before_a_choice_does_not_change():
    plain, adaptive = made(Mixing("progress")), made(Mixing("progress"))
    adaptive.evaluated(0, scores([1.0] * 5))
    adaptive.evaluated(EVERY, scores([0.1, 1.0, 1.0, 1.0, 1.0]))
    batches = [[mixing.mixer.batch(step) for step in range(3 * EVERY)] for mixing in (plain, adaptive)]
    assert batches[0][:EVERY] == batches[1][:EVERY]
    assert batches[0][EVERY:] != batches[1][EVERY:]


def test_a_mix_that_does_not_react_chooses_nothing():
    adaptive = made(Mixing("temperature"))
    assert adaptive.evaluated(0, scores([1.0] * 5)) == {}
    assert adaptive.evaluated(EVERY, scores([0.1] * 5)) == {}
    assert adaptive.state_dict()["changes"] == []


# Stopping


def run_through(adaptive: Adaptive, losses: list[list[float]], values: list[list[float]] | None = None) -> list[dict]:
    values = values or [[0.0] * len(TASKS)] * len(losses)
    pairs = zip(losses, values, strict=True)
    return [adaptive.evaluated(EVERY * number, scores(*pair)) for number, pair in enumerate(pairs)]


def test_a_task_stops_when_neither_loss_nor_score_was_better_for_long_enough():
    falling = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    columns = [
        falling,
        [1.0, 0.9, 0.9, 0.9, 0.8, 0.8],  # a better one in time
        [1.0, 0.9, 0.9, 0.95, 0.9, 0.5],  # equal is not better: stops at the fifth, and a fall after it is too late
        [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],  # stops at the fourth
        [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],  # the same, but its score goes on rising
    ]
    rising = [[0.0, 0.0, 0.0, 0.0, 0.1 * number] for number in range(6)]
    adaptive = made(Mixing("fixed", shares={task.name: 1.0 for task in TASKS}, patience=3))
    choices = run_through(adaptive, [list(row) for row in zip(*columns, strict=True)], rising)
    assert [choice["stopped"] for choice in choices[:3]] == [{}] * 3
    assert choices[3]["stopped"] == {"where": 3 * EVERY}
    assert choices[5]["stopped"] == {"parts": 4 * EVERY, "where": 3 * EVERY}
    assert list(choices[3]["shares"].values()) == pytest.approx([0.25, 0.25, 0.25, 0.0, 0.25])
    assert list(choices[5]["shares"].values()) == pytest.approx([1 / 3, 1 / 3, 0.0, 0.0, 1 / 3])
    assert seen(adaptive, range(2 * EVERY, 3 * EVERY)).min() > 0.15
    assert seen(adaptive, range(3 * EVERY, 4 * EVERY))[3] == 0
    assert seen(adaptive, range(5 * EVERY, 9 * EVERY)) == pytest.approx([1 / 3, 1 / 3, 0, 0, 1 / 3], abs=0.02)
    assert not adaptive.all_stopped


def test_stopped_tasks_do_not_count_in_the_mean():
    adaptive = made(Mixing("loss_ratio", patience=1))
    choices = run_through(adaptive, [[1.0] * 5, [0.5, 0.25, 0.75, 0.5, 1.0]])
    factors = [1.0, 0.5, 1.5, 1.0, 0.0]
    assert list(choices[1]["factors"].values()) == pytest.approx(factors)
    assert list(choices[1]["shares"].values()) == pytest.approx(np.array(factors) / 4)


def head_of(model: MultiTaskModel, task: int) -> list[torch.Tensor]:
    """What of the parameters is one task's own."""
    return [parameter.detach()[rows == task].clone() for parameter, rows in model.task_parameters()]


@pytest.mark.parametrize("stopped", range(5))
@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_a_stopped_task_is_not_updated(stopped, tied):
    """Neither by what earlier gradients left in the optimizer nor by weight decay; all else is."""
    adaptive = made(Mixing(patience=1), tied)
    model, names = adaptive.model, [task.name for task in TASKS]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        adaptive.hold()

    step()
    better = [0.5] * 5
    better[stopped] = 1.0
    adaptive.evaluated(0, scores([1.0] * 5))
    assert list(adaptive.evaluated(EVERY, scores(better))["stopped"]) == [names[stopped]]
    heads = [head_of(model, task) for task in range(5)]
    vocabulary, trunk = model.vocabulary_weight.clone(), model.trunk.blocks[0].qkv.weight.clone()
    step()
    for task, before in enumerate(heads):
        for part, now in zip(before, head_of(model, task), strict=True):
            assert torch.equal(part, now) == (task == stopped or part.numel() == 0)
    assert torch.equal(vocabulary, model.vocabulary_weight) == (names[stopped] == "retell" and not tied)
    assert not torch.equal(trunk, model.trunk.blocks[0].qkv.weight)


def test_state_comes_back_as_json():
    adaptive, other = (made(Mixing("progress", patience=2)) for _ in range(2))
    run_through(adaptive, [[1.0, 1.0, 1.0, 1.0, 1.0], [0.9, 0.5, 1.0, 1.2, 0.8], [0.7, 0.5, 1.0, 1.0, 0.7]])
    assert adaptive.state.stopped == [None, None, 2 * EVERY, 2 * EVERY, None]
    other.load_state_dict(json.loads(json.dumps(adaptive.state_dict())))
    assert [other.mixer.batch(step) for step in range(400)] == [adaptive.mixer.batch(step) for step in range(400)]
    later = scores([0.6, 0.2, 0.1, 0.1, 0.7])
    assert other.evaluated(3 * EVERY, later) == adaptive.evaluated(3 * EVERY, later)
    assert len(other.held) == len(adaptive.held) > 0


# Runs


def choices_of(run: Path) -> list[dict]:
    return [event for event in lines(run) if event["event"] == "mix"]


def engine_of(finished: Finished, run: Path, *overrides: str) -> Engine:
    return Engine.from_config(load_config(finished.config, [f"run={run}", *overrides]))


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "settings", [("mixing.method=progress",), ("mixing.method=loss_ratio", "mixing.patience=1", "mixing.temperature=1")]
)
def test_a_run_resumes_to_the_same_bits_in_the_middle_of_its_choices(settings, finished, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    engine_of(finished, whole, *settings).fit()
    saved, save = [], Run.save

    def save_and_die(run):
        save(run)
        saved.append(run)
        if len(saved) == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", save_and_die)
        with pytest.raises(Killed):
            engine_of(finished, parts, *settings).fit()
    engine_of(finished, parts, *settings).fit(resume=True)
    assert_same_checkpoints(parts / "checkpoints", whole / "checkpoints")
    assert [*map(without_clock, lines(parts))] == [*map(without_clock, lines(whole))]
    choices = choices_of(whole)
    assert [event["step"] for event in choices] == [0, 4, 8, 12, 16, 20]
    assert len({tuple(event["shares"].values()) for event in choices}) >= 5  # the shares did react
    assert "Share of each task as chosen" in (whole / "report.html").read_text()


def test_a_run_without_a_task_that_gets_better_ends(finished, tmp_path):
    """With a learning rate of next to nothing."""
    run = tmp_path / "run"
    engine = engine_of(finished, run, "mixing.patience=2", "optimizer.learning_rate=1e-30", "evaluation.examples=0")
    summary = engine.fit()
    last = choices_of(run)[-1]
    assert set(last["stopped"]) == set(summary["tasks"])
    assert summary["steps"] == last["step"] < 24
    assert "the heads of these tasks stayed as they were" in (run / "report.html").read_text()


def test_a_stopped_task_is_still_scored_and_its_head_is_that_of_the_checkpoint(finished, tmp_path, monkeypatch):
    """`colour` is made to stop at step 8 of 24."""
    run = tmp_path / "run"
    remember = Adaptive._remember

    def worse(self, step, loss, score):
        place = [task.name for task in self.tasks].index("colour")
        loss[place], score[place] = 10.0 + step, -float(step)
        remember(self, step, loss, score)

    monkeypatch.setattr(Adaptive, "_remember", worse)
    monkeypatch.setattr(checkpoint, "prune", lambda folder, keep: None)
    engine_of(finished, run, "mixing.patience=2", "optimizer.weight_decay=0.5").fit()
    assert choices_of(run)[-1]["stopped"]["colour"] == 8
    weights = [checkpoint.load(run / "checkpoints" / f"step-{step}")[0]["model"] for step in (4, 8, 12, 24)]
    heads = [tensors["weight"][:4] for tensors in weights]  # the four classes of colour
    assert not torch.equal(heads[0], heads[1])
    assert torch.equal(heads[1], heads[2])
    assert torch.equal(heads[1], heads[3])
    assert not torch.equal(weights[1]["trunk.tokens.weight"], weights[3]["trunk.tokens.weight"])
    steps = [event for event in lines(run) if event["event"] == "step"]
    assert all((event["examples"]["colour"] > 0) == (event["step"] <= 8) for event in steps)
    assert all("colour" in event["metrics"] for event in lines(run) if event["event"] == "evaluation")
