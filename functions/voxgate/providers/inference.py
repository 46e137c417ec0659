"""Our own inference service on another machine (`voxgate inference`).

The wire format is OpenAI's with each word's confidence; see `dialects.openai.InferenceDialect`. Where
the audio is staged, the form has its reference, `s3`, in place of the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from voxgate.errors import FailureClass, Overloaded, ProviderError
from voxgate.model import Heard, Segment, Transcript
from voxgate.providers import Ask, Call
from voxgate.providers.http import WireAnswer, WireRequest
from voxgate.providers.openai import OpenAIAdapter, bearer, text_of, time_of, word_of


class InferenceAdapter(OpenAIAdapter):
    def build_request(self, call: Call, api_key: str) -> WireRequest:
        request = super().build_request(call, api_key)
        form = request.form or ()
        if call.reference is not None:
            form = (*form, ("s3", call.reference))
        # So that it takes on nothing that it cannot finish in time.
        headers = {"x-voxgate-deadline": f"{call.left:.3f}", "x-voxgate-priority": call.request.priority}
        return dataclasses.replace(
            request,
            path=f"v1/{request.path}",
            headers={**request.headers, **headers},
            form=form,
            with_file=call.reference is None,
        )

    def parse_response(self, answer: WireAnswer, call: Call) -> Transcript:
        try:
            return super().parse_response(answer, call)
        except ProviderError as error:
            if answer.status == 503 and answer.retry_after is not None:
                raise Overloaded(error.message, retry_after=answer.retry_after) from error
            if answer.status == 413:
                error.failure = FailureClass.CALLER_FAULT  # it has our own limits
            raise


class InferenceLive:
    """The gateway's own live socket, which the service has too; see docs/live.md."""

    commands: Mapping[str, str] = {"finalize": "finalize", "keepalive": "keepalive", "close": "close"}

    def build(self, ask: Ask, api_key: str) -> WireRequest:
        query = [("model_id", ask.deployment.upstream_model), ("interim_results", str(ask.interim).lower())]
        query += [("language", ask.language)] if ask.language else []
        return WireRequest(path="v1/stt/stream", headers=bearer(api_key), query=tuple(query))

    def parse(self, body: dict[str, Any]) -> Heard | None:
        if body["type"] == "error":
            raise ProviderError(FailureClass.TRANSIENT, "The recognizer has failed.")
        if body["type"] not in ("partial", "final"):
            return None
        words = None if body.get("words") is None else tuple(map(word_of, body["words"]))
        segment = Segment(time_of(body["start"]), time_of(body["end"]), text_of(body["text"]), words)
        return Heard(segment, final=body["type"] == "final")
