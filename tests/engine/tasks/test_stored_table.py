"""Tables from Python: every kind is read as a file with the same rows is, and a run finds it again."""

from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from trunkline import Engine, Task
from trunkline.engine.config import config_from
from trunkline.training.config_file import load_config, save_config
from trunkline.training.data.sources import read_rows

COLUMNS = {"text": ["some words", "others", "", "ünï 日本"], "label": ["no", "yes", None, "no"], "n": [1, 2, 3, 4]}
RECORDS = [dict(zip(COLUMNS, row, strict=True)) for row in zip(*COLUMNS.values(), strict=True)]


def pandas_frame():
    return pytest.importorskip("pandas").DataFrame(COLUMNS, index=[7, 5, 3, 1])


def categories():
    frame = pandas_frame()
    return frame.assign(label=frame["label"].astype("category"))


def dataset():
    return pytest.importorskip("datasets").Dataset.from_dict(COLUMNS)


def selection():
    """Four rows of five, in another order than the dataset has them."""
    backwards = {name: [*values[::-1], values[0]] for name, values in COLUMNS.items()}
    return pytest.importorskip("datasets").Dataset.from_dict(backwards).select([3, 2, 1, 0])


TABLES = {
    "pandas": pandas_frame,
    "categories": categories,
    "dataset": dataset,
    "selection": selection,
    "pyarrow": lambda: pyarrow.table(COLUMNS),
    "columns": lambda: COLUMNS,
    "rows": lambda: RECORDS,
}


def task(train, **fields) -> Task:
    return Task("toy", "classify", ("text",), "label", ("no", "yes"), train=train, **fields)


@pytest.mark.parametrize("kind", TABLES)
def test_the_rows_are_those_of_the_table(kind):
    own = task(TABLES[kind](), validation=TABLES[kind]())
    assert Path(own.train).suffix == ".parquet"
    assert own.validation == own.train
    for split in ("train", "validation"):
        assert read_rows(own, split).columns == {name: COLUMNS[name] for name in ("text", "label")}
    assert pyarrow.parquet.read_schema(own.train).names == [*COLUMNS]


def test_the_same_table_is_the_same_file_and_another_is_another():
    assert task(pandas_frame()).train == task(pandas_frame()).train
    assert task(COLUMNS).train == task(RECORDS).train
    assert task({**COLUMNS, "n": [1, 2, 3, 5]}).train != task(COLUMNS).train


def test_a_config_with_a_table_is_saved_and_read_back(tmp_path):
    config = config_from({"tasks": [task(pandas_frame(), validation=0.5)], "trunk": "tiny"})
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml").all_tasks == config.all_tasks


def test_an_engine_learns_from_a_frame(tmp_path, one_thread, capsys):
    frame = pytest.importorskip("pandas").DataFrame(
        {"text": [f"{word} {i}" for i in range(40) for word in ("up", "down")], "label": ["yes", "no"] * 40}
    )
    trunk = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_positions": 64}
    engine = Engine(trunk, [task(frame, validation=0.2)], vocab_size=300, steps=4, batch={"tokens": 128}, device="cpu")
    engine.fit(run=str(tmp_path / "run"))
    assert engine.predict(["up 1"])["toy"][0] in ("no", "yes")
    assert Engine.load(tmp_path / "run").evaluate()["toy"]["accuracy"] >= 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (5, "must be a file, a split or a table"),
        (["a.csv", "b.csv"], "got list"),
        ([], "got list"),
        ({"text": ["a", 1]}, "mixes values of several kinds"),
        ({"text": ["a", "b"], "label": [1]}, "label"),
    ],
)
def test_what_is_no_table_is_refused(given, said):
    with pytest.raises(ValueError, match="task 'toy': train") as caught:
        task(given)
    assert said in str(caught.value)


def test_a_frame_with_mixed_values_names_the_column():
    frame = pytest.importorskip("pandas").DataFrame({"text": ["a", "b"], "label": ["a", 1]})
    with pytest.raises(ValueError, match="task 'toy': train: a column mixes values of several kinds.*label"):
        task(frame)


def test_of_several_splits_one_is_to_be_given():
    both = pytest.importorskip("datasets").DatasetDict({"train": dataset(), "test": dataset()})
    with pytest.raises(ValueError, match="these are several splits, train, test: give one of them"):
        task(both)


def test_a_stream_is_refused():
    with pytest.raises(ValueError, match="a streamed dataset has no order to be repeated"):
        task(dataset().to_iterable_dataset())


def test_a_fault_names_the_table_and_not_where_it_is_kept():
    given = task({"text": ["a", "b"], "label": ["no", None]})
    rows = read_rows(given, "train")
    assert rows.where(1) == "the table given from Python, row 2"
    message = "train split: the table given from Python has no column 'words': wanted"
    with pytest.raises(ValueError, match=message) as error:
        read_rows(replace(given, text=("words",)), "train")
    assert ".parquet" not in str(error.value)
