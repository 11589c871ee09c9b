"""Run the application with uvicorn."""

import signal
import socket
import sys

import uvicorn

from .app import create_app
from .engine import Engine
from .limits import LOCAL, Limits


def address_of(listening: socket.socket) -> str:
    """The address of a socket, for a browser."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def server(
    engine: Engine,
    name: str,
    host: str = "127.0.0.1",
    max_body: int = Limits.max_body,
    api_key: str | None = None,
    connections: int = 512,
) -> uvicorn.Server:
    """A server for a started engine, which serves at the sockets that its `run` is given.

    At an address of this machine alone, only requests for names of this machine are answered.
    """
    hosts = frozenset(LOCAL | {host}) if host in LOCAL else None
    app = create_app(engine, name, Limits(max_body=max_body, api_key=api_key, hosts=hosts))
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        http="h11",  # it limits how much of a request's head it keeps
        ws="none",
        h11_max_incomplete_event_size=64 * 1024,
        limit_concurrency=connections,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=3,
    )
    return uvicorn.Server(config)


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
