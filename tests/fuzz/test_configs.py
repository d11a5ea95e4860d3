"""Any config, as YAML or from Python: it is taken and comes back as it was saved, or a ValueError says why not."""

import json
from dataclasses import asdict, fields, is_dataclass
from typing import Any, get_args, get_origin

import pytest

pytest.importorskip("hypothesis")

import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from trunkline.engine.config import Config, config_from, restore_config
from trunkline.engine.tasks.task import Task
from trunkline.engine.yaml_file import read_yaml
from trunkline.training.config_file import load_config, save_config

LONGEST = 5_000  # characters of a message, with all faults of a config

numbers = st.one_of(
    st.integers(-3, 300), st.integers(), st.floats(), st.sampled_from((0, 1, 64, 512, 1e-46, 10**9, 10**30, 0.5, 1e308))
)
words = st.one_of(st.text(max_size=12), st.sampled_from(("", "yes", "1e-3", "0,1", "auto", "~", "../x", "[b]", "cuda")))
plain = st.one_of(st.none(), st.booleans(), numbers, words)
anything = st.recursive(
    plain, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=4)), max_leaves=8
)


def of(kind: Any) -> st.SearchStrategy:
    """Values of a field's type, near enough to be taken now and then."""
    if is_dataclass(kind):
        return parts(kind)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (tuple, list):
        return st.lists(of(inner[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(st.sampled_from(("sst2", "mine", "x", 1, None)), of(inner[1]), max_size=2)
    if inner and isinstance(inner[0], str | bool):
        return st.sampled_from(inner)
    if inner:
        return st.one_of(*map(of, inner))
    return {str: words, bool: st.booleans(), type(None): st.none()}.get(kind, numbers)


def parts(kind: type) -> st.SearchStrategy:
    """Some fields of a dataclass, most of them of their type, and now and then one that it does not have."""
    known = {field.name: st.one_of(of(field.type), of(field.type), of(field.type), anything) for field in fields(kind)}
    if kind is Config:
        known.pop("init")  # whose folder may be this one
        task = st.one_of(st.sampled_from(("sst2", "dialogue", "text", "stsb", "sst")), parts(Task))
        known["tasks"] = st.one_of(st.lists(task, min_size=1, max_size=3), anything)
    if kind is Task:
        known["name"] = st.one_of(st.sampled_from(("mine", "x")), words)
    stranger = st.dictionaries(st.one_of(words, numbers), anything, max_size=1)
    some = st.lists(st.sampled_from(sorted(known)), max_size=5, unique=True)
    chosen = some.flatmap(lambda names: st.fixed_dictionaries({name: known[name] for name in names}))
    return st.one_of(chosen, chosen, st.builds(lambda a, b: {**b, **a}, chosen, stranger))


def config_or_fault(make: Any) -> Config | None:
    try:
        return make()
    except ValueError as error:
        said = str(error)
    assert said.strip()
    assert len(said) < LONGEST
    assert "\n" not in said
    return None


@given(parts(Config))
@example({"tasks": ["dialogue"], "trunk": {"max_positions": 8}})
@example({"tasks": ["sst2"], "optimizer": {"learning_rate": "auto", "clip": float("nan")}})
@example({"class_weights": {"sst2": "1,\n2"}})
def test_a_config_from_python_is_taken_or_refused(settings: dict) -> None:
    config = config_or_fault(lambda: config_from({"tasks": ["sst2"], **settings}))
    if config is not None:
        assert restore_config(json.loads(json.dumps(asdict(config)))) == config


@given(parts(Config))
def test_a_config_from_a_file_is_taken_or_refused(tmp_path_factory: pytest.TempPathFactory, settings: dict) -> None:
    folder = tmp_path_factory.getbasetemp()
    path = folder / "fuzz.yaml"
    path.write_text(yaml.safe_dump({"tasks": ["sst2"], **settings}, allow_unicode=True), encoding="utf-8")
    config = config_or_fault(lambda: load_config(path))
    if config is not None:
        save_config(config, folder / "again.yaml")
        assert load_config(folder / "again.yaml") == config


PIECES = "a|b|: |- |\n|  |[|]|{|}|,|&x |*x|<<: |1e-3|yes|'|\"|!!int |? |#|---\n|\t|é|\x00".split("|")
KEYS = ("steps", "batch.tokens", "trunk", "trunk.x.y", "", ".", "tasks", "balancing.layers")
pieces = st.sampled_from(PIECES)
overrides_ = st.lists(st.builds("{}={}".format, st.sampled_from(KEYS), st.one_of(words, pieces)), max_size=3)


@given(st.one_of(st.lists(pieces, max_size=30).map("".join), st.text(max_size=60)))
@example("a: &x [*x]")
def test_any_text_is_yaml_or_a_value_error(text: str) -> None:
    try:
        value = read_yaml(text)
    except ValueError:
        return
    if "e" not in text.lower():  # of numbers with an exponent we think otherwise
        assert repr(value) == repr(yaml.safe_load(text))


@given(overrides_)
def test_any_override_is_taken_or_refused(tmp_path_factory: pytest.TempPathFactory, overrides: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "overridden.yaml"
    path.write_text("tasks: [sst2]\n", encoding="utf-8")
    config_or_fault(lambda: load_config(path, overrides))
