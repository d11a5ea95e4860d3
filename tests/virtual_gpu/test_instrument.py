"""Does the virtual GPU see what it must? Kernels that are right pass, and seeded faults are found."""

import shutil
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None or shutil.which("g++") is None:
    pytest.skip("needs Triton and g++", allow_module_level=True)

from virtual_gpu.device import ARCHITECTURES, VirtualGPU
from virtual_gpu.instructions import translate
from virtual_gpu.ptx import Unsupported
from virtual_gpu.seeded import add, product, read_of_another_block, sums, unwritten, without

pytestmark = pytest.mark.filterwarnings("default")  # Triton compiles in this process

TOLERANCE = 2e-3
RIGHT: dict[str, Callable[[], float]] = {
    "vector add": add,
    "cumsum and sum over four warps": sums,
    "bfloat16": product,
    "bfloat16, left transposed": partial(product, a_transposed=True),
    "bfloat16, right transposed": partial(product, b_transposed=True),
    "float16, both transposed": partial(product, torch.float16, True, True),
    "TF32": partial(product, torch.float32),
    "TF32, both transposed": partial(product, torch.float32, True, True),
    "128 x 256, 8 warps": partial(product, block=(128, 256, 64), warps=8, size=(130, 272, 208)),
    "64 x 16": partial(product, block=(64, 16, 16)),
}
WAIT = r"cp\.async\.wait_group \t\d+;"
# what is run, how its PTX is changed, and what must be found
FAULTS: dict[str, tuple[Callable[[], float], Callable | None, str]] = {
    "a mask is missing": (partial(add, mask=False), None, "global access outside"),
    "blocks overlap": (partial(add, step=127), None, "two blocks write one place"),
    "a block reads another's": (read_of_another_block, None, "a block reads what another block writes"),
    "nobody has written it": (unwritten, None, "read of global memory that nobody wrote"),
    "a barrier is missing": (sums, without(r"bar\.sync \t0;"), "shared race"),
    "a barrier is missing in a product": (product, without(r"bar\.sync \t0;", -1), "shared race"),
    "a copy is never waited for": (product, without(WAIT), "cp.async data used"),
    "a copy is waited for too late": (product, without(WAIT, 0, "cp.async.wait_group 7;"), "cp.async data used"),
    "an address is shifted": (product, without(r"\+ 0 \], 0x10", 0, "+ 8 ], 0x10"), "misaligned"),
}
OF_HOPPER: dict[str, tuple[str, str]] = {  # what is missing in a product by wgmma, and what must be found
    "wgmma is not waited for": (r"wgmma\.wait_group\.sync\.aligned \d+;", "shared"),
    "no proxy fence": (r"fence\.proxy\.async\.shared::cta;", "no fence.proxy.async"),
    "no fence of registers": (r"wgmma\.fence\.sync\.aligned;", "no wgmma.fence"),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", RIGHT)
def test_right_kernel_passes(name, arch):
    with VirtualGPU(arch, statistics=True) as gpu:
        error = RIGHT[name]()
    assert error < TOLERANCE
    assert not gpu.findings
    assert len(gpu.records) == 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name, arch):
    function, change, expected = FAULTS[name]
    with VirtualGPU(arch, change=change) as gpu:
        function()
    assert expected in "; ".join(finding.kind for finding in gpu.findings)


@pytest.mark.parametrize("name", OF_HOPPER)
def test_fault_of_hopper_is_found(name):
    pattern, expected = OF_HOPPER[name]
    with VirtualGPU(90, change=without(pattern)) as gpu:
        product()
    assert expected in "; ".join(finding.kind for finding in gpu.findings)


def test_wrong_result_is_seen():
    """One block fewer than there must be leaves NaN behind."""
    with VirtualGPU(80):
        assert not add(blocks=7) < TOLERANCE


@pytest.mark.parametrize("schedule", [1, 2])
def test_missing_barrier_changes_results_where_warps_do_not_go_in_step(schedule):
    with VirtualGPU(80, schedule=schedule):
        assert sums() < TOLERANCE
    with VirtualGPU(80, schedule=schedule, change=without(r"bar\.sync \t0;")) as gpu:
        sums()
    assert gpu.findings


def test_transactions_are_counted():
    """1000 floats: 125 sectors in, twice, and 125 out; 32 of them are a request of one warp."""
    with VirtualGPU(80, statistics=True) as gpu:
        add()
    (record,) = gpu.records
    assert record.outcome.unique_read == 2 * 4000
    assert record.outcome.unique_written == 4000
    sectors = {op: 0 for op, *_ in record.program.ops}
    for (op, *_), row in zip(record.program.ops, record.outcome.statistics, strict=True):
        sectors[op] += int(row["sectors"])
    assert (sectors["ld_global"], sectors["st_global"]) == (250, 125)


def test_unknown_instruction_is_refused():
    header = ".visible .entry kernel(.param .u64 kernel_param_0)\n{\n.reg .b32 %r<2>;\n"
    with pytest.raises(Unsupported, match="PTX line 4: clusterlaunchcontrol"):
        translate(f"{header}clusterlaunchcontrol.try_cancel.b32 %r1;\nret;\n}}\n")


def test_nothing_of_it_stays():
    """A real GPU's driver, or none, is Triton's again."""
    from triton.runtime import driver

    before = driver._active
    with VirtualGPU(90):
        assert driver._active is not before
    assert driver._active is before
