import math
import sys
from random import Random

import pytest

from trunkline.engine.heads.registry import HEADS
from trunkline.engine.tasks.task import Task
from trunkline.training.scoring.metrics import (
    METRICS,
    Metric,
    higher_is_better,
    metric_names,
    score,
)

CLASSIFY = Task("sst2", "classify", ("text",), "label", ("negative", "positive"))
REGRESS = Task("stsb", "regress", ("text",), "score")
GENERATE = Task("news", "generate", ("text",), "summary")
TAG = Task("entities", "tag", ("words",), "tags", ("O", "PER", "LOC"))
SPAN = Task("answers", "span", ("text",), "answer")
LANGUAGE = Task("books", "language-model", ("text",))

ENGLISH = (
    "The quick-witted doctors weren't studying 3 diseases in U.S. hospitals.",
    "A doctor studies the diseases of 1999's quickest patients; hospitals are well-studied, aren't they?",
)
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def test_classification_by_hand():
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives
    references = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    predictions = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    positive, negative = 6 / 9, 8 / 11
    assert score(("accuracy", "f1", "macro_f1", "matthews"), predictions, references) == pytest.approx(
        {
            "accuracy": 0.7,
            "f1": positive,
            "macro_f1": (positive + negative) / 2,
            "matthews": (3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6),
        }
    )


def test_several_labels_by_hand():
    # label 0: 1 true positive, 1 false negative; label 2: 1 true and 1 false positive; label 1 never occurs
    references, predictions = [(0,), (0, 2), (), ()], [(0,), (2,), (2,), ()]
    assert score(["micro_f1", "macro_f1", "accuracy"], predictions, references) == pytest.approx(
        {"micro_f1": 4 / 6, "macro_f1": 2 / 3, "accuracy": 0.5}
    )
    assert score(["micro_f1", "macro_f1"], [(), ()], [(), ()]) == {"micro_f1": 1.0, "macro_f1": 1.0}
    assert score(["macro_f1"], [(1,), ()], [(), (0,)]) == {"macro_f1": 0.0}


@pytest.mark.parametrize(
    ("predictions", "references"), [([1, 1], [0, 1]), ([0, 1], [1, 1]), ([0, 0], [0, 0]), ([2], [1])], ids=str
)
def test_matthews_of_constants_is_zero(predictions, references):
    assert score(["matthews"], predictions, references) == {"matthews": 0.0}


def test_correlations_by_hand():
    scores = score(("pearson", "spearman"), [1.0, 2.0, 4.0], [1.0, 3.0, 2.0])
    assert scores == pytest.approx({"pearson": 1 / math.sqrt(14 / 3 * 2), "spearman": 0.5})


@pytest.mark.parametrize(
    "predictions", [[2.5, 2.5, 2.5], [0.0, 0.0, 0.0], [2.5, 2.5, 2.5 + 1e-9], [2.5, 2.5, 2.5 + 1e-14]], ids=str
)
def test_correlation_of_constants_is_zero(predictions):
    names = ("pearson", "spearman")
    assert score(names, predictions, [1.0, 2.0, 4.0]) == {"pearson": 0.0, "spearman": 0.0}
    assert score(names, [1.0, 2.0, 4.0], predictions) == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_correlation_of_a_diverged_model_is_nan(bad):
    assert all(map(math.isnan, score(("pearson", "spearman"), [1.0, bad, 2.0], [1.0, 2.0, 4.0]).values()))


