"""The one thread that owns the model.

It takes all that waits, up to a budget of tokens, and answers it in one pass of the packed trunk, which has no padding:
long and short texts share a pass, and so do the tasks that are asked of a text. It never waits for more to come. Texts
that are written go on by one token between passes, and prompts join at the next token.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import groupby
from typing import TYPE_CHECKING, Any

from trunkline.engine.answers.answer import Question, answer, reader_of
from trunkline.engine.answers.ask import answering, question
from trunkline.engine.answers.writing import Text, Writing
from trunkline.engine.network.model import MultiTaskModel
from trunkline.engine.text.tokenizer import Tokenizer
from trunkline.serving.measures import Measures
from trunkline.serving.waiting import Job, Waiting

if TYPE_CHECKING:
    from trunkline.engine.engine import Engine

logger = logging.getLogger("trunkline.serving")
STUCK = 120.0  # seconds for a pass or a token after which the worker is taken for dead


class Worker:
    """
    Args:
        batch_tokens: of a pass.
        waiting_tokens: that may wait, for answers and for texts each.
    """

    def __init__(self, engine: "Engine", measures: Measures, batch_tokens: int, waiting_tokens: int):
        self.engine, self.measures, self.batch_tokens = engine, measures, batch_tokens
        self.questions: Waiting[Question] = Waiting(waiting_tokens)
        self.prompts: Waiting[Text] = Waiting(waiting_tokens)
        self.ready = False
        self.busy_since = 0.0  # 0: idle
        self._changed = threading.Condition()  # guards the queues and what is in hand
        self._in_hand: dict[Job, None] = {}
        self._closing = False
        self._begin()

    def _begin(self) -> None:
        self._written: dict[Text, Job[Text]] = {}
        self._writings: dict[int, Writing] = {}  # by reader
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def _writing_of(self, task: int) -> Writing | None:
        """With what a task's texts are written; None of a model that writes otherwise: a Bi-LSTM, or beam search."""
        model, search = self.engine.model, self.engine.config.search
        if not isinstance(model, MultiTaskModel) or search.beams > 1:
            return None
        return self._writings.setdefault(reader_of(model, task), Writing(model, self._tokenizer.ends, search))

    def _reader(self, job: Job[Text]) -> int:
        return reader_of(self.engine.model, job.work.task)

    @property
    def _tokenizer(self) -> Tokenizer:
        assert self.engine.tokenizer is not None
        return self.engine.tokenizer

    # From the threads of requests

    def start(self) -> None:
        self._thread.start()

    def ask(self, questions: Sequence[Question]) -> list[Job[Question]]:
        """Jobs whose `answer` will be a dict, by task.

        Raises:
            FullError: too much waits.
        """
        return self._put(self.questions, [Job(question, question.size) for question in questions])

    def write(self, texts: Sequence[Text]) -> list[Job[Text]]:
        """Jobs whose `answer` will be the text.

        Raises:
            FullError: too much waits.
        """
        return self._put(self.prompts, [Job(text, text.slots) for text in texts])

    def _put(self, queue: Waiting, jobs: list[Job]) -> list[Job]:
        with self._changed:
            queue.put(jobs)
            self._tell_waiting()
            self._changed.notify()
        return jobs

    def _tell_waiting(self) -> None:
        self.measures.waiting(self.questions.tokens, self.prompts.tokens)

    @property
    def alive(self) -> bool:
        """Whether the thread runs and does not hang."""
        since = self.busy_since
        return self._thread.is_alive() and not (since and time.monotonic() - since > STUCK)

    def revive(self) -> None:
        """Starts the thread anew where it has died; what it had in hand waits again, once."""
        if self._thread.is_alive() or self._closing:
            return
        with self._changed:
            for job in self._in_hand:
                if job.retried:
                    job.answer.set_exception(RuntimeError("the worker died over this text, twice"))
                job.retried = True
            again = [job for job in self._in_hand if not job.answer.done()]
            for job in again:
                if isinstance(job.work, Text):
                    job.work.tokens.clear()
            self.questions.put_back([job for job in again if isinstance(job.work, Question)])
            self.prompts.put_back([job for job in again if isinstance(job.work, Text)])
            self._in_hand = {}
        self.busy_since = 0.0
        self.measures.restarts.inc()
        self._begin()
        self.start()

    def close(self) -> None:
        """Ends the thread after all that waits is answered."""
        self.revive()
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    # In the thread

    def _run(self) -> None:
        try:
            if not self.ready:
                self._warm_up()
            self._work()
        except BaseException:  # `revive` starts another thread; this says why
            logger.exception("the worker died")

    def _work(self) -> None:
        while self._wait():
            self.busy_since = time.monotonic()
            with self._changed:
                questions = self.questions.take(self.batch_tokens)
                taken = sum(text.slots for text in self._written)
                prompts = self.prompts.take(max(1, self.batch_tokens - taken)) if self._may_join(taken) else []
                self._in_hand |= dict.fromkeys([*questions, *prompts])
                self._tell_waiting()
            if questions:
                self._each(questions, self._answer)
            for _, of_reader in groupby(sorted(prompts, key=self._reader), key=self._reader):
                self._each(list(of_reader), self._begin_texts)
            if self._written:
                self._go_on_writing()
            self.busy_since = 0.0

    def _wait(self) -> bool:
        """Until there is something to do; False where there will be nothing any more."""
        with self._changed:
            while not (self.questions or self.prompts or self._written):
                if self._closing:
                    return False
                self._changed.wait()
        return True

    def _may_join(self, taken: int) -> bool:
        """The first prompt, where so many tokens are of texts in work: if they leave room, or there are none."""
        return bool(self.prompts) and (not taken or taken + self.prompts.jobs[0].size <= self.batch_tokens)

    def _warm_up(self) -> None:
        """A first pass of all tasks: what is made or chosen at the first call is there when a request comes."""
        counts = {len(task.text) for task in self.engine.tasks}
        for count in sorted(counts):
            if tasks := answering(self.engine, count):
                with suppress(ValueError):  # a tokenizer that makes nothing of it
                    self._pass([question(self.engine, ("a word",) * count, tasks)])
        self.ready = True

    def _pass(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        began = time.monotonic()
        answers = answer(self.engine, questions)
        self.measures.passed(len(questions), sum(q.size for q in questions), time.monotonic() - began)
        return list(answers)

    def _each(self, jobs: Sequence[Job], work: Callable[[Sequence[Job]], None]) -> None:
        """Works on them together. Where that fails, for memory or over one of them, on both halves by themselves: so
        none fails but those that fail alone."""
        try:
            work(jobs)
        except Exception as error:
            if len(jobs) == 1:
                self._give(jobs[0], error)
                return
            for half in (jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :]):
                self._each(half, work)

    def _answer(self, jobs: Sequence[Job[Question]]) -> None:
        for job, said in zip(jobs, self._pass([job.work for job in jobs]), strict=True):
            for name in said:
                self.measures.answered(name, time.monotonic() - job.since)
            self._give(job, said)

    def _begin_texts(self, jobs: Sequence[Job[Text]]) -> None:
        """Of tasks with the same reader."""
        if (writing := self._writing_of(jobs[0].work.task)) is None:
            for job in jobs:
                self._each([job], self._write_at_once)
            return
        with self.engine.autocast():
            writing.join([job.work for job in jobs])
        self._written |= {job.work: job for job in jobs}

    def _go_on_writing(self) -> None:
        """One token of every text."""
        for reader, writing in list(self._writings.items()):
            try:
                with self.engine.autocast():
                    ended = writing.step() if writing.texts else []
            except Exception as error:  # which text is to blame cannot be told: all of them share the cache
                del self._writings[reader]
                for text in [text for text, job in self._written.items() if self._reader(job) == reader]:
                    self._give(self._written.pop(text), error)
                continue
            for text in ended:
                self._give_text(self._written.pop(text))

    def _write_at_once(self, jobs: Sequence[Job[Text]]) -> None:
        """From the first token to the last, of one text."""
        text, ends, search = jobs[0].work, self._tokenizer.ends, self.engine.config.search
        with self.engine.autocast():
            (text.tokens,) = self.engine.model.generate([text.prompt], text.task, ends, search)
        self._give_text(jobs[0])

    def _give_text(self, job: Job[Text]) -> None:
        self.measures.answered(self.engine.tasks[job.work.task].name, time.monotonic() - job.since)
        self._give(job, self._tokenizer.decode(job.work.tokens))

    def _give(self, job: Job, said: Any) -> None:
        with self._changed:
            del self._in_hand[job]
        if isinstance(said, Exception):
            job.answer.set_exception(said)
        else:
            job.answer.set_result(said)
