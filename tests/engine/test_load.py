"""What is loaded is found, checked, and named where it is damaged; a start keeps the heads that do the same."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from answering import answering_engine
from conftest import Finished, tiny_rows
from trunkline import Engine, Task, Trunk, TrunkConfig
from trunkline.engine import checkpoint
from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.training.config_file import load_config

pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHTS, SETTINGS = "model.safetensors", "engine.json"


def made(folder: Path, tasks: list[Task], **settings) -> Path:
    """An engine of random weights, saved."""
    torch.manual_seed(len(tasks))
    trunk = TrunkConfig(hidden_size=32, num_layers=2, num_heads=2, max_positions=64, positions="rotary")
    engine = Engine(trunk, tasks, batch={"max_length": 48}, device="cpu", **settings)
    engine.build(Tokenizer.train(["a good film, a bad film"], 300))
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return engine.save(folder)


KIND = Task("kind", "classify", ("text",), "label", ("good", "bad"))
SCORE = Task("score", "regress", ("text",), "label")
TAGS = Task("tags", "tag", ("text",), "label", ("O", "X", "Y"))
SPAN = Task("span", "span", ("question", "text"), "label")
TEXT = Task("text", "generate", ("text",), "label", max_target_tokens=8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("saved"), [KIND, SPAN, TEXT])


def edited(folder: Path, **changes) -> None:
    settings = json.loads((folder / SETTINGS).read_text()) | changes
    (folder / SETTINGS).write_text(json.dumps({key: value for key, value in settings.items() if value != "GONE"}))


def tensors_edited(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


DAMAGE = {  # what is done to a copy of the folder, the file that is named
    "weights cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:3000]), WEIGHTS),
    "weights empty": (lambda f: (f / WEIGHTS).write_bytes(b""), WEIGHTS),
    "weights gone": (lambda f: (f / WEIGHTS).unlink(), WEIGHTS),
    "weights a folder": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), WEIGHTS),
    "weights a pipe": (lambda f: ((f / WEIGHTS).unlink(), os.mkfifo(f / WEIGHTS)), WEIGHTS),
    "header of a petabyte": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 7 + b"\x00{}"), WEIGHTS),
    "a tensor missing": (lambda f: tensors_edited(f, lambda t: t.pop("weight")), WEIGHTS),
    "a tensor too many": (lambda f: tensors_edited(f, lambda t: t.update(x=torch.ones(1))), WEIGHTS),
    "another shape": (lambda f: tensors_edited(f, lambda t: t.update(bias=torch.ones(5))), WEIGHTS),
    "whole numbers": (lambda f: tensors_edited(f, lambda t: t.update(bias=torch.ones(2, dtype=torch.int64))), WEIGHTS),
    "settings cut": (lambda f: (f / SETTINGS).write_text((f / SETTINGS).read_text()[:200]), SETTINGS),
    "settings a list": (lambda f: (f / SETTINGS).write_text("[]"), SETTINGS),
    "settings not text": (lambda f: (f / SETTINGS).write_bytes(b"\xff\xfe{}"), SETTINGS),
    "settings deep": (lambda f: (f / SETTINGS).write_text("[" * 100_000), SETTINGS),
    "unknown key": (lambda f: edited(f, x=1), SETTINGS),
    "no tasks": (lambda f: edited(f, tasks="GONE"), SETTINGS),
    "tasks null": (lambda f: edited(f, tasks=None), SETTINGS),
    "task without head": (lambda f: edited(f, tasks=[{"name": "x", "text": ["a"]}]), SETTINGS),
    "trunk a number": (lambda f: edited(f, trunk=3), SETTINGS),
    "batch null": (lambda f: edited(f, batch=None), SETTINGS),
    "other tasks": (lambda f: edited(f, tasks=["sst2"]), WEIGHTS),
    "a thousand million entries": (lambda f: edited(f, trunk={"vocab_size": 10**9}), SETTINGS),
    "huge": (lambda f: edited(f, trunk={"vocab_size": 2**24, "hidden_size": 2**16, "num_heads": 1}), WEIGHTS),
    "deep": (lambda f: edited(f, trunk={"num_layers": 4096}), WEIGHTS),
    "tokenizer gone": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "tokenizer cut": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json"),
}


@pytest.mark.parametrize(("damage", "named"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_engine_is_refused_by_file(damage, named, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    damage(folder)
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (what is named is checked)
        Engine.load(folder, device="cpu")
    assert str(folder / named) in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_the_copy_loads_where_nothing_is_done_to_it(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    engine = Engine.load(folder, device="cpu")
    for name, weight in load_file(folder / WEIGHTS).items():
        assert torch.equal(engine.model.state_dict()[name], weight)


@pytest.mark.parametrize("folder", ["absent", "empty", "file"])
def test_where_there_is_nothing_it_is_said(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"engine: .*{folder} (is no folder|has no engine.json)"):
        Engine.load(tmp_path / folder)


def test_the_weights_of_another_are_not_overwritten(saved, tmp_path):
    (tmp_path / WEIGHTS).write_bytes(b"theirs")
    with pytest.raises(ValueError, match="holds a checkpoint that is not ours"):
        Engine.load(saved, device="cpu").save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {WEIGHTS: b"theirs"}


# Runs


def test_a_checkpoint_of_a_run_can_be_asked(finished: Finished, capsys):
    best = Engine.load(finished.run / "checkpoints" / "best", device="cpu")
    tensors, _ = checkpoint.load(finished.run / "checkpoints" / "best")
    for name, weight in tensors["model"].items():
        assert torch.equal(best.model.state_dict()[name], weight)
    text = tiny_rows("colour", 1, seed=3)[0]["text"]
    step = Engine.load(finished.run / "checkpoints" / "step-24", device="cpu")
    last = Engine.load(finished.run, device="cpu")
    assert step.predict([text], tasks=["colour"]) == last.predict([text], tasks=["colour"])
    assert step.config == last.config
    assert capsys.readouterr().err == ""


def test_an_unfinished_run_answers_from_its_newest_checkpoint(finished: Finished, tmp_path, capsys):
    run = shutil.copytree(finished.run, tmp_path / "run")
    shutil.rmtree(run / "model")
    (run / "checkpoints" / "step-24" / "state.json").write_text("{}")
    engine = Engine.load(run, device="cpu")
    said = capsys.readouterr().err
    assert "step-24 is passed over" in said
    assert f"the run {run} is not finished: this is step-20" in said
    tensors, _ = checkpoint.load(run / "checkpoints" / "step-20")
    assert torch.equal(engine.model.state_dict()["weight"], tensors["model"]["weight"])
    (run / "config.yaml").write_text("tasks: [")
    with pytest.raises(ValueError, match=r"config.yaml is damaged"):
        Engine.load(run)


def test_a_run_is_scored_from_anywhere(finished: Finished, tmp_path, monkeypatch):
    """Its data was named relative to the YAML, which was named relative to the folder it was started in."""
    monkeypatch.chdir(finished.config.parent.parent)
    relative = finished.config.relative_to(finished.config.parent.parent)
    engine = Engine.from_config(load_config(relative, [f"run={tmp_path / 'run'}", "steps=1", "data=some/where"]))
    engine.fit()
    monkeypatch.chdir(tmp_path)
    again = Engine.load(tmp_path / "run", device="cpu")
    assert again.config.data == str(finished.config.parent.parent / "some" / "where")
    assert again.evaluate(2).keys() == {task.name for task in engine.tasks}


# A start from an engine of ours


def started(init: Path, tasks: list[Task], **settings) -> Engine:
    engine = Engine(tasks=tasks, init=str(init), batch={"max_length": 48}, device="cpu", **settings)
    engine.build(Tokenizer.load(str(init)))
    return engine


def test_heads_whose_tasks_are_the_same_are_kept(tmp_path, capsys):
    """Wherever they stand among the others."""
    first = made(tmp_path / "first", [SCORE, KIND, TAGS, SPAN, TEXT], projection="gelu")
    theirs = Engine.load(first, device="cpu")
    theirs.model.set_units({[task.name for task in theirs.tasks].index("score"): torch.tensor([3.0, 9.0]).numpy()})
    theirs.save(first)
    other = replace(TAGS, labels=("O", "Y", "X"))
    new = Task("aa", "classify", ("text",), "label", ("a", "b", "c"))
    ours = started(first, [new, other, KIND, SCORE, TEXT, SPAN], projection="gelu")
    assert "heads of kind, score, span, text are kept; new: aa, tags" in " ".join(capsys.readouterr().out.split())
    x = torch.randn(4, 32)
    for place, task in enumerate(ours.tasks):
        their_place = [one.name for one in theirs.tasks].index(task.name) if task.name != "aa" else None
        if task.name in ("aa", "tags"):
            if their_place is not None:
                assert not torch.equal(ours.model.logits(x, place), theirs.model.logits(x, their_place))
        else:
            assert torch.equal(ours.model.logits(x, place), theirs.model.logits(x, their_place)), task.name


def test_heads_behind_another_projection_are_new(tmp_path, capsys):
    first = made(tmp_path / "first", [KIND])
    started(first, [KIND], projection="tanh")
    assert "heads of no task are kept; new: kind" in capsys.readouterr().out


def test_a_run_goes_on_where_its_start_was(finished: Finished, tmp_path):
    """A first look before the first step finds the losses of the end."""
    config = load_config(finished.config, [f"init={finished.run}", f"run={tmp_path / 'run'}", "steps=1", "trunk={}"])
    summary = Engine.from_config(config).fit()
    before = json.loads((finished.run / "summary.json").read_text())["tasks"]
    for name, task in summary["tasks"].items():
        assert task["first_loss"] == pytest.approx(before[name]["last_loss"], rel=0.05), name


def test_a_random_vocabulary_head_is_not_begun_with_in_silence(tmp_path, capsys):
    shape = {"vocab_size": 300, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "max_positions": 64}
    gated = {"positions": "rotary", "norm": "rms", "activation": "swiglu", "bias": False, "tie_vocabulary": False}
    trunk = Trunk(TrunkConfig(**shape, **gated))
    trunk.save_pretrained(tmp_path)
    Tokenizer.train(["a good film, a bad film"], 280).save(tmp_path)
    started(tmp_path, [TEXT])
    assert "has no vocabulary head (lm_head): that of text starts from random numbers" in capsys.readouterr().out
    started(tmp_path, [KIND])
    assert "random" not in capsys.readouterr().out
    trunk.save_pretrained(tmp_path, torch.randn(300, 32))
    started(tmp_path, [TEXT])
    assert "random" not in capsys.readouterr().out


def test_loading_waits_for_no_compiler(tmp_path):
    """Half of the time from the command to a server that answers was torch's compiler being imported."""
    answering_engine().save(tmp_path / "saved")
    script = "import sys; from trunkline import Engine; Engine.load(sys.argv[1]); print('torch._dynamo' in sys.modules)"
    said = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "saved"], capture_output=True, text=True, timeout=300, check=True
    )
    assert said.stdout == "False\n"
