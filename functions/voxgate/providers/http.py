"""Providers over HTTP: one client that knows no wire format, around adapters that do no I/O.

What comes back is untrusted: its size, its time and its shape are bounded here, and every way in
which it can fail is one `ProviderError`.
"""

from __future__ import annotations

import email.utils
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol

import httpx

from voxgate import __version__
from voxgate.errors import FailureClass, ProviderError
from voxgate.model import Capabilities, Exchange, Transcript
from voxgate.providers import Call, Secrets

_MOST_ANSWER = 64 * 1024 * 1024
_MOST_WAIT = 24 * 3600
_MOST_SHOWN = 64 * 1024
_PIECE = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class WireRequest:
    """A request without its audio. With `form` the audio is the part `file_field` after these fields;
    without it the audio is the body. Without `with_file` the form says where the audio is."""

    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    query: tuple[tuple[str, str], ...] = ()
    form: tuple[tuple[str, str], ...] | None = None
    file_field: str = "file"
    with_file: bool = True


@dataclass(frozen=True, slots=True)
class WireAnswer:
    """`retry_after` is in seconds."""

    status: int
    body: bytes
    retry_after: int | None = None


class Adapter(Protocol):
    """One wire format: two pure functions. `parse_response` raises `ProviderError`, and `ValueError`,
    `KeyError`, `TypeError` or `AttributeError` where the answer has not the shape it must have."""

    def build_request(self, call: Call, api_key: str) -> WireRequest: ...

    def parse_response(self, answer: WireAnswer, call: Call) -> Transcript: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Seconds: for a connection, and from the end of the upload to the first byte of the answer."""

    connect: float = 5.0
    first_byte: float = 600.0


class HttpProvider:
    """Implements `Provider` over an adapter."""

    def __init__(
        self,
        *,
        adapter: Adapter,
        base_url: str,
        api_key: str,
        secrets: Secrets,
        timeouts: Timeouts,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._adapter = adapter
        self._api_key = api_key
        self._secrets = secrets
        self._client = httpx.AsyncClient(
            base_url=base_url.rstrip("/") + "/",
            timeout=httpx.Timeout(timeouts.first_byte, connect=timeouts.connect, pool=timeouts.connect),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=30.0),
            headers={"user-agent": f"voxgate/{__version__}"},
            transport=transport,
            follow_redirects=False,
            trust_env=False,
        )

    async def capabilities(self) -> Capabilities | None:
        return None  # the catalogue says

    async def transcribe(self, call: Call) -> Transcript:
        key = await self._secrets.get(self._api_key) if self._api_key else ""
        if not (key.isascii() and key.isprintable()):
            raise ProviderError(FailureClass.CREDENTIAL, f"What is at '{self._api_key}' is no API key.")
        request = self._adapter.build_request(call, key)
        answer = await self._exchange(request, call)
        if call.exchange is not None:
            self._take_down(call.exchange, request, answer, call, key)
        try:
            return self._adapter.parse_response(answer, call)
        except ProviderError as error:
            if error.failure is FailureClass.CREDENTIAL:
                self._secrets.forget(self._api_key)  # it may have been rotated
            raise
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ProviderError(
                FailureClass.TRANSIENT, "The provider's answer is malformed.", status=answer.status
            ) from error

    async def close(self) -> None:
        await self._client.aclose()

    def _take_down(self, exchange: Exchange, request: WireRequest, answer: WireAnswer, call: Call, key: str) -> None:
        def shown(value: Any) -> Any:
            text = json.dumps(value)
            return json.loads(text.replace(json.dumps(key)[1:-1], "[removed]") if key else text)

        audio = {"name": call.file_name, "content_type": call.container.content_type, "bytes": call.audio.size}
        exchange.request = shown(
            {
                "method": "POST",
                "url": str(self._client.base_url.join(request.path.lstrip("/"))),
                "query": request.query,
                "form": request.form,
                "audio": {"s3": call.reference} if call.reference else audio,
            }
        )
        try:
            exchange.response = shown(json_of(answer.body))
        except (ValueError, RecursionError):
            exchange.response = shown(answer.body[:_MOST_SHOWN].decode(errors="replace"))

    async def _exchange(self, request: WireRequest, call: Call) -> WireAnswer:
        status = None
        try:
            response = await self._client.send(self._prepared(request, call), stream=True)
            try:
                status = response.status_code
                body = await _bounded(response)
            finally:
                await response.aclose()
        except httpx.HTTPError as error:
            raise ProviderError(
                FailureClass.TRANSIENT, f"The connection failed: {type(error).__name__}.", status=status
            ) from error
        return WireAnswer(status, body, retry_after(response.headers))

    def _prepared(self, request: WireRequest, call: Call) -> httpx.Request:
        audio, content_type = call.audio.file, call.container.content_type
        before = after = b""
        if request.form is not None:
            # Not httpx's own: it takes longer than all the rest of a request to write one.
            boundary = secrets.token_hex(16)
            parts = [_part(boundary, f'name="{_quoted(name)}"') + value.encode() for name, value in request.form]
            if request.with_file:
                file = f'name="{request.file_field}"; filename="{call.file_name}"\r\nContent-Type: {content_type}'
                parts.append(_part(boundary, file))
            before, after = b"\r\n".join(parts), f"\r\n--{boundary}--\r\n".encode()
            content_type = f"multipart/form-data; boundary={boundary}"
        size = len(before) + len(after) + (call.audio.size if request.with_file else 0)
        audio.seek(0)  # also on a retry: what was read to its end would be sent as nothing
        return self._client.build_request(
            "POST",
            request.path.lstrip("/"),  # relative, so that a base URL with a path keeps it
            params=list(request.query),
            headers={**request.headers, "content-type": content_type, "content-length": str(size)},
            content=_chunks(before, audio if request.with_file else None, after),
        )


def _part(boundary: str, disposition: str) -> bytes:
    return f"--{boundary}\r\nContent-Disposition: form-data; {disposition}\r\n\r\n".encode()


def _quoted(name: str) -> str:
    """https://html.spec.whatwg.org/multipage/form-control-infrastructure.html#multipart-form-data"""
    return name.replace("\r", "%0D").replace("\n", "%0A").replace('"', "%22")


