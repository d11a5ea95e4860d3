"""A label means the class it names, whatever its type; an id counts only where it cannot be taken for a name."""

import pytest

from trunkline.engine.tasks.task import Task
from trunkline.engine.text.class_names import class_of

STARS = ("1", "2", "3", "4", "5")


def of(names: tuple[str, ...]) -> Task:
    return Task("toy", "classify", ("text",), "label", names)


@pytest.mark.parametrize(
    ("names", "label", "meant"),
    [
        (STARS, 4, "4"),
        (STARS, "4", "4"),
        (STARS, 4.0, "4"),
        (STARS, "4.0", "4"),
        (("-1", "0", "1"), -1, "-1"),
        (("0.5", "1.5"), 1.5, "1.5"),
        (("0.5", "1.5"), "1.50", "1.5"),
        (("01", "02", "03"), "1", "01"),  # a spreadsheet has been over it
        (("01", "02", "03"), 2, "02"),
        (("1", "01"), "01", "01"),
        (("1", "01"), 1, "1"),
        (("true", "false"), True, "true"),
        (("true", "false"), False, "false"),
        (("False", "True"), True, "True"),
        (("true", "false", "1"), 1, "1"),
        (("yes", "no"), True, "yes"),
        (("yes", "no"), False, "no"),
        (("yes", "no"), 1, "no"),  # an id
        (("ham", "spam"), True, "spam"),
        (("ham", "spam"), "1.0", "spam"),
        (("ham", "spam"), 1.0, "spam"),
        (("ham", "spam"), "1.", "spam"),
        (("1st", "2nd"), 1, "2nd"),
        (("nan", "inf"), "1", "inf"),  # names, not numbers
    ],
    ids=str,
)
def test_what_is_meant(names, label, meant):
    assert names[class_of(of(names), label)] == meant


@pytest.mark.parametrize(
    ("names", "label", "words"),
    [
        (STARS, 0, "label must be one of 1, 2, 3, 4, 5, got 0"),
        (STARS, True, "label must be one of 1, 2, 3, 4, 5, got True"),
        (("1", "01"), "001", "label may mean '1' or '01': write the name itself; got '001'"),
        (("01", "001"), 1, "label may mean '01' or '001'"),
        (("true", "false"), 1, "label must be one of true, false, got 1"),
        (("true", "false"), "0", "label must be one of true, false, got '0'"),
        (("true", "yes", "no"), True, "label may mean 'true' or 'yes'"),
        (("no", "perhaps"), True, "label must be a class id in [0, 2) or one of no, perhaps, got True"),
        (("only",), True, "got True"),
        (("ham", "spam"), "1" * 5000, "label must be a class id in [0, 2)"),
        (("ham", "spam"), "1e0", "label must be a class id in [0, 2)"),
        (STARS, "1e999999999", "label must be one of"),
        (STARS, float("inf"), "got inf"),
        (("ham", "spam"), [1], "got [1]"),
        (("ham", "spam"), {"a": 1}, "got {'a': 1}"),
        (("ham", "spam"), b"ham", "got b'ham'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_means_none_or_several(names, label, words):
    with pytest.raises(ValueError, match="^label m") as caught:
        class_of(of(names), label)
    assert words in str(caught.value)


def test_of_many_names_the_nearest_are_told_and_none_is_searched(effort):
    task = of(tuple(f"c{place}" for place in range(20_000)))
    with pytest.raises(ValueError, match="one of the 20,000 names in labels .the nearest are ") as caught:
        class_of(task, "c1999x")
    assert "c1999" in str(caught.value)
    assert len(str(caught.value)) < 200
    last = range(19_000, 20_000)
    assert [class_of(task, f"c{place}") for place in last] == [*last]
    assert effort(lambda: [class_of(task, f"c{place}") for place in last]) < 1
