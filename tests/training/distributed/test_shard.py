"""A model in slices is the model that one process has, in a fourth of the memory, and its checkpoints are any run's.

And what else takes four ranks.
"""

import shutil
from pathlib import Path

import forked_ranks
import pytest
import ranked_runs
import torch
from test_replicate import Runs, error, on_ranks, weights

from run_folders import lines
from trunkline import Engine
from trunkline.engine import checkpoint
from trunkline.training.config_file import load_config

pytestmark = pytest.mark.usefixtures("one_thread")

# small batches, which lack one task or another
SMALL = "batch.tokens=72 batch.max_length=72 batch.accumulate=4 steps=20 evaluation.every=20 evaluation.texts=1"
SMALL = f"{SMALL} evaluation.examples=2 evaluation.last_examples=2 search.max_new_tokens=2"
SHORT = "steps=5"
RUNS = {
    "full": "",
    "adapters": f"{SHORT} adapters.rank=4",
    "recomputed": f"{SHORT} checkpointing=block projection=",
    "replicas": f"{SHORT} slices=2",
}
NO_ROOM = "slice not written"
GRAM = "steps=1 balancing=pcgrad batch.tokens=256"  # with weights that are still the same
GOES_ON = "steps=5 trunk={{}} init={}"  # with the weights of a finished run
STOPPED = {"stopped in slices": "shard", "stopped whole": "replicate"}  # after the third step


def described(config: Path, run: Path, values: str, parallel: str = "shard", **others) -> dict:
    values = [*SMALL.split(), *values.split(), f"run={run}", f"parallel={parallel}"]
    return {"config": str(config), "values": values, **others}


@pytest.fixture(scope="module")
def four(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("four")
    runs = {name: described(tiny_config, folder / name, values) for name, values in RUNS.items()}
    runs["replicas"]["fault"] = "scored twice"
    runs["from full"] = described(tiny_config, folder / "from full", GOES_ON.format(folder / "full"))
    runs["disk full"] = described(tiny_config, folder / "disk full", "steps=4 evaluation.every=2", fault=NO_ROOM)
    runs["three"] = described(tiny_config, folder / "three", "slices=3")
    for name, parallel in STOPPED.items():
        runs[name] = described(tiny_config, folder / name, SHORT, parallel, fault="terminated")
    runs["goes on in slices"] = described(tiny_config, folder / "stopped whole", SHORT, resume=True)
    runs["not finite"] = described(tiny_config, folder / "not finite", SHORT, fault="not finite")
    runs["gram"] = described(tiny_config, folder / "gram", GRAM, "replicate")
    runs["uneven"] = described(tiny_config, folder / "uneven", "batch.accumulate=6")
    runs["no room"] = described(tiny_config, folder / "no room", SHORT, fault="no room for a batch")
    return on_ranks(4, runs, folder, tiny_config)


@pytest.fixture(scope="module")
def one(four: Runs, tmp_path_factory: pytest.TempPathFactory):
    """Runs in this process, each made once."""
    folder = tmp_path_factory.mktemp("one")

    def run(name: str, values: str, parallel: str = "shard") -> Path:  # which of one process is no other
        if not (folder / name).exists():
            config = load_config(four.config, described(four.config, folder / name, values, parallel)["values"])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("trunkline.training.run.run.write_report", lambda folder: None)
                patch.setattr("trunkline.training.run.run.FIRST_LOOK", 2)
                Engine.from_config(config).fit()
        return folder / name

    return run


@pytest.mark.parametrize("name", RUNS)
def test_weights_and_losses_are_those_of_one_process(name, four, one):
    assert [outcome.get("steps") for outcome in four.outcomes[name]] == [20 if name == "full" else 5] * 4
    expected = weights(one(name, RUNS[name]))
    found = four.weights(name)
    start = {key: 0 * value for key, value in expected.items()}
    assert found.keys() == expected.keys()
    assert error(found, expected) < 1e-4 * error(start, expected)
    ours, theirs = lines(four.folder / name), lines(one(name, RUNS[name]))
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("step", "event", "tokens", "real_tokens", "examples"):
            assert mine.get(key) == other.get(key)
        for key in ("loss", "gradient_norm"):
            if key in other:
                assert mine[key] == pytest.approx(other[key], rel=1e-3)


def test_a_checkpoint_is_read_into_slices(four, one):
    expected = weights(one("from full", GOES_ON.format(four.folder / "full")))
    assert error(four.weights("from full"), expected) < 1e-4 * error(four.weights("full"), expected)


@pytest.mark.parametrize("name", ["full", "adapters"])
def test_a_rank_of_four_holds_a_fourth(name, four, one):
    model = Engine.load(one(name, RUNS[name]), device="cpu").model
    whole = ranked_runs.size_of(model.parameters())
    learnt = ranked_runs.size_of(p for key, p in model.named_parameters() if name == "full" or "trunk." not in key)
    for outcome in four.outcomes[name]:
        assert 0 < outcome["held"]["parameters"] <= 0.27 * whole
        assert 0 < outcome["held"]["gradients"] <= 0.27 * learnt
        assert 0 < outcome["held"]["optimizer"] <= 0.27 * 2 * learnt
    assert sum(outcome["held"]["parameters"] for outcome in four.outcomes[name]) == whole


def test_a_run_goes_on_whole_or_in_slices_on_any_number_of_ranks(four, one, tmp_path):
    plain = weights(one("plain", SHORT))
    assert [outcome["error"] for outcome in four.outcomes["stopped whole"]] == ["SystemExit: 143"] * 4
    assert [len(outcome["bits"]) for outcome in four.outcomes["goes on in slices"]] == [2] * 4
    assert error(four.weights("stopped whole"), plain) < 1e-3

    run = four.folder / "stopped in slices"
    assert (run / "checkpoints" / "step-3").is_dir()
    two = forked_ranks.start(2, [described(four.config, run, SHORT, resume=True)], tmp_path / "two")
    assert [outcome["steps"] for (outcome,) in two] == [5, 5]
    assert error(weights(run), plain) < 1e-3
    again = load_config(four.config, described(four.config, run, "steps=6", "replicate")["values"])
    assert Engine.from_config(again).fit(resume=True)["steps"] == 6


def test_its_files_are_those_of_any_run_but_for_the_slices(four, one):
    def files(run: Path) -> list[str]:
        return sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.name != "report.html")

    for name, slices in (("full", 4), ("replicas", 2)):
        expected = files(one(name, RUNS[name]))
        for group in ("model", "optimizer"):
            (whole,) = [file for file in expected if "step-" in file and file.endswith(f"{group}.safetensors")]
            expected.remove(whole)
            expected += [whole.replace(group, f"{group}-{n + 1}-of-{slices}") for n in range(slices)]
        assert files(four.folder / name) == sorted(expected)
    tensors, _ = checkpoint.load(four.folder / "full" / "checkpoints" / "step-20")
    expected, _ = checkpoint.load(one("full", "") / "checkpoints" / "step-20")
    for group in ("model", "optimizer"):
        assert {key: t.shape for key, t in tensors[group].items()} == {k: t.shape for k, t in expected[group].items()}
    assert Engine.load(four.folder / "full").predict(["the red cat is in the barn"], tasks=["colour"])


