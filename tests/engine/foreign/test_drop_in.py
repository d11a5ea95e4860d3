"""The functions and the module of other libraries, each against the thing it replaces or its definition."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trunkline

HEADS, WIDTH = 4, 8
pytestmark = pytest.mark.usefixtures("fresh_counts")


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def assert_same(ours, theirs, inputs: tuple[Tensor, ...]) -> None:
    """Output and gradients of two functions of the same inputs."""
    results = []
    for function in (ours, theirs):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        generator = torch.Generator().manual_seed(0)
        upstream = torch.randn(out.shape, generator=generator, dtype=out.dtype)
        results.append((out, *torch.autograd.grad(out, leaves, upstream)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, scale=None, causal=False, window_size=(-1, -1), softcap=0.0
) -> Tensor:
    """What flash-attn 2 documents, one sequence (S, H, D) against (K, G, D)."""
    S, K, repeat = len(q), len(k), q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
    scores = torch.einsum("shd,khd->hsk", q, k) * (scale or q.shape[2] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    ahead = torch.arange(K) - (torch.arange(S)[:, None] + K - S)
    left, right = window_size
    hidden = (ahead > 0) & causal
    hidden = hidden | ((ahead < -left) & (left >= 0)) | ((ahead > right) & (right >= 0))
    scores = scores.masked_fill(hidden, -math.inf).masked_fill(hidden.all(-1, keepdim=True), 0.0)
    weights = scores.softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0.0)
    return torch.einsum("hsk,khd->shd", weights, v)


SETTINGS = {
    "default": {},
    "causal": {"causal": True},
    "scale": {"softmax_scale": 0.1},
    "window": {"window_size": (3, 1)},
    "left window": {"window_size": (2, -1)},
    "causal window": {"causal": True, "window_size": (4, 2)},
    "softcap": {"softcap": 0.5, "causal": True},
}


@pytest.mark.parametrize(("S", "K"), [(7, 7), (3, 9), (9, 3), (1, 5), (130, 130)])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_flash_attn_func(settings, S, K):
    definition = {name.replace("softmax_", ""): value for name, value in settings.items()}
    assert_same(
        lambda *x: trunkline.flash_attn_func(*x, **settings),
        lambda *x: torch.stack([flash_attention(*row, **definition) for row in zip(*x, strict=True)]),
        (random(2, S, HEADS, WIDTH), random(2, K, 2, WIDTH), random(2, K, 2, WIDTH)),
    )
    assert trunkline.attention_counts() == {"flash_attn_func": 1}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_flash_attn_varlen_func(settings):
    lengths, lengths_k = [3, 0, 7, 1, 140], [5, 2, 0, 1, 140]
    cu, cu_k = (torch.tensor([0, *x]).cumsum(0, dtype=torch.int32) for x in (lengths, lengths_k))
    definition = {name.replace("softmax_", ""): value for name, value in settings.items()}

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bounds = zip(pairwise(cu.tolist()), pairwise(cu_k.tolist()), strict=True)
        return torch.cat([flash_attention(q[a:b], k[c:d], v[c:d], **definition) for (a, b), (c, d) in bounds])

    assert_same(
        lambda *x: trunkline.flash_attn_varlen_func(*x, cu, cu_k, 140, 140, **settings),
        theirs,
        (random(sum(lengths), HEADS, WIDTH), random(sum(lengths_k), 2, WIDTH), random(sum(lengths_k), 2, WIDTH)),
    )


@pytest.mark.parametrize(("B", "S", "K"), [(2, 0, 3), (2, 3, 0), (2, 0, 0), (0, 3, 3), (0, 0, 0), (1, 0, 0)])
def test_flash_attention_of_nothing(B, S, K):
    q, k, v = (random(B, length, HEADS, WIDTH).requires_grad_() for length in (S, K, K))
    out = trunkline.flash_attn_func(q, k, v)
    assert torch.equal(out, torch.zeros_like(q))
    assert not any(gradient.any() for gradient in torch.autograd.grad(out.sum(), (q, k, v)))


def test_flash_attention_drops_weights():
    q, k, v = random(1, 64, HEADS, WIDTH), random(1, 64, HEADS, WIDTH), torch.ones(1, 64, HEADS, WIDTH).double()
    torch.manual_seed(0)
    out = trunkline.flash_attn_func(q, k, v, 0.25)
    torch.manual_seed(0)
    assert torch.equal(trunkline.flash_attn_func(q, k, v, 0.25), out)
    assert out.std() > 0.05
    assert abs(out.mean() - 1) < 0.05  # what is kept is scaled up


def test_flash_attention_names_what_it_cannot_do():
    q = random(2, 3, HEADS, WIDTH)
    packed, cu = q.flatten(0, 1), torch.tensor([0, 3, 6], dtype=torch.int32)
    for arguments in ({"alibi_slopes": torch.ones(HEADS)}, {"return_attn_probs": True}):
        (name,) = arguments
        with pytest.raises(ValueError, match=f"flash_attn_func: {name} is not supported"):
            trunkline.flash_attn_func(q, q, q, **arguments)
        with pytest.raises(ValueError, match=f"flash_attn_varlen_func: {name} is not supported"):
            trunkline.flash_attn_varlen_func(packed, packed, packed, cu, cu, 3, 3, **arguments)
    with pytest.raises(ValueError, match="flash_attn_varlen_func: block_table is not supported"):
        trunkline.flash_attn_varlen_func(packed, packed, packed, cu, cu, 3, 3, block_table=cu)
    with pytest.raises(ValueError, match=r"q must be \(B, S, H, D\).*got q \[6, 4, 8\]"):
        trunkline.flash_attn_func(packed, packed, packed)
    with pytest.raises(ValueError, match=r"q must be \(T, H, D\).*got q \[2, 3, 4, 8\]"):
        trunkline.flash_attn_varlen_func(q, q, q, cu, cu, 3, 3)
    for wrong in (cu.long(), cu + 1, cu.flip(0), cu[:2]):
        with pytest.raises(ValueError, match="cu_seqlens|plan is of"):
            trunkline.flash_attn_varlen_func(packed, packed, packed, wrong, wrong, 3, 3)


SDPA = {
    "plain": ((2, 4, 7, 8), (2, 4, 7, 8), {}),
    "more keys": ((2, 4, 3, 8), (2, 4, 7, 8), {}),
    "fewer keys": ((2, 4, 7, 8), (2, 4, 3, 8), {}),
    "scale": ((2, 4, 7, 8), (2, 4, 7, 8), {"scale": 0.3}),
    "causal": ((2, 4, 7, 8), (2, 4, 7, 8), {"is_causal": True}),
    "causal, more keys": ((2, 4, 3, 8), (2, 4, 7, 8), {"is_causal": True}),
    "causal, one query": ((2, 4, 1, 8), (2, 4, 7, 8), {"is_causal": True}),
    "causal, long": ((1, 2, 150, 8), (1, 2, 150, 8), {"is_causal": True}),
    "grouped": ((2, 4, 7, 8), (2, 2, 7, 8), {"enable_gqa": True, "is_causal": True}),
}


@pytest.mark.parametrize(("q", "k", "settings"), SDPA.values(), ids=SDPA)
def test_scaled_dot_product_attention(q, k, settings):
    assert_same(
        lambda *x: trunkline.scaled_dot_product_attention(*x, **settings),
        lambda *x: F.scaled_dot_product_attention(*x, **settings),
        (random(*q), random(*k), random(*k)),
    )
    assert trunkline.attention_counts() == {"scaled_dot_product_attention": 1}


def test_scaled_dot_product_attention_of_padded_keys():
    q, k, v = random(4, HEADS, 5, WIDTH), random(4, HEADS, 6, WIDTH), random(4, HEADS, 6, WIDTH)
    keep = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    mask = keep[:, None, None]
    assert_same(
        lambda *x: trunkline.scaled_dot_product_attention(*x, mask),
        lambda *x: F.scaled_dot_product_attention(*x, mask),
        (q, k, v),
    )
    assert not trunkline.scaled_dot_product_attention(q, k, v, mask)[3].any()  # a row without keys
    assert trunkline.attention_counts() == {"scaled_dot_product_attention": 2}


MASK = torch.ones(7, 7, dtype=torch.bool).tril()
LEFT_TO_TORCH = {
    "a matrix": ((2, 4, 7, 8), (2, 4, 7, 8), {"attn_mask": MASK}, "attn_mask is not a bool mask of keys"),
    "a bias": ((2, 4, 7, 8), (2, 4, 7, 8), {"attn_mask": MASK.double()}, "attn_mask is not a bool mask of keys"),
    "gaps": ((1, 4, 7, 8), (1, 4, 7, 8), {"attn_mask": MASK[5:6].roll(2)[None, None]}, "do not lie side by side"),
    "top-left": ((2, 4, 7, 8), (2, 4, 3, 8), {"is_causal": True}, "is_causal with fewer keys than queries"),
    "3-D": ((4, 7, 8), (4, 7, 8), {}, "inputs are not 4-D"),
    "broadcast": ((2, 4, 7, 8), (1, 4, 7, 8), {}, "the batch is broadcast or empty"),
    "wide": ((2, 4, 7, 300), (2, 4, 7, 300), {}, "wider than 256"),
    "negative scale": ((2, 4, 7, 8), (2, 4, 7, 8), {"scale": -0.5}, "scale is not above 0"),
}


@pytest.mark.parametrize(("q", "k", "settings", "reason"), LEFT_TO_TORCH.values(), ids=LEFT_TO_TORCH)
def test_what_is_left_to_torch_is_the_same_and_counted(q, k, settings, reason):
    inputs = random(*q), random(*k), random(*k)
    with pytest.warns(UserWarning, match=reason):
        out = trunkline.scaled_dot_product_attention(*inputs, **settings)
    trunkline.scaled_dot_product_attention(*inputs, **settings)  # warns once a reason; a second warning is an error
    assert torch.equal(out, F.scaled_dot_product_attention(*inputs, **settings))
    ((name, count),) = trunkline.attention_counts().items()
    assert reason in name
    assert count == 2


def test_errors_of_scaled_dot_product_attention_are_those_of_torch():
    q, k = random(2, 4, 3, 8), random(2, 3, 5, 8)
    for arguments in ((q, k, k), (q, q.long(), q)):
        with pytest.raises(RuntimeError) as theirs:
            F.scaled_dot_product_attention(*arguments)
        with pytest.raises(RuntimeError) as ours:
            trunkline.scaled_dot_product_attention(*arguments)
        assert str(ours.value) == str(theirs.value)
    assert not trunkline.attention_counts()


def test_autocast():
    q, k, v = (random(2, 4, 7, 8, dtype=torch.float32) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = trunkline.scaled_dot_product_attention(q, k, v.bfloat16())
        expected = F.scaled_dot_product_attention(q, k, v.bfloat16())
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, atol=0.01, rtol=0.02)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
def test_compiled_without_a_graph_break():
    q, k, v = (random(2, 7, 4, 8) for _ in range(3))
    cu = torch.tensor([0, 3, 14], dtype=torch.int32)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = trunkline.flash_attn_func(q, k, v, causal=True)
        packed = (x.flatten(0, 1) for x in (q, k, v))
        second = trunkline.flash_attn_varlen_func(*packed, cu, cu, 11, 11, window_size=(2, 0)).view(q.shape)
        third = trunkline.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return first + 2 * second + 3 * third.transpose(1, 2)

    assert_same(torch.compile(function, fullgraph=True, backend="aot_eager"), function, (q, k, v))


MODULES = {
    "default": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "other widths": {"kdim": 12, "vdim": 20},
    "bias of keys": {"add_bias_kv": True, "add_zero_attn": True},
}


def modules(**settings) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    """PyTorch's module and ours, with its weights."""
    theirs = nn.MultiheadAttention(32, 4, dtype=torch.float64, **settings)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = trunkline.MultiheadAttention(32, 4, dtype=torch.float64, **settings)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs_of(module: nn.MultiheadAttention, S: int = 5, K: int = 6, B: int = 3) -> list[Tensor]:
    shapes = [(S, B, 32), (K, B, module.kdim), (K, B, module.vdim)]
    inputs = [random(*shape) for shape in shapes]
    return [x.transpose(0, 1) for x in inputs] if module.batch_first else inputs


