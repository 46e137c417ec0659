"""Our own inference service on another machine (`voxgate inference`), over HTTP.

The wire format is OpenAI's with each word's confidence; see `dialects.openai.InferenceDialect`.
"""

from __future__ import annotations

import json
from typing import Any, BinaryIO

import httpx

from voxgate import languages
from voxgate.errors import FailureClass, Overloaded, ProviderError
from voxgate.model import Capabilities, Feature, Segment, Transcript, Word
from voxgate.providers import Call


class InferenceProvider:
    """Implements `Provider`. `base_url` is the service's root, without `/v1`."""

    def __init__(self, *, base_url: str, timeout: float, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._client = httpx.AsyncClient(
            base_url=base_url.rstrip("/"), timeout=httpx.Timeout(timeout, connect=5.0), transport=transport
        )

    async def capabilities(self) -> Capabilities:
        # It checks languages itself and says so in a 400, which is passed on to the client.
        return Capabilities(
            languages=None,
            features=frozenset({Feature.WORDS, Feature.PROMPT, Feature.TEMPERATURE, Feature.KEYWORDS}),
        )

    async def transcribe(self, call: Call) -> Transcript:
        file = call.audio.file
        file.seek(0)
        try:
            response = await self._client.send(build_request(self._client, call, file))
        except httpx.HTTPError as error:
            raise ProviderError(FailureClass.TRANSIENT, f"The inference service failed: {type(error).__name__}.") from (
                error
            )
        return parse_response(response.status_code, response.headers, response.content, call)

    async def close(self) -> None:
        await self._client.aclose()


def build_request(client: httpx.AsyncClient, call: Call, file: BinaryIO) -> httpx.Request:
    request = call.request
    data: dict[str, Any] = {
        "model": call.upstream_model,
        "response_format": "verbose_json",
        "timestamp_granularities[]": ["segment", "word"] if request.words else ["segment"],
    }
    if request.language:
        data["language"] = request.language
    if request.prompt:
        data["prompt"] = request.prompt
    if request.temperature:
        data["temperature"] = str(request.temperature)
    if request.keywords:
        data["keywords[]"] = list(request.keywords)
    data |= {field: list(values) for field, values in request.extra.items() if field not in data}
    name = f"audio.{call.container.name}"
    return client.build_request(
        "POST", "/v1/audio/transcriptions", data=data, files={"file": (name, file, call.container.content_type)}
    )


def parse_response(status: int, headers: httpx.Headers, content: bytes, call: Call) -> Transcript:
    try:
        body = json.loads(content, parse_constant=_no_number)
        if status == 200:
            return _transcript(body, call)
        error = body["error"]
        message, param = str(error["message"]), error["param"]
    except (ValueError, KeyError, TypeError) as error:
        raise ProviderError(
            FailureClass.TRANSIENT, "The inference service's answer is malformed.", status=status
        ) from (error)
    if status in (400, 413):
        raise ProviderError(FailureClass.CALLER_FAULT, message, status=status, param=param)
    if status == 503 and headers.get("retry-after", "").isdecimal():
        raise Overloaded(message, retry_after=int(headers["retry-after"]))
    failure = FailureClass.UNSUPPORTED if status == 404 else FailureClass.TRANSIENT
    raise ProviderError(failure, message, status=status)


def _no_number(text: str) -> float:
    """Python reads NaN and Infinity, which are no JSON and no times."""
    raise ValueError(f"{text} is no JSON")


def _transcript(body: dict[str, Any], call: Call) -> Transcript:
    words = body.get("words")
    return Transcript(
        text=str(body["text"]),
        duration=call.duration,
        language=languages.parse(body["language"]) if body.get("language") else None,
        segments=tuple(
            Segment(
                start=float(s["start"]),
                end=float(s["end"]),
                text=str(s["text"]),
                seek=s.get("seek"),
                tokens=tuple(s.get("tokens") or ()),
                temperature=s.get("temperature"),
                avg_logprob=s.get("avg_logprob"),
                compression_ratio=s.get("compression_ratio"),
                no_speech_prob=s.get("no_speech_prob"),
            )
            for s in body.get("segments") or ()
        ),
        words=None
        if words is None
        else tuple(Word(str(w["word"]), float(w["start"]), float(w["end"]), w.get("confidence")) for w in words),
    )
