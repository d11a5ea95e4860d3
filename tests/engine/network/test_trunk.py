"""The trunk: no sequence of a packed batch sees another, and its shapes are those of Hugging Face's models."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from trunkline.engine.network.packing import Example, PackedBatch, pack
from trunkline.engine.network.trunk import Trunk, TrunkConfig, gelu_tanh, occurred_before, preset
from trunkline.kernels.attention.attention import attention

_SMALL = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48, "max_positions": 256}
_GATED = {"norm": "rms", "norm_eps": 1e-6, "activation": "swiglu", "bias": False}
_LLAMA = {"positions": "rotary", "rope_theta": 500.0, **_GATED}
SHAPES = {
    "gpt2": TrunkConfig(**_SMALL, activation="gelu_tanh"),
    "llama": TrunkConfig(**_SMALL, **_LLAMA, num_kv_heads=2),
    "qwen2": TrunkConfig(**_SMALL, **_LLAMA, num_kv_heads=1, qkv_bias=True),
    "qwen3": TrunkConfig(**_SMALL, **_LLAMA, num_kv_heads=2, head_dim=16, qk_norm=True),
    "bert": TrunkConfig(
        **_SMALL, norm_position="post", norm_eps=1e-12, embedding_norm=True, causal=False, token_types=2
    ),
    "exact match": TrunkConfig(**_SMALL, exact_match=True),
}
LENGTHS = [5, 1, 30, 64, 100, 129, 128, 200]
TAIL = 7  # tokens of the dummy sequence
BUDGET = sum(LENGTHS) + TAIL
VOCABULARY = 2 * BUDGET

every_shape = pytest.mark.parametrize("shape", SHAPES)
causal_or_not = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def randomise(module: torch.nn.Module) -> None:
    """Weights so large that every part of the model shows in its output."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def make(shape: str, **changes) -> Trunk:
    trunk = Trunk(replace(SHAPES[shape], vocab_size=VOCABULARY, **changes)).eval()
    randomise(trunk)
    return trunk


def sequences() -> list[np.ndarray]:
    """No token occurs twice, so the gradient of the embedding is that of every token of the stream; 0 is the tail's."""
    return np.split(np.arange(1, sum(LENGTHS) + 1), np.cumsum(LENGTHS)[:-1])


def packed(sequences: list[np.ndarray], budget: int | None = None) -> PackedBatch:
    return pack(
        [Example(task=0, tokens=tokens, rows=np.array([0, len(tokens) - 1])) for tokens in sequences], 1, budget
    )


def run(trunk: Trunk, batch: PackedBatch, rows: Tensor | None = None) -> Tensor:
    return trunk(batch.tokens, batch.positions, batch.plan, rows)


