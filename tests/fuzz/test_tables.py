"""Any bytes as a table, any values as its cells: what was written is read, or a ValueError says what is wrong where."""

import csv
import gzip
import io
import json
from decimal import Decimal
from typing import Any

import pytest

pytest.importorskip("hypothesis")

import pyarrow
import pyarrow.parquet
from hypothesis import assume, example, given
from hypothesis import strategies as st

from encoded import BYTES, CLASSIFY, GENERATE, PAIR, REGRESS, SPAN, TAG, TEXT, changed, rows_of
from fuzz.refusals import result_or_refusal
from trunkline.engine.tasks.task import Task
from trunkline.engine.text.class_names import NUMBER, class_of
from trunkline.training.data.encoding import encode
from trunkline.training.data.tables import FORMATS, READERS, read_table

WANTED = ("text", "label")
NAMES = [f"a{suffix}{gz}" for suffix in READERS for gz in ("", ".gz") if (suffix, gz) != (".parquet", ".gz")]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)  # no halves of characters
cells = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.text(max_size=4), max_size=4)
)
cells = st.one_of(cells, st.lists(cells, max_size=3), st.dictionaries(st.sampled_from(("text", "answer_start")), cells))


def written(name: str, columns: dict[str, list[str]]) -> bytes:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if name == "a.parquet":
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(
            pyarrow.table({k: pyarrow.array(v, pyarrow.string()) for k, v in columns.items()}), sink
        )
        return sink.getvalue().to_pybytes()
    if ".csv" in name:
        file = io.StringIO(newline="")
        csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])
        text = file.getvalue()
    elif ".tsv" in name:
        text = "\n".join("\t".join(row) for row in [list(columns), *zip(*columns.values(), strict=True)])
    else:
        text = json.dumps(rows) if ".jsonl" not in name else "\n".join(map(json.dumps, rows))
    data = text.encode("utf-8")
    return gzip.compress(data, 1) if name.endswith(".gz") else data


def read_or_refused(data: bytes, name: str) -> dict[str, list[Any]] | None:
    columns, refusal = result_or_refusal(read_table, io.BytesIO(data), name, WANTED)
    if refusal:
        assert name in refusal
        return None
    assert list(columns) == list(WANTED)
    assert len(columns["text"]) == len(columns["label"])
    return columns


tables = st.lists(st.tuples(texts, texts), min_size=1, max_size=5)


@given(name=st.sampled_from(NAMES), rows=tables)
@example(name="a.csv", rows=[("a\r\nb", '"'), ("\x00\x1a", "\u2028")])
def test_what_was_written_is_read(name, rows):
    if ".tsv" in name:
        assume(not any(c in cell for row in rows for cell in row for c in "\t\n\r"))
    columns = {"text": [text for text, _ in rows], "label": [f"{label}." for _, label in rows]}
    assert read_or_refused(written(name, columns), name) == columns


@given(name=st.sampled_from(NAMES), rows=tables, data=st.data())
def test_damaged_tables_are_read_or_refused(name, rows, data):
    content = bytearray(written(name, {"text": [a for a, _ in rows], "label": [b for _, b in rows]}))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(("flip", "cut", "insert"))):
            case "flip":
                content[place] ^= data.draw(st.integers(1, 255))
            case "cut":
                del content[place : place + data.draw(st.integers(1, 20))]
            case "insert":
                content[place:place] = data.draw(st.binary(max_size=4))
        if not content:
            break
    read_or_refused(bytes(content), name)


@given(name=st.sampled_from(NAMES), content=st.one_of(st.binary(max_size=60), texts.map(str.encode)))
def test_any_bytes_are_read_or_refused(name, content):
    read_or_refused(content, name)
    if name.endswith(".gz"):
        read_or_refused(gzip.compress(content, 1), name)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(("data", "paragraphs", "qas", "context", "text", "label")), inner, max_size=3),
    ),
    max_leaves=8,
)