class TestRouge:
    @pytest.fixture(autouse=True)
    def rouge_score(self):
        pytest.importorskip("rouge_score")

    def test_by_hand(self):
        # words: 3 of 4 and 3 of 5 shared; pairs: 1 of 3 and 1 of 4; longest common subsequence: the, sat
        scores = score(ROUGE, ["the cat sat there"], ["sat the cat the mouse"])
        assert scores["rouge1"] == pytest.approx(2 * 3 / (4 + 5))
        assert scores["rouge2"] == pytest.approx(2 * 1 / (3 + 4))
        assert scores["rougeL"] == pytest.approx(2 * 2 / (4 + 5))

    def test_summary_level_looks_at_sentences(self):
        scores = score(ROUGE, ["The cat sat. Dogs bark loudly."], ["Dogs bark loudly. The cat sat."])
        assert scores["rougeLsum"] == pytest.approx(1.0)
        assert scores["rougeL"] == pytest.approx(0.5)

    def test_english_scores_as_the_default_tokenizer(self):
        from rouge_score.rouge_scorer import RougeScorer

        random = Random(0)
        words = " ".join(ENGLISH).split() + [
            "sses",
            "being",
            "FLIES",
            "his",
            "hi",
            "snake_case",
            "e-mail",
            "x",
            "--",
            "$3.50",
        ]
        scorer = RougeScorer(list(ROUGE), use_stemmer=True)
        for _ in range(50):
            prediction, reference = (" ".join(random.choices(words, k=random.randint(0, 30))) for _ in range(2))
            lines = [text.replace(". ", ".\n").replace("? ", "?\n") for text in (reference, prediction)]
            expected = {name: value.fmeasure for name, value in scorer.score(*lines).items()}
            if "U.S." in prediction + reference:
                del expected["rougeLsum"]  # no sentence ends there, which the line above does not know
            assert score(tuple(expected), [prediction], [reference]) == expected

    @pytest.mark.parametrize(
        ("prediction", "reference", "expected"),
        [
            ("я люблю Москву", "Я люблю море", 2 * 2 / 6),
            ("我爱北京", "我爱上海很久", 2 * 2 / 10),  # a word per character
            ("GPU很快", "GPU 慢", 2 * 1 / 5),
            ("हिन्दी भाषा", "हिन्दी है", 2 * 1 / 4),  # vowel signs do not break words
            ("Füße", "Fuße", 0.0),
            ("", "etwas", 0.0),
        ],
    )
    def test_other_scripts(self, prediction, reference, expected):
        assert score(["rouge1"], [prediction], [reference])["rouge1"] == pytest.approx(expected)

    def test_best_of_several_references(self):
        references = [["a dog barks", "the cat sat"], "the cat sat"]
        assert score(["rouge1"], ["the cat sat", "a dog"], references)["rouge1"] == pytest.approx(0.5)

    def test_is_computed_once(self, monkeypatch):
        calls = []

        def rouge(predictions, references):
            calls.append(predictions)
            return dict.fromkeys(ROUGE, 1.0)

        for name in ROUGE:
            monkeypatch.setitem(METRICS, name, Metric(rouge))
        assert list(score(("rougeL", "rouge1"), ["a"], ["a"])) == ["rougeL", "rouge1"]
        assert len(calls) == 1


def test_absent_rouge_score_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match="pip install rouge-score"):
        score(["rouge1"], ["a"], ["a"])


def test_tags_are_counted_by_word():
    scores = score(("tag_accuracy", "tag_f1"), [[0, 1, 1], [0]], [[0, 1, 2], [0]])
    assert scores == pytest.approx({"tag_accuracy": 0.75, "tag_f1": (1 + 2 / 3 + 0) / 3})


def test_tags_that_are_too_few_are_named():
    with pytest.raises(ValueError, match="expected 2 tags in example 1, got 3"):
        score(["tag_f1"], [[0, 1, 1], [0, 1, 1]], [[0, 1, 1], [0, 1]])


def test_span_overlap_by_hand():
    # equal; 2 shared of 3 and 4; apart; end before start; [pair] as JSON brings it
    predictions = [(2, 4), (1, 3), (0, 1), (5, 3), [7, 7]]
    references = [(2, 4), (2, 5), (4, 6), (3, 3), (7, 7)]
    scores = score(("span_exact", "span_f1"), predictions, references)
    assert scores == pytest.approx({"span_exact": 2 / 5, "span_f1": (1 + 4 / 7 + 0 + 0 + 1) / 5})


def test_perplexity_weighs_losses_by_their_tokens():
    assert score(["perplexity"], [1.0, 2.0], [300, 100])["perplexity"] == pytest.approx(math.exp(1.25))
    assert score(["perplexity"], [2000.0], [10])["perplexity"] == pytest.approx(math.exp(700))
    assert math.isnan(score(["perplexity"], [math.nan], [10])["perplexity"])


def test_unknown_metric_names_the_nearest():
    with pytest.raises(ValueError, match="unknown metric 'rougelsum'; the nearest known is 'rougeLsum'"):
        score(["rougelsum"], ["a"], ["a"])


@pytest.mark.parametrize(("predictions", "references"), [([], []), ([1], [1, 0])], ids=str)
def test_counts_must_agree(predictions, references):
    with pytest.raises(ValueError, match=f"got {len(predictions)} predictions and {len(references)} references"):
        score(["accuracy"], predictions, references)


def test_defaults_are_metrics_of_their_head():
    for head in HEADS.values():
        assert {METRICS[name].compute for name in head.metrics} == {METRICS[head.metrics[0]].compute}
    for task in (CLASSIFY, REGRESS, GENERATE, TAG, SPAN, LANGUAGE):
        assert metric_names(task) == HEADS[task.head].metrics


