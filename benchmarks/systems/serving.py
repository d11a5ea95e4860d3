"""Answers a second: eight tasks in one pass beside eight models, and our server beside a padded one.

    python benchmarks/systems/serving.py CHECKPOINT [PART ...] [--rounds 15] [--seconds 10]

CHECKPOINT is a pretrained encoder. Eight classification heads with random weights are put on it, and each is exported
as a Hugging Face model, so that everyone answers the same. The server's model has one thread; the clients are a process
of their own. LitServe (padded_server.py) takes part where it is installed. Parts that are not asked for stay as they
were measured before:

- eight tasks: `Engine.predict` of one text, and the eight exported models one after the other, in turns.
- mixed lengths: clients that ask for one task of one text of 8 to 512 tokens (every power of two as often), each its
  next text when the last is answered: requests a second and 99th percentile of the time to the answer, by the number of
  clients.
- HTTP: requests a second with 128 clients, so that a full pass waits while one is answered, and texts a second of
  `Engine.predict` in passes as large: where server and clients share all cores, and where the server has one for
  itself alone; the time of a single request, and of `predict` on its text, ten in a row; in turns.
- start: from the command to the first 200 of /ready.
- 200 clients for as long: requests that were not answered, and how the server's memory grows in the second half.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from random import Random
from statistics import median
from threading import Thread
from typing import Any, NamedTuple

import torch

from trunkline.benchmarks.microbenchmarks.measure import in_turns
from trunkline.benchmarks.record import record, recorded
from trunkline.engine.engine import Engine
from trunkline.engine.network.memory import keep_freed_memory
from trunkline.engine.tasks.task import Task
from trunkline.training.environment import environment

NAMES = tuple(f"task{n}" for n in range(8))
WORDS = "the of a film with and to for on in good bad is was new old people make time day".split()
LENGTHS = (8, 16, 32, 64, 128, 256, 512)
CLIENTS = (1, 4, 16, 64)
PADDED = (1, 8, 32)  # texts of a batch of the padded server
WARM_UP = 2.0  # seconds
BOTH_ENDS = 2  # tokens around a text
SATURATING = 128  # clients
TURNS, SINGLE = 7, 40  # with and without HTTP: of loads, of single requests
IN_A_ROW = 10  # single requests of a turn: one alone would find what the other way has left in the cache


class Load(NamedTuple):
    """What clients found."""

    rate: float
    """Answers a second."""
    p50: float
    p99: float
    """Seconds to the answer."""
    failed: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="of a pretrained encoder")
    parser.add_argument("parts", nargs="*", metavar="PART", help="eight_tasks, start, mixed, http or many; none: all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=10, help="of each load")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    around = environment()
    command = f"python benchmarks/systems/serving.py CHECKPOINT --rounds {options.rounds} --seconds {options.seconds:g}"
    with tempfile.TemporaryDirectory() as place:
        run, exported = Path(place) / "run", Path(place) / "exported"
        engine = engine_of(options.checkpoint)
        engine.save(run)
        engine.export(exported, "hugging-face")
        parts: dict[str, Callable[[], Any]] = {
            "eight_tasks": lambda: eight_tasks(engine, exported, options.rounds),
            "start": lambda: [start(run) for _ in range(3)],
            "mixed": lambda: mixed_lengths(run, exported, options.seconds),
            "http": lambda: http(engine, run, options.seconds),
            "many": lambda: many(run, options.seconds),
        }
        if strangers := set(options.parts) - set(parts):
            parser.error(f"no part '{strangers.pop()}'; there are {', '.join(parts)}")
        measured = {name: part() for name, part in parts.items() if name in (options.parts or parts)}
    record("serving", {**recorded("serving", around), "command": command, **measured}, around)


def engine_of(checkpoint: str) -> Engine:
    tasks = [Task(name, "classify", ("text",), "label", ("no", "yes")) for name in NAMES]
    engine = Engine(init=checkpoint, tasks=tasks, projection="pooler", batch={"max_length": LENGTHS[-1]}, device="cpu")
    engine.build(engine_tokenizer(engine))
    return engine


def engine_tokenizer(engine: Engine) -> Any:
    from trunkline.engine.text.tokenizer import Tokenizer

    return Tokenizer.load(engine.config.init, layout=engine.config.layout)


def text_of(random: Random, tokens: int) -> str:
    return " ".join(random.choice(WORDS) for _ in range(tokens - BOTH_ENDS))


def eight_tasks(engine: Engine, exported: Path, rounds: int) -> dict[str, Any]:
    """By tokens of the text, seconds of both in turns."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    models = [AutoModelForSequenceClassification.from_pretrained(exported / name).eval() for name in NAMES]
    tokenizer = AutoTokenizer.from_pretrained(exported / NAMES[0])
    found = {}

    def one_by_one(text: str) -> list[list[float]]:
        with torch.inference_mode():
            return [model(**tokenizer([text], return_tensors="pt")).logits[0].softmax(-1).tolist() for model in models]

    for tokens in LENGTHS[::2]:
        text = text_of(Random(tokens), tokens)
        ours = engine.predict([text], scores=True)
        for name, theirs in zip(NAMES, one_by_one(text), strict=True):
            torch.testing.assert_close([*ours[name][0]["scores"].values()], theirs, rtol=0, atol=1e-4)
        systems = {
            "trunkline": lambda _, text=text: engine.predict([text], scores=True),
            "eight models": lambda _, text=text: one_by_one(text),
        }
        seconds = in_turns(systems, rounds, warm_up=2, calls_a_turn=3)
        faster = median(t / o for o, t in zip(seconds["trunkline"], seconds["eight models"], strict=True))
        found[str(tokens)] = {"seconds": seconds, "faster": faster}
        print(f"{tokens:4} tokens: {1000 * median(seconds['trunkline']):.1f} ms, eight models {faster:.2f}x as long")
    return found


