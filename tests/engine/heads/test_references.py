"""Several references for a document: read, checked, scored by the best or on average, with the interval of the mean."""

import json
from random import Random
from statistics import fmean

import numpy as np
import pytest
from scipy.stats import binom

from conftest import tiny_rows, write_jsonl
from encoded import GENERATE, changed, error_of, made
from trunkline import Engine, Task, TrunkConfig
from trunkline.engine.network.generate import Search
from trunkline.engine.settings import Batch, Evaluation
from trunkline.training.scoring.metrics import RESAMPLES, confidence_interval, rouge_by_document, score, score_task

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
NEWS = Task("news", "generate", ("text",), "summary")


def test_a_list_of_strings_is_several_references_and_the_first_is_learnt():
    encoded = made(GENERATE, text=["abc", "def"], label=[["x", " ", "yz"], ["only"]])
    assert encoded.references == [["x", "yz"], "only"]
    learnt = made(GENERATE, text=["abc", "def"], label=["x", "only"])
    np.testing.assert_array_equal(encoded.tokens, learnt.tokens)


POLICY = "policy is 'error', and `unlabelled: drop` on the task leaves such rows out"


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (["a", 7, "b"], "reference 2 of 3 must be a string, got 7"),
        (["a", None], "reference 2 of 2 must be a string, got None"),
        ([["a", "b"]], "reference 1 of 1 must be a string, got ['a', 'b']"),
        ({"a": "b"}, "reference 1 of 1 must be a string, got {'a': 'b'}"),
        ([], f"unlabelled row: 'label' is []; {POLICY}"),
        (["", " "], f"unlabelled row: 'label' is ['', ' ']; {POLICY}"),
    ],
    ids=str,
)
def test_references_that_are_none_are_an_error_with_task_file_row_and_value(label, words):
    message = error_of(GENERATE, text=["abc", "def"], label=["x", label])
    assert message == f"task 'short': {words} (train.csv, row 2)"


def test_an_empty_list_can_be_dropped_and_is_counted():
    encoded = made(changed(GENERATE, unlabelled="drop"), text=["abc", "def"], label=["x", []])
    assert (len(encoded), encoded.counts.unlabelled) == (1, 1)


def test_a_task_names_what_counts():
    with pytest.raises(ValueError, match="task 'news': references: expected one of 'best', 'average', got 'mean'"):
        changed(NEWS, references="mean")


def texts(random: Random, count: int) -> list[str]:
    words = "the cats are sitting quietly on a mat by some doors and it was raining".split()
    return [" ".join(random.choices(words, k=random.randint(1, 15))) for _ in range(count)]


def test_scores_are_those_of_rouge_score():
    from rouge_score.rouge_scorer import RougeScorer

    random, scorer = Random(0), RougeScorer(list(ROUGE), use_stemmer=True)
    predictions = texts(random, 40)
    references = [texts(random, random.randint(1, 4)) for _ in predictions]
    pairs = list(zip(predictions, references, strict=True))
    best = [scorer.score_multi(own, prediction) for prediction, own in pairs]
    single = [[scorer.score(reference, prediction) for reference in own] for prediction, own in pairs]
    found = {several: rouge_by_document(predictions, references, several) for several in ("best", "average")}
    for name in ROUGE:
        assert found["best"][name] == [scores[name].fmeasure for scores in best]
        assert found["average"][name] == [fmean(scores[name].fmeasure for scores in own) for own in single]
    assert found["best"] != found["average"]
    assert score(ROUGE, predictions, references) == {name: fmean(found["best"][name]) for name in ROUGE}
    for several, by_document in found.items():
        metrics, intervals = score_task(changed(NEWS, references=several), predictions, references)
        assert metrics == {name: fmean(by_document[name]) for name in ROUGE}
        assert intervals == {name: confidence_interval(by_document[name]) for name in ROUGE}


def test_other_heads_have_no_interval():
    task = Task("mood", "classify", ("text",), "label", ("bad", "good"))
    assert score_task(task, [1, 0], [1, 1]) == ({"accuracy": 0.5}, {})


def test_interval_of_zeros_and_ones_is_that_of_a_binomial():
    """The mean of a sample with replacement of n numbers of which k are 1 is binomial(n, k / n) / n."""
    n, k = 400, 120
    low, high = confidence_interval([1.0] * k + [0.0] * (n - k))
    expected = binom.ppf([0.025, 0.975], n, k / n) / n
    assert [low, high] == pytest.approx(expected, abs=2.5 / n)
    assert confidence_interval([1.0] * k + [0.0] * (n - k)) == (low, high)  # it is seeded


def test_interval_is_that_of_a_plain_loop():
    random = Random(1)
    values = [random.betavariate(2, 5) for _ in range(60)]
    means = sorted(fmean(random.choices(values, k=60)) for _ in range(8 * RESAMPLES))
    expected = means[len(means) // 40], means[-len(means) // 40]
    width = expected[1] - expected[0]
    assert confidence_interval(values) == pytest.approx(expected, abs=0.06 * width)


def test_interval_of_one_document_is_its_score():
    assert confidence_interval([0.25]) == pytest.approx((0.25, 0.25))


def test_a_run_says_what_of_several_references_counts(tmp_path, one_thread):
    rows = tiny_rows("retell", 12, seed=0)
    for row in rows[::2]:
        row["summary"] = [row["summary"], "somebody sees the " + row["summary"]]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    task = Task(
        "retell", "generate", ("document",), "summary", (), (), "rows.jsonl", "rows.jsonl", references="average"
    )
    engine = Engine(
        trunk=TrunkConfig(hidden_size=32, num_layers=1, num_heads=4, max_positions=200),
        tasks=[task],
        vocab_size=400,
        steps=1,
        batch=Batch(tokens=512, max_length=130),
        evaluation=Evaluation(every=1, examples=4, texts=2),
        search=Search(max_new_tokens=6),
        run=str(tmp_path / "run"),
        base=str(tmp_path),
        device="cpu",
    )
    about = engine.fit()["tasks"]["retell"]
    assert about["references"] == "average of up to 2 references"
    assert set(about["intervals"]) == set(ROUGE) == set(about["baseline"]["intervals"])
    for kind in (about, about["baseline"]):
        for name, (low, high) in kind["intervals"].items():
            assert 0 <= low <= kind["metrics"][name] <= high <= 1
    assert about["baseline"]["intervals"]["rouge1"][0] < about["baseline"]["metrics"]["rouge1"]
    written = json.loads((tmp_path / "run" / "summary.json").read_text())["tasks"]["retell"]
    assert written["intervals"] == {name: list(bounds) for name, bounds in about["intervals"].items()}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "average of up to 2 references" in page
    assert "95&nbsp;% confidence interval" in page
