"""What `save_to_disk` of Hugging Face datasets writes is read like a file, without that package."""

import json
import shutil
from pathlib import Path

import pyarrow
import pytest

from trunkline.engine.tasks.task import Task
from trunkline.training.cli import main
from trunkline.training.config_file import load_config
from trunkline.training.data.sources import read_rows

datasets = pytest.importorskip("datasets")
ROWS = 60


def dataset(rows: int = ROWS):
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    columns = {"text": [f"some words {i}" for i in range(rows)], "label": [i % 2 for i in range(rows)]}
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    dataset().save_to_disk(folder / "one", num_shards=2)
    datasets.DatasetDict({"train": dataset(), "validation": dataset(30)}).save_to_disk(folder / "both")
    return folder


def task(train: str, **fields) -> Task:
    return Task("toy", "classify", ("text",), "label", ("no", "yes"), train=train, **fields)


def error_of(*arguments, **options) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers check the words)
        read_rows(*arguments, **options)
    return str(caught.value)


def test_rows_come_in_order_from_all_its_files(saved):
    assert len(list((saved / "one").glob("*.arrow"))) == 2
    rows = read_rows(task("one"), "train", base=saved)
    assert rows.columns["text"] == [f"some words {i}" for i in range(ROWS)]
    assert rows.columns["label"] == [0, 1] * (ROWS // 2)
    assert rows.where(41) == "one, row 42"


def test_a_selection_is_saved_and_read_as_it_is(tmp_path):
    dataset().select([5, 3]).save_to_disk(tmp_path / "some")
    assert read_rows(task("some"), "train", base=tmp_path).columns["text"] == ["some words 5", "some words 3"]


def test_a_part_can_be_held_out(saved):
    sides = [read_rows(task("one", validation=0.2), split, base=saved) for split in ("train", "validation")]
    assert [len(side) for side in sides] == [48, 12]


def test_another_content_has_another_digest(saved, tmp_path):
    shutil.copytree(saved / "one", tmp_path / "one")
    same = read_rows(task("one"), "train", base=tmp_path).digest
    assert same == read_rows(task("one"), "train", base=saved).digest
    shutil.rmtree(tmp_path / "one")
    dataset(59).save_to_disk(tmp_path / "one", num_shards=2)
    assert read_rows(task("one"), "train", base=tmp_path).digest != same


def test_of_several_splits_one_is_to_be_named(saved):
    assert "both is a folder of several splits: name one of them, as both/train" in error_of(
        task("both"), "train", base=saved
    )
    fields = {"validation": "both/validation"}
    assert len(read_rows(task("both/train", **fields), "validation", base=saved)) == 30


def test_what_is_damaged_is_named(saved, tmp_path):
    shutil.copytree(saved / "one", tmp_path / "one")
    (tmp_path / "one" / "data-00001-of-00002.arrow").write_bytes(b"nothing")
    assert "data-00001-of-00002.arrow is missing or damaged" in error_of(task("one"), "train", base=tmp_path)
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    assert "cannot read" in error_of(task("one"), "train", base=tmp_path)
    (tmp_path / "one" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../../secret"}]}))
    assert "names no files of the folder it is in" in error_of(task("one"), "train", base=tmp_path)
    (tmp_path / "one" / "state.json").write_text("{")
    assert "state.json is missing or damaged" in error_of(task("one"), "train", base=tmp_path)
    with pytest.raises(ValueError, match="expected a .* file, a folder of save_to_disk"):
        read_rows(task("other"), "train", base=tmp_path)


def test_init_takes_its_splits_and_the_names_of_its_classes(saved, tmp_path, capsys):
    assert main(["init", str(saved / "both"), "--out", str(tmp_path / "own.yaml"), "--steps", "5"]) == 0
    (own,) = load_config(tmp_path / "own.yaml").all_tasks
    assert (own.name, own.labels, own.head) == ("both", ("no", "yes"), "classify")
    assert own.validation.endswith("both/validation")
    assert "classes: no 50%, yes 50%" in capsys.readouterr().out


def test_the_files_are_those_of_pyarrow(saved):
    """So that no other reader is needed: a stream of record batches."""
    with pyarrow.memory_map(str(saved / "one" / "data-00000-of-00002.arrow")) as file:
        assert pyarrow.ipc.open_stream(file).read_all().num_rows == ROWS // 2
