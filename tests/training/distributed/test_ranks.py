"""Ranks that are lost, and how ranks are started."""

import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from forked_ranks import environments

from conftest import Finished, command_line
from run_folders import without_clock
from trunkline import Engine
from trunkline.engine import checkpoint
from trunkline.training import cli
from trunkline.training.config_file import load_config

ENDLESS = ["steps=100000", "evaluation.every=20", "evaluation.texts=0", "evaluation.examples=1"]


def wait_for(path: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < end and not path.exists():
        time.sleep(0.01)


def children(process: int) -> list[int]:
    """Processes that it started, in that order."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True).stdout
    return sorted(map(int, listed.split()))


def test_the_command_starts_ranks_and_says_which_one_was_killed(tiny_config: Path, tmp_path):
    run = tmp_path / "farm"
    program, environment = command_line("train", tiny_config, f"run={run}", "devices=2", *ENDLESS)
    with subprocess.Popen(
        program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as launcher:
        wait_for(run / "checkpoints" / "step-20", launcher)
        os.kill(children(launcher.pid)[1], signal.SIGKILL)
        output, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGKILL
    lost, ended = errors.splitlines()
    newest = checkpoint.newest(run / "checkpoints", warn=print)
    assert re.fullmatch(
        rf"trunkline: rank 1 on \S+ left, or does not answer, in step \d+; the last checkpoint is {newest}: go on with "
        "--resume, on any number of ranks",
        lost,
    )
    assert re.fullmatch(r"trunkline: rank 1, process \d+, was ended by SIGKILL", ended)


def test_a_finished_run_has_one_set_of_files(finished: Finished, trunkline, tmp_path):
    """The same command with two ranks writes, prints and counts what it does with one."""
    run = tmp_path / "farm"
    output = trunkline("train", finished.config, f"run={run}", "devices=2").stdout
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == sorted(
        path.relative_to(finished.run) for path in finished.run.rglob("*")
    )
    assert output.count("starts from scratch") == output.count("scoring on all validation examples") == 1
    assert output.count(f"report: {run / 'report.html'}") == 1
    _, state = checkpoint.load(run / "checkpoints" / "step-24")
    _, expected = checkpoint.load(finished.run / "checkpoints" / "step-24")
    assert state["settings"] == expected["settings"]
    same = without_clock(state["progress"])
    for key in ("tokens", "real_tokens", "examples", "flops", "step"):
        assert same[key] == expected["progress"][key]


def test_devices_in_one_process_are_refused_with_the_way_to_have_them(tiny_config: Path):
    engine = Engine.from_config(load_config(tiny_config, ["devices=2"]))
    with pytest.raises(ValueError, match="devices=2 needs a process for each of them.*torchrun --nproc-per-node=2"):
        engine.fit()


def test_a_port_that_is_taken_is_named(tiny_config: Path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for name, value in {**environments(2)[0], "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConnectionError, match=rf"the 2 ranks did not meet at 127.0.0.1:{port}: .*in use"):
            Engine.from_config(load_config(tiny_config)).fit()


def test_more_devices_than_batches_are_refused_before_any_rank_starts(tiny_config: Path, capsys):
    assert cli.main(["train", str(tiny_config), "devices=3"]) == cli.USER_ERROR
    assert "3 ranks need one each: set batch.accumulate to 3 or more" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compare", "doctor", "estimate"])
def test_a_command_of_one_process_refuses_ranks_before_any_work(command, tiny_config: Path, capsys, monkeypatch):
    for name, value in environments(2)[0].items():
        monkeypatch.setenv(name, value)
    assert cli.main([command, str(tiny_config)]) == cli.USER_ERROR
    output, errors = capsys.readouterr()
    assert f"{command} is the work of one process, and torchrun started 2: start it without torchrun" in errors
    assert not output
    monkeypatch.setenv("RANK", "1")  # which leaves it to the first one to say so
    with pytest.raises(SystemExit, match="2"):
        cli.main([command, str(tiny_config)])
    assert not capsys.readouterr().err


def test_a_comparison_refuses_several_devices(tiny_config: Path, capsys):
    assert cli.main(["compare", str(tiny_config), "devices=2"]) == cli.USER_ERROR
    assert "compare: its runs follow one another on one device, and devices is 2" in capsys.readouterr().err
