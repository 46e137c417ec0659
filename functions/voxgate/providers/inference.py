"""Our own inference service on another machine (`voxgate inference`).

The wire format is OpenAI's with each word's confidence; see `dialects.openai.InferenceDialect`. Where
the audio is staged, the form has its reference, `s3`, in place of the file.
"""

from __future__ import annotations

import dataclasses

from voxgate.errors import FailureClass, Overloaded, ProviderError
from voxgate.model import Transcript
from voxgate.providers import Call
from voxgate.providers.http import WireAnswer, WireRequest
from voxgate.providers.openai import OpenAIAdapter


class InferenceAdapter(OpenAIAdapter):
    def build_request(self, call: Call, api_key: str) -> WireRequest:
        request = super().build_request(call, api_key)
        form = request.form or ()
        if call.reference is not None:
            form = (*form, ("s3", call.reference))
        return dataclasses.replace(request, path=f"v1/{request.path}", form=form, with_file=call.reference is None)

    def parse_response(self, answer: WireAnswer, call: Call) -> Transcript:
        try:
            return super().parse_response(answer, call)
        except ProviderError as error:
            if answer.status == 503 and answer.retry_after is not None:
                raise Overloaded(error.message, retry_after=answer.retry_after) from error
            if answer.status == 413:
                error.failure = FailureClass.CALLER_FAULT  # it has our own limits
            raise
