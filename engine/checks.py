"""Settings are what their dataclass says: every field of its type and in its range, wherever it came from.

From Python and from YAML alike, a dict does where a dataclass is meant, a list where a tuple is, and a number may be
text ('1e-3', to YAML 1.1). Everything that is wrong is said at once.
"""

import math
import os
import reprlib
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from datetime import date
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin

LONGEST = 120  # characters of a value in a message


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, without the one or the other where it is open; never infinite or NaN."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def broken(self, value: float) -> str:
        """What a value would have to be; empty where it is."""
        if value < self.low or (self.open_low and value == self.low):
            return f"{'above' if self.open_low else 'at least'} {_number(self.low)}"
        if value > self.high or (self.open_high and value == self.high):
            return f"{'below' if self.open_high else 'at most'} {_number(self.high)}"
        return "" if math.isfinite(value) else "finite"


def at_least(low: float, high: float = math.inf) -> Range:
    return Range(low, high)


def above(low: float, high: float = math.inf) -> Range:
    return Range(low, high, open_low=True)


def from_to_below(low: float, high: float) -> Range:
    return Range(low, high, open_high=True)


FINITE = Range()


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e12 else f"{value:g}"


def check(settings: Any, where: str, **ranges: Range) -> None:
    """Gives every field of a frozen dataclass its type, and holds its numbers against their ranges.

    Args:
        where: what messages put before the name of a field.

    Raises:
        ValueError: lists all that is wrong.
    """
    faults: list[str] = []
    for field in fields(settings):
        before, name = len(faults), where + field.name
        value = _as(getattr(settings, field.name), field.type, name, faults)
        object.__setattr__(settings, field.name, value)
        is_number = isinstance(value, int | float) and len(faults) == before
        if is_number and (wanted := ranges.get(field.name, FINITE).broken(value)):
            faults.append(f"{name} must be {wanted}, got {value}")
    raise_all(faults)


def raise_all(faults: list[str]) -> None:
    """
    Raises:
        ValueError: with all of them, if there are any.
    """
    if faults:
        raise ValueError("; ".join(dict.fromkeys(faults)))


def made(kind: type, given: Mapping[str, Any], where: str = "") -> Any:
    """The dataclass that plain values describe.

    Raises:
        ValueError: lists all that is wrong, with the nearest valid key or value.
    """
    faults: list[str] = []
    value = _made(kind, given, where, faults)
    raise_all(faults)
    return value


def short(value: Any) -> str:
    """A value for a message; however large it is, it costs and takes little."""
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = LONGEST
    shown.maxlist = shown.maxtuple = shown.maxdict = 6
    shown.maxlevel = 3
    return shown.repr(value)


def nearest(name: Any, known: Iterable[Any]) -> str:
    """The valid name that was meant: the one with these initials (lr), or the most alike."""
    names = [str(one) for one in known]
    initials = {"".join(word[:1] for word in one.split("_")): one for one in names if "_" in one}
    return initials.get(str(name)) or get_close_matches(str(name), names, n=1, cutoff=0.0)[0]


