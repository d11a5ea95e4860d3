"""The benchmarks run, refuse what is wrong, and their results become tables and plots."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from conftest import pytest_collection_modifyitems
from trunkline import Task, Trunk
from trunkline.benchmarks import gpu, record
from trunkline.benchmarks.learning import balancing_methods
from trunkline.benchmarks.microbenchmarks.examples import Kernel, map_tensors, scaled, shipped_kernels
from trunkline.benchmarks.microbenchmarks.floors import RATES, Work, floor, work_of
from trunkline.benchmarks.microbenchmarks.measure import SMOKE, contest
from trunkline.benchmarks.microbenchmarks.peers import PEERS, System, Unavailable, definition
from trunkline.benchmarks.systems import scaling, step, training_systems
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.network.packing import Example, pack
from trunkline.engine.network.trunk import preset

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {kernel.name: kernel for kernel in shipped_kernels()}
CPU = torch.device("cpu")


def product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


def example(device: torch.device, dtype: torch.dtype, rows: int, width: int) -> dict[str, Tensor]:
    return {name: torch.randn(n, width).to(device, dtype) for name, n in (("x", rows), ("weight", 5))}


SIZES = {"rows": 30, "width": 8}
PRODUCT = Kernel("product", product, {"small": SIZES}, example, SimpleNamespace(product_reference=product))


def times_of(monkeypatch: pytest.MonkeyPatch, direction: str, **peers) -> dict:
    monkeypatch.setitem(PEERS, "product", {"right": definition, **peers, "not asked for": wrong_output})
    return contest(PRODUCT, SIZES, torch.float32, CPU, direction, SMOKE, ["trunkline", "right", *peers])


@pytest.mark.skipif(not importlib.util.find_spec("pytest_benchmark"), reason="needs pytest-benchmark")
def test_all_benchmarks_run():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "benchmarks", "--benchmark-only", "--sizes", "smoke"]
    inherited = {k: v for k, v in os.environ.items() if k != "PYTEST_XDIST_WORKER"}  # which turns benchmarks off
    environment = {**inherited, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    kept = states(record.RESULTS)
    result = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    for name in KERNELS:
        assert f"test_kernel[{name}-" in result.stdout
    assert states(record.RESULTS) == kept  # without --record


def states(folder: Path) -> dict[Path, tuple[int, int]]:
    """When every file was written, and how long it is."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_has_a_peer_and_a_floor(name):
    kernel = KERNELS[name]
    arguments = kernel.example(CPU, torch.float32, **scaled(next(iter(kernel.shapes.values())), 48, 16))
    assert PEERS[name]
    for direction in ("forward", "backward", "both"):
        work = work_of(name, direction, arguments)
        assert work.bytes >= 0
    assert work.bytes >= sum(x.numel() * 4 for x in arguments.values() if isinstance(x, Tensor) and x.ndim > 1)
    assert work.operations > 0


def test_floor_is_the_slowest_of_what_must_be_done():
    rates = RATES["NVIDIA H200"]
    assert floor(Work(rates.bytes, rates.operations * 2, rates.exponentials / 2), "NVIDIA H200") == 2.0
    assert floor(Work(1, 1, 1), "some laptop") is None


@pytest.mark.skipif("attention" not in KERNELS, reason="no example of attention")
def test_attention_floor_is_that_of_the_design():
    """1024 sequences of 32 tokens, 12 heads of 64, bfloat16, on an H200: 47 microseconds, 94 for the backward pass."""
    kernel = KERNELS["attention"]
    arguments = kernel.example(CPU, torch.bfloat16, lengths=[32] * 1024, heads=12, head_dim=64, causal=False)
    forward, backward = (work_of("attention", direction, arguments) for direction in ("forward", "backward"))
    assert floor(forward, "NVIDIA H200") == pytest.approx(47e-6, rel=0.01)
    assert floor(backward, "NVIDIA H200") == pytest.approx(94e-6, rel=0.01)
    assert forward.operations / 790e12 == pytest.approx(4.08e-6, rel=0.01)


def wrong_output(kernel, arguments, dtype) -> System:
    system = definition(kernel, arguments, dtype)
    return replace(system, forward=lambda: system.forward() * 1.01)


