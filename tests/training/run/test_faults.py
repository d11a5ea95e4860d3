"""Steps that are not finite change nothing and are explained; batches that do not fit in memory are worked on in parts.

Numbers that are not finite are real ones, in weights, gradients and labels; only the memory is not really short.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from conftest import COLOURS, tiny_rows, write_jsonl
from trunkline import Engine, Task, TrunkConfig
from trunkline.engine import checkpoint
from trunkline.engine.config import Config
from trunkline.engine.network.compiled import FixedShapes
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.settings import Balancing, Batch, Evaluation, Optimizer
from trunkline.training.run.faults import Guard
from trunkline.training.run.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread")


def farm(folder: Path, rows: list[dict], **changes) -> Engine:
    """An engine for the colours of `rows` and the closeness of others, two batches a step."""
    write_jsonl(folder / "colour.jsonl", rows)
    write_jsonl(folder / "closeness.jsonl", tiny_rows("closeness", 20, seed=0))
    write_jsonl(folder / "validation.jsonl", tiny_rows("colour", 8, seed=1))
    tasks = (
        Task(
            "colour",
            "classify",
            ("text",),
            "label",
            tuple(COLOURS),
            train="colour.jsonl",
            validation="validation.jsonl",
        ),
        Task("close", "regress", ("first", "second"), "score", train="closeness.jsonl", validation="closeness.jsonl"),
    )
    settings = {
        # without the bias of keys: its gradient is 0 but for rounding, and AdamW makes a whole step of that
        "trunk": TrunkConfig(hidden_size=32, num_layers=2, num_heads=4, max_positions=128, qkv_bias=False),
        "vocab_size": 400,
        "steps": 1,
        "batch": Batch(tokens=256, accumulate=2, max_length=64),
        "optimizer": Optimizer(warmup=0.0),
        "evaluation": Evaluation(every=100, examples=4),
        "device": "cpu",
    }
    return Engine.from_config(
        Config(**{"tasks": tasks, **settings, "run": str(folder / "run"), "base": str(folder), **changes})
    )


def changed(engine: Engine, change: Callable[[MultiTaskModel], None], monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The engine, whose model is changed when it is made."""
    build = engine.build

    def changed_build(tokenizer, **where):
        model = build(tokenizer, **where)
        change(model)
        return model

    monkeypatch.setattr(engine, "build", changed_build)
    return engine


