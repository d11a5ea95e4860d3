"""Measurements as JSON, and what README says of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trunkline.benchmarks import record
from trunkline.benchmarks.learning import balancing_methods, recipes
from trunkline.benchmarks.microbenchmarks.peers import Unavailable
from trunkline.benchmarks.systems import scaling, step


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """A folder of results with one device, on which one shape of one kernel was measured."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    where = {**record.environment(), "gpu": "NVIDIA H200"}
    monkeypatch.setattr(record, "environment", lambda: where)
    record.record_kernels({("task_gram", "some shape", "forward"): timed(0.002)}, "pytest benchmarks")
    return tmp_path


def timed(seconds: float) -> dict[str, Any]:
    """One case, as `record_kernels` takes it."""
    return {
        "dtype": "bfloat16",
        "sizes": {"lengths": [48, 48, 768], "heads": 12},
        "work": {"bytes": 1e6, "operations": 4e9, "exponentials": 0.0},
        "floor": 0.001,
        "systems": {
            "trunkline": [seconds, 2 * seconds, seconds],
            "slow": [0.006, 0.006],
            "absent": Unavailable("not installed"),
        },
    }


def test_a_part_measured_again_leaves_the_other_results(results, monkeypatch):
    def recorded() -> dict[str, tuple[float, str]]:
        content = json.loads((results / "nvidia-h200" / "task_gram.json").read_text())
        return {case["shape"]: (case["systems"]["trunkline"]["median"], case["command"]) for case in content["cases"]}

    record.record_kernels({("task_gram", "other shape", "forward"): timed(0.003)}, "pytest -k other")
    assert recorded() == {"some shape": (0.002, "pytest benchmarks"), "other shape": (0.003, "pytest -k other")}
    record.record_kernels({("task_gram", "some shape", "forward"): timed(0.001)}, "pytest -k some")
    assert recorded() == {"some shape": (0.001, "pytest -k some"), "other shape": (0.003, "pytest -k other")}
    upgraded = {**record.environment(), "torch": "99.0"}
    monkeypatch.setattr(record, "environment", lambda: upgraded)
    record.record_kernels({("task_gram", "other shape", "forward"): timed(0.002)}, "pytest")
    assert recorded() == {"other shape": (0.002, "pytest")}


def test_results_are_kept_by_device(results):
    content = json.loads((results / "nvidia-h200" / "task_gram.json").read_text())
    (case,) = content["cases"]
    assert case["sizes"]["lengths"] == "2 x 48 + 1 x 768"
    assert case["systems"]["trunkline"] == {"median": 0.002, "rounds": [0.002, 0.004, 0.002]}
    assert case["systems"]["absent"] == {"missing": "Unavailable: not installed"}
    assert content["environment"]["torch"] == torch.__version__


def test_report_has_tables_and_plots(results):
    readme = results / "README.md"
    readme.write_text(f"before\n{record.BEGIN}\nold\n{record.END}\nafter\n")
    record.report(results, readme)
    table = (results / "nvidia-h200" / "README.md").read_text()
    assert "| shape | direction | trunkline | slow | absent | faster | of the floor | TFLOP/s |" in table
    assert "| some shape | forward | 2 | 6 | - | 3.00x | 50% | 2 |" in table
    for plot in ("task_gram.png", "task_gram-roofline.png"):
        assert plot in table
        assert (results / "nvidia-h200" / plot).read_bytes().startswith(b"\x89PNG")
    assert readme.read_text().startswith("before\n")
    assert "old" not in readme.read_text()


def test_readme_says_what_balancing_costs(results):
    ratios = {"fixed weights": 1.0, "weights from gradients": 1.0149, "a backward pass per task": 6.24}
    measured = {
        "command": "measure it",
        "threads": 1,
        "seconds": {"fixed weights": [0.5] * 7},
        "time_over_fixed": ratios,
    }
    record.record("balancing", measured, record.environment())
    text = " ".join(record.tables(results / "nvidia-h200").split())
    assert "takes 1.015x the time of one with fixed weights" in text
    assert "one backward pass per task it takes 6.2x (`measure it`, median of 7 turns)" in text


def test_readme_says_what_every_method_of_balancing_learns(results, monkeypatch):
    monkeypatch.setattr(balancing_methods, "environment", record.environment)

    def learnt(score: float) -> dict:
        tasks = {"dialogue": {"metrics": {"rouge1": score, "rougeL": 0.0}}}
        of_task = {"metric": {"dialogue": "rouge1"}, "baseline": {"dialogue": 0.28}}
        return {**of_task, "mean_score": score, "tasks": tasks, "seconds": 200.4}

    balancing_methods.keep("mgda", 450, learnt(0.25))
    balancing_methods.keep("fixed", 450, learnt(0.5))
    rows = ["| method | dialogue (rouge1) | mean | seconds |", "|---|---|---|---|"]
    rows += ["| trivial baseline | 0.280 | 0.280 | |"]
    rows += ["| fixed | 0.500 | 0.500 | 200 |", "| mgda | 0.250 | 0.250 | 200 |"]  # in the order of all methods
    assert "\n".join(rows) in record.tables(results / "nvidia-h200")
    balancing_methods.keep("fixed", 10, learnt(0.125))  # other steps: nothing to compare with
    text = record.tables(results / "nvidia-h200")
    assert "| fixed | 0.125 | 0.125 | 200 |" in text
    assert "mgda" not in text


