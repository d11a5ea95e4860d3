"""What may go wrong with a server: too much to do, a worker that dies, a text that breaks the model, being stopped."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from answering import adapted_engine
from conftest import command_line
from serving.http_server import WAIT, Answered, ask, running, until
from trunkline.engine.answers.writing import Writing
from trunkline.serving.app import make_app
from trunkline.training.cli import main

TEXT = "One two three. And four five."


class Gate:
    """Stands before the passes of a worker: they wait until it opens."""

    def __init__(self, worker: Any, monkeypatch: pytest.MonkeyPatch):
        self.passes: list[int] = []
        self.opened = threading.Event()
        inner = worker._pass

        def _pass(questions):
            self.passes.append(len(questions))
            assert self.opened.wait(WAIT)
            return inner(questions)

        monkeypatch.setattr(worker, "_pass", _pass)


@pytest.fixture
def gate(small, monkeypatch) -> Iterator[Gate]:
    gate = Gate(small.worker, monkeypatch)
    yield gate
    gate.opened.set()


@contextmanager
def asking(port: int, bodies: list[dict], path: str = "/v1/predict") -> Iterator[list]:
    """Requests at the same time; futures of what they are answered."""
    with ThreadPoolExecutor(len(bodies)) as clients:
        yield [clients.submit(ask, port, path, body) for body in bodies]


def test_what_waits_together_is_answered_in_one_pass(small, gate):
    with asking(small.port, [{"texts": ["a"]}]) as first:
        until(lambda: gate.passes)  # alone: nobody waits for more to come
        with asking(small.port, [{"texts": [f"a {i}"]} for i in range(8)]) as others:
            until(lambda: len(small.worker.questions) == 8)
            gate.opened.set()
            assert [answered.result().status for answered in (*first, *others)] == [200] * 9
    assert gate.passes[0] == 1
    assert sum(gate.passes) == 9
    assert len(gate.passes) <= 4  # passes of at most 64 tokens


def test_overflow_is_refused_and_passes(small, gate):
    texts = ["a" * 40] * 3
    with asking(small.port, [{"texts": ["a"]}]) as first:
        until(lambda: gate.passes)
        with asking(small.port, [{"texts": texts}]) as second:
            until(lambda: len(small.worker.questions) == 3)
            refused = ask(small.port, "/v1/predict", {"texts": texts})
            assert refused.status == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert "try again" in refused.fault[1]
            assert 'trunkline_waiting_tokens{what="answers"} 123.0' in ask(small.port, "/metrics").content
            gate.opened.set()
            assert [answered.result().status for answered in (*first, *second)] == [200, 200]
    assert ask(small.port, "/v1/predict", {"texts": texts}).status == 200
    assert ask(small.port, "/v1/predict", {"texts": texts * 20}).status == 200  # more than may wait, and nothing waits


def test_a_text_that_breaks_the_model_fails_alone(small, gate, monkeypatch):
    from trunkline.serving import worker as module

    inner = module.answer

    def answer(engine, questions):
        if any(question.laid.text == "poison" for question in questions):
            raise RuntimeError("index out of range")
        return inner(engine, questions)

    monkeypatch.setattr(module, "answer", answer)
    texts = ["a", "b", "poison", "c", "d"]
    with asking(small.port, [{"texts": ["first"]}]) as first:
        until(lambda: gate.passes)
        with asking(small.port, [{"texts": [text], "tasks": ["polarity"]} for text in texts]) as others:
            until(lambda: len(small.worker.questions) == 5)
            gate.opened.set()
            assert first[0].result().status == 200
            found = {text: answered.result() for text, answered in zip(texts, others, strict=True)}
    assert {text: said.status for text, said in found.items()} == {**dict.fromkeys(texts, 200), "poison": 500}
    assert found["poison"].fault == (
        ["body", "texts", 0],
        "the model failed over this text: RuntimeError: index out of range",
    )
    assert ask(small.port, "/health").status == 200


class Killed(BaseException):
    pass


def test_a_worker_that_dies_is_started_anew_and_its_texts_asked_again(small, monkeypatch, caplog):
    from trunkline.serving import app as module

    monkeypatch.setattr(module, "LOOKS_EVERY", 0.01)
    inner, died, revive = small.worker._pass, [], small.worker.revive
    held = threading.Event()
    monkeypatch.setattr(small.worker, "revive", lambda: held.is_set() and revive())

    def _pass(questions):
        if not died:
            died.append(len(questions))
            raise Killed
        return inner(questions)

    monkeypatch.setattr(small.worker, "_pass", _pass)
    with asking(small.port, [{"texts": [TEXT]}]) as first:
        until(lambda: ask(small.port, "/health").status == 503)
        assert ask(small.port, "/ready").status == 503
        held.set()
        assert first[0].result().status == 200
    assert ask(small.port, "/health").status == 200
    assert "trunkline_worker_restarts_total 1.0" in ask(small.port, "/metrics").content
    assert "the worker died" in caplog.text


def test_a_text_that_kills_every_worker_is_given_up(small, monkeypatch, caplog):
    inner = small.worker._pass

    def _pass(questions):
        if any(question.laid.text == "poison" for question in questions):
            raise Killed
        return inner(questions)

    monkeypatch.setattr(small.worker, "_pass", _pass)
    refused = ask(small.port, "/v1/predict", {"texts": ["poison"]})
    assert (refused.status, "died over this text, twice" in refused.fault[1]) == (500, True)
    assert ask(small.port, "/v1/predict", {"texts": ["a"]}).status == 200


def test_texts_join_while_others_are_written(small, monkeypatch):
    """A short text that comes later is there first; both are those of the engine alone."""
    join, step, second, joined = Writing.join, Writing.step, threading.Event(), []
    monkeypatch.setattr(Writing, "join", lambda self, texts: joined.append(len(self.texts)) or join(self, texts))

    def slow_step(self):
        if not second.is_set() and len(self.texts) == 1 and self.texts[0].tokens:
            second.set()
            until(lambda: len(small.worker.prompts))
        return step(self)

    monkeypatch.setattr(Writing, "step", slow_step)
    texts = ["One two three", "four"]
    with asking(small.port, [{"texts": texts[:1]}], "/v1/generate") as first:
        assert second.wait(WAIT)
        later = ask(small.port, "/v1/generate", {"texts": texts[1:]})
        written = [answered.content["texts"][0] for answered in (first[0].result(), later)]
    assert written == small.engine.generate(texts, "retell")
    assert joined == [0, 1]


def test_texts_of_several_adapters_are_written_side_by_side():
    engine = adapted_engine()
    app = make_app(engine, "adapted", batch_tokens=512)
    texts = ["One two three", "four", "five six"]
    with running(app) as port:
        bodies = [{"texts": texts, "task": task} for task in ("retell", "rewrite")]
        with asking(port, bodies, "/v1/generate") as asked:
            written = [one.result().content["texts"] for one in asked]
    assert written == [engine.generate(texts, task) for task in ("retell", "rewrite")]
    assert written[0] != written[1]


def test_every_one_of_many_requests_is_answered_once(served):
    """Each by its own answer, whoever else asks."""
    texts = [f"{i} {'word ' * (i % 9)}" for i in range(40)]
    expected = [round(number, 4) for number in served.engine.predict(texts, ["stars"])["stars"]]

    def client(first: int) -> list[float]:
        with closing(HTTPConnection("127.0.0.1", served.port, timeout=WAIT)) as connection:
            found = []
            for i in range(first, len(texts)):
                body = json.dumps({"texts": [texts[i]], "tasks": ["stars"]})
                connection.request("POST", "/v1/predict", body, {"content-type": "application/json"})
                response = connection.getresponse()
                found.append(json.loads(response.read())["predictions"][0]["stars"]["label"])
            return found

    with ThreadPoolExecutor(30) as clients:
        for first, found in enumerate(clients.map(client, range(30))):
            assert found == pytest.approx(expected[first:], abs=2e-4)
    assert served.worker.questions.tokens == 0
    assert not served.worker._in_hand


@pytest.fixture(scope="module")
def folder(engine, tmp_path_factory) -> Path:
    return engine.save(tmp_path_factory.mktemp("saved"))


@contextmanager
def process(*arguments: Any) -> Iterator[subprocess.Popen]:
    program, environment = command_line("serve", *arguments)
    started = subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def port_of(started: subprocess.Popen) -> int:
    line = started.stdout.readline()
    assert line.startswith("http://127.0.0.1:"), line + started.stderr.read()
    return int(line.split("/")[2].split(":")[1].split()[0])


def test_told_to_stop_it_answers_what_it_has_taken_and_ends(folder):
    with process(folder, "--port", 0, "--max-batch-tokens", 64, "--max-waiting-tokens", 100_000) as started:
        port = port_of(started)
        until(lambda: ask(port, "/ready").status == 200)
        bodies = [{"texts": [f"{i} {'a' * 60}" for i in range(first, first + 25)]} for first in range(8)]
        with asking(port, bodies) as asked:
            until(lambda: 'waiting_tokens{what="answers"} 0.0' not in ask(port, "/metrics").content)
            time.sleep(0.05)  # for the other requests to come in
            os.kill(started.pid, signal.SIGTERM)
            answered: list[Answered] = [one.result() for one in asked]
        assert [(one.status, len(one.content["predictions"])) for one in answered] == [(200, 25)] * 8
        assert started.wait(WAIT) == 0
        assert started.stderr.read() == ""


def test_two_servers_on_one_port(served, folder, capsys):
    assert main(["serve", str(folder), "--port", str(served.port)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        f"trunkline: serve: cannot listen on port {served.port} of 127.0.0.1: Address already in use; "
        "--port chooses another, and 0 any that is free\n"
    )
    assert ask(served.port, "/info").status == 200  # the first one goes on


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "65536"], "port must be between 0 and 65535, got 65536"),
        (["--host", "no.such.host.invalid"], "cannot listen on port 8000 of no.such.host.invalid"),
        (["--max-batch-tokens", "-1"], "token budgets must be at least 1, got -1"),
        (["--token-file", "nowhere"], "the token file nowhere cannot be read"),
        (["--token-file", os.devnull], "the first line of /dev/null must be the token"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_before_the_model_is_loaded(arguments, message, capsys):
    assert main(["serve", "no run at all", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("host", "warned"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_a_server_that_can_be_reached_from_outside_says_so(folder, host, warned, capsys, monkeypatch):
    from trunkline.serving import server

    monkeypatch.setattr(server._Server, "run", lambda self, sockets: None)
    server.serve(folder, host, 0)
    said = capsys.readouterr()
    assert said.out.startswith(f"http://{host}:")
    assert ("can be reached from outside, and there is no --token-file" in said.err) == warned