def wrong_gradient(kernel, arguments, dtype) -> System:
    system = definition(kernel, arguments, dtype)
    name, x = next(iter(system.inputs.items()))

    def forward() -> Tensor:
        y = system.forward()
        return y + 0.01 * (x.sum() - x.sum().detach())

    return replace(system, forward=forward, inputs={**system.inputs, name: x})


@pytest.mark.parametrize("wrong", [wrong_output, wrong_gradient])
def test_wrong_system_is_not_timed(wrong, monkeypatch):
    results = times_of(monkeypatch, "forward", wrong=wrong)
    assert isinstance(results["wrong"], AssertionError)
    assert "allowed" in str(results["wrong"])
    assert all(len(results[name]) == SMOKE.rounds for name in ("trunkline", "right"))


def test_unavailable_peer_does_not_stop_the_others(monkeypatch):
    def missing(kernel, arguments, dtype):
        raise Unavailable("not installed")

    results = times_of(monkeypatch, "both", missing=missing)
    assert str(results["missing"]) == "not installed"
    assert all(time > 0 for time in results["trunkline"])
    assert list(results) == ["trunkline", "right", "missing"]


def test_turns_last_as_long_as_what_they_call(monkeypatch):
    calls = []

    def slow(kernel, arguments, dtype):
        system = definition(kernel, arguments, dtype)

        def forward() -> Tensor:
            calls.append(time.sleep(0.02))
            return system.forward()

        return replace(system, forward=forward)

    assert min(times_of(monkeypatch, "forward", slow=slow)["slow"]) >= 0.02
    calls.clear()
    times_of(monkeypatch, "backward", slow=slow)
    assert len(calls) == 3  # for the check, and for the graphs of both copies, whose backward passes are timed


def test_scaling_keeps_a_mix_a_mix():
    sizes = {"lengths": [48] * 1024 + [768] * 32, "heads": 12, "head_dim": 64, "causal": True}
    small = scaled(sizes, 4608, 256)
    assert set(small["lengths"]) == {48, 768}
    assert 2000 < sum(small["lengths"]) < 7000
    assert {**small, "lengths": 0} == {**sizes, "lengths": 0}
    assert scaled({"lengths": [8192] * 8}, 1000, 64)["lengths"] == [750, 750]
    assert scaled({"rows": 8192, "width": 768, "vocabulary": 50257}, 100, 16) == {
        "rows": 100, "width": 16, "vocabulary": 512,
    }  # fmt: skip


def test_a_tensor_that_is_there_twice_stays_one():
    x = torch.zeros(2)
    changed = map_tensors(lambda t: t + 1, {"a": x, "b": (x, 3), "c": "text"})
    assert changed["a"] is changed["b"][0]
    assert changed["a"].tolist() == [1.0, 1.0]
    assert changed["b"][1] == 3


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


def test_readme_says_what_helps(results):
    metrics = {"sst2": "accuracy", "qqp": "f1"}

    def trained(*scores: tuple[float, float]) -> dict:
        return {
            str(seed): {"scores": dict(zip(metrics, of, strict=True)), "metrics": metrics}
            for seed, of in enumerate(scores)
        }

    changes = {"as it is": trained((0.5, 0.75), (0.7, 0.75)), "a projection per task": trained((0.625, 0.5))}
    record.record(
        "what_helps", {"command": "python benchmarks/what_helps.py DATA", "changes": changes}, record.environment()
    )
    text = record.tables(results / "nvidia-h200")
    assert "| change | sst2 (accuracy) | qqp (f1) | seeds |" in text
    assert "| as it is | 0.600 ± 0.141 | 0.750 ± 0.000 | 2 |" in text
    assert "| a projection per task | 0.625 | 0.500 | 1 |" in text


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


