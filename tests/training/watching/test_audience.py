"""Trackers and listeners hear what happens in a run, and cannot end it."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from run_folders import lines
from trunkline import Engine, Listener, Task
from trunkline.training.config_file import load_config
from trunkline.training.doctor import check_data
from trunkline.training.watching.audience import Audience

pytestmark = pytest.mark.usefixtures("one_thread")
TRUNK = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_positions": 64}


def engine(folder: Path, **settings: Any) -> Engine:
    columns = {"text": [f"{word} {i}" for i in range(20) for word in ("up", "down")], "label": ["yes", "no"] * 20}
    task = Task("toy", "classify", ("text",), "label", ("no", "yes"), train=columns, validation=0.2)
    small = {"vocab_size": 300, "batch": {"tokens": 128}, "device": "cpu", "evaluation": {"every": 10}}
    return Engine(TRUNK, [task], steps=20, run=str(folder / "run"), **small, **settings)


class Recorder(Listener):
    """Remembers every call."""

    def __init__(self):
        self.heard = []

    def __getattribute__(self, name: str) -> Any:
        if name in ("heard",) or name.startswith("_"):
            return super().__getattribute__(name)
        return lambda *arguments: self.heard.append((name, *arguments))


def test_a_listener_hears_everything_in_order(tmp_path, capsys):
    recorder = Recorder()
    summary = engine(tmp_path).fit(on=[recorder])
    names = [name for name, *_ in recorder.heard if name != "logged"]
    assert names == ["started", "evaluated", *["step", "evaluated", "saved"] * 2, "finished", "closed"]
    by_name = {name: arguments for name, *arguments in recorder.heard}
    config, folder = by_name["started"]
    assert (config.steps, folder) == (20, tmp_path / "run")
    step, values = by_name["step"]
    assert (step, set(values["loss"])) == (20, {"toy"})
    assert by_name["saved"] == [20, tmp_path / "run" / "checkpoints" / "step-20"]
    assert by_name["finished"] == [summary]
    assert by_name["closed"] == [None]
    logged = [(step, values) for name, step, *rest in recorder.heard if name == "logged" for values in rest]
    written = lines(tmp_path / "run")
    assert [step for step, _ in logged] == [line["step"] for line in written]
    assert logged[-1][1]["evaluation/metrics/toy/accuracy"] == written[-1]["metrics"]["toy"]["accuracy"]
    assert all(type(value) is float for _, values in logged for value in values.values())


def test_listening_changes_nothing_of_what_is_learnt(tmp_path, capsys):
    alone = engine(tmp_path / "alone").fit()
    watched = engine(tmp_path / "watched").fit(on=[Recorder()])
    assert alone["tasks"]["toy"]["metrics"] == watched["tasks"]["toy"]["metrics"]


def perform(folder: Path, track: Sequence[str] = (), on: Sequence[Any] = ()) -> list[str]:
    """A run of 20 steps as its listeners hear it; what the user is told comes back."""
    told: list[str] = []
    config = engine(folder, track=track).config
    with Audience(track, on, told.append) as audience:
        audience.start(config, folder / "run")
        for step in (10, 20):
            audience.hear(step, {"event": "step", "loss": {"toy": 0.5}, "learning_rate": 1e-3})
            audience.hear(step, {"event": "evaluation", "metrics": {"toy": {"loss": 0.5, "accuracy": step / 100}}})
            audience.tell("saved", step, folder / f"step-{step}")
        audience.tell("finished", SUMMARY)
    return told


SUMMARY = {"tasks": {"toy": {"metrics": {"accuracy": 0.25}}}}
LAST, SCORE = ("evaluation/metrics/toy/accuracy", 20), 0.2


def test_one_that_fails_is_told_and_left_out_and_the_others_hear_on(tmp_path):
    heard = []

    class Failing:
        def step(self, step, values):
            heard.append(step)
            raise KeyError("no such thing")

    recorder = Recorder()
    (told,) = perform(tmp_path, on=[Failing(), recorder])
    assert heard == [10]
    assert "Failing.step failed, and hears no more of this run: KeyError: 'no such thing'" in told
    assert "test_audience.py, line" in told
    assert [name for name, *_ in recorder.heard].count("step") == 2


class Stopping:
    def step(self, step, values):
        raise KeyboardInterrupt


def test_ctrl_c_in_a_listener_ends_the_run_and_is_told(tmp_path):
    recorder = Recorder()
    with pytest.raises(KeyboardInterrupt):
        perform(tmp_path, on=[Stopping(), recorder])
    name, error = recorder.heard[-1]
    assert (name, type(error)) == ("closed", KeyboardInterrupt)


@pytest.mark.parametrize(
    ("on", "said"),
    [
        ([print], "has none of the methods started, step, evaluated, logged, saved, finished, closed"),
        ([Recorder], "Recorder is a class: give one of it, Recorder()"),
        ("listener", "on must be a list"),
        (5, "on must be a list"),
    ],
)
def test_what_does_not_listen_is_refused_before_anything_is_done(tmp_path, on, said):
    with pytest.raises(ValueError, match="fit: on") as caught:
        engine(tmp_path).fit(on=on)
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()


# Trackers, whose packages are stood in for


class Board:
    """tensorboard, through torch's SummaryWriter."""

    def __init__(self, folder: str):
        self.folder, self.values, self.closed = folder, {}, False

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.values[name, step] = value

    def close(self) -> None:
        self.closed = True


