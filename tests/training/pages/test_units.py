"""Quantities and durations in words."""

import pytest

from trunkline.training.pages.units import duration, quantity


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (0.0004, "below 0.01 s"),
        (0.0123, "0.012 s"),
        (0.34, "0.34 s"),
        (0.999, "1 s"),
        (9.4, "9.4 s"),
        (9.5, "10 s"),
        (59.6, "1 min 0 s"),
        (61, "1 min 1 s"),
        (3661, "1 h 1 min"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [(None, "", "–"), (0, "", "0"), (1234567, "", "1.23 M"), (98_700, "B", "98.7 kB"), (999_000_000, "", "999 M")],
)
def test_quantities(value, unit, words):
    assert quantity(value, unit) == words
