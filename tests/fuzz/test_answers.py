"""What is asked of an engine, by Python and by the command: right answers, or an error in words before any of them."""

import io
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis")

from hypothesis import example, given, settings
from hypothesis import strategies as st

from trunkline import Engine, Task, TrunkConfig
from trunkline.engine.network.generate import Search
from trunkline.engine.settings import Batch
from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.training.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

ONE, TWO = ("kind", "amount", "parts"), ("same", "where")  # tasks by how many texts they take
LABELS = ("yes", "no", "so")
POSITIONS = 48


def tasks() -> list[Task]:
    return [
        Task("kind", "classify", ("text",), "label", LABELS),
        Task("amount", "regress", ("text",), "label"),
        Task("parts", "tag", ("text",), "label", LABELS),
        Task("same", "classify", ("first", "second"), "label", LABELS),
        Task("where", "span", ("question", "text"), "label"),
        Task("short", "generate", ("text",), "label", max_target_tokens=8),
    ]


@pytest.fixture(scope="module")
def engine() -> Engine:
    """Untrained, with batches so small that a few texts are several."""
    trunk = TrunkConfig(hidden_size=16, num_layers=1, num_heads=2, max_positions=POSITIONS, positions="rotary")
    sizes = {"batch": Batch(tokens=64, max_length=32), "search": Search(max_new_tokens=3)}
    engine = Engine(trunk, tasks(), device="cpu", **sizes)
    engine.build(Tokenizer.train(["yes no so, a film in the barn"], 270))
    return engine


@pytest.fixture(scope="module")
def saved(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engine.save(tmp_path_factory.mktemp("asked"))


words = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
anything = st.text(st.characters(), max_size=30)  # halves of characters, too
odd = st.none() | st.floats() | st.integers() | st.binary(max_size=3) | st.just({"text": "a"})
rows = st.one_of(words, anything, st.tuples(words, words), st.lists(anything | odd, max_size=3), odd)
no_lists = st.one_of(words, st.none(), st.integers(), st.binary(), st.dictionaries(words, st.lists(words)))


def answers_or_refusal(call: Callable[[], Any]) -> Any:
    """None for a refusal, which has a text."""
    try:
        return call()
    except (ValueError, TypeError) as error:
        refusal = str(error)
    assert refusal.strip(), "an error without a text"
    return None


def is_right(task: str, answer: Any, texts: tuple[str, ...]) -> bool:
    match task:
        case "kind" | "same":
            return answer in LABELS
        case "amount":
            return isinstance(answer, float)
        case "parts":
            return len(answer) <= len(texts[-1].split())
    return answer in texts[-1]


@settings(deadline=None)
@given(texts=st.lists(rows, max_size=6), asked=st.lists(st.sampled_from([*ONE, *TWO]), max_size=3))
def test_predict(engine: Engine, texts: list[Any], asked: list[str]):
    made = answers_or_refusal(lambda: engine.predict(iter(texts), asked))
    if made is None:
        return
    assert set(made) == set(asked or [*ONE, *TWO])
    for task, answers in made.items():
        assert len(answers) == len(texts)
        for text, answer in zip(texts, answers, strict=True):
            assert is_right(task, answer, (text,) if isinstance(text, str) else tuple(text)), (task, answer)
            (alone,) = engine.predict([text], [task])[task]
            assert answer == (pytest.approx(alone, abs=1e-4) if task == "amount" else alone)


@settings(deadline=None)
@given(texts=st.lists(words.filter(str.strip), min_size=1, max_size=6), pairs=st.booleans())
def test_texts_that_are_not_blank_are_answered(engine: Engine, texts: list[str], pairs: bool):
    asked = TWO if pairs else ONE
    made = engine.predict([(text, text) for text in texts] if pairs else texts, asked)
    assert [len(answers) for answers in made.values()] == [len(texts)] * len(asked)
    if not pairs:
        assert len(engine.generate(texts, "short")) == len(texts)


@settings(deadline=None)
@given(texts=no_lists)
def test_what_is_no_list_is_refused(engine: Engine, texts: Any):
    for call in (lambda: engine.predict(texts, ["kind"]), lambda: engine.generate(texts, "short")):
        with pytest.raises(ValueError, match="texts must be a list"):
            call()


numbers = st.integers(-2, 6) | st.integers(-(2**70), 2**70) | st.floats() | st.none() | st.booleans()
searches = st.fixed_dictionaries(
    {},
    optional={
        "max_new_tokens": numbers,
        "beams": numbers,
        "length_penalty": numbers,
        "min_new_tokens": numbers,
        "no_repeat_ngram": numbers,
    },
)


@settings(deadline=None)
@given(texts=st.lists(words | anything, max_size=4), fields=searches)
@example(texts=["a"], fields={"beams": 270})
@example(texts=["a", ""], fields={"beams": 3, "no_repeat_ngram": 1, "max_new_tokens": 6})
def test_generate(engine: Engine, texts: list[str], fields: dict[str, Any]):
    made = answers_or_refusal(lambda: engine.generate(texts, "short", Search(**fields)))
    if made is not None:
        assert made == [engine.generate([text], "short", Search(**fields))[0] for text in texts]


def command(saved: Path, arguments: list[str], stdin: bytes) -> tuple[int, str, str]:
    """Exit code and output of `trunkline predict`."""
    out, err, before = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin))
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = main(["predict", str(saved), *arguments])
    except SystemExit as stopped:  # argparse
        code = int(stopped.code or 0)
    finally:
        sys.stdin = before
    return code, out.getvalue(), err.getvalue()


chosen = st.lists(st.sampled_from([*ONE, *TWO, "short", "none"]), max_size=2)


@settings(deadline=None)
@given(asked=chosen, data=st.binary(max_size=60) | st.lists(words, max_size=4).map("\r\n".join).map(str.encode))
@example(asked=["kind"], data=b"a film\r\na barn")
@example(asked=[], data=b"\xef\xbb\xbfa\tb\n")
def test_the_command_on_standard_input(saved: Path, asked: list[str], data: bytes):
    code, out, err = command(saved, [word for name in asked for word in ("--task", name)], data)
    assert code in (0, 2)
    if code:
        assert err.startswith("trunkline: ")
        assert out == ""
        return
    lines = data.decode().removeprefix("\ufeff").removesuffix("\n").split("\n")
    assert [json.loads(line)["text"] for line in out.split("\n")[:-1]] == [line.removesuffix("\r") for line in lines]


arguments = st.text(st.characters(exclude_characters="\0"), max_size=12)  # as the system hands them over


@settings(deadline=None)
@given(asked=chosen, texts=st.lists(arguments, min_size=1, max_size=3))
@example(asked=["kind"], texts=["--", "-1"])
@example(asked=["kind"], texts=["caf\udce9"])
def test_the_command_on_arguments(saved: Path, asked: list[str], texts: list[str]):
    options = [word for name in asked for word in ("--task", name)]
    code, out, err = command(saved, [*options, "--", *texts], b"")
    assert code in (0, 2)
    if code:
        assert err.startswith("trunkline: ")
        assert out == ""
        return
    assert [json.loads(line)["text"] for line in out.split("\n")[:-1]] == texts
