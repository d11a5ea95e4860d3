"""SIGTERM and Ctrl-C: a run ends the step it is in, saves a checkpoint and stops."""

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
EXIT_CODE = 128  # and the number of the signal


class Interruption:
    """A context in which these signals only ask to stop; a second one stops at once.

    Outside the main thread, where Python lets nobody handle signals, it does nothing.
    """

    def __init__(self):
        self.asked: signal.Signals | None = None
        self.handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            self.stop()
        self.asked = signal.Signals(number)

    def stop(self) -> None:
        """
        Raises:
            KeyboardInterrupt: asked by Ctrl-C.
            SystemExit: asked by SIGTERM; with the exit code that shells give it.
        """
        if self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(EXIT_CODE + signal.SIGTERM)
