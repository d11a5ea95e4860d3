"""The loop: a killed run comes back to the same bits, a run is never overwritten or continued by mistake."""

import json
import math
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch

from conftest import Finished, command_line, tiny_rows, write_jsonl
from run_folders import assert_same_checkpoints, lines, without_clock
from trunkline import Engine, Task, Trunk, TrunkConfig
from trunkline.engine import checkpoint
from trunkline.engine.config import Config
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.settings import Batch, Evaluation, Optimizer
from trunkline.training.config_file import load_config
from trunkline.training.data.mixing import Mixer
from trunkline.training.run.optimizer import make_optimizer, share_of_rate
from trunkline.training.scoring.metrics import higher_is_better

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_killed_run_resumes_to_the_same_bits(finished: Finished, trunkline, tmp_path):
    """With dropout and two batches a step."""
    run = tmp_path / "farm"
    program, environment = command_line("train", finished.config, f"run={run}")
    process = subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not (run / "checkpoints" / "step-8").exists():
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (run / "checkpoints" / "step-24").exists()
    assert not (run / "summary.json").exists()

    output = trunkline("train", finished.config, f"run={run}", "--resume").stdout
    assert "resuming at step" in output
    assert_same_checkpoints(run / "checkpoints", finished.run / "checkpoints")
    assert [*map(without_clock, lines(run))] == [*map(without_clock, lines(finished.run))]  # none missing, none twice
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (run, finished.run)]
    assert weights[0] == weights[1]
    scores = [json.loads((folder / "summary.json").read_text())["tasks"] for folder in (run, finished.run)]
    assert scores[0] == scores[1]


# What a run goes on with


@pytest.fixture
def copy(finished: Finished, tmp_path) -> Engine:
    """An engine on its way to go on with a copy of the finished run."""
    shutil.copytree(finished.run, tmp_path / "run")
    return Engine.from_config(replace(load_config(finished.config), run=str(tmp_path / "run")))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


OTHERS = {  # changes of the config, words of the error
    "seed": ({"seed": 1}, "seed: 0 in the checkpoint, 1 now"),
    "learning rate": (
        {"optimizer": Optimizer(learning_rate=0.5)},
        "optimizer.learning_rate: 0.003 in the checkpoint, 0.5 now",
    ),
    "batch size": ({"batch": Batch(256, 2, 128)}, "batch.tokens: 512 in the checkpoint, 256 now"),
    "accumulation": ({"batch": Batch(512, 1, 128)}, "batch.accumulate: 2 in the checkpoint, 1 now"),
    "fewer steps": ({"steps": 12}, "steps: 24 in the checkpoint, 12 now"),
    "weights": ({"weights": {"colour": 2.0}}, "weights.colour: absent in the checkpoint, 2.0 now"),
}


@pytest.mark.parametrize(("changes", "message"), OTHERS.values(), ids=OTHERS)
def test_a_run_does_not_go_on_with_other_settings(copy, changes, message):
    before = contents(Path(copy.config.run))
    with pytest.raises(ValueError, match="a run cannot go on with other settings: ") as refused:
        copy.fit(resume=True, **changes)
    assert message in str(refused.value)
    assert contents(Path(copy.config.run)) == before


def test_a_run_does_not_go_on_with_other_tasks(copy):
    fewer = Engine.from_config(replace(copy.config, tasks=copy.config.tasks[:-1]))
    with pytest.raises(ValueError, match="tasks: .*'prose'] in the checkpoint, .*'retell'] now.*data.prose: "):
        fewer.fit(resume=True)


def test_a_run_does_not_go_on_with_its_tasks_in_another_order(copy):
    """Their heads would change places, and where they have the same shape nothing else would tell."""
    colour, closeness, *others = copy.config.tasks
    turned = Engine.from_config(replace(copy.config, tasks=(closeness, colour, *others)))
    with pytest.raises(ValueError, match=r"tasks: \['colour', 'closeness', .* now"):
        turned.fit(resume=True)


def test_a_run_does_not_go_on_with_other_data(copy, tmp_path):
    shutil.copytree(copy.config.base, tmp_path / "farm")
    write_jsonl(tmp_path / "farm" / "colour.jsonl", tiny_rows("colour", 59, seed=0))
    with pytest.raises(ValueError, match="data.colour.examples: 60 in the checkpoint, 59 now"):
        copy.fit(resume=True, base=str(tmp_path / "farm"))


def test_a_run_may_go_on_in_another_place(copy):
    """The data, the run folder and the device are not what defines a run."""
    summary = copy.fit(resume=True)
    assert summary["steps"] == 24


