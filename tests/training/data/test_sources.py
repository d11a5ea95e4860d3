"""Rows from every kind of source, and every fault of a file found, with file and row."""

import gzip
import io
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from trunkline.engine.tasks.task import Task
from trunkline.training.data.sources import Rows, read_rows
from trunkline.training.data.tables import rows_of


def table_task(source: str = "train", **fields) -> Task:
    return Task("toy", "classify", ("text",), "label", ("no", "yes"), train=source, **fields)


def read(folder: Path, name: str, content: bytes) -> Rows:
    """The rows of a file with that content."""
    (folder / name).write_bytes(content)
    return read_rows(table_task(name), "train", base=folder)


def parquet(**columns) -> bytes:
    buffer = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue().to_pybytes()


def in_format(name: str, text: str = "text") -> bytes:
    """One row, text 'a' and label '1', in the format of that file name."""
    if name.endswith(".parquet"):
        return parquet(**{text: ["a"], "label": ["1"]})
    if name.endswith(".jsonl"):
        return json.dumps({text: "a", "label": "1"}).encode()
    separator = {".csv": ",", ".tsv": "\t"}[Path(name).suffix]
    return f"{text}{separator}label\na{separator}1\n".encode()


def error_of(read_something, *arguments, **options) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers check the words)
        read_something(*arguments, **options)
    return str(caught.value)


# What a good file means


def test_csv_has_quoted_commas_quotes_and_line_ends(tmp_path):
    rows = read(tmp_path, "a.csv", b'label,text\r\nyes,"a, ""b""\r\nc"\r\nno,d "e" f\r\n')
    assert rows.columns == {"text": ['a, "b"\r\nc', 'd "e" f'], "label": ["yes", "no"]}
    assert (len(rows), rows.where(1)) == (2, "a.csv, row 2")


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
def test_values_of_a_table_are_strings_as_written(tmp_path, name, separator):
    values = ["null", "NA", "1e5", "007", "2020-01-01", "true", " x ", "", "-1"]
    lines = [f"text{separator}label", *(f"{value}{separator}{value}" for value in values)]
    assert read(tmp_path, name, "\n".join(lines).encode()).columns == {"text": values, "label": values}


@pytest.mark.parametrize("separator", ";\t|,")
def test_the_header_of_a_csv_says_what_parts_its_fields(tmp_path, separator):
    others = ";\t|,".replace(separator, "")
    lines = ['"text, or; other"', others, f'"{others}{separator}"']  # within quotes nothing parts
    (tmp_path / "a.csv").write_text("".join(f"{line}{separator}1\n" for line in lines).replace("1", "label", 1))
    task = Task("toy", "classify", ("text, or; other",), "label", ("no", "yes"), train="a.csv")
    columns = {"text, or; other": [others, others + separator], "label": ["1", "1"]}
    assert read_rows(task, "train", base=tmp_path).columns == columns


def test_tsv_rows_that_start_with_a_quote_stay_apart(tmp_path):
    texts = ['"it opens here', "plain", 'and closes here"', '"both"', "next\x85line, line\u2028separator, \rreturn"]
    content = "text\tlabel\n" + "".join(f"{text}\t1\n" for text in texts)
    rows = read(tmp_path, "a.tsv", content.encode())
    assert rows.columns["text"] == texts
    assert len(rows) == content.count("\n") - 1


def test_tsv_with_the_line_ends_of_windows(tmp_path):
    assert read(tmp_path, "a.tsv", b"text\tlabel\r\na\tyes\r\nb\tno\r\n").columns["label"] == ["yes", "no"]


def test_jsonl_keeps_types_and_order(tmp_path):
    rows = read(
        tmp_path, "a.jsonl", b'{"text": "2020-01-01", "label": 1, "more": []}\n{"label": null, "text": ["a", "b"]}\n'
    )
    assert rows.columns == {"text": ["2020-01-01", ["a", "b"]], "label": [1, None]}
    assert rows.where(0) == "a.jsonl, row 1"


def test_parquet_keeps_types_lists_and_nulls(tmp_path):
    content = parquet(idx=[7, 8], label=[0, -1], text=[["one.", "two."], None])
    assert read(tmp_path, "a.parquet", content).columns == {"text": [["one.", "two."], None], "label": [0, -1]}


