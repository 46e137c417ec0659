"""OpenAI's wire format, and what those who copied it made of it: Groq, OVH AI Endpoints, Scaleway,
Mistral, vLLM, speaches, another Voxgate.

https://platform.openai.com/docs/api-reference/audio/createTranscription
https://docs.mistral.ai/api/endpoint/audio/transcriptions
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace
from typing import Any

from voxgate import languages
from voxgate.errors import FailureClass, ProviderError
from voxgate.model import Delta, Feature, Granularity, Logprob, ResponseFormat, Segment, Tokens, Transcript, Word
from voxgate.providers import Call
from voxgate.providers.http import MALFORMED, WireAnswer, WireRequest, error_of, failure_of, json_of, refusal

_TIMED = (ResponseFormat.SRT, ResponseFormat.VTT, ResponseFormat.VERBOSE_JSON)


class OpenAIAdapter:
    """Asks for the richest answer that the deployment has, whatever its customer asked for."""

    def build_request(self, call: Call, api_key: str) -> WireRequest:
        request, deployment = call.request, call.deployment
        features = deployment.features or frozenset()
        response_format = deployment.response_format
        if streamed(call) and response_format == "verbose_json":
            response_format = "json"  # which is what streams
        fields: list[tuple[str, str]] = [
            ("model", deployment.upstream_model),
            ("response_format", response_format),
        ]
        if request.language and Feature.LANGUAGE in features and not request.translate:
            fields.append(("language", request.language))
        if request.prompt and Feature.PROMPT in features:
            fields.append(("prompt", request.prompt))
        if request.temperature and Feature.TEMPERATURE in features:
            fields.append(("temperature", f"{request.temperature:g}"))
        if response_format == "verbose_json" and not request.translate:
            wanted = ["segment"] if Feature.SEGMENTS in features else []
            wanted += ["word"] if request.words and Feature.WORDS in features else []
            fields += [("timestamp_granularities[]", granularity) for granularity in wanted]
        if Feature.KEYWORDS in features:
            fields += [("keywords[]", keyword) for keyword in request.keywords]
        if Feature.LOGPROBS in features and Feature.LOGPROBS in request.required:
            fields.append(("include[]", "logprobs"))
        if deployment.response_format == "diarized_json":
            fields.append(("chunking_strategy", "auto"))  # needed over 30 s
        elif Feature.DIARIZATION in features and Feature.DIARIZATION in request.required:
            fields.append(("diarize", "true"))  # OVH
        fields += streamed(call)
        fields += passed_on(call, fields)
        kind = "translations" if request.translate else "transcriptions"
        return WireRequest(path=f"audio/{kind}", headers=bearer(api_key), form=tuple(fields))

    def parse_response(self, answer: WireAnswer, call: Call) -> Transcript:
        if answer.status != 200:
            raise _failed(answer)
        return _transcript(json_of(answer.body), call)

    def parse_event(self, body: dict[str, Any], call: Call) -> Delta | Transcript | None:
        """OpenAI's `transcript.text.*`, and Mistral's `transcription.*`."""
        if "error" in body:
            raise _failed(WireAnswer(500, json.dumps(body).encode()))
        match str(body.get("type", "")).rpartition(".")[2]:
            case "delta":
                end = body.get("end")
                asked = Feature.LOGPROBS in call.request.required
                return Delta(
                    text_of(body.get("delta", body.get("text"))),
                    None if end is None else time_of(end),
                    logprobs=_logprobs(body.get("logprobs")) if asked else None,
                )
            case "segment":
                segment = _segment(body)
                return Delta(segment.text, segment.end, segment)
            case "done":
                return _transcript(body, call)
        return None


class MistralAdapter(OpenAIAdapter):
    """Mistral's: no `response_format` and no `prompt`; times or a language, not both; names to
    listen for as `context_bias`, in which a name is one word; a flat error."""

    def build_request(self, call: Call, api_key: str) -> WireRequest:
        request, features = call.request, call.deployment.features or frozenset()
        fields: list[tuple[str, str]] = [("model", call.deployment.upstream_model)]
        timed = Feature.SEGMENTS in features and (
            request.response_format in _TIMED or request.language is None or Feature.LANGUAGE not in features
        )
        if timed:
            word = request.words and Granularity.SEGMENT not in request.granularities and Feature.WORDS in features
            fields.append(("timestamp_granularities", "word" if word else "segment"))
        elif request.language:
            fields.append(("language", request.language))
        if request.temperature and Feature.TEMPERATURE in features:
            fields.append(("temperature", f"{request.temperature:g}"))
        if Feature.KEYWORDS in features:
            fields += [("context_bias", term) for term in map(_term, request.keywords) if term]
        if Feature.DIARIZATION in features and Feature.DIARIZATION in request.required:
            fields.append(("diarize", "true"))
        if not any("_" in _term(keyword) for keyword in request.keywords):  # it would tell them as it was given them
            fields += streamed(call)
        fields += passed_on(call, fields)
        return WireRequest(path="audio/transcriptions", headers=bearer(api_key), form=tuple(fields))

    def parse_response(self, answer: WireAnswer, call: Call) -> Transcript:
        heard = super().parse_response(answer, call)
        terms = {_term(keyword): keyword for keyword in call.request.keywords if "_" in _term(keyword)}

        def spelled(text: str) -> str:
            for term, keyword in terms.items():
                text = text.replace(term, keyword)
            return text

        if not terms:
            return heard
        segments = heard.segments and tuple(replace(segment, text=spelled(segment.text)) for segment in heard.segments)
        return replace(heard, text=spelled(heard.text), segments=segments)


def _term(keyword: str) -> str:
    return "_".join(keyword.replace(",", " ").split())


def streamed(call: Call) -> list[tuple[str, str]]:
    can = Feature.STREAMING in (call.deployment.features or ())
    return [("stream", "true")] if can and call.heard is not None else []


def passed_on(call: Call, fields: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """What the contract hands on as it is; it may add to what was understood, never replace it."""
    known = {name.removesuffix("[]") for name, _ in fields}
    # Where the audio is to come from is not for a customer to say: it would have the provider fetch it.
    known |= {"file", "file_url", "file_id", "url", "s3", "stream", "model", "callback"}
    return [
        (name, value)
        for name, values in call.request.extra.items()
        if name.removesuffix("[]") not in known
        for value in values
    ]


def bearer(api_key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


def _failed(answer: WireAnswer) -> ProviderError:
    body = error_of(answer.body)
    # OpenAI nests, Mistral is flat, FastAPI says `detail`, some say just a text.
    error = body.get("error", body)
    codes, param = set[str](), None
    message = error
    if isinstance(error, dict):
        message = error.get("message") or error.get("detail") or ""
        codes, param = {str(error.get("code")), str(error.get("type"))}, error.get("param")
    message = message.get("detail") if isinstance(message, dict) else message
    with contextlib.suppress(LookupError, TypeError):  # FastAPI's: the first of what it found, and where
        message, param = (message[0]["msg"], message[0]["loc"][-1]) if isinstance(message, list) else (message, param)
    if param is None and "invalid_request_file" in codes:
        param = "file"
    failure = failure_of(answer.status, codes)
    if failure is FailureClass.CALLER_FAULT and not body:
        failure = FailureClass.UNSUPPORTED  # something between us refuses, or it is another service
    return refusal(answer, failure, message, param)


def _transcript(body: dict[str, Any], call: Call) -> Transcript:
    segments = body.get("segments")
    if body.get("diarization") and (segments is None or Feature.DIARIZATION in call.request.required):
        segments = body["diarization"]  # OVH has who speaks apart from what is said
    if segments == [] and body["text"]:
        segments = None  # Mistral's way to say that none were asked for
    words = body.get("words")
    if words == [] and body["text"]:
        words = None  # OVH's
    spoken = body.get("language")
    several = body.get("languages")
    if spoken is None and isinstance(several, list) and len(several) == 1 and isinstance(several[0], dict):
        spoken = several[0].get("code")  # gpt-transcribe may hear several
    return Transcript(
        text=text_of(body["text"]),
        duration=call.duration,
        language=languages.parse(spoken) if isinstance(spoken, str) else None,
        segments=None if segments is None else tuple(map(_segment, segments)),
        words=None if words is None else tuple(map(word_of, words)),
        logprobs=_logprobs(body.get("logprobs")),
        tokens=_tokens(body.get("usage")),
    )


def _segment(value: dict[str, Any]) -> Segment:
    speaker = value.get("speaker", value.get("speaker_id"))
    return Segment(
        start=time_of(value["start"]),
        end=time_of(value["end"]),
        text=text_of(value["text"]),
        seek=_count(value.get("seek")),
        tokens=tuple(map(int, value.get("tokens") or ())),
        temperature=number(value.get("temperature")),
        avg_logprob=number(value.get("avg_logprob")),
        compression_ratio=number(value.get("compression_ratio")),
        no_speech_prob=share(value.get("no_speech_prob")),
        speaker=None if speaker is None else str(speaker),
    )


def word_of(value: dict[str, Any]) -> Word:
    """By any provider's names for its parts."""
    return Word(
        text_of(value.get("punctuated_word") or value.get("word", value.get("text"))),
        time_of(value["start"]),
        time_of(value["end"]),
        share(value.get("confidence", value.get("probability"))),
    )


