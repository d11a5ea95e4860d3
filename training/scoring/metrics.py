"""Scores of predictions against references.

A metric's function computes all scores of its kind of label at once (the four ROUGE values share their tokens), so
`METRICS` names the same function several times. A metric says itself whether a lower value is the better one.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import chain
from statistics import fmean
from typing import Any, NamedTuple

from trunkline.engine.heads.registry import HEADS
from trunkline.engine.tasks.task import References, Task
from trunkline.engine.text.sentences import sentences

RESAMPLES = 1000  # of the documents, for a confidence interval


def classification(
    predictions: Sequence[int] | Sequence[tuple[int, ...]], references: Sequence[int] | Sequence[tuple[int, ...]]
) -> dict[str, float]:
    """Scores of class ids, one an example or any number.

    f1 takes class 1 as the positive one; macro_f1 is the mean over the classes that occur; matthews is 0.0 where all
    predictions or all references are the same. Of any number of classes an example, accuracy is the share of examples
    all of whose classes are right, and there is neither f1 nor matthews.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if isinstance(references[0], tuple):
        from sklearn.preprocessing import MultiLabelBinarizer

        binarizer = MultiLabelBinarizer().fit([*predictions, *references])
        tables = binarizer.transform(references), binarizer.transform(predictions)  # (examples, classes that occur)
        return {
            "accuracy": float((tables[0] == tables[1]).all(1).mean()),
            **{f"{kind}_f1": _mean_f1(*tables, kind) for kind in ("micro", "macro")},
        }
    constant = len(set(references)) == 1 or len(set(predictions)) == 1  # scikit-learn warns when both are
    return {
        "accuracy": float(accuracy_score(references, predictions)),
        "f1": float(f1_score(references, predictions, labels=[1], average="macro", zero_division=0.0)),
        "micro_f1": float(f1_score(references, predictions, average="micro", zero_division=0.0)),
        "macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0.0)),
        "matthews": 0.0 if constant else float(matthews_corrcoef(references, predictions)),
    }


def _mean_f1(references: Any, predictions: Any, kind: str) -> float:
    """F1 of tables of 0 and 1; where no class occurs at all, every example is right."""
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, average=kind, zero_division=0.0)) if references.size else 1.0