class Run:
    """A run of wandb or trackio."""

    def __init__(self, **settings):
        self.settings, self.values, self.summary, self.ended = settings, {}, {}, []

    def log(self, values: dict, step: int | None = None) -> None:
        self.values |= {(name, step): value for name, value in values.items()}

    def finish(self, **how) -> None:
        self.ended.append(how)


@pytest.fixture
def package(monkeypatch):
    """Makes a module that stands in for a package."""

    def make(name: str, **content) -> SimpleNamespace:
        module = SimpleNamespace(**content)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return make


@pytest.fixture
def run_of(package):
    """The runs of a package that has `init`."""

    def make(name: str) -> list[Run]:
        runs: list[Run] = []
        package(name, init=lambda **settings: runs.append(Run(**settings)) or runs[-1])
        return runs

    return make


def test_tensorboard_has_its_files_in_the_run(tmp_path, package, capsys):
    boards: list[Board] = []
    package("tensorboard")
    package("torch.utils.tensorboard", SummaryWriter=lambda folder: boards.append(Board(folder)) or boards[-1])
    perform(tmp_path, ["tensorboard"])
    (board,) = boards
    assert board.folder == str(tmp_path / "run" / "tensorboard")
    assert board.values[LAST] == SCORE
    assert board.closed


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_are_told_settings_values_and_scores(tmp_path, run_of, monkeypatch, capsys, name):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    runs = run_of(name)
    perform(tmp_path, [name])
    (run,) = runs
    assert (run.settings["project"], run.settings["name"]) == ("trunkline", "run")
    assert run.settings["config"]["steps"] == 20
    assert run.values[LAST] == SCORE
    final = run.summary if name == "wandb" else {own: value for (own, _), value in run.values.items()}
    assert final["final/toy/accuracy"] == 0.25
    assert run.ended == [{"exit_code": 0} if name == "wandb" else {}]


def test_wandb_is_told_of_a_run_that_broke_off(tmp_path, run_of, capsys):
    runs = run_of("wandb")

    with pytest.raises(KeyboardInterrupt):
        perform(tmp_path, ["wandb"], on=[Stopping()])
    assert runs[0].ended == [{"exit_code": 1}]


@pytest.mark.parametrize("outer", [None, "a run of the user's"])
def test_mlflow_has_a_run_of_its_own(tmp_path, package, monkeypatch, capsys, outer):
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
    heard: dict[str, Any] = {"metrics": {}}

    def log_metrics(values, step=None, run_id=None):
        assert run_id == "abc"
        heard["metrics"] |= {(name, step): value for name, value in values.items()}

    package(
        "mlflow",
        set_experiment=lambda name: heard.update(experiment=name),
        active_run=lambda: outer,
        start_run=lambda **how: heard.update(how) or SimpleNamespace(info=SimpleNamespace(run_id="abc")),
        log_params=lambda settings: heard.update(settings=settings),
        log_metrics=log_metrics,
        end_run=lambda status: heard.update(status=status),
    )
    assert perform(tmp_path, ["mlflow"]) == []
    assert (heard["experiment"], heard["run_name"], heard["nested"]) == ("trunkline", "run", outer is not None)
    assert heard["settings"]["steps"] == "20"
    assert all(len(value) <= 500 for value in heard["settings"].values())
    assert heard["metrics"][LAST] == SCORE
    assert heard["metrics"]["final/toy/accuracy", None] == 0.25
    assert heard["status"] == "FINISHED"


def test_a_tracker_that_fails_at_step_10_is_left_out(tmp_path, package, capsys):
    class Broken(Run):
        def log(self, values, step=None):
            if step:
                raise ConnectionError("the server is gone")

    package("wandb", init=lambda **settings: Broken(**settings))
    (told,) = perform(tmp_path, ["wandb"])
    assert "WeightsAndBiases.logged failed, and hears no more of this run: ConnectionError: the server is gone" in told


def test_a_tracker_that_does_not_start_is_an_error_before_the_first_step(tmp_path, package):
    def init(**settings):
        raise RuntimeError("api_key not configured")

    package("wandb", init=init)
    with pytest.raises(ValueError, match="track: wandb does not start: api_key not configured"):
        engine(tmp_path, track=["wandb"]).fit()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "mlflow"])
def test_a_package_that_is_missing_is_an_error_before_anything_is_read(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"track: {name} cannot be imported .*pip install {name}"):
        engine(tmp_path, track=[name]).fit()
    assert not (tmp_path / "run").exists()


def test_the_doctor_misses_it_too(tiny_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="track: wandb cannot be imported"):
        check_data(load_config(tiny_config, ["track=[wandb]"]))


def test_an_unknown_tracker_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'wandb'"):
        engine(tmp_path, track=["wandbb"])


def test_a_run_goes_on_with_another_tracker(tmp_path, run_of, capsys):
    engine(tmp_path).fit()
    runs = run_of("trackio")
    engine(tmp_path, track=["trackio"]).fit(resume=True, steps=30)
    assert ("evaluation/metrics/toy/accuracy", 30) in runs[0].values


def test_nobody_listens_to_a_run_that_names_nobody(monkeypatch):
    for name in ("tensorboard", "wandb", "trackio", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
    assert Audience((), (), tell=print).trackers == {}
