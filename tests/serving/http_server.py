"""A server on loopback for a test, and what it answers."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from typing import Any, NamedTuple

WAIT = 60.0  # seconds until a test is given up


class Answered(NamedTuple):
    status: int
    content: Any  # JSON, or text
    headers: dict[str, str]

    @property
    def fault(self) -> tuple[list, str]:
        """Where and what, of the first that is wrong."""
        return self.content["detail"][0]["loc"], self.content["detail"][0]["msg"]


@contextmanager
def running(app: Any) -> Iterator[int]:
    """Serves an application in a thread; the port comes back."""
    import uvicorn

    listening = socket.create_server(("127.0.0.1", 0), backlog=512)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    port = listening.getsockname()[1]
    try:
        until(lambda: ask(port, "/ready").status == 200)
        yield port
    finally:
        server.should_exit = True
        thread.join(WAIT)
        assert not thread.is_alive()
        listening.close()


def ask(port: int, path: str, body: Any = None, method: str = "", **headers: str) -> Answered:
    """POST where there is a body, of JSON if it is no bytes; of parts, chunked."""
    data = body if isinstance(body, bytes | Iterator) or body is None else json.dumps(body).encode()
    given = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    with closing(HTTPConnection("127.0.0.1", port, timeout=WAIT)) as connection:
        connection.request(method or ("GET" if body is None else "POST"), path, data, given)
        response = connection.getresponse()
        text, kind = response.read(), response.headers.get_content_type()
        content = json.loads(text) if kind == "application/json" and text else text.decode()
        return Answered(response.status, content, {name.lower(): value for name, value in response.getheaders()})


def until(condition) -> None:
    """Waits for it."""
    last = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < last, "it has not come to pass"
        time.sleep(0.01)
