"""Every public function of kernels/ beside all of its peers: forward, backward and both, at all of its shapes.

The systems of a case are measured together, in turns; each test then hands the times of one to pytest-benchmark.
"""

import pytest
import torch

from trunkline.benchmarks.microbenchmarks.floors import floor, work_of
from trunkline.benchmarks.microbenchmarks.measure import ON_CPU, ON_GPU, SMOKE, contest
from trunkline.benchmarks.microbenchmarks.peers import Unavailable


class Clock:
    """Shows times that were measured before: pytest-benchmark sees the device's time, not the host's."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


@pytest.mark.benchmark(timer=CLOCK, warmup=False)
def test_kernel(benchmark, task, system, measured, request):
    kernel, shape, sizes, dtype, direction = task
    device = torch.device("cuda" if request.config.getoption("--sizes") == "gpu" else "cpu")
    key = (kernel.name, shape, direction)
    if key not in measured:
        plan = {"gpu": ON_GPU, "cpu": ON_CPU, "smoke": SMOKE}[request.config.getoption("--sizes")]
        cases = [item.callspec.params for item in request.session.items]
        chosen = [case["system"] for case in cases if case["task"] is task]  # of which -k may have left out some
        work = work_of(kernel.name, direction, kernel.example(device, dtype, **sizes))
        measured[key] = {
            "dtype": str(dtype).removeprefix("torch."),
            "sizes": sizes,
            "work": work._asdict(),
            "floor": floor(work, torch.cuda.get_device_name() if device.type == "cuda" else None),
            "systems": contest(kernel, sizes, dtype, device, direction, plan, chosen),
        }
    seconds = measured[key]["systems"][system]
    if isinstance(seconds, Unavailable):
        pytest.skip(str(seconds))
    if isinstance(seconds, Exception):
        raise seconds
    benchmark.group = f"{kernel.name}, {shape}, {direction}"
    rounds = iter(seconds)
    benchmark.pedantic(lambda: CLOCK.advance(next(rounds)), rounds=len(seconds))
    assert all(time > 0 for time in seconds)