def test_a_damaged_checkpoint_is_passed_over(copy, finished, capsys):
    run = Path(copy.config.run)
    newest = run / "checkpoints" / "step-24" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-100] ^= 1
    newest.write_bytes(data)
    copy.fit(resume=True)
    output = capsys.readouterr().out
    assert "step-24 is passed over" in output
    assert "resuming at step 20" in output
    assert_same_checkpoints(run / "checkpoints", finished.run / "checkpoints")


# The run folder


def refuse_work(*_, **__):
    raise AssertionError("work was done")


def test_an_existing_run_is_not_replaced_unasked(copy, monkeypatch):
    monkeypatch.setattr("trunkline.training.run.run.load_corpus", refuse_work)
    before = contents(Path(copy.config.run))
    with pytest.raises(ValueError, match="holds a run: resume it"):
        copy.fit()
    assert contents(Path(copy.config.run)) == before


def test_overwriting_leaves_nothing_of_the_old_run(copy):
    run = Path(copy.config.run)
    summary = copy.fit(overwrite=True, steps=1)
    assert summary["steps"] == 1
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best", "step-1"]
    assert [event["step"] for event in lines(run)] == [0, 1, 1]


def test_nothing_to_resume(copy, tmp_path, monkeypatch):
    monkeypatch.setattr("trunkline.training.run.run.load_corpus", refuse_work)
    with pytest.raises(ValueError, match="elsewhere has no checkpoints to resume from"):
        copy.fit(resume=True, run=str(tmp_path / "elsewhere"))
    assert not (tmp_path / "elsewhere").exists()


def test_no_checkpoint_to_resume(copy):
    checkpoints = Path(copy.config.run) / "checkpoints"
    shutil.rmtree(checkpoints)
    checkpoints.mkdir()
    with pytest.raises(ValueError, match="has no checkpoint to resume from"):
        copy.fit(resume=True)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_run_folder_that_cannot_be_written_is_named_before_any_work(copy, tmp_path, place, monkeypatch):
    monkeypatch.setattr("trunkline.training.run.run.load_corpus", refuse_work)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"{place}.*(is a file|cannot be written)"):
        copy.fit(run=str(tmp_path / place))


def test_data_that_cannot_be_used_does_not_leave_a_run_behind(tmp_path):
    rows = tiny_rows("colour", 20, seed=0)
    write_jsonl(tmp_path / "rows.jsonl", [*rows, {"text": "a green cow", "label": "green"}])
    engine = Engine.from_config(colour_only(tmp_path))
    with pytest.raises(ValueError, match="rows.jsonl, row 21"):
        engine.fit()
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert engine.fit()["steps"] == 1


def test_the_run_folder_is_complete(finished):
    files = "run.json config.yaml tokenizer.json metrics.jsonl checkpoints model report.html "
    files += "summary.json predictions.json samples.json"
    assert {path.name for path in finished.run.iterdir()} == set(files.split())
    names = {path.name for path in (finished.run / "checkpoints").iterdir()}
    assert names == {"best", "step-20", "step-24"}
    saved = Engine.load(finished.run, device="cpu").config
    assert load_config(finished.run / "config.yaml") == saved


def test_metrics_have_a_line_for_every_interval_and_evaluation(finished):
    events = lines(finished.run)
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == [4, 8, 10, 12, 16, 20, 24]
    assert [event["step"] for event in events if event["event"] == "evaluation"] == [0, 4, 8, 12, 16, 20, 24]
    assert [event["tokens"] for event in steps] == [event["step"] * 2 * 512 for event in steps]
    rates = [0.003 * share_of_rate(Optimizer(), event["step"] - 1, 24) for event in steps]
    assert [event["learning_rate"] for event in steps] == pytest.approx(rates)
    before = {"step": 0, "real_tokens": 0}
    for event in steps:
        budget = (event["step"] - before["step"]) * 2 * 512
        assert event["padding_waste"] == pytest.approx(1 - (event["real_tokens"] - before["real_tokens"]) / budget)
        before = event
    assert steps[-1]["loss"]["closeness"] < steps[0]["loss"]["closeness"]
    assert all(math.isfinite(event["gradient_norm"]) and event["gradient_norm"] > 0 for event in steps)


