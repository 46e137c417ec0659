"""Multipart forms as they arrive: bytes in, events out, and no I/O (RFC 7578, RFC 2046 5.1).

`multipart`'s push parser finds the boundaries; this module adds what a gateway needs on top:
limits for files and for fields apart, names in every encoding that clients use, and refusals that
name the field. What a file is called tells nothing of what it is, so its name is not read.
See docs/decisions/002-multipart.md for why this parser.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from multipart import (
    MultipartError,
    MultipartSegment,
    ParserLimitReached,
    PushMultipartParser,
    parse_options_header,
)

from voxgate.errors import InvalidInput, TooLarge

MIB = 1024 * 1024
# RFC 5987's `filename*`, outside of any quoted string. RFC 7578 (4.2) forbids it here, and older
# clients send it all the same for every name that is not ASCII.
_EXTENDED = re.compile(r'"(?:\\.|[^"\\])*+"?|(;\s*filename\*\s*=)', re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """All sizes in bytes. `file` is the contract's 25 MB; the rest keeps a form small."""

    file: int = 25 * MIB
    field: int = MIB
    fields: int = 4 * MIB
    parts: int = 128
    header: int = 8 * 1024
    headers: int = 8

    @property
    def body(self) -> int:
        """The longest body that could still be within the limits, part headers included."""
        return self.file + self.fields + self.parts * 1024


@dataclass(frozen=True, slots=True)
class Field:
    name: str
    value: str


@dataclass(frozen=True, slots=True)
class FileStart:
    """A file part begins; its content follows as `bytes` events."""

    name: str


Event = Field | FileStart | bytes


class FormParser:
    """Parses one form. `feed` it the body in pieces of any size, then `close` it.

    Raises `InvalidInput` (400) for a body that is not a whole, well-formed form and `TooLarge`
    (413) for a file over its limit.
    """

    def __init__(self, content_type: str | None, limits: Limits | None = None) -> None:
        kind, options = parse_options_header(content_type or "")
        if kind != "multipart/form-data":
            raise InvalidInput(f"Content-Type must be multipart/form-data, not {kind[:100] or 'absent'}.")
        boundary = options.get("boundary", "")
        # RFC 2046 5.1.1 allows 70 characters; some clients go a little over it.
        if not boundary or len(boundary) > 200:
            raise InvalidInput("The Content-Type header lacks a usable multipart boundary; let your client set it.")
        self._limits = limits or Limits()
        self._first = b"--" + boundary.encode("latin-1", "replace")
        self._begun = False  # the first boundary has been seen
        self._held = b""  # received, and not yet the parser's
        try:
            self._parser = PushMultipartParser(
                self._first[2:],
                max_header_size=self._limits.header,
                max_header_count=self._limits.headers,
                max_segment_count=self._limits.parts,
                # Headers are taken byte for byte and decoded below: old clients send Latin-1 names.
                header_charset="latin-1",
            )
        except MultipartError as error:
            raise InvalidInput(f"The multipart boundary cannot be used: {error}.") from error
        self._name = ""
        self._is_file = False
        self._size = 0
        self._value = bytearray()
        self._fields_size = 0

    def feed(self, chunk: bytes) -> Iterator[Event]:
        ready = self._ready(chunk)
        if not ready:
            return
        try:
            for event in self._parser.parse(ready):
                if isinstance(event, MultipartSegment):
                    self._begin(event)
                    if self._is_file:
                        yield FileStart(self._name)
                elif event is not None:
                    self._count(len(event))
                    if self._is_file:
                        yield bytes(event)
                    else:
                        self._value += event
                elif not self._is_file:
                    yield self._field()
        except ParserLimitReached as error:
            raise InvalidInput(f"The form has too many parts or too long part headers: {error}.") from error
        except MultipartError as error:
            raise InvalidInput(f"The multipart body is malformed: {error}.") from error

    def close(self) -> None:
        """The body is over. Raises `InvalidInput` unless its closing boundary has been seen."""
        try:
            self._parser.close()
        except MultipartError as error:
            raise InvalidInput(
                "The multipart body ends before its closing boundary: the upload was cut off; send it again."
            ) from error

    def _ready(self, chunk: bytes) -> bytes:
        """What the parser may see now. It judges a preamble, and a line whose LF is still to come,
        by what happens to be in its buffer; so it gets the first all at once, and no CR alone."""
        data = self._held + chunk if self._held else chunk
        if not self._begun:
            start = data.find(self._first)
            if (len(data) - len(self._first) if start < 0 else start) > self._limits.header:
                raise InvalidInput("The multipart body does not begin with the boundary that its Content-Type names.")
            if start < 0:
                self._held = data
                return b""
            self._begun = True
        ready = data.removesuffix(b"\r")
        self._held = data[len(ready) :]
        return ready

    def _begin(self, segment: MultipartSegment) -> None:
        if any("\n" in value for _, value in segment.headerlist):  # the parser sees it in some splits alone
            raise InvalidInput("The multipart body is malformed: Invalid line break in segment header.")
        names = [name.lower() for name, _ in segment.headerlist]
        if any(names.count(name) > 1 for name in ("content-disposition", "content-type")):
            raise InvalidInput("The multipart body is malformed: a part says twice what it is.")
        extended = any(match[1] for match in _EXTENDED.finditer(segment["Content-Disposition"]))
        # A part without a file name is a field, unless its type says that it is media.
        media = (segment.content_type or "").startswith(("audio/", "video/", "application/octet-stream"))
        self._is_file = segment.filename is not None or extended or media
        self._name = _text(segment.name or "")
        self._size = 0
        self._value.clear()

    def _field(self) -> Field:
        try:
            return Field(self._name, self._value.decode())
        except UnicodeDecodeError as error:
            raise InvalidInput(f"The field '{self._name}' is not UTF-8 text.", param=self._name) from error

    def _count(self, size: int) -> None:
        self._size += size
        if self._is_file:
            if self._size > self._limits.file:
                raise TooLarge(
                    f"Maximum content size limit ({self._limits.file}) exceeded ({self._size} bytes read): "
                    "send a shorter recording, or a compressed one.",
                    param=self._name,
                )
            return
        self._fields_size += size
        if self._size > self._limits.field or self._fields_size > self._limits.fields:
            raise InvalidInput(
                f"The field '{self._name}' is too long: {self._limits.field} bytes are allowed in a field, "
                f"{self._limits.fields} in all.",
                param=self._name,
            )


def _text(header: str) -> str:
    raw = header.encode("latin-1", "replace")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return header
