"""The measurement of training steps with adapters measures what it says."""

import sys

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from trunkline.benchmarks.systems import adapters
from trunkline.engine.network.trunk import Trunk
from trunkline.engine.settings import Adapters

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT asks for it
]


def test_everything_runs_and_nothing_is_recorded(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["adapters.py", "--quick", "--rounds", "1", "--tokens", "1024"])
    monkeypatch.setattr(adapters, "record", lambda *content: pytest.fail("recorded"))
    adapters.main()
    printed = capsys.readouterr().out
    for line in ("full", "100 adapters", "PEFT, 8 runs", "time, adapters / full", "memory, one more task / trunk"):
        assert f"\n{line}  " in f"\n{printed}"


def test_both_have_the_same_texts():
    texts = [example for number in range(3) for example in adapters.texts(8, 512, adapters.SMALL, number)]
    assert adapters.real_tokens(texts) == 3 * 512
    batches = adapters.by_length(texts, 3)
    assert sorted(map(id, (example for batch in batches for example in batch))) == sorted(map(id, texts))
    assert all(350 < adapters.real_tokens(batch) < 650 for batch in batches)
    ends = sorted((min(lengths), max(lengths)) for lengths in ([len(e.tokens) for e in batch] for batch in batches))
    assert all(last[1] <= first[0] for last, first in zip(ends, ends[1:], strict=False))
    assert adapters.padding(batches) < adapters.padding([texts])
    assert {example.task for example in adapters.texts(100, 1024, adapters.SMALL, 0)} == set(range(100))


def test_a_model_that_computes_something_else_is_not_timed():
    trunk = Trunk(adapters.SMALL)
    texts = [adapters.texts(8, 256, adapters.SMALL, 0)]
    ours, theirs = adapters.Ours(trunk, texts, 8, Adapters(4, of="shared")), adapters.Peft(trunk)
    adapters.hold_against(ours, theirs, texts[0])
    with torch.no_grad():
        trunk.blocks[1].mlp_out.weight[0] += 0.1
    with pytest.raises(AssertionError, match="not close"):
        adapters.hold_against(ours, theirs, texts[0])


def test_memory_is_that_of_what_learns():
    """Weights, gradients and the two means of AdamW; a number of 4 bytes counts the steps of each tensor."""
    texts = [adapters.texts(8, 256, adapters.SMALL, 0)]
    of_task, shared = (adapters.Ours(Trunk(adapters.SMALL), texts, 8, Adapters(4, of=of)) for of in ("task", "shared"))
    for system in (of_task, shared):
        system.step(0)
    one = sum(p.numel() for p in shared.model.adapters.parameters())
    D, G, M = 192, 64, 1536  # of queries, keys and values, and of the MLP
    assert one == 2 * 4 * (2 * (D + D) + 2 * (D + G) + 3 * (D + M))
    assert of_task.held() - shared.held() == 7 * 4 * 4 * one