PADDING = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 1, 1]]).bool()
CALLS = {
    "weights": {},
    "weights by head": {"average_attn_weights": False},
    "no weights": {"need_weights": False},
    "padding": {"key_padding_mask": PADDING, "need_weights": False},
    "padding, weights": {"key_padding_mask": PADDING},
    "gaps": {"key_padding_mask": PADDING.roll(3, 1), "need_weights": False},
    "numbers for keys": {"key_padding_mask": torch.arange(18.0).view(3, 6).double(), "need_weights": False},
    "mask": {"attn_mask": ~MASK[:5, :6], "need_weights": False},
    "mask, weights": {"attn_mask": ~MASK[:5, :6]},
    "numbers": {"attn_mask": torch.arange(30.0).view(5, 6).double(), "need_weights": False},
    "mask by head": {"attn_mask": torch.arange(360).view(12, 5, 6) % 7 == 0, "need_weights": False},
    "both": {"attn_mask": ~MASK[:5, :6], "key_padding_mask": PADDING.flip(1).roll(1, 0), "need_weights": False},
    "causal": {"attn_mask": ~MASK[:5, :6], "is_causal": True, "need_weights": False},
    "causal, weights": {"attn_mask": ~MASK[:5, :6], "is_causal": True},
}


@pytest.mark.filterwarnings("ignore:trunkline leaves")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("settings", MODULES.values(), ids=MODULES)
def test_multihead_attention(settings, call):
    theirs, ours = modules(**settings)
    inputs = inputs_of(theirs)
    results = []
    for module in (theirs, ours):
        out, weights = module(*inputs, **call)
        gradients = torch.autograd.grad(out.square().sum(), list(module.parameters()))
        results.append((out, *([] if weights is None else [weights]), *gradients))
    assert len(results[0]) == len(results[1])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_multihead_attention_runs_on_our_kernels():
    _, ours = modules()
    query = random(6, 3, 32)
    ours(query, query, query, need_weights=False)
    ours(query, query, query, need_weights=False, key_padding_mask=PADDING)
    ours(query, query, query, need_weights=False, attn_mask=~MASK[:6, :6], is_causal=True)
    assert trunkline.attention_counts() == {"MultiheadAttention": 3, "scaled_dot_product_attention": 3}
    with pytest.warns(UserWarning, match="MultiheadAttention: need_weights=True"):
        ours(query, query, query)
    assert trunkline.attention_counts()["MultiheadAttention: need_weights=True"] == 1


