"""`trunkline init`: what it writes, every flag, and what it says of tables that nothing can be learnt from."""

import csv
import json
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import command_line
from trunkline.engine.yaml_file import read_yaml
from trunkline.training.cli import main
from trunkline.training.config_file import load_config
from trunkline.training.data.sources import read_rows
from trunkline.training.starting import length

WORDS = "the red cat is in old barn with some more words than one can read at night".split()


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """In a folder of its own, on a machine that takes half a second for a step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(length, "seconds_per_step", lambda preset: 0.5)


def text(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(4, 12)))


def rows(count: int = 60, **columns: Callable[[int, random.Random], Any]) -> list[dict[str, Any]]:
    rng = random.Random(0)
    columns = {"text": lambda i, rng: f"{text(rng)} {i}", **columns}
    return [{name: cell(i, rng) for name, cell in columns.items()} for i in range(count)]


def table(name: str, records: list[dict[str, Any]], encoding: str = "utf-8") -> Path:
    path = Path(name)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding=encoding)
    else:
        with path.open("w", encoding=encoding, newline="") as file:
            writer = csv.DictWriter(file, [*records[0]])
            writer.writeheader()
            writer.writerows(records)
    return path


def colour(i: int, rng: random.Random) -> str:
    return rng.choice(["red", "green", "blue"])


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """What init says of a table that it writes no config for."""

    def run(*arguments: str | Path) -> str:
        assert main(["init", *map(str, arguments)]) == 2
        assert not list(Path().glob("*.yaml"))
        return capsys.readouterr().err

    return run


# What it writes


def test_the_file_says_why_and_the_commands_that_follow(capsys):
    table("tickets.csv", rows(200, queue=colour, created=lambda i, rng: f"2024-01-{i % 28 + 1:02}"))
    assert main(["init", "tickets.csv"]) == 0
    told = capsys.readouterr().out
    assert told.splitlines()[0] == "tickets.csv: 200 rows, columns text, queue, created"
    assert told.splitlines()[-3:] == [
        "wrote tickets.yaml; what follows:",
        "  trunkline train tickets.yaml",
        "  trunkline predict runs/tickets --file NEW.csv",
    ]
    written = Path("tickets.yaml").read_text(encoding="utf-8").splitlines()
    assert written[0] == "# yaml-language-server: $schema=.trunkline.schema.json"
    assert "`trunkline init tickets.csv`" in written[1]
    assert "    head: classify  # 'queue' has 3 different values" in written
    assert "    text: [text]  # not read: created (dates)" in written
    assert json.loads(Path(".trunkline.schema.json").read_text())["title"] == "A training run of Trunkline"
    config = load_config(Path("tickets.yaml"))
    assert (config.all_tasks[0].labels, config.all_tasks[0].validation) == (("blue", "green", "red"), 0.1)
    assert config.run == "runs/tickets"


def test_what_it_writes_trains_and_answers(capsys, one_thread):
    words = ["down", "up"]
    table("own.csv", rows(80, text=lambda i, rng: f"{words[i % 2]} {i}", label=lambda i, rng: ["no", "yes"][i % 2]))
    assert main(["init", "own.csv", "--steps", "8"]) == 0
    small = ["trunk={hidden_size: 16, num_layers: 1, num_heads: 2}", "vocab_size=300", "batch={tokens: 256}"]
    assert main(["train", "own.yaml", *small]) == 0, capsys.readouterr().err
    assert "ask it: trunkline predict runs/own --file NEW.csv --out" in capsys.readouterr().out
    assert main(["predict", "runs/own", "--file", "own.csv"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"text"')]
    assert len(answers) == 80
    assert {answer["own"] for answer in answers} <= {"yes", "no"}


def test_no_text_is_on_both_sides_of_the_split():
    records = rows(300, text=lambda i, rng: f"Text  {rng.randint(0, 99)}", label=colour)
    records += [{**record, "text": record["text"].upper().replace("  ", " ")} for record in records]
    table("own.csv", records)
    assert main(["init", "own.csv"]) == 0
    (task,) = load_config(Path("own.yaml")).all_tasks
    sides = [
        {" ".join(text.split()).casefold() for text in read_rows(task, split).columns["text"]}
        for split in ("train", "validation")
    ]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_files_named_by_split_are_one_task_and_others_a_task_each(capsys):
    table("farm-train.csv", rows(60, label=colour))
    table("farm_dev.csv", rows(30, label=colour, text=lambda i, rng: f"dev {i}"))
    table("farm.test.csv", rows(30, label=colour))
    table("prices.csv", rows(60, price=lambda i, rng: rng.random(), score=lambda i, rng: rng.random()))
    assert main(["init", "farm-train.csv", "farm_dev.csv", "farm.test.csv", "prices.csv", "--out", "both.yaml"]) == 0
    farm, prices = load_config(Path("both.yaml")).all_tasks
    assert (farm.name, farm.train, farm.validation) == ("farm", "farm-train.csv", "farm_dev.csv")
    assert (prices.name, prices.head, prices.label, prices.validation) == ("prices", "regress", "score", 0.1)
    assert "farm.test.csv is left alone" in capsys.readouterr().out


def test_a_validation_file_is_compared_with_the_training_rows(capsys):
    records = rows(60, label=colour)
    table("train.csv", records)
    table("valid.csv", [*records[:7], *rows(5, text=lambda i, rng: f"new {i}", label=lambda i, rng: "pink")])
    assert main(["init", "train.csv", "valid.csv", "--name", "farm"]) == 0
    told = capsys.readouterr().out
    assert "7 of 12 rows of valid.csv have a text that is trained on, too" in told
    assert "class 'pink' is in valid.csv only" in told
    assert load_config(Path("farm.yaml")).all_tasks[0].labels == ("blue", "green", "red", "pink")


def test_the_yaml_finds_its_files_from_its_own_folder():
    Path("data").mkdir()
    table("data/own.csv", rows(60, label=colour))
    assert main(["init", "data/own.csv", "--out", "configs/own.yaml"]) == 0
    config = load_config(Path("configs/own.yaml"))
    assert config.all_tasks[0].train == "../data/own.csv"
    assert len(read_rows(config.all_tasks[0], "train", base=Path(config.base))) == 54


def test_every_guess_can_be_given(capsys):
    table("own.csv", rows(60, title=lambda i, rng: text(rng), a=colour, b=lambda i, rng: i % 4))
    flags = "--label b --text title --text text --head classify --labels 3,2,1,0 --metric macro_f1 --validation 0.25"
    flags += " --unlabelled error --encoding utf-8 --name mine --trunk small --steps 77 --out x.yaml"
    assert main(["init", "own.csv", *flags.split()]) == 0
    config = load_config(Path("x.yaml"))
    (task,) = config.all_tasks
    assert (task.name, task.label, task.text, task.labels) == ("mine", "b", ("title", "text"), ("3", "2", "1", "0"))
    assert (task.metrics, task.validation, task.unlabelled, config.steps) == (("macro_f1",), 0.25, "error", 77)
    assert config.trunk.hidden_size == 768
    assert main(["init", "own.csv", "--init", "user/checkpoint", "--out", "y.yaml"]) == 0
    assert read_yaml(Path("y.yaml").read_text())["init"] == "user/checkpoint"
    assert main(["init", "own.csv", "--minutes", "1", "--out", "z.yaml"]) == 0
    assert load_config(Path("z.yaml")).steps <= 120
    capsys.readouterr()
    assert main(["init", "own.csv", "--out", "z.yaml"]) == 2
    assert "z.yaml is there already: --overwrite replaces it" in capsys.readouterr().err
    assert main(["init", "own.csv", "--out", "z.yaml", "--overwrite"]) == 0


def test_nobody_is_asked_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(question))
    table("own.csv", rows(60, kind=colour, colour=colour))
    assert main(["init", "own.csv"]) == 0


def test_in_a_terminal_the_label_and_the_start_are_asked_for(monkeypatch):
    asked = []
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    answers = iter(["kind", ""])
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or next(answers))
    table("own.csv", rows(60, kind=colour, colour=colour))
    assert main(["init", "own.csv"]) == 0
    assert load_config(Path("own.yaml")).all_tasks[0].label == "kind"
    assert asked[0] == "label column of own.csv [colour]: "
    assert "from scratch" in asked[1]
    assert main(["init", "own.csv", "--overwrite", "--yes"]) == 0
    monkeypatch.setenv("JPY_PARENT_PID", "1")  # in a notebook, whose commands have a terminal, too
    assert main(["init", "own.csv", "--overwrite"]) == 0
    assert len(asked) == 2


# Odd tables


@pytest.mark.parametrize(
    "names", [["no", "yes"], ["1e5", "x"], ["null", "~"], ["a: b", "#c"], ["ünï", "日本"], ['"', "'"]]
)
def test_class_names_of_all_kinds_are_read_back(names):
    table("own.csv", rows(60, label=lambda i, rng: names[i % 2]))
    assert main(["init", "own.csv"]) == 0
    (task,) = load_config(Path("own.yaml")).all_tasks
    assert {*task.labels} == {*names}


def test_names_of_columns_are_read_back_whatever_they_are():
    odd = {'Ünïcode: "quoted" # name': lambda i, rng: text(rng), "lab\nel": colour}
    records = [{name: cell(i, random.Random(i)) for name, cell in odd.items()} for i in range(60)]
    table("ödd näme.csv", records)
    assert main(["init", "ödd näme.csv", "--label", "lab\nel"]) == 0
    (task,) = load_config(Path("odd-name.yaml")).all_tasks
    assert (task.name, task.text, task.label) == ("odd-name", ('Ünïcode: "quoted" # name',), "lab\nel")


def test_bytes_of_windows_are_read_and_named():
    table("own.csv", rows(60, label=colour, text=lambda i, rng: f"“naïve” café – {i}"), "windows-1252")
    assert main(["init", "own.csv"]) == 0
    (task,) = load_config(Path("own.yaml")).all_tasks
    assert task.encoding == "windows-1252"
    assert read_rows(task, "train").columns["text"][0].startswith("“naïve” café – ")


def test_utf_16_as_excel_saves_it():
    table("own.csv", rows(60, label=colour), "utf-16")
    assert main(["init", "own.csv"]) == 0
    assert load_config(Path("own.yaml")).all_tasks[0].encoding == "utf-16"


def test_mostly_missing_labels_are_told_and_dropped(capsys):
    table("own.csv", rows(400, label=lambda i, rng: ["a", "b"][i // 10 % 2] if i % 10 == 0 else ""))
    assert main(["init", "own.csv"]) == 0
    assert "360 of 400 rows have no label: they are left out" in capsys.readouterr().out
    assert load_config(Path("own.yaml")).all_tasks[0].unlabelled == "drop"


def test_repeated_and_contradicting_texts_are_told(capsys):
    table("own.csv", rows(60, text=lambda i, rng: f"text number {i % 40}", label=lambda i, rng: "ab"[i // 40]))
    assert main(["init", "own.csv"]) == 0
    told = capsys.readouterr().out
    assert "20 rows repeat a text of another row, so there are 40 different ones" in told
    assert "of these, 20 have another 'label'" in told


def test_classes_that_may_be_the_same_or_none_at_all_are_told(capsys):
    names = ["Yes", "yes ", "no", "n/a", "None"]
    table("own.csv", rows(100, label=lambda i, rng: names[i % 5]))
    assert main(["init", "own.csv"]) == 0
    told = capsys.readouterr().out
    assert "classes that differ in capitals or spaces alone, and are learnt apart: 'Yes', 'yes '\n" in told
    assert "taken for classes like the others: 'None', 'n/a'; if they stand for no label, empty the cells" in told


def test_numbers_that_are_taken_for_classes_can_be_amounts(capsys):
    for name, said in (("stars", True), ("intent", False)):
        table(f"{name}.csv", rows(100, **{name: lambda i, rng: 1 + i % 5}))
        assert main(["init", f"{name}.csv"]) == 0
        assert ("--head regress takes them for amounts" in capsys.readouterr().out) == said


def test_rows_without_text_are_told(capsys):
    records = rows(100, title=lambda i, rng: "" if i % 4 == 0 else "a title", label=colour)
    records = [{**record, "text": ""} if i % 8 == 0 else record for i, record in enumerate(records)]
    table("own.csv", records)
    assert main(["init", "own.csv", "--text", "title", "--text", "text"]) == 0
    assert "  13 rows have no text: they are left out\n" in capsys.readouterr().out


@pytest.mark.parametrize("steps", [1, 60, 330, 333])
def test_the_last_scores_are_those_of_the_end(steps):
    table("own.csv", rows(60, label=colour))
    assert main(["init", "own.csv", "--steps", str(steps)]) == 0
    every = load_config(Path("own.yaml")).evaluation.every
    scored = {*range(every, steps + 1, every), steps}
    assert len(scored) == min(steps, 4)


def test_uneven_classes_are_scored_by_more_than_accuracy(capsys):
    table("own.csv", rows(100, label=lambda i, rng: "rare" if i < 3 else "usual"))
    assert main(["init", "own.csv"]) == 0
    assert load_config(Path("own.yaml")).all_tasks[0].metrics == ("macro_f1", "accuracy")
    assert "classes with fewer than 5 rows, too few to learn from: 1, such as 'rare'" in capsys.readouterr().out


def test_rows_without_any_of_several_labels_are_rows(capsys):
    def topics(i: int, rng: random.Random) -> str:
        return ["", "billing", "billing|bug", "bug | urgent"][i % 4] if i else "rare"

    table("own.csv", rows(100, topics=topics))
    assert main(["init", "own.csv"]) == 0
    (task,) = load_config(Path("own.yaml")).all_tasks
    assert (task.head, task.label, task.labels) == ("multi-label", "topics", ("billing", "bug", "rare", "urgent"))
    assert task.unlabelled == "error"
    told = capsys.readouterr().out
    assert "classes: billing 50%, bug 50%, urgent 25%, rare 1%" in told
    assert "classes with fewer than 5 rows, too few to learn from: 1, such as 'rare'" in told


# What nothing can be learnt from


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


def test_it_takes_a_second_for_20000_rows():
    """A fiftieth of the rows that may take five seconds, and what it takes whatever the rows."""
    table("own.csv", rows(20_000, label=colour))
    began = time.perf_counter()
    assert main(["init", "own.csv"]) == 0
    assert time.perf_counter() - began < 1.0


def test_init_does_not_wait_for_torch():
    table("own.csv", rows(60, label=colour))
    program, environment = command_line()
    code = (
        "import sys; from trunkline.training.cli import main; main(['init', 'own.csv']); print('torch' in sys.modules)"
    )
    said = subprocess.run([program[0], "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "False"
