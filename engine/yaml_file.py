"""YAML as its writer meant it: no key twice, no aliases that stand for millions of values, 1e-3 a number."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

LARGEST = 100_000  # values of a file, with all that its aliases stand for
NUMBER = re.compile(r"[-+]?(\d+|\d+\.\d*|\.\d+)[eE][-+]?\d+")  # YAML 1.1 wants a point and a sign as well


class _Loader(yaml.SafeLoader):
    """SafeLoader, which makes nothing but plain values, with the checks of this file."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper, which quotes what `read_yaml` would take for something else, and keeps a text on its line."""

    def text(self, value: str) -> yaml.Node:
        return self.represent_scalar(
            "tag:yaml.org,2002:str", value, style='"' if f"{value}.".splitlines()[1:] else None
        )


_Dumper.add_representer(str, _Dumper.text)

_FLOAT = ("tag:yaml.org,2002:float", re.compile(f"^{NUMBER.pattern}$"), list("-+.0123456789"))
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(*_FLOAT)


def read_yaml(text: str) -> Any:
    """The plain values of a YAML text.

    Raises:
        ValueError: not YAML, a key that stands twice in one mapping (both lines are named), or more values than any
            config has.
    """
    loader = None
    try:
        loader = _Loader(text)  # characters that YAML does not have are found here
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        _check_keys(node)
        return loader.construct_document(node)
    except RecursionError as error:
        raise ValueError("lists or mappings lie too deep in one another") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except (AttributeError, LookupError, TypeError, OverflowError) as error:  # PyYAML's own, as of `!!int ""`
        raise ValueError(f"a value is not of the type that its tag names: {error}") from error
    finally:
        if loader:
            loader.dispose()


def write_yaml(value: Any) -> str:
    """Plain values as a text that `read_yaml` gives back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def flow(value: Any) -> str:
    """Plain values on one line, as [a, b] and {a: 1}."""
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf")
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _inner(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [inner for pair in node.value for inner in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Values that a node stands for; each node is looked at once, however many aliases it has."""
    if id(node) not in known:
        known[id(node)] = LARGEST + 1  # should it lie inside itself
        known[id(node)] = 1 + sum(_count(inner, known) for inner in _inner(node))
    if known[id(node)] > LARGEST:
        raise ValueError(f"{_line(node)}: its aliases stand for more than {LARGEST:,} values")
    return known[id(node)]


def _check_keys(node: yaml.Node) -> None:
    if isinstance(node, yaml.MappingNode):
        first: dict[Hashable, yaml.Node] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                before = first.setdefault((key.tag, key.value), key)
                if before is not key:
                    raise ValueError(
                        f"'{key.value}' stands twice in the same place, in line {before.start_mark.line + 1} and in "
                        f"{_line(key)}: leave one out; if these are two of a list, the second lacks its '-'"
                    )
    for inner in _inner(node):
        _check_keys(inner)


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"
