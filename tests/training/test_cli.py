"""The command, as a user types it: every subcommand, and what it says of mistakes."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Finished, write_jsonl
from trunkline.training.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

SENTENCE = "the red cat is in the barn"


def test_train_prints_scores_and_where_the_report_is(finished: Finished):
    for word in ("colour", "accuracy", "majority class", "closeness", "pearson", "retell", "rouge1"):
        assert word in finished.output
    assert str(finished.run / "report.html") in finished.output
    summary = json.loads((finished.run / "summary.json").read_text())
    assert summary["command"].endswith(f"train {finished.config} run={finished.run}")


def test_eval_scores_all_tasks(finished, trunkline):
    scores = json.loads(trunkline("eval", finished.run, "--examples", "5").stdout)
    assert set(scores) == {"colour", "closeness", "parts", "where", "retell", "prose"}
    assert 0 <= scores["colour"]["accuracy"] <= 1
    assert scores["retell"].keys() >= {"loss", "rouge1"}


def test_predict_answers_arguments(finished, trunkline):
    (line,) = trunkline("predict", finished.run, SENTENCE).stdout.splitlines()
    answer = json.loads(line)
    assert set(answer) == {"text", "colour", "parts", "retell"}  # the tasks on one text
    assert answer["text"] == SENTENCE
    assert len(answer["parts"]) == 7


def test_predict_answers_lines_of_pairs(finished, trunkline):
    given = f"{SENTENCE}\tthe owl is in the house\n{SENTENCE}\t{SENTENCE}\n"
    answers = [
        json.loads(line)
        for line in trunkline("predict", finished.run, "--task", "closeness", stdin=given).stdout.splitlines()
    ]
    assert [set(answer) for answer in answers] == [{"text", "closeness"}] * 2


def test_tasks_lists_every_task(trunkline):
    listed = trunkline("tasks").stdout
    for name in ("cola", "sst2", "wnli", "dialogsum", "snli", "sentiment"):
        assert f" {name} " in listed
    assert "4,000" in listed  # of the generated ones


def test_doctor_checks_installation_and_data(tiny_config, trunkline):
    told = trunkline("doctor", tiny_config).stdout
    assert "largest error" in told
    assert "60 train" in told
    assert "the data is ready" in told


@pytest.mark.parametrize("command", ["doctor", "train"])
def test_a_bad_label_is_named_before_the_first_step(trunkline, tmp_path, command):
    rows = [{"text": SENTENCE, "label": "red"}] * 30
    write_jsonl(tmp_path / "good.jsonl", rows)
    write_jsonl(tmp_path / "bad.jsonl", [*rows[:11], {"text": SENTENCE, "label": "green"}, *rows])
    (tmp_path / "own.yaml").write_text(
        "tasks: [{name: colour, head: classify, text: [text], label: label, labels: [red, black], "
        "train: bad.jsonl, validation: good.jsonl}]\nvocab_size: 400\n"
    )
    said = trunkline(command, tmp_path / "own.yaml", *([f"run={tmp_path / 'run'}"] * (command == "train")), expect=2)
    for word in ("task 'colour'", "bad.jsonl, row 12", "'green'", "red, black"):
        assert word in said.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_unknown_key_names_the_nearest(tiny_config, trunkline):
    said = trunkline("train", tiny_config, "stepz=3", expect=2)
    assert said.stderr == "trunkline: config: unknown key 'stepz'; did you mean 'steps'?\n"


def test_help_of_train_explains_every_setting(trunkline):
    told = trunkline("train", "--help").stdout
    for words in ("--optimizer.learning_rate", "Highest learning rate.", "--batch.accumulate", "--trunk.num_kv_heads"):
        assert words in told


def test_report_is_written_anew(finished, trunkline):
    page = finished.run / "report.html"
    before = page.read_text()
    page.unlink()
    assert trunkline("report", finished.run).stdout.strip() == str(page)
    assert page.read_text() == before


# In this process: what needs no program of its own


@pytest.fixture
def here(capsys) -> Callable[..., str]:
    """Runs a command that the user has got wrong and returns what it says."""

    def run(*arguments: str | Path) -> str:
        assert main([*map(str, arguments)]) == 2
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize("order", ["CONFIG --resume stepz=1", "--resume CONFIG stepz=1", "CONFIG stepz=1 --resume"])
def test_values_may_stand_after_options(tiny_config, here, order):
    """As argparse alone allows it from Python 3.13 on only."""
    arguments = [tiny_config if word == "CONFIG" else word for word in order.split()]
    assert here("train", *arguments) == "trunkline: config: unknown key 'stepz'; did you mean 'steps'?\n"


@pytest.mark.parametrize("arguments", [["train", "c.yaml", "--resme"], ["report", "run", "more"], ["eval"], []])
def test_arguments_that_mean_nothing_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: trunkline" in capsys.readouterr().err


def test_predict_says_what_it_lacks(finished, here, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "no text, neither as an argument nor on standard input" in here("predict", finished.run)
    assert "no task takes all of these texts" in here("predict", finished.run, "one", "two\tparts")
    assert "no task takes all of these texts" in here("predict", finished.run, "one\ttwo\tthree")
    assert "task 'closeness' takes 2 text(s)" in here("predict", finished.run, "--task", "closeness", "one")
    assert "no task 'color'" in here("predict", finished.run, "--task", "color", "one")


def test_missing_files_and_folders_are_named(tmp_path, here):
    assert "absent.yaml" in here("train", tmp_path / "absent.yaml")
    assert "has no engine.json" in here("eval", tmp_path)
    assert "has no engine.json" in here("predict", tmp_path, "text")
    assert "it holds no metrics.jsonl" in here("report", tmp_path)


def test_a_run_is_not_replaced_or_resumed_by_mistake(finished, here, tmp_path):
    assert "holds a run: resume it (--resume)" in here("train", finished.config, f"run={finished.run}")
    assert "no checkpoints to resume from" in here("train", finished.config, f"run={tmp_path}", "--resume")
    said = here("train", finished.config, f"run={finished.run}", "--resume", "batch.tokens=256")
    assert "batch.tokens: 512 in the checkpoint, 256 now" in said


def test_predict_and_data_of_another_folder(finished, capsys):
    """Options may come in between."""
    assert main(["predict", str(finished.run), "--task", "colour", SENTENCE, "--task", "retell", "the white hen"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [list(answer) for answer in answers] == [["text", "colour", "retell"]] * 2
    assert [answer["text"] for answer in answers] == [SENTENCE, "the white hen"]


def test_tasks_counts_what_a_folder_has(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    (tmp_path / "glue" / "sst2").mkdir(parents=True)
    for split, count in (("train", 7), ("validation", 3)):
        rows = [{"sentence": "fine", "label": 1}] * count
        write_jsonl(tmp_path / "glue" / "sst2" / f"{split}.jsonl", rows)
    assert main(["tasks", "--data", str(tmp_path)]) == 0
    listed = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert listed["sst2"] == ["sst2", "classify", "accuracy", "7", "3", "nyu-mll/glue", "sst2"]
    assert "there" in listed["cola"]
    assert "4,000" in listed["sentiment"]