def regression(predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """Scores of numbers, all NaN where a prediction is not finite.

    Correlations, 0.0 where either side is constant; mean absolute and root mean squared error, in the labels' units.
    """
    import numpy as np
    from scipy.stats import pearsonr, spearmanr

    x, y = np.asarray(predictions, np.float64), np.asarray(references, np.float64)
    if not np.isfinite(x).all():
        return dict.fromkeys(("pearson", "spearman", "mae", "rmse"), math.nan)
    errors = {"mae": float(np.abs(x - y).mean()), "rmse": math.sqrt(np.square(x - y).mean())}
    # What float32 rounds away around a constant is no correlation; scipy warns of it below 1e-13 of the mean.
    if any(values.std() <= 1e-7 * abs(values.mean()) for values in (x, y)):
        return {"pearson": 0.0, "spearman": 0.0, **errors}
    return {"pearson": float(pearsonr(x, y).statistic), "spearman": float(spearmanr(x, y).statistic), **errors}


def rouge(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """Means of `rouge_by_document`; of several references for a document the best counts."""
    return {name: fmean(values) for name, values in rouge_by_document(predictions, references).items()}


def rouge_by_document(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]], several: References = "best"
) -> dict[str, list[float]]:
    """F-measures of rouge-score with stemming, by metric, one for every document.

    Words of any script are compared, so accented and non-Latin text scores too; plain English scores as with
    rouge-score's own tokenizer.

    Args:
        several: of several references for a document, what counts: the best score with one, or the average over all.

    Raises:
        ImportError: the package rouge-score is absent.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE needs the package rouge-score: pip install rouge-score") from error

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], tokenizer=_WordTokenizer())
    combine = max if several == "best" else fmean
    scores: dict[str, list[float]] = {name: [] for name in scorer.rouge_types}
    for prediction, reference in zip(predictions, references, strict=True):
        targets = [reference] if isinstance(reference, str) else reference
        # rougeLsum takes a line for a sentence; to the other three a line break is a space.
        written, *expected = ("\n".join(sentences(text)) for text in (prediction, *targets))
        by_target = [scorer.score(target, written) for target in expected]
        for name, values in scores.items():
            values.append(combine(score[name].fmeasure for score in by_target))
    return scores


def confidence_interval(values: Sequence[float]) -> tuple[float, float]:
    """Between which the mean over documents lies in 95 % of samples like this one.

    By bootstrap: the 2.5th and 97.5th percentile of the means of 1,000 samples drawn from the values, with replacement
    and a fixed seed. Source: Efron and Tibshirani, An Introduction to the Bootstrap, section 13.3.
    """
    import numpy as np

    n = len(values)
    counts = np.random.default_rng(0).multinomial(
        n, np.full(n, 1 / n), RESAMPLES
    )  # (resamples, n) how often each is in
    low, high = np.percentile(counts @ np.asarray(values, np.float64) / n, [2.5, 97.5])
    return float(low), float(high)


class _WordTokenizer:
    """rouge-score's tokenizer for every script: words, stemmed beyond three letters.

    Scripts written without spaces give one word per character, the usual unit of ROUGE for Chinese and Japanese.
    """

    def __init__(self) -> None:
        import regex  # comes with nltk, as nltk with rouge-score
        from nltk.stem.porter import PorterStemmer

        unspaced = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
        # Marks belong to the word: without them Hindi words break at every vowel sign.
        self._words = regex.compile(rf"(?V1)[{unspaced}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{Nd}}]--[{unspaced}]]+")
        self._stem = PorterStemmer().stem
        self._stems: dict[str, str] = {}  # stemming is most of rouge-score's time and texts repeat their words

    def tokenize(self, text: str) -> list[str]:
        return [self._stemmed(word) for word in self._words.findall(text.lower())]

    def _stemmed(self, word: str) -> str:
        if word not in self._stems:
            self._stems[word] = self._stem(word) if len(word) > 3 else word
        return self._stems[word]


def tagging(predictions: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> dict[str, float]:
    """Scores over the words of all examples; tag_f1 is the mean over the tags that occur.

    Raises:
        ValueError: an example has more or fewer predicted tags than words.
    """
    for row, (tags, expected) in enumerate(zip(predictions, references, strict=True)):
        if len(tags) != len(expected):
            raise ValueError(f"tagging: expected {len(expected)} tags in example {row}, got {len(tags)}")
    words = classification(list(chain.from_iterable(predictions)), list(chain.from_iterable(references)))
    return {"tag_accuracy": words["accuracy"], "tag_f1": words["macro_f1"]}


def spans(predictions: Sequence[tuple[int, int]], references: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Scores of (first, last) positions, both inclusive: the share of equal spans and the mean F1 of their overlap."""
    exact, overlap = [], []
    for (start, end), (first, last) in zip(predictions, references, strict=True):
        shared = max(0, min(end, last) - max(start, first) + 1)
        exact.append(float((start, end) == (first, last)))
        overlap.append(2 * shared / (max(0, end - start + 1) + last - first + 1))
    return {"span_exact": fmean(exact), "span_f1": fmean(overlap)}


def language_modelling(predictions: Sequence[float], references: Sequence[int]) -> dict[str, float]:
    """Perplexity from mean losses in nats per token (the predictions) and the token counts they are means of."""
    loss = sum(map(math.prod, zip(predictions, references, strict=True))) / sum(references)
    return {"perplexity": math.exp(min(loss, 700.0))}  # exp overflows from 710 on


