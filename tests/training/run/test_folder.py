"""A run's folder: one process at a time, nothing removed but what a run wrote, no going on as another run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import Finished, command_line, tiny_rows, write_jsonl
from trunkline import Engine
from trunkline.engine import checkpoint
from trunkline.engine.config import Config
from trunkline.training.config_file import load_config
from trunkline.training.run.folder import MANIFEST, WRITTEN, RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def config_of(run: Path, **changes: str) -> Config:
    return Config(tasks=("sentiment",), run=str(run), **changes)


def refusal(run: Path, resume: bool = False, overwrite: bool = False, **changes: str) -> str:
    """What entering a folder is refused with; it is left as it was."""
    before = contents(run) if run.is_dir() else None
    with pytest.raises(ValueError) as refused, RunFolder(config_of(run, **changes), resume, overwrite):  # noqa: PT011
        pass
    after = contents(run) if run.is_dir() else None
    assert after == before
    return str(refused.value)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with everything that a run writes, and a few things of the user's in every corner."""
    run = tmp_path / "run"
    with RunFolder(config_of(run), False, False) as folder:
        folder.begin()
    for name in ("checkpoints/step-2", "checkpoints/best", "model", "profile", "tensorboard"):
        (run / name).mkdir()
    ours = ["config.yaml", "tokenizer.json", "metrics.jsonl", "summary.json", "samples.json", "report.html"]
    ours += [
        f"checkpoints/{name}/{file}" for name in ("step-2", "best") for file in ("model.safetensors", "state.json")
    ]
    ours += ["checkpoints/step-2/manifest.json", "model/engine.json", "model/model.safetensors", "profile/table.txt"]
    for name in [*ours, "tensorboard/events.out.tfevents.1"]:
        (run / name).write_text("ours")
    return run


THEIRS = (
    "notes.txt",
    "data/train.csv",
    "model/README.md",
    "checkpoints/step-2/why.txt",
    "checkpoints/step-by-step/state.json",
    "checkpoints/mine.safetensors",
    "profile/mine.json",
)


# Replacing a run


def test_overwriting_removes_what_a_run_wrote_and_nothing_else(run):
    for name in THEIRS:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("theirs")
    with RunFolder(config_of(run), False, True) as folder:
        assert (run / "summary.json").exists(), "removed before anything was checked"
        folder.begin()
    assert contents(run).keys() == {MANIFEST, *THEIRS}


def test_overwriting_removes_folders_that_are_empty_then(run):
    with RunFolder(config_of(run), False, True) as folder:
        folder.begin()
    assert {path.name for path in run.iterdir()} == {MANIFEST, "checkpoints"}
    assert not any((run / "checkpoints").iterdir())


def test_a_run_of_before_there_were_manifests_is_known_by_its_files(run):
    (run / MANIFEST).unlink()
    (run / "notes.txt").write_text("theirs")
    assert "holds a run: resume it (--resume), replace it (--overwrite), or name another" in refusal(run)
    with RunFolder(config_of(run), False, True) as folder:
        folder.begin()
    assert contents(run).keys() == {MANIFEST, "notes.txt"}


def test_files_that_are_no_run_are_not_overwritten(tmp_path):
    (tmp_path / "train.csv").write_text("theirs")
    assert "holds files, but no run to be replaced" in refusal(tmp_path, overwrite=True)
    assert contents(tmp_path) == {"train.csv": b"theirs"}


@pytest.mark.parametrize("name", [name for name, files in WRITTEN.items() if not files])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_of_the_users_where_the_run_would_write_is_refused(name, overwrite, tmp_path):
    (tmp_path / name).write_text("theirs")
    message = refusal(tmp_path, overwrite=overwrite)
    assert (name in message) or overwrite
    assert contents(tmp_path) == {name: b"theirs"}


