"""What an engine is asked: one pass for all tasks, answers in the order of the texts, refusals in words."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import tiny_rows
from trunkline import Engine, Task, Trunk
from trunkline.engine.network.generate import Search

pytestmark = pytest.mark.usefixtures("one_thread")

COLOURS = ("red", "black", "white", "brown")
TAGS = ("article", "adjective", "noun", "verb")
SHORT = "the red cat is in the barn"
TEXTS = [SHORT, "owl", " ".join([SHORT] * 20), "the brown fox", "a b c d e f g h i j k l m n o p q r s t u v w x y z"]


@pytest.fixture(scope="module")
def engine(lively: Path) -> Engine:
    """Of six tasks. Not to be changed."""
    return Engine.load(lively, device="cpu")


@contextmanager
def counted_passes(trunk: Trunk) -> Iterator[list[int]]:
    """Tokens of every pass through the trunk."""
    passes, forward = [], trunk.forward

    def count(tokens, *rest, **more):
        passes.append(len(tokens))
        return forward(tokens, *rest, **more)

    trunk.forward = count
    yield passes
    del trunk.forward


def test_all_tasks_share_one_pass_of_the_trunk(engine):
    with counted_passes(engine.model.trunk) as passes:
        answers = engine.predict(TEXTS, ["colour", "parts"])
    lengths = [len(ids) + 1 for ids, _ in engine.tokenizer.encode(TEXTS)]
    assert max(lengths) > 128  # it is cut to the longest length
    assert passes == [sum(min(length, 128) for length in lengths)]
    assert list(answers) == ["colour", "parts"]


def test_each_head_answers_in_its_own_terms(engine):
    answers = engine.predict(TEXTS[:2], ["parts", "colour"])
    assert list(answers) == ["parts", "colour"]
    assert set(answers["colour"]) <= set(COLOURS)
    assert [len(tags) for tags in answers["parts"]] == [7, 1]  # one for each word
    assert {tag for tags in answers["parts"] for tag in tags} <= set(TAGS)
    pairs = [("where is the cat ?", f"well , {SHORT} ."), ["where is the owl ?", "the owl is  in the barn ."]]
    answers = engine.predict(pairs, ["closeness", "where"])
    assert all(isinstance(number, float) for number in answers["closeness"])
    for (_, context), span in zip(pairs, answers["where"], strict=True):
        assert span
        assert span in context


def test_answers_are_in_the_order_of_the_texts(engine):
    texts = [" ".join(["the"] * count) for count in (3, 90, 1, 17, 64, 2, 40)]
    assert [len(tags) for tags in engine.predict(texts, ["parts"])["parts"]] == [3, 90, 1, 17, 64, 2, 40]
    pairs = [(row["first"], row["second"]) for row in tiny_rows("closeness", 12, seed=5)]
    pairs.insert(4, (pairs[0][0], " ".join([SHORT] * 12)))
    alone = [engine.predict([pair], ["closeness"])["closeness"][0] for pair in pairs]
    assert len(set(alone)) == len(pairs)
    assert engine.predict(pairs, ["closeness"])["closeness"] == pytest.approx(alone, abs=1e-5)
    assert engine.predict(pairs[::-1], ["closeness"])["closeness"] == pytest.approx(alone[::-1], abs=1e-5)


def test_answers_do_not_depend_on_the_tasks_asked_with_them(engine):
    rows = tiny_rows("where", 9, seed=6)
    pairs = [(row["question"], row["context"]) for row in rows]
    both = engine.predict(pairs, ["where", "closeness"])
    assert both["where"] == engine.predict(pairs, ["where"])["where"]
    assert both["closeness"] == pytest.approx(engine.predict(pairs, ["closeness"])["closeness"], abs=1e-5)


def test_texts_are_written_in_the_order_of_the_documents(engine):
    documents = [row["document"] for row in tiny_rows("retell", 6, seed=7)]
    documents.insert(2, " ".join([SHORT] * 10))
    search = Search(max_new_tokens=5)
    alone = [engine.generate([document], "retell", search)[0] for document in documents]
    assert len(set(alone)) > 4
    assert engine.generate(documents, "retell", search) == alone
    assert all(isinstance(text, str) for text in alone)
    longer = engine.generate(documents, "retell")  # by the config's search: 8 tokens
    assert all(long.startswith(short) for long, short in zip(longer, alone, strict=True))


def test_dropout_is_off_when_an_engine_is_asked(engine):
    pairs = [("one", "two"), ("three", "four")]
    engine.model.train()
    assert engine.config.trunk.dropout > 0
    first = engine.predict(pairs, ["closeness"])
    engine.model.train()
    assert engine.predict(pairs, ["closeness"]) == first
    engine.model.train()
    written = engine.generate([SHORT], "retell")
    engine.model.eval()
    assert engine.generate([SHORT], "retell") == written


QUESTIONS = {  # texts, tasks, words of the error
    "one text for two": (["alone"], ["closeness"], "task 'closeness' takes 2 text.* got \\('alone',\\) at place 0"),
    "two texts for one": ([SHORT, ("a", "b")], ["colour"], "'colour' takes 1 text.* got \\('a', 'b'\\) at place 1"),
    "blank": ([SHORT, " \n"], ["colour"], "takes no blank text, got .* at place 1"),
    "no words to tag": ([""], ["parts"], "task 'parts' takes no blank text, got .* at place 0"),
    "no text to find a span in": (
        [("where ?", " ")],
        ["where"],
        "'where' takes no blank text, got \\('where \\?', ' '\\)",
    ),
    "unknown task": ([SHORT], ["color"], "no task 'color'; there are colour, closeness, parts, where, retell, prose"),
    "a task that writes": ([SHORT], ["retell"], "task 'retell' writes text: use generate"),
    "a language model": ([SHORT], ["prose"], "task 'prose' writes text: use generate"),
    "default tasks of other texts": ([SHORT], [], "task 'closeness' takes 2 text"),
}


@pytest.mark.parametrize(("texts", "tasks", "words"), QUESTIONS.values(), ids=QUESTIONS)
def test_a_question_that_does_not_fit_is_refused(engine, texts, tasks, words):
    with counted_passes(engine.model.trunk) as passes, pytest.raises(ValueError, match=words):
        engine.predict(texts, tasks)
    assert passes == []


NO_LISTS = {  # what is no list of texts or of tasks, words of the error
    "one string": ("Superb!", "texts must be a list, got one string: write \\['Superb!'\\]"),
    "bytes": (b"Superb!", "texts must be a list, got bytes"),
    "nothing": (None, "texts must be a list, got NoneType"),
    "a mapping": ({"text": [SHORT]}, "texts must be a list, got dict"),
    "a table": (
        SimpleNamespace(columns=["text"], __iter__=None),
        "texts must be a list, got SimpleNamespace.*; of a table take",
    ),
    "rows": ([{"text": SHORT}], "expected a text at place 0, got dict .*; of a row take its text, as row"),
    "a missing text": ([SHORT, None], "expected a text at place 1, got NoneType None"),
    "not a number": ([SHORT, float("nan")], "expected a text at place 1, got float nan"),
    "bytes in the list": ([b"a"], "expected a text at place 0, got bytes b'a'"),
    "a missing text of a pair": ([("a", None)], "expected a text at place 0, got NoneType None"),
    "half a character": ([SHORT, "ab\ud83d"], "half a character at place 1, '.ud83d' in 'ab.ud83d'"),
}


@pytest.mark.parametrize(("texts", "words"), NO_LISTS.values(), ids=NO_LISTS)
def test_what_is_no_list_of_texts_is_refused(engine, texts, words):
    with pytest.raises(ValueError, match=f"predict: {words}"):
        engine.predict(texts, ["colour"])
    with pytest.raises(ValueError, match=f"generate: {words}"):
        engine.generate(texts, "retell")


def test_one_string_is_no_list_of_tasks(engine):
    with pytest.raises(ValueError, match="predict: tasks must be a list, got one string: write \\['colour'\\]"):
        engine.predict([SHORT], "colour")
    with pytest.raises(ValueError, match="engine: tasks must be a list, got one string: write \\['sst2'\\]"):
        Engine(tasks="sst2")


@pytest.mark.parametrize("field", ["text", "labels", "metrics"])
def test_one_string_is_no_list_of_a_tasks_columns(field):
    fields = {"text": ("text",), "labels": ("no", "yes"), "metrics": ("f1",), field: "no"}
    with pytest.raises(ValueError, match=f"task 't': {field}: expected a list such as \\[no\\], got 'no'"):
        Task("t", "classify", label="label", **fields)


def test_no_texts_have_no_answers(engine):
    assert engine.predict([], ["colour", "parts"]) == {"colour": [], "parts": []}
    assert engine.generate([], "retell") == []


def test_texts_may_come_from_an_iterator(engine):
    assert engine.predict(iter(TEXTS), ["colour"]) == engine.predict(TEXTS, ["colour"])
    assert engine.generate(iter(TEXTS), "retell") == engine.generate(TEXTS, "retell")


def test_passes_have_the_token_budget_however_many_texts_there_are(engine):
    texts = [f"{i} {' '.join([SHORT] * (1 + i % 5))}" for i in range(40)]  # equal ones would be read once
    alone = [engine.predict([text], ["parts"])["parts"][0] for text in texts]
    budget = engine.config.batch.tokens
    with counted_passes(engine.model.trunk) as passes:
        assert engine.predict(texts, ["colour", "parts"])["parts"] == alone
    assert len(passes) > 1
    assert max(passes) <= budget < sum(passes)
    assert min(passes[:-1]) > budget - 128  # no pass ends while the longest text would find room
    with counted_passes(engine.model.trunk) as passes:
        engine.predict(texts, ["colour"] + ["parts"] * 20)  # what the heads look at counts as well
    assert max(passes) < budget / 10


def test_prompts_are_continued_as_many_at_a_time_as_find_room(engine, monkeypatch):
    texts = [" ".join([SHORT] * (1 + i % 5)) for i in range(20)]
    together, search = engine.generate(texts, "retell"), Search(max_new_tokens=8)
    monkeypatch.setattr("trunkline.engine.network.generate.CACHED", 1)
    with counted_passes(engine.model.trunk) as passes:
        assert engine.generate(texts, "retell", search) == together
    prompts = [count for count in passes if count > 20]
    assert len(prompts) > 1
    assert max(prompts) <= engine.config.batch.tokens
    monkeypatch.setattr("trunkline.engine.network.generate.AT_ONCE", 3)
    with counted_passes(engine.model.trunk) as passes:
        alone = engine.generate([SHORT], "retell", search)
        prompt = passes[0]
        assert engine.generate([SHORT] * 7, "retell", search) == alone * 7
    assert [count for count in passes if count >= prompt] == [prompt, 3 * prompt, 3 * prompt, prompt]


SEARCHES = {
    "no tokens": ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    "no beams": ({"beams": 0}, "beams must be at least 1, got 0"),
    "half a beam": ({"beams": 1.5}, "search.beams: expected a whole number, got 1.5"),
    "more beams than tokens": ({"beams": 512}, "beams must be fewer than the vocabulary's [0-9]+ entries, got 512"),
    "below nothing": ({"min_new_tokens": -1}, "min_new_tokens must be at least 0, got -1"),
    "runs": ({"no_repeat_ngram": None}, "search.no_repeat_ngram: expected a whole number, got None"),
    "no number": ({"length_penalty": float("nan")}, "length_penalty must be finite, got nan"),
    "longer than the trunk": ({"max_new_tokens": 1000}, "and 1000 new ones are more than the trunk's 160 positions"),
}


@pytest.mark.parametrize(("fields", "words"), SEARCHES.values(), ids=SEARCHES)
def test_a_search_that_cannot_be_is_refused(engine, fields, words):
    with counted_passes(engine.model.trunk) as passes, pytest.raises(ValueError, match=words):
        engine.generate([SHORT, SHORT * 9], "retell", Search(**fields))
    assert passes == []


def test_only_generating_tasks_write(engine):
    with pytest.raises(ValueError, match="generate: task 'retell' takes 1 text, got \\('a', 'b'\\) at place 0"):
        engine.generate([("a", "b")], "retell")
    with pytest.raises(ValueError, match="task 'colour' has head 'classify': use predict"):
        engine.generate([SHORT], "colour")
    with pytest.raises(ValueError, match="task 'prose' has head 'language-model'"):
        engine.generate([SHORT], "prose")
    with pytest.raises(ValueError, match="no task 'summary'"):
        engine.generate([SHORT], "summary")
