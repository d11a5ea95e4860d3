"""Which files, shards and rows a split is read from: local, laid out like the hub, from the hub, or held out."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from trunkline.engine.tasks.task import Task
from trunkline.training.data.sources import Rows, read_rows


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


# Which files


def test_where_names_the_shard_and_the_row_inside_it(tmp_path):
    for shard, texts in enumerate((["a0", "a1"], [], ["c0"], ["d0", "d1"])):
        (tmp_path / f"part-{shard}.parquet").write_bytes(
            parquet(text=pyarrow.array(texts, "string"), label=[0] * len(texts))
        )
    rows = read_rows(table_task("part-*.parquet"), "train", base=tmp_path)
    assert rows.columns["text"] == ["a0", "a1", "c0", "d0", "d1"]
    places = [("0", 1), ("0", 2), ("2", 1), ("3", 1), ("3", 2)]
    assert [rows.where(row) for row in range(5)] == [f"part-{shard}.parquet, row {row}" for shard, row in places]
    with pytest.raises(IndexError):
        rows.where(5)


def test_a_fault_names_its_own_shard(tmp_path):
    (tmp_path / "1.csv").write_bytes(b"text,label\na,1\nb,1\n")
    (tmp_path / "2.csv").write_bytes(b"text,label\nc,1\nd\n")
    assert "2.csv, row 2: " in error_of(read_rows, table_task("*.csv"), "train", base=tmp_path)


def test_files_are_relative_to_the_base_or_the_working_directory(tmp_path, monkeypatch):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.csv").write_text(f"text,label\n{folder},1\n")
    monkeypatch.chdir(tmp_path / "here")
    assert read_rows(table_task("a.csv"), "train").columns["text"] == ["here"]
    assert read_rows(table_task("a.csv"), "train", base=tmp_path / "there").columns["text"] == ["there"]
    rows = read_rows(table_task(str(tmp_path / "t*" / "*.csv")), "train", base=tmp_path / "here")
    assert rows.columns["text"] == ["there"]


def test_each_split_has_its_own_file(tmp_path):
    (tmp_path / "1.csv").write_bytes(b"text,label\ntrained,1\n")
    (tmp_path / "2.csv").write_bytes(b"text,label\nvalidated,1\n")
    task = table_task("1.csv", validation="2.csv")
    assert read_rows(task, "train", base=tmp_path).columns["text"] == ["trained"]
    assert read_rows(task, "validation", base=tmp_path).columns["text"] == ["validated"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("no.csv", "no.csv: No such file or directory; expected a .csv, .tsv, .jsonl, .json or .parquet file"),
        ("folder.csv", "folder.csv: Is a directory; expected a .csv, .tsv, .jsonl, .json or .parquet file"),
        ("no-*.csv", "no file matches "),
        ("a.xlsx", "or a hub dataset; 'a.xlsx' is a spreadsheet: save it as CSV (UTF-8), or pandas.read_excel"),
    ],
)
def test_nothing_to_read_says_where_and_what_would_do(tmp_path, source, words):
    (tmp_path / "folder.csv").mkdir()
    message = error_of(read_rows, table_task(source), "train", base=tmp_path)
    assert message.startswith("task 'toy', train split: ")
    assert words in message
    assert source in message
    if source.endswith(".csv"):
        assert str(tmp_path) in message


# A folder laid out like the hub


@pytest.mark.parametrize(
    "name",
    [
        "glue/sst2/train-00000-of-00001.parquet",
        "glue/train.parquet",
        "nyu-mll/glue/sst2/train.csv",
        "nyu-mll/glue/train.tsv",
        "sst2/train.jsonl",
        "train-00000-of-00001.parquet",
    ],
)
def test_layouts_of_a_local_folder(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(in_format(name))
    rows = read_rows(table_task(hub="nyu-mll/glue", subset="sst2"), "train", tmp_path)
    assert rows.columns == {"text": ["a"], "label": ["1"]}
    assert rows.where(0) == f"{name}, row 1"


def test_the_folder_of_the_subset_comes_first(tmp_path):
    (tmp_path / "glue" / "sst2").mkdir(parents=True)
    for folder in ("", "glue", "glue/sst2"):
        (tmp_path / folder / "train.csv").write_text(f"text,label\n{folder},1\n")
    task = table_task(hub="nyu-mll/glue", subset="sst2")
    assert read_rows(task, "train", tmp_path).columns["text"] == ["glue/sst2"]


def test_a_split_is_not_taken_for_one_with_a_longer_name(tmp_path):
    (tmp_path / "validation_matched-00000-of-00001.parquet").write_bytes(parquet(text=["matched"], label=[1]))
    (tmp_path / "validation-00000-of-00001.parquet").write_bytes(parquet(text=["plain"], label=[1]))
    for split, text in (("validation", "plain"), ("validation_matched", "matched")):
        rows = read_rows(table_task(hub="a/b", validation=split), "validation", tmp_path)
        assert rows.columns["text"] == [text]


def test_shards_of_a_folder_are_read_in_order(tmp_path):
    for shard in (3, 1, 4, 0, 2):
        (tmp_path / f"train-0000{shard}-of-00005.parquet").write_bytes(parquet(text=[str(shard)], label=[1]))
    rows = read_rows(table_task(hub="a/b"), "train", tmp_path)
    assert rows.columns["text"] == ["0", "1", "2", "3", "4"]
    assert rows.where(3) == "train-00003-of-00005.parquet, row 1"


def test_a_missing_shard_is_found(tmp_path):
    for shard in (0, 2):
        (tmp_path / f"train-0000{shard}-of-00003.parquet").write_bytes(parquet(text=["a"], label=[1]))
    message = error_of(read_rows, table_task(hub="a/b"), "train", tmp_path)
    assert "train-00000-of-00003.parquet is one of 3 files, found 2" in message


def test_an_absent_data_set_names_the_folders_tried(tmp_path):
    message = error_of(read_rows, table_task(hub="nyu-mll/glue", subset="sst2"), "train", tmp_path)
    assert (
        "task 'toy', train split: no train-*.parquet, nor train as a .csv, .tsv, .jsonl, .json or .parquet file"
        in message
    )
    for folder in ("glue/sst2", "nyu-mll/glue/sst2", "sst2"):
        assert f"{tmp_path / folder}," in message


# The hub


def test_hub_that_cannot_be_reached_says_which_folder_would_serve():
    pytest.importorskip("datasets")
    program = (
        "from trunkline.training.data.sources import read_rows; from trunkline.engine.tasks.task import Task;"
        "read_rows(Task('toy', 'regress', ('text',), 'label', hub='nyu-mll/glue', subset='sst2'), 'train')"
    )
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(sys.path)}
    process = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    message = process.stderr.splitlines()[-1]
    assert message.startswith("ValueError: task 'toy', train split: cannot load nyu-mll/glue sst2 train from the hub")
    assert "Couldn't reach" in message
    assert "data=DIR with DIR/glue/sst2/train-*.parquet" in message


@pytest.mark.parametrize("file", ["train.csv", "train.jsonl", "train.parquet"])
def test_a_hub_data_set_that_does_not_build_is_an_error_with_its_cause(file, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / file).write_text("text,label\na,1\nb,2,3,4\n")
    task = table_task(hub=str(tmp_path / "broken"))
    message = error_of(read_rows, task, "train")
    assert message.startswith(f"task 'toy', train split: cannot load {tmp_path}/broken train from the hub")
    assert "\n" not in message
    assert "data=DIR" in message


def test_hub_without_its_package_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = error_of(read_rows, table_task(hub="knkarthick/samsum"), "validation")
    assert "trunkline[hub]" in message
    assert "data=DIR with DIR/samsum/validation-*.parquet" in message


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A data set of two subsets, as the hub has it."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    configurations = []
    for subset in ("one", "two"):
        (tmp_path / "hub" / subset).mkdir(parents=True)
        (tmp_path / "hub" / subset / "train.parquet").write_bytes(
            parquet(label=[1, -1], text=[subset, f"{subset} more"])
        )
        configurations.append({"config_name": subset, "data_files": [{"split": "train", "path": f"{subset}/train*"}]})
    (tmp_path / "hub" / "README.md").write_text(f"---\nconfigs: {json.dumps(configurations)}\n---\n")
    return tmp_path / "hub"


def test_hub_rows(hub):
    rows = read_rows(table_task(hub=str(hub), subset="two"), "train")
    assert rows.columns == {"text": ["two", "two more"], "label": [1, -1]}
    assert rows.where(1) == f"{hub} two train, row 2"
    assert rows.digest == read_rows(table_task(hub=str(hub), subset="two"), "train").digest
    assert rows.digest != read_rows(table_task(hub=str(hub), subset="one"), "train").digest


def test_hub_faults_name_the_task(hub):
    assert "task 'toy', validation split: Unknown split" in error_of(
        read_rows, table_task(hub=str(hub), subset="one"), "validation"
    )
    task = Task("toy", "regress", ("sentence",), "label", hub=str(hub), subset="one")
    assert "one train has no column 'sentence': wanted ['sentence', 'label'], found ['label', 'text']" in error_of(
        read_rows, task, "train"
    )


# A part of the training rows


def halves(folder: Path, rows: list[str], fraction: float) -> tuple[Rows, Rows]:
    (folder / "a.csv").write_text("text,label\n" + "".join(f"{row}\n" for row in rows))
    task = table_task("a.csv", validation=fraction)
    return read_rows(task, "train", base=folder), read_rows(task, "validation", base=folder)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
def test_a_fraction_is_held_out_and_no_text_is_on_both_sides(fraction, tmp_path):
    rows = [f"text {i % 150},{i % 2}" for i in range(200)] + ["TEXT  7 ,0"]
    train, validation = halves(tmp_path, rows, fraction)
    assert len(train) + len(validation) == 201
    assert fraction * 201 <= len(validation) <= fraction * 201 + 3
    same = [{" ".join(text.split()).casefold() for text in part.columns["text"]} for part in (train, validation)]
    assert not same[0] & same[1]
    for part in (train, validation):
        for i in range(0, len(part), 7):
            row = int(part.where(i).removeprefix("a.csv, row "))
            assert rows[row - 1] == f"{part.columns['text'][i]},{part.columns['label'][i]}"


def test_the_same_texts_are_held_out_whatever_the_order(tmp_path):
    rows = [f"text {i},1" for i in range(100)]
    train, validation = halves(tmp_path, rows, 0.2)
    _, again = halves(tmp_path, rows[::-1], 0.2)
    assert sorted(again.columns["text"]) == sorted(validation.columns["text"])
    assert len({validation.digest, again.digest, train.digest}) == 3


def test_rows_without_text_take_no_room_among_those_held_out(tmp_path):
    rows = [f"text {i},1" for i in range(100)] + [" ,1"] * 100
    train, validation = halves(tmp_path, rows, 0.1)
    assert len(validation) == 10
    assert all(text.strip() for text in validation.columns["text"])
    assert len(train) == 190


def test_one_text_cannot_be_parted(tmp_path):
    with pytest.raises(ValueError, match="task 'toy', validation split: 2 rows have too few different texts for"):
        halves(tmp_path, ["same,1", "Same,0"], 0.5)


def test_a_missing_validation_split_offers_a_part(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,1\n")
    message = error_of(read_rows, table_task("a.csv"), "validation", base=tmp_path)
    assert message.endswith("got 'validation'; `validation: 0.1` holds out a tenth of the training rows")
    for wrong in (0.0, 1.0, -0.1, 2):
        with pytest.raises(ValueError, match="task 'toy': validation must be a file, a split, or a fraction below 1"):
            table_task("a.csv", validation=wrong)
    assert table_task("a.csv", validation="0.25").validation == 0.25
