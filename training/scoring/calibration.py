"""How far probabilities can be believed: a temperature for every task, and what is left wrong with them.

Temperature: one number by which all logits of a task are divided, so that no prediction changes, at the smallest mean
loss over the scored validation examples. No example judges what it has chosen: what is left wrong is measured on both
halves of them, each at the temperature that the other half would choose. Source: Guo et al., On Calibration of Modern
Neural Networks, arXiv:1706.04599, section 4.2; expected calibration error, section 2.

Thresholds of several labels, where a task asks for them, are chosen by every other example.

n choices, A alternatives, C labels
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.model import MultiTaskModel
from trunkline.training.data.encoded import Encoded
from trunkline.training.scoring.evaluation import Scored
from trunkline.training.scoring.metrics import score_task

BINS = 10
FEWEST = 20  # examples of a half; with fewer nothing is fitted
FEWEST_OF_LABEL = 5  # of those, that have a label, for a threshold of its own
COLDEST, HOTTEST = 0.05, 20.0  # temperatures; where every prediction is right, the best would be 0
NOWHERE = -1e9  # logit of an alternative that there is not; -inf has no gradient


@dataclass(frozen=True)
class Bin:
    """Choices of like confidence."""

    count: int
    confidence: float
    """Mean probability of what was predicted."""
    accuracy: float
    """Share of it that was right."""


@dataclass(frozen=True)
class Calibration:
    """Of one task."""

    temperature: float
    fitted_on: int
    """Examples; 0: there are too few, and the temperature is 1."""
    judged_on: int
    """Examples."""
    error: float
    """Expected calibration error: the mean distance of confidence and accuracy, over bins of a tenth."""
    error_before: float
    """The same at temperature 1."""
    bins: list[Bin]
    thresholds: dict[str, float]
    """Of every label, where the task says `threshold: fit`."""


def calibrate(
    model: MultiTaskModel, validation: Sequence[Encoded], scored: dict[str, Scored]
) -> tuple[dict[str, Scored], dict[str, Calibration]]:
    """Fits the temperatures and thresholds of a model.

    Args:
        validation: the splits.
        scored: what the model made of them, by task; tasks without probabilities are passed over.

    Returns:
        The scores, which are other ones where thresholds were fitted, and how well each task is calibrated.
    """
    calibrated: dict[str, Calibration] = {}
    for task, split in enumerate(validation):
        name = split.task.name
        made = [
            HEADS[split.task.head].choices(logits.double().clone(), split.piece(i))
            for i, logits in zip(scored[name].examples, scored[name].logits, strict=False)
        ]
        choices = [choice for choice in made if choice is not None]
        if len(choices) < 2:
            continue
        halves = choices[::2], choices[1::2]
        enough = len(halves[1]) >= FEWEST
        temperature = fit_temperature(*_together(choices)) if enough else 1.0
        of_other = [fit_temperature(*_together(half)) if enough else 1.0 for half in reversed(halves)]
        model.temperature[task] = temperature
        thresholds: dict[str, float] = {}
        if enough and split.task.threshold == "fit":
            thresholds = _fit_thresholds(model, task, split, halves[0], temperature)
            scored = {**scored, name: _scored_again(model, task, split, scored[name])}
        cooled = [(logits / t, target) for half, t in zip(halves, of_other, strict=True) for logits, target in half]
        bins = reliability(*_together(cooled))
        calibrated[name] = Calibration(
            temperature=temperature,
            fitted_on=len(choices) if enough else 0,
            judged_on=len(choices),
            error=calibration_error(bins),
            error_before=calibration_error(reliability(*_together(choices))),
            bins=bins,
            thresholds=thresholds,
        )
    return scored, calibrated


def fit_temperature(logits: Tensor, target: Tensor) -> float:
    """The temperature at which the right ones, (n,), of alternatives with logits (n, A) are likeliest."""
    log_t = torch.zeros((), dtype=logits.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(logits / log_t.exp(), target)
        value.backward()
        return value

    optimizer.step(loss)
    return min(max(float(log_t.detach().exp()), COLDEST), HOTTEST)


def reliability(logits: Tensor, target: Tensor) -> list[Bin]:
    """Choices with logits (n, A), of which target (n,) was right, in bins of like confidence; no bin is empty."""
    confidence, predicted = logits.softmax(-1).max(-1)
    right = (predicted == target).double()
    number = (confidence * BINS).ceil().long().clamp(1, BINS)  # a bin has its upper end
    bins = []
    for place in range(1, BINS + 1):
        own = number == place
        if count := int(own.sum()):
            bins.append(Bin(count, float(confidence[own].mean()), float(right[own].mean())))
    return bins


def calibration_error(bins: Sequence[Bin]) -> float:
    """The expected calibration error."""
    return sum(b.count * abs(b.accuracy - b.confidence) for b in bins) / sum(b.count for b in bins)


def best_threshold(p: Tensor, holds: Tensor) -> float:
    """The probability above which a label is to be predicted for the best F1, between two of those that occur.

    Args:
        p: (n,) probabilities.
        holds: (n,) bool, whether the label does.
    """
    p, order = p.sort(descending=True)
    right = holds[order].double().cumsum(0)  # of the first 1, 2, ... n examples
    f1 = 2 * right / (torch.arange(1, len(p) + 1) + right[-1])
    f1[:-1][p[:-1] == p[1:]] = -1  # no threshold parts equals
    last = int(f1.argmax())
    below = float(p[last + 1]) if last + 1 < len(p) else 0.0
    return (float(p[last]) + below) / 2


def _together(choices: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Logits (n, A) and targets (n,) of all of them; alternatives that some lack are improbable there."""
    columns = pad_sequence([row for logits, _ in choices for row in logits], True, NOWHERE)
    return columns, torch.cat([target for _, target in choices])


def _fit_thresholds(
    model: MultiTaskModel, task: int, split: Encoded, fitted: Sequence[tuple[Tensor, Tensor]], temperature: float
) -> dict[str, float]:
    """By label; a label with few examples keeps 1/2."""
    p = torch.stack([logits[:, 1] for logits, _ in fitted]).div(temperature).sigmoid()  # (examples, C)
    holds = torch.stack([target for _, target in fitted]) > 0
    first = int(model.class_offsets[task])
    thresholds = {}
    for column, name in enumerate(split.task.labels):
        if int(holds[:, column].sum()) >= FEWEST_OF_LABEL:
            model.threshold[first + column] = best_threshold(p[:, column], holds[:, column])
        thresholds[name] = float(model.threshold[first + column])
    return thresholds


def _scored_again(model: MultiTaskModel, task: int, split: Encoded, scored: Scored) -> Scored:
    """With what is predicted now."""
    predictions = [model.predict(logits, task) for logits in scored.logits]
    metrics, _ = score_task(split.task, predictions, [split.reference(i) for i in scored.examples])
    return replace(scored, metrics={"loss": scored.metrics["loss"], **metrics}, predictions=predictions)
