"""Every kernel compiles well for the GPUs we have not got here; and certification finds what it is there to find."""

import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trunkline.benchmarks.microbenchmarks.certify import main, unfenced_products
from trunkline.benchmarks.microbenchmarks.examples import shipped_kernels
from trunkline.benchmarks.microbenchmarks.preset_shapes import preset_shapes
from trunkline.engine.network.trunk import PRESETS

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton, which is for Linux")

SEEDED = """
import dataclasses, json, seeded_kernels
from trunkline.benchmarks.microbenchmarks.certify import certify
from trunkline.benchmarks.microbenchmarks.examples import kernel_of
certificates = certify([kernel_of(seeded_kernels)], [90, 80, 100], quick=True, jobs=2)
print(json.dumps([dataclasses.asdict(certificate) for certificate in certificates]))
"""


def python(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter: certification replaces Triton's launcher."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRUNKLINE_REFERENCE")}
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests" / "helpers")])
    environment = {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **changes}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=900)


def test_every_kernel_is_certified():
    result = python("-m", "trunkline.benchmarks.microbenchmarks.certify", "--quick", "--jobs", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    for kernel in shipped_kernels():
        assert f"\n{kernel.name}: " in result.stdout  # also where it launches nothing
    _, of_kernel = result.stdout.split("attention: _query_gradient_kernel")
    (registers, *_) = re.findall(r"sm_90 +(\d+) .* bfloat16: D=64 ", of_kernel.split("\n\n")[0])
    assert int(registers) <= 128  # of 65,536 for 8 warps: two blocks share a multiprocessor


def test_presets_are_among_what_is_certified():
    """Every linear layer of the last block for the Gram matrix, and every vocabulary: a trunk that reads both ways
    predicts words that are masked."""
    gram = preset_shapes("task_gram")
    assert len(gram) == 4 * len(PRESETS)
    assert gram["medium, mlp_out"] == {"tokens": 2048, "tasks": 9, "width_in": 4096, "width_out": 1024}
    for name in ("task_loss", "task_projection", "linear_cross_entropy"):
        assert preset_shapes(name).keys() == PRESETS.keys()
    assert {shape["vocabulary"] for shape in preset_shapes("linear_cross_entropy").values()} == {8192, 50257, 30522}
    for kernel in shipped_kernels():  # the sizes are those of its example
        for shape in preset_shapes(kernel.name).values():
            assert set(shape) <= set(inspect.signature(kernel.example).parameters)


@pytest.fixture(scope="module")
def seeded() -> list[dict]:
    result = python("-c", SEEDED)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def chosen(certificates: list[dict], shape: str, name: str = "_product_kernel", **fields: object) -> dict:
    """The one certificate of a shape, in bfloat16 on sm_90 unless said otherwise."""
    wanted = {"shape": shape, "name": name, "arch": 90, "dtype": "bfloat16", **fields}
    (found,) = [c for c in certificates if wanted.items() <= c.items()]
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_clean_launch_has_no_finding_in_any_dtype(seeded, dtype):
    certificate = chosen(seeded, "clean", dtype=dtype)
    assert certificate["findings"] == []
    assert certificate["matrix"].startswith("wgmma")
    assert certificate["spills"] == 0
    assert 16 <= certificate["registers"] < 255
    assert certificate["shared"] >= 2 * 64 * 64 * 2  # both operands of wgmma lie in shared memory
    assert certificate["size"] > 1000


@pytest.mark.parametrize(("arch", "instruction"), [(90, "wgmma"), (80, "mma"), (100, "tcgen05")])
def test_each_architecture_has_its_matrix_instruction(seeded, arch, instruction):
    assert chosen(seeded, "clean", arch=arch)["matrix"].startswith(instruction)


@pytest.mark.parametrize(
    ("shape", "finding"),
    [
        ("spills", "spills: "),
        ("no wgmma", "no wgmma for (64, 64) @ (64, 64) bf16"),
        ("too much shared memory", "bytes, a block has 232,448"),
        ("does not compile", "does not compile: "),
    ],
)
def test_seeded_fault_is_found(seeded, shape, finding):
    assert finding in "; ".join(chosen(seeded, shape)["findings"])


PRODUCT = """
        /*0100*/                   F2FP.BF16.F32.PACK_AB R160, R153, R152 ;
        /*0110*/              @!P0 WARPGROUP.ARRIVE ;
        /*0120*/                   LDS.128 R164, [R10+0x400] ;
        /*0130*/                   HGMMA.64x128x16.F32.BF16 R88, R160, gdesc[UR8].tnspB, R88, gsb0 ;
        /*0140*/                   HGMMA.64x16x16.F32.BF16 R164, gdesc[UR52], R164 ;
"""


def test_wgmma_whose_registers_change_behind_its_fence_is_found():
    assert unfenced_products(PRODUCT) == []
    arrive, pack = "@!P0 WARPGROUP.ARRIVE ;", "F2FP.BF16.F32.PACK_AB R160, R153, R152 ;"
    swapped = PRODUCT.replace(arrive, "X").replace(pack, arrive).replace("X", pack)
    assert unfenced_products(swapped) == ["HGMMA.64x128x16.F32.BF16 R88, R160, gdesc[UR8].tnspB, R88, gsb0"]
    (found,) = unfenced_products(PRODUCT.replace("LDS.128 R164", "LDS.128 R159"))  # four registers
    assert "R160" in found


def test_same_launch_is_compiled_once(seeded):
    assert not [c for c in seeded if c["shape"] == "clean again"]


def test_other_architectures_get_one_shape_when_quick(seeded):
    assert {(c["arch"], c["shape"]) for c in seeded if c["arch"] != 90} == {(80, "clean"), (100, "clean")}


def test_every_tuned_configuration_is_compiled(seeded):
    tuned = [c for c in seeded if c["name"] == "_tuned_kernel" and c["shape"] == "clean" and c["arch"] == 80]
    assert [c["configuration"] for c in tuned] == ["WIDTH=64 warps=1 stages=3", "WIDTH=64 warps=4 stages=3"]


def test_spills_are_allowed_where_the_file_says_so(seeded):
    certificate = chosen(seeded, "spills", "_tuned_kernel", configuration="WIDTH=128 warps=1 stages=3")
    assert certificate["spills"] > 0
    assert not any("spills" in finding for finding in certificate["findings"])


def test_unknown_name_says_what_there_is(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["certify", "atention"])
    with pytest.raises(SystemExit, match="^2$"):
        main()
    assert "there is no kernel atention; there are attention, " in capsys.readouterr().err


def test_interpreter_is_refused():
    result = python("-m", "trunkline.benchmarks.microbenchmarks.certify", TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert "TRITON_INTERPRET=1" in result.stderr
