"""Linear layers on a CPU: their products by the library that torch takes, MKL, and by oneDNN, which ours take on AMD's.

    python benchmarks/microbenchmarks/products.py [--rounds 20]

Forward and backward, float32, one thread; the layers of a MiniLM and of a SmolLM2-135M. See kernels/products.py.
"""

import argparse
from collections.abc import Callable
from statistics import median

import torch

from trunkline.benchmarks.microbenchmarks.measure import in_turns
from trunkline.benchmarks.record import record
from trunkline.engine.network.memory import keep_freed_memory
from trunkline.kernels import products
from trunkline.training.environment import environment

SHAPES = ((640, 384, 384), (640, 384, 1536), (640, 1536, 384), (1024, 576, 3072), (8, 576, 1536), (256, 576, 49152))
LIBRARIES = {"MKL": False, "oneDNN": True}
WARM_UP = 2  # rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    products.FASTER = True  # on whatever processor this is
    rates: dict[str, dict[str, float]] = {}
    for rows, width, columns in SHAPES:
        calls = {name: _call(rows, width, columns, enabled) for name, enabled in LIBRARIES.items()}
        seconds = in_turns(calls, options.rounds, warm_up=WARM_UP)
        operations = 3 * 2 * rows * width * columns
        shape = f"{rows:,} x {width:,} x {columns:,}"
        rates[shape] = {name: operations / median(rounds) / 1e9 for name, rounds in seconds.items()}
        print(f"{shape:20}", *(f"{name} {rate:5.0f} GFLOP/s" for name, rate in rates[shape].items()))
    command = f"python benchmarks/microbenchmarks/products.py --rounds {options.rounds}"
    record("products", {"command": command, "unit": "GFLOP/s", "rates": rates}, environment())


def _call(rows: int, width: int, columns: int, enabled: bool) -> Callable[[int], None]:
    layer, x = products.Linear(width, columns), torch.randn(rows, width, requires_grad=True)
    dy = torch.randn(rows, columns)

    def call(_: int) -> None:
        torch.backends.mkldnn.enabled = enabled
        layer(x).backward(dy, inputs=[x, *layer.parameters()])
        x.grad = layer.weight.grad = layer.bias.grad = None

    return call


if __name__ == "__main__":
    main()
