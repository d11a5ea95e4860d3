"""`trunkline serve`: from a run to a server on a port."""

import gc
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from trunkline.engine.console import warn
from trunkline.engine.engine import Engine
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.network.memory import keep_freed_memory
from trunkline.serving.app import make_app

ON_CPU, ON_GPU = 4096, 16384  # tokens of a pass: more make a CPU no faster, and all wait for the slowest
PASSES_WAITING = 16  # tokens that may wait, in passes
SWITCH_INTERVAL = (
    2e-4  # seconds; after every operation the model's thread waits for the event loop, by default up to 5 ms
)
PATIENCE = 30  # seconds for what is in work when the server is told to stop


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Told to stop, it answers what it has taken and ends; uvicorn's own would then die of the signal."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(
    run: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    device: str = "auto",
    batch_tokens: int = 0,
    waiting_tokens: int = 0,
    token_file: Path | None = None,
) -> None:
    """Serves a run until SIGTERM or Ctrl-C.

    Args:
        port: 0: any that is free.
        batch_tokens: of a pass; 0: 4,096 on a CPU, 16,384 on a GPU.
        waiting_tokens: that may wait; 0: those of 16 passes.
        token_file: whose first line every request must have, as `Authorization: Bearer LINE`.

    Raises:
        ValueError: no such run, a limit that cannot be, or an empty token.
        OSError: the port is taken, or not to be had.
    """
    began = time.monotonic()
    if batch_tokens < 0 or waiting_tokens < 0:
        raise ValueError(f"serve: token budgets must be at least 1, got {min(batch_tokens, waiting_tokens)}")
    token = _token(token_file) if token_file else ""
    keep_freed_memory()
    sys.setswitchinterval(SWITCH_INTERVAL)
    with _bound(host, port) as listening:  # before the model is loaded: a port that is taken shows at once
        engine = Engine.load(run, device=device)
        batch_tokens = batch_tokens or (ON_GPU if engine.device.type == "cuda" else ON_CPU)
        app = make_app(
            engine,
            run.resolve().name,
            batch_tokens=batch_tokens,
            waiting_tokens=waiting_tokens or PASSES_WAITING * batch_tokens,
            token=token,
        )
        address = f"http://{host}:{listening.getsockname()[1]}"
        names = ", ".join(task.name for task in engine.tasks if HEADS[task.head].labelled)
        print(f"{address} answers for {names}; loaded in {time.monotonic() - began:.1f} s", flush=True)
        if not token and host not in ("127.0.0.1", "::1", "localhost"):
            warn(f"serve: {host} can be reached from outside, and there is no --token-file")
        settings = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            timeout_graceful_shutdown=PATIENCE,
            ws="none",
        )
        gc.collect()
        gc.freeze()  # what is loaded stays: no collection looks through it while requests wait
        _Server(settings).run(sockets=[listening])


def _bound(host: str, port: int) -> socket.socket:
    """A socket that listens; requests that come before the model is there wait in it."""
    if not 0 <= port <= 65535:
        raise ValueError(f"serve: port must be between 0 and 65535, got {port}")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(place)
            listening.listen(2048)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        hint = "" if isinstance(error, socket.gaierror) else "; --port chooses another, and 0 any that is free"
        raise OSError(f"serve: cannot listen on port {port} of {host}: {error.strerror}{hint}") from error
    return listening


def _token(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"serve: the token file {path} cannot be read: {error}") from error
    token = lines[0].strip() if lines else ""
    if not token or not token.isascii() or not token.isprintable():
        raise ValueError(f"serve: the first line of {path} must be the token: printable ASCII, and not empty")
    return token
