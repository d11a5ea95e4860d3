"""GLUE's server gets what it wants: names, header, labels, order and number of rows; constants only where asked for."""

import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import write_jsonl
from trunkline import Engine, TrunkConfig
from trunkline.engine.settings import Batch
from trunkline.engine.tasks.builtin import BUILTIN
from trunkline.engine.tasks.task import Task
from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.training import submit as module
from trunkline.training.cli import main
from trunkline.training.data.sources import read_rows
from trunkline.training.submit import TEST_SPLITS, submit

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = 7
TASKS = ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]
CLASSES = {
    "CoLA": {"0", "1"},
    "SST-2": {"0", "1"},
    "MRPC": {"0", "1"},
    "QQP": {"0", "1"},
    "WNLI": {"0", "1"},
    "MNLI-m": {"entailment", "neutral", "contradiction"},
    "MNLI-mm": {"entailment", "neutral", "contradiction"},
    "AX": {"entailment", "neutral", "contradiction"},
    "QNLI": {"entailment", "not_entailment"},
    "RTE": {"entailment", "not_entailment"},
}


@pytest.fixture
def few_rows(monkeypatch):
    """Test sets of seven rows."""
    splits = tuple(replace(test, rows=ROWS) for test in TEST_SPLITS)
    monkeypatch.setattr(module, "TEST_SPLITS", splits)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The test splits of seven rows, laid out like the hub; no row is like another."""
    for test in TEST_SPLITS:
        folder = tmp_path / "data" / "glue" / (test.subset or test.task)
        folder.mkdir(parents=True, exist_ok=True)
        texts = [{column: f"{column} {test.file} {row}" for column in BUILTIN[test.task].text} for row in range(ROWS)]
        hidden = {} if test.subset else {"label": -1}
        write_jsonl(folder / f"{test.split}.jsonl", [{**text, **hidden, "idx": row} for row, text in enumerate(texts)])
    return tmp_path / "data"


def make(tasks: list, data: Path) -> Engine:
    """An engine with untrained heads, and answers of its own: a text's row says which class it is."""
    shape = TrunkConfig(hidden_size=32, num_layers=1, num_heads=4, max_positions=64)
    engine = Engine(shape, tasks, data=str(data), batch=Batch(tokens=256, max_length=64), device="cpu")
    engine.build(Tokenizer.train(["premise MNLI-m.tsv 3"], 300))
    return engine


@pytest.fixture
def answered(monkeypatch) -> list[tuple[str, ...]]:
    """What is asked; the answer is the class whose id is the row's number modulo their count, or the row less 1."""
    asked = []

    def predict(engine: Engine, texts: list[tuple[str, ...]], tasks: list[str]) -> dict[str, list]:
        asked.extend(texts)
        rows, labels = [int(text[0].split()[-1]) for text in texts], BUILTIN[tasks[0]].labels
        return {tasks[0]: [labels[row % len(labels)] if labels else row - 1.0 for row in rows]}

    monkeypatch.setattr(Engine, "predict", predict)
    return asked


def tables(path: Path) -> dict[str, list[list[str]]]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        texts = {name.removesuffix(".tsv"): archive.read(name).decode() for name in archive.namelist()}
    assert all(text.endswith("\n") for text in texts.values())
    return {name: [line.split("\t") for line in text[:-1].split("\n")] for name, text in texts.items()}


def test_sizes_and_names_are_the_official_ones():
    """Lines of the files of https://gluebenchmark.com's sample submission, less the header."""
    assert {test.file.removesuffix(".tsv"): test.rows for test in TEST_SPLITS} == {
        "AX": 1104,
        "CoLA": 1063,
        "MNLI-m": 9796,
        "MNLI-mm": 9847,
        "MRPC": 1725,
        "QNLI": 5463,
        "QQP": 390965,
        "RTE": 3000,
        "SST-2": 1821,
        "STS-B": 1379,
        "WNLI": 146,
    }


