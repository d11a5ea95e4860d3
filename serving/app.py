"""The application: which paths there are, what they take and what they answer."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from difflib import get_close_matches
from functools import cache
from hashlib import sha256
from inspect import signature
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import ValidationError

from trunkline import __version__
from trunkline.engine.answers.answer import Question
from trunkline.engine.answers.ask import answering, prompt, question
from trunkline.engine.answers.writing import Text
from trunkline.engine.engine import Engine
from trunkline.engine.heads.registry import HEADS
from trunkline.engine.text.given import fits, text_rows
from trunkline.serving.limits import Limits, refusal
from trunkline.serving.measures import Measures
from trunkline.serving.schemas import (
    Generate,
    Info,
    Inputs,
    Predict,
    Predictions,
    Refusal,
    Score,
    TaskInfo,
    Texts,
)
from trunkline.serving.waiting import FullError, Job
from trunkline.serving.worker import Worker

LOOKS_EVERY = 0.2  # seconds between looks whether the worker lives
RETRY_AFTER = 1  # seconds
MOST_FAULTS = 20  # of a request that are told
READ_AT_ONCE = 4096  # characters of a request's texts; these take a millisecond, a thread for them half of one
REFUSALS: dict[int | str, dict[str, Any]] = {
    401: {"model": Refusal, "description": "No token, or a wrong one."},
    413: {"model": Refusal, "description": "A body, or without `truncate` a text, that is too long."},
    415: {"model": Refusal, "description": "A body that is not said to be JSON."},
    422: {"model": Refusal, "description": "A field is wrong; `loc` says which."},
    429: {"model": Refusal, "description": "Too much waits already."},
    500: {"model": Refusal, "description": "The model failed over a text."},
}


class RefusedError(Exception):
    """A request that is not answered, and why."""

    def __init__(self, status: int, text: str, kind: str, where: tuple[str | int, ...] = ()):
        super().__init__(text)
        self.status, self.content = status, refusal(text, kind, where)


class _Direct(APIRoute):
    """From the body, which is one model, to the endpoint. FastAPI's own way there, which is for all kinds of arguments,
    takes half a millisecond where its code has left the cache."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        careful = super().get_route_handler()
        (argument,) = signature(self.endpoint).parameters.values()

        async def handle(request: Request) -> Response:
            try:
                asked = argument.annotation.model_validate_json(await request.body())
            except ValidationError:
                return await careful(request)  # which says what is wrong
            return await self.endpoint(asked)

        return handle