def test_gpu_parts_fit_into_nine_minutes_and_go_on_after_a_failure(capfd):
    assert sum(part.budget for part in gpu.parts(Path("data"), dry=False)) <= 540
    for dry in (False, True):
        benchmarks = [command for part in gpu.parts(None, dry) for command in part.commands if "benchmarks" in command]
        assert ["--record" in command for command in benchmarks] == [not dry] * 3
    endings = [f"print('{said}'); raise SystemExit({code})" for said, code in (("one", 0), ("two", 3))]
    failing = gpu.Part("failing", [[sys.executable, "-c", ending] for ending in endings], 60)
    outcome, _ = gpu.run(failing)
    assert outcome == "failed (3)"
    out = capfd.readouterr().out
    assert out.index("one") < out.index("two")


def test_gpu_part_that_is_too_slow_says_what_it_has_done(capfd, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 3)
    patient = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('as far as that')"
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    endless = gpu.Part("endless", [[sys.executable, "-c", command] for command in (patient, deaf)], 9)
    outcome, seconds = gpu.run(endless)
    assert outcome == "stopped after 6 s"
    assert seconds < 30
    assert "as far as that" in capfd.readouterr().out


def test_shards_are_all_of_the_tests_and_none_twice():
    found = []
    for shard in ("1/3", "2/3", "3/3"):
        items = list(range(10))
        pytest_collection_modifyitems(SimpleNamespace(getoption=lambda name, shard=shard: shard), items)
        assert len(items) in (3, 4)
        found += items
    assert sorted(found) == list(range(10))


def test_a_training_step_is_measured_in_parts():
    shape = training_systems.Shape(preset("tiny", vocab_size=8192, hidden_size=64, num_layers=2), 400)
    device = torch.device("cpu")
    system = training_systems.make("9 heads", shape, None, device)
    before = {name: parameter.clone() for name, parameter in system.model.named_parameters()}
    turn = step.steps(system, system.optimizer(), shape, device, 3, float("inf"), 0)
    assert set(turn["parts"]) == set(step.PARTS)
    assert turn["steps"] == 3
    assert sum(turn["parts"].values()) == pytest.approx(turn["seconds"], rel=0.2)
    assert turn["tokens"] + turn["padding"] == 3 * 400
    assert turn["memory"] > 0
    assert any((parameter != before[name]).any() for name, parameter in system.model.named_parameters())


def test_turns_count_together():
    turn = {"steps": 2, "seconds": 1.0, "host_seconds": 0.5, "tokens": 300, "padding": 100, "operations": 2e9}
    turn |= {"parts": dict.fromkeys(step.PARTS, 0.25), "memory": 7, "matrix": 4e9}
    long = {**turn, "steps": 1, "seconds": 3.0, "tokens": 100, "operations": 6e9, "memory": 9, "matrix": 8e9}
    together = step._together([turn, long])
    assert together["tokens_per_second"] == 100
    assert together["seconds_per_step"] == pytest.approx(4 / 3)
    assert together["parts"]["forward"] == pytest.approx(0.5 / 3)
    assert together["padding"] == pytest.approx(1 / 3)
    assert together["utilisation"] == pytest.approx(8 / 28)
    assert together["memory"] == 9


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_operations_are_those_of_the_products(activation):
    """Attention and the heads are ops of ours, which are not counted here."""
    trunk = preset("tiny", vocab_size=50, hidden_size=64, num_heads=4, num_kv_heads=2, activation=activation)
    model = MultiTaskModel(Trunk(trunk), [Task("t", "classify", ("text",), "label", ("no", "yes"))])
    examples = [Example(0, np.arange(n), np.array([n - 1]), np.array([1])) for n in (5, 20, 30)]
    with FlopCounterMode(display=False) as counted:
        model(pack(examples, 1)).loss.sum().backward()
    needed = training_systems.Amount(tokens=55, rows=3).operations(trunk)
    assert needed == counted.get_total_flops()
    with_targets = training_systems.Amount(tokens=55, rows=3, targets=2).operations(trunk)
    assert with_targets - needed == 6 * 2 * 50 * 64
    pairs = training_systems.Amount(tokens=55, rows=3, pairs=10.0, row_pairs=4.0).operations(trunk)
    # forward and twice backward, two products; 3 layers of all tokens, one of the labelled ones
    assert pairs - needed == 3 * 2 * 2 * 64 * (3 * 10 + 4)


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