def test_a_link_is_not_followed(run, tmp_path):
    shutil.move(run / "model", tmp_path / "elsewhere")
    (run / "model").symlink_to(tmp_path / "elsewhere")
    assert f"{run / 'model'} is a link" in refusal(run, overwrite=True)
    assert (tmp_path / "elsewhere" / "model.safetensors").exists()


@pytest.mark.parametrize("key", ["init", "tokenizer"])
def test_a_run_is_not_replaced_by_one_that_starts_from_it(run, key):
    assert f"which {key} needs" in refusal(run, overwrite=True, **{key: str(run)})


def test_overwriting_what_is_not_there_is_a_start(tmp_path):
    with RunFolder(config_of(tmp_path / "new"), False, True) as folder:
        folder.begin()
    assert (tmp_path / "new" / MANIFEST).exists()


def test_data_that_cannot_be_used_leaves_the_earlier_run(finished: Finished, tmp_path):
    shutil.copytree(finished.run, tmp_path / "run")
    shutil.copytree(finished.config.parent, tmp_path / "farm", ignore=lambda *_: ["tiny.yaml"])
    with (tmp_path / "farm" / "colour.jsonl").open("a") as file:
        file.write('{"text": "a green cow", "label": "green"}\n')
    before = contents(tmp_path / "run")
    engine = Engine.from_config(
        replace(load_config(finished.config), run=str(tmp_path / "run"), base=str(tmp_path / "farm"))
    )
    with pytest.raises(ValueError, match="colour.jsonl, row 61"):
        engine.fit(overwrite=True)
    after = contents(tmp_path / "run")
    assert after == before


# One process at a time


def test_a_folder_in_use_is_refused_naming_process_and_host(run):
    with RunFolder(config_of(run), True, False):
        for resume, overwrite in ((False, False), (True, False), (False, True)):
            message = refusal(run, resume, overwrite)
            assert f"is in use by process {os.getpid()} on {socket.gethostname()}" in message
    with RunFolder(config_of(run), True, False):
        pass


def test_a_live_run_is_left_alone_and_a_dead_ones_folder_is_free(finished: Finished, tmp_path):
    run = tmp_path / "farm"
    program, environment = command_line("train", finished.config, f"run={run}", "steps=100000")
    process = subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not checkpoint.steps(run / "checkpoints"):
            assert process.poll() is None, "the run ended by itself"
            assert time.monotonic() < deadline, "no checkpoint"
            time.sleep(0.05)
        for resume, overwrite in ((True, False), (False, True)):
            with (
                pytest.raises(ValueError, match=f"in use by process {process.pid} on "),
                RunFolder(config_of(run), resume, overwrite),
            ):
                pass
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with RunFolder(config_of(run), True, False):
        assert json.loads((run / MANIFEST).read_bytes())["process"] == os.getpid()


def test_two_that_start_at_once_do_not_both_begin(tmp_path):
    with RunFolder(config_of(tmp_path / "run"), False, False):
        assert "in use" in refusal(tmp_path / "run")
    assert not (tmp_path / "run").exists()  # nothing came of either


# Killed early


def test_a_run_killed_before_its_first_checkpoint_is_begun_anew(tmp_path, capsys):
    for name in ("config.yaml", "metrics.jsonl", "tokenizer.json"):
        (tmp_path / name).write_text("ours")
    (tmp_path / "checkpoints" / ".step-4.partial").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-4.partial" / "model.safetensors").write_text("half of ")
    with RunFolder(config_of(tmp_path), False, False) as folder:
        folder.begin()
    assert contents(tmp_path).keys() == {MANIFEST}
    assert "ended before its first checkpoint, and is begun anew" in capsys.readouterr().out


def test_a_finished_run_without_checkpoints_is_not_begun_anew(run):
    shutil.rmtree(run / "checkpoints")
    message = refusal(run)
    assert "holds a run: replace it (--overwrite), or" in message
    assert "start it without --resume" in refusal(run, resume=True)


# Going on