def mixed_lengths(run: Path, exported: Path, seconds: float) -> dict[str, Any]:
    """By system and number of clients, what they found."""
    random = Random(0)
    texts = [text_of(random, tokens) for tokens in LENGTHS for _ in range(32)]
    random.shuffle(texts)
    ours = [json.dumps({"texts": [text], "tasks": [NAMES[0]]}) for text in texts]
    theirs = [json.dumps({"text": text}) for text in texts]
    systems = {"trunkline": (our_server(run), "/v1/predict", ours)}
    if find_spec("litserve"):
        for size in PADDED:
            systems[f"padded, {size} texts"] = (padded_server(exported / NAMES[0], size), "/predict", theirs)
    found: dict[str, dict[str, Any]] = {}
    for name, (server, path, bodies) in systems.items():
        with server as (port, _):
            load(port, path, bodies, 4, WARM_UP)
            found[name] = {str(number): load(port, path, bodies, number, seconds)._asdict() for number in CLIENTS}
        for number, one in found[name].items():
            print(f"{name:18} {number:>3} clients: {one['rate']:7.1f} a second, p99 {1000 * one['p99']:7.0f} ms")
    return found


def http(engine: Engine, run: Path, seconds: float) -> dict[str, Any]:
    """At saturation and idle, with and without, in turns."""
    random = Random(1)
    texts = [text_of(random, 64) for _ in range(256)]
    bodies = [json.dumps({"texts": [text], "tasks": [NAMES[0]]}) for text in texts]
    engine.config = replace(engine.config, batch=replace(engine.config.batch, tokens=4096))  # as the server's passes
    engine.predict(texts, [NAMES[0]], scores=True)
    cores = sorted(os.sched_getaffinity(0))
    found: dict[str, Any] = {}
    for where, of_server, of_clients in (("shared", cores, cores), ("one core", cores[:1], cores[1:])):
        served, alone = [], []
        with on(of_server), our_server(run) as (port, _):
            with on(of_clients):
                load(port, "/v1/predict", bodies, SATURATING, WARM_UP)
            for _ in range(TURNS):
                with on(of_clients):
                    served.append(load(port, "/v1/predict", bodies, SATURATING, seconds / 2).rate)
                began = time.perf_counter()
                engine.predict(texts, [NAMES[0]], scores=True)
                alone.append(len(texts) / (time.perf_counter() - began))
            fewer = 1 - median(with_it / without for with_it, without in zip(served, alone, strict=True))
            found[where] = {"requests_per_second": served, "texts_per_second_without": alone, "fewer": fewer}
            client = Client(port, "/v1/predict")
            ways = {
                "with": lambda number, client=client: client.ask(bodies[number % len(bodies)]),
                "without": lambda number: engine.predict([texts[number % len(texts)]], [NAMES[0]], scores=True),
            }
            idle = in_turns(ways, SINGLE, warm_up=2, calls_a_turn=IN_A_ROW)
        more = median(with_it - without for with_it, without in zip(*idle.values(), strict=True))
        found[where] |= {"idle_seconds": {way: median(times) for way, times in idle.items()}, "idle_seconds_more": more}
        print(f"HTTP, {where}: {fewer:.1%} fewer answers a second, {1000 * more:.2f} ms more of one")
    return found