@pytest.mark.usefixtures("few_rows")
def test_answers_stand_in_the_order_of_the_rows_under_the_servers_names(data, answered, tmp_path):
    written = tables(submit(make(TASKS, data), tmp_path / "glue.zip"))
    assert set(written) == {*CLASSES, "STS-B"}
    for name, lines in written.items():
        assert lines[0] == ["index", "prediction"], name
        assert [line[0] for line in lines[1:]] == [str(row) for row in range(ROWS)], name
    answers = {name: [line[1] for line in lines[1:]] for name, lines in written.items()}
    assert answers["STS-B"] == ["0.000", "0.000", "1.000", "2.000", "3.000", "4.000", "5.000"]
    assert answers["CoLA"] == answers["WNLI"] == ["0", "1", "0", "1", "0", "1", "0"]
    assert answers["RTE"] == answers["QNLI"] == ["entailment", "not_entailment"] * 3 + ["entailment"]
    for name in ("MNLI-m", "MNLI-mm", "AX"):
        assert answers[name] == ["entailment", "neutral", "contradiction"] * 2 + ["entailment"]
    assert ("premise AX.tsv 2", "hypothesis AX.tsv 2") in answered
    assert ("premise MNLI-mm.tsv 2", "hypothesis MNLI-mm.tsv 2") in answered
    assert ("sentence1 WNLI.tsv 6", "sentence2 WNLI.tsv 6") in answered
    assert len(answered) == 11 * ROWS


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("column", ["idx", "index"])
def test_a_row_goes_where_its_index_says(data, answered, tmp_path, column):
    order, folder = [3, 0, 6, 5, 1, 4, 2], data / "glue" / "wnli"
    (folder / "test.jsonl").unlink()
    lines = [f"{row}\tpremise {row}\tso\n" for row in order]  # GLUE's own TSV: the index is text
    (folder / "test.tsv").write_text("".join([f"{column}\tsentence1\tsentence2\n", *lines]))
    written = tables(submit(make(["wnli"], data), tmp_path / "glue.zip", fill_missing=True))
    assert [line[1] for line in written["WNLI"][1:]] == ["0", "1", "0", "1", "0", "1", "0"]


@pytest.mark.usefixtures("few_rows")
def test_without_an_index_the_rows_stand_as_they_are(data, answered, tmp_path):
    rows, told = [{"sentence1": f"premise {row}", "sentence2": "so"} for row in (1, 1, 0, 1, 0, 0, 0)], []
    write_jsonl(data / "glue" / "wnli" / "test.jsonl", rows)
    written = tables(submit(make(["wnli"], data), tmp_path / "glue.zip", fill_missing=True, tell=told.append))
    assert [line[1] for line in written["WNLI"][1:]] == ["1", "1", "0", "1", "0", "0", "0"]
    assert told[0].startswith("WNLI.tsv: no column idx or index")
    write_jsonl(data / "glue" / "wnli" / "test.jsonl", [{"sentence1": "a"}] * ROWS)
    with pytest.raises(ValueError, match="task 'wnli', .* no column 'sentence2'"):
        submit(make(["wnli"], data), tmp_path / "glue.zip", fill_missing=True)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize(
    ("index", "words"),
    [
        ([0, 1, 2, 2, 4, 5, 6], r"index 2 is that of two rows \(glue/wnli/test.jsonl, row 3; .*row 4\)"),
        ([1, 2, 3, 4, 5, 6, 7], r"from 0 to 6, got 7 \(glue/wnli/test.jsonl, row 7\)"),
        ([0, 1, None, 3, 4, 5, 6], r"from 0 to 6, got None \(.*row 3\)"),
        ([0, 1, -2, 3, 4, 5, 6], r"from 0 to 6, got -2 \(.*row 3\)"),
    ],
)
def test_an_index_that_cannot_be_is_named(data, answered, tmp_path, index, words):
    rows = [{"sentence1": f"premise {row}", "sentence2": "so", "idx": row} for row in index]
    write_jsonl(data / "glue" / "wnli" / "test.jsonl", rows)
    with pytest.raises(ValueError, match=words):
        submit(make(["wnli"], data), tmp_path / "glue.zip", fill_missing=True)
    assert not answered


