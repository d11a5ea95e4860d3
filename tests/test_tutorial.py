"""docs/own_tasks.md does what it says: its files are written, its commands run, what they print is what it shows."""

import json
import re
import shlex
from pathlib import Path

import pytest

from trunkline.training.cli import main

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "own_tasks.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`([\w.-]+)`\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = [
    (line.removeprefix("trunkline "), shown)
    for block, shown in re.findall(r"^```sh\n(.*?)^```$(?:\n```json\n(.*?)^```$)?", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    for name, content in FILES.items():
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def test_the_page_has_its_files_and_commands():
    assert sorted(FILES) == [
        "new-notes.csv",
        "notes-train.csv",
        "notes-valid.csv",
        "orders-train.csv",
        "orders-valid.csv",
        "own.yaml",
    ]
    assert [command.split()[0] for command, _ in COMMANDS] == ["doctor", "train", "eval", "predict", "predict"]


def test_every_command_runs_and_prints_what_the_page_shows(folder, monkeypatch, capsys, one_thread):
    monkeypatch.chdir(folder)
    printed = {}
    for command, shown in COMMANDS:
        assert main(shlex.split(command)) == 0, capsys.readouterr().err
        printed[command.split()[0]] = capsys.readouterr().out
        if shown:
            answers = [json.loads(line) for line in printed["predict"].splitlines()]
            assert answers == [json.loads(line) for line in shown.splitlines()]
    assert (folder / "runs" / "own" / "report.html").is_file()
    scores = json.loads(printed["eval"])
    assert scores["orders"]["tag_accuracy"] > 0.9
    assert scores["notes"]["span_f1"] > 0.7


def test_the_error_that_the_page_shows_is_the_one_that_is_raised(folder, monkeypatch, capsys):
    """Of a row whose last tag is gone; the page's line is checked up to the file, whose row is the page's first."""
    monkeypatch.chdir(folder)
    (shown,) = re.findall(r"^trunkline: task .*$", PAGE, re.MULTILINE)
    broken = FILES["orders-train.csv"].replace("number colour item other\n", "number colour item\n", 1)
    (folder / "broken.csv").write_text(broken, encoding="utf-8")
    (folder / "broken.yaml").write_text(FILES["own.yaml"].replace("orders-train.csv", "broken.csv"), encoding="utf-8")
    assert main(["doctor", "broken.yaml"]) == 2
    said = capsys.readouterr()
    assert shown.replace("orders-train.csv", "broken.csv") in said.err + said.out


OWN_DATA = (Path(__file__).resolve().parents[1] / "docs" / "own_data.md").read_text(encoding="utf-8")


def test_every_flag_that_own_data_names_is_one_of_init(capsys):
    (paragraph,) = re.findall(r"Where a label means.*?asks none\.", OWN_DATA, re.DOTALL)
    with pytest.raises(SystemExit):
        main(["init", "--help"])
    told = capsys.readouterr().out
    flags = re.findall(r"`(--\w+)`", paragraph)
    assert len(flags) > 8
    assert all(f" {flag}" in told for flag in flags)


@pytest.mark.parametrize(
    "page", [OWN_DATA, (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")]
)
def test_the_three_commands_are_commands(page):
    for command in (
        "trunkline init tickets.csv --label queue",
        "trunkline train tickets.yaml",
        "trunkline predict runs/tickets",
    ):
        assert command in page
