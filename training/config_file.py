"""Configs as YAML files: read, with key=value overrides, checked key by key, and written."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from trunkline.engine.config import Config, balancing_of, trunk_of
from trunkline.engine.heads.registry import head_of
from trunkline.engine.network.trunk import PRESETS
from trunkline.engine.tasks.task import Task

if TYPE_CHECKING:
    import jsonargparse


def load_config(path: Path, overrides: Sequence[str] = (), kind: type[Config] = Config) -> Config:
    """Reads a run's YAML and changes what `overrides` say.

    Args:
        path: the file; relative file names of its tasks start from its folder.
        overrides: 'key=value' or 'key.inner=value', the value in YAML.
        kind: `Config`, or one with more fields.

    Raises:
        ValueError: no such file, not YAML, an unknown key (the nearest valid one is named) or a wrong type.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config {path}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"config {path}: expected 'key: value' lines, got {settings!r}")
    settings = {"run": f"runs/{path.stem}", "base": str(path.parent), **settings}
    for override in overrides:
        _override(settings, override)
    return config_from(settings, kind)


def config_from(settings: Mapping[str, Any], kind: type[Config] = Config) -> Config:
    """The config that plain dicts, lists and values describe.

    Raises:
        ValueError: an unknown key (the nearest valid one is named) or a wrong type.
    """
    import jsonargparse

    trunk = _expand_preset(settings.get("trunk", {}))
    if (init := settings.get("init")) and isinstance(trunk, Mapping):
        trunk = {**trunk, **asdict(trunk_of(init, trunk))}
    settings = {**settings, "trunk": trunk}
    if "balancing" in settings:
        settings["balancing"] = balancing_of(settings["balancing"])
    _check_keys(settings, kind, "")
    parser = config_parser(kind)
    try:
        return kind(**vars(parser.instantiate(parser.parse_object(settings))))
    except jsonargparse.ArgumentError as error:
        raise ValueError(f"config: {' '.join(str(error).split())}") from error


def config_parser(kind: type[Config] = Config) -> "jsonargparse.ArgumentParser":
    """A parser that knows every key, its type, its default and what its docstring says."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(exit_on_error=False, prog="trunkline train CONFIG.yaml")
    parser.add_class_arguments(kind)
    return parser


def save_config(config: Config, path: Path) -> None:
    """Writes a config that `load_config` reads back."""
    path.write_text(yaml.safe_dump(_plain(asdict(config)), sort_keys=False, allow_unicode=True), encoding="utf-8")


def _plain(value: Any) -> Any:
    """Tuples as lists, which is what YAML has."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple | list) else value


def _override(settings: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"config: expected key=value, got '{override}'")
    *path, last = key.split(".")
    for name in path:
        inner = settings.get(name)
        settings[name] = {SHORT[name]: inner} if name in SHORT and isinstance(inner, str) else (inner or {})
        settings = settings[name]
        if not isinstance(settings, dict):
            raise ValueError(f"config: '{override}': '{name}' is {settings!r} and has no keys")
    try:
        settings[last] = yaml.safe_load(value) if value else ""
    except yaml.YAMLError as error:
        raise ValueError(f"config: '{override}': {error}") from error


SHORT = {"trunk": "preset", "balancing": "method"}  # keys that may have one of their fields as their value


def _expand_preset(trunk: Any) -> Any:
    """The fields of the trunk, with those of its preset where it does not give them itself."""
    if isinstance(trunk, str):
        trunk = {"preset": trunk}
    if not isinstance(trunk, dict) or "preset" not in trunk:
        return trunk
    name = trunk["preset"]
    if name not in PRESETS:
        raise ValueError(f"config: trunk '{name}' is no preset; there are {', '.join(PRESETS)}")
    return {**PRESETS[name], **{key: value for key, value in trunk.items() if key != "preset"}}


def _check_keys(settings: Any, of: type, where: str) -> None:
    """Names the nearest valid key for one that does not exist."""
    if not isinstance(settings, Mapping):
        raise ValueError(f"config: expected keys and values for {where.rstrip('.')}, got {settings!r}")
    known = {field.name: field for field in fields(of)}
    for key, value in settings.items():
        if key not in known:
            near = get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise ValueError(f"config: unknown key '{where}{key}'; did you mean '{where}{near}'?")
        if value is None and known[key].default is not None:
            raise ValueError(f"config: '{where}{key}' has no value")
        inner = known[key].type
        if isinstance(inner, type) and is_dataclass(inner):
            _check_keys(value, inner, f"{where}{key}.")
        if issubclass(of, Config) and key == "tasks" and isinstance(value, Iterable):
            for number, task in enumerate(value):
                if not isinstance(task, str):
                    _check_keys(task, Task, f"tasks[{number}].")
                    _check_head(task.get("head"), f"tasks[{number}].head")


def _check_head(name: Any, where: str) -> None:
    if isinstance(name, str):
        try:
            head_of(name)
        except ValueError as error:
            raise ValueError(f"config: {where}: {error}") from error
