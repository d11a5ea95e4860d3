"""What a server counts, as Prometheus reads it."""

from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
TOKENS = (16, 64, 256, 1024, 4096, 16384, 65536)
TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Measures:
    """Of one server: a process may have several."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        requests = Counter("trunkline_requests", "Requests, by path and status.", ["path", "status"], registry=registry)
        self.restarts = Counter("trunkline_worker_restarts", "How often the worker died.", registry=registry)
        waiting = Gauge("trunkline_waiting_tokens", "Tokens that wait.", ["what"], registry=registry)
        self._texts = Histogram("trunkline_pass_texts", "Texts of a pass.", buckets=TEXTS, registry=registry)
        self._tokens = Histogram("trunkline_pass_tokens", "Tokens of a pass.", buckets=TOKENS, registry=registry)
        self._passes = Histogram("trunkline_pass_seconds", "Time of a pass.", buckets=SECONDS, registry=registry)
        answers = Histogram(
            "trunkline_answer_seconds",
            "Time from a text's arrival to its answer.",
            ["task"],
            buckets=SECONDS,
            registry=registry,
        )
        # To find a labelled one costs more than to count with it.
        self._request, self._answer = cache(requests.labels), cache(answers.labels)
        self._questions, self._prompts = waiting.labels("answers"), waiting.labels("texts")

    def requested(self, path: str, status: int) -> None:
        self._request(path, str(status)).inc()

    def waiting(self, questions: int, prompts: int) -> None:
        self._questions.set(questions)
        self._prompts.set(prompts)

    def passed(self, texts: int, tokens: int, seconds: float) -> None:
        self._texts.observe(texts)
        self._tokens.observe(tokens)
        self._passes.observe(seconds)

    def answered(self, task: str, seconds: float) -> None:
        self._answer(task).observe(seconds)

    def page(self) -> bytes:
        return generate_latest(self.registry)
