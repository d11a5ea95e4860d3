"""Where an op can go several ways, all of them right: tiles and warps of a launch, sizes of chunks, whose kernel.

A decision is a function of what is known on the host before a launch, and returns what was decided without a card. The
other candidates are beside it. `trunkline tune` times all of them on a card, and what was fastest there is `use`d
instead from then on, by every op of the process.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

Choice = dict[str, int] | int | str  # what JSON can hold: choices are kept in a file
Choices = Mapping[str, Mapping[str, Choice]]  # by the name of a decision, and the facts that it was made for

_used: Choices = {}
_tried: dict[tuple[str, str], Choice] = {}
_asked: "list[Question] | None" = None


class Decision:
    """A function whose answer can be another of its candidates; made by `decision`."""

    def __init__(self, default: Callable[..., Any], candidates: Callable[..., Sequence[Any]]):
        self.default, self.candidates = default, candidates
        self.name = f"{default.__module__.rpartition('.')[2]}.{default.__name__.lstrip('_')}"
        self.__doc__ = default.__doc__

    def __call__(self, *facts: Any) -> Any:
        place = self.name, in_words(facts)
        if _asked is not None and (question := Question(self, facts)) not in _asked:
            _asked.append(question)
        chosen = _tried.get(place, _used.get(self.name, {}).get(place[1]))
        return self.default(*facts) if chosen is None else chosen


class Question:
    """A decision, and the facts that it was asked for."""

    def __init__(self, decision: Decision, facts: tuple[Any, ...]):
        self.decision, self.facts, self.place = decision, facts, (decision.name, in_words(facts))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Question) and self.place == other.place

    def __hash__(self) -> int:
        return hash(self.place)

    @property
    def answers(self) -> list[Choice]:
        """Of which the first is what was decided without a card."""
        default = self.decision.default(*self.facts)
        return [default, *(other for other in self.decision.candidates(*self.facts) if other != default)]


def decision(candidates: Callable[..., Sequence[Any]]) -> Callable[[Callable[..., Any]], Decision]:
    """Decorates a function of hashable facts with the other answers that it could give, a function of the same."""
    return lambda default: Decision(default, candidates)


def in_words(facts: Sequence[Any]) -> str:
    return ", ".join(str(fact).removeprefix("torch.") for fact in facts)


def use(choices: Choices) -> None:
    """From now on these choices are taken in this process, and for all other facts the defaults."""
    global _used
    _used = choices


@contextmanager
def trying(question: Question, choice: Choice) -> Iterator[None]:
    """Inside, this choice is the answer, whatever is in use."""
    before = dict(_tried)
    _tried[question.place] = choice
    try:
        yield
    finally:
        _tried.clear()
        _tried.update(before)


@contextmanager
def questions() -> Iterator[list[Question]]:
    """Fills with what is asked inside, in that order."""
    global _asked
    before, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = before
