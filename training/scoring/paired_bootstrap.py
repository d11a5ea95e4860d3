"""How far two systems differ that were scored on the same examples, and how sure that is.

Paired bootstrap: examples are drawn again and again, with replacement and the same ones for both; the interval is from
the 2.5th to the 97.5th percentile of the differences. Sources: Efron and Tibshirani, An Introduction to the Bootstrap,
chapter 16; Koehn, Statistical Significance Tests for Machine Translation Evaluation, EMNLP 2004.

R draws, n examples, K classes
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from trunkline.training.scoring.metrics import METRICS

DRAWS = 1000
Array = np.ndarray


def draws(n: int, count: int = DRAWS) -> Array:
    """(R + 1, n) float32, how often each example is in a draw; in the first, which is all of them, once."""
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), count)
    return np.concatenate([np.ones((1, n)), drawn]).astype(np.float32)


def drawn_scores(
    metric: str, predictions: Sequence[Any], references: Sequence[Any], counts: Array, values: Sequence[float] = ()
) -> Array:
    """(R + 1,) the metric of every draw.

    Args:
        counts: from `draws`.
        values: of the examples, where the metric is their mean, as ROUGE is.
    """
    if values:
        return counts @ np.asarray(values, np.float64) / counts.sum(1)
    if metric == "pearson":
        return _pearson(np.asarray(predictions, np.float64), np.asarray(references, np.float64), counts)
    if metric in _OF_CONFUSIONS and not isinstance(references[0], list | tuple):
        return _OF_CONFUSIONS[metric](*_confusions(predictions, references, counts))
    whole = counts.astype(int)
    made = []
    for of_draw in whole:
        places = np.repeat(np.arange(len(of_draw)), of_draw).tolist()
        compute = METRICS[metric].compute
        made.append(compute([predictions[i] for i in places], [references[i] for i in places])[metric])
    return np.array(made)


def interval(differences: Array) -> tuple[float, float, float]:
    """Of (R + 1,) differences that of all examples, and the ends of the 95 % interval."""
    low, high = np.percentile(differences[1:], [2.5, 97.5])
    return float(differences[0]), float(low), float(high)


def _pearson(x: Array, y: Array, counts: Array) -> Array:
    """0 where either side is constant."""
    x, y, weight = x - x.mean(), y - y.mean(), counts.astype(np.float64)
    sums = weight @ np.stack([x, y, x * x, y * y, x * y], 1) / weight.sum(1, keepdims=True)  # (R + 1, 5)
    mean_x, mean_y, xx, yy, xy = sums.T
    spread = np.sqrt(np.clip((xx - mean_x**2) * (yy - mean_y**2), 0, None))
    return np.divide(xy - mean_x * mean_y, spread, out=np.zeros_like(spread), where=spread > 1e-12)


def _confusions(predictions: Sequence[Any], references: Sequence[Any], counts: Array) -> tuple[Array, list[Any]]:
    """(R + 1, K, K) how often a class (first K) is predicted where another (second K) is right, and the classes."""
    classes = sorted({*predictions, *references})
    place, K = {name: k for k, name in enumerate(classes)}, len(classes)
    pair = [place[p] * K + place[r] for p, r in zip(predictions, references, strict=True)]
    is_pair = np.eye(K * K, dtype=np.float32)[pair]  # (n, K * K)
    return (counts @ is_pair).astype(np.float64).reshape(-1, K, K), classes


def _accuracy(confusion: Array, classes: list[Any]) -> Array:
    return np.trace(confusion, axis1=1, axis2=2) / confusion.sum((1, 2))


def _f1(confusion: Array, classes: list[Any]) -> Array:
    """Of class 1; 0 where it is neither predicted nor right."""
    if 1 not in classes:
        return np.zeros(len(confusion))
    k = classes.index(1)
    either = confusion[:, k].sum(1) + confusion[:, :, k].sum(1)
    return np.divide(2 * confusion[:, k, k], either, out=np.zeros_like(either), where=either > 0)


def _matthews(confusion: Array, classes: list[Any]) -> Array:
    """Of any number of classes (Gorodkin 2004); 0 where predictions or references are constant."""
    right, n = np.trace(confusion, axis1=1, axis2=2), confusion.sum((1, 2))
    predicted, actual = confusion.sum(2), confusion.sum(1)  # (R + 1, K)
    spread = np.sqrt((n**2 - (predicted**2).sum(1)) * (n**2 - (actual**2).sum(1)))
    return np.divide(right * n - (predicted * actual).sum(1), spread, out=np.zeros_like(spread), where=spread > 0)


_OF_CONFUSIONS = {"accuracy": _accuracy, "f1": _f1, "matthews": _matthews}