class Metric(NamedTuple):
    """What a score is computed by, and which way is better."""

    compute: Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]
    """Predictions and references to scores by name, this one among them."""
    higher_is_better: bool = True


METRICS: dict[str, Metric] = {
    "accuracy": Metric(classification),
    "f1": Metric(classification),
    "micro_f1": Metric(classification),
    "macro_f1": Metric(classification),
    "matthews": Metric(classification),
    "pearson": Metric(regression),
    "spearman": Metric(regression),
    "mae": Metric(regression, higher_is_better=False),
    "rmse": Metric(regression, higher_is_better=False),
    "rouge1": Metric(rouge),
    "rouge2": Metric(rouge),
    "rougeL": Metric(rouge),
    "rougeLsum": Metric(rouge),
    "tag_accuracy": Metric(tagging),
    "tag_f1": Metric(tagging),
    "span_exact": Metric(spans),
    "span_f1": Metric(spans),
    "perplexity": Metric(language_modelling, higher_is_better=False),
}


def metric_names(task: Task) -> tuple[str, ...]:
    """The metrics of a task, which are its head's defaults where it names none; systems are compared by the first.

    Raises:
        ValueError: a name is unknown or is no metric of the task's head.
    """
    defaults = HEADS[task.head].metrics
    for name in task.metrics:
        if _metric(name).compute is not METRICS[defaults[0]].compute:
            known = ", ".join(other for other in METRICS if METRICS[other].compute is METRICS[defaults[0]].compute)
            raise ValueError(f"task '{task.name}': metrics of a '{task.head}' head are {known}; got '{name}'")
    return task.metrics or defaults


def score(names: Iterable[str], predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """Scores by name, in the order of `names`.

    Args:
        names: metrics of one head, from `METRICS`.
        predictions: one per example: class ids (classify), numbers (regress), texts (generate), lists of tag ids
            (tag), inclusive (first, last) pairs (span), or mean losses in nats per token (language-model).
        references: as the predictions; for generate also lists of texts; for language-model the token counts.

    Raises:
        ValueError: a name is unknown, there is no prediction, or there is not one reference per prediction.
        ImportError: a ROUGE score is asked for and the package rouge-score is absent.
    """
    if len(predictions) != len(references) or len(predictions) == 0:
        raise ValueError(
            "score: expected at least one prediction and as many references, "
            f"got {len(predictions)} predictions and {len(references)} references"
        )
    values: dict[str, float] = {}
    names = list(names)
    for name in names:
        if name not in values:
            values |= _metric(name).compute(predictions, references)
    return {name: values[name] for name in names}


class Scores(NamedTuple):
    """Of one task."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]  # of ROUGE: 95 %, over the documents


def score_task(task: Task, predictions: Sequence[Any], references: Sequence[Any]) -> Scores:
    """A task's metrics, from what `score` takes; several references count as the task says."""
    names = metric_names(task)
    if METRICS[names[0]].compute is not rouge:
        return Scores(score(names, predictions, references), {})
    by_document = rouge_by_document(predictions, references, task.references)
    return Scores(
        {name: fmean(by_document[name]) for name in names},
        {name: confidence_interval(by_document[name]) for name in names},
    )


def _metric(name: str) -> Metric:
    if name not in METRICS:
        nearest = get_close_matches(name, METRICS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown metric '{name}'; the nearest known is '{nearest}'")
    return METRICS[name]


def higher_is_better(name: str) -> bool:
    """Whether a larger value of a metric, or of 'loss', is a better one; yes, where a report names an unknown one."""
    return name != "loss" and (name not in METRICS or METRICS[name].higher_is_better)


def first_score(task: Task, metrics: Mapping[str, float]) -> float:
    """What evaluations are compared by, the higher the better: the task's first metric, or less the loss where it has
    none or one that is better when lower."""
    name = metric_names(task)[0]
    return metrics[name] if name in metrics and higher_is_better(name) else -metrics["loss"]
