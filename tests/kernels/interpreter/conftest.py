"""The kernels' own tests: in Triton's interpreter, which must be chosen before Triton is imported, or on a GPU.

`device` is "cpu" in the interpreter (TRITON_INTERPRET=1, see test_interpreter.py) and "cuda" elsewhere. Tests for a GPU
alone, because the interpreter is slow or knows no bfloat16 products, are marked `gpu`. TRUNKLINE_VIRTUAL_GPU=90 runs
them, but for those marked `gpu`, on the virtual one, where `device` is "cpu", too.
"""

import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
VIRTUAL = os.environ.get("TRUNKLINE_VIRTUAL_GPU")
if not INTERPRETED and not VIRTUAL and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py", "*/test_*.py"]

if INTERPRETED:  # a bound of a loop is an array of one element, which Triton 3.6 gives to int() and numpy 2.5 refuses
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_and_index(tensor, scope) -> None:
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_tensor_and_index


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETED and not VIRTUAL:
        for item in items:
            if "interpreter" in item.path.parts:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    launched_or_not = request.node.get_closest_marker("no_kernel")
    if INTERPRETED:
        yield "cpu"
    elif VIRTUAL:
        from virtual_gpu.device import VirtualGPU

        with VirtualGPU(int(VIRTUAL)) as gpu:
            yield "cpu"
        assert not gpu.findings
        assert gpu.records or launched_or_not, "no kernel was launched"
    else:
        from triton import knobs

        launches: list[str] = []
        hook = launches.append
        knobs.runtime.launch_enter_hook.add(hook)
        yield "cuda"
        knobs.runtime.launch_enter_hook.remove(hook)
        assert launches or launched_or_not, "no kernel was launched"
