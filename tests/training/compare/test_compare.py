"""Comparisons: every system is trained, saved and scored, nothing twice, and the table says what happened."""

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import TINY_TASKS, tiny_rows, write_jsonl
from trunkline import Engine, TrunkConfig
from trunkline.engine.config import with_tokenizer
from trunkline.engine.network.bilstm import BiLSTM
from trunkline.training.compare import compare as comparing
from trunkline.training.compare.compare import compare
from trunkline.training.compare.comparison import Comparison, load_comparison
from trunkline.training.compare.comparison_tables import tables
from trunkline.training.compare.systems import SYSTEMS, Basis, flops_per_token, half, matched, ordinary, steps_of

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = """
trunk: {hidden_size: 32, num_layers: 2, num_heads: 4, max_positions: 80, dropout: 0.1}
vocab_size: 300
steps: 8
batch: {tokens: 256, max_length: 64}
evaluation: {every: 4, examples: 4, texts: 2}
search: {max_new_tokens: 4}
seeds: [0]
device: cpu
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """compare.yaml with its data beside it: colours to be told, and a document to be retold."""
    folder = tmp_path_factory.mktemp("comparison")
    tasks = ""
    for name in ("colour", "retell"):
        write_jsonl(folder / f"{name}.jsonl", tiny_rows(name, 40, seed=0))
        write_jsonl(folder / f"{name}-validation.jsonl", tiny_rows(name, 8, seed=1))
        files = f"name: {name}, train: {name}.jsonl, validation: {name}-validation.jsonl"
        tasks += f"- {{{files}, {TINY_TASKS[name][1:]}\n"
    (folder / "compare.yaml").write_text(f"tasks:\n{tasks}{SETTINGS}")
    return folder / "compare.yaml"


@pytest.fixture(scope="module")
def finished(config: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole comparison. Not to be changed."""
    run = tmp_path_factory.mktemp("compared") / "farm"
    compare(load_comparison(config, [f"run={run}"]))
    return run


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to go on with."""
    return shutil.copytree(finished, tmp_path / "farm")


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, bool]]:
    """What is trained from here on: run folder, and whether it is resumed."""
    calls = []
    fit = Engine.fit

    def watched(engine: Engine, **options: Any) -> dict[str, Any]:
        calls.append((Path(engine.config.run), options["resume"]))
        return fit(engine, **options)

    monkeypatch.setattr(Engine, "fit", watched)
    return calls


def results_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "comparison.json").read_text())


def basis_of(config: Path, finished: Path, **changes: Any) -> Basis:
    comparison = load_comparison(config, [f"run={finished}"])
    settings = replace(with_tokenizer(ordinary(comparison), finished), **changes)
    return Basis(settings, comparing.load_corpus(settings), "parameters", 0.25)


def test_every_system_has_scores_and_costs(finished):
    results = results_of(finished)
    assert list(results["systems"]) == list(SYSTEMS)
    for system, about in results["systems"].items():
        assert about["seeds"].keys() == {"0"}
        for result in about["seeds"].values():
            assert result["state"] == "finished", (system, result)
            assert 0 <= result["scores"]["colour"]["accuracy"] <= 1
            assert 0 <= result["scores"]["retell"]["rouge1"] <= 1
            assert result["real_tokens"] > 1000
            assert result["training_flops"] > result["real_tokens"] * 1000
        assert results["table"]["colour"]["scores"][system]["runs"] == 1
    assert list(results["trivial"]) == [
        "majority class",
        "first sentence of the document",
        "first 3 sentences of the document",
    ]


def test_systems_share_the_budget_and_are_of_one_size(finished):
    systems = {name: about["seeds"]["0"] for name, about in results_of(finished)["systems"].items()}
    assert {name: system["steps"] for name, system in systems.items()} == dict.fromkeys(SYSTEMS, 8)
    assert systems["bert"]["parts"] == {"warm-up": 2, "all": 6}
    assert set(systems["single-task"]["parts"]) == {"colour", "retell"}
    assert systems["single-task"]["models"] == 2
    size = systems["multitask"]["parameters"]
    assert systems["single-task"]["parameters"] == size  # the larger one of two: the model that retells has no classes
    assert systems["multitask-small"]["parameters"] < size / 2
    for name in ("bert", "bilstm-attention"):
        assert systems[name]["parameters"] == pytest.approx(size, rel=0.05), name


@pytest.mark.parametrize("system", list(SYSTEMS))
def test_every_system_is_saved_and_answers(finished, tmp_path, system):
    parts = {"single-task": ("colour", "retell")}.get(system, ("all", "all"))
    tells, retells = (Engine.load(finished / system / "seed-0" / part, device="cpu") for part in parts)
    texts = ["the red hen is in the barn", "the black dog is in the house . a cow"]
    answers = tells.predict(texts, ["colour"])["colour"]
    assert set(answers) <= {"red", "black", "white", "brown"}
    copy = Engine.load(tells.save(tmp_path / "copy"), device="cpu")
    assert copy.predict(texts, ["colour"])["colour"] == answers
    assert isinstance(copy.model, BiLSTM) == (system == "bilstm-attention")
    if system == "bert":  # which picks sentences
        assert retells.predict(["the red hen is in the barn"], ["retell"])["retell"] == ["the red hen is in the barn"]
        with pytest.raises(ValueError, match="'retell' has head 'extract': use predict"):
            retells.generate(texts, "retell")
    else:
        assert retells.generate(texts, "retell") == [retells.generate([text], "retell")[0] for text in texts]
    scores = results_of(finished)["systems"][system]["seeds"]["0"]["scores"]["colour"]
    assert tells.evaluate()["colour"] == pytest.approx(scores, abs=1e-6)


def test_bert_starts_from_its_warm_up(finished):
    warm_up = json.loads((finished / "bert" / "seed-0" / "warm-up" / "summary.json").read_text())
    assert {task["head"] for task in warm_up["tasks"].values()} == {"masked-language-model"}
    config = yaml.safe_load((finished / "bert" / "seed-0" / "all" / "config.yaml").read_text())
    assert config["init"] == str(finished / "bert" / "seed-0" / "warm-up")
    assert config["tasks"][1]["head"] == "extract"


def test_files_say_the_same(finished):
    results = results_of(finished)
    text = (finished / "comparison.md").read_text()
    page = (finished / "comparison.html").read_text()
    score = results["table"]["colour"]["scores"]["multitask"]
    cell = f"{score['mean']:.3f}"
    assert cell in text
    assert cell in page
    for name in (*SYSTEMS, "majority class"):
        assert f"| {name} |" in text
        assert name in page
    lines = list(csv.DictReader((finished / "comparison.csv").read_text().splitlines()))
    own = [line for line in lines if line["system"] == "multitask" and line["metric"] == "accuracy"]
    assert {line["seed"]: float(line["score"]) for line in own} == {
        seed: result["scores"]["colour"]["accuracy"]
        for seed, result in results["systems"]["multitask"]["seeds"].items()
    }


def test_page_is_self_contained(finished):
    page = (finished / "comparison.html").read_text()
    assert page.count("<svg") == 8  # scores, losses, and learning over tokens and over seconds, of two tasks
    assert "<script" not in page
    assert "src=" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    document = json.loads((finished / "multitask" / "seed-0" / "all" / "samples.json").read_text())["retell"][0][
        "input"
    ]
    assert document in page  # the samples


def test_finished_runs_are_not_trained_again(config, again, fitted):
    before = results_of(again)
    results = compare(load_comparison(config, [f"run={again}"]))
    assert fitted == []
    assert results["table"] == before["table"]


def test_interrupted_run_goes_on_and_an_empty_one_begins_anew(config, again, fitted):
    stopped, barely = again / "multitask" / "seed-0" / "all", again / "bilstm-attention" / "seed-0" / "all"
    shutil.rmtree(stopped / "checkpoints" / "step-8")
    (stopped / "summary.json").unlink()
    shutil.rmtree(barely / "checkpoints")
    (barely / "checkpoints").mkdir()
    (barely / "summary.json").unlink()
    before = results_of(again)
    results = compare(load_comparison(config, [f"run={again}"]))
    assert fitted == [(stopped, True), (barely, False)]
    assert results["table"] == before["table"]  # the bits are those of runs that were not interrupted


def test_more_seeds_are_trained_beside_those_there_are(config, again, fitted):
    results = compare(load_comparison(config, [f"run={again}", "seeds=[0,2]", "systems=[multitask]"]))
    assert fitted == [(again / "multitask" / "seed-2" / "all", False)]
    score = results["table"]["colour"]["scores"]["multitask"]
    each = [result["scores"]["colour"]["accuracy"] for result in results["systems"]["multitask"]["seeds"].values()]
    assert (score["mean"], score["deviation"]) == (
        pytest.approx(sum(each) / 2),
        pytest.approx(abs(each[0] - each[1]) / 2**0.5),
    )
    assert f"| {score['mean']:.3f} ± {score['deviation']:.3f} |" in (again / "comparison.md").read_text().replace(
        "**", ""
    )


def test_failed_run_is_recorded_and_the_rest_goes_on(config, tmp_path, monkeypatch, capsys):
    fit = Engine.fit

    def failing(engine: Engine, **options: Any) -> dict[str, Any]:
        if engine.config.architecture == "bilstm":
            raise FloatingPointError("the loss of colour is not finite at step 3")
        return fit(engine, **options)

    monkeypatch.setattr(Engine, "fit", failing)
    names = ["bilstm-attention", "multitask"]
    settings = [f"run={tmp_path / 'run'}", f"systems=[{','.join(names)}]", "seeds=[0]"]
    results = compare(load_comparison(config, settings))
    assert results["systems"]["multitask"]["seeds"]["0"]["state"] == "finished"
    failed = results["systems"]["bilstm-attention"]["seeds"]["0"]
    assert failed["state"] == "failed"
    assert failed["error"] == "FloatingPointError: the loss of colour is not finite at step 3"
    assert "failing" in failed["traceback"]
    assert "not finite" in capsys.readouterr().err
    assert "| bilstm-attention | failed | failed |" in tables(results)
    for name in ("comparison.md", "comparison.html", "comparison.csv"):
        assert "not finite at step 3" in (tmp_path / "run" / name).read_text(), name
    monkeypatch.setattr(Engine, "fit", fit)  # the next time it is tried again
    results = compare(load_comparison(config, settings))
    assert results["systems"]["bilstm-attention"]["seeds"]["0"]["state"] == "finished"


def test_comparison_with_other_settings_is_refused(config, finished):
    with pytest.raises(ValueError, match="farm was begun with other settings.*steps: 8 in the checkpoint, 9 now"):
        compare(load_comparison(config, [f"run={finished}", "steps=9"]))


def test_folder_with_something_else_is_left_alone(config, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else"):
        compare(load_comparison(config, [f"run={tmp_path}"]))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["systems=[multitask,brt]"], "unknown system 'brt'; did you mean 'bert'?"),
        (["systems=[]"], "systems must be different ones, at least one"),
        (["seeds=[0,1,0]"], r"seeds must be different ones, at least one; got \[0, 1, 0\]"),
        (["seeds=[-1]"], "seeds must be at least 0"),
        (["tasks=[sst3]"], "unknown task 'sst3'; did you mean 'sst2'?"),
        (["tasks=[text]"], "'text' is a language model"),
        (["seed=1"], "seed are set for every system"),
        (["warm_up=1"], "warm_up must be at least 0 and below 1"),
        (["steps=3"], "steps must be at least 4"),
        (["match=size"], "match"),
        (["sedes=[1]"], "unknown key 'sedes'; did you mean 'seeds'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_settings_are_named(config, values: Sequence[str], message):
    with pytest.raises(ValueError, match=message):
        load_comparison(config, values)


def test_split_without_labels_stops_it_before_any_work(config, tmp_path, fitted):
    rows = tiny_rows("colour", 4, seed=0)
    write_jsonl(tmp_path / "colour-validation.jsonl", [{**row, "label": None} for row in rows])
    for path in config.parent.iterdir():
        if not (tmp_path / path.name).exists():
            shutil.copy(path, tmp_path)
    with pytest.raises(ValueError, match="task 'colour': unlabelled row"):
        compare(load_comparison(tmp_path / "compare.yaml", [f"run={tmp_path / 'run'}"]))
    assert fitted == []
    assert list((tmp_path / "run").iterdir()) == []


def test_command_line(config, finished, trunkline):
    output = trunkline("compare", config, f"run={finished}").stdout
    assert "| multitask |" in output
    assert str(finished / "comparison.html") in output
    assert "warm_up" in trunkline("compare", "--help").stdout
    assert "'brt'" in trunkline("compare", config, "systems=[brt]", expect=2).stderr


def test_single_task_models_see_what_the_mix_has(config, finished):
    basis = basis_of(config, finished, steps=100)
    steps = steps_of(basis.config, basis.corpus)
    assert sum(steps) == 100
    tokens = [split.lengths.mean() * len(split) ** 0.5 for split in basis.corpus.train]
    assert steps == pytest.approx([100 * own / sum(tokens) for own in tokens], abs=1)


@pytest.mark.parametrize(
    ("trunk", "expected"),
    [
        ({"hidden_size": 256, "num_layers": 4, "num_heads": 4}, (128, 2, 2)),
        ({"hidden_size": 96, "num_layers": 1, "num_heads": 3}, (48, 1, 1)),
        (
            {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "num_kv_heads": 4, "positions": "rotary"},
            (384, 6, 6),
        ),
    ],
)
def test_half_a_trunk(trunk, expected):
    small = half(TrunkConfig(**trunk))
    assert (small.hidden_size, small.num_layers, small.num_heads) == expected


def test_flops_can_be_matched_instead(config, finished):
    basis = replace(basis_of(config, finished), match="flops")

    def corpus_of(settings):
        return comparing.load_corpus(settings, basis.corpus.tokenizer)

    wanted = flops_per_token(SYSTEMS["multitask"](basis, Path(), 0), corpus_of)
    for name in ("bert", "bilstm-attention"):
        assert flops_per_token(SYSTEMS[name](basis, Path(), 0), corpus_of) == pytest.approx(wanted, rel=0.12), name


def test_widths_come_as_near_as_they_can():
    """With sizes that are a line, whatever is wanted."""

    class Fake:
        match = "flops"

    for wanted in (10.0, 100.0, 1003.0):
        sizes = {}

        def system(basis, folder, seed, width, sizes=sizes):
            sizes[width] = width
            return width

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("trunkline.training.compare.systems.multitask", lambda *_, wanted=wanted: wanted)
            patch.setattr("trunkline.training.compare.systems.flops_per_token", lambda parts, _: parts)
            assert matched(Fake(), system, 4) == min(range(4, 2000, 4), key=lambda width: abs(width - wanted))


def test_settings_are_kept_as_given(config, finished):
    saved = yaml.safe_load((finished / "comparison.yaml").read_text())
    assert saved["seeds"] == [0]
    comparison = load_comparison(config, [f"run={finished}"])
    assert saved == json.loads(json.dumps(asdict(comparison)))
    assert isinstance(comparison, Comparison)
    assert load_comparison(finished / "comparison.yaml") == comparison


def test_shipped_config_is_valid():
    path = Path(comparing.__file__).parents[1] / "configs" / "compare-cpu.yaml"
    comparison = load_comparison(path)
    assert comparison.seeds == (0, 1, 2)
    assert [task.head for task in comparison.all_tasks].count("classify") == 4
