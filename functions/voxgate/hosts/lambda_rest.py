"""API Gateway REST proxy events to an `Application` and back.

One event loop lives as long as the execution environment: connections and engine processes that
a request opened serve the next one.
"""

from __future__ import annotations

import asyncio
import binascii
import gzip
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pybase64
from aws_lambda_powertools import Logger

from voxgate.errors import InvalidInput, ProviderUnavailable, TooLarge
from voxgate.hosts.gateway import build_application
from voxgate.hosts.http import Application, Request, Response, error_response
from voxgate.metrics import Metrics
from voxgate.settings import Settings
from voxgate.wiring import Gateway

Event = dict[str, Any]
Handler = Callable[[Event, Any], dict[str, Any]]

# Lambda gives back at most 6 MB, as JSON; something is kept for the headers.
# https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html
_LARGEST_BODY = 6 * 1024 * 1024 - 64 * 1024


def build_handler(application: Application, loop: asyncio.AbstractEventLoop, metrics: Metrics | None = None) -> Handler:
    """The Lambda function's handler; `loop` runs the requests, one after the other."""
    logger = Logger(service="voxgate")
    metrics = metrics or Metrics()

    @logger.inject_lambda_context(clear_state=True)
    def handler(event: Event, context: Any) -> dict[str, Any]:
        remaining = getattr(context, "get_remaining_time_in_millis", None)
        # A second is kept back to say that time is up, rather than to be cut off in silence.
        seconds_left = max(remaining() / 1000 - 1.0, 0.1) if remaining else None
        try:
            response = loop.run_until_complete(_handle(application, event, seconds_left))
        finally:
            metrics.flush()  # the process may be frozen from here on
        response = _fitting(response, _headers(event).get("accept-encoding", ""))
        packed = "content-encoding" in response.headers  # all else that we send is UTF-8 text
        return {
            "statusCode": response.status,
            "multiValueHeaders": {name: [value] for name, value in response.headers.items()},
            "body": pybase64.b64encode_as_string(response.body) if packed else response.body.decode(),
            "isBase64Encoded": packed,
        }

    return handler


async def _handle(application: Application, event: Event, seconds_left: float | None) -> Response:
    request = Request(
        method=event["httpMethod"],
        path=event["path"],
        headers=_headers(event),
        body=_chunks(event),
        query=event.get("queryStringParameters") or {},
    )
    try:
        async with asyncio.timeout(seconds_left):
            return await application.handle(request)
    except TimeoutError:
        response = error_response(
            ProviderUnavailable("The transcription did not finish in the time this function has.")
        )
        response.headers.update(request.told | {"x-request-id": request.id})
        return response


def _fitting(response: Response, accept_encoding: str) -> Response:
    """The response such that Lambda can give it back: compressed where it is too long, or a 413 for a client
    that takes nothing compressed. Who named an Idempotency-Key has the answer at the next try, unpaid."""
    if not _too_long(response.body):
        return response
    packed = gzip.compress(response.body, compresslevel=6)
    if _takes_gzip(accept_encoding) and len(packed) * 4 / 3 < _LARGEST_BODY:
        return replace(response, headers=response.headers | {"content-encoding": "gzip"}, body=packed)
    refused = error_response(
        TooLarge(
            f"The answer is too long to be sent uncompressed ({len(response.body)} bytes): send the request again "
            "with Accept-Encoding: gzip (and with its Idempotency-Key, if it had one: that costs nothing), "
            "ask for a shorter response_format, or send a shorter recording."
        )
    )
    return replace(refused, headers=response.headers | refused.headers)


def _too_long(body: bytes) -> bool:
    # As text within JSON a byte may become six, and mostly becomes one.
    return len(body) > _LARGEST_BODY // 6 and (
        len(json.dumps(body.decode(), ensure_ascii=False).encode()) > _LARGEST_BODY
    )


def _takes_gzip(accept_encoding: str) -> bool:
    """RFC 9110, 12.5.3: a weight of 0 is a refusal, and `*` is whatever is not named."""
    weights = {}
    for item in accept_encoding.lower().split(","):
        coding, _, weight = (part.strip() for part in item.partition(";"))
        weights[coding.removeprefix("x-")] = weight.replace(" ", "").rstrip("0.") != "q="
    return weights.get("gzip", weights.get("*", False))


def _headers(event: Event) -> dict[str, str]:
    headers = {name.lower(): value for name, value in (event.get("headers") or {}).items()}
    many = event.get("multiValueHeaders") or {}
    return headers | {name.lower(): ", ".join(values) for name, values in many.items() if values}


def _body(event: Event) -> bytes:
    body = event.get("body") or ""
    if event.get("isBase64Encoded"):
        try:
            return pybase64.b64decode(body, validate=True)
        except binascii.Error as error:
            raise InvalidInput("The event's body is not base64.") from error
    if "multipart/" in _headers(event).get("content-type", ""):
        raise InvalidInput(
            "The upload reached the function as text, which destroys audio: this API's operator must list "
            "multipart/form-data (or */*) in the REST API's binary media types."
        )
    return str(body).encode()


async def _chunks(event: Event) -> AsyncIterator[bytes]:
    view = memoryview(_body(event))  # not before the key has been checked
    for start in range(0, len(view), 1024 * 1024):
        yield bytes(view[start : start + 1024 * 1024])


# What Lambda passes beside the event, as far as Powertools reads it.
_LOCAL_CONTEXT = SimpleNamespace(
    function_name="voxgate",
    memory_limit_in_mb=1024,
    invoked_function_arn="arn:aws:lambda:local:000000000000:function:voxgate",
    aws_request_id="local",
)


def for_one_at_a_time(settings: Settings) -> Settings:
    """An execution environment serves one request at a time, so one engine is enough."""
    return replace(settings, engine_workers=settings.engine_workers or 1)


def invoke(gateway: Gateway, event: Event) -> dict[str, Any]:
    """Run the handler on one event in this process, and end what it started."""
    loop = asyncio.new_event_loop()
    try:
        return build_handler(build_application(gateway), loop, gateway.metrics)(event, _LOCAL_CONTEXT)
    finally:
        loop.run_until_complete(gateway.close())
        loop.close()
