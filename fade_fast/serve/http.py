"""Run the application with uvicorn."""

import asyncio
import json
import signal
import socket
import sys

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .app import create_app
from .engine import Engine
from .limits import LOCAL, Limits
from .protocol import RequestError


def address_of(listening: socket.socket) -> str:
    """The address of a socket, for a browser."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Protocol(H11Protocol):
    """uvicorn's protocol, which gives a connection up if the head of a request does not arrive in time.

    uvicorn limits only the time between two requests. So a client that sends a byte now and then, or nothing
    at all, would keep its connection. `head_seconds` limits a whole head: from the beginning of the
    connection, or from the first byte after a request. `Limiter` limits bodies.
    """

    head_seconds = Limits.head_seconds
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.trailing_data[0]:  # the next request has begun already
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    def _watch(self) -> None:
        """Start the clock if a head is on its way, or stop it."""
        answered = self.cycle is None or self.cycle.response_complete
        if not answered or self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.head_seconds, self._give_up)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:  # a connection on which nothing came asked for nothing
            error = RequestError(
                "the head of the request did not arrive in time: send it within "
                f"{self.head_seconds:g} seconds",
                408, code="timeout",
            )  # fmt: skip
            body = json.dumps(error.body).encode()
            head = "HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            self.transport.write(head.encode() + body)
        self.transport.close()


def server(
    engine: Engine,
    name: str,
    host: str = "127.0.0.1",
    max_body: int = Limits.max_body,
    api_key: str | None = None,
    connections: int = 512,
    head_seconds: float = Limits.head_seconds,
) -> uvicorn.Server:
    """A server for a started engine, which serves at the sockets that its `run` is given.

    At an address of this machine alone, only requests for names of this machine are answered. `connections`
    is how many there may be at once. The other limits are those of `Limits`.
    """
    hosts = frozenset(LOCAL | {host}) if host in LOCAL else None
    limits = Limits(max_body=max_body, api_key=api_key, hosts=hosts, head_seconds=head_seconds)
    app = create_app(engine, name, limits, stopping=lambda: found.should_exit)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        # h11 limits how much of a request's head it keeps.
        http=type("Protocol", (Protocol,), dict(head_seconds=head_seconds)),
        ws="none",
        h11_max_incomplete_event_size=64 * 1024,
        limit_concurrency=connections,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=3,
    )
    found = uvicorn.Server(config)
    return found


def serve(engine: Engine, name: str, listening: socket.socket, **options) -> None:
    """Serve until the process is interrupted or terminated. Options are those of `server`.

    uvicorn raises the signal again when it has finished. So a termination must end as an exception does: the
    kept caches are still to be written. Raises `SystemExit` after a termination.
    """

    def end(*args) -> None:
        sys.exit(0)

    before = signal.signal(signal.SIGTERM, end)
    try:
        server(engine, name, **options).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)
