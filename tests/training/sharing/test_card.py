"""The model card says what summary.json and config.yaml hold, in Markdown that the hub reads."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from trunkline.training.cli import main
from trunkline.training.sharing.card import card


def parts(text: str) -> tuple[dict, str]:
    """Front matter and Markdown."""
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_front_matter_is_what_the_hub_reads(finished):
    front, _ = parts(card(finished.run, "user/farm", "apache-2.0"))
    assert (front["library_name"], front["license"]) == ("trunkline", "apache-2.0")
    assert front["tags"] == ["trunkline", "multi-task"]
    assert "base_model" not in front
    summary = json.loads((finished.run / "summary.json").read_text())
    (index,) = front["model-index"]
    assert [result["task"]["name"] for result in index["results"]] == list(summary["tasks"])
    for result in index["results"]:
        metrics = summary["tasks"][result["task"]["name"]]["metrics"]
        assert {metric["type"]: metric["value"] for metric in result["metrics"]}.items() <= metrics.items()
    eval_results = pytest.importorskip("huggingface_hub").ModelCard(card(finished.run)).data.eval_results
    assert len(eval_results) >= len(summary["tasks"])


def test_every_task_has_a_row_with_its_score(finished):
    _, body = parts(card(finished.run))
    rows = {line.split("|")[1].strip(): line for line in body.splitlines() if line.startswith("| ")}
    summary = json.loads((finished.run / "summary.json").read_text())
    for name, about in summary["tasks"].items():
        assert f"| {about['metrics'][about['metric']]:.3f} |" in rows[name]
        assert f"| {about['train_examples']:,} | {about['validation_examples']:,} |" in rows[name]
    assert "classify: red, black, white, brown" in rows["colour"]
    assert all(line.count("|") == rows["task"].count("|") for line in rows.values())


def test_the_code_that_it_shows_runs(finished, one_thread, monkeypatch):
    monkeypatch.chdir(finished.run.parent)
    (code,) = re.findall(r"```python\n(.*?)```", card(Path(finished.run.name)), re.DOTALL)
    exec(code, {})
    assert 'engine.predict([("first ...", "second ...")], tasks=["closeness"])' in code
    assert 'engine.generate(["document ..."], task="retell")' in code


def test_what_is_no_better_than_nothing_is_said(finished, tmp_path):
    shutil.copytree(finished.run, tmp_path / "run")
    summary = json.loads((finished.run / "summary.json").read_text())
    task = summary["tasks"]["colour"]
    task["metrics"]["accuracy"] = task["baseline"]["metrics"]["accuracy"]
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    assert "colour is no better than majority class" in card(tmp_path / "run")
    assert "colour is scored on 20 rows only" in card(tmp_path / "run")


def test_the_command_prints_it(finished, capsys):
    assert main(["card", str(finished.run)]) == 0
    assert capsys.readouterr().out == card(finished.run)


def test_what_is_no_finished_run_is_refused(finished, tmp_path, capsys):
    assert main(["card", str(tmp_path)]) == 2
    assert "is no folder of a run: it has no config.yaml" in capsys.readouterr().err
    shutil.copytree(finished.run, tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text("{")
    assert main(["card", str(tmp_path / "run")]) == 2
    assert "is damaged" in capsys.readouterr().err
    (tmp_path / "run" / "summary.json").unlink()
    assert main(["card", str(tmp_path / "run")]) == 2
    assert "is not finished" in capsys.readouterr().err
