"""Serves the page on this machine alone."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any

from lesa.errors import LesaError

__all__ = ["HOST", "address", "in_background", "listening", "quiet_gradio", "serve"]

HOST = "127.0.0.1"
# The page may load from this server alone; what Gradio names elsewhere, a browser refuses.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'self'; base-uri 'self'"
)


def listening(port: int) -> socket.socket:
    """A socket that takes visitors of 127.0.0.1 at this port, or at any free one for 0.

    It is taken before a pipeline is loaded, so that nobody waits for a port that is in use.

    Raises: LesaError where the port is no port, in use, or not allowed.
    """
    if not 0 <= port <= 65535:
        raise LesaError(f"port={port}: no port; give 1 to 65535, or 0 for any free one")
    door = socket.socket()
    try:
        if os.name == "posix":  # elsewhere it would take the port of a running server
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind((HOST, port))
        door.listen()
    except OSError as error:
        door.close()
        taken = error.errno == errno.EADDRINUSE
        reason = "it is in use" if taken else f"cannot be had ({error.strerror})"
        raise LesaError(f"port={port}: {reason}; give another, or 0 for any free one") from None
    return door


def address(door: socket.socket) -> str:
    """Where a browser finds the page."""
    return f"http://{HOST}:{door.getsockname()[1]}"


@contextmanager
def quiet_gradio() -> Iterator[None]:
    """Gradio without analytics, with files in a folder that is removed afterwards.

    Both are read from the environment, by Gradio when it is imported and by its parts when they are
    made, so the page is built inside.
    """
    with tempfile.TemporaryDirectory(prefix="lesa-play-") as folder:
        told = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
        before = {name: os.environ.get(name) for name in told}
        os.environ.update(told)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def server(blocks: Any) -> Any:
    """A uvicorn server of the page: `run(sockets=[door])` serves, `should_exit = True` ends it."""
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from lesa.play.page import style, theme

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Policy)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    app = gr.mount_gradio_app(
        app, blocks, "/", server_name=HOST, footer_links=[], run_history=False, show_error=True,
        ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False,
        theme=theme(), css=style(),
    )  # fmt: skip
    logging.getLogger("uvicorn.error").addFilter(_told)
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))


def _told(record: logging.LogRecord) -> bool:
    """Whether a line of the server's log is for anyone: not the requests that Ctrl-C cuts off."""
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or not issubclass(kind, asyncio.CancelledError)


def serve(blocks: Any, door: socket.socket) -> None:
    """Serve the page until Ctrl-C, or until the process is told to end."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends in order
    try:
        with suppress(KeyboardInterrupt):
            server(blocks).run(sockets=[door])
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def in_background(blocks: Any, door: socket.socket) -> Iterator[str]:
    """Serve the page from a thread while the block runs, which gets its address.

    Raises: LesaError where the server does not start.
    """
    running = server(blocks)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [door]}, daemon=True)
    thread.start()
    while not running.started:
        if not thread.is_alive():
            raise LesaError(f"port={door.getsockname()[1]}: the page did not start; see above why")
        time.sleep(0.01)
    try:
        yield address(door)
    finally:
        running.should_exit = True
        thread.join()


class _Policy:
    """Sends `POLICY` with every answer."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        async def with_policy(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        await self._app(scope, receive, with_policy)
