"""What attention cannot take is an error that says so."""

import pytest
import torch

from streams import bounds, make
from trunkline.kernels.attention.attention import attention
from trunkline.kernels.attention.pack_plan import PackPlan


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((5, 4), (5, 2, 8), (5, 2, 8)),
        ((5, 4, 8), (5, 2, 8), (5, 4, 8)),
        ((5, 4, 8), (5, 2, 4), (5, 2, 4)),
        ((5, 4, 8), (5, 3, 8), (5, 3, 8)),
        ((5, 4, 8), (5, 0, 8), (5, 0, 8)),
        ((5, 0, 8), (5, 2, 8), (5, 2, 8)),
    ],
)
def test_wrong_shapes_are_named(q, k, v):
    message = rf"attention: q must be \(T, H, D\).*got q \[{str(q)[1:-1]}\], k \[{str(k)[1:-1]}\], v \[{str(v)[1:-1]}\]"
    with pytest.raises(ValueError, match=message):
        attention(torch.zeros(q), torch.zeros(k), torch.zeros(v), PackPlan.of_runs([[5]]), causal=True)


def test_mixed_dtypes_are_named():
    q, k, v, plan = make([[5]])
    with pytest.raises(ValueError, match=r"one dtype.*got torch\.float32, torch\.float16, torch\.float32"):
        attention(q, k.half(), v, plan, causal=True)
    with pytest.raises(ValueError, match=r"one dtype, float16.*got torch\.int64"):
        attention(q.long(), k.long(), v.long(), plan, causal=True)


def test_mixed_devices_are_named():
    q, k, v, plan = make([[5]])
    with pytest.raises(ValueError, match="on one device, got cpu, meta, cpu, cpu"):
        attention(q, k.to("meta"), v, plan, causal=True)


def test_tensor_without_all_heads_is_named():
    q, k, v, plan = make([[5]])
    with pytest.raises(ValueError, match=r"whole must be \(5, 8, 16\), the heads of q, k and v, got \[5, 6, 16\]"):
        attention(q, k, v, plan, causal=True, whole=torch.cat([q, k], 1))


def test_plan_of_another_batch_is_named():
    q, k, v, _ = make([[5]])
    with pytest.raises(ValueError, match="plan is of 6 tokens and 6 keys, got q of 5 and k of 5"):
        attention(q, k, v, PackPlan.of(bounds([6])), causal=True)
    with pytest.raises(ValueError, match="plan is of 5 tokens and 6 keys, got q of 5 and k of 5"):
        attention(q, k, v, PackPlan.of(bounds([5]), bounds([6])), causal=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\), got -0.1"),
        ({"dropout": 0.1, "seed": -1}, r"seed must be in \[0, 2\^63\), got -1"),
        ({"scale": 0.0}, "scale must be above 0, got 0.0"),
        ({"scale": -0.1}, "scale must be above 0, got -0.1"),
        ({"softcap": 0.0}, "softcap must be above 0, got 0.0"),
        ({"window": (-2, 0)}, r"window must be \(left, right\).*got \(-2, 0\)"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        attention(*make([[5]]), causal=True, **settings)


def test_heads_too_wide_are_named():
    q = torch.zeros(5, 1, 257)
    with pytest.raises(ValueError, match="heads must be 1 to 256 wide, got 257"):
        attention(q, q, q, PackPlan.of(bounds([5])), causal=True)
