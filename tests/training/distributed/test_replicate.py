"""A run on several ranks is the run on one: the same batches, weights and decisions, and equal bits on all ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked_ranks
import pytest
from torch import Tensor

from run_folders import lines
from trunkline import Engine
from trunkline.engine import checkpoint
from trunkline.training.config_file import load_config
from trunkline.training.run.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")

# small batches, which lack one task or another, and a number of them that neither two nor three ranks share evenly
SMALL = "batch.tokens=72 batch.max_length=72 batch.accumulate=5 steps=20 evaluation.every=20 evaluation.texts=0"
SMALL = f"{SMALL} evaluation.examples=2 evaluation.last_examples=2 search.max_new_tokens=2"
REACTS = "steps=12 evaluation.every=2 mixing.method=progress mixing.patience=1"
RUNS = {
    "fixed": "",
    "pcgrad": "balancing=pcgrad",
    "famo": "balancing=famo steps=8",
    "watched": "steps=6 balancing.watch=2",
    "adaptive": f"{REACTS} optimizer.learning_rate=0.01",
    "bilstm": "architecture=bilstm projection= steps=8",
}
FAULTS = {
    "not finite": "steps=6",
    "out of memory": "steps=6 trunk.dropout=0",
    "terminated": "steps=8",
}


@dataclass(frozen=True)
class Runs:
    """What was run on so many ranks: the outcomes of each rank, by run, and where the runs are."""

    config: Path
    folder: Path
    outcomes: dict[str, list[dict[str, Any]]]

    def weights(self, name: str) -> dict[str, Tensor]:
        return weights(self.folder / name)


def weights(run: Path) -> dict[str, Tensor]:
    """After the last step."""
    return checkpoint.load(checkpoint.steps(run / "checkpoints")[0])[0]["model"]


def described(config: Path, run: Path, values: str, **others: Any) -> dict[str, Any]:
    if "bilstm" in values:  # which has no language model
        tasks = config.read_text().splitlines()
        config = config.with_name("bilstm.yaml")
        config.write_text("\n".join(line for line in tasks if "name: prose" not in line))
    return {"config": str(config), "values": [*SMALL.split(), *values.split(), f"run={run}"], **others}


def on_ranks(size: int, runs: dict[str, dict[str, Any]], folder: Path, config: Path, killed: int | None = None) -> Runs:
    by_rank = forked_ranks.start(size, list(runs.values()), folder / "outcomes", killed)
    outcomes = {name: [told[n] for told in by_rank if n < len(told)] for n, name in enumerate(runs)}
    return Runs(config, folder, outcomes)


@pytest.fixture(scope="module")
def two(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("two")
    runs = {name: described(tiny_config, folder / name, values) for name, values in RUNS.items()}
    runs |= {name: described(tiny_config, folder / name, values, fault=name) for name, values in FAULTS.items()}
    runs["others"] = described(tiny_config, folder / "others", "", more=["seed=3", "batch.tokens=80"])
    runs["answers"] = {"engine": str(folder / "fixed"), "file": str(tiny_config.parent / "colour-validation.jsonl")}
    runs["too few"] = described(tiny_config, folder / "too few", "batch.accumulate=1")
    runs["stops answering"] = described(
        tiny_config, folder / "stops answering", "rank_timeout=5 evaluation.every=2", fault="stops answering"
    )
    return on_ranks(2, runs, folder, tiny_config, killed=1)


@pytest.fixture(scope="module")
def three(two: Runs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("three")
    runs = {name: described(two.config, folder / name, RUNS[name]) for name in ("fixed", "pcgrad")}
    runs["terminated"] = described(two.config, two.folder / "terminated", FAULTS["terminated"], resume=True)
    runs["answers"] = {"engine": str(folder / "fixed"), "file": str(two.config.parent / "colour-validation.jsonl")}
    return on_ranks(3, runs, folder, two.config)


@pytest.fixture(scope="module")
def one(two: Runs, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs in this process, each made once."""
    folder, made = tmp_path_factory.mktemp("one"), set()

    def run(name: str, values: str, exact: bool = False) -> Path:
        """The folder of a run; `exact`: in float64."""
        path = folder / f"{name}{' exact' * exact}"
        if path not in made:
            made.add(path)
            described_run = described(two.config, path, values)
            config = load_config(Path(described_run["config"]), described_run["values"])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("trunkline.training.run.run.write_report", lambda folder: None)
                if exact:
                    build = Run._build
                    patch.setattr(Run, "_build", lambda self: build(self).double())
                Engine.from_config(config).fit()
        return path

    return run


def error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """In the 2-norm over all weights."""
    return sum(float((found[name].double() - exact[name].double()).square().sum()) for name in exact) ** 0.5


@pytest.mark.parametrize("ranks", ["two", "three"])
@pytest.mark.parametrize("name", ["fixed", "pcgrad"])
def test_weights_after_20_steps_are_as_exact_as_those_of_one_rank(name, ranks, one, request):
    exact = weights(one(name, RUNS[name], exact=True))
    of_one = error(weights(one(name, RUNS[name])), exact)
    of_several = error(request.getfixturevalue(ranks).weights(name), exact)
    assert 0 < of_several < 2 * of_one
    assert of_one < 1e-3


