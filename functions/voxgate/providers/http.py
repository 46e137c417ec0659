"""Providers over HTTP: one client that knows no wire format, around adapters that do no I/O.

What comes back is untrusted: its size, its time and its shape are bounded here, and every way in
which it can fail is one `ProviderError`.
"""

from __future__ import annotations

import asyncio
import base64
import email.utils
import json
import math
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from http.cookiejar import DefaultCookiePolicy
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, TypeVar
from urllib.parse import quote

import httpx

from voxgate import __version__
from voxgate.errors import FailureClass, ProviderError
from voxgate.model import Capabilities, Delta, Exchange, Logprob, Segment, Transcript, Word
from voxgate.providers import Ask, Call, LiveEngine
from voxgate.providers.secrets import StoredSecrets

if TYPE_CHECKING:
    from voxgate.providers.live import LiveWire

_MOST_ANSWER = 8 * 1024 * 1024  # bytes, and for each second of the audio:
_MOST_OF_A_SECOND = 4096
_SMALL_ANSWER = 256 * 1024
_LONGEST_MESSAGE, _LONGEST_READ = 300, 4096  # characters of a provider's words that are told on, and looked at
_SHORTEST_KEY = 4  # a shorter one is no secret, and part of many words
_MOST_WAIT = 24 * 3600
_MOST_SHOWN = 64 * 1024
_PIECE = 256 * 1024
_Timed = TypeVar("_Timed", Segment, Word)
# What an answer raises that has not the shape that it must have.
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True, slots=True, kw_only=True)
class WireRequest:
    """A request without its audio. With `form` the audio is the part `file` after these fields;
    without it the audio is the body. Without `with_file` the form says where the audio is."""

    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    query: tuple[tuple[str, str], ...] = ()
    form: tuple[tuple[str, str], ...] | None = None
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

    def parse_event(self, body: dict[str, Any], call: Call) -> Delta | Transcript | None:
        """One event of a provider that streams; the transcript is the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Seconds: for a connection, and for the answer to begin, and then to go on."""

    connect: float = 5.0
    first_byte: float = 600.0


