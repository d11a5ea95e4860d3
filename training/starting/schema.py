"""The JSON schema of a config, from its dataclasses: editors complete keys by it, and mark what is no key or value."""

import types
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin

from trunkline.engine.config import Config
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.trunk_config import PRESETS, TrunkConfig
from trunkline.engine.settings import Balancing
from trunkline.engine.tasks.builtin import BUILTIN
from trunkline.engine.tasks.task import Task
from trunkline.training.scoring.metrics import METRICS

Schema = dict[str, Any]
PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", types.NoneType: "null"}


def config_schema() -> Schema:
    """Of the YAML that `trunkline train` reads (JSON Schema, draft 2020-12)."""
    schema = _object(Config)
    schema["properties"]["tasks"]["items"] = {"anyOf": [{"enum": [*BUILTIN]}, _task()]}
    trunk = _object(TrunkConfig)
    trunk["properties"]["preset"] = {"enum": [*PRESETS], "description": "The fields of this shape are the defaults."}
    methods = [*get_args(_type_of(Balancing, "method"))]
    for name, names, part in (("trunk", [*PRESETS], trunk), ("balancing", methods, _object(Balancing))):
        description = schema["properties"][name].get("description", "")
        schema["properties"][name] = {"description": description, "anyOf": [{"enum": names}, part]}
    title = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A training run of Trunkline"}
    return title | schema


def _task() -> Schema:
    schema = _object(Task)
    schema["properties"]["head"] |= {"enum": [*HEADS]}
    schema["properties"]["metrics"]["items"] = {"enum": [*METRICS]}
    for split in ("train", "validation"):  # a table can be given from Python only
        schema["properties"][split] |= {"type": ["string", "number"] if split == "validation" else "string"}
        schema["properties"][split].pop("anyOf", None)
    return schema


def _type_of(kind: type, name: str) -> Any:
    return next(field.type for field in fields(kind) if field.name == name)


def _object(kind: type) -> Schema:
    """Of a dataclass: its fields, what they mean, and their defaults."""
    from docstring_parser import parse_from_object

    meaning = {part.arg_name: part.description for part in parse_from_object(kind).params}
    properties: Schema = {}
    required = []
    for field in fields(kind):
        schema = _of(field.type)
        if text := meaning.get(field.name):
            schema["description"] = " ".join(text.split())
        if field.default is not MISSING:
            schema["default"] = _plain(field.default)
        elif field.default_factory is MISSING:
            required.append(field.name)
        properties[field.name] = schema
    needed = {"required": required} if required else {}
    return {"type": "object", "properties": properties, "additionalProperties": False, **needed}


def _of(kind: Any) -> Schema:
    """Of a type as configs have them."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return {}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_of(one) for one in inner if one is not Any]}
    if origin is Literal:
        return {"enum": [*inner]}
    if origin in (tuple, list):
        return {"type": "array", "items": _of(inner[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of(inner[1])}
    return _object(kind) if isinstance(kind, type) and is_dataclass(kind) else {"type": PLAIN[kind]}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple | list) else value