def test_a_slice_that_is_missing_damaged_or_of_another_run_is_named(four, tmp_path):
    whole = four.folder / "full" / "checkpoints" / "step-20"
    file = "optimizer-3-of-4.safetensors"
    harms = {
        "missing": lambda path: path.unlink(),
        "damaged": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
        "foreign": lambda path: shutil.copy(four.folder / "from full" / "checkpoints" / "step-5" / file, path),
    }
    for name, harm in harms.items():
        shutil.copytree(whole, tmp_path / name)
        harm(tmp_path / name / file)
        with pytest.raises(checkpoint.CheckpointError, match=f"{tmp_path / name / file} is missing or damaged"):
            checkpoint.load(tmp_path / name)


def test_a_disk_that_is_full_on_any_rank_leaves_the_checkpoint_before(four):
    first, *others = [outcome["error"] for outcome in four.outcomes["disk full"]]
    folder = four.folder / "disk full" / "checkpoints"
    assert first.startswith(f"OSError: checkpoint {folder / 'step-4'} is not saved, earlier ones are kept: No space")
    assert others == ["SystemExit: 2"] * 3  # the first one has said it
    assert checkpoint.newest(folder, warn=print) == folder / "step-2"
    assert not list(folder.glob(".*"))


def test_slices_that_do_not_divide_the_ranks_are_refused(four):
    assert "slices 3 must divide the number of ranks, 4" in four.outcomes["three"][0]["error"]


def test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_all(four):
    for outcome in four.outcomes["not finite"]:
        assert outcome["left_out"] == 1
        assert outcome["bits"][1] == outcome["bits"][2] != outcome["bits"][3]


def test_batches_that_ranks_do_not_share_evenly_are_refused(four):
    said = four.outcomes["uneven"][0]["error"]
    assert "batch.accumulate 6 is no multiple of 4 ranks" in said
    assert not (four.folder / "uneven").exists()


def test_memory_that_is_short_ends_the_run_with_what_to_lower(four):
    *others, short = four.outcomes["no room"]
    assert "MemoryError: out of memory with" in short["error"]
    assert "the ranks that have the other slices of the model make no parts: lower batch.tokens" in short["error"]
    assert {outcome["error"].split(":")[0] for outcome in others} == {"SystemExit"}


def test_the_gram_matrix_of_four_ranks_is_that_of_one(four, one):
    with ranked_runs.grams_seen() as seen:
        one("gram", GRAM, "replicate")
    expected = torch.tensor(seen[0], dtype=torch.float64)
    norms = expected.diagonal().sqrt()
    assert (norms > 0).all()
    for outcome in four.outcomes["gram"]:
        found = torch.tensor(outcome["grams"][0], dtype=torch.float64)
        assert float(((found - expected) / norms / norms[:, None]).abs().max()) < 1e-6
