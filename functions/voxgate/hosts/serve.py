"""One machine's server: an ASGI app under uvicorn, on a socket that is bound before it starts."""

from __future__ import annotations

import logging
import socket
import sys

import uvicorn

from voxgate.hosts.asgi import AsgiApp


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises `OSError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048, reuse_port=False)


def url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(app: AsgiApp, listening: socket.socket) -> None:
    """Serve until a signal says otherwise; a request under way has half a minute to finish."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    config = uvicorn.Config(
        app,
        http="httptools",
        loop="uvloop",
        lifespan="on",
        ws="none",
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=30,
    )
    uvicorn.Server(config).run(sockets=[listening])
