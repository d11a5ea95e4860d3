"""The doctor finds broken arithmetic and data that cannot be used, before a run does."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import command_line, tiny_rows, write_jsonl
from trunkline.training import doctor
from trunkline.training.config_file import load_config

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_installation_is_listed(capsys):
    doctor.check_installation()
    told = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert torch.__version__ in told["torch"]
    assert "of what is allowed" in told["self-test"]
    assert told.keys() >= {"python", "processor", "gpu", *doctor.OPTIONAL}


def test_an_absent_package_is_named_with_its_purpose(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "OPTIONAL", {"no_such_package": "wonders"})
    doctor.check_installation()
    assert "no_such_package not installed (wonders)" in capsys.readouterr().out


def test_examples_of_every_task_are_counted(tiny_config, tmp_path, capsys):
    folder = tmp_path / "farm"
    shutil.copytree(tiny_config.parent, folder)
    rows = tiny_rows("colour", 30, seed=0)
    write_jsonl(folder / "colour.jsonl", [*rows, {"text": "", "label": "red"}, {"text": "a " * 500, "label": "red"}])
    rows = tiny_rows("prose", 20, seed=1)
    write_jsonl(folder / "prose-validation.jsonl", [*rows, {"text": " "}, {"text": None}])
    doctor.check_data(load_config(folder / "tiny.yaml"))
    told = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "31 train,     20 validation" in told["colour"]
    assert told["colour"].endswith("128 at most, 1 empty, 1 truncated")
    assert "60 train" in told["prose"]
    assert told["prose"].endswith("at most; of validation 2 empty")
    assert told["vocabulary"].endswith("; the data is ready")
    assert told["learns"].startswith("learns at 3.0e-03: ")
    assert not list(folder.glob("runs"))


def test_what_is_wrong_with_the_data_or_the_model_is_an_error(tiny_config, tmp_path):
    config = load_config(tiny_config)
    with pytest.raises(ValueError, match="task 'colour', train split: cannot read .*colour.jsonl"):
        doctor.check_data(replace(config, base=str(tmp_path)))
    with pytest.raises(ValueError, match="task 'retell' predicts next tokens, which needs a causal trunk"):
        replace(config, trunk=replace(config.trunk, causal=False))
    assert not Path(config.run).exists()


@pytest.mark.parametrize(
    ("asked", "waiting"),
    [
        ({}, "spin 1000 times, then sleep"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "active"),
        ({"GOMP_SPINCOUNT": "7"}, "spin 7 times, then sleep"),
    ],
)
def test_threads_spin_briefly_while_they_wait_unless_asked_otherwise(asked, waiting):
    program, environment = command_line("doctor")
    for variable in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        environment.pop(variable, None)
    done = subprocess.run(program, env=environment | asked, capture_output=True, text=True, check=True, timeout=300)
    assert f"waiting        {waiting}\n" in done.stdout


def test_a_machine_that_others_use_is_told():
    assert doctor.load_in_words(0.1, 2) == "0.1 of 2 cores"
    assert doctor.load_in_words(1.2, 2) == "1.2 of 2 cores: other programs use them too, which slows steps on the CPU"
