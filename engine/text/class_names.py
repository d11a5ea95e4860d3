"""The names of a task's classes, and what class a cell of a table means by a name, a number, a boolean or an id."""

import re
from collections.abc import Sequence
from decimal import Decimal
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trunkline.engine.tasks.task import Task

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d{1,3})?", re.IGNORECASE | re.ASCII)
ID = re.compile(r"(\d{1,9})(\.0*)?", re.ASCII)  # spreadsheets and pandas write a whole number as 1.0, too
TRUTHS = {True: ("true", "yes", "y", "t", "on"), False: ("false", "no", "n", "f", "off")}
LISTED = 20  # most names that an error lists


class ClassNames:
    """The names in the order of their ids.

    A label is looked up by its text among the names. A number that is no name may still be said by one ('01' by 1), as
    may a boolean ('yes' by JSON's true). An id counts only where it cannot be taken for a name: where no name is a
    number, 'true' or 'false'.
    """

    def __init__(self, names: Sequence[str]):
        self.names = names
        self.ids = {name: place for place, name in enumerate(names)}
        self.by_number: dict[Decimal, list[int]] = {}
        self.by_truth: dict[bool, list[int]] = {True: [], False: []}
        for place, name in enumerate(names):
            if NUMBER.fullmatch(name):
                self.by_number.setdefault(Decimal(name), []).append(place)
            for truth, words in TRUTHS.items():
                if name.casefold() in words:
                    self.by_truth[truth].append(place)
        self.ids_count = not self.by_number and not any(name.casefold() in ("true", "false") for name in names)

    def meant(self, label: Any) -> list[int]:
        """The classes that a label may mean by their names."""
        if isinstance(label, bool):
            return self.by_truth[label]
        text = str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)
        if not isinstance(label, str | int | float):
            return []
        if text in self.ids:
            return [self.ids[text]]
        return self.by_number.get(Decimal(text), []) if self.by_number and NUMBER.fullmatch(text) else []

    def expected(self, label: Any) -> str:
        """What a label may be, in words; of many names those nearest to this one."""
        ids = f"a class id in [0, {len(self.names)}) or " if self.ids_count else ""
        if len(self.names) <= LISTED:
            return f"{ids}one of {', '.join(self.names)}"
        nearest = get_close_matches(str(label)[:100], self.names, n=3, cutoff=0.0)
        return f"{ids}one of the {len(self.names):,} names in labels (the nearest are {', '.join(nearest)})"


def class_of(task: "Task", label: Any) -> int:
    """The class that a label means.

    Raises:
        ValueError: none, or more than one.
    """
    names = task.class_names
    meant = names.meant(label)
    if len(meant) == 1:
        return meant[0]
    if meant:
        several = " or ".join(repr(names.names[place]) for place in meant)
        raise ValueError(f"label may mean {several}: write the name itself; got {label!r}")
    if isinstance(label, bool):
        place = int(label) if names.ids_count and not any(names.by_truth.values()) else -1
    else:
        digits = ID.fullmatch(str(label)) if isinstance(label, str | int | float) and names.ids_count else None
        place = int(digits[1]) if digits else -1
    if not 0 <= place < len(names.names):
        raise ValueError(f"label must be {names.expected(label)}, got {label!r}")
    return place
