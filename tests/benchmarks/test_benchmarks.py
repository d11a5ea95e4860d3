"""The benchmarks run, refuse what is wrong, and their results become tables and plots."""

import importlib.util
import multiprocessing
import os
import shlex
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from conftest import pytest_collection_modifyitems
from trunkline import Task, Trunk
from trunkline.benchmarks import gpu, record, tables
from trunkline.benchmarks.microbenchmarks.examples import Kernel, map_tensors, scaled, shipped_kernels
from trunkline.benchmarks.microbenchmarks.floors import RATES, Work, floor, work_of
from trunkline.benchmarks.microbenchmarks.measure import SMOKE, contest
from trunkline.benchmarks.microbenchmarks.peers import PEERS, System, Unavailable, definition
from trunkline.benchmarks.systems import step, training_systems
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


def test_gpu_parts_fit_into_nine_minutes_and_go_on_after_a_failure(capfd):
    assert sum(part.budget for part in gpu.parts(Path("data"), dry=False)) <= 540
    for dry in (False, True):
        benchmarks = [command for part in gpu.parts(None, dry) for command in part.commands if "benchmarks" in command]
        assert ["--record" in command for command in benchmarks] == [not dry] * 3
        assert ["not loop" in shlex.join(command) for command in benchmarks] == [True, False, False]
    endings = [f"print('{said}'); raise SystemExit({code})" for said, code in (("one", 0), ("two", 3))]
    failing = gpu.Part("failing", [[sys.executable, "-c", ending] for ending in endings], 60)
    outcome, _ = gpu.run(failing)
    assert outcome == "failed (3)"
    out = capfd.readouterr().out
    assert out.index("one") < out.index("two")


def test_gpu_tests_are_found_without_collecting_all():
    found = gpu.gpu_tests()
    assert "tests/kernels/interpreter/attention/test_attention_short.py" in found
    assert "tests/training/test_estimate.py" in found
    assert "tests/engine/test_template.py" not in found


def test_gpu_results_are_packed_into_one_file(tmp_path, monkeypatch):
    for device in ("nvidia-h100", "x86_64"):
        (tmp_path / "benchmarks" / "results" / device).mkdir(parents=True)
        (tmp_path / "benchmarks" / "results" / device / "step.json").write_text("{}")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    gpu.pack_results(tmp_path)
    with tarfile.open(tmp_path / "results.tgz") as packed:
        assert packed.getnames() == ["nvidia-h100", "nvidia-h100/step.json"]


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


def test_a_system_without_enough_memory_is_a_row_that_says_so(monkeypatch, tmp_path, capsys):
    """Its process, and one that dies without a word, leave what the others measure alone, in the results, too. The
    processes are threads here; after the second round the clock ends it."""
    turn = {"steps": 2, "seconds": 1.0, "host_seconds": 0.5, "tokens": 300, "padding": 100, "operations": 2e9}
    turn |= {"parts": dict.fromkeys(step.PARTS, 0.25), "memory": 7}
    written: list[dict] = []

    def made(name: str, *rest: object) -> SimpleNamespace:
        if name == "grouped":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 108 GiB.\nMore.")
        return SimpleNamespace(model=torch.nn.Identity(), optimizer=lambda: None, name=name, turns=0)

    def steps(system: SimpleNamespace, *rest: object) -> dict:
        system.turns += 1
        if system.name == "packed" and system.turns == 3:  # after the warm-up and a turn
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if system.name == "padded":
            sys.exit(3)  # as a process that is killed
        return turn

    class Process(threading.Thread):
        def __init__(self, target, args, daemon):
            self.connection = Connection(os.dup(args[-1].fileno()))
            super().__init__(target=target, args=(*args[:-1], self.connection), daemon=daemon)

        def run(self):
            with suppress(SystemExit):
                super().run()
            self.connection.close()

    def record(name: str, content: dict, around: dict) -> None:
        written.append(content)
        if len(written) == 2:
            raise KeyboardInterrupt

    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=Process)
    monkeypatch.setattr(step, "multiprocessing", SimpleNamespace(get_context=lambda way: context))
    monkeypatch.setattr(step, "make", made)
    monkeypatch.setattr(step, "steps", steps)
    monkeypatch.setattr(step, "matrix_rate", lambda device, seconds: 4e9)
    monkeypatch.setattr(step.signal, "signal", lambda *of: None)  # which threads may not
    monkeypatch.setattr(step, "record", record)
    systems = ["trunkline", "grouped", "padded", "packed"]
    monkeypatch.setattr(step, "systems_of", lambda shape, device: systems)
    monkeypatch.setattr(sys, "argv", ["step.py", str(tmp_path), "--rounds", "3", "--device", "cpu"])
    step.main()
    assert len(written) == 2
    assert {name: len(turns) for name, turns in written[-1]["turns"].items()} == {"trunkline": 2, "packed": 1}
    missing = {
        "grouped": "out of memory: CUDA out of memory. Tried to allocate 108 GiB.",
        "padded": "its process ended without a word",
        "packed": "out of memory: CUDA out of memory.",
    }
    assert written[-1]["missing"] == missing
    printed = capsys.readouterr().out
    for name, reason in missing.items():
        assert f"{name:22} left out: {reason}" in printed
    content = {**written[-1], "environment": {"gpu": "NVIDIA H100", "python": "3.12", "torch": "2.14"}}
    assert f"| grouped | left out: {missing['grouped']} |" in tables._speed(content)


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
def test_operations_are_those_of_the_products(activation, monkeypatch):
    """Attention and the heads are ops of ours, which are not counted here; nor are products by oneDNN."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
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
