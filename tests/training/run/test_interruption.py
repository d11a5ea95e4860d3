"""SIGTERM and Ctrl-C: a run saves and stops, and goes on to the same bits."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from conftest import Finished, command_line
from run_folders import assert_same_checkpoints, lines
from trunkline.engine import checkpoint
from trunkline.training import cli
from trunkline.training.run.interruption import Interruption
from trunkline.training.run.progress import Interval

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_terminated_run_saves_and_resumes_to_the_same_bits(finished: Finished, trunkline, tmp_path):
    run = tmp_path / "farm"
    program, environment = command_line("train", finished.config, f"run={run}")
    with subprocess.Popen(
        program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 100
        while process.poll() is None and time.monotonic() < deadline and not (run / "checkpoints" / "step-4").exists():
            time.sleep(0.005)
        process.terminate()
        output, errors = process.communicate(timeout=100)
    assert process.returncode == 143
    path = checkpoint.newest(run / "checkpoints", warn=print)
    assert f"SIGTERM: saved {path}; go on with --resume" in output
    assert errors == ""

    output = trunkline("train", finished.config, f"run={run}", "--resume").stdout
    assert f"resuming at step {path.name[5:]}" in output
    assert_same_checkpoints(run / "checkpoints", finished.run / "checkpoints")
    ends = [[event for event in lines(folder) if event["event"] == "step"][-1] for folder in (run, finished.run)]
    assert ends[0]["real_tokens"] == ends[1]["real_tokens"]


PRESSED_AGAIN = """
import atexit, os, signal, sys
from trunkline.training import cli

def press(_):
    raise KeyboardInterrupt

cli.check_shared = press
atexit.register(os.kill, os.getpid(), signal.SIGINT)
sys.exit(cli.main(["tasks"]))
"""


def test_ctrl_c_while_a_command_ends_changes_nothing():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", PRESSED_AGAIN], env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "")


def test_ctrl_c_saves_the_step_it_is_in(finished: Finished, tmp_path, monkeypatch, capsys):
    add, steps = Interval.add, []
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def interrupted(*arguments):
        add(*arguments)
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Interval, "add", interrupted)
    run = tmp_path / "farm"
    assert cli.main(["train", str(finished.config), f"run={run}"]) == 130
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-2"]
    assert f"SIGINT: saved {run / 'checkpoints' / 'step-2'}; go on with --resume" in capsys.readouterr().out
    assert [event["step"] for event in lines(run)] == [0, 2]
    assert signal.signal(signal.SIGINT, before[0]) is signal.SIG_IGN  # the command ends, whatever is pressed now
    assert signal.getsignal(signal.SIGTERM) is before[1]


def test_a_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt), Interruption() as interruption:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.asked == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it went on")


def test_outside_the_main_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def use() -> None:
        with Interruption() as interruption:
            seen.append((interruption.asked, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [(None, before)]