def events(engine: Engine, kind: str) -> list[dict]:
    lines = (Path(engine.config.run) / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def saved(engine: Engine) -> dict[str, dict[str, Tensor]]:
    path = checkpoint.newest(Path(engine.config.run) / "checkpoints", warn=print)
    assert path is not None
    return checkpoint.load(path)[0]


# Numbers that are not finite


class Toy:
    """A model of two layers and its optimizer; `step` n is the same in every toy."""

    def __init__(self, device: str):
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(5, 40), nn.Linear(40, 3)).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, weight_decay=0.1, fused=True)
        self.progress = Progress()
        self.guard = Guard(self.optimizer, ["a", "b"], 3, self.progress)
        self.x = torch.randn(9, 6, 5, device=device)

    def step(self, number: int, damage: Callable[[Tensor, nn.Module], Tensor] = lambda loss, model: loss) -> None:
        loss = damage(self.model(self.x[number]).square().mean(0)[:2], self.model)
        loss.sum().backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.guard.judge(number, loss.detach(), norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        of_optimizer = checkpoint.optimizer_tensors(self.optimizer, self.model.named_parameters())
        return {name: t.clone() for name, t in {**self.model.state_dict(), **of_optimizer}.items()}


def broken_gradient(loss: Tensor, model: nn.Module) -> Tensor:
    model[1].bias.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    return loss


DAMAGES = {
    "nan loss": (lambda loss, model: loss * loss.new_tensor([torch.nan, 1.0]), ["a"]),
    "inf loss": (lambda loss, model: loss / loss.new_tensor([1.0, 0.0]), ["b"]),
    "inf loss without gradient": (lambda loss, model: loss + loss.new_tensor([torch.inf, torch.inf]), ["a", "b"]),
    "inf gradient": (broken_gradient, []),
}
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@on_devices
@pytest.mark.parametrize(("damage", "tasks"), DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("before", [0, 2])
def test_a_step_that_is_not_finite_changes_no_bit(device, damage, tasks, before):
    toy, untouched = Toy(device), Toy(device)
    for number in range(before):
        toy.step(number)
        untouched.step(number)
    toy.step(8, damage)
    torch.testing.assert_close(toy.tensors(), untouched.tensors(), rtol=0, atol=0)
    toy.guard.look()
    toy.model[1].bias._backward_hooks = None
    toy.step(3)
    untouched.step(3)
    torch.testing.assert_close(toy.tensors(), untouched.tensors(), rtol=0, atol=0)
    assert toy.tensors()["0.weight.step"] == before + 1


@on_devices
def test_steps_in_a_row_are_counted_over_looks(device):
    toy = Toy(device)
    nan = DAMAGES["nan loss"][0]
    for number, damage in enumerate([nan, nan, lambda loss, model: loss, nan]):
        toy.step(number + 1, damage)
    assert toy.guard.look() == [(1, ["a"]), (2, ["a"]), (4, ["a"])]
    toy.guard.check()  # two in a row, then one
    toy.step(5, nan)
    assert toy.guard.look() == [(5, ["a"])]
    toy.guard.check()
    toy.step(6, DAMAGES["inf gradient"][0])
    assert toy.guard.look() == [(6, [])]
    assert (toy.progress.left_out, toy.progress.left_out_in_a_row) == (5, 3)
    with pytest.raises(FloatingPointError, match="3 steps in a row were left out because their loss or gradient"):
        toy.guard.check()


@pytest.mark.gpu
def test_judging_waits_for_no_device():
    toy = Toy("cuda")
    toy.step(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        toy.step(1, DAMAGES["nan loss"][0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert toy.guard.look() == [(1, ["a"])]


def test_a_broken_embedding_leaves_out_the_steps_of_its_examples_and_names_them(tmp_path, monkeypatch, capsys):
    rows = [{**row, "text": row["text"].replace("owl", "hen")} for row in tiny_rows("colour", 12, seed=0)]
    rows[7] = {"text": "the xylophone is in the barn", "label": "red"}
    engine = farm(tmp_path, rows, steps=32, batch=Batch(96, 1, 64), optimizer=Optimizer(give_up_after=32))

    def break_embedding(model: MultiTaskModel) -> None:
        assert engine.tokenizer is not None
        others = [row["text"] for row in rows if row is not rows[7]]
        others += [row[side] for row in tiny_rows("closeness", 20, seed=0) for side in ("first", "second")]
        ((own, _),) = engine.tokenizer.encode([rows[7]["text"]])
        token = next(iter(set(own) - {t for ids, _ in engine.tokenizer.encode(others) for t in ids}))
        with torch.no_grad():
            model.trunk.tokens.weight[token] = torch.nan

    summary = changed(engine, break_embedding, monkeypatch).fit()
    left_out = events(engine, "left_out")
    assert 1 <= len(left_out) < 32
    for event in left_out:
        assert event["tasks"] == ["colour"]
        assert event["examples"] == [{"task": "colour", "example": 8, "text": "the xylophone is in the barn"}]
    assert summary["steps_left_out"] == len(left_out) == events(engine, "step")[-1]["left_out"]
    assert saved(engine)["optimizer"]["weight.step"] == 32 - len(left_out)
    assert saved(engine)["model"]["weight"].isfinite().all()
    assert f"step {left_out[0]['step']} is left out: the loss of colour is not finite" in capsys.readouterr().out
    assert "steps left out" in (tmp_path / "run" / "report.html").read_text()


def test_broken_weights_end_the_run_after_a_few_steps(tmp_path, monkeypatch):
    def break_weights(model: MultiTaskModel) -> None:
        with torch.no_grad():
            model.weight[0, 0] = torch.inf

    engine = farm(tmp_path, tiny_rows("colour", 30, seed=0), steps=50, optimizer=Optimizer(give_up_after=3))
    with pytest.raises(FloatingPointError, match="3 steps in a row .* up to step 3: try a lower"):
        changed(engine, break_weights, monkeypatch).fit()
    assert [event["step"] for event in events(engine, "left_out")] == [1, 2, 3]
    assert all(len(event["examples"]) == 5 for event in events(engine, "left_out"))  # of many
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_gradient_that_overflows_once_is_left_out_and_no_example_is_blamed(tmp_path, monkeypatch, capsys):
    calls: list[int] = []

    def overflow(gradient: Tensor) -> Tensor:
        calls.append(1)
        return gradient * torch.inf if len(calls) == 1 else gradient

    engine = farm(tmp_path, tiny_rows("colour", 30, seed=0), steps=3)
    changed(engine, lambda model: model.trunk.final_norm.bias.register_hook(overflow), monkeypatch).fit()
    assert [(event["step"], event["tasks"], event["examples"]) for event in events(engine, "left_out")] == [(1, [], [])]
    assert "the gradient is not finite; no example is to blame by itself" in capsys.readouterr().out
    assert saved(engine)["optimizer"]["weight.step"] == 2


# Memory


def short_of_memory(most: int, place: str, attempts: list[int]) -> Callable[[MultiTaskModel], None]:
    """Makes a model run out of memory on batches of more than `most` tokens, in one of its passes."""

    def change(model: MultiTaskModel) -> None:
        forward = model.forward

        def limited(batch, *factor):
            attempts.append(len(batch.tokens))
            if len(batch.tokens) > most and place == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory")
            sums = forward(batch, *factor)
            if len(batch.tokens) > most:  # when some gradients are there already
                model.trunk.blocks[0].mlp_out.bias.register_hook(run_out)
            return sums

        def run_out(gradient: Tensor) -> Tensor:
            if attempts[-1] > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return gradient

        model.forward = limited

    return change


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_batches_in_parts_make_the_same_step(tmp_path, place, monkeypatch, capsys):
    rows = tiny_rows("colour", 60, seed=0)
    whole = farm(tmp_path, rows, steps=2, run=str(tmp_path / "whole"))
    whole.fit()
    attempts: list[int] = []
    parts = farm(tmp_path, rows, steps=2, run=str(tmp_path / "parts"))
    changed(parts, short_of_memory(100, place, attempts), monkeypatch).fit()
    expected, found = saved(whole), saved(parts)
    torch.testing.assert_close(found["model"], expected["model"], rtol=0, atol=1e-6)
    torch.testing.assert_close(found["optimizer"], expected["optimizer"], rtol=1e-4, atol=1e-6)
    assert sum(tokens > 100 for tokens in attempts) == 2  # at 256 and at about 128; in the second step not again
    assert capsys.readouterr().out.count("out of memory with") == 2
    lines = [(e["tokens"], e["real_tokens"], e["examples"]) for e in events(parts, "step")]
    assert lines == [(e["tokens"], e["real_tokens"], e["examples"]) for e in events(whole, "step")]


def test_an_example_that_does_not_fit_by_itself_is_named(tmp_path, monkeypatch):
    rows = tiny_rows("colour", 30, seed=0)
    rows[4] = {"text": "the white whale " + " ".join(["is in the barn"] * 9), "label": "white"}
    engine = farm(tmp_path, rows, steps=20)
    message = "single example, of .* tokens: training example 5 of task 'colour': the white whale is in the barn is ..."
    with pytest.raises(MemoryError, match=message):
        changed(engine, short_of_memory(30, "forward", []), monkeypatch).fit()


def test_batches_that_are_held_together_are_not_parted(tmp_path, monkeypatch):
    engine = farm(tmp_path, tiny_rows("colour", 30, seed=0), balancing=Balancing(method="uncertainty"))
    with pytest.raises(MemoryError, match="out of memory with 512 tokens, which this balancing holds together"):
        changed(engine, short_of_memory(100, "forward", []), monkeypatch).fit()


@pytest.fixture
def compiled_to_itself(monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def short_of_memory_compiled(most: int, attempts: list[int]) -> Callable[[MultiTaskModel], None]:
    """The same for the function that is compiled, which calls no `forward`."""

    def change(model: MultiTaskModel) -> None:
        hidden = model.hidden

        def limited(batch):
            if torch.is_grad_enabled():
                attempts.append(len(batch.tokens))
                if len(batch.tokens) > most:
                    raise torch.OutOfMemoryError("CUDA out of memory")
            return hidden(batch)

        model.hidden = limited

    return change


@pytest.mark.usefixtures("compiled_to_itself")
def test_memory_that_is_short_while_compiling_makes_parts_that_have_a_graph(tmp_path, monkeypatch, capsys):
    """The warm-up is where memory is short first. Parts have one size, and the graph is fitted to them."""
    rows = tiny_rows("colour", 60, seed=0)
    whole = farm(tmp_path, rows, steps=2, run=str(tmp_path / "whole"))
    whole.fit()
    attempts: list[int] = []
    parts = farm(tmp_path, rows, steps=2, run=str(tmp_path / "parts"), compile=True)
    summary = changed(parts, short_of_memory_compiled(100, attempts), monkeypatch).fit()
    assert [tokens for tokens in attempts if tokens > 100] == [256, pytest.approx(128, abs=28)]  # none in a step
    assert len({tokens for tokens in attempts if tokens <= 100}) == 1
    assert summary["uncompiled_batches"] == 0
    torch.testing.assert_close(saved(parts)["model"], saved(whole)["model"], rtol=0, atol=1e-5)
    printed = capsys.readouterr().out
    assert printed.count("out of memory with") == 2
    assert printed.count("compiled the model in") == 1


@pytest.mark.usefixtures("compiled_to_itself")
def test_batches_that_go_without_the_graph_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(FixedShapes, "pad", lambda self, batch: batch)  # none fits
    engine = farm(tmp_path, tiny_rows("colour", 60, seed=0), steps=20, compile=True)
    summary = engine.fit()
    assert summary["uncompiled_batches"] == 40
    assert capsys.readouterr().out.count("20 of 20 batches so far have more sequences or rows than") == 1