async def _chunks(before: bytes, audio: BinaryIO | None, after: bytes) -> AsyncIterator[bytes]:
    """Few large pieces: a small upload is one write."""
    while audio:
        piece = audio.read(_PIECE)
        if len(piece) < _PIECE:
            before += piece
            break
        yield before + piece
        before = b""
    yield before + after


async def _bounded(response: httpx.Response) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > _MOST_ANSWER:
            raise ProviderError(
                FailureClass.TRANSIENT, "The provider's answer is too large.", status=response.status_code
            )
    return bytes(body)


def retry_after(headers: Mapping[str, str], clock: Callable[[], float] = time.time) -> int | None:
    """Whole seconds, rounded up, from a number or a date (RFC 9110, 10.2.3); None where there is none."""
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - clock()
        except (ValueError, TypeError):
            return None
    if not 0 <= seconds < float("inf"):
        return None
    return min(-int(-seconds // 1), _MOST_WAIT)


def json_of(body: bytes) -> Any:
    """Raises `ValueError`, also for NaN and Infinity, which Python reads and JSON has not."""

    def no_number(text: str) -> float:
        raise ValueError(f"{text} is no JSON")

    return json.loads(body, parse_constant=no_number)


_UNSUPPORTED = {"unsupported_format", "invalid_model", "unknown_model", "model_not_found"}
_SPENT = {"insufficient_quota", "billing_hard_limit_reached"}


def failure_of(status: int, codes: Set[str] = frozenset()) -> FailureClass:
    """What a status means, where its provider's documentation says nothing else."""
    if status in (401, 403):
        return FailureClass.CREDENTIAL
    if status == 402 or codes & _SPENT:
        return FailureClass.QUOTA
    if status == 429:
        return FailureClass.RATE_LIMIT
    if status in (404, 405, 413, 415, 501) or codes & _UNSUPPORTED:
        return FailureClass.UNSUPPORTED  # this one cannot: another may know the model, or take the file
    if status in (400, 422):
        return FailureClass.CALLER_FAULT
    return FailureClass.TRANSIENT
