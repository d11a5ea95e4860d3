"""Scores of predictions against references, and the trivial predictions every model has to beat.

A metric function computes all scores of its kind of label at once (the four ROUGE values share their tokens), so
`METRICS` names the same function several times. Scores are in [0, 1] or [-1, 1]; only perplexity is better when lower.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import chain
from statistics import fmean
from typing import Any, NamedTuple

from trunkline.engine.tasks.task import Head, References, Task
from trunkline.engine.text.sentences import sentences, units

Metric = Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]
RESAMPLES = 1000  # of the documents, for a confidence interval


def classification(predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
    """Scores of class ids.

    f1 takes class 1 as the positive one; macro_f1 is the mean over the classes that occur; matthews is 0.0 where all
    predictions or all references are the same.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    constant = len(set(references)) == 1 or len(set(predictions)) == 1  # scikit-learn warns when both are
    return {
        "accuracy": float(accuracy_score(references, predictions)),
        "f1": float(f1_score(references, predictions, labels=[1], average="macro", zero_division=0.0)),
        "macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0.0)),
        "matthews": 0.0 if constant else float(matthews_corrcoef(references, predictions)),
    }


def regression(predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """Correlations of numbers: 0.0 where either side is constant, NaN where a prediction is not finite."""
    import numpy as np
    from scipy.stats import pearsonr, spearmanr

    x, y = np.asarray(predictions, np.float64), np.asarray(references, np.float64)
    if not np.isfinite(x).all():
        return {"pearson": math.nan, "spearman": math.nan}
    # What float32 rounds away around a constant is no correlation; scipy warns of it below 1e-13 of the mean.
    if any(values.std() <= 1e-7 * abs(values.mean()) for values in (x, y)):
        return {"pearson": 0.0, "spearman": 0.0}
    return {"pearson": float(pearsonr(x, y).statistic), "spearman": float(spearmanr(x, y).statistic)}


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


METRICS: dict[str, Metric] = {
    "accuracy": classification,
    "f1": classification,
    "macro_f1": classification,
    "matthews": classification,
    "pearson": regression,
    "spearman": regression,
    "rouge1": rouge,
    "rouge2": rouge,
    "rougeL": rouge,
    "rougeLsum": rouge,
    "tag_accuracy": tagging,
    "tag_f1": tagging,
    "span_exact": spans,
    "span_f1": spans,
    "perplexity": language_modelling,
}

DEFAULTS: dict[Head, tuple[str, ...]] = {
    "classify": ("accuracy",),
    "regress": ("pearson", "spearman"),
    "generate": ("rouge1", "rouge2", "rougeL", "rougeLsum"),
    "extract": ("rouge1", "rouge2", "rougeL", "rougeLsum"),
    "tag": ("tag_accuracy", "tag_f1"),
    "span": ("span_exact", "span_f1"),
    "language-model": ("perplexity",),
    "masked-language-model": ("perplexity",),
}


def metric_names(task: Task) -> tuple[str, ...]:
    """The metrics of a task, which are its head's defaults where it names none; systems are compared by the first.

    Raises:
        ValueError: a name is unknown or is no metric of the task's head.
    """
    defaults = DEFAULTS[task.head]
    for name in task.metrics:
        if _function(name) is not METRICS[defaults[0]]:
            known = ", ".join(other for other in METRICS if METRICS[other] is METRICS[defaults[0]])
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
            values |= _function(name)(predictions, references)
    return {name: values[name] for name in names}


class Scores(NamedTuple):
    """Of one task."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]  # of ROUGE: 95 %, over the documents


def score_task(task: Task, predictions: Sequence[Any], references: Sequence[Any]) -> Scores:
    """A task's metrics, from what `score` takes; several references count as the task says."""
    names = metric_names(task)
    if METRICS[names[0]] is not METRICS["rouge1"]:
        return Scores(score(names, predictions, references), {})
    by_document = rouge_by_document(predictions, references, task.references)
    return Scores(
        {name: fmean(by_document[name]) for name in names},
        {name: confidence_interval(by_document[name]) for name in names},
    )


def _function(name: str) -> Metric:
    if name not in METRICS:
        nearest = get_close_matches(name, METRICS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown metric '{name}'; the nearest known is '{nearest}'")
    return METRICS[name]


def higher_is_better(name: str) -> bool:
    """Whether a larger value is a better one; it is for all but 'loss' and 'perplexity'."""
    return name not in ("loss", "perplexity")


def first_score(task: Task, metrics: Mapping[str, float]) -> float:
    """What evaluations are compared by, the higher the better: the task's first metric, or less the loss where it has
    none or one that is better when lower."""
    name = metric_names(task)[0]
    return metrics[name] if name in metrics and higher_is_better(name) else -metrics["loss"]


def trivial_baselines(
    task: Task, train_labels: Sequence[Any], validation_inputs: Sequence[str], validation_labels: Sequence[Any]
) -> dict[str, list[Any]]:
    """What can be predicted without a model, to be scored like a model's predictions.

    Args:
        train_labels, validation_labels: as the references of `score`.
        validation_inputs: the documents; only generate and extract read them.

    Returns:
        By what was taken, in words for a table, a prediction for every validation example. Summaries have two, lead-1
        and lead-3, first the one whose length is nearer to that of the training texts; language models have none.
    """
    count = len(validation_labels)
    match task.head:
        case "classify":
            return {"majority class": [_most_common(train_labels)] * count}
        case "tag":
            tag = _most_common(chain.from_iterable(train_labels))
            return {"majority class": [[tag] * len(tags) for tags in validation_labels]}
        case "regress":
            return {"mean of the training labels": [fmean(train_labels)] * count}
        case "span":
            return {"most frequent training span": [_most_common(map(tuple, train_labels))] * count}
        case "generate" | "extract":
            return _leads(train_labels, validation_inputs)
        case "language-model" | "masked-language-model":
            return {}


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _leads(train_labels: Sequence[str | Sequence[str]], documents: Sequence[str]) -> dict[str, list[str]]:
    """Lead-1 and lead-3, first the one that is nearer to the training texts in mean length."""
    wanted = fmean(len(label if isinstance(label, str) else label[0]) for label in train_labels)
    parts = [units(document) for document in documents]
    leads = {count: ["\n".join(part[:count]) for part in parts] for count in (1, 3)}
    unit = "line" if 2 * sum("\n" in document.strip() for document in documents) > len(documents) else "sentence"
    names = {1: f"first {unit} of the document", 3: f"first 3 {unit}s of the document"}
    nearest = sorted(leads, key=lambda count: abs(fmean(map(len, leads[count])) - wanted))
    return {names[count]: leads[count] for count in nearest}