@dataclass(kw_only=True, eq=False)
class HttpProvider:
    """Implements `Provider` over an adapter."""

    adapter: Adapter
    base_url: str
    api_key: str
    secrets: StoredSecrets
    timeouts: Timeouts
    tls: ssl.SSLContext | bool = True
    live: LiveWire | None = None
    _client: httpx.AsyncClient = field(init=False)

    def __post_init__(self) -> None:
        self._client = httpx.AsyncClient(
            base_url=self.base_url.rstrip("/") + "/",
            timeout=httpx.Timeout(self.timeouts.first_byte, connect=self.timeouts.connect, pool=self.timeouts.connect),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=30.0),
            # As it is: what is compressed could become any size before it is counted.
            headers={"user-agent": f"voxgate/{__version__}", "accept-encoding": "identity"},
            verify=self.tls,
            follow_redirects=False,
            trust_env=False,
        )
        # A cookie would go from one customer's answer to the next one's request.
        self._client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=()))

    async def capabilities(self, model: str) -> Capabilities | None:
        return None  # the catalogue says

    async def transcribe(self, call: Call) -> Transcript:
        key = await self._key()
        request = self.adapter.build_request(call, key)
        answer = await self._exchange(request, call, key)
        if isinstance(answer, Transcript):
            return within(answer, call.duration)
        try:
            if len(answer.body) > _SMALL_ANSWER:  # which takes a while
                return await asyncio.to_thread(self._understood, request, answer, call, key)
            return self._understood(request, answer, call, key)
        except ProviderError as error:
            if error.failure is FailureClass.CREDENTIAL:
                self.secrets.forget(self.api_key)  # it may have been rotated
            if call.reference is not None and error.status == 400 and error.param in ("s3", "file"):
                return await self.transcribe(replace(call, reference=None))  # it cannot fetch: it gets the bytes
            raise

    async def listen(self, ask: Ask) -> LiveEngine:
        from voxgate.providers.live import connect

        if self.live is None:
            raise ProviderError(FailureClass.UNSUPPORTED, "The provider does not take live speech.")
        try:
            request = self.live.build(ask, await self._key())
            return await connect(self.live, request, self.base_url, timeouts=self.timeouts, tls=self.tls)
        except ProviderError as error:
            if error.failure is FailureClass.CREDENTIAL:
                self.secrets.forget(self.api_key)
            raise

    async def close(self) -> None:
        await self._client.aclose()

    async def _key(self) -> str:
        key = await self.secrets.get(self.api_key) if self.api_key else ""
        if not (key.isascii() and key.isprintable()):
            raise ProviderError(FailureClass.CREDENTIAL, f"What is at '{self.api_key}' is no API key.")
        return key

    def _understood(self, request: WireRequest, answer: WireAnswer, call: Call, key: str) -> Transcript:
        if call.exchange is not None:
            call.exchange.request = self._shown(request, call, key)
            call.exchange.response = _said(answer, key)
        try:
            return within(self.adapter.parse_response(answer, call), call.duration)
        except ProviderError as error:
            error.message = without(key, error.message)[:_LONGEST_MESSAGE]
            if error.failure is FailureClass.CALLER_FAULT and not _of_customer(error.param, call):
                error.failure = FailureClass.UNSUPPORTED  # it is about what we asked for
            raise
        except MALFORMED as error:
            raise ProviderError(
                FailureClass.TRANSIENT, "The provider's answer is malformed.", status=answer.status
            ) from error

    def _shown(self, request: WireRequest, call: Call, key: str) -> dict[str, Any]:
        audio = {"name": call.file_name, "content_type": call.container.content_type, "bytes": call.audio.size}
        url = self._client.base_url.join(request.path.lstrip("/")).copy_with(userinfo=b"", query=None)
        shown: dict[str, Any] = without(
            key,
            {
                "method": "POST",
                "url": str(url),
                "query": request.query,
                "form": request.form,
                "audio": {"s3": call.reference} if call.reference else audio,
            },
        )
        return shown

    async def _exchange(self, request: WireRequest, call: Call, key: str) -> WireAnswer | Transcript:
        status = None
        try:
            response = await self._client.send(self._prepared(request, call), stream=True)
            try:
                status = response.status_code
                streamed = response.headers.get("content-type", "").lower().startswith("text/event-stream")
                if call.heard is not None and status == 200 and streamed:
                    told = events(response, call)
                    if call.exchange is not None:
                        call.exchange.request = self._shown(request, call, key)
                        told = _taken_down(told, call.exchange, key)
                    return await self._listen(told, call, call.heard)
                body = b"".join([chunk async for chunk in _bounded(response, call)])
            finally:
                await response.aclose()
        except httpx.HTTPError as error:
            raise ProviderError(
                FailureClass.TRANSIENT, f"The connection failed: {type(error).__name__}.", status=status
            ) from error
        return WireAnswer(status, body, retry_after(response.headers))

    async def _listen(
        self, bodies: AsyncIterator[dict[str, Any]], call: Call, heard: Callable[[Delta], Awaitable[None]]
    ) -> Transcript:
        """The transcript at the end of its events, whose pieces go on as they come."""
        segments: list[Segment] = []
        logprobs: list[Logprob] = []
        try:
            async for body in bodies:
                told = self.adapter.parse_event(body, call)
                if isinstance(told, Transcript):
                    told = replace(told, segments=told.segments or tuple(segments) or None)
                    return replace(told, logprobs=told.logprobs or tuple(logprobs) or None)
                if told is not None:
                    logprobs += told.logprobs or ()
                    if told.segment is not None:
                        segment = placed(told.segment, call.duration)
                        segments.append(segment)
                        told = replace(told, end=segment.end, segment=segment)
                    await heard(told)
        except MALFORMED as error:
            raise ProviderError(FailureClass.TRANSIENT, "The provider's events are malformed.", status=200) from error
        raise ProviderError(FailureClass.TRANSIENT, "The provider's events end without an end.", status=200)

    def _prepared(self, request: WireRequest, call: Call) -> httpx.Request:
        audio, content_type = call.audio.file, call.container.content_type
        before = after = b""
        if request.form is not None:
            # Not httpx's own: it takes longer than all the rest of a request to write one.
            boundary = secrets.token_hex(16)
            parts = [_part(boundary, f'name="{_quoted(name)}"') + value.encode() for name, value in request.form]
            if request.with_file:
                file = f'name="file"; filename="{call.file_name}"\r\nContent-Type: {content_type}'
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


def _said(answer: WireAnswer, key: str) -> Any:
    try:
        return without(key, json_of(answer.body))
    except (ValueError, RecursionError):
        return without(key, answer.body.decode(errors="replace"))[:_MOST_SHOWN]


async def _taken_down(
    bodies: AsyncIterator[dict[str, Any]], exchange: Exchange, key: str
) -> AsyncIterator[dict[str, Any]]:
    """The events as they come, of which as many are shown as there is room for, and how many are not."""
    shown: list[Any] = []
    more, room = {"left_out": 0}, _MOST_SHOWN
    exchange.response = shown
    async for body in bodies:
        room -= len(json.dumps(body))
        if room >= 0:
            shown.append(without(key, body))
        else:
            shown += [] if more["left_out"] else [more]
            more["left_out"] += 1
        yield body


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


