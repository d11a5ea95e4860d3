"""`trunkline tune` without a GPU: what is timed for a config, by a pretended clock, and what is kept of it."""

import json

import pytest
import torch

from trunkline.engine.device import read_tuned, tuned_file
from trunkline.engine.engine import Engine
from trunkline.engine.network.compiled import FixedShapes
from trunkline.kernels.decisions import use
from trunkline.kernels.tasks import task_loss_triton
from trunkline.training.config_file import load_config
from trunkline.training.data.batches import Packer, make_mixer
from trunkline.training.data.corpus import load_corpus
from trunkline.training.run.compiling import sample_of
from trunkline.training.self_test import OPS
from trunkline.training.tuning.contest import Work
from trunkline.training.tuning.tune import ROUNDS, tune_works
from trunkline.training.tuning.workloads import sizes_of, work

CARD = {"device": "NVIDIA Pretended 100", "driver": "1.2", "torch": "2.0", "triton": "3.0", "trunkline": "0.1.0"}


@pytest.fixture(autouse=True)
def nothing_used():
    yield
    use({})


def test_cpu_is_refused_in_a_line(trunkline, tiny_config):
    result = trunkline("tune", tiny_config, expect=2)
    assert result.stderr == "trunkline: tune: there is nothing to tune on cpu: every op has one way of working there\n"
    assert result.stdout == ""


@pytest.fixture(scope="module")
def batch_of(tiny_config):
    """Model and batch of the tiny run, with settings changed."""

    def make(*values: str):
        config = load_config(tiny_config, list(values))
        engine = Engine.from_config(config)
        corpus = load_corpus(config, None, tell=lambda _: None)
        model = engine.build(corpus.tokenizer)
        packer = Packer(corpus.train, config)
        packed = [packer.pack(m, config.batch.tokens) for m in sample_of(config, make_mixer(config, corpus))[:2]]
        return model, FixedShapes.of(packed, model.groups).pad(packed[0])

    return make


def test_sizes_are_those_of_the_configs_batches(batch_of):
    model, batch = batch_of()
    sizes = sizes_of(model, batch, balances=True)
    assert sizes.keys() == {"attention", "task_projection", "task_loss", "linear_cross_entropy", "task_gradients"}
    assert sizes["attention"]["lengths"] == batch.plan.cu_seqlens.diff().tolist()
    assert (sizes["attention"]["heads"], sizes["attention"]["head_dim"]) == (4, 8)
    of_groups = [sum(batch.rows.counts[a:b]) for a, b in ((0, 3), (4, 6))]  # one task predicts spans
    assert [sizes[name]["rows"] for name in ("task_loss", "linear_cross_entropy")] == of_groups
    assert sizes["linear_cross_entropy"]["vocabulary"] == len(model.vocabulary_weight)
    for op in OPS:  # and each op takes them
        if op.name in sizes:
            of_op = work(op, sizes[op.name], torch.device("cpu"), torch.float32)
            assert of_op.problem() == ""
            of_op.call()


def test_only_ops_that_a_step_calls_are_timed(batch_of):
    assert sizes_of(*batch_of("projection=''", "adapters={rank: 2}"), balances=False).keys() == {
        "attention", "task_loss", "linear_cross_entropy", "low_rank",
    }  # fmt: skip


@pytest.mark.parametrize("op", OPS, ids=[op.name for op in OPS])
def test_work_calls_the_op_and_sees_what_is_wrong_with_it(op):
    right = work(op, op.sizes, torch.device("cpu"), torch.float32)
    assert right.problem() == ""
    assert right.call() is not None
    wrong = work(
        op._replace(function=lambda **a: op.function(**a) * 1.01), op.sizes, torch.device("cpu"), torch.float32
    )
    assert "times what is allowed" in wrong.problem()


def rows_block() -> int:
    return task_loss_triton._rows_block(True, 4)


def pretended(name: str = "task_loss") -> Work:
    return Work(name, rows_block, lambda: "" if rows_block() else "")


def test_what_is_fastest_is_kept_and_used(own_cache):
    told, times = [], []

    def clock(call) -> float:
        times.append(call())
        return {16: 2e-3, 32: 1e-3}[call()]

    rows = tune_works([pretended()], CARD, clock, told.append)
    assert [(row.answer, row.chosen) for row in rows] == [(16, False), (32, True)]
    assert times == [16, 32] * (ROUNDS + 1)  # in turns
    assert told == [
        "\ntask_loss",
        "   task_loss_triton.rows_block (True, 4): 16: 2,000 us",
        "-> task_loss_triton.rows_block (True, 4): 32: 1,000 us",
    ]
    choices, about = read_tuned(CARD)
    assert choices == {"task_loss_triton.rows_block": {"True, 4": 32}}
    assert about == f"tuned for NVIDIA Pretended 100: 1 choices of {tuned_file(CARD['device'])}"
    assert rows_block() == 16
    use(choices)
    assert rows_block() == 32


def test_what_was_found_before_a_crash_is_kept(own_cache):
    def works():
        yield pretended()
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError):
        tune_works(works(), CARD, lambda call: 1 / call(), lambda _: None)
    assert read_tuned(CARD)[0]["task_loss_triton.rows_block"] == {"True, 4": 32}


def test_choices_for_other_facts_stay(own_cache):
    tune_works([pretended()], CARD, lambda call: 1 / call(), lambda _: None)
    other = Work(
        "op", lambda: task_loss_triton._rows_block(True, 9), lambda: str(task_loss_triton._rows_block(True, 9))[:0]
    )
    tune_works([other], CARD, lambda call: 1 / call(), lambda _: None)
    assert read_tuned(CARD)[0] == {"task_loss_triton.rows_block": {"True, 4": 32, "True, 9": 32}}
    assert json.loads(tuned_file(CARD["device"]).read_text())["made on"] == CARD
