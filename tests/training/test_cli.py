"""The command, as a user types it: every subcommand, and what it says of mistakes."""

import io
import json
import subprocess
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from conftest import Finished, command_line, write_jsonl
from trunkline import Task
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
    assert "attention" in told
    assert "of what is allowed" in told
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
    for words in ("--optimizer.learning_rate", "Highest learning rate;", "--batch.accumulate", "--trunk.num_kv_heads"):
        assert words in told
    for words in ("--tasks[i].head", "Column with the label"):
        assert words in told
    for words in (".help", "Path to a configuration file"):  # which there are not
        assert words not in told


def test_a_task_is_explained_to_help():
    explained = Task.__doc__ or ""
    assert [field.name for field in fields(Task) if f"\n        {field.name}: " not in explained] == []


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
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    assert "no text, neither as an argument nor on standard input" in here("predict", finished.run)
    assert "no task takes all of these texts" in here("predict", finished.run, "one", "two\tparts")
    assert "no task takes all of these texts" in here("predict", finished.run, "one\ttwo\tthree")
    assert "task 'closeness' takes 2 text(s)" in here("predict", finished.run, "--task", "closeness", "one")
    assert "no task 'color'" in here("predict", finished.run, "--task", "color", "one")


@pytest.fixture
def typed(monkeypatch) -> Callable[[bytes], None]:
    """Sets standard input."""
    return lambda data: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_lines_may_end_as_on_windows(finished, typed, capsys):
    typed(b"\xef\xbb\xbfthe red cat\r\nthe hen\xe2\x80\xa8is in\r\n")
    assert main(["predict", str(finished.run), "--task", "colour"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]
    assert [answer["text"] for answer in answers] == ["the red cat", "the hen\u2028is in"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"a cow\ncaf\xe9 closed\n", "standard input is not UTF-8: byte 0xe9 in line 2; 'iconv -f LATIN1"),
        (b"a cow\n" * 299 + b"\na hen\n", "predict: line 300 of 301 is blank"),
        (b"a cow\n\n", "predict: line 2 of 2 is blank"),
        (b"a cow\n" * 299 + b"a\then\n", "line 300 has 2 parts, line 1 has 1; a tab parts two texts of a pair"),
    ],
)
def test_a_bad_line_is_named_before_any_answer(finished, typed, capsys, data, words):
    typed(data)
    assert main(["predict", str(finished.run)]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.out == ""


def test_a_text_that_does_not_fit_is_named_before_any_answer(finished, capsys):
    assert main(["predict", str(finished.run), "--task", "closeness", *["a\tb"] * 300, "a"]) == 2
    said = capsys.readouterr()
    assert "task 'closeness' takes 2 text(s) ['first', 'second'], got ('a',) as text 301" in said.err
    assert said.out == ""
    assert main(["predict", str(finished.run), "a cow", "caf\udce9"]) == 2  # as an argument with a byte 0xe9 comes
    assert "a text has bytes that are no characters here: b'caf\\xe9'" in capsys.readouterr().err


@pytest.mark.parametrize("before", [["--task", "colour"], ["first", "--task", "colour"]])
def test_a_text_after_two_hyphens_may_begin_with_one(finished, capsys, before):
    assert main(["predict", str(finished.run), *before, "--", "--task", "-1 star", "--"]) == 0
    answers = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert answers == [*before[:-2], "--task", "-1 star", "--"]


def test_output_that_cannot_show_a_character_is_json_all_the_same(finished, capsys, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="latin-1"))
    assert main(["predict", str(finished.run), "--task", "colour", "plain", "\u2764 \U0001f600"]) == 0
    answers = [json.loads(line)["text"] for line in written.getvalue().decode("latin-1").splitlines()]
    assert answers == ["plain", "\u2764 \U0001f600"]


def test_output_that_nobody_reads_ends_the_command(finished):
    program, environment = command_line("predict", finished.run, "--task", "colour", *[SENTENCE] * 3000)
    with subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert json.loads(running.stdout.readline())["text"] == SENTENCE
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 141


def test_train_without_a_config_asks_for_one(capsys):
    with pytest.raises(SystemExit):
        main(["train"])
    assert "the following arguments are required: CONFIG.yaml\n" in capsys.readouterr().err


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