def make_app(
    engine: Engine, name: str, *, batch_tokens: int = 4096, waiting_tokens: int = 65536, token: str = ""
) -> FastAPI:
    """
    Args:
        name: of the run, as pages show it.
        batch_tokens: of a pass.
        waiting_tokens: that may wait; what is beyond is refused with status 429.
        token: that requests must have; empty: none.
    """
    measures = Measures()
    worker = Worker(engine, measures, batch_tokens, waiting_tokens)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        watch = asyncio.create_task(_watch(worker))
        yield
        watch.cancel()
        await run_in_threadpool(worker.close)

    app = FastAPI(
        title="Trunkline",
        version=__version__,
        description="Answers of a run: all tasks on a text share its pass through the trunk.",
        lifespan=lifespan,
    )
    app.state.worker = worker
    app.add_middleware(Limits, measures=measures, token=token)
    digest = cache(lambda: _digest(engine))

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> JSONResponse:
        headers = {"Retry-After": str(RETRY_AFTER)} if error.status == 429 else {}
        return JSONResponse(error.content, error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        faults = [{name: fault[name] for name in ("loc", "msg", "type")} for fault in error.errors()[:MOST_FAULTS]]
        return JSONResponse({"detail": faults}, 422)  # without the input, which may be large

    direct = APIRouter(route_class=_Direct)

    @direct.post("/v1/predict", response_model=Predictions, responses=REFUSALS, summary="What tasks say of texts")
    async def predict(request: Predict) -> JSONResponse:
        questions = await _read(_questions, engine, request)
        truncated = _truncated([question.laid.cut for question in questions], request.truncate, "texts", engine)
        answers = await _answers(worker.ask, questions, "texts")
        return JSONResponse({"predictions": answers, "truncated": truncated})

    @direct.post("/v1/generate", response_model=Texts, responses=REFUSALS, summary="What a task writes from texts")
    async def generate(request: Generate) -> JSONResponse:
        texts, cut = await _read(_prompts, engine, request)
        truncated = _truncated(cut, request.truncate, "texts", engine)
        return JSONResponse({"texts": await _answers(worker.write, texts, "texts"), "truncated": truncated})

    app.include_router(direct)

    @app.post(
        "/tasks/{task}/predict",
        response_model=list[Score] | list[list[Score]],
        responses=REFUSALS,
        summary="Classes of one task, the likeliest first",
    )
    async def predict_task(task: str, request: Inputs) -> JSONResponse:
        """As text-embeddings-inference answers for a model of one task."""
        t = _task(engine, task, ("path", "task"))
        if not engine.tasks[t].labels or not HEADS[engine.tasks[t].head].pools:
            raise RefusedError(422, f"task '{task}' has no class per text: use /v1/predict", "task", ("path", "task"))
        several = isinstance(request.inputs, list) and all(isinstance(given, list) for given in request.inputs)
        texts: Any = request.inputs if several else [request.inputs]
        asked = Predict(texts=texts, tasks=[task], truncate=request.truncate)
        questions = await _read(_questions, engine, asked, "inputs")
        _truncated([question.laid.cut for question in questions], request.truncate, "inputs", engine)
        answers = await _answers(worker.ask, questions, "inputs")
        scores = [
            [{"label": label, "score": p} for label, p in sorted(said[task]["scores"].items(), key=lambda x: -x[1])]
            for said in answers
        ]
        return JSONResponse(scores if several else scores[0])

    @app.get("/health", responses={503: {}}, summary="Whether the worker lives")
    async def health() -> Response:
        return Response(status_code=200 if worker.alive else 503)

    @app.get("/ready", responses={503: {}}, summary="Whether the worker lives and is warm")
    async def ready() -> Response:
        return Response(status_code=200 if worker.alive and worker.ready else 503)

    @app.get("/info", summary="The tasks, and the limits")
    async def info() -> Info:
        return Info(
            name=name,
            version=__version__,
            digest=await run_in_threadpool(digest),
            device=str(engine.device),
            max_length=engine.config.batch.max_length,
            max_batch_tokens=batch_tokens,
            max_waiting_tokens=waiting_tokens,
            tasks=[
                TaskInfo(
                    name=task.name,
                    head=task.head,
                    texts=list(task.text),
                    labels=list(task.labels),
                    writes=HEADS[task.head].writes,
                    temperature=engine.temperature(t) if HEADS[task.head].group != "vocabulary" else 1.0,
                )
                for t, task in enumerate(engine.tasks)
                if HEADS[task.head].labelled
            ],
        )

    @app.get("/metrics", response_class=Response, summary="Counts and times, for Prometheus")
    async def metrics() -> Response:
        return Response(measures.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))

    return app


async def _watch(worker: Worker) -> None:
    while True:
        await asyncio.sleep(LOOKS_EVERY)
        worker.revive()


async def _read(reading: Callable[..., Any], engine: Engine, request: Predict | Generate, *more: str) -> Any:
    """What `reading` makes of a request; of a long one in a thread, so that others do not wait for it."""
    size = sum(len(given) if isinstance(given, str) else sum(map(len, given)) for given in request.texts)
    if size <= READ_AT_ONCE:
        return reading(engine, request, *more)
    return await run_in_threadpool(reading, engine, request, *more)


def _task(engine: Engine, name: str, where: tuple[str | int, ...]) -> int:
    """The place of a task."""
    names = [task.name for task in engine.tasks]
    if name not in names:
        nearest = get_close_matches(name, names, n=1, cutoff=0.0)[0]
        text = f"there is no task {name[:60]!r}; did you mean '{nearest}'? There are {', '.join(names)}"
        raise RefusedError(404 if where[0] == "path" else 422, text, "task", where)
    return names.index(name)


