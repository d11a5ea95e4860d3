"""A head is one class: grades, which no embedded head has, are defined here and nowhere else, and go all the way."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from trunkline import Engine, Task, TrunkConfig
from trunkline.engine.heads.head import Head, Labels, Made, Piece, Row, pooled
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.settings import Batch, Evaluation
from trunkline.engine.text.layout import Laid, Layout
from trunkline.engine.text.tokenizer import Tokenizer

GRADES = ("poor", "fair", "good")


class Grade(Head):
    """A class of an order, said by the cell's number of stars; predicted is the median of the distribution."""

    metrics = ("mae", "spearman")
    named = True
    pools = True

    def columns(self, task: Task) -> int:
        return len(task.labels)

    def encode(self, layout: Layout, task: Task, row: Row) -> Made:
        if not re.fullmatch(r"\*{1,3}", str(row.label)):
            raise ValueError(f"label must be one to three stars, got {row.label!r}")
        laid = layout.lay(row.texts, row.encoded)
        return Made([Piece(laid.tokens, [len(row.label) - 1], laid.types)], laid.cut)

    def label(self, tokens: np.ndarray, label: np.ndarray, causal: bool) -> Labels:
        return Labels.of([pooled(tokens, causal)], targets=label)

    def predict(self, logits: Tensor) -> int:
        return int((logits[0].softmax(-1).cumsum(-1) < 0.5).sum())

    def describe(self, task: Task, value: int, laid: Laid) -> str:
        return task.labels[value]

    def reference(self, piece: Piece) -> int:
        return int(piece.label[0])

    def trivial(self, train: Sequence[int], inputs: Sequence[str], references: Sequence[int]) -> dict[str, list[Any]]:
        return {"median grade": [sorted(train)[len(train) // 2]] * len(references)}

    def in_words(self, task: Task, value: int, piece: Piece, tokenizer: Tokenizer) -> str:
        return f"{value + 1} of {len(task.labels)}"


@pytest.fixture(autouse=True)
def grade() -> Iterator[None]:
    HEADS["grade"] = Grade()
    yield
    del HEADS["grade"]


def engine(folder: Path, label: str = "**") -> Engine:
    rows = [f"a meal of {word},{stars}" for word, stars in (("mud", "*"), ("bread", label), ("cake", "***"))]
    for split in ("train", "validation"):
        (folder / f"{split}.csv").write_text("\n".join(["text,stars", *rows, *rows]) + "\n")
    task = Task("meals", "grade", ("text",), "stars", GRADES, train="train.csv", validation="validation.csv")
    trunk = TrunkConfig(hidden_size=32, num_layers=1, num_heads=2, max_positions=64)
    return Engine(
        trunk,
        [task, Task("words", "regress", ("text",), "n", train="n.csv", validation="n.csv")],
        base=str(folder),
        run=str(folder / "run"),
        vocab_size=300,
        steps=2,
        batch=Batch(tokens=256, max_length=32),
        evaluation=Evaluation(every=2),
        device="cpu",
    )


def test_a_head_of_ones_own_trains_predicts_and_is_in_the_report(tmp_path, monkeypatch):
    monkeypatch.setenv("TRUNKLINE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "n.csv").write_text("text,n\na meal,2\na long meal,3\n")
    made = engine(tmp_path)
    summary = made.fit()["tasks"]["meals"]
    assert (summary["head"], summary["metric"]) == ("grade", "mae")
    assert set(summary["metrics"]) == {"loss", "mae", "spearman"}
    assert summary["baseline"] == {"name": "median grade", "metrics": {"mae": 2 / 3, "spearman": 0.0}, "intervals": {}}
    assert '"reference": "2 of 3"' in (tmp_path / "run" / "samples.json").read_text()
    assert "meals" in (tmp_path / "run" / "report.html").read_text()
    texts = ["a meal of cake", "a meal of mud"]
    answers = made.predict(texts, ["meals"])["meals"]
    assert set(answers) <= set(GRADES)
    assert Engine.load(tmp_path / "run", device="cpu").predict(texts, ["meals"])["meals"] == answers


def test_its_errors_name_task_file_row_and_value(tmp_path, monkeypatch):
    monkeypatch.setenv("TRUNKLINE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "n.csv").write_text("text,n\na meal,2\na long meal,3\n")
    with pytest.raises(ValueError, match=r"'meals': label must be one to three stars, got 'two' \(train\.csv, row 2\)"):
        engine(tmp_path, "two").fit()


def test_a_head_that_nobody_registered_is_an_error_with_the_nearest():
    with pytest.raises(ValueError, match="task 'x': there is no head 'clasify'; did you mean 'classify'"):
        Task("x", "clasify", ("text",), "label", GRADES)


def test_a_task_explains_every_head():
    """`help(Task)` and `train --help` print the field's description."""
    source = (Path(__file__).resolve().parents[3] / "engine" / "tasks" / "task.py").read_text("utf-8")
    words = " ".join(source.split())
    assert [name for name in HEADS if name != "grade" and f" {name}: " not in words] == []


class Halved(Grade):
    """Reads half of the text, and forgets that token types go with tokens."""

    def encode(self, layout: Layout, task: Task, row: Row) -> Made:
        laid = layout.lay(row.texts, row.encoded)
        return Made([Piece(laid.tokens[: laid.kept // 2], [len(row.label) - 1], laid.types)], True)


def test_a_head_that_cuts_tokens_and_not_their_types_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("TRUNKLINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(HEADS, "grade", Halved())
    (tmp_path / "n.csv").write_text("text,n\na meal,2\na long meal,3\n")
    with pytest.raises(ValueError, match=r"'meals': head 'grade' gives \d+ tokens .*types: .* \(train\.csv, row 1\)"):
        engine(tmp_path).fit()


def test_a_head_says_which_token_types_its_tokens_have():
    with pytest.raises(TypeError, match="types"):
        Piece(np.arange(3), [0])