def test_readme_says_what_losses_cost(results):
    ratios = {"loop over 9 tasks / task_loss": 2.56, "256 classes, loop over tasks / task_loss": 1.5}
    ratios |= {f"1000 tasks / 10 tasks, {size}": 1.284 for size in ("512 x 256", "512 x 768", "4096 x 768")}
    ratios |= {"eager / linear_cross_entropy": 2.05, "memory, linear_cross_entropy / eager": 0.12}
    record.record("losses", {"command": "measure it", "ratios": ratios}, record.environment())
    text = record.tables(results / "nvidia-h200")
    found = [line.split("|")[-2].strip() for line in text.splitlines() if line.endswith("x |")]
    assert found == ["2.56x", "1.50x", "1.28x", "1.28x", "1.28x", "2.05x", "0.12x"]


def test_readme_says_how_fast_linear_layers_are(results):
    rates = {"640 x 384 x 1,536": {"MKL": 100.0, "oneDNN": 235.0}}
    record.record("products", {"command": "measure it", "rates": rates}, record.environment())
    assert "| 640 x 384 x 1,536 | 100 | 235 | 2.35x |" in record.tables(results / "nvidia-h200")


def test_readme_says_what_whole_runs_learn(results, tmp_path):
    for seed, score in ((0, 0.75), (1, 0.85)):
        tasks = {"mrpc": {"metrics": {"loss": 0.5, "accuracy": score, "f1": 0.9}, "validation_examples": 408}}
        summary = {"command": "trunkline train configs/finetune.yaml seed=1", "steps": 40, "real_tokens": 25000}
        summary |= {
            "environment": record.environment(),
            "tasks": tasks,
            "training_seconds": 60 + 60 * seed,
            "peak_memory_bytes": 1,
        }
        run = tmp_path / str(seed)
        run.mkdir()
        (run / "summary.json").write_text(json.dumps(summary))
        (run / "config.yaml").write_text(f"seed: {seed}\nevaluation: {{last_examples: {100 * seed}}}\n")
        recipes.keep(run)
    text = record.tables(results / "nvidia-h200")
    assert "`finetune.yaml`" in text
    assert "40 steps, 25 thousand tokens.\nMean ± standard deviation over 2 seed(s)." in text
    assert "| mrpc | accuracy | 0.800 ± 0.071 | 100 to 408 |" in text
    assert "| mrpc | f1 | 0.900 ± 0.000 | 100 to 408 |" in text


def test_readme_says_what_helps(results):
    metrics = {"sst2": "accuracy", "qqp": "f1"}

    def trained(*scores: tuple[float, float]) -> dict:
        return {
            str(seed): {"scores": dict(zip(metrics, of, strict=True)), "metrics": metrics}
            for seed, of in enumerate(scores)
        }

    changes = {"as it is": trained((0.5, 0.75), (0.7, 0.75)), "a projection per task": trained((0.625, 0.5))}
    record.record(
        "what_helps",
        {"command": "measure it", "changes": changes},
        record.environment(),
    )
    text = record.tables(results / "nvidia-h200")
    assert "| change | sst2 (accuracy) | qqp (f1) | seeds |" in text
    assert "| as it is | 0.600 ± 0.141 | 0.750 ± 0.000 | 2 |" in text
    assert "| a projection per task | 0.625 | 0.500 | 1 |" in text


def test_readme_says_the_pace_of_fine_tuning(results):
    pace = {"trunkline": [900.0, 1100.0, 1000.0], "hugging face": [700.0, 650.0, 750.0]}
    memory = {"trunkline": 2**30, "hugging face": 2**31}
    found = {"command": "measure it", "tokens_per_second": pace, "faster": 1.43, "memory": memory}
    record.record("fine_tuning_pace", found, record.environment())
    text = record.tables(results / "nvidia-h200")
    assert "(`measure it`): ours 1.43x." in text
    assert "| trunkline | 1,000 | 900 to 1,100 | 1,024 |\n| hugging face | 700 | 650 to 750 | 2,048 |" in text


