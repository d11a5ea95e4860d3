"""Arguments that no function can take: the error names the function, the argument and what came."""

import pytest
import torch
from torch import Tensor

from trunkline.kernels.arguments import check_tensors

X, INDEX = torch.zeros(2), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
def test_what_fits_passes(dtype, integer):
    x = X.to(dtype)
    check_tensors("f", {"x": x, "y": x}, {"i": INDEX.to(integer)}, {"flag": X > 0}, {"a": None, "b": INDEX})


@pytest.mark.parametrize("place", ["one_dtype", "integers", "others", "optional"])
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ([1.0], "list"),
        (None, "NoneType"),
        (X.numpy(), "ndarray"),
        (X.to_sparse(), "a tensor of layout torch.sparse_coo"),
    ],
    ids=["list", "None", "numpy", "sparse"],
)
def test_what_is_no_dense_tensor_is_named(value, kind, place):
    groups = {"one_dtype": {"x": X}} | {place: {"y": value}}
    if value is None and place == "optional":
        check_tensors("f", **groups)
        return
    with pytest.raises(TypeError, match=f"^f: y must be a dense tensor, got {kind}"):
        check_tensors("f", **groups)


@pytest.mark.parametrize(
    ("x", "y", "z"), [(X, X.half(), X), (X, X, X.double()), (INDEX, INDEX, INDEX), (X > 0, X > 0, X > 0)]
)
def test_dtypes_that_differ_or_are_not_floating_point_are_named(x: Tensor, y: Tensor, z: Tensor):
    message = f"^f: x, y and z must have one dtype, .*, got {x.dtype}, {y.dtype}, {z.dtype}$"
    with pytest.raises(ValueError, match=message):
        check_tensors("f", {"x": x, "y": y, "z": z})


@pytest.mark.parametrize("index", [X, X > 0, INDEX.to(torch.uint8)], ids=lambda index: str(index.dtype))
def test_indices_that_are_no_integers_are_named(index):
    with pytest.raises(ValueError, match=f"^f: i must be of integers, got {index.dtype}; int32 and int64 are taken$"):
        check_tensors("f", {"x": X}, integers={"i": index})


@pytest.mark.parametrize("place", ["others", "optional"])
def test_complex_numbers_are_named(place):
    with pytest.raises(ValueError, match=r"^f: y must be of real numbers, got torch\.complex64$"):
        check_tensors("f", {"x": X}, **{place: {"y": X.to(torch.complex64)}})


def test_devices_that_differ_are_named():
    with pytest.raises(ValueError, match="^f: x, i, o and p must be on one device, got cpu, cpu, meta, cpu$"):
        check_tensors("f", {"x": X}, {"i": INDEX}, {"o": X.to("meta")}, {"p": X})
