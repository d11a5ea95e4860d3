"""What a run shows while it goes on: lines, a table in a terminal, HTML in a notebook."""

import sys
from io import BytesIO, TextIOWrapper
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from trunkline.training.watching import display as module
from trunkline.training.watching.display import make_display
from trunkline.training.watching.notebook import sparkline


def test_output_that_is_no_terminal_gets_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(module, "QUIET_SECONDS", 1000.0)
    with make_display({"a": "accuracy", "b": "rouge1"}, steps=5, first=0) as display:
        display.step(1, {"a": 0.7}, 99.0)
        assert capsys.readouterr().out == ""
        monkeypatch.setattr(module, "QUIET_SECONDS", 0.0)
        display.step(2, {"b": 6.0}, 99.0)
        assert capsys.readouterr().out == "step 2/5  99 tokens/s  loss: a 0.700  b 6.000\n"
        monkeypatch.setattr(module, "QUIET_SECONDS", 1000.0)
        display.step(5, {"a": 0.5}, 1234.0)  # the last one is always shown
        assert capsys.readouterr().out == "step 5/5  1,234 tokens/s  loss: a 0.500  b 6.000\n"
        display.evaluation(5, {"a": {"loss": 0.5, "accuracy": 0.75}, "b": {"loss": 5.0}})
        assert capsys.readouterr().out == "step 5/5  a accuracy 0.750\n"


@pytest.mark.parametrize("text", ["[/INST] [b]bold[/b]", "[link=x] :smile: [red]", "\\[b] [[ ]]", "c:\\[x]", "a" * 300])
@pytest.mark.parametrize("terminal", [False, True])
def test_a_users_text_is_no_markup(capsys, monkeypatch, text, terminal):
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
    with make_display({"a": "accuracy"}, steps=5, first=0) as display:
        display.tell(text)
    shown = capsys.readouterr().out
    assert f"{text}\n" in shown if terminal else shown == f"{text}\n"


def test_a_users_text_gives_the_terminal_no_orders(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with make_display({"a": "accuracy"}, steps=5, first=0) as display:
        display.tell("\x1b[2Jred\x1b]0;title\x07 \x9b31m \u202egnp.exe\ttab\r\x7f")
    shown = capsys.readouterr().out.replace("\x1b[?25h", "").replace("\x1b[?25l", "")
    assert "\\u001b[2Jred\\u001b]0;title\\u0007 \\u009b31m \\u202egnp.exe" in shown


def test_a_text_that_the_console_cannot_show_is_escaped(monkeypatch):
    written = BytesIO()
    monkeypatch.setattr("sys.stdout", TextIOWrapper(written, encoding="latin-1", write_through=True))
    with make_display({"a": "accuracy"}, steps=5, first=0) as display:
        display.tell("caf\xe9 \u2764")
    assert written.getvalue() == b"caf\xe9 \\u2764\n"


def test_a_terminal_gets_a_table(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with make_display({"a": "accuracy"}, steps=5, first=3) as display:
        display.step(4, {"a": 0.625}, 1234.0)
        display.evaluation(4, {"a": {"loss": 0.5, "accuracy": 0.75}})
    shown = capsys.readouterr().out
    for words in ("task", "metric", "accuracy", "0.625", "0.750", "4/5", "1,234 tokens/s"):
        assert words in shown


# Notebooks


@pytest.fixture
def shown(monkeypatch) -> list[str]:
    """The HTML that a notebook would show, one picture after the other."""
    pictures: list[str] = []
    handle = SimpleNamespace(update=pictures.append)
    shell = SimpleNamespace(kernel=None)
    display = SimpleNamespace(HTML=str, display=lambda html, display_id: (pictures.append(html), handle)[1])
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell, display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return pictures


def test_a_notebook_gets_a_table_that_changes_in_place(shown, capsys):
    with make_display({"a<b": "accuracy", "b": "rouge1"}, steps=5, first=0) as display:
        display.step(1, {"a<b": 0.7}, 99.0)
        display.evaluation(1, {"a<b": {"loss": 0.5, "accuracy": 0.25}, "b": {"loss": 5.0}})
        display.step(4, {"a<b": 0.625}, 1234.0)
        display.evaluation(4, {"a<b": {"loss": 0.5, "accuracy": 0.75}, "b": {"loss": 5.0}})
        display.tell("a line")
    assert capsys.readouterr().out == "a line\n"
    assert "step 0 of 5" in shown[0]
    table = ElementTree.fromstring(shown[-1][shown[-1].index("<table>") :])  # it is well-formed
    rows = [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]
    assert rows[1] == ["a<b", "0.625", "", "accuracy", "0.750", ""]
    assert rows[2] == ["b", "", "", "rouge1", "", ""]
    assert len(list(table.iter("svg"))) == 2
    assert "step 4 of 5" in shown[-1]
    assert "1,234 tokens/s" in shown[-1]


def test_ipython_in_a_terminal_is_no_notebook(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace()))
    assert type(make_display({"a": "accuracy"}, 5, 0)) is module.Display


def test_a_curve_goes_from_the_first_value_to_the_last():
    points = ElementTree.fromstring(sparkline([1.0, 3.0, float("nan"), 2.0]))[0].get("points")
    heights = [float(point.split(",")[1]) for point in points.split()]
    assert len(heights) == 3
    assert heights[0] > heights[2] > heights[1]  # downwards, as SVG counts
    assert sparkline([1.0]) == sparkline([]) == ""
    assert len(sparkline([float(i) for i in range(5000)])) < 3000
