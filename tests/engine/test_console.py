"""What a user's text may do to a terminal: nothing."""

import json

import pytest

from trunkline.engine.console import harmless, tell
from trunkline.training.cli import main

ORDERS = ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\x08\r", "\x7f", "\u202egnp.exe", "\u2066"]


@pytest.mark.parametrize("text", ORDERS, ids=ascii)
def test_an_order_is_shown_by_its_number(text, capsys):
    tell(f"a{text}b\tc\nd é 漢 🎉")
    shown = capsys.readouterr().out
    assert shown.startswith("a\\u")
    assert shown.endswith("b\tc\nd é 漢 🎉\n")
    assert not any(ord(character) < 32 or 126 < ord(character) < 160 for character in shown if character not in "\t\n")
    assert not {"\u202e", "\u2066"} & {*shown}


@pytest.mark.parametrize("text", ORDERS, ids=ascii)
def test_json_stays_what_it_is(text):
    for only_ascii in (True, False):
        assert json.loads(harmless(json.dumps([text], ensure_ascii=only_ascii))) == [text]


def test_errors_of_the_command_give_no_orders(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text('tasks: [sst2]\n"\\x1b[2J": 1\n')
    for arguments in (
        ["train", "c.yaml"],
        ["train", "\x1b[2J.yaml"],
        ["train", "c.yaml", "\x9b31m=2"],
        ["predict", "\x1b[2J", "a text"],
        ["report", "\x1b[2J"],
    ):
        assert main(arguments) == 2
        said = capsys.readouterr()
        assert not {"\x1b", "\x9b"} & {*said.out, *said.err}
        assert said.err.startswith("trunkline: ")
    with pytest.raises(SystemExit):
        main(["report", "c.yaml", "--", "\x1b[2J"])
    assert "\x1b" not in capsys.readouterr().err
