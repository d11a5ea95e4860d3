"""The embedded tasks: their definitions agree with the real data, and all of its rows are read."""

import csv
import json
import re
import subprocess
import sys

import pyarrow.parquet
import pytest

from trunkline.engine.tasks.builtin import BUILTIN, GENERATED, get_task
from trunkline.engine.tasks.task import Task
from trunkline.training.data import generated
from trunkline.training.data.sources import read_rows
from trunkline.training.scoring.metrics import metric_names

GLUE = ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]


def test_listing_order():
    others = ["snli", "dialogsum", "scitldr", "cnn_dailymail", "xsum", "samsum", "text"]
    assert list(BUILTIN) == [*GLUE, *others, "sentiment", "paraphrase", "similarity", "dialogue"]
    assert all(name == task.name for name, task in BUILTIN.items())


@pytest.mark.parametrize("name", BUILTIN)
def test_metrics_suit_the_head(name):
    assert metric_names(BUILTIN[name])


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("name", [*GLUE, "dialogsum", "scitldr"])
def test_all_rows_of_the_real_data_are_read(shared_data, name, split):
    task = get_task(name)
    with open(shared_data / "MANIFEST.tsv", newline="") as file:
        counts = {line["file"]: int(line["rows"]) for line in csv.DictReader(file, delimiter="\t")}
    folder = f"glue/{name}" if name in GLUE else name
    source = f"{folder}/{getattr(task, split)}-00000-of-00001.parquet"
    rows = read_rows(task, split, shared_data)
    assert len(rows) == counts[source]
    assert rows.where(len(rows) - 1) == f"{source}, row {counts[source]}"
    assert list(rows.columns) == [*task.text, task.label]
    assert {len(values) for values in rows.columns.values()} == {len(rows)}
    for column in task.text:
        assert all(isinstance(text, str) for text in rows.columns[column])
    labels = set(rows.columns[task.label])
    if task.head == "classify":
        assert labels == set(range(len(task.labels)))
    elif task.head == "regress":
        assert (min(labels), max(labels)) == (0.0, 5.0)
    else:
        assert all(isinstance(text, str) for text in labels)


@pytest.mark.parametrize("name", GLUE)
def test_columns_and_class_names_are_those_of_the_hub(shared_data, name):
    schema = pyarrow.parquet.read_schema(shared_data / "glue" / name / "train-00000-of-00001.parquet")
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert list(BUILTIN[name].text) == [column for column in features if features[column].get("dtype") == "string"]
    assert list(BUILTIN[name].labels) == features["label"].get("names", [])


def test_language_modelling_on_any_folder_with_texts(shared_data):
    rows = read_rows(get_task("text"), "validation", shared_data / "books")
    assert len(rows) == 12


@pytest.mark.parametrize("task", GENERATED, ids=lambda task: task.name)
def test_generated_rows_follow_the_split_and_the_seed(task):
    assert get_task(task.name) is task
    rows = read_rows(task, "validation", seed=1)
    records = generated.generate(task.name, "validation", generated.SIZES["validation"], seed=1)
    assert rows.columns == {column: [record[column] for record in records] for column in (*task.text, task.label)}
    assert rows.where(4) == f"generated validation rows of {task.name}, row 5"
    assert read_rows(task, "validation", seed=1).digest == rows.digest
    assert read_rows(task, "validation", seed=2).digest != rows.digest


def test_generated_task_needs_a_generator():
    with pytest.raises(ValueError, match="task 'toy', train split: generated task must be one of sentiment"):
        read_rows(Task("toy", "regress", ("a",), "b", generated=True), "train")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("sst-2", "sst2"), ("cnn-dailymail", "cnn_dailymail"), ("Dialogue", "dialogue"), ("?", "\\w+")],
)
def test_unknown_task_names_the_nearest(name, nearest):
    with pytest.raises(
        ValueError, match=f"unknown task '{re.escape(name)}'; did you mean '{nearest}'\\? Known: cola, sst2, "
    ):
        get_task(name)


def test_listing_the_tasks_loads_nothing_heavy():
    program = "import sys; import trunkline.engine.tasks.builtin; print(*sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": ":".join(sys.path)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert not {"torch", "numpy", "pyarrow", "datasets"} & set(process.stdout.split())
