"""Every setting has its type and its range, from Python as from a file; a dict does where a dataclass is meant."""

import math
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
import pytest

from trunkline import Engine, Task, TrunkConfig
from trunkline.engine.checks import Range, above, at_least, from_to_below, nearest, short
from trunkline.engine.config import Config, changed, config_from
from trunkline.engine.network.generate import Search
from trunkline.engine.settings import Balancing, Batch, Evaluation, Mixing, Optimizer

WRITES = Task("writes", "generate", ("a",), "b")


def error_of(make, *arguments, **settings) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers check the words)
        make(*arguments, **settings)
    return str(caught.value)


# Ranges


def test_a_range_says_which_end_is_broken():
    assert at_least(1, 5).broken(0) == "at least 1"
    assert at_least(1, 5_000_000).broken(5_000_001) == "at most 5,000,000"
    assert [at_least(1, 5).broken(value) for value in (1, 3, 5)] == [""] * 3
    assert above(0).broken(0) == "above 0"
    assert from_to_below(0, 1).broken(1) == "below 1"
    assert from_to_below(0, 1).broken(0) == ""
    assert [Range().broken(value) for value in (math.nan, math.inf, -math.inf)] == ["finite"] * 3
    assert at_least(1e-20).broken(1e-46) == "at least 1e-20"


DESTROYING = [
    (Optimizer, "optimizer", {"clip": 0}, "above 0"),
    (Optimizer, "optimizer", {"clip": -1.0}, "above 0"),
    (Optimizer, "optimizer", {"learning_rate": -1e-3}, "at least 0"),
    (Optimizer, "optimizer", {"learning_rate": 300}, "at most 10"),
    (Optimizer, "optimizer", {"learning_rate": math.nan}, "finite"),
    (Optimizer, "optimizer", {"warmup": -0.1}, "at least 0"),
    (Optimizer, "optimizer", {"weight_decay": -0.1}, "at least 0"),
    (Optimizer, "optimizer", {"beta1": 1.0}, "below 1"),
    (Optimizer, "optimizer", {"beta2": -0.5}, "at least 0"),
    (Optimizer, "optimizer", {"give_up_after": 0}, "at least 1"),
    (Batch, "batch", {"tokens": 0}, "at least 1"),
    (Batch, "batch", {"tokens": 10**12}, "at most 2,147,483,647"),
    (Batch, "batch", {"max_length": -5}, "at least 1"),
    (Batch, "batch", {"accumulate": 0}, "at least 1"),
    (Evaluation, "evaluation", {"every": 0}, "at least 1"),
    (Mixing, "mixing", {"temperature": math.inf}, "at most 1,000,000"),
    (Mixing, "mixing", {"patience": 0}, "at least 1"),
    (Balancing, "balancing", {"watch": -1}, "at least 0"),
    (Search, "search", {"max_new_tokens": 0}, "at least 1"),
    (Search, "search", {"beams": 10**9}, "at most 1,024"),
    (Search, "search", {"min_new_tokens": -1}, "at least 0"),
    (Search, "search", {"length_penalty": math.nan}, "finite"),
    (TrunkConfig, "trunk", {"num_heads": 0}, "at least 1"),
    (TrunkConfig, "trunk", {"hidden_size": -4}, "at least 1"),
    (TrunkConfig, "trunk", {"num_layers": 0}, "at least 1"),
    (TrunkConfig, "trunk", {"num_kv_heads": 0}, "at least 1"),
    (TrunkConfig, "trunk", {"max_positions": 10**9}, "at most 16,777,216"),
    (TrunkConfig, "trunk", {"dropout": 1.0}, "below 1"),
    (TrunkConfig, "trunk", {"norm_eps": -1.0}, "at least 0"),
    (TrunkConfig, "trunk", {"rope_theta": 0.0}, "above 0"),
]


@pytest.mark.parametrize(("kind", "where", "settings", "words"), DESTROYING, ids=str)
def test_what_would_destroy_a_run_is_refused(kind, where, settings, words):
    ((name, value),) = settings.items()
    expected = f"{where}.{name} must be {words}, got "
    assert error_of(kind, **settings).startswith(expected)
    assert error_of(config_from, {"tasks": ["sst2"], where: settings}).startswith(f"config: {expected}")


