"""Any table before `trunkline init`: a config that can be read, or an error in words; never more than that."""

import json
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st

from trunkline.training.cli import main
from trunkline.training.config_file import load_config
from trunkline.training.data.sources import read_rows
from trunkline.training.starting import length

NAMES = "text label labels id answers context question summary tags tokens score target class sentence1 x|y ünï".split()
SENTENCES = [f"the red cat sees {count} dogs" for count in range(60)]
cells = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 30), st.floats(), st.text(max_size=6), st.sampled_from("ab")
)
answers = st.fixed_dictionaries({"text": st.sampled_from(SENTENCES)})
cells = st.one_of(
    cells, st.lists(cells, max_size=3), answers, st.dictionaries(st.sampled_from("ab"), cells, max_size=2)
)
columns = st.one_of(
    st.just(SENTENCES),
    st.lists(cells, min_size=1, max_size=4).map(lambda few: [few[row % len(few)] for row in range(60)]),
    st.lists(cells, min_size=60, max_size=60),
)


@given(table=st.dictionaries(st.sampled_from(NAMES), columns, min_size=1, max_size=4), data=st.data())
def test_a_config_or_an_error_in_words(table, data, tmp_path_factory, capsys):
    folder = tmp_path_factory.getbasetemp() / "starting"
    folder.mkdir(exist_ok=True)
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    label = data.draw(st.sampled_from([None, *table]))
    flags = [] if label is None else ["--label", label]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(length, "seconds_per_step", lambda preset: 0.5)
        status = main(["init", str(folder / "own.jsonl"), "--out", str(folder / "own.yaml"), "--overwrite", *flags])
    said = capsys.readouterr()
    if status == 0:
        tasks = load_config(Path(folder / "own.yaml")).all_tasks
        assert label is None or tasks[0].label == label
        assert all(column in table for task in tasks for column in task.text)
        assert all(len(read_rows(task, "train", base=folder)) for task in tasks)
    else:
        assert status == 2
        assert said.err.startswith("trunkline: ")
        assert len(said.err) < 2000
