"""Configs as YAML files: read, with key=value overrides, checked key by key, and written."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

<<<<<<< HEAD
from trunkline.engine.config import Config, balancing_of, trunk_of
from trunkline.engine.heads.registry import head_of
from trunkline.engine.network.trunk import PRESETS
=======
from trunkline.engine.checks import short
from trunkline.engine.config import Config, config_from
>>>>>>> 47c7503 (config, engine: what comes from outside is checked before it is believed)
from trunkline.engine.tasks.task import Task
from trunkline.training.yaml_file import read_yaml


def load_config(path: Path, overrides: Sequence[str] = (), kind: type[Config] = Config) -> Config:
    """Reads a run's YAML and changes what `overrides` say.

    Args:
        path: the file; relative file names of its tasks, of `init` and of `tokenizer` start from its folder.
        overrides: 'key=value' or 'key.inner=value', the value in YAML.
        kind: `Config`, or one with more fields.

    Raises:
        ValueError: no such file, not YAML, a key that stands twice or is unknown (the nearest valid one is named), or a
            value of a wrong type.
    """
    try:
        settings = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"config {path}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"config {path}: expected 'key: value' lines, got {short(settings)}")
    base = os.path.abspath(path.parent)
    for name in ("init", "tokenizer"):
        given = settings.get(name)
        if given and isinstance(given, str) and (beside := Path(base, given)).exists():
            settings[name] = str(beside)  # else it lies here, or on the hub
    settings = {"run": f"runs/{path.stem}", "base": base, **settings}
    for override in overrides:
        _override(settings, override)
    return config_from(settings, kind)


def settings_help(kind: type[Config] = Config) -> str:
    """Every key of a config and of a task, with its type, its default and what it means."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_class_arguments(kind)
    parser.add_class_arguments(Task, "tasks[i]")
    lines = parser.format_help().partition("\n\n")[2].split("\n")
    return "\n".join(line for line in lines if ".help " not in line)


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
            raise ValueError(f"config: '{override}': '{name}' is {short(settings)} and has no keys")
    try:
        settings[last] = read_yaml(value) if value else ""
    except ValueError as error:
        raise ValueError(f"config: '{override}': {error}") from error


SHORT = {"trunk": "preset", "balancing": "method"}  # keys that may have one of their fields as their value
<<<<<<< HEAD


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
=======
>>>>>>> 47c7503 (config, engine: what comes from outside is checked before it is believed)