def test_readme_says_how_fast_texts_are_written(results):
    seconds = {"trunkline": [1.0, 2.0, 4.0], "hugging_face": [4.0, 7.0, 13.0]}
    rates = {"trunkline": 400.0, "hugging_face": 114.2857}
    found = {"tokens": 800, "shortest_text": 9, "tokens_per_second": rates, "faster": 3.5, "seconds": seconds}
    measured = {
        "command": "measure it",
        "threads": 2,
        "texts": 32,
        "document_tokens": {"mean": 194.06, "longest": 411},
        "longest_text": 48,
        "settings": {"as they end": found, "full length": {**found, "faster": 2.9}},
    }
    record.record("generation", measured, record.environment())
    text = " ".join(record.tables(results / "nvidia-h200").split())
    assert "32 DialogSum documents (`measure it`), which have 194 tokens on average and 411 at most" in text
    assert "| as they end | 800 | 400 | 114 | 3.50x | | full length | 800 | 400 | 114 | 2.90x |" in text
    assert "median of 3." in text


def test_readme_and_plot_of_training_steps(results):
    own = {"seconds_per_step": 0.5, "memory": 2**30, "utilisation": 0.6, "tokens_per_second": 4e3}
    own |= {"tokens_per_step": 2e3, "parts": dict.fromkeys(step.PARTS, 0.1)}
    measured = {
        "command": "measure it",
        "shape": "small",
        "tokens": 2048,
        "tokens_per_second": {"trunkline": 4e3, "packed": 2e3, "9 heads": 1.0},
        "turns": {"trunkline": [4e3] * 3},
        "padding": {"trunkline": 0.01, "packed": 0.0},
        "best_peer": 2e3,
        "systems": {"trunkline": own},
    }
    path = record.record("step-small", measured, record.environment())
    text = record.tables(results / "nvidia-h200")
    assert "| trunkline | 4,000 | 2.00x | 1.0% | 500 | 1,024 | 60% |" in text
    assert "| packed | 2,000 | 1.00x | 0.0% | - | - | - |" in text
    assert "heads" not in text
    record.report_device(path.parent)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    readme = results / "README.md"
    readme.write_text(f"{record.BEGIN}\n{record.END}\n")
    record.report(results, readme)
    assert "step" not in "".join(line for line in readme.read_text().splitlines() if line.startswith("!["))
    record.record("step", {**measured, "shape": "tiny"}, record.environment())
    record.report(results, readme)
    assert "![training steps beside Hugging Face](nvidia-h200/step.png)" in readme.read_text()


def test_scaling_is_measured_and_told(results):
    points = [{"x": x, **scaling.batching(x, first=False)} for x in (1000, 4000)]
    assert all(point["seconds"] > 0 for point in points)
    points = [{"x": 64, **scaling.training("cpu", 1, tokens=128, length=64, tasks=2, width=64)}, *points]
    assert points[0]["seconds"] > 0
    path = record.record("scaling", {"command": "measure it", "curves": {"tasks": points}}, record.environment())
    assert "| tasks | 64 … 4,000 |" in record.tables(path.parent)
    record.report_device(path.parent)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_readme_says_what_waiting_costs(results):
    rows = [{"system": "trunkline", "waiting": "passive", "quiet": 5073.9, "busy": 3757.97}]
    record.record("waiting", {"command": "measure it", "tokens_per_second": rows}, record.environment())
    assert "| trunkline | passive | 5,074 | 3,758 |" in record.tables(results / "nvidia-h200")


def test_readme_says_what_adapters_cost(results):
    measured = {
        "command": "measure it",
        "threads": 1,
        "tokens": 2048,
        "seconds": {"full": [3.0, 9.0, 2.0], "PEFT": [4.0, 4.0, 5.0]},
        "tokens_per_second": {"full": 1024.0, "PEFT": 512.4},
        "ratios": {"time, adapters / full": 0.7},
    }
    record.record("adapters", measured, record.environment())
    text = record.tables(results / "nvidia-h200")
    assert "| full | 3,000 | 1,024 |\n| PEFT | 4,000 | 512 |" in text
    assert "| time, adapters / full | 0.700 |" in text


def test_readme_says_what_is_learnt_from_a_checkpoint(results):
    def trained(score: float, tokens: int) -> dict[str, Any]:
        return {"scores": {"sst2": score}, "metrics": {"sst2": "accuracy"}, "real_tokens": tokens}

    changes = {
        "Trunkline": {"0": trained(0.9, 4000), "1": trained(0.8, 6000)},
        "Hugging Face, same tokens": {"0": trained(0.7, 5000)},
    }
    record.record("from_checkpoint", {"command": "measure it", "changes": changes}, record.environment())
    text = record.tables(results / "nvidia-h200")
    assert "5 thousand (Trunkline), 5 thousand (Hugging Face, same tokens)" in text
    assert "| system | sst2 (accuracy) | seeds |" in text
    assert "| Trunkline | 0.850 ± 0.071 | 2 |" in text
