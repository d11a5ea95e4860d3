"""Answers to the rows of a file: of every head, in the order of the rows, and a bad row is named."""

import csv
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
        "trunkline: predict: task 'colour': column 'text' is empty: leave out rows that have no text "
        "(new.csv, row 601)\n",
    )


def test_lines_are_answered_a_few_at_a_time(engine, monkeypatch):
    lines = [row["text"] for row in tiny_rows("colour", COUNT, seed=2)]
    whole = list(predict.of_lines(engine, lines, []))
    monkeypatch.setattr(predict, "AT_ONCE", 2)
    assert list(predict.of_lines(engine, lines, [])) == whole
    assert [answer["text"] for answer in whole] == lines
    assert list(whole[0]) == ["text", "colour", "parts", "retell"]


def test_some_tasks_can_be_asked(engine, file):
    assert {tuple(answer) for answer in predict.of_file(engine, file, ["parts"])} == {
        ("text", "question", "context", "document", "parts")
    }


def test_other_columns_come_along_and_none_is_lost_to_an_answer(engine, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"id": 7, "text": "a cow", "colour": "red"}, {"text": "a dog", "more": None}])
    first, second = predict.of_file(engine, tmp_path / "a.jsonl", ["colour"])
    answers = engine.predict(["a cow", "a dog"], ["colour"])["colour"]
    assert first == {"id": 7, "text": "a cow", "colour (given)": "red", "colour": answers[0]}
    assert second == {"text": "a dog", "more": None, "colour": answers[1]}
    write_jsonl(tmp_path / "b.jsonl", [{"text": "a cow"}, {"id": 8}])
    with pytest.raises(ValueError, match=r"predict: b.jsonl, row 2: no key 'text', found \['id'\]"):
        list(predict.of_file(engine, tmp_path / "b.jsonl", ["colour"]))


def test_answers_are_written_as_a_table(lively, engine, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("new.csv").write_text('id;text\n7;"a ""big"" cow,\nbrün"\n8;a dog\n', encoding="windows-1252")
    given = ["predict", str(lively), "--task", "colour", "--task", "parts", "--file", "new.csv"]
    assert main([*given, "--encoding", "windows-1252", "--out", "said.csv"]) == 0
    with open("said.csv", encoding="utf-8", newline="") as file:
        said = list(csv.DictReader(file))
    answers = engine.predict([row["text"] for row in said], ["colour", "parts"])
    assert [(row["id"], row["text"]) for row in said] == [("7", 'a "big" cow,\nbrün'), ("8", "a dog")]
    assert [row["colour"] for row in said] == answers["colour"]
    assert [json.loads(row["parts"]) for row in said] == answers["parts"]
    assert main([*given, "--encoding", "windows-1252", "--out", "said.jsonl"]) == 0
    lines = [json.loads(line) for line in Path("said.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line | {"parts": json.dumps(line["parts"])} for line in lines] == said
    assert main([*given, "--encoding", "windows-1252", "--scores", "--out", "sure.csv"]) == 0
    with open("sure.csv", encoding="utf-8", newline="") as file:
        sure = list(csv.DictReader(file))
    scored = engine.predict([row["text"] for row in said], ["colour"], scores=True)["colour"]
    assert [row["colour"] for row in sure] == answers["colour"]
    assert [float(row["colour (score)"]) for row in sure] == pytest.approx([one["score"] for one in scored], abs=1e-6)
    Path("sure.csv").unlink()
    capsys.readouterr()
    for arguments, message in (
        (["--out", "said.txt"], "--out said.txt: answers are written as .csv or .jsonl"),
        (["--out", "new.csv"], "--out new.csv is the file that is read"),
        (["--encoding", "base64"], "--encoding 'base64' is unknown"),
        (["--out", "said.csv"], "or --encoding windows-1252 in a command"),
    ):
        assert main([*given, *arguments]) == 2
        assert message in capsys.readouterr().err
    with open("said.csv", encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == said  # as it was
    assert sorted(path.name for path in Path().iterdir()) == ["new.csv", "said.csv", "said.jsonl"]


def test_a_table_has_the_columns_of_its_first_row(engine, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a cow"}, {"text": "a dog", "id": 8}])
    with pytest.raises(ValueError, match="row 2 has other keys than the first: --out FILE.jsonl takes them"):
        predict.write_answers(predict.of_file(engine, tmp_path / "a.jsonl", ["colour"]), tmp_path / "a.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("text\na cow\n \n", ["--task", "colour"], "predict: task 'colour': column 'text' is empty: leave"),
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