@every_shape
@causal_or_not
def test_no_sequence_sees_another(shape, causal):
    trunk = make(shape, causal=causal)
    upstream = torch.randn(BUDGET, 32)

    def states_and_gradients(sequences: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Of every token of the vocabulary; zero for those that the batch lacks."""
        batch = packed(sequences, BUDGET)
        states = run(trunk, batch)
        gradient = torch.autograd.grad(states, trunk.tokens.weight, upstream)[0]
        return torch.zeros(VOCABULARY, 32).index_copy(0, batch.tokens, states.detach()), gradient

    before = states_and_gradients(sequences())
    for changed in range(len(LENGTHS)):
        batch = sequences()
        others = np.concatenate([[0], *batch[:changed], *batch[changed + 1 :]])
        batch[changed] = batch[changed] + sum(LENGTHS)
        after = states_and_gradients(batch)
        for x, y in zip(before, after, strict=True):
            assert torch.equal(x[others], y[others])
            assert not torch.equal(x[batch[changed] - sum(LENGTHS)], y[batch[changed]])


@every_shape
@causal_or_not
def test_packed_is_what_each_sequence_is_alone(shape, causal):
    trunk = make(shape, causal=causal)
    batch = packed(sequences(), BUDGET)
    states = run(trunk, batch).split(batch.plan.cu_seqlens.diff().tolist())
    for example, state in zip(batch.order, states, strict=False):  # without the tail
        torch.testing.assert_close(state, run(trunk, packed([sequences()[example]])))


@every_shape
def test_causal_trunk_does_not_see_the_future(shape):
    trunk = make(shape, causal=True)
    tokens = np.arange(200)
    state, longer = (run(trunk, packed([tokens[:length]])) for length in (150, 200))
    torch.testing.assert_close(state, longer[:150])


@every_shape
def test_rows_are_rows_of_all(shape):
    trunk, batch = make(shape), packed(sequences(), BUDGET)
    token = batch.rows.token
    upstream = torch.randn(len(token), 32)
    some, whole = run(trunk, batch, token), run(trunk, batch)[token]
    assert some.shape == (2 * len(LENGTHS), 32)
    torch.testing.assert_close(some, whole)
    parameters = list(trunk.parameters())
    for got, expected in zip(
        torch.autograd.grad(some, parameters, upstream),
        torch.autograd.grad(whole, parameters, upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)  # sums of 665 tokens in another order


def test_function_in_place_of_a_plan_decides_what_is_seen():
    trunk, batch, layers = make("llama"), packed(sequences()), []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rows: None) -> Tensor:
        layers.append(layer)
        return attention(q, k, v, batch.plan, causal=True)

    assert torch.equal(trunk(batch.tokens, batch.positions, attend), run(trunk, batch))
    assert layers == [0, 1]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
def test_compiled_gelu_is_the_same():
    traced = []

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        traced.append(graph.code)
        return graph

    x = torch.linspace(-9, 9, 999, dtype=torch.float64, requires_grad=True)
    compiled, eager = torch.compile(gelu_tanh, fullgraph=True, backend=backend)(x), gelu_tanh(x)
    assert "sigmoid" in traced[0]
    torch.testing.assert_close(compiled, eager)
    gradients = (torch.autograd.grad(y.sum(), x)[0] for y in (compiled, eager))
    torch.testing.assert_close(*gradients)


def test_exact_match_marks_what_occurred_before_in_the_same_sequence():
    random = np.random.default_rng(0)
    texts = [random.integers(0, 20, length) for length in (1, 9, 30, 64, 100, 2, 150)]
    batch, trunk = packed(texts), Trunk(replace(SHAPES["exact match"], vocab_size=20)).eval()
    bounds = batch.plan.cu_seqlens.tolist()
    expected = [
        token in batch.tokens[start:place].tolist()
        for start, end in zip(bounds[:-1], bounds[1:], strict=True)
        for place, token in enumerate(batch.tokens[start:end].tolist(), start)
    ]
    assert 100 < sum(expected) < 300
    assert occurred_before(batch.tokens, batch.positions).tolist() == expected
    marked = trunk.tokens.weight[batch.tokens] + trunk.positions.weight[batch.positions]
    marked[torch.tensor(expected)] += trunk.match
    torch.testing.assert_close(trunk.embed(batch.tokens, batch.positions), marked)


def test_rotary_positions_are_relative():
    trunk, batch = make("llama"), packed([np.arange(1, 50)])
    moved = trunk(batch.tokens, batch.positions + 100, batch.plan)
    torch.testing.assert_close(moved, run(trunk, batch), atol=1e-4, rtol=1e-4)  # angles of 150 in float32
    assert not torch.allclose(trunk(batch.tokens, 2 * batch.positions, batch.plan), run(trunk, batch), atol=1e-2)


@every_shape
def test_bfloat16(shape):
    trunk, batch = make(shape), packed(sequences())
    exact = run(trunk, batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(trunk, batch)
    pure = run(trunk.bfloat16(), batch)
    assert pure.dtype == torch.bfloat16
    for states in (mixed, pure):
        assert (states - exact).norm() < 0.05 * exact.norm()


def test_dropout_only_in_training():
    trunk, batch = make("gpt2", dropout=0.5), packed(sequences())
    assert torch.equal(run(trunk, batch), run(trunk, batch))
    trunk.train()
    kept = trunk.embed(batch.tokens, batch.positions) != 0
    assert 0.48 < kept.float().mean() < 0.52


@every_shape
def test_dropout_leaves_nothing_but_the_residual_stream(shape):
    block, x = make(shape, dropout=1.0, norm_position="pre").blocks[0].train(), torch.randn(50, 32)
    assert torch.equal(block(x, None, lambda layer, q, k, v, rows: q), x)


def test_norm_of_queries_and_keys_is_rms():
    block = make("gpt2", qk_norm=True).blocks[0]
    x = torch.randn(3, 8)
    assert block.attention_norm.bias is not None
    for norm in (block.query_norm, block.key_norm):
        torch.testing.assert_close(norm(x), norm.weight * x / x.square().mean(-1, keepdim=True).sqrt())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
def test_compiles():
    trunk, batch = make("qwen3", num_layers=1, exact_match=True), packed(sequences())
    compiled = torch.compile(trunk, fullgraph=True, backend="aot_eager")
    states, expected = run(compiled, batch, batch.rows.token), run(trunk, batch, batch.rows.token)
    torch.testing.assert_close(states, expected)
    parameters = list(trunk.parameters())
    got, wanted = (torch.autograd.grad(x.square().sum(), parameters) for x in (states, expected))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("small", 124_439_808),  # GPT-2
        ("medium", 354_823_168),  # GPT-2 medium
        ("bert-base", 108_891_648),  # BERT base uncased, without its pooler
    ],
)
def test_preset_has_the_published_size(name, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in Trunk(name).parameters()) == parameters


def test_initial_weights():
    trunk = Trunk(preset("tiny", num_layers=2))
    deviations = {name: p.std().item() for name, p in trunk.named_parameters() if p.ndim == 2}
    for name, deviation in deviations.items():  # 0.02, and half of it where the two sublayers of each of two blocks end
        expected = 0.01 if name.endswith(("attention_out.weight", "mlp_out.weight")) else 0.02
        assert deviation == pytest.approx(expected, rel=0.02), name
    assert all(not p.any() for name, p in trunk.named_parameters() if name.endswith("bias"))


def test_preset_fields_can_be_changed():
    assert preset("small", num_layers=3) == replace(preset("small"), num_layers=3)
    assert preset("small").num_layers == 12


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 30, "num_heads": 4}, "trunk: hidden_size 30 is not a multiple of num_heads 4"),
        ({"num_heads": 4, "num_kv_heads": 3}, "trunk: num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"positions": "rotary", "head_dim": 7}, "trunk: rotary positions need an even head width, got 7"),
    ],
)
def test_contradicting_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        TrunkConfig(**fields)


def test_unknown_preset_is_named():
    with pytest.raises(ValueError, match="trunk: unknown preset 'large'; there are tiny, small, medium, bert-base"):
        Trunk("large")
