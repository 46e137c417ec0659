"""A transcript as a body: the one place that renders text, SRT, VTT and OpenAI's verbose JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from voxgate.formats.cues import srt, vtt
from voxgate.model import ResponseFormat, Transcript


@dataclass(frozen=True, slots=True)
class Body:
    content_type: str
    content: bytes


def json_body(value: dict[str, Any]) -> Body:
    # allow_nan=False: NaN is no JSON, and a client's parser would refuse the whole answer.
    return Body("application/json", json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace"))


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
    return b"data: " + json_body(value).content + b"\n\n"


def _text(transcript: Transcript) -> str:
    return transcript.text + "\n"


_PLAIN: dict[ResponseFormat, tuple[str, Callable[[Transcript], str]]] = {
    ResponseFormat.TEXT: ("text/plain; charset=utf-8", _text),
    ResponseFormat.SRT: ("application/x-subrip; charset=utf-8", srt),
    ResponseFormat.VTT: ("text/vtt; charset=utf-8", vtt),
}


def plain_body(transcript: Transcript, response_format: ResponseFormat) -> Body | None:
    """The body of the formats that are not JSON; None for the others."""
    if response_format not in _PLAIN:
        return None
    content_type, render = _PLAIN[response_format]
    return Body(content_type, render(transcript).encode("utf-8", "replace"))
