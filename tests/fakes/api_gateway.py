"""API Gateway between an HTTP client and our Lambda handler, as an httpx transport or on a socket."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import httpx


@dataclass(frozen=True)
class Context:
    function_name: str = "voxgate"
    memory_limit_in_mb: int = 1024
    invoked_function_arn: str = "arn:aws:lambda:eu-central-1:123456789012:function:voxgate"
    aws_request_id: str = "52fdfc07-2182-154f-163f-5f0f9a621d72"
    milliseconds: int = 29_000

    def get_remaining_time_in_millis(self) -> int:
        return self.milliseconds


class ApiGateway(httpx.BaseTransport):
    """Binary media types are set to `*/*`, as the stack sets them, unless `binary` is False."""

    def __init__(
        self,
        handler: Callable[[dict[str, Any], Any], dict[str, Any]],
        *,
        binary: bool = True,
        context: Context | None = None,
    ) -> None:
        self._handler = handler
        self._binary = binary
        self._context = context or Context()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        body = request.read()
        multi: dict[str, list[str]] = {}
        for name, value in request.headers.multi_items():
            multi.setdefault(name.title(), []).append(value)
        text = base64.b64encode(body).decode() if self._binary else body.decode("utf-8", "replace")
        answer = self._handler(
            {
                "resource": "/{proxy+}",
                "path": request.url.path,
                "httpMethod": request.method,
                "headers": {name: values[-1] for name, values in multi.items()},
                "multiValueHeaders": multi,
                "queryStringParameters": dict(request.url.params) or None,
                "multiValueQueryStringParameters": None,
                "pathParameters": {"proxy": request.url.path.removeprefix("/")},
                "stageVariables": None,
                "requestContext": {"stage": "prod", "requestId": "c6af9ac6", "identity": {"sourceIp": "192.0.2.1"}},
                "body": text if body else None,
                "isBase64Encoded": self._binary and bool(body),
            },
            self._context,
        )
        content = answer["body"].encode()
        if answer["isBase64Encoded"]:
            content = base64.b64decode(content)
        headers = [(name, value) for name, values in answer["multiValueHeaders"].items() for value in values]
        return httpx.Response(answer["statusCode"], headers=headers, content=content)


class Front:
    """The same on a socket, for clients that take no transport: one request at a time. A context manager."""

    def __init__(self, handler: Callable[[dict[str, Any], Any], dict[str, Any]]) -> None:
        gateway, one = ApiGateway(handler), threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1

            def do_POST(self) -> None:
                if self.headers.get("transfer-encoding") == "chunked":
                    content = b"".join(self._chunks())
                else:
                    content = self.rfile.read(int(self.headers["content-length"]))
                request = httpx.Request(
                    "POST", f"https://api.example.com{self.path}", headers=list(self.headers.items()), content=content
                )
                with one:
                    response = gateway.handle_request(request)
                self.send_response_only(response.status_code)
                for name, value in response.headers.multi_items():
                    if name != "content-length":
                        self.send_header(name, value)
                body = response.read()
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                self.wfile.flush()

            def _chunks(self) -> Any:
                while size := int(self.rfile.readline(), 16):
                    yield self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its parent's name
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
