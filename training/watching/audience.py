"""Who is told what happens in a run: trackers by name, and objects of the user's. None of them can end a run."""

import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline.training.watching.listener import Listener
from trunkline.training.watching.trackers import TRACKERS, Tracker

if TYPE_CHECKING:
    from trunkline.engine.config import Config

EVENTS = tuple(name for name in vars(Listener) if not name.startswith("_"))


class Audience:
    """All listeners of a run; a context manager, around the run and what follows it.

    A listener that fails is told of and hears nothing more.

    Args:
        track: names of trackers.
        on: objects with some of the methods of `Listener`.
        tell: is told of a listener that fails.

    Raises:
        ValueError: a tracker's package is not installed, or one of `on` listens to nothing.
    """

    def __init__(self, track: Sequence[str], on: Sequence[Any], tell: Callable[[str], None]):
        for listener in on:
            if isinstance(listener, type):
                raise ValueError(f"fit: on: {listener.__name__} is a class: give one of it, {listener.__name__}()")
            if not any(callable(getattr(listener, event, None)) for event in EVENTS):
                raise ValueError(f"fit: on: {listener!r:.80} has none of the methods {', '.join(EVENTS)}")
        self.tell_user = tell
        self.trackers: dict[str, Tracker] = {name: TRACKERS[name]() for name in dict.fromkeys(track)}
        self.users = [*on]
        self.dropped: set[int] = set()  # ids of listeners

    def start(self, config: "Config", folder: Path) -> None:
        """
        Raises:
            ValueError: a tracker cannot start; nothing is lost yet.
        """
        for name, tracker in self.trackers.items():
            try:
                tracker.started(config, folder)
            except Exception as error:  # of a foreign package, of any kind: not logged in, no connection
                raise ValueError(f"track: {name} does not start: {' '.join(str(error).split()):.300}") from error
        self._tell(self.users, "started", config, folder)

    def hear(self, step: int, values: Mapping[str, Any]) -> None:
        """Of a line of metrics.jsonl."""
        if values["event"] == "step":
            self.tell("step", step, values)
        elif values["event"] == "evaluation":
            self.tell("evaluated", step, values["metrics"])
        self.tell("logged", step, dict(_flat(values, f"{values['event']}/")))

    def tell(self, event: str, *arguments: Any) -> None:
        self._tell([*self.trackers.values(), *self.users], event, *arguments)

    def _tell(self, listeners: Sequence[Any], event: str, *arguments: Any) -> None:
        for listener in listeners:
            if id(listener) in self.dropped or not callable(method := getattr(listener, event, None)):
                continue
            try:
                method(*arguments)
            except Exception as error:  # somebody else's code, whose faults are no reason to lose a run
                self.dropped.add(id(listener))
                where = traceback.extract_tb(error.__traceback__)[-1]
                kind = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
                self.tell_user(
                    f"{type(listener).__name__}.{event} failed, and hears no more of this run: {kind} "
                    f"({where.filename}, line {where.lineno})"
                )

    def __enter__(self) -> "Audience":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        self.tell("closed", error)


def _flat(values: Mapping[str, Any], prefix: str) -> list[tuple[str, float]]:
    """The numbers, by their names and those of what they lie in."""
    flat = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            flat.append((prefix + name, float(value)))
    return flat