@pytest.mark.parametrize("wanted", [True, False])
def test_parquet_reads_only_the_wanted_columns(tmp_path, wanted):
    offsets, broken = pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")
    broken_text = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, broken])
    if wanted:
        message = error_of(read, tmp_path, "a.parquet", parquet(text=broken_text, label=[1]))
        assert "a.parquet" in message
        assert "UTF8 sequence at string index 0" in message
    else:
        assert read(tmp_path, "a.parquet", parquet(text=["a"], label=[1], other=broken_text)).columns["text"] == ["a"]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path, name):
    content = "\ufeff".encode() + in_format(name)
    assert read(tmp_path, name, content).columns == {"text": ["a"], "label": ["1"]}


def test_a_csv_value_may_be_as_long_as_a_book(tmp_path):
    book = "word " * 300_000
    assert read(tmp_path, "a.csv", f'text,label\n"{book}",1\n'.encode()).columns["text"] == [book]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_an_empty_line_in_a_file_of_one_column_is_an_empty_text(tmp_path, name):
    (tmp_path / name).write_bytes(b"text\na\n\nb\n\n\n")
    rows = read_rows(Task("toy", "language-model", ("text",), train=name), "train", base=tmp_path)
    assert rows.columns == {"text": ["a", "", "b"]}
    assert rows.where(2) == f"{name}, row 3"


def test_of_alternative_columns_the_first_present_is_read(tmp_path):
    task = Task("toy", "generate", ("document|dialogue",), "summary|target", train="*.csv")
    (tmp_path / "1.csv").write_bytes(b"target,dialogue\nt1,d1\n")
    (tmp_path / "2.csv").write_bytes(b"dialogue,document,summary\nwrong,d2,t2\n")
    rows = read_rows(task, "train", base=tmp_path)
    assert rows.columns == {"document|dialogue": ["d1", "d2"], "summary|target": ["t1", "t2"]}


def test_the_start_of_an_answer_is_a_column_too(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"question": "q", "context": "c", "answer": "a", "at": 3}')
    task = Task("toy", "span", ("question", "context"), "answer", start="at", train="a.jsonl")
    assert read_rows(task, "train", base=tmp_path).columns["at"] == [3]


class Counted(io.BytesIO):
    """Knows how much of it was read."""

    taken = 0

    def read(self, size: int | None = -1) -> bytes:
        part = super().read(size)
        self.taken += len(part)
        return part

    def read1(self, size: int | None = -1) -> bytes:
        return self.read(8192 if size == -1 else size)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.csv.gz", "a.parquet"])
def test_no_more_of_a_file_is_read_than_its_rows_need(name):
    texts = [f"{place} {random.Random(place).randbytes(200).hex()}" for place in range(5000)]
    if name == "a.parquet":
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), buffer, row_group_size=100)
        content = buffer.getvalue()
    elif name == "a.jsonl":
        content = "\n".join(json.dumps({"text": text}) for text in texts).encode()
    else:
        content = "\n".join(["text", *texts]).encode()
    file = Counted(gzip.compress(content, 1) if name.endswith(".gz") else content)
    rows = rows_of(file, name, lambda found: found)
    assert [*next(rows)] == [texts[0]]
    assert 0 < file.taken < len(file.getvalue()) / 4
    assert [texts[0], *(text for (text,) in rows)] == texts


# What is wrong with a file


