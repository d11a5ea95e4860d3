"""The trunk: no sequence of a packed batch sees another, and its shapes are those of Hugging Face's models."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from trunkline.engine.network.packing import Example, PackedBatch, PackPlan, pack
from trunkline.engine.network.trunk import Block, Norm, Trunk, TrunkConfig, gelu_tanh, occurred_before, preset
from trunkline.kernels.attention.attention import attention

_SMALL = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48, "max_positions": 256}
_GATED = {"norm": "rms", "norm_eps": 1e-6, "activation": "swiglu", "bias": False}
_LLAMA = {"positions": "rotary", "rope_theta": 500.0, **_GATED}
_LOCAL = {"positions": "rotary", "embedding_norm": True, "first_norm": False, "norm_bias": False}
_LOCAL |= {"activation": "geglu", "bias": False}
SHAPES = {
    "gpt2": TrunkConfig(**_SMALL, activation="gelu_tanh"),
    "llama": TrunkConfig(**_SMALL, **_LLAMA, num_kv_heads=2),
    "qwen2": TrunkConfig(**_SMALL, **_LLAMA, num_kv_heads=1, qkv_bias=True),
    "qwen3": TrunkConfig(**_SMALL, **_LLAMA, num_kv_heads=2, head_dim=16, qk_norm=True),
    "bert": TrunkConfig(
        **_SMALL, norm_position="post", norm_eps=1e-12, embedding_norm=True, causal=False, token_types=2
    ),
    "roberta": TrunkConfig(
        **_SMALL, norm_position="post", embedding_norm=True, causal=False, token_types=1, position_offset=2
    ),
    "modernbert": TrunkConfig(
        **_SMALL | {"num_layers": 3}, **_LOCAL, rope_theta_local=50.0, window=9, global_every=2, last_layer=True
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

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rows: None, whole: Tensor | None) -> Tensor:
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


@causal_or_not
def test_a_local_layer_sees_its_window_and_no_more(causal):
    """A token 64 places away has influence, one 65 places away has none; in between global layers everything has."""
    config = TrunkConfig(
        **_SMALL | {"num_layers": 2}, **_LOCAL, vocab_size=300, window=64, global_every=2, causal=causal
    )
    trunk = Trunk(config).eval()
    randomise(trunk)
    tokens = np.arange(200)
    seen: dict[str, set[int]] = {"local": set(), "whole": set()}
    plain = packed([tokens])

    def states(tokens: np.ndarray) -> dict[str, Tensor]:
        """Of the token in the middle: after both layers, and after the local one alone."""
        batch = packed([tokens])
        both = run(trunk, batch)[100]
        x, angles = trunk.embed(batch.tokens, batch.positions), trunk.angles(batch.positions)
        window = config.window_of(1)
        attend = lambda layer, q, k, v, rows, whole: attention(q, k, v, plain.plan, causal=causal, window=window)  # noqa: E731
        return {"whole": both, "local": trunk.blocks[1](x, angles, attend)[100]}

    before = states(tokens)
    for place in (0, 35, 36, 99, 101, 164, 165, 199):
        changed = tokens.copy()
        changed[place] = 250
        after = states(changed)
        for kind, found in seen.items():
            if not torch.equal(after[kind], before[kind]):
                found.add(place)
    later = set() if causal else {101, 164}
    assert config.window_of(0) is None
    assert seen["local"] == {36, 99} | later
    assert seen["whole"] == {0, 35, 36, 99} | (set() if causal else {101, 164, 165, 199})


def test_waves_of_local_layers_are_their_own():
    trunk, batch = make("modernbert"), packed([np.arange(1, 80)])
    before = run(trunk, batch)
    trunk.config = replace(trunk.config, rope_theta_local=None)
    same = run(trunk, batch)
    trunk.config = replace(trunk.config, rope_theta_local=trunk.config.rope_theta)
    assert torch.equal(run(trunk, batch), same)
    assert not torch.allclose(same, before, atol=1e-3)


def test_token_types_are_added_where_there_are_any():
    trunk, batch = make("bert"), packed([np.arange(1, 20), np.arange(20, 50)], 60)
    types = (torch.arange(60) % 3 == 0).to(torch.uint8)
    embedded = trunk.tokens.weight[batch.tokens] + trunk.positions.weight[batch.positions]
    expected = trunk.embedding_norm(embedded + trunk.token_types.weight[types.long()])
    torch.testing.assert_close(trunk.embed(batch.tokens, batch.positions, types=types), expected)
    assert torch.equal(run(trunk, batch), trunk(batch.tokens, batch.positions, batch.plan, types=0 * types))
    other = make("gpt2")
    assert torch.equal(run(other, batch), other(batch.tokens, batch.positions, batch.plan, types=types))


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
    block, x = make(shape, dropout=0.5, norm_position="pre").blocks[0].train(), torch.randn(50, 32)
    for module in block.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 1.0
    assert torch.equal(block(x, None, lambda layer, q, k, v, rows, whole: q), x)


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


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_under_autocast_the_residual_stream_has_16_bits(norm_position):
    """Between blocks and into every linear layer; in float32 it would be a quarter of a step's traffic. Norms are
    taken in float32 all the same."""
    torch.manual_seed(0)
    trunk = Trunk(TrunkConfig(vocab_size=50, hidden_size=64, num_layers=2, num_heads=2, norm_position=norm_position))
    seen: dict[str, torch.dtype] = {}
    for name, module in trunk.named_modules():
        if isinstance(module, Block | torch.nn.Linear | Norm):
            module.register_forward_hook(lambda module, inputs, y, name=name: seen.update({name: y.dtype}))
    tokens = torch.randint(50, (30,))
    with torch.autocast("cpu", torch.bfloat16):
        x = trunk(tokens, torch.arange(30), PackPlan.of_runs([[30]]))
    assert set(seen.values()) == {x.dtype} == {torch.bfloat16}
    assert trunk(tokens, torch.arange(30), PackPlan.of_runs([[30]])).dtype == torch.float32
    wide = (100 + torch.randn(30, 64)).bfloat16()  # whose variance 16 bits would lose
    norm = Norm(trunk.config)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(wide)
    torch.testing.assert_close(y.double(), torch.nn.functional.layer_norm(wide.double(), (64,)), rtol=2**-8, atol=1e-5)
