"""API Gateway between an HTTP client and our Lambda handler, as an httpx transport."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
