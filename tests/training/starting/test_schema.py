"""The JSON schema says what configs can be: of those that are right nothing is wrong, and slips are found."""

import json
from pathlib import Path

import pytest

from trunkline.engine.yaml_file import read_yaml
from trunkline.training.cli import main
from trunkline.training.starting.schema import config_schema

jsonschema = pytest.importorskip("jsonschema")
CONFIGS = Path(__file__).resolve().parents[3] / "training" / "configs"
TASK = {"name": "a", "head": "classify", "text": ["t"], "label": "l", "labels": ["x", "y"]}


def faults(config: dict) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(config_schema()).iter_errors(config)]


def test_the_one_that_init_writes_is_the_one_of_the_dataclasses():
    """Made anew by `trunkline schema > training/configs/schema.json`."""
    assert json.loads((CONFIGS / "schema.json").read_text()) == json.loads(json.dumps(config_schema()))


def test_the_command_prints_it(capsys):
    assert main(["schema"]) == 0
    jsonschema.Draft202012Validator.check_schema(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("name", ["demo", "finetune-decoder", "finetune-encoder", "glue", "pretrain"])
def test_our_own_configs_fit(name):
    assert faults(read_yaml((CONFIGS / f"{name}.yaml").read_text())) == []


@pytest.mark.parametrize(
    "config",
    [
        {"tasks": [TASK], "trunk": "tiny", "balancing": "pcgrad", "compile": "auto"},
        {"tasks": [{**TASK, "validation": 0.1}], "trunk": {"preset": "tiny", "dropout": 0.2}, "compile": True},
        {"tasks": ["sst2"], "optimizer": {"learning_rate": "auto", "head_learning_rate": None, "freeze": ["trunk"]}},
    ],
)
def test_what_can_be_written_in_several_ways_fits(config):
    assert faults(config) == []


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tasks": ["sst2"], "stepz": 3},
        {"tasks": ["no-such-task"]},
        {"tasks": [{**TASK, "head": "clasify"}]},
        {"tasks": [{**TASK, "lable": "x"}]},
        {"tasks": [{"name": "a", "head": "classify"}]},
        {"tasks": [{**TASK, "metrics": ["acuracy"]}]},
        {"tasks": ["sst2"], "steps": "many"},
        {"tasks": ["sst2"], "trunk": "tinny"},
        {"tasks": ["sst2"], "balancing": {"method": "pcgrade"}},
    ],
)
def test_slips_do_not_fit(config):
    assert faults(config) != []


def test_every_key_is_explained():
    schema = config_schema()
    task = schema["properties"]["tasks"]["items"]["anyOf"][1]
    parts = [schema, task, *(schema["properties"][name] for name in ("batch", "mixing", "evaluation"))]
    silent = [name for part in parts for name, value in part["properties"].items() if not value.get("description")]
    assert set(silent) <= {"batch", "mixing", "optimizer", "evaluation"}  # whose keys are explained each