def test_no_number_of_a_config_may_be_infinite_or_none_at_all():
    def numbers(kind, where):
        for field in fields(kind):
            if is_dataclass(field.type):
                yield from numbers(field.type, (*where, field.name))
            elif field.type in (float, int):
                yield (*where, field.name)

    found = list(numbers(Config, ()))
    assert len(found) > 30
    for value in (math.nan, math.inf, -math.inf):
        for *where, name in found:
            settings = {name: value}
            for key in where:
                settings = {key: settings}
            assert name in error_of(config_from, {"tasks": ["sst2"], **settings})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": {"warmup": 100}}, "share of the steps in which the learning rate rises, "),
        ({"optimizer": {"learning_rate": 1, "weight_decay": 2}}, "optimizer.weight_decay 2.0 with "),
        ({"label_smoothing": 1.0}, "label_smoothing must be below 1, got 1.0"),
        ({"weights": {"sst2": 1e-46}}, "weights must be at least 1e-20, got {'sst2': 1e-46}"),
        ({"weights": {"sst2": 1e30}}, "weights must be at most 1e+20, got {'sst2': 1e+30}"),
        ({"mixing": {"shares": {"sst2": 1e-46}}}, "mixing.shares must be at least 1e-20"),
        ({"class_weights": {"sst2": [1, 1e-46]}}, "class_weights of 'sst2' must be at least 1e-20"),
        ({"search": {"min_new_tokens": 70}}, "search.min_new_tokens 70 is more than search.max_new_tokens 64"),
        ({"tasks": [WRITES], "trunk": {"causal": False}}, "task 'writes' predicts next tokens"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_together_is_refused(settings, words):
    assert words in error_of(config_from, {"tasks": ["sst2"], **settings})


# Types


def test_all_that_is_wrong_is_said_at_once():
    message = error_of(config_from, {"tasks": ["sst2"], "steps": "x", "batch": {"token": 1, "tokens": 0.5}, "sed": 1})
    assert message.split("; ") == [
        "config: steps: expected a whole number, got 'x'",
        "unknown key 'batch.token'",
        "did you mean 'batch.tokens'?",
        "batch.tokens: expected a whole number, got 0.5",
        "unknown key 'sed'",
        "did you mean 'seed'?",
    ]
    message = error_of(config_from, {"tasks": ["sst2", "sst2"], "batch": {"max_length": 4096}, "weights": {"x": 1}})
    assert all(words in message for words in ("sst2 twice", "batch.max_length 4096", "weights names x"))


@pytest.mark.parametrize(
    ("given", "meant"),
    [("lr", "learning_rate"), ("learning_rate", "optimizer.learning_rate"), ("max_length", "batch.max_length"),
     ("beams", "search.beams"), ("stps", "steps"), ("num_layers", "trunk.num_layers")],
)  # fmt: skip
def test_the_key_that_was_meant_is_found_inside_too(given, meant):
    assert f"unknown key '{given}'; did you mean '" in error_of(Engine, tasks=["sst2"], **{given: 3})
    assert meant in error_of(Engine, tasks=["sst2"], **{given: 3})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 1.5}, "steps: expected a whole number, got 1.5"),
        ({"steps": True}, "steps: expected a whole number, got True"),
        ({"steps": "5.0"}, "steps: expected a whole number, got '5.0'"),
        ({"optimizer": {"clip": "0,1"}}, "optimizer.clip: expected a number, with a point and not a comma, got '0,1'"),
        ({"optimizer": 3}, "optimizer: expected keys and values, got 3"),
        ({"tasks": "sst2"}, " a list"),
        ({"tasks": {"sst2": 1}}, " a list, got "),
        ({"projection": "glu"}, "'tanh', 'pooler', got 'glu'; did you mean 'gelu'?"),
        ({"lowercase": "maybe"}, "lowercase: expected true or false, got 'maybe'"),
        ({"weights": [1]}, "weights: expected keys and values, got [1]"),
        ({"weights": {1: 2.0}}, "weights: expected a name, got 1"),
        ({"mixing": {"shares": {"\n": 2.0}}}, "mixing.shares: expected a name, got '\\n'"),
        ({"weights": {"sst2": "much"}}, "weights.sst2: expected a number, got 'much'"),
        ({"device": None}, "'device' has no value"),
        ({"tasks": [{"name": "x", "head": "tag"}]}, "tasks[0].text is missing (in 'x')"),
        ({"data": ["x" * 10_000]}, "data: expected text, got ["),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_a_wrong_type_is_said_in_our_words(settings, words):
    for make in (
        lambda **given: config_from({"tasks": ["sst2"], **given}),
        lambda **given: Engine(**{"tasks": ["sst2"], **given}),
    ):
        message = error_of(make, **settings)
        assert words in message
        assert len(message) < 400


def test_what_stands_for_a_value_is_one():
    config = config_from(
        {"tasks": ["sst2"], "steps": "5", "seed": np.int64(3), "prompt_weight": np.float32(0.5), "data": Path("a/b")}
        | {"optimizer": {"learning_rate": "1e-3", "clip": 2}, "compile": "auto", "lowercase": "true"}
    )
    assert (config.steps, config.seed, config.prompt_weight, config.data) == (5, 3, 0.5, "a/b")
    assert [type(value) for value in (config.steps, config.seed, config.prompt_weight)] == [int, int, float]
    assert config.optimizer == Optimizer(learning_rate=1e-3, clip=2.0)
    assert (config.compile, config.lowercase) == ("auto", True)