def many(run: Path, seconds: float) -> dict[str, Any]:
    """200 clients."""
    random = Random(2)
    bodies = [json.dumps({"texts": [text_of(random, random.choice((8, 16, 32)))]}) for _ in range(256)]
    with our_server(run) as (port, process):
        load(port, "/v1/predict", bodies, 200, seconds / 2)
        before = _memory(process)
        found = load(port, "/v1/predict", bodies, 200, seconds)
        after = _memory(process)
    print(f"200 clients: {found.rate:.0f} a second, {found.failed} failed; {before >> 20} MiB, then {after >> 20} MiB")
    return {**found._asdict(), "clients": 200, "memory": [before, after]}


def start(run: Path) -> float:
    began = time.perf_counter()
    with our_server(run):
        seconds = time.perf_counter() - began
    print(f"start to ready: {seconds:.2f} s")
    return seconds


@contextmanager
def on(cores: list[int]) -> Iterator[None]:
    """This process, and those that it starts, on these cores; on those it has where there are none."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def our_server(run: Path) -> Iterator[tuple[int, subprocess.Popen]]:
    command = [sys.executable, "-m", "trunkline", "serve", str(run), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline().split()[0].rpartition(":")[2])
        _until_answered(port, "/ready")
        yield port, process
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def padded_server(folder: Path, texts: int) -> Iterator[tuple[int, subprocess.Popen]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = Path(__file__).with_name("padded_server.py")
    command = [sys.executable, str(script), str(folder), str(port), "--texts", str(texts)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        _until_answered(port, "/health")
        yield port, process
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its processes outlive a request to end
        process.wait(60)


def _until_answered(port: int, path: str) -> None:
    last = time.monotonic() + 60
    while time.monotonic() < last:
        try:
            connection = HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.01)
    raise TimeoutError(f"nothing answers on port {port}")


def load(port: int, path: str, bodies: list[str], clients: int, seconds: float) -> Load:
    """From a process of its own."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_clients, (port, path, bodies, clients, seconds))


def _clients(port: int, path: str, bodies: list[str], clients: int, seconds: float) -> Load:
    times: list[float] = []
    failed: list[int] = []
    ends = time.perf_counter() + seconds

    def client(number: int) -> None:
        one = Client(port, path)
        place = number * 7919
        while (began := time.perf_counter()) < ends:
            answered = one.ask(bodies[place % len(bodies)]) == 200
            (times if answered else failed).append(time.perf_counter() - began)
            place += 1

    threads = [Thread(target=client, args=(number,)) for number in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took, times = time.perf_counter() - began, sorted(times)
    return Load(len(times) / took, median(times), times[int(0.99 * len(times))], len(failed))


class Client:
    """One connection that stays open. It works as little as it can, since it shares the cores with the server."""

    def __init__(self, port: int, path: str):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self.head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "

    def ask(self, body: str) -> int:
        """The status of the answer."""
        self.socket.sendall(f"{self.head}{len(body)}\r\n\r\n{body}".encode("ascii"))
        head, received = b"", b""
        while not head:
            received += self._receive()
            head, _, text = received.partition(b"\r\n\r\n") if b"\r\n\r\n" in received else (b"", b"", b"")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        while len(text) < length:
            text += self._receive()
        return int(head.split(b" ", 2)[1])

    def _receive(self) -> bytes:
        if not (received := self.socket.recv(1 << 16)):
            raise ConnectionError("the server has closed the connection")
        return received


def _memory(process: subprocess.Popen) -> int:
    """Bytes that a process has in memory."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
