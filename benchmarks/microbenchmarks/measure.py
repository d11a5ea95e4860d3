"""Times of several ways of doing the same, taken in turns, and only of those that do it right."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trunkline.benchmarks.microbenchmarks.examples import Kernel, map_tensors, scaled
from trunkline.benchmarks.microbenchmarks.peers import PEERS, Arguments, Peer, System, trunkline
from trunkline.training.tuning.contest import turn_on_gpu

DIRECTIONS = ("forward", "backward", "both")
OURS = "trunkline"
Call = Callable[[], Any]


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int  # turns of every system
    seconds: float  # of each turn, at least one call
    checked_rows: int  # rows or tokens that results are compared on


ON_GPU = Plan(rounds=12, seconds=0.01, checked_rows=4096)
ON_CPU = Plan(rounds=3, seconds=0.2, checked_rows=1024)
SMOKE = Plan(rounds=2, seconds=0.0, checked_rows=64)


def contest(
    kernel: Kernel,
    sizes: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    direction: str,
    plan: Plan,
    names: Collection[str],
) -> dict[str, list[float] | Exception]:
    """Seconds a call of every system in every round; of one that cannot take part or is wrong, why.

    Args:
        kernel: what is computed.
        sizes: of its example inputs.
        dtype: of its example inputs.
        device: where; on a GPU the time is the device's own, see `turn_on_gpu`.
        direction: 'forward' (what backward needs is kept), 'backward' or 'both'.
        plan: how much is measured.
        names: systems that take part.
    """
    everyone: dict[str, Peer] = {OURS: trunkline, **PEERS[kernel.name]}
    systems = {name: make for name, make in everyone.items() if name in names}
    small = kernel.example(device, dtype, **scaled(sizes, plan.checked_rows, 1 << 30))
    large = kernel.example(device, dtype, **sizes)
    results: dict[str, list[float] | Exception] = {}
    calls: dict[str, list[Call]] = {}
    for name, make in systems.items():
        try:
            check(kernel, make, small, dtype)
            first_copy = make(kernel, large, dtype)
            others = [make(kernel, large, dtype) for _ in range(_copies(first_copy, device) - 1)]
            calls[name] = [_call(system, direction) for system in (first_copy, *others)]
            for call in calls[name]:
                call()  # compiles, and takes the memory that the next calls find
        except Exception as error:  # a peer that fails says so in its own row; the others are measured all the same
            results[name] = error.with_traceback(None)  # its frames would keep the inputs in memory
            calls.pop(name, None)
    turn = turn_on_gpu if device.type == "cuda" else _turn_on_cpu
    numbers = {name: turn(of_one, 1) for name, of_one in calls.items()}  # calls that fill a turn
    numbers = {name: max(1, min(1000, int(plan.seconds / seconds))) for name, seconds in numbers.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(plan.rounds):
        for name, of_one in calls.items():
            times[name].append(turn(of_one, numbers[name]))
    return {name: results.get(name) or times[name] for name in systems}


def in_turns(
    calls: dict[str, Callable[[int], Any]], rounds: int, *, warm_up: int, calls_a_turn: int = 1
) -> dict[str, list[float]]:
    """Wall-clock seconds a call of everyone in every round: what slows the machine down slows all of them.

    Args:
        calls: by name; each is given the number of the round.
        rounds: that are timed.
        warm_up: rounds before these.
        calls_a_turn: of everyone, one after the other.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warm_up + rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            for _ in range(calls_a_turn):
                call(number)
            if number >= warm_up:
                seconds[name].append((time.perf_counter() - began) / calls_a_turn)
    return seconds


def has_gradient(kernel: Kernel, sizes: dict[str, Any], dtype: torch.dtype) -> bool:
    arguments = kernel.example(torch.device("cpu"), dtype, **scaled(sizes, 32, 16))
    return trunkline(kernel, arguments, dtype).forward().requires_grad


def check(kernel: Kernel, make: Peer, arguments: Arguments, dtype: torch.dtype) -> None:
    """Holds output and gradients against the definition in float64: at most twice its error in `dtype`.

    Raises:
        AssertionError: what is wrong, by how much, and how much is allowed.
        Unavailable: the system cannot take part.
    """
    exact_arguments = map_tensors(lambda x: x.double() if x.dtype == dtype else x, arguments)
    reference = next(iter(PEERS[kernel.name].values()))
    candidates = (
        make(kernel, arguments, dtype),
        reference(kernel, arguments, dtype),
        reference(kernel, exact_arguments, torch.float64),
    )
    outcomes = [_outcome(system) for system in candidates]
    for name in outcomes[0]:
        ours, plain, exact = (outcome[name].double() for outcome in outcomes)
        largest = exact.abs().max()
        floor = 1e-6 + largest * (1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps)
        allowed = 2 * (plain - exact).abs().max() + floor
        error = (ours - exact).abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}; values up to {largest:.3g}"


def _outcome(system: System) -> dict[str, Tensor]:
    output = system.forward()
    outcome = {"output": system.to_ours(output)}
    if output.requires_grad:
        upstream = system.from_ours(_upstream(outcome["output"]).to(output.dtype))
        gradients = torch.autograd.grad(output, list(system.inputs.values()), upstream)
        outcome |= {f"gradient of {k}": system.to_ours(g) for k, g in zip(system.inputs, gradients, strict=True)}
    return {name: x.detach() for name, x in outcome.items()}


def _upstream(output: Tensor) -> Tensor:
    """The gradient that arrives at an output: random, rounded as bfloat16 is, so the same in every dtype."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(output.shape, generator=generator).bfloat16().to(output.device, torch.float32)


def _call(system: System, direction: str) -> Call:
    inputs = list(system.inputs.values())
    if direction == "forward":
        return system.forward
    output = system.forward()
    upstream = system.from_ours(_upstream(system.to_ours(output)).to(output.dtype))
    if direction == "backward":
        return lambda: torch.autograd.grad(output, inputs, upstream, retain_graph=True)
    return lambda: torch.autograd.grad(system.forward(), inputs, upstream)


def _copies(system: System, device: torch.device) -> int:
    """How many sets of inputs are used in turn, so that none is still in the cache when it comes round again.

    On a CPU two if they are small: what a function remembers of its last inputs then helps its backward pass alone.
    """
    size = sum(x.numel() * x.element_size() for x in system.inputs.values())
    if device.type != "cuda":
        return 2 if size < 1 << 24 else 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(32, -(-2 * cache // max(1, size))))


def _turn_on_cpu(calls: list[Call], number: int) -> float:
    began = time.perf_counter()
    for i in range(number):
        calls[i % len(calls)]()
    return (time.perf_counter() - began) / number
