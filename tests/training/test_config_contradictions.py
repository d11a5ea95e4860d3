"""Settings that contradict one another, or that no run could use."""

from dataclasses import asdict

import pytest

from trunkline.engine.config import restore_config
from trunkline.training.config_file import config_from

ONE = {"tasks": ["sst2"]}
WRITES = {"name": "mine", "head": "generate", "text": ["a"], "label": "b"}
FIELDS = {"name": "mine", "head": "classify", "text": ["a"], "label": "b", "labels": ["no", "yes"]}


def error_of(settings: dict) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers check the words)
        config_from(settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": []}, "config: tasks is empty"),
        ({"tasks": ["sst2", "rte", "sst2"]}, "config: tasks names sst2 twice"),
        ({"tasks": ["mine", FIELDS]}, "config: unknown task 'mine'; did you mean "),
        ({"tasks": ["rte", FIELDS, FIELDS | {"head": "tag"}]}, "config: tasks names mine twice"),
        ({"tasks": ["sst-2"]}, "config: unknown task 'sst-2'; did you mean 'sst2'?"),
        (
            {"batch": {"max_length": 4096}},
            "config: batch.max_length 4096 is more than a batch holds, batch.tokens 2048",
        ),
        ({"batch": {"max_length": 1025}}, "config: batch.max_length 1025 and search.max_new_tokens 64 need more than "),
        (
            {"tasks": ["dialogsum"], "batch": {"max_length": 961}, "search": {"max_new_tokens": 64}},
            "config: batch.max_length 961 and search.max_new_tokens 64 need more than trunk.max_positions 1024",
        ),
        (
            {"tasks": [WRITES | {"max_target_tokens": 100}], "batch": {"max_length": 102}},
            "config: batch.max_length 102 leaves no room for the text of task 'mine', whose separators and target "
            "take 102 tokens",
        ),
        ({"tasks": ["rte"], "batch": {"max_length": 2}}, "config: batch.max_length 2 leaves no room for the text of "),
        (
            {"tasks": ["sst2", "rte"], "mixing": {"method": "fixed", "shares": {"rte": 1}}},
            "config: mixing.method fixed needs mixing.shares for every task; sst2 lack",
        ),
        (
            {"tasks": ["sst2", "rte"], "mixing": {"method": "progress", "shares": {"rte": 1}}},
            "config: mixing.method progress needs mixing.shares for every task; sst2 lack",
        ),
        (
            {"parallel": "shard", "balancing": "pcgrad"},
            "config: parallel shard does not go with balancing pcgrad, which holds all batches of a step",
        ),
        (
            {"parallel": "shard", "balancing": {"watch": 5}},
            "config: parallel shard does not go with balancing.watch, which holds",
        ),
        ({"parallel": "shard", "compile": True}, "config: parallel shard does not go with compile true"),
        ({"parallel": "shard", "mixing": {"patience": 2}}, "config: parallel shard cannot hold the heads of single "),
        (
            {"parallel": "shard", "tasks": ["sst2", "rte"], "optimizer": {"freeze": ["rte"]}},
            "config: parallel shard cannot hold the heads of single tasks still",
        ),
        ({"parallel": "shard", "architecture": "bilstm"}, "config: parallel shard puts a trunk's blocks together "),
        ({"mixing": {"patience": 0}}, "config: mixing.patience must be at least 1, got 0"),
        (
            {"mixing": {"shares": {"sst2": 1, "rte": 1}}},
            "config: mixing.shares names rte, which is none of sst2",
        ),
        ({"mixing": {"shares": {"sst2": 0}}}, "config: mixing.shares must be above 0, got {'sst2': 0.0}"),
        ({"weights": {"sst-2": 1}}, "config: weights names sst-2, which is none of sst2"),
        ({"weights": {"sst2": -1}}, "config: weights must be above 0, got {'sst2': -1.0}"),
        ({"weights": {"sst2": float("nan")}}, "config: weights must be above 0, got {'sst2': nan}"),
        ({"mixing": {"temperature": 0}}, "config: mixing.temperature must be above 0, got 0"),
        ({"steps": 0}, "config: steps must be at least 1, got 0"),
        ({"vocab_size": -1}, "config: vocab_size must be at least 1, got -1"),
        ({"seed": -1}, "config: seed must be at least 0, got -1"),
        ({"prompt_weight": -0.5}, "config: prompt_weight must be at least 0, got -0.5"),
        (
            {"class_weights": {"sst2": [1.0, 2.0, 1.0]}},
            "config: class_weights of 'sst2': expected 2 numbers above 0, got [1.0, 2.0, 1.0]",
        ),
        (
            {"class_weights": {"sst2": [1.0, 0.0]}},
            "config: class_weights of 'sst2': expected 2 numbers above 0, got [1.0, 0.0]",
        ),
        (
            {"class_weights": {"rte": [1.0, 2.0]}},
            "config: class_weights of 'rte': expected tasks with one class for a row only, got [1.0, 2.0]",
        ),
        ({"batch": {"accumulate": 0}}, "config: batch.accumulate must be at least 1, got 0"),
        ({"evaluation": {"every": 0}}, "config: evaluation.every must be at least 1, got 0"),
        ({"evaluation": {"examples": -1}}, "config: evaluation.examples must be at least 0, got -1"),
        ({"evaluation": {"texts": -1}}, "config: evaluation.texts must be at least 0, got -1"),
        ({"search": {"beams": 0}}, "config: search.beams must be at least 1, got 0"),
        ({"search": {"max_new_tokens": 0}}, "config: search.max_new_tokens must be at least 1, got 0"),
        ({"trunk": {"num_heads": 3}}, "config: trunk: hidden_size 256 is not a multiple of num_heads 3"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_settings_that_cannot_be(settings, message):
    assert error_of(ONE | settings).startswith(message)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch": {"max_length": 1024}},
        {"tasks": ["dialogsum"], "batch": {"max_length": 960}},
        {"tasks": ["dialogsum"], "batch": {"max_length": 103}},
        {"tasks": ["rte"], "batch": {"max_length": 3}},
        {"tasks": ["sst2", FIELDS], "mixing": {"method": "fixed", "shares": {"sst2": 1, "mine": 0.1}}},
        {"evaluation": {"examples": 0, "texts": 0}},
        {"mixing": {"method": "loss_ratio", "patience": 1}},
        {"mixing": {"method": "progress", "shares": {"sst2": 1}, "patience": None}},
    ],
    ids=str,
)
def test_settings_that_just_can_be(settings):
    config = config_from(ONE | settings)
    assert restore_config(asdict(config)) == config


def test_a_task_of_ones_own_is_checked():
    for fields_, words in (
        ({"name": "Mine"}, "task 'Mine': name must be made of a-z"),
        ({"labels": []}, "task 'mine': head 'classify' needs labels"),
        ({"head": "generate", "labels": [], "max_target_tokens": -1}, "max_target_tokens must be at least 1, got -1"),
    ):
        assert words in error_of({"tasks": [FIELDS | fields_]})