@given(name=st.sampled_from(("a.json", "a.jsonl")), value=json_values)
def test_any_json_is_read_or_refused(name, value):
    read_or_refused(json.dumps(value).encode(), name)


TASKS = [
    changed(task, unlabelled=policy, empty=policy, too_long=long)
    for task in (CLASSIFY, PAIR, REGRESS, TAG, SPAN, GENERATE, TEXT, changed(GENERATE, head="extract"))
    for policy in ("drop", "error")
    for long in ("truncate", "drop", "error")
] + [Task("hidden", "masked-language-model", ("text",), start="")]


@given(task=st.sampled_from(TASKS), causal=st.booleans(), length=st.integers(13, 20), data=st.data())
def test_any_cells_are_encoded_or_refused(task, causal, length, data):
    count = data.draw(st.integers(1, 3))
    names = [*task.text, *([task.label] if task.label else [])]
    good = st.one_of(texts, st.lists(st.sampled_from(("a", "b c", "", "\u200b")), max_size=4))
    labels = st.one_of(cells, st.sampled_from((0, 1, "no", "noun", "noun verb", ["noun"], [0, 1], -1, "a")))
    kinds = [*(st.one_of(good, good, cells) for _ in task.text), labels]
    columns = {
        name: data.draw(st.lists(kind, min_size=count, max_size=count))
        for name, kind in zip(names, kinds, strict=False)
    }
    encoded, refusal = result_or_refusal(encode, task, rows_of(**columns), BYTES, length, causal)
    if refusal:
        assert refusal.startswith(f"task '{task.name}': ")
        assert "(train.csv, row " in refusal or f"none of the {count} rows of train.csv" in refusal
        return
    dropped = sum(encoded.counts.dropped.values())
    assert len(encoded) + dropped == count or task.head == "language-model"
    for i in range(len(encoded)):
        example = encoded.example(i, 0)
        assert 0 < len(example.tokens) <= length
        assert set(example.tokens.tolist()) <= set(range(BYTES.vocab_size))
        assert len(example.rows) == len(set(example.rows.tolist())) > 0
        assert set(example.rows.tolist()) <= set(range(len(example.tokens)))
        if task.labels:
            assert set(example.targets.tolist()) <= set(range(len(task.labels)))
        encoded.reference(i)


names = st.lists(
    st.one_of(st.sampled_from(("1", "2", "01", "1.0", "-1", "true", "False", "yes", "no", "a", "1e0")), texts),
    min_size=1,
    max_size=5,
    unique=True,
)
labels = st.one_of(
    st.sampled_from((0, 1, 2, -1, 1.0, 0.5, "0", "1", "1.0", "001", "true", "True", True, False, "a", None, [1])), cells
)


@given(names=names, label=labels)
def test_a_label_is_the_class_it_names_or_refused(names, label):
    """The rule in plain words: a name; else the one name of that number; else, of names that are none, the id."""
    task = Task("toy", "classify", ("text",), "label", tuple(names))
    place, refusal = result_or_refusal(class_of, task, label)
    if refusal:
        assert refusal.startswith("label m")
        assert not isinstance(label, str) or label not in names
        return
    whole = isinstance(label, float) and label.is_integer()
    text, found = str(int(label) if whole else label), names[place]
    if isinstance(label, bool):
        says = {"true": 1, "yes": 1, "y": 1, "t": 1, "on": 1, "false": 0, "no": 0, "n": 0, "f": 0, "off": 0}
        said = [name for name in names if name.casefold() in says]
        assert says[found.casefold()] == label if said else found == names[int(label)]
    elif text in names:
        assert found == text
    elif any(NUMBER.fullmatch(name) for name in names):
        assert Decimal(found) == Decimal(text)
        assert [name for name in names if NUMBER.fullmatch(name) and Decimal(name) == Decimal(text)] == [found]
    else:
        assert found == names[int(float(text))]
        assert not {"true", "false"} & {name.casefold() for name in names}


def test_the_formats_in_words_are_those_that_are_read():
    assert set(FORMATS.replace(" or ", ", ").split(", ")) == set(READERS)
