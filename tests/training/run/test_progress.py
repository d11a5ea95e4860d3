"""What a run counts, keeps in metrics.jsonl and shows."""

import json
import math
from io import BytesIO, TextIOWrapper
from pathlib import Path

import numpy as np
import pytest
import torch

from trunkline.engine.network.packing import Example, pack
from trunkline.training.run import progress as module
from trunkline.training.run.progress import Display, Interval, Log, Progress


def batch():
    """Two tasks, 7 of 16 tokens."""
    return pack([Example(0, np.arange(4), np.array([3])), Example(1, np.arange(3), np.array([0, 1]))], 2, 16)


def test_an_interval_averages_over_rows_and_counts_examples():
    interval = Interval(["a", "b"], torch.device("cpu"))
    interval.add([batch()], torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]))
    interval.add([batch()], torch.tensor([4.0, 0.0]), torch.tensor([2.0, 0.0]))
    interval.seconds = 2.0
    assert interval.losses() == {"a": 2.0}  # 6 over 3 rows; b was not seen
    assert interval.examples == {"a": 2, "b": 2}
    assert interval.tokens_per_second == 7.0
    assert interval.padding_waste == pytest.approx(1 - 14 / 32)
    progress = Progress()
    progress.add(interval)
    progress.add(interval)
    assert (progress.tokens, progress.real_tokens, progress.examples) == (64, 28, {"a": 4, "b": 4})


def test_an_interval_keeps_no_gradients():
    interval = Interval(["a", "b"], torch.device("cpu"))
    interval.add([batch()], torch.ones(2, requires_grad=True) * 3, torch.ones(2))
    assert not interval.loss.requires_grad


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_left_out_of_the_mean(value):
    interval = Interval(["a", "b"], torch.device("cpu"))
    for losses in ([1.0, 2.0], [5.0, value]):
        interval.add([batch()], torch.tensor(losses), torch.ones(2))
    assert interval.losses() == {"a": 3.0, "b": 2.0}


# metrics.jsonl


def write(folder: Path, after: int, *steps: int) -> None:
    with Log(folder, after) as log:
        for step in steps:
            log.write(event="step", step=step, after=after)


def lines(folder: Path) -> list[tuple[int, int]]:
    """Step of every line, and where the run that wrote it began."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(event["step"], event["after"]) for event in events]


def test_a_resumed_log_forgets_what_came_after(tmp_path):
    write(tmp_path, 0, 1, 2, 3)
    write(tmp_path, 2, 3, 4)
    assert lines(tmp_path) == [(1, 0), (2, 0), (3, 2), (4, 2)]


def test_a_log_from_the_start_is_empty(tmp_path):
    write(tmp_path, 0, 0, 1)
    write(tmp_path, 0)
    assert lines(tmp_path) == []


def test_a_line_that_was_cut_off_is_forgotten(tmp_path):
    """As a full disk or a power cut leaves it."""
    write(tmp_path, 0, 1, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "st')
    write(tmp_path, 2, 3)
    assert lines(tmp_path) == [(1, 0), (2, 0), (3, 2)]


def test_lines_are_on_disk_at_once(tmp_path):
    write(tmp_path, 0, 1, 2)
    with Log(tmp_path, 2) as log:
        assert lines(tmp_path) == [(1, 0), (2, 0)]  # a run that is killed now has lost nothing
        log.write(event="step", step=3, after=2)
        assert lines(tmp_path) == [(1, 0), (2, 0), (3, 2)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# The display


def test_output_that_is_no_terminal_gets_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(module, "QUIET_SECONDS", 1000.0)
    with Display({"a": "accuracy", "b": "rouge1"}, steps=5, first=0) as display:
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
    with Display({"a": "accuracy"}, steps=5, first=0) as display:
        display.tell(text)
    shown = capsys.readouterr().out
    assert f"{text}\n" in shown if terminal else shown == f"{text}\n"


def test_a_users_text_gives_the_terminal_no_orders(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Display({"a": "accuracy"}, steps=5, first=0) as display:
        display.tell("\x1b[2Jred\x1b]0;title\x07 \x9b31m \u202egnp.exe\ttab\r\x7f")
    shown = capsys.readouterr().out.replace("\x1b[?25h", "").replace("\x1b[?25l", "")
    assert "\\u001b[2Jred\\u001b]0;title\\u0007 \\u009b31m \\u202egnp.exe" in shown


def test_a_text_that_the_console_cannot_show_is_escaped(monkeypatch):
    written = BytesIO()
    monkeypatch.setattr("sys.stdout", TextIOWrapper(written, encoding="latin-1", write_through=True))
    with Display({"a": "accuracy"}, steps=5, first=0) as display:
        display.tell("caf\xe9 \u2764")
    assert written.getvalue() == b"caf\xe9 \\u2764\n"


def test_a_terminal_gets_a_table(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with Display({"a": "accuracy"}, steps=5, first=3) as display:
        display.step(4, {"a": 0.625}, 1234.0)
        display.evaluation(4, {"a": {"loss": 0.5, "accuracy": 0.75}})
    shown = capsys.readouterr().out
    for words in ("task", "metric", "accuracy", "0.625", "0.750", "4/5", "1,234 tokens/s"):
        assert words in shown
