"""OpenAI's wire format, and what those who copied it made of it: Groq, OVH AI Endpoints, Scaleway,
Mistral, vLLM, speaches, another Voxgate.

https://platform.openai.com/docs/api-reference/audio/createTranscription
https://docs.mistral.ai/api/endpoint/audio/transcriptions
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from voxgate import languages
from voxgate.errors import ProviderError
from voxgate.model import Feature, Granularity, Logprob, ResponseFormat, Segment, Tokens, Transcript, Word
from voxgate.providers import Call
from voxgate.providers.http import WireAnswer, WireRequest, failure_of, json_of

_TIMED = (ResponseFormat.SRT, ResponseFormat.VTT, ResponseFormat.VERBOSE_JSON)


class OpenAIAdapter:
    """Asks for the richest answer that the deployment has, whatever its customer asked for."""

    def build_request(self, call: Call, api_key: str) -> WireRequest:
        request, deployment = call.request, call.deployment
        features = deployment.features or frozenset()
        fields: list[tuple[str, str]] = [
            ("model", deployment.upstream_model),
            ("response_format", deployment.response_format),
        ]
        if request.language and Feature.LANGUAGE in features and not request.translate:
            fields.append(("language", request.language))
        if request.prompt and Feature.PROMPT in features:
            fields.append(("prompt", request.prompt))
        if request.temperature and Feature.TEMPERATURE in features:
            fields.append(("temperature", f"{request.temperature:g}"))
        if deployment.response_format == "verbose_json" and not request.translate:
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
        fields += passed_on(call, fields)
        kind = "translations" if request.translate else "transcriptions"
        return WireRequest(path=f"audio/{kind}", headers=_bearer(api_key), form=tuple(fields))

    def parse_response(self, answer: WireAnswer, call: Call) -> Transcript:
        if answer.status != 200:
            raise _failed(answer)
        return _transcript(json_of(answer.body), call)


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
        fields += passed_on(call, fields)
        return WireRequest(path="audio/transcriptions", headers=_bearer(api_key), form=tuple(fields))

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


def _bearer(api_key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


def _failed(answer: WireAnswer) -> ProviderError:
    message, codes, param = "", set[str](), None
    try:
        body = json_of(answer.body)
        # OpenAI nests, Mistral is flat, FastAPI says `detail`, some say just a text.
        error = body.get("error", body) if isinstance(body, dict) else {}
        if isinstance(error, dict):
            message = error.get("message") or error.get("detail") or ""
            codes, param = {str(error.get("code")), str(error.get("type"))}, error.get("param")
        else:
            message = error
        message = message.get("detail") if isinstance(message, dict) else message
        if isinstance(message, list):  # FastAPI's: the first of what it found, and where
            message, param = message[0]["msg"], message[0]["loc"][-1]
    except (ValueError, LookupError, TypeError):
        pass
    if param is None and "invalid_request_file" in codes:
        param = "file"
    return ProviderError(
        failure_of(answer.status, codes),
        shown(message) or f"The provider answered {answer.status}.",
        status=answer.status,
        param=param if isinstance(param, str) else None,
        retry_after=answer.retry_after,
    )


def shown(message: object) -> str:
    """A provider's words, fit for a message of ours."""
    text = message if isinstance(message, str) else ""
    return "".join(c if c.isprintable() else " " for c in text[:300]).strip()


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
    several: list[dict[str, Any]] = body.get("languages") or []
    if spoken is None and len(several) == 1:
        spoken = several[0].get("code")  # gpt-transcribe may hear several
    return Transcript(
        text=text_of(body["text"]),
        duration=call.duration,
        language=languages.parse(spoken) if isinstance(spoken, str) else None,
        segments=None if segments is None else tuple(map(_segment, segments)),
        words=None if words is None else tuple(map(_word, words)),
        logprobs=_logprobs(body.get("logprobs")),
        tokens=_tokens(body.get("usage")),
    )


def _segment(value: dict[str, Any]) -> Segment:
    speaker = value.get("speaker", value.get("speaker_id"))
    return Segment(
        start=time_of(value["start"]),
        end=time_of(value["end"]),
        text=text_of(value["text"]),
        seek=value.get("seek"),
        tokens=tuple(value.get("tokens") or ()),
        temperature=number(value.get("temperature")),
        avg_logprob=number(value.get("avg_logprob")),
        compression_ratio=number(value.get("compression_ratio")),
        no_speech_prob=number(value.get("no_speech_prob")),
        speaker=None if speaker is None else str(speaker),
    )


def _word(value: dict[str, Any]) -> Word:
    confidence = value.get("confidence", value.get("probability"))
    return Word(
        text_of(value.get("word", value.get("text"))),
        time_of(value["start"]),
        time_of(value["end"]),
        number(confidence),
    )


def _logprobs(values: Any) -> tuple[Logprob, ...] | None:
    if not values:
        return None
    return tuple(
        Logprob(text_of(v["token"]), _finite(v["logprob"]), tuple(v["bytes"]) if v.get("bytes") else None)
        for v in values
    )


def _tokens(usage: Any) -> Tokens | None:
    if not isinstance(usage, dict):
        return None
    spent, made = (
        usage.get("input_tokens", usage.get("prompt_tokens")),
        usage.get("output_tokens", usage.get("completion_tokens")),
    )
    if spent is None or made is None:
        return None
    details = usage.get("input_token_details") or usage.get("prompt_tokens_details") or {}
    return Tokens(int(spent), int(made), details.get("text_tokens"), details.get("audio_tokens"))


def text_of(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a text is not text")
    return value


def number(value: Any) -> float | None:
    return None if value is None else _finite(value)


def time_of(value: Any) -> float:
    """Seconds. Some providers write a number as text."""
    return max(_finite(value), 0.0)


def _finite(value: Any) -> float:
    if not math.isfinite(known := float(value)):
        raise ValueError("a number is none")
    return known
