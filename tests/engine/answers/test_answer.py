"""Predictions with their probabilities: what they are of every head, and that no text's depend on another's."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from answering import TRUNK, adapted_engine, answering_engine
from trunkline import Engine
from trunkline.engine.answers.answer import answer, in_batches
from trunkline.engine.answers.ask import question
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.settings import Batch

ENGINE = answering_engine()
ONE, TWO = ("polarity", "topics", "stars", "parts", "gist"), ("follows", "where")
TEXT, PAIR = "One two three. And four five.", ("who is it ?", "it is the fox")


def test_without_scores_answers_are_the_labels():
    for text, tasks in ((TEXT, ONE), (PAIR, TWO)):
        plain, scored = ENGINE.predict([text] * 2, tasks), ENGINE.predict([text] * 2, tasks, scores=True)
        assert plain == {name: [said["label"] for said in answers] for name, answers in scored.items()}


def test_scores_of_every_head():
    one = {name: said for name, (said,) in ENGINE.predict([TEXT], ONE, scores=True).items()}
    two = {name: said for name, (said,) in ENGINE.predict([PAIR], TWO, scores=True).items()}
    for said, classes in ((one["polarity"], 2), (two["follows"], 3)):
        assert sum(said["scores"].values()) == pytest.approx(1)
        assert len(said["scores"]) == classes
        assert said["score"] == max(said["scores"].values()) == said["scores"][said["label"]]
    assert one["topics"]["label"] == [name for name, p in one["topics"]["scores"].items() if p > 0.4]
    assert list(one["stars"]) == ["label"]  # a number has no probability
    assert len(one["parts"]["label"]) == len(one["parts"]["score"]) == 6
    assert all(1 / 3 < p < 1 for p in one["parts"]["score"])
    assert len(one["gist"]["score"]) == len(one["gist"]["label"].split("\n"))
    assert 0 < two["where"]["score"] < 1


def test_a_word_that_is_not_read_has_no_probability():
    said = ENGINE.predict(["word " * 30], ["parts"], scores=True)["parts"][0]
    assert said["label"][-1] == "<unread>"
    assert said["score"][-1] is None
    assert said["score"][0] > 0


def test_a_span_is_as_probable_as_both_of_its_ends():
    """No other span is likelier, and all of them together are certain."""
    asked = question(ENGINE, PAIR, [ENGINE.place_of("where")])
    said = answer(ENGINE, [asked])[0]["where"]
    size = asked.laid.kept
    starts = torch.zeros(size, 2)
    starts[0, 0], starts[2, 1] = math.log(3), math.log(5)
    p = HEADS["span"].scores(None, (0, 2), starts, asked.laid)["score"]
    assert p == pytest.approx(3 / (size + 2) * 5 / (size + 4))
    assert said["label"] in PAIR[1]


def test_temperature_makes_probabilities_and_no_prediction_other():
    engine = answering_engine()
    before = engine.predict([TEXT], ["polarity", "parts"], scores=True)
    engine.model.temperature[:] = 2.0
    after = engine.predict([TEXT], ["polarity", "parts"], scores=True)
    (cold,), (hot,) = before["polarity"], after["polarity"]
    assert cold["label"] == hot["label"]
    odds = [p[cold["label"]] / (1 - p[cold["label"]]) for p in (cold["scores"], hot["scores"])]
    assert odds[1] == pytest.approx(odds[0] ** 0.5, rel=1e-4)
    assert before["parts"][0]["label"] == after["parts"][0]["label"]


def test_what_was_fitted_is_saved(tmp_path):
    engine = answering_engine()
    engine.model.temperature[:], engine.model.threshold[2] = 3.0, 0.9
    expected = engine.predict([TEXT], ONE, scores=True)
    assert Engine.load(engine.save(tmp_path), device="cpu").predict([TEXT], ONE, scores=True) == expected


texts = st.text(st.sampled_from("abc .é"), min_size=1, max_size=60).filter(str.strip)
words = st.one_of(texts.map(lambda text: (text,)), st.tuples(texts, texts))


def places(text: tuple[str, ...]) -> list[int]:
    return [ENGINE.place_of(name) for name in (ONE if len(text) == 1 else TWO)]


@settings(max_examples=25, deadline=None)
@given(words, st.lists(words, max_size=6), st.integers(0, 6), st.integers(1, 5))
def test_an_answer_does_not_depend_on_its_company(text, others, place, every):
    """Nor on what else is asked of the text; equal texts are among the others, too."""
    alone = answer(ENGINE, [question(ENGINE, text, places(text))])[0]
    company = [question(ENGINE, other, places(other)[::every]) for other in [*others, text]]
    company.insert(min(place, len(company)), question(ENGINE, text, places(text)))
    together = answer(ENGINE, company)[min(place, len(company) - 1)]
    assert list(together) == list(alone)
    for name, said in alone.items():
        assert_alike(together[name], said)


def assert_alike(got: Any, expected: Any) -> None:
    """Equal, but for numbers, which are within 1e-5."""
    if isinstance(expected, dict):
        assert list(got) == list(expected)
        got, expected = list(got.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_alike(one, other)
    else:
        assert got == (pytest.approx(expected, abs=1e-5, rel=1e-5) if isinstance(expected, float) else expected)


def test_equal_texts_are_read_once(monkeypatch):
    sizes = []
    hidden = ENGINE.model.hidden
    monkeypatch.setattr(ENGINE.model, "hidden", lambda batch: sizes.append(batch.real_tokens) or hidden(batch))
    once = ENGINE.predict([TEXT], ONE)
    assert ENGINE.predict([TEXT] * 3, ONE) == {name: answers * 3 for name, answers in once.items()}
    assert sizes[1:] == [sizes[0]] * (len(sizes) - 1)


def test_batches_keep_to_their_budget_and_to_the_order():
    questions = [question(ENGINE, ("a" * length,), [0]) for length in (5, 30, 70, 1, 1)]
    batches = list(in_batches(questions, 40))
    assert [len(batch) for batch in batches] == [2, 1, 2]
    assert [q for batch in batches for q in batch] == questions


def test_a_bilstm_says_how_sure_it_is():
    engine = answering_engine(
        replace(TRUNK, causal=False), architecture="bilstm", batch=Batch(tokens=256, max_length=80)
    )
    scored = engine.predict([TEXT, "two"], ONE, scores=True)
    assert engine.predict([TEXT, "two"], ONE) == {n: [said["label"] for said in s] for n, s in scored.items()}
    assert sum(scored["polarity"][1]["scores"].values()) == pytest.approx(1)


def test_each_adapter_reads_a_text_by_itself(monkeypatch):
    """All in one pass; a task's answers are those that it gives alone."""
    engine = adapted_engine()
    alone = {name: engine.predict([TEXT, "two"], [name], scores=True)[name] for name in ONE}
    passes = []
    hidden = engine.model.hidden
    monkeypatch.setattr(engine.model, "hidden", lambda batch: passes.append(batch.examples) or hidden(batch))
    together = engine.predict([TEXT, "two"], ONE, scores=True)
    for name in ONE:
        for said, expected in zip(together[name], alone[name], strict=True):
            assert_alike(said, expected)
    assert [sum(examples) for examples in passes] == [2 * len(ONE)]