@pytest.mark.filterwarnings("ignore:trunkline leaves")
@pytest.mark.parametrize("need_weights", [True, False])
def test_one_sequence_without_a_batch(need_weights):
    theirs, ours = modules()
    query, key = random(5, 32), random(6, 32)
    call = {"key_padding_mask": PADDING[2], "need_weights": need_weights}
    out, weights = ours(query, key, key, **call)
    expected, expected_weights = theirs(query, key, key, **call)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights, expected_weights)


@pytest.mark.filterwarnings("ignore:trunkline leaves")
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["bool", "numbers"])
def test_query_that_sees_no_key_gets_zero(kind, need_weights):
    _, ours = modules(batch_first=True)
    query, key = (x.requires_grad_() for x in inputs_of(ours)[:2])
    padding = torch.zeros(3, 6).bool()
    padding[1] = True
    mask = padding if kind == "bool" else torch.zeros(3, 6).double().masked_fill(padding, -math.inf)
    out, weights = ours(query, key, key, key_padding_mask=mask, need_weights=need_weights)
    torch.testing.assert_close(out[1], ours.out_proj.bias.expand(5, 32))
    assert weights is None or not weights[1].any()
    out.sum().backward()
    assert not query.grad[1].any()
    assert not key.grad[1].any()
    assert query.grad[0].any()
    assert query.grad.isfinite().all()


