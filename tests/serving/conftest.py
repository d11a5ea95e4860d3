"""Servers of an engine with every kind of head; without the extra `serve` there is nothing to test."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from answering import answering_engine
from serving.http_server import running
from trunkline import Engine

try:
    from trunkline.serving.app import make_app
    from trunkline.serving.worker import Worker
except ImportError:
    collect_ignore_glob = ["test_*.py"]


class Served(NamedTuple):
    engine: Engine
    port: int
    worker: "Worker"


@pytest.fixture(scope="session")
def engine() -> Engine:
    return answering_engine()


@pytest.fixture(scope="session")
def served(engine: Engine) -> Iterator[Served]:
    """Not to be disturbed."""
    app = make_app(engine, "farm", batch_tokens=512)
    with running(app) as port:
        yield Served(engine, port, app.state.worker)


@pytest.fixture
def small(engine: Engine) -> Iterator[Served]:
    """With passes of 64 tokens, of which 128 may wait; a test may do to it what it likes."""
    app = make_app(engine, "small", batch_tokens=64, waiting_tokens=128)
    with running(app) as port:
        yield Served(engine, port, app.state.worker)
