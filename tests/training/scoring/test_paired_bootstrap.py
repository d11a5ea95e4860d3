"""Scores of drawn examples are those of the metric itself on the same draw, and intervals are those of pairs."""

import numpy as np
import pytest

from trunkline.training.scoring.metrics import score
from trunkline.training.scoring.paired_bootstrap import drawn_scores, draws, interval


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews", "pearson", "macro_f1"])
def test_scores_of_draws_are_those_of_the_metric(metric):
    rng = np.random.default_rng(3)
    references = rng.integers(0, 3, 40)
    predictions = np.where(rng.random(40) < 0.6, references, rng.integers(0, 3, 40))
    if metric == "pearson":
        predictions = predictions + rng.normal(size=40)
    predictions, references = predictions.tolist(), references.tolist()
    counts = draws(40, 8)
    found = drawn_scores(metric, predictions, references, counts)
    for of_draw, value in zip(counts.astype(int), found, strict=True):
        places = np.repeat(np.arange(40), of_draw)
        drawn = score([metric], [predictions[i] for i in places], [references[i] for i in places])
        assert value == pytest.approx(drawn[metric], abs=1e-6)
    assert (counts[0] == 1).all()
    assert (counts.sum(1) == 40).all()


def test_scores_that_are_undefined_are_0():
    counts = draws(6, 4)
    assert drawn_scores("f1", [0] * 6, [0] * 6, counts).tolist() == [0.0] * 5
    assert drawn_scores("matthews", [0] * 6, [0, 1] * 3, counts).tolist() == [0.0] * 5
    assert drawn_scores("pearson", [2.0] * 6, [0.0, 1.0] * 3, counts).tolist() == [0.0] * 5


def test_means_of_documents_are_drawn_as_such():
    counts = draws(3, 5)
    found = drawn_scores("rouge1", ["", "", ""], ["", "", ""], counts, [0.0, 0.3, 0.9])
    assert found == pytest.approx(counts @ [0.0, 0.3, 0.9] / 3)
    assert found[0] == pytest.approx(0.4)


def test_interval_is_that_of_pairs():
    """Of systems that are right on the same examples but for a few, it is far narrower than of strangers."""
    rng, n = np.random.default_rng(0), 400
    references = [1] * n
    first = (rng.random(n) < 0.8).astype(int)
    second = first.copy()
    second[np.flatnonzero(first)[:12]] = 0  # 12 of 400 more are wrong: 0.03
    counts = draws(n)
    of_first, of_second = (drawn_scores("accuracy", of.tolist(), references, counts) for of in (first, second))
    difference, low, high = interval(of_first - of_second)
    assert difference == pytest.approx(0.03)
    assert low > 0
    deviation = (0.03 * 0.97 / n) ** 0.5  # of the mean of n differences, of which 3 % are 1
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.15)
    _, low, _ = interval(of_first - np.roll(of_second, 1))
    assert low < 0
