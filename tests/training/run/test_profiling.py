"""profile=true: a trace that viewers can read, and a table whose parts are what the step did."""

import json
import re
import time
from pathlib import Path

import pytest
import torch

from conftest import Finished
from trunkline import Engine
from trunkline.engine.config import RECORDED, WARM_UP
from trunkline.training.config_file import load_config
from trunkline.training.run.profiling import Profile


def test_a_profiled_run_writes_trace_and_table(finished: Finished, trunkline, tmp_path):
    values = ["profile=true", "steps=9", "evaluation.every=9"]
    output = trunkline("train", finished.config, f"run={tmp_path / 'run'}", *values).stdout
    table = (tmp_path / "run" / "profile" / "table.txt").read_text()
    parts = dict(re.findall(r"^(\w+) +[\d.]+ ms +([\d.]+)%$", table, re.MULTILINE))
    assert list(parts) == ["batching", "forward", "backward", "optimizer", "rest"]
    assert sum(map(float, parts.values())) == pytest.approx(100, abs=0.5)
    assert all(float(parts[name]) > 0.1 for name in ("batching", "forward", "backward", "optimizer"))
    assert re.search(r"aten::(add)?mm", table)  # the operations
    assert table.splitlines()[0] in output

    events = json.loads((tmp_path / "run" / "profile" / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("optimizer") == RECORDED
    assert names.count("forward") == names.count("batching") * 2 == 2 * RECORDED  # of two batches each
    assert (tmp_path / "run" / "summary.json").exists()


def test_nothing_is_written_unless_asked_for(finished):
    assert not (finished.run / "profile").exists()


def test_a_part_takes_the_time_it_takes(tmp_path):
    told = []
    with Profile(True, tmp_path, torch.device("cpu"), told.append) as profile:
        for _ in range(WARM_UP + RECORDED + 2):
            with profile.part("sleeping"):
                time.sleep(0.02)
            time.sleep(0.01)
            profile.step()
    assert len(told) == 1
    sleeping, rest = (float(ms) for ms in re.findall(r"([\d.]+) ms +[\d.]+%", told[0]))
    assert 20 <= sleeping < 28
    assert 10 <= rest < 18


def test_too_few_steps_are_refused(finished):
    with pytest.raises(ValueError, match="profile takes 8 steps at least, got steps 7"):
        load_config(finished.config, ["profile=true", "steps=7"])


def test_a_profiled_run_may_be_resumed_without(finished, tmp_path):
    """What is looked at is not what defines a run."""
    config = load_config(finished.config, [f"run={tmp_path / 'run'}", "steps=8", "profile=true"])
    Engine.from_config(config).fit()
    again = load_config(Path(finished.config), [f"run={tmp_path / 'run'}", "steps=8"])
    assert Engine.from_config(again).fit(resume=True)["steps"] == 8