def copy_of(finished: Finished, folder: Path) -> Engine:
    shutil.copytree(finished.run, folder / "run")
    return Engine.from_config(replace(load_config(finished.config), run=str(folder / "run")))


def test_a_run_does_not_go_on_with_other_labels(finished: Finished, tmp_path):
    """Of which there are as many, on texts of the same length."""
    engine = copy_of(finished, tmp_path)
    shutil.copytree(engine.config.base, tmp_path / "farm")
    rows = tiny_rows("colour", 60, seed=0)
    write_jsonl(tmp_path / "farm" / "colour.jsonl", [{**row, "label": "red"} for row in rows])
    with pytest.raises(ValueError, match=r"other settings: data.colour.digest: \w+ in the checkpoint, \w+ now$"):
        engine.fit(resume=True, base=str(tmp_path / "farm"))


def test_a_checkpoint_of_before_there_were_digests_goes_on(finished: Finished, tmp_path):
    engine = copy_of(finished, tmp_path)
    folder = tmp_path / "run" / "checkpoints"
    tensors, state = checkpoint.load(folder / "step-24")
    for data in state["settings"]["data"].values():
        del data["digest"], data["validation_digest"], data["references"]
    del state["settings"]["prompt_weight"], state["settings"]["optimizer"]["give_up_after"]
    checkpoint.save(folder, "step-24", tensors, state)
    assert engine.fit(resume=True)["steps"] == 24
    state["settings"]["optimizer"]["clip"] = 0.5  # what it says counts
    checkpoint.save(folder, "step-24", tensors, state)
    with pytest.raises(ValueError, match="other settings: optimizer.clip: 0.5 in the checkpoint, 1.0 now$"):
        engine.fit(resume=True)


def test_a_finished_run_goes_on_with_more_steps(finished: Finished, tmp_path):
    engine = copy_of(finished, tmp_path)
    assert engine.fit(resume=True, steps=28)["steps"] == 28
    assert engine.fit(resume=True)["steps"] == 28
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"][-2:] == [24, 28]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-28")
    with pytest.raises(ValueError, match="steps: 24 in the checkpoint, 23 now"):
        engine.fit(resume=True, steps=23)


def test_an_unfinished_run_does_not_go_on_with_more_steps(finished: Finished, tmp_path):
    engine = copy_of(finished, tmp_path)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-24")
    with pytest.raises(ValueError, match="steps: 24 in the checkpoint, 28 now"):
        engine.fit(resume=True, steps=28)


def test_damaged_lines_of_the_log_do_not_keep_a_run_from_going_on(finished: Finished, tmp_path, capsys):
    engine = copy_of(finished, tmp_path)
    log = tmp_path / "run" / "metrics.jsonl"
    whole = log.read_bytes().split(b"\n")
    log.write_bytes(b"\n".join([whole[0], whole[1][:9] + b"\xff" + whole[1][10:], b"[1]", b"{}", *whole[3:]]))
    engine.fit(resume=True)
    assert f"{log}: damaged lines are left out: 2, 3, 4\n" in capsys.readouterr().out
    assert log.read_bytes().split(b"\n") == [whole[0], *whole[3:]]


# No room


@pytest.mark.parametrize("blocks", [40, 400])
def test_a_full_disk_is_said_in_words(finished: Finished, tmp_path, blocks):
    """Files of more than so many half kilobytes cannot be written: a checkpoint, or the model and what comes later."""
    program, environment = command_line("train", finished.config, f"run={tmp_path / 'run'}", "steps=4")
    limited = ["sh", "-c", f'ulimit -f {blocks}; exec "$0" "$@"', *program]
    result = subprocess.run(limited, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert "not saved" in result.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="everything is writable for root")
def test_a_folder_that_is_not_writable_is_named(tmp_path):
    tmp_path.chmod(0o555)
    assert "cannot be written" in refusal(tmp_path / "run")