def _made(kind: type, given: Mapping[str, Any], where: str, faults: list[str]) -> Any:
    known = {field.name: field for field in fields(kind) if field.init}
    dot = f"{where}." if where else ""
    before, values = len(faults), {}
    for key, value in given.items():
        if key not in known:
            faults.append(
                f"unknown key '{dot}{short(key).strip(chr(39))}'; did you mean '{_nearest_key(key, kind, dot)}'?"
            )
        elif value is None and known[key].default is not None:
            faults.append(f"'{dot}{key}' has no value")
        else:
            values[key] = _as(value, known[key].type, f"{dot}{key}", faults)
    required = [f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [f"{dot}{name}" for name in required if name not in given]:
        faults.append(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    if len(faults) > before:
        return None
    try:
        return kind(**values)
    except ValueError as error:
        faults.append(str(error))
        return None


def _nearest_key(key: Any, kind: type, dot: str) -> str:
    """Of the dataclass and of those inside it, which are often left out: learning_rate is optimizer.learning_rate."""
    inside = {field.name: f"{dot}{field.name}" for field in fields(kind)}
    for field in fields(kind):
        if isinstance(field.type, type) and is_dataclass(field.type):
            for inner in fields(field.type):
                inside.setdefault(inner.name, f"{dot}{field.name}.{inner.name}")
    return inside[nearest(key, inside)]


def _as(value: Any, kind: Any, where: str, faults: list[str]) -> Any:
    """The value as this type; what it cannot be goes to `faults`."""

    def fault(expected: str) -> None:
        faults.append(f"{where}: expected {expected}, got {short(value)}")

    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any or (isinstance(kind, type) and is_dataclass(kind) and isinstance(value, kind)):
        return value
    if origin in (Union, types.UnionType):
        return _as_one_of(value, inner, where, faults)
    if origin is Literal:
        if value not in inner or isinstance(value, bool):
            meant = f"; did you mean {nearest(value, inner)!r}?" if isinstance(value, str) else ""
            fault(f"one of {', '.join(repr(one) for one in inner)}")
            faults[-1] += meant
        return value
    if origin in (tuple, list):
        if isinstance(value, str | Mapping) or not isinstance(value, list | tuple):
            plain = isinstance(value, str) and value.isprintable() and len(value) < LONGEST
            fault(f"a list such as [{value}]" if plain else "a list")
            return value
        return origin(_as_element(one, inner[0], f"{where}[{i}]", faults) for i, one in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            fault("keys and values")
            return value
        faults += [f"{where}: expected a name, got {short(key)}" for key in value if not _is_name(key)]
        return {key: _as(one, inner[1], f"{where}.{key}", faults) for key, one in value.items() if _is_name(key)}
    if isinstance(kind, type) and is_dataclass(kind):
        if not isinstance(value, Mapping):
            fault("keys and values")
            return value
        return _made(kind, value, where, faults)
    return _plain(value, kind, fault)


def _plain(value: Any, kind: Any, fault: Callable[[str], None]) -> Any:
    """A text, a number, yes or no."""
    if kind is str:
        if isinstance(value, str | os.PathLike):
            return os.fspath(value)
        is_what = "true or false" if isinstance(value, bool) else "a number" if isinstance(value, Real) else "a date"
        if isinstance(value, bool | Real | date):
            return fault(f"text, but this is {is_what} to YAML, as are yes, no, on, off, 1 and 2024-01-01: quote it")
        return fault("text")
    if kind is bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        return value if isinstance(value, bool) else fault("true or false")
    number, wanted = value, "a whole number" if kind is int else "a number"
    if isinstance(value, str):
        try:
            number = kind(value)
        except ValueError:
            return fault(wanted + (", with a point and not a comma" if "," in value else ""))
    if isinstance(number, bool) or not isinstance(number, Integral if kind is int else Real):
        return fault(wanted)
    return kind(number)


def _is_name(key: Any) -> bool:
    return isinstance(key, str) and key.isprintable() and len(key) < LONGEST


def _as_one_of(value: Any, kinds: tuple[Any, ...], where: str, faults: list[str]) -> Any:
    """As the first of several types that takes the value."""
    if value is None and types.NoneType in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not types.NoneType)
    if isinstance(value, Mapping):  # its keys say more than that it is no text
        kinds = tuple(kind for kind in kinds if is_dataclass(kind)) or kinds
    tried: list[str] = []
    for kind in kinds:
        own: list[str] = []
        made_of = _as(value, kind, where, own)
        if not own:
            return made_of
        tried += own
    faults += tried[:1]
    return value


def _as_element(value: Any, kind: Any, where: str, faults: list[str]) -> Any:
    """As `_as`; a task, say, is found sooner by its name than by its place."""
    name = value.get("name") if isinstance(value, Mapping) else None
    own: list[str] = []
    made_of = _as(value, kind, where, own)
    named = short(name) if isinstance(name, str) and name else ""
    faults += [fault if named in fault else f"{fault} (in {named})" for fault in own]
    return made_of