WHOLE = parquet(text=["a" * 999], label=[1])
DAMAGED = WHOLE[:30] + bytes(30) + WHOLE[60:]
FAULTS = {  # file, its bytes, words of the error
    "short row": ("a.csv", b"text,label\na,1\nb\n", "a.csv, row 2: expected 2 fields, as in the header, got 1"),
    "long row": ("a.csv", b"text,label\na,1\nb,c,1\n", "a.csv, row 2: expected 2 fields, as in the header, got 3"),
    "short row of a tsv": ("a.tsv", b"text\tlabel\na\t1\nb c\n", "a.tsv, row 2: expected 2 fields"),
    "empty line": ("a.csv", b'text,label\n"a\nb",1\n\nc,1\n', "a.csv, row 2: expected 2 fields"),
    "open quote": (
        "a.csv",
        b'text,label\na,1\nb,"2\nc,3\n',
        "row 2: a quote that opens is never closed (it begins in line 3)",
    ),
    "quote in quotes": (
        "a.csv",
        b'text,label\n"a "b" c",1\n',
        'row 1: a quote within quotes has to be written twice, as ""',
    ),
    "open quote in the header": ("a.csv", b'"text,label\na,1\n', "a.csv, header: a quote that opens is never closed"),
    "unquoted separator": ("a.csv", b"text;label\na;b;1\n", "got 3; a field with ';' in it needs quotes around it"),
    "zero bytes": ("a.csv", b"text,label\n\0\xff,1\n", "it has zero bytes, which this encoding does not write"),
    "neither the one nor the other": (
        "a.csv",
        b"text,label\n\xff,1\n",
        "`encoding: windows-1252` on the task, or --encoding windows-1252 in a command",
    ),
    "text after a quote": ("a.csv", b'text,label\n"a"b,1\n', "a.csv, row 1: a quote within quotes has to"),
    "latin-1": ("a.csv", b"text,label\na,1\nb\xe9,1\n", "a.csv is not UTF-8: byte 0xe9 at offset 16, line 3"),
    "utf-16": ("a.tsv", b"\xff\xfet\0", "a.tsv is not UTF-8: byte 0xff at offset 0, line 1"),
    "surrogate": ("a.jsonl", b'{"text": "\xed\xa0\x80"}', "a.jsonl is not UTF-8: byte 0xed at offset 10, line 1"),
    "cut off": (
        "a.jsonl",
        b'{"text": "a", "label": 1}\n{"text": "b", "la',
        "a.jsonl, row 2: not JSON: Unterminated string",
    ),
    "empty line of a jsonl": ("a.jsonl", b'{"text": "a", "label": 1}\n\n{}', "a.jsonl, row 2: not JSON"),
    "not an object": ("a.jsonl", b'["a", 1]\n', 'a.jsonl, row 1: expected a JSON object, got ["a", 1]'),
    "missing key": (
        "a.jsonl",
        b'{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n{"text": "c", "lable": 0}\n',
        "a.jsonl, row 3: no key 'label', found ['text', 'lable']",
    ),
    "truncated": ("a.parquet", parquet(text=["a"], label=[1])[:-9], "a.parquet is not a valid Parquet file"),
    "damaged": ("a.parquet", DAMAGED, "a.parquet is not a valid Parquet file: Corrupt snappy compressed data"),
    "column twice": ("a.csv", b"text,text,label\na,b,1\n", "a.csv has two columns 'text'"),
    "empty csv": ("a.csv", b"", "a.csv is empty"),
    "empty jsonl": ("a.jsonl", b"\n", "a.jsonl is empty"),
    "only a header": ("a.csv", b"text,label\n", "no rows in a.csv"),
    "no rows": ("a.parquet", parquet(text=[], label=[]), "no rows in a.parquet"),
}


@pytest.mark.parametrize(("name", "content", "words"), FAULTS.values(), ids=FAULTS)
def test_fault_is_an_error_with_task_file_and_row(tmp_path, name, content, words):
    message = error_of(read, tmp_path, name, content)
    assert message.startswith("task 'toy', train split: ")
    assert words in message


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet"])
def test_missing_column_names_the_wanted_and_the_found(tmp_path, name):
    message = error_of(read, tmp_path, name, in_format(name, "sentence"))
    assert f"{name} has no column 'text': wanted ['text', 'label'], found ['sentence', 'label']" in message


# The key of a cache


def test_digest_follows_the_content(tmp_path):
    content = b"text,label\na,1\nb,1\n"
    digest = read(tmp_path, "a.csv", content).digest
    assert len(bytes.fromhex(digest)) == 32
    assert read(tmp_path, "renamed.csv", content).digest == digest
    assert read(tmp_path, "a.csv", content.replace(b"b,1", b"c,1")).digest != digest


def test_digest_follows_the_order_of_the_shards(tmp_path):
    digests = set()
    for texts in ("ab", "ba", "aa"):
        for shard, text in enumerate(texts):
            (tmp_path / f"{shard}.tsv").write_text(f"text\tlabel\n{text}\t1\n")
        digests.add(read_rows(table_task("*.tsv"), "train", base=tmp_path).digest)
    assert len(digests) == 3


def test_digest_follows_the_format(tmp_path):
    rows = []
    for name in ("a.csv", "a.tsv"):
        (tmp_path / name).write_bytes(b'text\n"a"\n')  # the same bytes, but another text
        rows.append(read_rows(Task("toy", "language-model", ("text",), train=name), "train", base=tmp_path))
    assert [row.columns["text"] for row in rows] == [["a"], ['"a"']]
    assert rows[0].digest != rows[1].digest


