"""Limits of HTTP: who may ask, how large a body may be, and how slow a client.

The limits stand before the application, so that what they refuse costs nothing.
"""

import asyncio
import contextlib
import hmac
import json
from collections.abc import Callable
from dataclasses import dataclass

from .protocol import RequestError

#: Host names under which a server on this machine is known.
LOCAL = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Args:
        max_body: most bytes of a request.
        head_seconds: time in which the head of a request has to arrive (`http.Protocol`).
        body_seconds: time in which the body has to arrive.
        write_seconds: time that a client may take before it reads what was sent.
        api_key: what clients have to send as a bearer token; None: nothing.
        hosts: host names that requests may have; None: all. A page of another site could otherwise reach a
            server on this machine under a name that it controls.
    """

    max_body: int = 4 * 2**20
    head_seconds: float = 20.0
    body_seconds: float = 30.0
    write_seconds: float = 60.0
    api_key: str | None = None
    hosts: frozenset[str] | None = frozenset(LOCAL)


#: Seconds for which the body of a refused request is thrown away.
LINGER = 1.0
#: Paths that need no key: they tell nothing, or ask for the key.
OPEN = ("/", "/health", "/page.js", "/page.css", "/favicon.ico")


class Limiter:
    """An ASGI application around another one that keeps to `Limits`.

    `stopping` says whether the server is ending.
    """

    def __init__(self, app, limits: Limits, stopping: Callable[[], bool] = lambda: False):
        self.app, self.limits, self.stopping = app, limits, stopping

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        try:
            self._check(scope, headers)
            body = await self._body(headers, receive) if scope["method"] == "POST" else b""
        except RequestError as error:
            await _refuse(error, send, None if b"expect" in headers else receive)
            return
        except _Gone:
            return
        rest = [dict(type="http.request", body=body, more_body=False)]

        async def receive_body():
            return rest.pop() if rest else await receive()

        async def send_in_time(message) -> None:
            try:
                await asyncio.wait_for(send(message), self.limits.write_seconds)
            except asyncio.TimeoutError as error:
                raise ConnectionError("the client does not read") from error

        try:
            await self.app(scope, receive_body, send_in_time)
        except ConnectionError:
            return  # uvicorn closes the connection of a response that was not finished
        except asyncio.CancelledError:
            if not self.stopping():
                raise
            # The server ends, and this answer did not end in time. The log would get a traceback.

    def _check(self, scope, headers: dict[bytes, bytes]) -> None:
        limits = self.limits
        if limits.hosts is not None:
            host = headers.get(b"host", b"").decode("latin-1").lower()
            name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
            if name not in limits.hosts:
                raise RequestError(
                    f"the host {name[:100]!r} is not served here: use localhost, or start the server with "
                    "another --host",
                    421, code="wrong_host",
                )  # fmt: skip
        if limits.api_key is not None and scope["path"] not in OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + limits.api_key.encode()):
                raise RequestError(
                    "the API key is missing or wrong: send the header Authorization: Bearer KEY",
                    401, "authentication_error", code="invalid_api_key",
                )  # fmt: skip
        if scope["method"] == "POST":
            # A form of a page of another site cannot send this type, so no such page can ask.
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":
                raise RequestError(
                    "Content-Type must be application/json: send this header", 415, code="wrong_content_type"
                )

    async def _body(self, headers: dict[bytes, bytes], receive) -> bytes:
        """The body of a request, within its limits."""
        most = self.limits.max_body
        too_large = RequestError(
            f"the body has more than {most} bytes: send less, or start the server with a larger --max-body",
            413, code="body_too_large",
        )  # fmt: skip
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > most:
            raise too_large
        parts, size = [], 0
        end = asyncio.get_running_loop().time() + self.limits.body_seconds
        while True:
            left = end - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(receive(), max(left, 0.001))
            except asyncio.TimeoutError as error:
                raise RequestError(
                    f"the body did not arrive in time: send it within {self.limits.body_seconds:g} seconds",
                    408, code="timeout",
                ) from error  # fmt: skip
            if message["type"] == "http.disconnect":
                raise _Gone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                raise too_large
            if not message.get("more_body"):
                return b"".join(parts)


class _Gone(Exception):
    """The client went before its request was complete."""


async def _refuse(error: RequestError, send, receive) -> None:
    """Send an error, and close the connection.

    A client that is still sending would lose the answer if the connection closed at once. So its body is
    thrown away for a moment, unless it waits for a word before it sends (`receive` is None).
    """
    body = json.dumps(error.body).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send(dict(type="http.response.start", status=error.status, headers=headers))
    await send(dict(type="http.response.body", body=body, more_body=True))
    if receive is not None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_discard(receive), LINGER)
    await send(dict(type="http.response.body", body=b""))


async def _discard(receive) -> None:
    """Throw away the rest of a request."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return
