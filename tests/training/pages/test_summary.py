"""summary.json and samples.json say what a reader needs to judge a run."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from conftest import Finished, tiny_rows, write_jsonl
from trunkline import Engine, Task, TrunkConfig
from trunkline.engine.settings import Batch, Evaluation
from trunkline.training.environment import command, environment
from trunkline.training.pages.summary import peak_memory

TASKS = {
    "colour": ("classify", "accuracy"),
    "closeness": ("regress", "pearson"),
    "parts": ("tag", "tag_accuracy"),
    "where": ("span", "span_exact"),
    "retell": ("generate", "rouge1"),
    "prose": ("language-model", "perplexity"),
}


@pytest.fixture(scope="module")
def summary(finished: Finished) -> dict:
    return json.loads((finished.run / "summary.json").read_text())


def test_numbers_of_the_run(summary, finished):
    assert summary["name"] == "farm"
    assert summary["command"].endswith(f"train {finished.config} run={finished.run}")
    assert summary["device"] == "cpu"
    assert summary["steps"] == 24
    assert summary["tokens"] == 24 * 2 * 512  # two batches a step
    assert summary["padding_waste"] == pytest.approx(1 - summary["real_tokens"] / summary["tokens"])
    assert summary["tokens_per_second"] == pytest.approx(summary["real_tokens"] / summary["training_seconds"])
    assert 0 < summary["training_seconds"] < summary["wall_time_seconds"]
    assert 0 < summary["best_step"] <= 24
    model = Engine.load(finished.run, device="cpu").model
    assert summary["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_numbers_are_those_of_the_log(summary, finished):
    events = [json.loads(line) for line in (finished.run / "metrics.jsonl").read_text().splitlines()]
    first, last = events[0], [event for event in events if event["event"] == "step"][-1]
    seen = Counter()
    for event in events:
        seen.update(event.get("examples", {}))
    assert (summary["real_tokens"], summary["training_seconds"]) == (last["real_tokens"], last["seconds"])
    for name, task in summary["tasks"].items():
        assert task["first_loss"] == first["metrics"][name]["loss"]
        assert task["examples_seen"] == seen[name] > 0


def test_every_task_has_scores_and_a_baseline(summary):
    tasks = summary["tasks"]
    assert {name: (task["head"], task["metric"]) for name, task in tasks.items()} == TASKS
    for name, task in tasks.items():
        assert list(task["metrics"])[:2] == ["loss", task["metric"]], name
        assert task["last_loss"] == task["metrics"]["loss"]
        assert (task["train_examples"], task["validation_examples"]) == (60, 20)
        assert task["dropped"] == {"empty": 0, "too_long": 0, "unlabelled": 0}
        assert task["truncated"] == 0
    assert tasks["prose"]["baseline"] is None
    names = {name: task["baseline"]["name"] for name, task in tasks.items() if task["baseline"]}
    assert names == {
        "colour": "majority class",
        "closeness": "mean of the training labels",
        "parts": "majority class",
        "where": "most frequent training span",
        "retell": "first sentence of the document",
    }
    train, validation = ([row["text"].split()[1] for row in tiny_rows("colour", n, s)] for n, s in ((60, 0), (20, 1)))
    majority = Counter(train).most_common(1)[0][0]
    assert tasks["colour"]["baseline"]["metrics"] == {"accuracy": validation.count(majority) / 20}


def test_samples_are_in_words(finished):
    samples = json.loads((finished.run / "samples.json").read_text())
    assert set(samples) == set(TASKS) - {"prose"}
    for sample in samples["colour"]:
        assert sample["reference"] == sample["input"].split()[1]
        assert sample["prediction"] in ("red", "black", "white", "brown")
    for sample in samples["closeness"]:
        first, second = (text.split() for text in sample["input"].split(" | "))
        # 'is in' is one word there and always the same
        same = sum(a == b for a, b in zip(first, second, strict=True)) - 1
        assert sample["reference"] == f"{same / 2:.2f}"
        assert f"{float(sample['prediction']):.2f}" == sample["prediction"]
    for sample in samples["parts"]:
        assert sample["reference"] == "article adjective noun verb verb article noun"
        assert len(sample["prediction"].split()) == 7
    for sample in samples["where"]:
        assert sample["reference"] == sample["input"].split()[-2]
    for sample in samples["retell"]:
        animal, _, place = sample["reference"].partition(" : ")
        assert sample["input"].split()[2] == animal
        assert sample["input"].split()[-1] == place
    assert len({sample["input"] for sample in samples["colour"]}) == len(samples["colour"]) == 6
    engine = Engine.load(finished.run, device="cpu")
    for task in samples:
        inputs = [tuple(sample["input"].split(" | ")) for sample in samples[task]]
        predictions = [sample["prediction"] for sample in samples[task]]
        match TASKS[task][0]:
            case "regress":
                answers = engine.predict(inputs, [task])[task]
                assert [*map(float, predictions)] == pytest.approx(answers, abs=0.006)
            case "generate":
                assert predictions == engine.generate([text for (text,) in inputs], task)
            case "tag":
                assert predictions == [" ".join(tags) for tags in engine.predict(inputs, [task])[task]]
            case _:
                assert predictions == engine.predict(inputs, [task])[task]


def test_rows_that_were_left_out_are_counted(tmp_path, one_thread):
    rows = tiny_rows("colour", 20, seed=0)
    left_out = [{"text": " ", "label": "red"}] * 2 + [{"text": "the red cat", "label": None}] * 3
    write_jsonl(tmp_path / "some.jsonl", rows + left_out + [{"text": "the red cat " * 90, "label": "red"}])
    write_jsonl(tmp_path / "all.jsonl", [*rows, left_out[0], {"text": "the red cat " * 90, "label": "red"}])
    labels, files = ("red", "black", "white", "brown"), {"train": "some.jsonl", "validation": "all.jsonl"}
    engine = Engine(
        TrunkConfig(hidden_size=32, num_layers=1, num_heads=2, max_positions=64),
        [Task("colour", "classify", ("text",), "label", labels, unlabelled="drop", **files)],
        vocab_size=400,
        steps=1,
        batch=Batch(tokens=256, max_length=64),
        evaluation=Evaluation(examples=4),
        run=str(tmp_path / "run"),
        base=str(tmp_path),
    )
    task = engine.fit()["tasks"]["colour"]
    assert (task["train_examples"], task["validation_examples"]) == (21, 21)
    assert task["dropped"] == {"empty": 2, "too_long": 0, "unlabelled": 3}
    assert task["truncated"] == 1
    assert task["validation_dropped"] == {"empty": 1, "too_long": 0, "unlabelled": 0}
    assert task["validation_truncated"] == 1
    page = (tmp_path / "run" / "report.html").read_text()
    for words in ("2 empty<", "3 unlabelled<", "1 empty of validation<", "1 of validation<"):
        assert words in page


def test_environment_names_versions_and_processor(summary):
    where = environment()
    assert where["torch"] == torch.__version__
    assert where["threads"] == torch.get_num_threads()
    assert where["processor"]
    assert where["cores"] >= 1
    assert summary["environment"].keys() == where.keys()
    assert summary["environment"]["threads"] == 1


def test_peak_memory_is_in_bytes():
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("Linux only")
    held = torch.ones(2**24)
    peaks = [line.split() for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    assert peak_memory(torch.device("cpu")) == pytest.approx(int(peaks[0][1]) * 1024, rel=0.02), len(held)


@pytest.mark.parametrize("program", ["/somewhere/bin/trunkline", "/somewhere/training/cli.py"])
def test_command_of_a_run_can_be_given_again(monkeypatch, program):
    monkeypatch.setattr("sys.argv", [program, "train", "demo.yaml", "mixing.shares={sst2: 1}"])
    assert command() == "trunkline train demo.yaml 'mixing.shares={sst2: 1}'"
