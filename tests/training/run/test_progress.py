"""What a run counts, and keeps in metrics.jsonl."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from trunkline.engine.network.packing import Example, pack
from trunkline.training.run.progress import Interval, Log, Progress


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
