"""What waits to be worked on: as many tokens as are allowed, first come first served."""

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Work = TypeVar("Work")


class FullError(Exception):
    """More waits than is allowed."""


@dataclass(eq=False)
class Job(Generic[Work]):
    """One text of a request."""

    work: Work
    size: int
    """What it takes of a batch, in tokens."""
    answer: Future = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)
    retried: bool = False
    """Whether the worker died over it once."""


class Waiting(Generic[Work]):
    """A queue of jobs. It has no lock: its users hold one.

    Args:
        most: tokens that may wait.
    """

    def __init__(self, most: int):
        self.most, self.tokens = most, 0
        self.jobs: deque[Job[Work]] = deque()

    def __len__(self) -> int:
        return len(self.jobs)

    def put(self, jobs: Sequence[Job[Work]]) -> None:
        """All of them, or none.

        Raises:
            FullError: they are more than find room; not if nothing waits, so that what may come at all is taken.
        """
        size = sum(job.size for job in jobs)
        if self.jobs and self.tokens + size > self.most:
            raise FullError
        self.jobs.extend(jobs)
        self.tokens += size

    def put_back(self, jobs: Sequence[Job[Work]]) -> None:
        """Before all others, in this order."""
        self.jobs.extendleft(reversed(jobs))
        self.tokens += sum(job.size for job in jobs)

    def take(self, tokens: int) -> list[Job[Work]]:
        """All that wait, up to a budget; a larger one is alone. Those whose clients have gone are dropped."""
        taken: list[Job[Work]] = []
        while self.jobs and (not taken or self.jobs[0].size <= tokens):
            job = self.jobs.popleft()
            self.tokens -= job.size
            if job.retried or job.answer.set_running_or_notify_cancel():
                taken.append(job)
                tokens -= job.size
        return taken