async def events(response: httpx.Response, call: Call) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each server-sent event, as it comes."""
    data: list[str] = []
    async for line in _lines(response, call):
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            text, data = "\n".join(data), []
            if text != "[DONE]":
                body = json_of(text.encode())
                if isinstance(body, dict):
                    yield body


async def _lines(response: httpx.Response, call: Call) -> AsyncIterator[str]:
    """Ended by CR, LF or both, and by nothing else that Unicode calls a line's end."""
    parts, after_cr = list[bytes](), False
    async for raw in _bounded(response, call):
        chunk = raw.removeprefix(b"\n") if after_cr else raw
        after_cr = chunk.endswith(b"\r") if chunk else after_cr
        *ended, rest = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for each in ended:
            parts.append(each)
            yield b"".join(parts).decode(errors="replace").removeprefix("\ufeff")
            parts = []
        parts.append(rest)


async def _bounded(response: httpx.Response, call: Call) -> AsyncIterator[bytes]:
    """What comes, as it comes, up to what the audio's length can explain."""
    status, left = response.status_code, _MOST_ANSWER + int(_MOST_OF_A_SECOND * call.duration)
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise ProviderError(FailureClass.TRANSIENT, "The provider's answer is encoded, unasked.", status=status)
    async for chunk in response.aiter_raw():
        left -= len(chunk)
        if left < 0:
            raise ProviderError(FailureClass.TRANSIENT, "The provider's answer is too large.", status=status)
        yield chunk


def within(transcript: Transcript, duration: float) -> Transcript:
    """With no time outside of the audio, and none that ends before it begins."""
    segments = transcript.segments and tuple(placed(segment, duration) for segment in transcript.segments)
    words = transcript.words and tuple(_clipped(word, duration) for word in transcript.words)
    return replace(transcript, segments=segments, words=words)


def placed(segment: Segment, duration: float) -> Segment:
    segment = _clipped(segment, duration)
    if not segment.words:
        return segment
    return replace(segment, words=tuple(_clipped(word, duration) for word in segment.words))


def _clipped(part: _Timed, duration: float) -> _Timed:
    start = min(part.start, duration)
    end = min(max(start, part.end), duration)
    return part if (start, end) == (part.start, part.end) else replace(part, start=start, end=end)


def _of_customer(param: str | None, call: Call) -> bool:
    """Whether a provider that finds fault with that field means the audio, or what the customer sent."""
    request = call.request
    sent: dict[str, object] = {
        "language": request.language,
        "prompt": request.prompt,
        "temperature": request.temperature,
    }
    sent |= {"keywords": request.keywords, "context_bias": request.keywords, **request.extra}
    return param in (None, "file") or bool(sent.get(param.removesuffix("[]")))


def without(key: str, value: Any) -> Any:
    """With the key removed from all of its texts, in whichever form providers repeat what they were sent."""
    if isinstance(value, str):
        for form in _forms(key) if len(key) >= _SHORTEST_KEY else ():
            value = value.replace(form, "[removed]")
        return value
    if isinstance(value, dict):
        return {without(key, name): without(key, part) for name, part in value.items()}
    return [without(key, part) for part in value] if isinstance(value, list | tuple) else value


def _forms(key: str) -> list[str]:
    coded = [base64.b64encode(text.encode()).decode() for text in (key, f"Bearer {key}", f"Token {key}")]
    return sorted({key, quote(key, safe=""), *coded}, key=len, reverse=True)


def retry_after(headers: Mapping[str, str], clock: Callable[[], float] = time.time) -> int | None:
    """Whole seconds, rounded up, from a number or a date (RFC 9110, 10.2.3); None where there is none."""
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - clock()
        except (ValueError, TypeError, OverflowError):
            return None
    if not 0 <= seconds < float("inf"):
        return None
    return min(-int(-seconds // 1), _MOST_WAIT)


def json_of(body: bytes) -> Any:
    """Raises `ValueError`, also for NaN, Infinity and 1e999, which Python reads and JSON has not."""

    def no_number(text: str) -> float:
        raise ValueError(f"{text} is no JSON")

    def number(text: str) -> float:
        return known if math.isfinite(known := float(text)) else no_number(text)

    return json.loads(body, parse_constant=no_number, parse_float=number)


def error_of(body: bytes) -> dict[str, Any]:
    """What a refusal says, empty where it says nothing that can be read."""
    try:
        said = json_of(body)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def refusal(answer: WireAnswer, failure: FailureClass, message: object, param: object) -> ProviderError:
    """With the provider's own words and its name for the field, where these are text."""
    text = message[:_LONGEST_READ] if isinstance(message, str) else ""
    said = "".join(c if c.isprintable() else " " for c in text).strip() or f"The provider answered {answer.status}."
    at = param if isinstance(param, str) else None
    return ProviderError(failure, said, status=answer.status, param=at, retry_after=answer.retry_after)


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