@pytest.mark.usefixtures("few_rows")
def test_the_command_asks_the_heads(data, tmp_path, monkeypatch, capsys):
    """In batches that are smaller than a split, as in one."""
    engine, out = make(TASKS, tmp_path / "elsewhere"), tmp_path / "glue.zip"
    engine.save(tmp_path / "engine")
    monkeypatch.setattr(module, "AT_ONCE", 3)
    assert main(["submit", str(tmp_path / "engine"), "--data", str(data), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert told.endswith(f"{out}\n")
    assert "AX.tsv: 7 rows by task 'mnli'" in told
    written = tables(out)
    for name, classes in CLASSES.items():
        assert {line[1] for line in written[name][1:]} <= classes
    sst2 = engine.predict([f"sentence SST-2.tsv {row}" for row in range(ROWS)], ["sst2"])["sst2"]
    assert [line[1] for line in written["SST-2"][1:]] == [str(["negative", "positive"].index(name)) for name in sst2]
    first = out.read_bytes()
    monkeypatch.setattr(module, "AT_ONCE", 256)
    assert main(["submit", str(tmp_path / "engine"), "--data", str(data), "--out", str(out)]) == 0
    assert out.read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "engine", "glue.zip"]


@pytest.mark.usefixtures("few_rows")
def test_constants_stand_in_for_missing_tasks_only_where_asked_for(data, answered, tmp_path):
    engine, out, told = make(["sst2", "mnli"], data), tmp_path / "glue.zip", []
    with pytest.raises(
        ValueError, match="the run has no task cola, mrpc, stsb, qqp, qnli, rte, wnli, and .*--fill-missing"
    ):
        submit(engine, out)
    assert not out.exists()
    written = tables(submit(engine, out, fill_missing=True, tell=told.append))
    constants = {name: {line[1] for line in lines[1:]} for name, lines in written.items()}
    assert (constants["CoLA"], constants["STS-B"], constants["RTE"]) == ({"1"}, {"2.700"}, {"entailment"})
    assert constants["SST-2"] == {"0", "1"}
    assert "CoLA.tsv: 7 rows FILLED with 1: the run has no task 'cola'" in told
    assert sum("FILLED" in line for line in told) == 7
    with pytest.raises(ValueError, match="none of GLUE's tasks"):
        submit(make(["snli", "sentiment"], data), out, fill_missing=True)


def test_a_split_that_is_not_whole_is_refused(data, tmp_path):
    engine = make(["sst2"], data)
    with pytest.raises(ValueError, match=r"SST-2.tsv takes 1,821 rows, found 7 in glue/sst2/test.jsonl"):
        submit(engine, tmp_path / "glue.zip", fill_missing=True)
    (data / "glue" / "sst2" / "test.jsonl").unlink()
    with pytest.raises(ValueError, match=r"task 'sst2', validation split: no test-\*.parquet"):
        submit(engine, tmp_path / "glue.zip", fill_missing=True)
    assert not (tmp_path / "glue.zip").exists()


@pytest.mark.usefixtures("few_rows")
def test_a_task_of_that_name_must_be_that_task(data, answered, tmp_path):
    own = replace(BUILTIN["rte"], labels=("yes", "no"))
    with pytest.raises(ValueError, match="task 'rte' is not GLUE's: head, text and labels are"):
        submit(make([own], data), tmp_path / "glue.zip", fill_missing=True)
    swapped = Task("sst2", "classify", ("sentence",), "label", ("positive", "negative"))
    written = tables(submit(make([swapped], data), tmp_path / "glue.zip", fill_missing=True))
    assert [line[1] for line in written["SST-2"][1:]] == ["0", "1", "0", "1", "0", "1", "0"]


@pytest.mark.parametrize("test", TEST_SPLITS, ids=lambda test: test.file)
def test_constants_are_the_most_frequent_answers(test, shared_data):
    if test.task in ("qnli", "mnli"):
        pytest.skip("the data there is a small part of the training split, whose classes are of equal size")
    task = BUILTIN[test.task]
    labels = read_rows(task, "train", shared_data).columns["label"]
    if not test.written:
        assert float(test.placeholder) == pytest.approx(sum(labels) / len(labels), abs=0.01)
    else:
        assert test.placeholder == test.written[Counter(labels).most_common(1)[0][0]]
