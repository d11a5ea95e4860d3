"""What every test file shares: a number of threads, fixed seeds, real data where it is there, GPU tests only on a GPU.

And one tiny run of six tasks, trained once by the command line, that the tests of engine, training and report look at.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # tests share their cores; before torch is imported

import torch

import deprecations

# The same order of summation, and so the same numbers, on a laptop and on a 64-core server; for each of several workers
# one core.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="1/1", help="2/8: the second of eight parts of the tests")


def pytest_configure(config: pytest.Config) -> None:
    for line in deprecations.FILTERS:  # behind those of pyproject.toml, so that they come first
        config.addinivalue_line("filterwarnings", line)


@pytest.hookimpl(trylast=True)  # of what is left after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shard, shards = map(int, config.getoption("--shard").split("/"))
    items[:] = items[shard - 1 :: shards]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tiny models, which two threads only slow down, a lot where the cores are busy with something else."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def effort() -> Callable[[Callable[[], object]], float]:
    """The processor time of some work in millions of steps of an empty loop: no machine is too slow for a test."""

    def processor_time(work: Callable[[], object]) -> float:
        began = time.process_time()
        work()
        return time.process_time() - began

    def a_million_steps() -> None:
        for _ in range(1_000_000):
            pass

    def measure(work: Callable[[], object]) -> float:
        before, taken, after = map(processor_time, (a_million_steps, work, a_million_steps))
        return taken / max(before, after)

    return measure


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder shared/data beside the repository: real data sets, laid out as on the Hugging Face hub."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs real data in {folder}")
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Encoded data and tokenizers are kept for this session only."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("TRUNKLINE_CACHE", str(folder))
        yield folder


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache of a test alone is; it is not there yet."""
    monkeypatch.setenv("TRUNKLINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test works in a folder of its own, on a machine that takes half a second for a step."""
    from trunkline.training.starting import length

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(length, "seconds_per_step", lambda preset: 0.5)


ANIMALS = "cat dog cow hen fox owl".split()
PLACES = "barn kitchen garden river forest house".split()
COLOURS = "red black white brown".split()


def _sentence(rng: random.Random) -> tuple[list[str], list[str]]:
    """Words and their parts of speech."""
    words = ["the", rng.choice(COLOURS), rng.choice(ANIMALS), "is in", "the", rng.choice(PLACES)]
    return words, ["article", "adjective", "noun", "verb", "article", "noun"]


def tiny_rows(task: str, count: int, seed: int) -> list[dict]:
    """Rows of the tiny run: a small farm, with an answer to learn for every head."""
    rng, rows = random.Random(f"{task} {seed}"), []
    for index in range(count):
        words, parts = _sentence(rng)
        other, _ = _sentence(rng)
        text, colour, animal, place = " ".join(words), words[1], words[2], words[5]
        match task:
            case "colour":
                rows.append({"text": text, "label": COLOURS.index(colour) if index % 2 else colour})
            case "closeness":
                same = sum(a == b for a, b in zip(words, other, strict=True))
                rows.append({"first": text, "second": " ".join(other), "score": same / 2})
            case "parts":
                tags = [tag for word, tag in zip(words, parts, strict=True) for _ in word.split()]
                rows.append({"text": text, "tags": tags})
            case "where":
                context = f"{text} ." if index % 3 else f"well , {text} ."
                rows.append({"question": f"where is the {animal} ?", "context": context, "answer": place})
            case "retell":
                rows.append({"document": text, "summary": f"{animal} : {place}"})
            case "prose":
                rows.append({"text": f"{text} and {' '.join(other)} ."})
    return rows


TINY_TASKS = {
    "colour": "{head: classify, text: [text], label: label, labels: [red, black, white, brown]}",
    "closeness": "{head: regress, text: [first, second], label: score}",
    "parts": "{head: tag, text: [text], label: tags, labels: [article, adjective, noun, verb]}",
    "where": "{head: span, text: [question, context], label: answer}",
    "retell": "{head: generate, text: [document], label: summary, max_target_tokens: 12}",
    "prose": "{head: language-model, text: [text]}",
}
TINY_SETTINGS = """
trunk: {hidden_size: 32, num_layers: 2, num_heads: 4, max_positions: 160, dropout: 0.1}
projection: gelu
vocab_size: 512
steps: 24
batch: {tokens: 512, accumulate: 2, max_length: 128}
optimizer: {learning_rate: 0.003}
evaluation: {every: 4, examples: 8, texts: 2}
search: {max_new_tokens: 8}
device: cpu
"""


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny.yaml with its data beside it; every task has 60 rows to train on and 20 to be scored on."""
    folder = tmp_path_factory.mktemp("tiny")
    tasks = ""
    for name, fields in TINY_TASKS.items():
        write_jsonl(folder / f"{name}.jsonl", tiny_rows(name, 60, seed=0))
        write_jsonl(folder / f"{name}-validation.jsonl", tiny_rows(name, 20, seed=1))
        files = f"name: {name}, train: {name}.jsonl, validation: {name}-validation.jsonl"
        tasks += f"- {{{files}, {fields[1:]}\n"
    (folder / "tiny.yaml").write_text(f"tasks:\n{tasks}{TINY_SETTINGS}")
    return folder / "tiny.yaml"


Command = Callable[..., subprocess.CompletedProcess[str]]


def command_line(*arguments: str | Path) -> tuple[list[str], dict[str, str]]:
    """The `trunkline` command as a program of its own: its arguments and environment."""
    tests = Path(__file__).resolve().parent
    program = [sys.executable, "-c", "from deprecations import run; run('trunkline')"]
    path = os.pathsep.join([str(tests.parent / "src"), str(tests / "helpers")])
    # one thread: others run beside it, and the numbers are the same wherever it runs
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return [*program, *map(str, arguments)], environment


@pytest.fixture(scope="session")
def trunkline(cache: Path) -> Command:
    """Runs the `trunkline` command; `expect` is its exit code."""

    def run(*arguments: str | Path, expect: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
        program, environment = command_line(*arguments)
        result = subprocess.run(program, env=environment, input=stdin, capture_output=True, text=True, timeout=300)
        assert result.returncode == expect, result.stdout + result.stderr
        assert "Traceback" not in result.stderr
        return result

    return run


@dataclass(frozen=True)
class Finished:
    """A finished run."""

    config: Path
    run: Path
    output: str  # of the command


@pytest.fixture(scope="session")
def finished(tiny_config: Path, trunkline: Command, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The tiny run, trained without interruption. Not to be changed."""
    run = tmp_path_factory.mktemp("finished") / "farm"
    return Finished(tiny_config, run, trunkline("train", tiny_config, f"run={run}").stdout)


@pytest.fixture(scope="session")
def lively(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run's engine, saved with weights so large that it answers differently wherever its input differs."""
    from trunkline import Engine

    engine = Engine.load(finished.run, device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return engine.save(tmp_path_factory.mktemp("lively"))


@pytest.fixture
def fresh_counts() -> Iterator[None]:
    """What is left to PyTorch warns anew, and `attention_counts` begins with nothing."""
    from trunkline.engine.foreign import drop_in

    drop_in._counts.clear()
    yield
    drop_in._counts.clear()


@pytest.fixture(scope="session")
def built_models() -> dict[str, Any]:
    return {}


@pytest.fixture
def model_of(built_models: dict[str, Any]) -> Iterator[Callable[[str], Any]]:
    """The Hugging Face model of a family, in evaluation mode; made once, and as it was after every test."""
    from foreign_models import BUILD, with_large_weights
    from trunkline import unpatch

    used = []

    def model(family: str) -> Any:
        if family not in built_models:
            built_models[family] = with_large_weights(BUILD[family]().double().eval())
        used.append(built_models[family])
        return built_models[family]

    yield model
    for one in used:
        one.zero_grad()
        if one.config._attn_implementation == "trunkline":
            unpatch(one)


# Other people's models


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model as transformers does."""
    from checkpoints import make

    def write(model: torch.nn.Module | str, **options) -> Path:
        model = make(model) if isinstance(model, str) else model
        model.save_pretrained(tmp_path / "theirs", **options)
        return tmp_path / "theirs"

    return write