def test_same_parameters_in_both_directions():
    for settings in MODULES.values():
        theirs, ours = modules(**settings)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
    torch.manual_seed(3)
    fresh = nn.MultiheadAttention(32, 4).state_dict()
    torch.manual_seed(3)
    for name, value in trunkline.MultiheadAttention(32, 4).state_dict().items():
        assert torch.equal(value, fresh[name])


def test_errors_of_multihead_attention_are_those_of_torch():
    theirs, ours = modules()
    query, key, value = inputs_of(theirs)
    for arguments, call in (
        ((query, key, value), {"is_causal": True}),
        ((query[..., :31], key, value), {}),
        ((query, key, value[:5]), {}),
        ((query[0, 0], key, value), {}),
        ((query, key, value), {"key_padding_mask": PADDING[:, :5]}),
        ((query, key, value), {"attn_mask": MASK}),
        ((query, key, value), {"attn_mask": MASK[:5, :6].long()}),
    ):
        with pytest.raises((AssertionError, RuntimeError)) as expected:
            theirs(*arguments, **call)
        with pytest.raises(type(expected.value)) as got:
            ours(*arguments, **call)
        assert str(got.value) == str(expected.value)
    with pytest.raises(AssertionError, match="embed_dim must be divisible"):
        trunkline.MultiheadAttention(30, 4)


def test_dropout_of_multihead_attention():
    _, ours = modules(dropout=0.5)
    query = random(6, 3, 32)
    torch.manual_seed(0)
    out = ours(query, query, query, need_weights=False)[0]
    assert not torch.equal(ours(query, query, query, need_weights=False)[0], out)
    ours.eval()
    assert torch.equal(*(ours(query, query, query, need_weights=False)[0] for _ in range(2)))
