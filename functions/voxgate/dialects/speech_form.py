"""The form fields that OpenAI's contract and those made after it have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field as Described

from voxgate.dialects.form import Language, RequestForm
from voxgate.errors import InvalidInput
from voxgate.model import Feature, Granularity, ResponseFormat, TranscriptionRequest

_STREAMED = (ResponseFormat.JSON, ResponseFormat.TEXT, ResponseFormat.DIARIZED_JSON)
Text = Annotated[str, Described(max_length=64_000)]


class SpeechForm(RequestForm):
    model: Annotated[str, Described(min_length=1, examples=["whisper-1"])]
    language: Language | None = None
    prompt: Text | None = None
    response_format: ResponseFormat = ResponseFormat.JSON
    temperature: Annotated[float, Described(ge=0, le=1, allow_inf_nan=False)] = 0.0
    timestamp_granularities: list[Granularity] | None = None
    stream: bool = False

    def request(self) -> TranscriptionRequest:
        if self.stream and self.response_format not in _STREAMED:
            raise InvalidInput(
                f"'stream' goes with response_format 'json', 'text' or 'diarized_json', not '{self.response_format}'.",
                param="stream",
            )
        diarized = self.response_format is ResponseFormat.DIARIZED_JSON
        required = {Feature.DIARIZATION: "response_format"} if diarized else {}
        plain = self.response_format in (ResponseFormat.TEXT, ResponseFormat.SRT, ResponseFormat.VTT)
        if Granularity.WORD in (self.timestamp_granularities or ()) and not plain:
            required[Feature.WORDS] = "timestamp_granularities"
        return TranscriptionRequest(
            model=self.model,
            language=self.language,
            prompt=self.prompt,
            temperature=self.temperature,
            response_format=self.response_format,
            stream=self.stream,
            granularities=frozenset(self.timestamp_granularities or [Granularity.SEGMENT]),
            required=required,
        )

    def check_granularities(self) -> None:
        """OpenAI's rule, which the LiteLLM contract does not have."""
        if self.timestamp_granularities and self.response_format is not ResponseFormat.VERBOSE_JSON:
            raise InvalidInput(
                f"'timestamp_granularities' needs response_format 'verbose_json', not '{self.response_format}'.",
                param="timestamp_granularities",
            )


def refuse_stream(stream: bool) -> None:
    if stream:
        raise InvalidInput("This contract has no 'stream': leave it out for the whole answer.", param="stream")