# Other formats and encodings

SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "Farm",
            "paragraphs": [
                {
                    "context": "the hen is in the barn",
                    "qas": [
                        {"id": "1", "question": "where?", "answers": [{"text": "barn", "answer_start": 18}]},
                        {"id": "2", "question": "who?", "answers": [{"text": "hen", "answer_start": 4}]},
                    ],
                }
            ],
        }
    ],
}
TWO = [{"text": "é", "label": 1}, {"text": "b", "label": 0}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(TWO).encode()),
        ("a.json", json.dumps({"data": TWO}, indent=2).encode()),
        ("a.json.gz", gzip.compress(json.dumps(TWO).encode(), mtime=0)),
        ("a.jsonl.gz", gzip.compress("\n".join(map(json.dumps, TWO)).encode(), mtime=0)),
        ("a.JSONL", "\n".join(map(json.dumps, TWO)).encode()),
    ],
)
def test_json_arrays_and_gzip_are_read(name, content, tmp_path):
    rows = read(tmp_path, name, content)
    assert rows.columns == {"text": ["é", "b"], "label": [1, 0]}
    assert rows.where(1) == f"{name}, row 2"


def test_tables_of_other_encodings_are_read_where_the_task_names_them(tmp_path):
    for encoding in ("windows-1252", "utf-16", "latin-1", "utf-8"):
        (tmp_path / "a.csv").write_bytes("text,label\né,1\n".encode(encoding))
        rows = read_rows(table_task("a.csv", encoding=encoding), "train", base=tmp_path)
        assert rows.columns == {"text": ["é"], "label": ["1"]}
    (tmp_path / "a.csv").write_bytes("text,label\né,1\n".encode("utf-16"))
    assert "write `encoding: utf-16` on the task" in error_of(read_rows, table_task("a.csv"), "train", base=tmp_path)
    (tmp_path / "a.csv").write_bytes("text,label\né,1\n".encode("latin-1"))
    assert "`encoding: windows-1252`" in error_of(read_rows, table_task("a.csv"), "train", base=tmp_path)
    for unknown in ("klingon", "rot13"):
        with pytest.raises(ValueError, match=f"task 'toy': encoding '{unknown}' is unknown"):
            table_task("a.csv", encoding=unknown)


def test_squad_is_a_row_for_every_question(tmp_path):
    (tmp_path / "squad.json").write_text(json.dumps(SQUAD))
    task = Task("qa", "span", ("question", "context"), "answers", train="squad.json")
    rows = read_rows(task, "train", base=tmp_path)
    assert rows.columns["question"] == ["where?", "who?"]
    assert rows.columns["answers"][1] == [{"text": "hen", "answer_start": 4}]
    (tmp_path / "squad.json").write_text(json.dumps(SQUAD).replace("context", "passage"))
    message = error_of(read_rows, task, "train", base=tmp_path)
    assert "squad.json: articles need paragraphs with 'context' and 'qas', as SQuAD's: KeyError('context')" in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b'{"text": "a"}', "a.json: expected a JSON array of objects, got"),
        ("a.json", b"[1]", "a.json, row 1: expected a JSON object, got 1"),
        ("a.json", b'[{"text": "a", "label": 1}\n 2', "a.json: not JSON: Expecting ',' delimiter at line 2, column 2"),
        ("a.json", b"[" * 100_000, "a.json: not read: nested too deeply"),
        ("a.jsonl", b'[{"text": "a"}]', 'row 1: expected a JSON object, got [{"text": "a"}]; an array is read from'),
        ("a.jsonl", b'{"text": "a", "label": 1, "text": "b"}', "row 1: not read: key 'text' is given twice"),
        ("a.jsonl", b'{"text": "a", "label": ' + b"1" * 5000 + b"}", "row 1: not read: Exceeds the limit"),
        ("a.csv.gz", b"text,label\na,1\n", "a.csv.gz is not a valid gzip file"),
        ("a.csv.gz", gzip.compress(b"text,label\na,1\n", mtime=0)[:-9], "a.csv.gz is not a valid gzip file"),
        (
            "a.csv",
            gzip.compress(b"text,label\na,1\n", mtime=0),
            "a.csv is not UTF-8: byte 0x8b at offset 1, line 1; it is comp",
        ),
    ],
)
def test_what_cannot_be_read_says_what_to_do(name, content, words, tmp_path):
    assert words in error_of(read, tmp_path, name, content)