def test_a_task_is_checked_in_python_too():
    assert "task 'x': there is no head 'clasify'; did you mean 'classify'?" in error_of(
        Task, "x", "clasify", ("a",), "b", ("c",)
    )
    assert "task 'x': text: expected a list such as [a], got 'a'" in error_of(Task, "x", "regress", "a", "b")
    assert Task("x", "classify", ["a"], "b", ["c", "d"]) == Task("x", "classify", ("a",), "b", ("c", "d"))


def test_a_value_in_a_message_is_short():
    nested = [["x" * 1000] * 1000] * 1000
    for _ in range(20):
        nested = [nested] * 1000
    assert len(short(nested)) < 2000
    assert nearest("lr", ["layers", "learning_rate"]) == "learning_rate"


# Dicts for dataclasses


def test_a_dict_does_where_a_dataclass_is_meant():
    parts = {"optimizer": {"learning_rate": 3e-4}, "batch": {"tokens": 256}, "mixing": {"method": "proportional"}}
    parts |= {"evaluation": {"every": 7}, "search": {"beams": 2}, "balancing": "pcgrad"}
    task = {"name": "x", "head": "classify", "text": ["a"], "label": "b", "labels": ["c", "d"]}
    engine = Engine({"hidden_size": 32, "num_heads": 2}, [task, "sst2"], **parts)
    config = engine.config
    assert config.optimizer == Optimizer(learning_rate=3e-4)
    assert config.batch == Batch(tokens=256, max_length=256)
    assert (config.mixing, config.evaluation, config.search) == (
        Mixing("proportional"),
        Evaluation(every=7),
        Search(beams=2),
    )
    assert config.balancing == Balancing("pcgrad")
    assert config.trunk == TrunkConfig(hidden_size=32, num_heads=2)
    assert engine.tasks[0] == Task("x", "classify", ("a",), "b", ("c", "d"))
    assert Config(tasks=["sst2"], trunk="small", optimizer={"clip": 3}).optimizer == Optimizer(clip=3)


def test_a_dict_changes_what_it_names():
    config = changed(
        config_from({"tasks": ["sst2"], "batch": {"tokens": 256}}), {"batch": {"accumulate": 2}, "steps": "7"}
    )
    assert (config.batch, config.steps) == (Batch(256, 2, 256), 7)
    for changes, words in (
        ({"stesp": 3}, "unknown key 'stesp'; did you mean 'steps'?"),
        ({"batch": {"token": 3}}, "unknown key 'batch.token'; did you mean 'batch.tokens'?"),
        ({"optimizer": {"clip": 0}}, "optimizer.clip must be above 0, got 0"),
    ):
        assert words in error_of(changed, config, changes)
        assert words in error_of(Engine(tasks=["sst2"]).fit, **changes)


# What is left open


def test_lengths_that_are_not_given_fit_those_that_are():
    def fitted(**settings):
        config = config_from({"tasks": [{"name": "x", "head": "generate", "text": ["a"], "label": "b"}], **settings})
        return config.batch.max_length, config.search.max_new_tokens, config.tasks[0].max_target_tokens

    assert fitted() == (512, 64, 100)
    assert fitted(trunk={"max_positions": 576}) == (512, 64, 100)
    assert fitted(trunk={"max_positions": 64}) == (48, 16, 23)
    assert fitted(trunk={"max_positions": 256}, batch={"max_length": 192}) == (192, 64, 100)
    assert fitted(trunk={"max_positions": 256}, batch={"max_length": 250}) == (250, 6, 100)
    assert fitted(batch={"tokens": 96}) == (96, 64, 47)
    assert fitted(trunk={"max_positions": 100}, search={"max_new_tokens": 40}) == (60, 40, 29)
    config = config_from({"tasks": ["sst2", "dialogsum"], "trunk": {"max_positions": 80}})
    assert [task.max_target_tokens for task in config.all_tasks] == [100, 29]
    assert config_from({"tasks": ["sst2"], "trunk": {"max_positions": 64}}).batch.max_length == 64


def test_what_is_given_is_not_made_to_fit():
    for settings in (
        {"batch": {"max_length": 128}},
        {"search": {"max_new_tokens": 128}},
        {"batch": {"max_length": 60}, "search": {"max_new_tokens": 8}},
    ):
        with pytest.raises(ValueError, match=r"trunk.max_positions 64"):
            config_from({"tasks": ["dialogue"], "trunk": {"max_positions": 64}, **settings})


# The device


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "", "cpu:x", "tpu"])
def test_a_device_that_is_not_there_is_refused_at_once(device):
    message = error_of(Engine, tasks=["sst2"], device=device)
    assert f"device '{device}' cannot be used: " in message
    assert "here are auto, cpu" in message
    assert "\n" not in message