def _logprobs(values: Any) -> tuple[Logprob, ...] | None:
    if not values:
        return None
    return tuple(
        Logprob(text_of(v["token"]), _finite(v["logprob"]), tuple(v["bytes"]) if v.get("bytes") else None)
        for v in values
    )


def _tokens(usage: Any) -> Tokens | None:
    with contextlib.suppress(*MALFORMED):  # a transcript is one without it, too
        spent = _count(usage.get("input_tokens", usage.get("prompt_tokens")))
        made = _count(usage.get("output_tokens", usage.get("completion_tokens")))
        details = usage.get("input_token_details") or usage.get("prompt_tokens_details") or {}
        if spent is not None and made is not None:
            return Tokens(spent, made, _count(details.get("text_tokens")), _count(details.get("audio_tokens")))
    return None


def text_of(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a text is not text")
    value.encode()  # half a surrogate pair is JSON, and no text
    return value


def number(value: Any) -> float | None:
    return None if value is None else _finite(value)


def share(value: Any) -> float | None:
    """0 to 1."""
    return None if value is None else min(max(_finite(value), 0.0), 1.0)


def _count(value: Any) -> int | None:
    return None if value is None else max(int(value), 0)


def time_of(value: Any) -> float:
    """Seconds. Some providers write a number as text."""
    return max(_finite(value), 0.0)


def _finite(value: Any) -> float:
    if not math.isfinite(known := float(value)):
        raise ValueError("a number is none")
    return known