def test_the_best_checkpoint_is_what_is_left(finished):
    summary = json.loads((finished.run / "summary.json").read_text())
    first = {name: task["metric"] for name, task in summary["tasks"].items()}
    means = {
        event["step"]: fmean(
            scores[first[name]] if higher_is_better(first[name]) else -scores["loss"]
            for name, scores in event["metrics"].items()
        )
        for event in lines(finished.run)
        if event["event"] == "evaluation" and event["step"] > 0
    }
    assert summary["best_step"] == max(means, key=lambda step: means[step])
    best, state = checkpoint.load(finished.run / "checkpoints" / "best")
    assert state["step"] == summary["best_step"]
    model = Engine.load(finished.run, device="cpu").model
    torch.testing.assert_close(best["model"], dict(model.state_dict()), rtol=0, atol=0)


# Steps


def colour_only(folder: Path, **changes) -> Config:
    """One step on rows.jsonl in the folder."""
    labels = ("red", "black", "white", "brown")
    task = Task("colour", "classify", ("text",), "label", labels, train="rows.jsonl", validation="rows.jsonl")
    settings = {
        "trunk": TrunkConfig(hidden_size=32, num_layers=2, num_heads=4, max_positions=128),
        "vocab_size": 400,
        "steps": 1,
        "batch": Batch(tokens=256, max_length=64),
        "evaluation": Evaluation(every=100, examples=4),
        "device": "cpu",
    }
    return Config(**{"tasks": (task,), **settings, "run": str(folder / "run"), "base": str(folder), **changes})


def first_gradients(config: Config) -> dict[str, torch.Tensor]:
    """The gradient that AdamW took into its mean in the only step."""
    Engine.from_config(config).fit()
    tensors, _ = checkpoint.load(Path(config.run) / "checkpoints" / "step-1")
    return {name: t / (1 - config.optimizer.beta1) for name, t in tensors["optimizer"].items() if name.endswith("avg")}


