"""What a compiled step of `small` moves through memory and launches on an H100, counted without one.

    python benchmarks/systems/compiled_step.py [--layers 12] [--tokens 32768]

The graphs of a training step are traced on the CPU in bfloat16, as on a GPU; then the devices in them are renamed, and
Inductor lowers and fuses them for an H100. Nothing is compiled further, and nothing runs. Counted are

- bytes of the kernels that it generates (norms, activations, casts, sums): of each the buffers that it reads or writes,
  as Inductor's scheduler counts them, which is once, however often a kernel comes back to them;
- calls: a generated kernel or a product is one launch; an op of ours has several (`attention_forward` one for narrow
  tiles, for wide tiles and for blocks each, `attention_backward` one more for blocks).

Not counted: bytes of products and of our own ops; the optimizer. The batch is generated, with about as many sequences
and labelled rows as GLUE and DialogSum have; both hardly matter beside the tokens.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from trunkline.benchmarks.systems.training_systems import SHAPES, TASKS, Shape
from trunkline.engine.network.compiled import CompiledModel, FixedShapes
from trunkline.engine.network.model import MultiTaskModel, in_model_order
from trunkline.engine.network.packing import Example, PackedBatch, pack
from trunkline.engine.network.trunk import Trunk
from trunkline.engine.tasks.builtin import get_task
from trunkline.kernels.dispatch import TRITON

DEVICE = torch.device("cuda", 0)
PROCESSORS = 132  # of an H100
GENERATED, PRODUCTS, OTHERS = "generated", "products", "others"


@dataclass
class Count:
    bytes: int = 0  # that generated kernels read and write
    calls: Counter[str] = field(default_factory=Counter)  # by GENERATED, PRODUCTS, the name of an op of ours, OTHERS
    largest: list[tuple[int, str]] = field(default_factory=list)  # bytes of each generated kernel, and what is in it


class _Counted(Exception):
    """Both graphs are counted; the backward pass need not go on."""


def count(shape: Shape) -> Count:
    """Of a step, forward and backward."""
    from torch._inductor.compile_fx import compile_fx

    model = MultiTaskModel(Trunk(shape.trunk), in_model_order([get_task(name) for name in TASKS]))
    batch, found, graphs = _batch(model, shape.tokens), Count(), iter(("forward", "backward"))

    def counted(graph: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., list[Any]]:
        direction = next(graphs)
        outputs = [None if node is None else node.meta["val"] for node in graph.graph.output_node().args[0]]
        _add(found, graph, inputs, direction == "backward")
        if direction == "backward":
            raise _Counted
        return lambda *_: [_like(value) for value in outputs]

    shapes = FixedShapes.of([batch], model.groups)
    compiled = CompiledModel(model, shapes, backend=partial(compile_fx, inner_compile=counted))
    with torch.autocast("cpu", torch.bfloat16):
        losses = compiled(shapes.pad(batch)).loss
    try:
        losses.sum().backward()
    except _Counted:
        return found
    raise RuntimeError("compiled_step: the backward pass was not compiled")


def _batch(model: MultiTaskModel, tokens: int) -> PackedBatch:
    """Sentences and pairs of 8 to 95 tokens with one label, and dialogues of 130 to 511 with 40 labelled ones."""
    rng, examples, used = np.random.default_rng(0), [], 0
    while True:
        task = int(rng.integers(len(model.tasks)))
        writes = model.tasks[task].head == "generate"
        length, labelled = (int(rng.integers(130, 512)), 40) if writes else (int(rng.integers(8, 96)), 1)
        used += length
        if used > tokens:
            return pack(examples, len(model.tasks), tokens)
        text, rows = rng.integers(0, 8192, length), np.arange(length - labelled, length)
        examples.append(Example(task, text, rows, np.ones(labelled, np.int64)))


def _like(value: Any) -> Any:
    """Memory that nobody has written."""
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype) if isinstance(value, Tensor) else value


def _add(found: Count, graph: fx.GraphModule, inputs: Sequence[Any], is_backward: bool) -> None:
    from torch._guards import detect_fake_mode
    from torch._inductor.compile_fx import _recursive_post_grad_passes, record_original_output_strides
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
    from torch._inductor.virtualized import V

    fake = detect_fake_mode(inputs)
    record_original_output_strides(graph)
    with V.set_fake_mode(fake), _an_h100():
        _recursive_post_grad_passes(graph, is_inference=False)
        inputs = _renamed(graph, inputs, fake)
        lowered = GraphLowering(graph, inputs, shape_env=fake.shape_env, is_backward=is_backward)
        with V.set_graph_handler(lowered), V.set_debug_handler(DebugContext()):
            lowered.run(*inputs)
            lowered.init_wrapper_code()
            lowered._update_scheduler()
            for node in lowered.scheduler.nodes:
                if isinstance(node, ExternKernelSchedulerNode):
                    found.calls.update(_extern(node.node))
                elif not isinstance(node, NopKernelSchedulerNode):
                    found.calls[GENERATED] += 1
                    found.bytes += (size := node.get_read_write_buffers_sizes())
                    origins = {o.name for part in node.get_nodes() for o in part.node.origins}
                    found.largest.append((size, " ".join(sorted(origins))))


def _extern(node: Any) -> dict[str, int]:
    """Of what Inductor does not generate: outputs of an op are no launches of their own, and our ops have several."""
    from torch._inductor.ir import ExternKernelOut, MultiOutput

    if isinstance(node, MultiOutput):
        return {}
    if (op := getattr(node, "op_overload", None)) in TRITON:
        return {op.name().removeprefix("trunkline::"): 1}
    return {PRODUCTS if isinstance(node, ExternKernelOut) else OTHERS: 1}


def _renamed(graph: fx.GraphModule, inputs: Sequence[Any], fake: Any) -> list[Any]:
    """The graph and its inputs, with the GPU in place of the CPU. Seeds of dropout stay: the host draws them."""

    def renamed(value: Any) -> Any:
        if not isinstance(value, Tensor) or (value.ndim == 0 and not value.is_floating_point()):
            return value
        with fake:
            return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=DEVICE)

    for node in graph.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = tree_map(renamed, node.meta["val"])
        if node.kwargs.get("device") == torch.device("cpu"):
            node.kwargs = {**node.kwargs, "device": DEVICE}
    graph.recompile()
    return [renamed(value) for value in inputs]


@contextmanager
def _an_h100() -> Iterator[None]:
    """Inductor asks for properties of the GPU that it makes code for, and whether there is a Triton for it."""
    from torch._inductor import scheduler
    from torch._inductor.runtime.hints import DeviceProperties

    properties = DeviceProperties("cuda", 0, PROCESSORS, 90, 9, 65536, 2048, warp_size=32)
    with ExitStack() as stack:
        stack.enter_context(patch.object(DeviceProperties, "create", lambda device: properties))
        stack.enter_context(patch.object(scheduler, "has_triton", lambda: True))
        yield


def main() -> None:
    parser = argparse.ArgumentParser("compiled_step", description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=SHAPES["small"].trunk.num_layers)
    parser.add_argument("--tokens", type=int, default=SHAPES["small"].tokens)
    parser.add_argument("--largest", type=int, default=0, help="kernels to be listed")
    options = parser.parse_args()
    found = count(Shape(replace(SHAPES["small"].trunk, num_layers=options.layers), options.tokens))
    for size, origins in sorted(found.largest, reverse=True)[: options.largest]:
        print(f"{size / 1e6:8.1f} MB  {origins[:100]}")
    print(f"generated kernels read and write {found.bytes / 1e9:.2f} GB")
    print(f"{found.calls.total()} calls: {', '.join(f'{n} {kind}' for kind, n in found.calls.most_common())}")


if __name__ == "__main__":
    main()
