"""Which candidate of every decision is fastest, of those that are right: a contest in turns by a given clock."""

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from trunkline.kernels.decisions import Choice, Question, questions, trying

MARGIN = 0.97  # of the default's time that another candidate has to do with: clocks are not better than that
Call = Callable[[], Any]
Clock = Callable[[Call], float]  # seconds that a call takes


@dataclass(frozen=True)
class Work:
    """An op at sizes of somebody's config, as it will be called."""

    name: str
    call: Call
    problem: Callable[[], str]  # what is wrong with its result; empty: nothing


@dataclass(frozen=True)
class Row:
    """A candidate of a decision."""

    work: str
    decision: str
    facts: str
    answer: Choice
    seconds: float | None  # a call; None: it does not take part
    problem: str  # why not
    chosen: bool


def contest(work: Work, clock: Clock, rounds: int, leave_out: Collection[Choice] = ()) -> list[Row]:
    """The candidates of all decisions that a work asks for, one decision after the other, and which were chosen.

    What is fastest is chosen where it is right and clearly faster than what was decided without a card; of a decision
    whose candidates are all wrong, or cannot be had, nothing is.

    Args:
        work: what is done.
        clock: by which it is timed.
        rounds: turns of each candidate, whose median counts.
        leave_out: answers that cannot serve, whatever they take.
    """
    with questions() as asked:
        _attempt(work.problem)
    rows: list[Row] = []
    with ExitStack() as decided:  # what was chosen holds while the next is tried
        for question in asked:
            if len(answers := question.answers) < 2:
                continue
            of_question = _turns(work, question, answers, clock, rounds, leave_out)
            for row in of_question:
                if row.chosen:
                    decided.enter_context(trying(question, row.answer))
            rows += of_question
    return rows


def _turns(
    work: Work, question: Question, answers: Sequence[Choice], clock: Clock, rounds: int, leave_out: Collection[Choice]
) -> list[Row]:
    problems: list[str] = []
    times: list[list[float]] = [[] for _ in answers]

    def warm_up() -> str:
        clock(work.call)
        return ""

    for answer in answers:
        with trying(question, answer):
            left_out = "cannot be compiled with the model" if answer in leave_out else ""
            problems.append(left_out or _attempt(work.problem) or _attempt(warm_up))
    for _ in range(rounds):
        for answer, problem, taken in zip(answers, problems, times, strict=True):
            if not problem:
                with trying(question, answer):
                    taken.append(clock(work.call))
    seconds = [median(taken) if taken else None for taken in times]
    known = {place: taken for place, taken in enumerate(seconds) if taken is not None}
    best = min(known, key=lambda place: known[place], default=-1)
    if best > 0 and 0 in known and known[best] > MARGIN * known[0]:
        best = 0
    return [
        Row(work.name, *question.place, answer, seconds[place], problems[place], place == best)
        for place, answer in enumerate(answers)
    ]


def _attempt(does: Callable[[], str]) -> str:
    """What is wrong with it; also where it cannot be done at all."""
    try:
        return does()
    except Exception as error:  # whatever a compiler, a driver or another library throws is this candidate's problem
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def turn_on_gpu(calls: Sequence[Call], number: int) -> float:
    """Device time between two events. The calls are queued behind a kernel that sleeps for as long as that takes, so
    that the host's time to launch them is not in it, as it would not be in a CUDA graph."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    calls[0]()
    host = time.perf_counter() - began
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(2e9 * min(1.0, 1.5 * host * number + 1e-4)))  # in cycles, at about 2 GHz
    start.record()
    for i in range(number):
        calls[i % len(calls)]()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / number
