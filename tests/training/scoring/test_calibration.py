"""Temperatures, thresholds and calibration errors, against values worked out and against what made the numbers."""

import math

import pytest
import torch
from torch import Tensor

from encoded import CLASSIFY, GENERATE, SPAN, changed, made
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.network.trunk import Trunk, TrunkConfig
from trunkline.engine.tasks.task import Task
from trunkline.training.scoring.calibration import (
    COLDEST,
    best_threshold,
    calibrate,
    calibration_error,
    fit_temperature,
    reliability,
)
from trunkline.training.scoring.evaluation import Scored

TOPICS = Task("topics", "multi-label", ("text",), "label", ("rare", "common"), threshold="fit")


def drawn(logits: Tensor) -> Tensor:
    """Targets as probable as softmax(logits) says."""
    return torch.multinomial(logits.softmax(-1), 1).squeeze(1)


def test_temperature_is_that_by_which_the_logits_are_too_large():
    logits = 2 * torch.randn(20_000, 4, dtype=torch.float64)
    target = drawn(logits)
    assert fit_temperature(3 * logits, target) == pytest.approx(3, rel=0.05)
    assert fit_temperature(logits / 5, target) == pytest.approx(1 / 5, rel=0.05)
    padded = torch.cat([3 * logits, torch.full((20_000, 2), -1e9)], 1)
    assert fit_temperature(padded, target) == pytest.approx(fit_temperature(3 * logits, target))


def test_temperature_has_ends():
    """Where everything is right the best temperature would be 0."""
    assert fit_temperature(0.01 * torch.eye(30).double(), torch.arange(30)) == COLDEST


def test_reliability_by_hand():
    p = torch.tensor([[0.95, 0.05], [0.93, 0.07], [0.4, 0.6], [0.5, 0.5]]).double()
    bins = reliability(p.log(), torch.tensor([0, 1, 1, 1]))
    assert [(b.count, b.accuracy) for b in bins] == [(1, 0.0), (1, 1.0), (2, 0.5)]  # of two equals the first
    assert [b.confidence for b in bins] == pytest.approx([0.5, 0.6, 0.94])
    assert calibration_error(bins) == pytest.approx((0.5 + 0.4 + 2 * 0.44) / 4)


def test_what_says_how_probable_it_is_has_no_error():
    logits = 2 * torch.randn(20_000, 3, dtype=torch.float64)
    target = drawn(logits)
    assert calibration_error(reliability(logits, target)) < 0.01
    assert calibration_error(reliability(4 * logits, target)) > 0.1


@pytest.mark.parametrize(
    ("p", "holds", "threshold"),
    [
        ([0.9, 0.2, 0.4, 0.1], [1, 0, 1, 0], 0.3),
        ([0.9, 0.2, 0.4, 0.1], [1, 1, 1, 1], 0.05),
        ([0.9, 0.4, 0.4, 0.1], [0, 1, 1, 0], 0.25),
        ([0.6, 0.6, 0.6], [1, 0, 0], 0.3),
    ],
)
def test_threshold_with_the_best_f1(p, holds, threshold):
    assert best_threshold(torch.tensor(p), torch.tensor(holds) > 0) == pytest.approx(threshold)


def model_of(*tasks: Task) -> MultiTaskModel:
    return MultiTaskModel(Trunk(TrunkConfig(300, 16, 1, 2)), tasks)


def scored(logits: list[Tensor]) -> Scored:
    return Scored({"loss": 1.0}, list(range(len(logits))), [None] * len(logits), logits=logits)


def test_all_choose_the_temperature_and_each_half_judges_that_of_the_other():
    """Every other example is right; the others are right half of the time. All are equally sure."""
    places = torch.arange(80)
    right = (places % 2 == 0) | (places % 4 == 1)
    encoded = made(changed(CLASSIFY, labels=("no", "yes")), text=["a"] * 80, label=["yes"] * 80)
    model = model_of(encoded.task)
    logits = [torch.tensor([[-2.0, 2.0]]) if is_right else torch.tensor([[2.0, -2.0]]) for is_right in right.tolist()]
    scores, calibrated = calibrate(model, [encoded], {"toy": scored(logits)})
    found = calibrated["toy"]
    assert found.temperature == pytest.approx(4 / math.log(3), rel=0.01)  # three of four are right
    assert model.temperature.item() == pytest.approx(found.temperature)
    assert (found.fitted_on, found.judged_on) == (80, 80)
    # the first half is always right, and told 1/2 by the other, which is right half of the time, and told 1
    assert [(b.count, b.accuracy) for b in found.bins] == [(40, 1.0), (40, 0.5)]
    assert [b.confidence for b in found.bins] == pytest.approx([0.55, 1.0], abs=0.05)
    assert found.error_before == pytest.approx(1 / (1 + math.exp(-4)) - 0.75)
    assert scores["toy"].metrics == {"loss": 1.0}  # no prediction has changed


def test_few_examples_fit_nothing():
    encoded = made(CLASSIFY, text=["a"] * 20, label=["yes"] * 20)
    model = model_of(CLASSIFY)
    _, calibrated = calibrate(model, [encoded], {"toy": scored([torch.randn(1, 3) for _ in range(20)])})
    assert (calibrated["toy"].fitted_on, calibrated["toy"].temperature) == (0, 1.0)
    assert model.temperature.item() == 1.0


def test_tasks_without_probabilities_are_passed_over():
    encoded = made(GENERATE, text=["a", "b"], label=["x", "y"])
    scores = {"short": Scored({"loss": 1.0}, [0, 1], ["x", "y"])}
    assert calibrate(model_of(GENERATE), [encoded], scores) == (scores, {})


def test_spans_of_texts_of_any_length():
    texts = ["one two", "one two three four"] * 30
    encoded = made(SPAN, text=texts, question=["?"] * 60, label=["two"] * 60)
    lengths = [len(text) for text in texts]
    logits = [torch.randn(length, 2) for length in lengths]
    _, calibrated = calibrate(model_of(SPAN), [encoded], {"answer": scored(logits)})
    assert calibrated["answer"].fitted_on == 60
    assert sum(b.count for b in calibrated["answer"].bins) == 120  # a start and an end of each


def test_thresholds_of_labels_are_fitted_and_the_scores_are_those_with_them():
    """The common label's probability is above 0.2 where it holds; the rare one has too few examples."""
    holds = torch.arange(120) // 2 % 3 == 0
    encoded = made(TOPICS, text=["a"] * 120, label=[["common"] if on else [] for on in holds.tolist()])
    model = model_of(TOPICS)
    p = torch.where(holds, 0.3, 0.1) + 0.02 * torch.rand(120)
    logits = [torch.tensor([[-1.0, float(x)]]) for x in p.logit()]
    before = {"topics": scored(logits)}
    scores, calibrated = calibrate(model, [encoded], before)
    thresholds = calibrated["topics"].thresholds
    assert thresholds["rare"] == 0.5
    assert scores["topics"].metrics == {"loss": 1.0, "micro_f1": 1.0, "macro_f1": 1.0}
    assert scores["topics"].predictions[:4] == [(1,), (1,), (), ()]
    assert before["topics"].metrics == {"loss": 1.0}
