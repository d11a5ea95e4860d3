"""`trunkline init`: what it writes, every flag, and what it says beside."""

import json
import random
import subprocess
from pathlib import Path

import pytest
from own_tables import colour, rows, table, text

from conftest import command_line
from trunkline.engine.yaml_file import read_yaml
from trunkline.training.cli import main
from trunkline.training.config_file import load_config
from trunkline.training.data.sources import read_rows

pytestmark = pytest.mark.usefixtures("own_folder")


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


@pytest.mark.parametrize(("words", "tokens"), [(3, 512), (20, 960), (200, 2048)])
def test_a_step_from_a_checkpoint_has_about_32_examples(words, tokens, capsys):
    """Not fewer tokens than the longest example may have, and not more than from scratch."""
    table("own.csv", rows(6400, text=lambda i, rng: " ".join([f"t{i}", *["word"] * (words - 1)]), label=colour))
    assert main(["init", "own.csv", "--init", "some/checkpoint"]) == 0
    written = read_yaml(Path("own.yaml").read_text(encoding="utf-8"))
    assert written.get("batch", {"tokens": 2048}) == {"tokens": tokens}
    assert written["steps"] == pytest.approx(3 * 6400 * (2 + 1.4 * words) / tokens, rel=0.01)  # three passes
    assert ("about 32 examples" in Path("own.yaml").read_text()) == (words == 20)
    assert main(["init", "own.csv", "--out", "scratch.yaml"]) == 0
    assert load_config(Path("scratch.yaml")).batch.tokens == 2048


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


def test_it_takes_a_second_for_20000_rows(effort):
    """A fiftieth of the rows that may take five seconds, and what it takes whatever the rows."""
    table("own.csv", rows(20_000, label=colour))
    assert effort(lambda: main(["init", "own.csv"])) < 50
    assert Path("own.yaml").exists()


def test_init_does_not_wait_for_torch():
    table("own.csv", rows(60, label=colour))
    program, environment = command_line()
    code = (
        "import sys; from trunkline.training.cli import main; main(['init', 'own.csv']); print('torch' in sys.modules)"
    )
    said = subprocess.run([program[0], "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "False"