def _questions(engine: Engine, request: Predict, field: str = "texts") -> list[Question]:
    """Each text, with those of the tasks that take as many texts as it has."""
    named = [_task(engine, name, ("body", "tasks", place)) for place, name in enumerate(request.tasks)]
    for place, t in enumerate(named):
        if HEADS[engine.tasks[t].head].group == "vocabulary":
            text = f"task '{request.tasks[place]}' writes text: use /v1/generate"
            raise RefusedError(422, text, "task", ("body", "tasks", place))
    questions = []
    for place, given in enumerate(request.texts):
        where = ("body", field, place)
        try:
            (row,) = text_rows([given], "predict")
            if not any(part.strip() for part in row):
                raise ValueError("the text is blank")
            asked = [t for t in dict.fromkeys(named or answering(engine, len(row))) if fits(engine.tasks[t], row)]
            if not asked:
                raise ValueError(_misfit(engine, named, row))
            questions.append(question(engine, row, asked))
        except ValueError as error:
            raise RefusedError(422, str(error).removeprefix("predict: "), "text", where) from error
    return questions


def _misfit(engine: Engine, named: Sequence[int], text: Sequence[str]) -> str:
    tasks = [engine.tasks[t] for t in named or answering(engine)]
    wanted = "; ".join(f"'{task.name}' takes {len(task.text)}: {', '.join(task.text)}" for task in tasks)
    return f"no task takes {len(text)} text(s), or one that is blank: {wanted or 'no task answers without writing'}"


def _prompts(engine: Engine, request: Generate) -> tuple[list[Text], list[bool]]:
    writing = [task.name for task in engine.tasks if HEADS[task.head].writes]
    name = request.task if request.task is not None else writing[0] if len(writing) == 1 else ""
    if not name:
        text = f"task must be one of {', '.join(writing)}" if writing else "no task of this run writes"
        raise RefusedError(422, text, "task", ("body", "task"))
    t = _task(engine, name, ("body", "task"))
    if name not in writing:
        raise RefusedError(422, f"task '{name}' writes no text: use /v1/predict", "task", ("body", "task"))
    most = engine.config.search.max_new_tokens
    if (request.max_new_tokens or 0) > most:
        text = f"max_new_tokens must be at most {most}, got {request.max_new_tokens}"
        raise RefusedError(422, text, "value", ("body", "max_new_tokens"))
    texts, cut = [], []
    for place, given in enumerate(request.texts):
        try:
            text_rows([given], "generate")
            if not given.strip():
                raise ValueError("the text is blank")
            laid = prompt(engine, given, t)
        except ValueError as error:
            raise RefusedError(422, str(error).removeprefix("generate: "), "text", ("body", "texts", place)) from error
        texts.append(Text(laid.tokens, t, request.max_new_tokens or most))
        cut.append(laid.cut)
    return texts, cut


def _truncated(cut: Sequence[bool], allowed: bool, field: str, engine: Engine) -> list[int]:
    places = [place for place, was in enumerate(cut) if was]
    if places and not allowed:
        longest = engine.config.batch.max_length
        text = f"longer than the {longest} tokens of a sequence; with truncate: true its end is cut"
        raise RefusedError(413, text, "too_long", ("body", field, places[0]))
    return places


async def _answers(put: Any, work: Sequence[Any], field: str) -> list[Any]:
    """What the worker says of each."""
    try:
        jobs: list[Job] = put(work)
    except FullError as error:
        text = f"too much waits already: try again in {RETRY_AFTER} s"
        raise RefusedError(429, text, "full") from error
    answers = await asyncio.gather(*(asyncio.wrap_future(job.answer) for job in jobs), return_exceptions=True)
    for place, said in enumerate(answers):
        if isinstance(said, BaseException):
            text = f"the model failed over this text: {type(said).__name__}: {str(said)[:300]}"
            raise RefusedError(500, text, "model", ("body", field, place))
        if not _finite(said):
            raise RefusedError(500, "the model answered with what is no number", "model", ("body", field, place))
    return list(answers)


def _finite(said: Any) -> bool:
    """JSON has neither NaN nor infinity."""
    if isinstance(said, dict):
        return all(map(_finite, said.values()))
    return all(map(_finite, said)) if isinstance(said, list) else not isinstance(said, float) or math.isfinite(said)


def _digest(engine: Engine) -> str:
    state = sha256()
    for name, tensor in sorted(engine.model.state_dict().items()):
        state.update(name.encode())
        state.update(tensor.cpu().contiguous().numpy().tobytes())
    return state.hexdigest()
