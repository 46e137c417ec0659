"""The public contracts: an HTTP form to a request, an outcome to a body, and nothing in between."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

from voxgate.dialects.form import RequestForm
from voxgate.errors import VoxgateError
from voxgate.formats import Body, json_body, plain_body
from voxgate.model import Delta, Outcome, TranscriptionRequest
from voxgate.multipart import Field


class Dialect(Protocol):
    """One contract; in a `nullable` one the text `null` is an absent field. `key_header` may carry
    the API key where there is no `Authorization`. Nothing here does I/O."""

    name: str
    path: str
    form: type[RequestForm]
    audio_field: str = "file"
    model_field: str = "model"
    nullable: bool = False
    key_header: str = ""

    def parse(self, fields: tuple[Field, ...], files: tuple[str, ...]) -> TranscriptionRequest:
        """Raises `InvalidInput` naming the field."""
        form, extra = self.form.read(fields, null=self.nullable)
        return replace(form.request(), ignored=(*extra, *files))

    def render(self, outcome: Outcome) -> Body:
        plain = plain_body(outcome.transcript, outcome.request.response_format)
        return json_body(self.body(outcome)) if plain is None else plain

    def body(self, outcome: Outcome) -> dict[str, Any]:
        """The answer in those formats that are JSON."""
        ...


class StreamingDialect(Dialect, Protocol):
    """One that tells a transcript while it is made, in JSON events; `index` counts them. A delta that it
    has no word for is None."""

    def render_delta(self, delta: Delta, index: int) -> dict[str, Any] | None: ...

    def render_done(self, outcome: Outcome, text: str, index: int) -> dict[str, Any]: ...


@contextlib.contextmanager
def naming(**own: str) -> Iterator[None]:
    """A failure's `param` as the contract calls it."""
    try:
        yield
    except VoxgateError as error:
        error.param = own.get(error.param or "", error.param)
        raise
