"""The HTTP interface: OpenAI's routes, health, metrics, the page and its feed."""

import asyncio
import contextlib
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from . import engine as engines
from . import protocol
from .engine import Done, End, Engine, Event, Failed, Text
from .limits import Limiter, Limits
from .protocol import Collected, Question, Reply, RequestError

PAGE = Path(__file__).parent / "page"
#: Files of the page, by path. Nothing else of the disk can be asked for.
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
#: The page loads its own files and asks its own server, and no other site may show it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURE = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
#: Seconds between two reports of totals to a page, and frames that may wait for a slow page.
TOTALS, MAX_FRAMES = 1.0, 8


class Streams:
    """Text of tokens is made by one thread at a time: tokenizers may not be used by two."""

    def __init__(self, engine: Engine):
        self.engine, self._lock = engine, threading.Lock()

    def encode(self, question: Question) -> list[tuple[int, ...]]:
        """Tokens of each prompt."""
        tokens = []
        for prompt in question.prompts:
            if isinstance(prompt, str):
                with self._lock:
                    ids = self.engine.tokenizer(
                        prompt, add_special_tokens=not question.chat, verbose=False
                    ).input_ids
                prompt = tuple(ids)
            tokens.append(prompt)
        return tokens


def create_app(
    engine: Engine,
    name: str,
    limits: Limits = Limits(),  # noqa: B008 (it is immutable)
    aliases: tuple[str, ...] = (),
    stopping: Callable[[], bool] = lambda: False,
):
    """The ASGI application of a started engine.

    Args:
        engine: the engine. Its owner closes it.
        name: the model's name for clients.
        limits: see `Limits`.
        aliases: other names that clients may use.
        stopping: whether the server is ending. Then feeds of pages end, too.
    """
    app = FastAPI(title="fade serve", docs_url=None, redoc_url=None, openapi_url=None)
    names, created, streams = (name, *aliases), int(time.time()), Streams(engine)
    pages = {path: (PAGE / file).read_bytes() for path, (file, _) in FILES.items()}

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        said = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return JSONResponse(RequestError(said, error.status_code).body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(_of_error(error).body, 500)

    def page(path: str):
        async def give() -> Response:
            return Response(pages[path], media_type=FILES[path][1], headers=SECURE)

        return give

    for path in FILES:
        app.add_api_route(path, page(path), methods=["GET"])

    @app.get("/health")
    async def health() -> JSONResponse:
        good = engine.alive
        return JSONResponse(dict(status="ok" if good else "the engine has stopped"), 200 if good else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        text = engine.metrics.text(_gauges(engine))
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict:
        data = [dict(id=x, object="model", created=created, owned_by="fade") for x in names]
        return dict(object="list", data=data)

    @app.get("/v1/models/{wanted:path}")
    async def model(wanted: str) -> dict:
        if wanted not in names:
            raise RequestError(
                f"the model {wanted[:100]!r} does not exist: {', '.join(names)} is served",
                404, code="model_not_found",
            )  # fmt: skip
        return dict(id=wanted, object="model", created=created, owned_by="fade")

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        return await _answer(request, True)

    @app.post("/v1/completions")
    async def completions(request: Request):
        return await _answer(request, False)

    async def _answer(request: Request, is_chat: bool):
        fields = protocol.parse(await request.body())
        question = await run_in_threadpool(protocol.question, fields, is_chat, engine.tokenizer, names)
        prompts = await run_in_threadpool(streams.encode, question)
        client = f"{request.client.host if request.client else ''} {question.user}"
        asked = [_engine_request(engine, question, tokens, client) for tokens in prompts]
        prefix = "chatcmpl-" if is_chat else "cmpl-"
        reply = Reply(question, fields.get("model", name), engine.tokenizer, prefix + uuid.uuid4().hex)
        running = Running(engine, asked)
        if question.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(
                running.closing(_stream(running, reply)), media_type="text/event-stream", headers=headers
            )
        return await _whole(request, running, reply)

    @app.get("/view")
    async def view(request: Request):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(_frames(engine, stopping), media_type="text/event-stream", headers=headers)

    return Limiter(app, limits, stopping)


def _engine_request(engine: Engine, question: Question, tokens: tuple[int, ...], client: str):
    """The engine's request. Raises `RequestError` if it cannot be answered."""
    most = question.max_tokens
    most = max(1, engine.max_length - len(tokens)) if most is None else most
    asked = engines.Request(tokens, replace(question.sampling, max_tokens=most), question.texts, client)
    try:
        engine.check(asked)
    except ValueError as error:
        too_long = len(tokens) + most > engine.max_length
        code = "context_length_exceeded" if too_long else "invalid_value"
        where = "messages" if question.chat else "prompt"
        raise RequestError(str(error), parameter=where, code=code) from error
    return asked


class Running:
    """The requests of one question in the engine, and their events."""

    def __init__(self, engine: Engine, asked: list):
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.tickets: list[engines.Ticket] = []
        self.prompt = self.cached = self.completion = 0

        def deliver_to(number: int):
            def deliver(event: Event) -> None:
                loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

            return deliver

        try:
            for number, request in enumerate(asked):
                self.tickets.append(engine.submit(request, deliver_to(number)))
        except engines.QueueFull as error:
            self.cancel()
            stopping = "stopping" in str(error)
            status, kind = (503, "service_unavailable") if stopping else (429, "rate_limit_error")
            raise RequestError(str(error), status, kind, code="queue_full") from error

    def cancel(self) -> None:
        """End what still runs."""
        for ticket in self.tickets:
            ticket.cancel()

    async def closing(self, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The events, and the end of the requests when nobody takes them any more."""
        try:
            async for event in events:
                yield event
        finally:
            self.cancel()

    async def texts(self) -> AsyncIterator[tuple[int, Text | End]]:
        """Pieces and ends of answers, by the number of the answer. Raises `RequestError`."""
        left = len(self.tickets)
        while left:
            number, event = await self._events.get()
            if isinstance(event, Failed):
                self.cancel()
                raise _of_error(event.error)
            if isinstance(event, Done):
                left -= 1
                self.prompt += event.prompt
                self.cached += event.cached
                self.completion += event.completion
                continue
            yield number * self.tickets[number].request.texts + event.index, event


async def _stream(running: Running, reply: Reply) -> AsyncIterator[bytes]:
    """The answers as server-sent events."""
    begun: set[int] = set()
    try:
        async for index, event in running.texts():
            if index not in begun:
                begun.add(index)
                if (first := reply.begin(index)) is not None:
                    yield _event(first)
            if isinstance(event, End):
                yield _event(reply.end(index, event.reason))
            elif event.piece.text or event.piece.logprobs:
                yield _event(reply.piece(index, event.piece.text, event.piece.logprobs))
    except RequestError as error:  # the status was sent already
        yield _event(error.body)
        return
    if reply.question.include_usage:
        yield _event(reply.usage(running.prompt, running.cached, running.completion))
    yield b"data: [DONE]\n\n"


async def _whole(request: Request, running: Running, reply: Reply) -> JSONResponse:
    """The answers as one object. They are cancelled if the client goes."""
    answers: dict[int, Collected] = {}

    async def collect() -> None:
        async for index, event in running.texts():
            answer = answers.setdefault(index, Collected())
            if isinstance(event, End):
                answer.reason = event.reason
            else:
                answer.add(event.piece)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        running.cancel()

    watch = asyncio.create_task(gone())
    try:
        await collect()
    finally:
        running.cancel()
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await watch
    return JSONResponse(reply.whole(answers, running.prompt, running.cached, running.completion))


async def _frames(engine: Engine, stopping: Callable[[], bool]) -> AsyncIterator[bytes]:
    """What the page shows: frames of the engine's work, and totals."""
    loop = asyncio.get_running_loop()
    frames: asyncio.Queue[dict] = asyncio.Queue()

    def put(frame: dict) -> None:
        if frames.qsize() < MAX_FRAMES:  # a page that is slower misses frames
            frames.put_nowait(frame)

    number = engine.view.subscribe(lambda frame: loop.call_soon_threadsafe(put, frame))
    try:
        while not stopping():
            yield _event(_totals(engine))
            end = loop.time() + TOTALS
            while (left := end - loop.time()) > 0:
                with contextlib.suppress(asyncio.TimeoutError):
                    yield _event(await asyncio.wait_for(frames.get(), left))
    finally:
        engine.view.drop(number)


def _totals(engine: Engine) -> dict:
    """Numbers that hold for the whole server."""
    total = engine.metrics.total
    return dict(
        type="totals",
        hits=total("prefix_lookups", hit="yes"),
        misses=total("prefix_lookups", hit="no"),
        prompt_tokens=total("prompt_tokens"),
        cached_tokens=total("cached_tokens"),
        generated_tokens=total("generated_tokens"),
        **{name: value for name, (_, value) in _gauges(engine).items()},
    )


def _gauges(engine: Engine) -> dict[str, tuple[str, float]]:
    kept = engine.prefixes
    return dict(
        waiting_requests=("Requests that wait", engine.waiting),
        active_requests=("Requests that are worked on", engine.active),
        kept_caches=("Kept caches, those on disk included", len(kept.entries)),
        kept_caches_in_memory=("Kept caches in memory", kept.in_memory),
        kept_bytes=("Bytes of kept caches in memory", kept.bytes),
        caches_stored=("Caches that went to disk", kept.stored),
        caches_loaded=("Caches that came back from disk", kept.loaded),
        caches_dropped=("Caches that were forgotten", kept.dropped),
    )


def _event(data: dict) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def _of_error(error: BaseException) -> RequestError:
    """What a client is told of a failure. Details stay on the server."""
    if isinstance(error, engines.QueueFull):
        return RequestError(str(error), 503, "service_unavailable", code="stopping")
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return RequestError(
            "there is not enough memory for this request: shorten the prompt, or start the server with a "
            "smaller --max-active",
            503, "server_error", code="memory",
        )  # fmt: skip
    return RequestError(
        "the request failed in the server: read the reason in the server's standard error",
        500, "server_error",
    )  # fmt: skip
