"""`trunkline init` of tables that nothing can be learnt from, and of flags that cannot be: what it says."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from own_tables import colour, rows, table, text

from trunkline.training.cli import main

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """What init says of a table that it writes no config for."""

    def run(*arguments: str | Path) -> str:
        assert main(["init", *map(str, arguments)]) == 2
        assert not list(Path().glob("*.yaml"))
        return capsys.readouterr().err

    return run


def test_more_labels_than_a_task_can_have(refused):
    table("own.csv", rows(400, topics=lambda i, rng: f"t{i % 32}|u{i % 32}"))
    said = refused("own.csv", "--label", "topics")
    assert "own.csv: 'topics' has 64 different labels, and head 'multi-label' takes 63: write the rare ones as" in said


def test_no_header(refused):
    Path("own.csv").write_text("".join(f"{text(random.Random(i))},{'no' if i % 2 else 'yes'}\n" for i in range(60)))
    assert "own.csv seems to have no header: 'yes' in its first line" in refused("own.csv")
    Path("own.csv").write_text("".join(f"{i},{text(random.Random(i))}\n" for i in range(60)))
    said = refused("own.csv")
    assert "'0' in its first line is no name" in said
    assert "such as column1,column2" in said


def test_one_column(refused):
    table("own.csv", [{"grade": i % 3} for i in range(60)])
    assert "own.csv has no column of texts to read: grade (numbers); --text names one" in refused("own.csv")


def test_labels_that_are_all_different(refused):
    table("own.csv", rows(60, label=lambda i, rng: f"key{i}"))
    said = refused("own.csv", "--label", "label")
    assert refused("own.csv") == said  # its name says that it is the label
    assert "--head language-model learns the texts alone" in said
    assert "'label' has 60 different values in 60 rows, such as 'key0'" in said
    assert "a class needs several rows" in said


def test_one_class_only(refused):
    table("own.csv", rows(60, label=lambda i, rng: "spam"))
    for flags in (["--label", "label"], []):
        assert "'label' is 'spam' in all 60 rows that have a label: with one class" in refused("own.csv", *flags)


def test_hardly_any_labels(refused):
    table("own.csv", rows(400, label=lambda i, rng: "ab"[i % 2] if i < 10 else ""))
    assert "10 of 400 rows have a text and a label in 'label'; it takes 20" in refused("own.csv", "--label", "label")


def test_no_labels_at_all(refused):
    table("own.csv", rows(60, label=lambda i, rng: ""))
    assert "'label' is empty in all 60 rows" in refused("own.csv", "--label", "label")


def test_numbers_with_words_among_them(refused):
    table("own.csv", rows(100, price=lambda i, rng: "free" if i == 41 else i / 4))
    assert "'price' has numbers but for 1 of 100 rows, such as 'free' in row 42" in refused(
        "own.csv", "--label", "price"
    )


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("own.csv", b"%PDF-1.7 \x00\x01", "is no table but a PDF; it takes a .csv"),
        ("own.csv", b"<!DOCTYPE html>\n<html>", "is no table but a web page"),
        ("own.csv", b"PK\x03\x04\x14", "is no table but a ZIP archive, as .xlsx"),
        ("own.csv", b"", "is empty"),
        ("own.csv", b"text,label\n", "has no rows"),
        ("own.csv", b"text,label\na,b\nc\n", "row 2: expected 2 fields"),
        ("own.xlsx", b"PK\x03\x04", "is a spreadsheet: save it as CSV"),
        ("own.docx", b"PK\x03\x04", "own.docx"),
        ("own.jsonl", b"[1, 2]\n", "expected a JSON object"),
        ("own.json", b'{"a": 1}', "expected a JSON array"),
        ("own.parquet", b"PAR1", "is not a valid Parquet file"),
    ],
)
def test_what_is_no_table(refused, name, content, said):
    Path(name).write_bytes(content)
    assert said in refused(name)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--trunk tinny", "--trunk 'tinny' is no preset; there are tiny"),
        ("--trunk tiny --init x/y", "give one of them"),
        ("--steps 0", "--steps must be above 0, got 0"),
        ("--minutes nan", "--minutes must be above 0, got nan"),
        ("--encoding utf-9", "--encoding 'utf-9' is unknown"),
        ("--metric acuracy", "unknown metric 'acuracy'; the nearest known is 'accuracy'"),
        ("--labels red,blue", "--labels lacks 'green'; 'label' has blue, green, red"),
        ("--labels [", "line 1"),
        ("--validation 1.5", "got '1.5'"),
        ("--label label --text label", "cannot be both the label and a text"),
    ],
)
def test_flags_that_cannot_be(refused, flags, said):
    table("own.csv", rows(60, label=colour))
    assert said in refused("own.csv", *flags.split())


def test_files_and_columns_that_are_not_there(refused):
    table("own.csv", rows(60, label=colour))
    assert "cannot read" in refused("other.csv")
    assert "own.csv has no column 'lable'; it has text, label" in refused("own.csv", "--label", "lable")
    assert "no head 'clasify'; did you mean 'classify'" in refused("own.csv", "--head", "clasify")
    table("own_train.csv", rows(60, label=colour))
    assert "both the train rows of 'own'" in refused("own.csv", "own_train.csv")
