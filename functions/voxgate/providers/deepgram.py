"""Deepgram's `POST /v1/listen`: https://developers.deepgram.com/reference/speech-to-text/listen-pre-recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from voxgate import languages
from voxgate.errors import FailureClass, ProviderError
from voxgate.model import Delta, Feature, Heard, Segment, Transcript
from voxgate.providers import Ask, Call
from voxgate.providers.http import WireAnswer, WireRequest, error_of, failure_of, json_of, refusal
from voxgate.providers.openai import passed_on, text_of, time_of, word_of


class DeepgramAdapter:
    """The audio is the body. Utterances are its segments, and words come with their confidence."""

    def build_request(self, call: Call, api_key: str) -> WireRequest:
        request, features = call.request, call.deployment.features or frozenset()
        query = [
            ("model", call.deployment.upstream_model),
            ("smart_format", "true"),
            ("punctuate", "true"),
            ("utterances", "true"),
        ]
        query.append(("language", request.language) if request.language else ("detect_language", "true"))
        if Feature.DIARIZATION in features and Feature.DIARIZATION in request.required:
            query.append(("diarize", "true"))
        if Feature.KEYWORDS in features:
            query += [("keyterm", keyword) for keyword in request.keywords]
        # Of several channels there is no one transcript, and answers go to nobody else.
        query += [
            (n, v) for n, v in passed_on(call, query) if not n.startswith(("multichannel", "channels", "callback"))
        ]
        return WireRequest(path="v1/listen", headers={"authorization": f"Token {api_key}"}, query=tuple(query))

    def parse_response(self, answer: WireAnswer, call: Call) -> Transcript:
        if answer.status != 200:
            raise _failed(answer)
        results = json_of(answer.body)["results"]
        channel = results["channels"][0]
        heard = channel["alternatives"][0]
        spoken = channel.get("detected_language")
        utterances = results.get("utterances")
        return Transcript(
            text=text_of(heard["transcript"]),
            duration=call.duration,
            language=languages.parse(spoken) if isinstance(spoken, str) else call.request.language,
            segments=None if utterances is None else tuple(map(_utterance, utterances)),
            words=None if heard.get("words") is None else tuple(map(word_of, heard["words"])),
        )

    def parse_event(self, body: dict[str, Any], call: Call) -> Delta | Transcript | None:
        return None  # recordings are answered at once


class DeepgramLive:
    """https://developers.deepgram.com/reference/speech-to-text/listen-streaming"""

    commands: Mapping[str, str] = {"finalize": "Finalize", "keepalive": "KeepAlive", "close": "CloseStream"}

    def build(self, ask: Ask, api_key: str) -> WireRequest:
        query = [("model", ask.deployment.upstream_model), ("encoding", "linear16"), ("sample_rate", "16000")]
        query += [("channels", "1"), ("smart_format", "true"), ("punctuate", "true")]
        query.append(("interim_results", str(ask.interim).lower()))
        query += [("language", ask.language)] if ask.language else []
        return WireRequest(path="v1/listen", headers={"authorization": f"Token {api_key}"}, query=tuple(query))

    def parse(self, body: dict[str, Any]) -> Heard | None:
        if body["type"] == "Error":
            raise ProviderError(FailureClass.TRANSIENT, "The provider has failed.")
        if body["type"] != "Results":
            return None
        heard, start = body["channel"]["alternatives"][0], time_of(body["start"])
        words = tuple(map(word_of, heard.get("words") or ()))
        segment = Segment(start, start + time_of(body["duration"]), text_of(heard["transcript"]), words)
        return Heard(segment, final=body["is_final"] is True)


def _utterance(value: dict[str, Any]) -> Segment:
    return Segment(
        start=time_of(value["start"]),
        end=time_of(value["end"]),
        text=text_of(value["transcript"]),
        words=tuple(map(word_of, value.get("words") or ())),
        speaker=None if value.get("speaker") is None else str(value["speaker"]),
    )


def _failed(answer: WireAnswer) -> ProviderError:
    body = error_of(answer.body)
    failure = failure_of(answer.status) if body or answer.status != 400 else FailureClass.UNSUPPORTED
    if answer.status == 422:
        failure = FailureClass.TRANSIENT  # the upload was incomplete: ours to repeat
    param = "file" if body.get("err_code") == "Bad Request" else None
    return refusal(answer, failure, body.get("err_msg") or body.get("message"), param)
