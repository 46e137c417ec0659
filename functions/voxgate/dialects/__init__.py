"""The public contracts: an HTTP form to a request, an outcome to a body, and nothing in between."""

from __future__ import annotations

from typing import Any, Protocol

from voxgate.dialects.form import FormModel
from voxgate.formats import Body
from voxgate.model import Delta, Outcome, TranscriptionRequest
from voxgate.multipart import Field


class Dialect(Protocol):
    """One contract; in a `nullable` one the text `null` is an absent field. `key_header` may carry
    the API key where there is no `Authorization`. `parse` raises `InvalidInput` naming the field;
    both methods are without I/O."""

    name: str
    path: str
    audio_field: str
    nullable: bool
    key_header: str
    form: type[FormModel]

    def parse(self, fields: tuple[Field, ...], files: tuple[str, ...]) -> TranscriptionRequest: ...

    def render(self, outcome: Outcome) -> Body: ...


class StreamingDialect(Dialect, Protocol):
    """One that tells a transcript while it is made, in JSON events; `index` counts them. A delta that it
    has no word for is None."""

    def render_delta(self, delta: Delta, index: int) -> dict[str, Any] | None: ...

    def render_done(self, outcome: Outcome, text: str, index: int) -> dict[str, Any]: ...
