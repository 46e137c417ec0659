"""An inference service that hears whatever it is told to, on a real socket.

It speaks what `voxgate inference` speaks. Each answer ends in a number of its own, so that an answer
that is had again can be told from a new one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Inference:
    """`text` is heard after `delay` seconds; a `status` other than 200 is a failure. Whoever asks for a stream
    is told it word by word, each a tenth of a second long and after `pause` seconds. A context manager."""

    def __init__(self) -> None:
        self.text = "heard"
        self.delay = 0.0
        self.pause = 0.0
        self.status = 200
        self.served = 0
        self._numbers = itertools.count(1)
        self._open = threading.Event()
        self._open.set()
        self._arrived = threading.Semaphore(0)
        inference = self

        class Handler(_Handler):
            def do_POST(self) -> None:
                form = self.rfile.read(int(self.headers["content-length"]))
                status, body = inference.hear()
                if status == 200 and b'name="stream"\r\n\r\ntrue\r\n' in form:
                    self.tell(json.loads(body), inference.pause)
                else:
                    self.answer(status, body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Inference:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def hear(self) -> tuple[int, bytes]:
        self.served += 1
        self._arrived.release()
        assert self._open.wait(60)
        time.sleep(self.delay)
        if self.status != 200:
            failure = {"message": "No luck.", "type": "server_error", "param": None, "code": "x"}
            return self.status, json.dumps({"error": failure}).encode()
        text = f"{self.text} {next(self._numbers)}"
        heard = {"start": 0.0, "end": 1.0}
        segments = [heard | {"id": 0, "text": f" {text}"}]
        words = [
            heard | {"word": word, "confidence": 0.5} for word in text.split()[:1000]
        ]  # a long one would be more than is read
        body = {"task": "transcribe", "language": "english", "duration": 1.0, "text": text}
        return 200, json.dumps(body | {"segments": segments, "words": words}, ensure_ascii=False).encode()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """No answer until the end of the block."""
        while self._arrived.acquire(blocking=False):
            pass
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def release(self) -> None:
        """Give the answers before the block of `held` ends."""
        self._open.set()

    def wait_for_request(self) -> None:
        """Until one has come since `held` began, or since the last call of this."""
        assert self._arrived.acquire(timeout=30)

    @contextlib.contextmanager
    def failing(self, status: int = 500) -> Iterator[None]:
        self.status = status
        try:
            yield
        finally:
            self.status = 200


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet

    def answer(self, status: int, body: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # whoever asked may have been killed
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()

    def tell(self, heard: dict[str, Any], pause: float) -> None:
        """Server-sent events, until whoever asked hangs up."""
        self.close_connection = True
        with contextlib.suppress(ConnectionError):
            self.send_response(200)
            self.send_header("content-type", "text/event-stream; charset=utf-8")
            self.send_header("connection", "close")
            self.end_headers()
            words = heard["text"].split(" ")
            for number, word in enumerate(words):
                text = f" {word}" if number else word
                self._event({"type": "transcript.text.delta", "delta": text, "end": (number + 1) / 10})
                time.sleep(pause)
            usage = {"type": "duration", "seconds": heard["duration"]}
            kept = {name: heard[name] for name in ("text", "language", "segments", "words")}
            self._event({"type": "transcript.text.done", **kept, "usage": usage})

    def _event(self, body: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(body).encode() + b"\n\n")
        self.wfile.flush()

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its parent's name
        pass
