"""What a compiled step moves and launches on a GPU, counted on this machine."""

import importlib.util

import pytest

from trunkline.benchmarks.systems.compiled_step import GENERATED, PRODUCTS, Count, count
from trunkline.benchmarks.systems.training_systems import SHAPES, Shape
from trunkline.engine.network.trunk import preset

TOKENS, LAYERS = SHAPES["small"].tokens, SHAPES["small"].trunk.num_layers
# Bytes that generated kernels of a step of `small` move at most; with a residual stream of float32 41e9, and 32e9 where
# the gradients of queries, keys and values are copied into one tensor.
GOAL = 29e9

pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton, which is for Linux"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch's own compiler
]


@pytest.fixture(scope="module")
def counts() -> list[Count]:
    """Of `small` with one and two layers, and a small vocabulary."""
    return [count(Shape(preset("small", num_layers=n, vocab_size=8192), TOKENS)) for n in (1, 2)]


def test_a_block_moves_no_more_than_its_share_of_the_goal(counts):
    one, two = counts
    assert 0 < two.bytes - one.bytes <= GOAL / LAYERS


def test_a_block_has_four_linear_layers_and_one_attention(counts):
    one, two = (c.calls for c in counts)
    added = two - one
    assert added[PRODUCTS] == 4 + 8  # forward; dx and dW
    assert added["attention_forward"] == added["attention_backward"] == 1
    assert added[GENERATED] > 0
