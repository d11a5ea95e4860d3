"""What `trunkline init` makes of tables whose headers are those of public data sets."""

import csv
import json
from pathlib import Path

import pytest
from public_headers import PUBLIC, SEVERAL, Public, rows_of

from trunkline.training.cli import main
from trunkline.training.config_file import load_config
from trunkline.training.starting import length

RIGHT = 18  # of 20, at least


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(length, "seconds_per_step", lambda preset: 0.5)


def write(folder: Path, table: Public) -> Path:
    path, rows = folder / table.file, rows_of(table)
    if table.file.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file) if path.suffix == ".csv" else csv.writer(file, "excel-tab", quoting=csv.QUOTE_NONE)
        writer.writerow([column.strip() for column in table.columns])
        writer.writerows([str(cell).replace("\t", " ").replace('"', "") for cell in row.values()] for row in rows)
    return path


def guess(folder: Path, table: Public) -> tuple:
    assert main(["init", str(write(folder, table)), "--out", str(folder / "own.yaml"), "--overwrite"]) == 0
    tasks = load_config(folder / "own.yaml").all_tasks
    return tasks[0].head, tuple(task.label for task in tasks if task.label), tasks[0].text


def test_at_least_18_of_20_are_guessed_right(tmp_path, capsys):
    guesses = {table.file: guess(tmp_path, table) for table in PUBLIC}
    right = {table.file: (table.head, table.label, table.text) for table in PUBLIC}
    wrong = {file: (guesses[file], right[file]) for file in right if guesses[file] != right[file]}
    assert len(PUBLIC) == 20
    assert len(wrong) <= 20 - RIGHT, wrong


@pytest.mark.parametrize("table", PUBLIC, ids=lambda table: table.file)
def test_what_is_guessed_can_be_said_instead(table, tmp_path, capsys):
    """Every guess is right with the label named, the wrong ones, too."""
    path = write(tmp_path, table)
    flags = [word for label in table.label for word in ("--label", label)]
    assert main(["init", str(path), "--out", str(tmp_path / "own.yaml"), *flags]) == 0, capsys.readouterr().err
    tasks = load_config(tmp_path / "own.yaml").all_tasks
    assert [(task.head, task.label) for task in tasks] == [(table.head, label) for label in table.label or [""]]
    assert all(task.text == table.text for task in tasks)


@pytest.mark.parametrize("table", SEVERAL, ids=lambda table: table.file)
def test_several_labels_in_a_cell_are_one_task(table, tmp_path, capsys):
    head, label, text = guess(tmp_path, table)
    assert (head, label, sorted(text)) == (table.head, table.label, sorted(table.text))
    assert "has any number of labels in a row" in capsys.readouterr().out
    (task,) = load_config(tmp_path / "own.yaml").all_tasks
    kind = next(iter(kind for column, kind in table.columns.items() if column in table.label))
    assert set(task.labels) == set(kind.split()[1:])
