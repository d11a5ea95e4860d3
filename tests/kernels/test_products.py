"""Products by oneDNN: the same numbers, gradients and graphs as torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trunkline.kernels import products
from trunkline.kernels.products import SMALLEST, Linear, mm, product

M, K, N = 130, 96, 112
ONEDNN = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None
ROUNDING = 1e-6  # of a sum of K products in float32, of the largest of them


@pytest.fixture(autouse=True)
def _by_onednn(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "FASTER", True)  # whatever processor the tests run on


@pytest.fixture
def calls():
    """What oneDNN was given to multiply."""

    class Calls(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.found = []

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op in (product, ONEDNN):
                self.found.append(args)
            return op(*args, **(kwargs or {}))

    with Calls() as mode:
        yield mode.found


def _close(ours, exact):
    assert (ours - exact).abs().max() <= ROUNDING * exact.abs().max() * K**0.5


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("views", ["contiguous", "transposed", "columns"])
def test_is_the_product(views, with_bias, calls):
    a, b, bias = torch.randn(M, K), torch.randn(K, N), torch.randn(2 * N)[::2] if with_bias else None
    if views == "transposed":
        a, b = a.T.contiguous().T, b.T.contiguous().T
    elif views == "columns":
        a, b = torch.randn(M, 3 * K)[:, K : 2 * K], torch.randn(K, 3 * N)[:, N : 2 * N]
    exact = a.double() @ b.double() + (0 if bias is None else bias.double())
    _close(mm(a, b, bias), exact)
    wider = torch.zeros(M, N + 3)
    out = wider[:, :N]
    assert mm(a, b, bias, out=out) is out
    _close(out, exact)
    assert not wider[:, N:].any()
    assert len(calls) == 2
    weight = calls[0][1]
    assert weight.is_contiguous() or weight.T.is_contiguous()  # others take a thousand times as long


@pytest.mark.parametrize(
    ("rows", "dtype", "enabled"),
    [(M, torch.float64, True), (M, torch.float32, False), (SMALLEST // (K * N), torch.float32, True)],
    ids=["float64", "switched off", "small"],
)
def test_all_else_is_torchs_own(rows, dtype, enabled, calls, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
    x, layer = torch.randn(rows, K, dtype=dtype), Linear(K, N, dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert torch.equal(mm(x, layer.weight.T), torch.mm(x, layer.weight.T))
    assert not calls


def test_autocast_is_heeded(calls):
    with torch.autocast("cpu", torch.bfloat16):
        assert Linear(K, N)(torch.randn(M, K)).dtype == torch.bfloat16
    assert not calls


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients(bias, compiled):
    layer, x = Linear(K, N, bias=bias), torch.randn(M, K, requires_grad=True)
    torch._dynamo.reset()
    call = torch.compile(layer, fullgraph=True) if compiled else layer
    exact = nn.Linear(K, N, bias=bias, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    exact_x = x.detach().double().requires_grad_()
    call(x).sin().sum().backward()
    exact(exact_x).sin().sum().backward()
    _close(x.grad, exact_x.grad)
    for own, wanted in zip(layer.parameters(), exact.parameters(), strict=True):
        _close(own.grad, wanted.grad)


def test_what_is_frozen_costs_no_product(calls):
    layer, x = Linear(K, N), torch.randn(M, K, requires_grad=True)
    layer.requires_grad_(False)
    layer(x).sum().backward()
    assert len(calls) == 2  # forward, and of x
    assert layer.weight.grad is None
    assert layer.bias.grad is None


def test_gradients_have_gradients():
    layer, x = Linear(K, N), torch.randn(M, K, requires_grad=True)

    def penalty(y):
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), layer.weight)[0]

    _close(penalty(layer(x)), penalty(F.linear(x, layer.weight, layer.bias)))


def test_checkpointing_can_keep_it(calls):
    layer, x = Linear(K, N), torch.randn(M, K, requires_grad=True)

    def keep(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op == product else CheckpointPolicy.PREFER_RECOMPUTE

    y = checkpoint(
        lambda x: layer(x).sin(),
        x,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(keep),
    )
    y.sum().backward()
    assert len(calls) == 3  # forward, and both gradients: nothing again


def test_the_same_bits_every_time():
    a, b = torch.randn(640, 384), torch.randn(384, 512)
    first = mm(a, b)
    assert all(torch.equal(mm(a, b), first) for _ in range(20))
