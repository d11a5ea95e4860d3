"""Answers to the rows of a file: of every head, in the order of the rows, and a bad row is named."""

import json
from pathlib import Path

import pytest

from conftest import tiny_rows, write_jsonl
from trunkline import Engine
from trunkline.training import predict
from trunkline.training.cli import main
from trunkline.training.data.sources import rows_of_file

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 7


@pytest.fixture(scope="module")
def engine(lively) -> Engine:
    return Engine.load(lively, device="cpu")


@pytest.fixture
def file(tmp_path) -> Path:
    """With the text columns of all tasks of the tiny run but one."""
    columns: dict[str, list[str]] = {}
    for task in ("colour", "where", "retell"):
        for name in ("text", "question", "context", "document"):
            own = [row[name] for row in tiny_rows(task, COUNT, seed=2) if name in row]
            columns |= {name: own} if own else {}
    write_jsonl(
        tmp_path / "new.jsonl", [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    )
    return tmp_path / "new.jsonl"


def test_all_tasks_answer_whose_columns_the_file_has(engine, file, monkeypatch):
    monkeypatch.setattr(predict, "AT_ONCE", 3)
    answers = list(predict.of_file(engine, file, []))
    assert {tuple(answer) for answer in answers} == {
        ("text", "question", "context", "document", "colour", "parts", "where", "retell")
    }
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [{name: answer[name] for name in rows[0]} for answer in answers] == rows
    texts = [row["text"] for row in rows]
    for task in ("colour", "parts"):
        assert [answer[task] for answer in answers] == engine.predict(texts, [task])[task]
    pairs = [(row["question"], row["context"]) for row in rows]
    assert [answer["where"] for answer in answers] == engine.predict(pairs, ["where"])["where"]
    assert all(answer["where"] in answer["context"] for answer in answers)  # a span is words of the text
    assert all(len(answer["parts"]) == len(answer["text"].split()) for answer in answers)  # a tag for every word
    assert [answer["retell"] for answer in answers] == engine.generate([row["document"] for row in rows], "retell")
    assert len({answer["retell"] for answer in answers}) > 1


def test_answers_are_made_while_they_are_asked_for(engine, monkeypatch):
    monkeypatch.setattr(predict, "AT_ONCE", 3)
    taken = 0

    def rows():
        nonlocal taken
        while True:  # there is no end to them
            taken += 1
            yield {"colour": (f"the red cow number {taken}",)}

    for answered, (row, said) in zip(range(1, 8), predict.answers(engine, rows()), strict=False):
        assert row["colour"][0].endswith(f" {answered}")
        assert set(said) == {"colour"}
        assert answered <= taken < answered + 3


def test_the_rows_of_a_file_are_read_while_they_are_answered(engine, tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("text\n" + "a red cow\n" * 20)
    read = []

    def counted(*arguments):
        read.append(0)
        for row in rows_of_file(*arguments):
            read[-1] += 1
            yield row

    monkeypatch.setattr(predict, "AT_ONCE", 3)
    monkeypatch.setattr(predict, "rows_of_file", counted)
    for answered, _ in enumerate(predict.of_file(engine, tmp_path / "a.csv", ["colour"]), 1):
        assert read[0] == 20  # all of them are checked first
        assert answered <= read[1] < answered + 3
    assert answered == 20


def test_a_row_without_text_is_found_before_any_answer(lively, tmp_path, capsys):
    (tmp_path / "new.csv").write_text("text\n" + "a cow\n" * 600 + " \n" + "a cow\n")
    assert main(["predict", str(lively), "--task", "colour", "--file", str(tmp_path / "new.csv")]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == (
        "",
        "trunkline: predict: task 'colour': column 'text' is empty (new.csv, row 601)\n",
    )


def test_lines_are_answered_a_few_at_a_time(engine, monkeypatch):
    lines = [row["text"] for row in tiny_rows("colour", COUNT, seed=2)]
    whole = list(predict.of_lines(engine, lines, []))
    monkeypatch.setattr(predict, "AT_ONCE", 2)
    assert list(predict.of_lines(engine, lines, [])) == whole
    assert [answer["text"] for answer in whole] == lines
    assert list(whole[0]) == ["text", "colour", "parts", "retell"]


def test_some_tasks_can_be_asked(engine, file):
    assert {tuple(answer) for answer in predict.of_file(engine, file, ["parts"])} == {("text", "parts")}


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("text\na cow\n \n", ["--task", "colour"], "predict: task 'colour': column 'text' is empty (new.csv, row 2)"),
        ("text\na cow\n", ["--task", "where"], "predict: new.csv has no column 'question'"),
        ("txt\na cow\n", [], "predict: new.csv has no column 'text'"),
        ("text\na cow\n", ["--task", "color"], "predict: no task 'color'; there are colour, "),
        ("text\na cow\n", ["a text"], "predict: a text 'a text' and --file "),
        ("text\na,cow\n", [], "new.csv, row 1: expected 1 fields, as in the header, got 2"),
    ],
)
def test_what_cannot_be_answered_is_named(lively, tmp_path, capsys, content, arguments, message):
    (tmp_path / "new.csv").write_text(content)
    assert main(["predict", str(lively), "--file", str(tmp_path / "new.csv"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_none_is_named(lively, tmp_path, capsys):
    assert main(["predict", str(lively), "--file", str(tmp_path / "new.xlsx")]) == 2
    said = capsys.readouterr().err
    assert "expected a .csv, .tsv, .jsonl, .json or .parquet file; " in said
    assert "new.xlsx' is a spreadsheet: save it as CSV" in said
    assert main(["predict", str(lively), "--file", str(tmp_path / "none.csv")]) == 2
    assert "none.csv: No such file or directory" in capsys.readouterr().err
