"""Configs as YAML files: read, with key=value overrides, checked key by key, and written."""

import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trunkline.engine.checks import short
from trunkline.engine.config import TRAINED, Config, config_from
from trunkline.engine.tasks.task import Task
from trunkline.engine.yaml_file import read_yaml, write_yaml


def load_config(path: str | Path, overrides: Sequence[str] = (), kind: type[Config] = Config) -> Config:
    """Reads a run's YAML and changes what `overrides` say.

    Args:
        path: the file; relative names of its tasks' files start from its folder, and so do those of `data`, `init` and
            `tokenizer` where there is such a thing.
        overrides: 'key=value' or 'key.inner=value', the value in YAML; names in them start from the working directory.
            With `init` or `tokenizer` among them, the size that the file gives a tokenizer to be trained is nobody's.
        kind: `Config`, or one with more fields.

    Raises:
        ValueError: no such file, not YAML, a key that stands twice or is unknown (the nearest valid one is named), or a
            value of a wrong type.
    """
    path = Path(path)
    try:
        settings = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"config {path}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"config {path}: expected 'key: value' lines, got {short(settings)}")
    base = os.path.abspath(path.parent)
    for name in ("data", "init", "tokenizer"):
        given = settings.get(name)
        if given and isinstance(given, str) and (beside := Path(base, os.path.expanduser(given))).exists():
            settings[name] = str(beside)  # else it lies here, or on the hub
    settings = {"run": f"runs/{path.stem}", "base": base, **settings}
    given = {override.partition("=")[0] for override in overrides if override.partition("=")[2]}
    if given & {"init", "tokenizer"}:
        settings = {name: value for name, value in settings.items() if name not in TRAINED}
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
    text = parser.format_help().partition("\n\n")[2]
    return re.sub(
        r" +--\S+( CONFIG\s+Path to a configuration file\.|\.help\s+Show the help .*)\n", "", text
    )  # not ours


def save_config(config: Config, path: Path) -> None:
    """Writes a config that `load_config` reads back."""
    path.write_text(write_yaml(_plain(asdict(config))), encoding="utf-8")


def _plain(value: Any) -> Any:
    """Tuples as lists, which is what YAML has."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple | list) else value


def _override(settings: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"config: expected key=value, got {short(override)}")
    *path, last = key.split(".")
    for name in path:
        inner = settings.get(name)
        settings[name] = {SHORT[name]: inner} if name in SHORT and isinstance(inner, str) else (inner or {})
        settings = settings[name]
        if not isinstance(settings, dict):
            raise ValueError(f"config: {short(override)}: {short(name)} is {short(settings)} and has no keys")
    try:
        settings[last] = read_yaml(value) if value else ""
    except ValueError as error:
        raise ValueError(f"config: {short(override)}: {error}") from error


SHORT = {"trunk": "preset", "balancing": "method"}  # keys that may have one of their fields as their value
