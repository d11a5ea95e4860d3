"""What the columns of a table hold, as far as it takes to see what can be learnt from them.

What is counted is counted over all rows; of what kind the values are is seen from some thousands of them, so that a
million rows take seconds.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from trunkline.engine.text.class_names import NUMBER

LOOKED_AT = 2000  # cells of a column, evenly spaced
MOSTLY = 0.9  # share of the cells from which on a column is of a kind
DATE = re.compile(r"(\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4})(\D.*)?", re.DOTALL)
ADDRESS = re.compile(r"(https?://|www\.)\S+|[^\s@]+@[^\s@]+\.\w+")
SEVERAL = re.compile(r"[^|]{1,40}(\|[^|]{1,40})+")  # a|b
# cells that hold nothing, as they are found in tables of texts
BLANK = {None, *(" " * spaces for spaces in range(17)), "\t", "\n", "\xa0"}
UNSPACED = re.compile("[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]")  # letters of scripts without spaces between words


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing, whatever the head."""
    if isinstance(value, str):
        return not value or value.isspace()
    return value is None or value == [] or (isinstance(value, float) and math.isnan(value))


def number_in(value: Any) -> float | None:
    """The number that a cell holds, also as text."""
    if isinstance(value, str):
        return float(value) if NUMBER.fullmatch(value.strip()) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def words_in(text: str) -> float:
    """Words of a text; where words stand side by side, two letters are taken for one."""
    return len(text.split()) + len(UNSPACED.findall(text)) / 2


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    name: str
    values: Sequence[Any]
    class_names: tuple[str, ...] = ()
    """By id, where the file says them."""

    @cached_property
    def _comparable(self) -> tuple[Sequence[Any], set[Any]]:
        """The values, each as often as it is there, and once; of a column with lists or objects their JSON."""
        try:
            return self.values, set(self.values)
        except TypeError:
            texts = [json.dumps(value, ensure_ascii=False, default=str) for value in self.values]
            return texts, set(texts)

    @property
    def comparable(self) -> Sequence[Any]:
        """The values, lists and objects as their JSON."""
        return self._comparable[0]

    @cached_property
    def _nothing(self) -> set[Any]:
        """Of the values, those that hold nothing."""
        values, unique = self._comparable
        if values is not self.values:
            return {"null", "[]", '""', "NaN"} & unique
        if self.share(lambda cell: isinstance(cell, str)) == 1:
            return BLANK & unique | {
                value for value in unique if value != value
            }  # of a million, no other takes a second
        return {value for value in unique if is_missing(value)}

    @cached_property
    def counts(self) -> Counter[Any]:
        """How often every value occurs that is not missing; lists by their JSON."""
        counted = Counter(self._comparable[0])
        for value in self._nothing:
            del counted[value]
        return counted

    @cached_property
    def cells(self) -> list[Any]:
        """Some of the values, evenly spaced, none missing."""
        step = max(1, len(self.values) // LOOKED_AT)
        found = [value for value in self.values[::step] if not is_missing(value)]
        if 10 * len(found) < LOOKED_AT < len(self.values):  # mostly missing
            found = [value for value in self.values if not is_missing(value)][:LOOKED_AT]
        return found

    @property
    def distinct(self) -> int:
        return len(self._comparable[1]) - len(self._nothing)

    @cached_property
    def seen(self) -> int:
        """Different values among the cells that were looked at: as many there are, at least."""
        return len({*map(str, self.cells)})

    @property
    def present(self) -> int:
        """Cells that hold something."""
        return len(self.values) - self.missing

    @cached_property
    def missing(self) -> int:
        return sum(value in self._nothing for value in self._comparable[0]) if self._nothing else 0

    def share(self, is_so: Callable[[Any], Any]) -> float:
        """Of the cells that were looked at, those that are so."""
        return sum(bool(is_so(cell)) for cell in self.cells) / max(1, len(self.cells))

    # Of what kind the values are

    @cached_property
    def has_texts(self) -> bool:
        return self.share(lambda cell: isinstance(cell, str)) >= MOSTLY

    @cached_property
    def words(self) -> float:
        """Of a cell on average, 0 where they are no texts; the words of a list are its parts."""
        if not self.cells:
            return 0.0
        return fmean(words_in(c) if isinstance(c, str) else len(c) if isinstance(c, list) else 0 for c in self.cells)

    @cached_property
    def numbers(self) -> float:
        """The share of numbers."""
        return self.share(lambda cell: number_in(cell) is not None)

    @cached_property
    def whole(self) -> bool:
        """Whether all its numbers are whole ones, and it has no other values."""
        return bool(self.cells) and self.share(lambda cell: (number_in(cell) or 0.5) % 1 == 0 or cell in ZEROS) == 1

    @cached_property
    def lists(self) -> bool:
        """Lists, or what JSON or Python write for one."""
        return self.share(lambda c: isinstance(c, list) or (isinstance(c, str) and c[0] + c[-1] == "[]")) >= MOSTLY

    @cached_property
    def objects(self) -> bool:
        """Answers as SQuAD has them, or something else with keys."""
        return self.share(lambda c: isinstance(c, dict) or (isinstance(c, list) and isinstance(c[0], dict))) >= MOSTLY

    @cached_property
    def several(self) -> bool:
        """Several names in a cell, as 'a|b'; in some of the cells it may be one."""
        if not self.has_texts or self.share(lambda cell: isinstance(cell, str) and SEVERAL.fullmatch(cell)) < 0.1:
            return False
        parts = {part.strip() for cell in self.cells for part in str(cell).split("|")}
        return len(parts) <= max(10, len(self.cells) / 4)  # the same ones again and again: no texts with bars in them

    @cached_property
    def keys(self) -> bool:
        """A different value in every row, and none a text or a measure: numbers of rows, ids."""
        if self.lists or (self.numbers >= MOSTLY and not self.whole):
            return False
        is_one_word = self.share(lambda cell: not isinstance(cell, str) or words_in(cell) <= 1.5)
        return self.seen > 0.95 * len(self.cells) and is_one_word >= MOSTLY

    @cached_property
    def dates(self) -> bool:
        return self.share(lambda c: isinstance(c, str) and DATE.fullmatch(c)) >= MOSTLY or self._of_type("date")

    @cached_property
    def addresses(self) -> bool:
        """Of pages, or of mail."""
        return self.share(lambda cell: isinstance(cell, str) and ADDRESS.fullmatch(cell.strip())) >= MOSTLY

    def _of_type(self, name: str) -> bool:
        return self.share(lambda cell: name in type(cell).__name__) >= MOSTLY


ZEROS = (0, "0", "0.0", "-0")