def test_accumulated_batches_make_the_step_of_one_batch(tiny_config, tmp_path, monkeypatch):
    members = [(task, example) for task in range(6) for example in range(4)]
    parts = [[m for m in members if m[0] == 1 or m[1] < 3], [m for m in members if m[0] != 1 and m[1] == 3]]
    assert sorted(parts[0] + parts[1]) == members  # task 1 is only in the first

    def gradients(name: str, batches: list[list[tuple[int, int]]]) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(Mixer, "batch", lambda mixer, number: batches[number])
        config = load_config(tiny_config, [f"run={tmp_path / name}", "steps=1", "trunk.dropout=0"])
        return first_gradients(replace(config, batch=Batch(1024, len(batches), 128)))

    whole, split = gradients("whole", [members]), gradients("split", parts)
    assert max(float(gradient.abs().max()) for gradient in whole.values()) > 0.1
    torch.testing.assert_close(split, whole, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("counting", ["examples", "tasks"])
def test_what_counts_alike_in_a_step(tiny_config, tmp_path, monkeypatch, counting):
    """Every example, each with the mean over its task's rows; or the mean of every task, however few its rows are."""

    def gradients(*members: tuple[int, int]) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(Mixer, "batch", lambda mixer, number: list(members))
        name = "-".join(f"{task}.{i}" for task, i in members)
        overrides = [f"run={tmp_path / name}", "steps=1", "trunk.dropout=0", "optimizer.clip=1e9"]
        config = load_config(tiny_config, [*overrides, "weights={closeness: 0.5}", f"counting={counting}"])
        return first_gradients(replace(config, batch=Batch(512, 1, 128)))

    colour, closeness = (0, 0), [(1, i) for i in range(3)]
    together, alone = gradients(colour, *closeness), gradients(colour)
    others = [gradients(member) for member in closeness]
    of_colour, of_closeness = (1 / 4, 1 / 4) if counting == "examples" else (1, 1 / 3)
    expected = {
        name: of_colour * alone[name] + of_closeness * sum(other[name] for other in others) for name in together
    }
    torch.testing.assert_close(together, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["fixed", "uncertainty", "pcgrad"])
def test_a_step_without_a_task_is_a_step(tiny_config, tmp_path, monkeypatch, method):
    """Not even the only vocabulary head, whose gradient is formed before its factor is known, is 0 times infinity."""
    monkeypatch.setattr(Mixer, "batch", lambda mixer, number: [(0, 0), (0, 1)])
    config = load_config(tiny_config, [f"run={tmp_path / 'run'}", "steps=1", f"balancing={method}"])
    tasks = tuple(task for task in config.all_tasks if task.name in ("colour", "prose"))
    gradients = first_gradients(replace(config, tasks=tasks, batch=Batch(512, 1, 128)))
    assert gradients["trunk.tokens.weight.exp_avg"].any()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps_left_out"] == 0


def test_the_weight_of_a_task_is_a_factor_of_its_loss(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", tiny_rows("colour", 20, seed=0))
    free = Optimizer(clip=1e9)
    plain = first_gradients(colour_only(tmp_path, optimizer=free, run=str(tmp_path / "plain")))
    half = first_gradients(colour_only(tmp_path, optimizer=free, run=str(tmp_path / "half"), weights={"colour": 0.5}))
    torch.testing.assert_close({name: 2 * t for name, t in half.items()}, plain, rtol=1e-5, atol=1e-9)


def test_long_gradients_are_scaled_down(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", tiny_rows("colour", 20, seed=0))
    gradients = first_gradients(colour_only(tmp_path, optimizer=Optimizer(clip=0.01)))
    assert torch.cat([t.flatten() for t in gradients.values()]).norm() == pytest.approx(0.01, rel=1e-3)
    (step,) = [event for event in lines(tmp_path / "run") if event["event"] == "step"]
    assert step["gradient_norm"] > 0.1  # before it was scaled


def test_learning_rate_rises_and_falls():
    settings = Optimizer(warmup=0.1)
    rates = [share_of_rate(settings, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == 1.0
    assert 0 < rates[99] < 0.001
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[55] == pytest.approx(0.5)  # halfway down


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_learning_rate_of_short_runs(steps, warmup):
    rates = [share_of_rate(Optimizer(warmup=warmup), step, steps) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert max(rates) == 1.0


def test_only_matrices_decay():
    config = TrunkConfig(vocab_size=50, hidden_size=16, num_layers=1, num_heads=2, tie_vocabulary=False)
    tasks = [
        Task("class", "classify", ("text",), "label", ("a", "b")),
        Task("span", "span", ("text",), "label"),
        Task("text", "generate", ("text",), "label"),
    ]
    model = MultiTaskModel(Trunk(config), tasks, projection="gelu")
    names = {p: name for name, p in model.named_parameters()}
    decayed, others = make_optimizer(model, Optimizer(weight_decay=0.25)).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.25, 0.0)
    block = [f"trunk.blocks.0.{layer}.weight" for layer in ("qkv", "attention_out", "mlp_in", "mlp_out")]
    heads = [
        "weight",
        "span_weight",
        "vocabulary",
        "projection_weight",
        "trunk.tokens.weight",
        "trunk.positions.weight",
    ]
    assert sorted(names[p] for p in decayed["params"]) == sorted(block + heads)
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_losses_that_are_never_finite_stop_the_run_and_name_task_and_examples(copy, tmp_path, monkeypatch):
    """The square of a label that is too large is not, in the label's own unit."""
    monkeypatch.setattr(MultiTaskModel, "set_units", lambda *_: None)
    shutil.copytree(copy.config.base, tmp_path / "farm")
    rows = tiny_rows("closeness", 60, seed=0)
    write_jsonl(tmp_path / "farm" / "closeness.jsonl", [{**row, "score": 1e30} for row in rows])
    with pytest.raises(FloatingPointError, match="5 steps in a row were left out .* up to step 5: "):
        copy.fit(run=str(tmp_path / "broken"), base=str(tmp_path / "farm"))
    assert not [path for path in (tmp_path / "broken" / "checkpoints").iterdir() if path.name == "step-8"]
    left_out = [event for event in lines(tmp_path / "broken") if event["event"] == "left_out"]
    assert [event["step"] for event in left_out] == [1, 2, 3, 4, 5]
    for event in left_out:
        assert event["tasks"] == ["closeness"]
        assert {example["task"] for example in event["examples"]} == {"closeness"}


def test_a_run_learns_and_wastes_no_tokens(tmp_path):
    config = Config(
        tasks=("sentiment",),
        trunk=TrunkConfig(hidden_size=64, num_layers=2, num_heads=4, max_positions=128, positions="rotary"),
        vocab_size=512,
        steps=200,
        batch=Batch(tokens=1024, max_length=96),
        optimizer=Optimizer(learning_rate=1e-3),
        evaluation=Evaluation(every=200),
        run=str(tmp_path),
        device="cpu",
    )
    summary = Engine.from_config(config).fit()
    task = summary["tasks"]["sentiment"]
    assert task["first_loss"] == pytest.approx(math.log(2), abs=0.05)
    assert task["last_loss"] < 0.8 * task["first_loss"]
    assert task["metrics"]["accuracy"] > task["baseline"]["metrics"]["accuracy"] + 0.1
    assert summary["padding_waste"] < 0.03
    assert max(event["padding_waste"] for event in lines(tmp_path) if event["event"] == "step") < 0.03