@pytest.mark.parametrize("name", [*RUNS, "not finite", "out of memory", "terminated"])
def test_all_ranks_have_equal_bits_after_every_step(name, two):
    first, second = two.outcomes[name]
    assert len(first["bits"]) > 2
    assert first["bits"] == second["bits"]
    assert len(set(first["bits"])) == len(first["bits"]) - (
        name == "not finite"
    )  # every step changes them, or is left out


@pytest.mark.parametrize("name", RUNS)
def test_what_is_written_is_that_of_one_rank(name, two, one):
    """What was seen, to the number; what was found and decided, up to rounding."""
    ours, theirs = lines(two.folder / name), lines(one(name, RUNS[name]))
    assert len(ours) == len(theirs) > 2
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("step", "event", "tokens", "real_tokens", "padding_waste", "examples", "stopped", "counts"):
            assert mine.get(key) == other.get(key)
        for key in ("loss", "task_weights", "shares", "gradient_norm"):
            if key in other:
                assert mine[key] == pytest.approx(other[key], rel=1e-3)


def test_tasks_stop_on_all_ranks(two):
    """The run is a test of it only if one does."""
    mixes = [line for line in lines(two.folder / "adaptive") if line["event"] == "mix"]
    assert any(line["stopped"] for line in mixes)


def test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_all(two):
    outcomes = two.outcomes["not finite"]
    assert [outcome["left_out"] for outcome in outcomes] == [1, 1]
    assert outcomes[0]["bits"][1] == outcomes[0]["bits"][2]
    (line,) = [line for line in lines(two.folder / "not finite") if line["event"] == "left_out"]
    assert line["step"] == 3


def test_memory_that_is_short_on_one_rank_changes_nothing(two, one):
    """Though the rank had sent a part of its gradients already when it ran out."""
    name = "out of memory"
    plain = weights(one(name, FAULTS[name]))
    assert error(two.weights(name), plain) < 1e-3 * error({key: 0 * value for key, value in plain.items()}, plain)
    progress = checkpoint.load(two.folder / name / "checkpoints" / "step-6")[1]["progress"]
    assert progress["part_tokens"] == 0  # of the first rank, which had enough


def test_a_signal_to_one_rank_stops_all_after_the_same_step(two):
    assert [outcome["error"] for outcome in two.outcomes["terminated"]] == ["SystemExit: 143"] * 2
    assert (two.folder / "terminated" / "checkpoints" / "step-3").is_dir()


def test_a_run_of_two_ranks_goes_on_with_three_and_with_one(two, three, one):
    """And is the run that it would have been; what it has seen to the number."""
    plain = one("terminated", FAULTS["terminated"])
    _, expected = checkpoint.load(plain / "checkpoints" / "step-8")
    _, state = checkpoint.load(two.folder / "terminated" / "checkpoints" / "step-8")
    assert [outcome["steps"] for outcome in three.outcomes["terminated"]] == [8] * 3
    assert len(three.outcomes["terminated"][0]["bits"]) == 5
    counted = ("tokens", "real_tokens", "examples", "flops", "step", "left_out")
    assert [state["progress"][key] for key in counted] == [expected["progress"][key] for key in counted]
    assert error(two.weights("terminated"), weights(plain)) < 1e-3

    values = described(two.config, two.folder / "terminated", f"{FAULTS['terminated']} steps=9")["values"]
    summary = Engine.from_config(load_config(two.config, values)).fit(resume=True)
    assert summary["steps"] == 9


def test_ranks_that_were_started_with_other_settings_name_them(two):
    first, second = two.outcomes["others"]
    assert "ValueError: the ranks were started with different versions or settings: " in first["error"]
    assert "seed is 0 on rank 0, 3 on rank 1" in first["error"]
    assert "batch.tokens is 72 on rank 0, 80 on rank 1" in first["error"]
    assert second["error"] == "SystemExit: 2"  # the first one has said it
    assert not (two.folder / "others").exists()


def test_more_ranks_than_batches_are_refused(two):
    assert "2 ranks need one each: set batch.accumulate to 2 or more" in two.outcomes["too few"][0]["error"]


@pytest.mark.parametrize("ranks", ["two", "three"])
def test_scores_and_answers_of_ranks_together_are_those_of_one_to_the_bit(ranks, request):
    for rank in (said := request.getfixturevalue(ranks).outcomes["answers"]):
        assert rank["together"]["scores"] == rank["alone"]["scores"]
        assert rank["together"]["rows"] == rank["alone"]["rows"]
        assert rank["alone"] == said[0]["alone"]
        assert 0 < rank["together"]["scored"] < 0.7 * rank["alone"]["scored"]
    assert len(said[0]["alone"]["rows"]) == 20
    assert sum(rank["together"]["scored"] for rank in said) == said[0]["alone"]["scored"]


def test_a_rank_that_stops_answering_ends_the_others_after_the_timeout(two):
    (first,) = two.outcomes["stops answering"]
    last = two.folder / "stops answering" / "checkpoints" / "step-2"
    assert first["error"].startswith("RankLost: rank 1 on ")
    assert f" left, or does not answer, in step 4; the last checkpoint is {last}: go on with --resume" in first["error"]
