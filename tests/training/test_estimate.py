"""The estimate of a run against what a step then takes; no tensor of the run's size is made for it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import Finished
from trunkline.engine.config import Config, with_vocabulary
from trunkline.engine.engine import Engine, make_model
from trunkline.training.config_file import load_config
from trunkline.training.data.batches import Packer, make_mixer
from trunkline.training.data.corpus import load_corpus
from trunkline.training.estimate import DEVICES, Memory, matrix_rate, saved_tensors, step_memory
from trunkline.training.flops import training_flops
from trunkline.training.run.optimizer import freeze, make_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")
WIDE = ["trunk.hidden_size=128", "batch.tokens=1024", "batch.accumulate=1", "trunk.dropout=0"]


def prepared(config: Config):
    """Corpus, config with its vocabulary, and some batches of the run."""
    corpus = load_corpus(config)
    config = with_vocabulary(config, corpus.tokenizer)
    mixer, packer = make_mixer(config, corpus), Packer(corpus.train, config)
    return corpus, config, packer.batches(mixer, range(4))


@pytest.mark.parametrize("width", [32, 128])  # of the narrow one half is inside attention
def test_memory_of_a_step_on_a_cpu(tiny_config: Path, tmp_path, width):
    corpus, config, batches = prepared(load_config(tiny_config, [*WIDE, f"trunk.hidden_size={width}"]))
    estimated = step_memory(config, batches, "cpu")
    model = Engine.from_config(config).build(corpus.tokenizer).train()
    optimizer = make_optimizer(model, config.optimizer)
    batch = max(batches, key=lambda batch: len(batch.rows.token))

    with saved_tensors(model) as saved:
        loss = model(batch).loss.sum()
    loss.backward()
    optimizer.step()
    assert estimated.activations == pytest.approx(sum(saved.values()), rel=0.02)
    parameters = list(model.parameters())
    assert estimated.weights == sum(p.nbytes for p in parameters) + sum(b.nbytes for b in model.buffers())
    assert estimated.gradients == sum(p.grad.nbytes for p in parameters)
    states = [tensor for p in parameters for tensor in optimizer.state[p].values()]
    assert estimated.optimizer == sum(tensor.nbytes for tensor in states)

    optimizer.zero_grad()
    made = most_allocated(lambda: model(batch).loss.sum().backward(), tmp_path)
    assert estimated.peak == pytest.approx(estimated.weights + estimated.optimizer + made, rel=0.05)


def test_memory_of_adapters(tiny_config):
    """They alone have gradients and an optimizer's state; on a GPU the trunk is kept in bfloat16."""
    wide = [*WIDE, "adapters.rank=8", "mixing.method=temperature", "balancing=fixed"]
    corpus, config, batches = prepared(load_config(tiny_config, wide))
    estimated = step_memory(config, batches, "cpu")
    model = Engine.from_config(config).build(corpus.tokenizer).train()
    freeze(model, ())
    optimizer = make_optimizer(model, config.optimizer)
    model(batches[0]).loss.sum().backward()
    optimizer.step()
    learnt = [p for p in model.parameters() if p.grad is not None]
    assert estimated.gradients == sum(p.grad.nbytes for p in learnt)
    assert estimated.optimizer == sum(t.nbytes for p in learnt for t in optimizer.state[p].values())
    assert {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None} >= {"adapters"}
    assert not [p for p in model.trunk.parameters() if p.grad is not None]
    matrices = sum(p.nbytes for p in model.trunk.parameters() if p.ndim > 1)
    assert step_memory(config, batches, "cuda").weights == estimated.weights - matrices // 2
    full = sum(training_flops(make_model(replace(config, adapters=None)), batch) for batch in batches)
    assert 2 / 3 < sum(training_flops(model, batch) for batch in batches) / full < 0.9


def most_allocated(work, folder) -> int:
    """Bytes that PyTorch's own allocator had given out at most during `work`, beyond what there was before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        work()
    profile.export_chrome_trace(str(folder / "memory.json"))
    trace = json.loads((folder / "memory.json").read_text())["traceEvents"]
    events = [event["args"] for event in trace if event.get("name") == "[memory]"]
    before = events[0]["Total Allocated"] - events[0]["Bytes"]
    return max(event["Total Allocated"] for event in events) - before


@pytest.mark.gpu
@pytest.mark.parametrize("values", [WIDE, ["trunk.hidden_size=512", "trunk.num_layers=6", "batch.tokens=8192"]])
def test_memory_of_a_step_on_a_gpu(tiny_config, values):
    pytest.importorskip("jsonargparse")  # `make gpu` runs where there is little besides torch
    corpus, config, batches = prepared(load_config(tiny_config, [*values, "device=cuda", "batch.accumulate=1"]))
    estimated = step_memory(config, batches, "cuda")
    engine = Engine.from_config(config)
    model = engine.build(corpus.tokenizer).train()
    optimizer = make_optimizer(model, config.optimizer)
    batch = max(batches, key=lambda batch: len(batch.rows.token)).to("cuda")
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with engine.autocast():
            loss = model(batch).loss.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert estimated.peak == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)


def test_more_tokens_take_more_activations_and_the_same_weights(tiny_config):
    def memory(*values: str) -> Memory:
        corpus, config, batches = prepared(load_config(tiny_config, values))
        return step_memory(config, batches, "cpu")

    small, large = memory("batch.tokens=256"), memory("batch.tokens=1024")
    assert (small.weights, small.gradients, small.optimizer) == (large.weights, large.gradients, large.optimizer)
    assert large.activations == pytest.approx(4 * small.activations, rel=0.2)
    assert large.peak > small.peak > small.weights + small.optimizer


def test_the_command_prints_everything(finished: Finished, trunkline):
    output = trunkline("estimate", finished.config, "steps=500").stdout
    summary = json.loads((finished.run / "summary.json").read_text())
    assert f"parameters: {summary['parameters']:,}; trunk" in output
    for part in ("a CPU, float32: weights", "a GPU, products in bfloat16: weights", "TFLOP a step", "in 500 steps"):
        assert part in output
    rows = dict(
        re.findall(
            r"^(\S.+?) +[\d.e-]+ +\d+% +[\d.e+-]+ +((?:(?:below )?[\d.]+ (?:h|min|s) ?)+)$", output, re.MULTILINE
        )
    )
    assert [*rows][1:] == [*DEVICES]
    assert "this CPU" in [*rows][0]
    assert "0 s" not in rows.values()  # as if it took no time


def test_the_command_refuses_what_training_refuses(tiny_config, trunkline):
    assert "did you mean 'steps'?" in trunkline("estimate", tiny_config, "stepz=1", expect=2).stderr


def test_the_matrix_rate_is_one():
    assert 1e9 < matrix_rate(0.05) < 1e14
