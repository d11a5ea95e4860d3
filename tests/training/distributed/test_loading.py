"""A checkpoint is read into slices without any rank holding the whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

import pytest
import torch
from test_cost import prepared, rank_of
from torch.profiler import ProfilerActivity, profile

from trunkline.engine.engine import make_model
from trunkline.engine.foreign import pretrained
from trunkline.engine.network.trunk import Trunk, TrunkConfig
from trunkline.training.distributed.sharding import local, shard

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = {
    "gpt2": {},  # whose matrices lie transposed
    "llama": {"positions": "rotary", "norm": "rms", "activation": "swiglu", "bias": False},  # query, key, value apart
}


@contextmanager
def most_memory() -> Iterator[list[int]]:
    """The most bytes that tensors took at a time, more than at the beginning."""
    most: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        yield most
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    most.append(max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))))


@pytest.mark.parametrize("family", SHAPES)
def test_a_rank_of_four_has_no_more_than_its_slices_in_memory(family, tiny_config, tmp_path):
    config, _ = prepared(tiny_config)
    trunk = Trunk(TrunkConfig(vocab_size=config.trunk.vocab_size, num_layers=12, **SHAPES[family]))
    trunk.save_pretrained(tmp_path)
    blocks = sum(parameter.nbytes for parameter in trunk.blocks.parameters())
    expected = {name: parameter[:1].clone() for name, parameter in trunk.blocks.named_parameters()}
    model = make_model(config, pretrained.load(str(tmp_path), 0.0, torch.float32, blocks_later=True))
    assert all(parameter.is_meta for parameter in model.trunk.blocks.parameters())
    file = list(model.trunk.waiting.values())  # stays mapped, for what is let go would be subtracted
    with rank_of(4) as first, most_memory() as most:
        shard(model, first, torch.device("cpu"))
        found = {name: local(parameter)[:1] for name, parameter in model.trunk.blocks.named_parameters()}
    assert 0.25 * blocks < most[0] < 0.33 * blocks
    assert len(file) == len(expected)
    assert not model.trunk.waiting
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, rtol=0, atol=0)
