"""`trunkline export` and `Engine.export`: what is written where, and what is said."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_export_hugging_face import BERT, KINDS, expected, logits_of

from answering import TRUNK, adapted_engine, answering_engine
from trunkline.engine.foreign.pretrained import WEIGHTS
from trunkline.training.cli import main


def test_a_folder_for_every_task_that_can_be_written(tmp_path, capsys):
    """Of the others it is said why not; where there are none at all it is an error."""
    answering_engine(BERT).save(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--to", "hugging-face", "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out.splitlines()
    assert sorted(Path(line).name for line in told[4:]) == ["gist", "parts", "where"]
    assert told[0].startswith("export: task 'polarity': the stock class has a pooler before its head")
    assert {folder.name for folder in (tmp_path / "out").iterdir()} == {"parts", "gist", "where"}
    with pytest.raises(ValueError, match="has this trunk's shape"):
        answering_engine(replace(TRUNK, exact_match=True)).export(tmp_path / "none", "hugging-face")
    assert not (tmp_path / "none").exists()


def test_a_task_with_its_adapter_merged(tmp_path):
    engine = adapted_engine()
    (folder,) = engine.export(tmp_path / "out", "hugging-face", ["parts"])
    text = ("One two three.",)
    with torch.no_grad():
        wanted = expected(engine, "parts", text)
    torch.testing.assert_close(logits_of(folder, KINDS["parts"], text), wanted, rtol=1e-4, atol=1e-4)


def test_adapters_of_the_tasks_that_are_named(tmp_path):
    written = adapted_engine().export(tmp_path / "out", "peft", ["parts", "polarity"])
    assert [path.name for path in written] == ["parts", "polarity"]
    assert all((path / "adapter_config.json").is_file() for path in written)


@pytest.mark.parametrize(
    ("adapted", "to", "tasks", "message"),
    [
        (False, "gguf", [], "'gguf' is no format; there are hugging-face, peft, onnx"),
        (False, "onnx", ["polarty"], "no task 'polarty'; there are polarity"),
        (False, "peft", [], "it has no adapters"),
        (True, "onnx", [], "use --to hugging-face"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_written(tmp_path, adapted, to, tasks, message):
    engine = adapted_engine() if adapted else answering_engine()
    with pytest.raises(ValueError, match=message):
        engine.export(tmp_path / "out", to, tasks)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path):
    engine = answering_engine()
    folder = engine.save(tmp_path / "run")
    before = (folder / WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match="is there and not empty: name another folder"):
        engine.export(folder, "hugging-face", ["parts"])
    assert (folder / WEIGHTS).read_bytes() == before