def test_random_scores_are_those_of_scikit_learn_and_scipy():
    from scipy import stats
    from sklearn import metrics

    random = Random(0)
    for classes in (2, 3):
        a, b = ([random.randrange(classes) for _ in range(40)] for _ in range(2))
        of_class_1 = [[value == 1 for value in values] for values in (b, a)]
        expected = {
            "accuracy": metrics.accuracy_score(b, a),
            "f1": metrics.f1_score(*of_class_1),
            "macro_f1": metrics.f1_score(b, a, average="macro"),
            "matthews": metrics.matthews_corrcoef(b, a),
        }
        assert score(tuple(expected), a, b) == pytest.approx(expected)
    x, y = ([random.gauss(0, 1) for _ in range(40)] for _ in range(2))
    expected = {"pearson": stats.pearsonr(y, x).statistic, "spearman": stats.spearmanr(y, x).statistic}
    assert score(tuple(expected), x, y) == pytest.approx(expected)


def test_metrics_of_a_task():
    named = Task("cola", "classify", ("text",), "label", ("no", "yes"), metrics=("matthews", "f1"))
    assert metric_names(named) == ("matthews", "f1")
    wrong = Task("cola", "classify", ("text",), "label", ("no", "yes"), metrics=("accuracy", "pearson"))
    with pytest.raises(ValueError, match="'cola': metrics of a 'classify' head are accuracy, f1, .*; got 'pearson'"):
        metric_names(wrong)


def test_errors_losses_and_perplexity_are_better_lower():
    lower = [name for name in ("loss", *METRICS) if not higher_is_better(name)]
    assert lower == ["loss", "mae", "rmse", "perplexity"]
    assert higher_is_better("somebody's own")


def test_errors_are_in_the_units_of_the_labels():
    values = score(("rmse", "mae"), [250_000.0, 240_000.0, 260_000.0], [253_000.0, 240_000.0, 256_000.0])
    assert values == pytest.approx({"rmse": math.sqrt(25e6 / 3), "mae": 7000 / 3})
    assert score(("mae", "rmse", "pearson"), [2.0], [-1.5]) == {"mae": 3.5, "rmse": 3.5, "pearson": 0.0}
    assert all(math.isnan(value) for value in score(("mae", "rmse"), [math.inf], [1.0]).values())


def test_baselines_take_the_training_labels():
    texts = ["x", "y"]
    assert HEADS["classify"].trivial([1, 0, 1], texts, [0, 0]) == {"majority class": [1, 1]}
    assert HEADS["tag"].trivial([[0, 1], [1, 1]], texts, [[0, 0, 0], [2]]) == {"majority class": [[1, 1, 1], [1]]}
    assert HEADS["regress"].trivial([1.0, 4.0], texts, [0.0, 0.0]) == {"mean of the training labels": [2.5, 2.5]}
    spans = [(0, 1), [3, 5], (3, 5)]
    assert HEADS["span"].trivial(spans, texts, [(0, 0)] * 2) == {"most frequent training span": [(3, 5)] * 2}
    assert HEADS["language-model"].trivial([], texts, [1, 1]) == {}


ARTICLE = 'Mr. Smith, J. R., left. "Why?" He did not say. It rained. Nobody cared.'
TALK = "#A#: Hi. How are you?\n\n#B#: Fine.\r\n#A#: Good.\n#B#: Bye."


@pytest.mark.parametrize(
    ("document", "summary", "name", "lead"),
    [
        (ARTICLE, "Mr. Smith left.", "first sentence of the document", "Mr. Smith, J. R., left."),
        (
            ARTICLE,
            "Mr. Smith left without saying why he did.",
            "first 3 sentences of the document",
            'Mr. Smith, J. R., left.\n"Why?"\nHe did not say.',
        ),
        (TALK, "They greet each other.", "first line of the document", "#A#: Hi. How are you?"),
        (TALK, "x" * 60, "first 3 lines of the document", "#A#: Hi. How are you?\n#B#: Fine.\n#A#: Good."),
        ("今天下雨。我在家。", "下雨。", "first sentence of the document", "今天下雨。"),
        ("", "Nothing.", "first sentence of the document", ""),
    ],
)
def test_lead_is_as_long_as_the_training_texts(document, summary, name, lead):
    leads = HEADS["generate"].trivial([summary, [summary, "?"]], [document] * 2, ["", ""])
    assert next(iter(leads.items())) == (name, [lead] * 2)
    assert len(leads) == 2
