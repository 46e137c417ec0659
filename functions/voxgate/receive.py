"""A form off the wire: fields in memory, the audio in a spool that grows into a file."""

from __future__ import annotations

import contextlib
import hashlib
import io
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from voxgate.errors import InvalidInput, TooLarge
from voxgate.multipart import Field, FileStart, FormParser, Limits

_IN_MEMORY = 256 * 1024


class Upload(contextlib.AbstractContextManager["Upload"]):
    """Received audio, held in memory up to 256 KiB and in an unnamed-to-others file above that: `file` is seekable
    either way, and its position is shared.

    A context manager: leaving it removes the file, whatever happened inside.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.file: BinaryIO = io.BytesIO()
        self.size = 0

    def write(self, data: bytes) -> None:
        self.size += len(data)
        if self.size > _IN_MEMORY:
            self._to_disk()
        self.file.write(data)

    def path(self) -> Path:
        """The audio as a file on disk, for the recognizer's process to read."""
        self._to_disk()
        self.file.flush()
        return Path(self.file.name)

    def digest(self) -> bytes:
        """The SHA-256 of the audio."""
        known = hashlib.sha256()
        self.file.seek(0)
        while chunk := self.file.read(_IN_MEMORY):
            known.update(chunk)
        return known.digest()

    def close(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # whoever cleans temporary directories was faster
            self.file.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _to_disk(self) -> None:
        if isinstance(memory := self.file, io.BytesIO):
            # Mode 600 and a random name; `close` ends it, which removes it: it outlives this call by design.
            file = tempfile.NamedTemporaryFile(dir=self._directory, prefix="audio-")  # noqa: SIM115 - see close
            self.file = cast(BinaryIO, file)
            self.file.write(memory.getbuffer())


@dataclass(frozen=True, slots=True)
class Form:
    """`fields` in the order sent, repeated names kept; `files` are the names of the file parts."""

    fields: tuple[Field, ...]
    files: tuple[str, ...]


async def receive(
    body: AsyncIterator[bytes],
    content_type: str | None,
    *,
    limits: Limits,
    audio_field: str,
    into: Upload,
    reference_field: str = "",
) -> Form:
    """Parse the form as it arrives, the part named `audio_field` into the upload. A field named
    `reference_field` may stand for it: then the upload stays empty.

    Raises `InvalidInput` (400) for a broken form or a missing, doubled or textual audio part, and
    `TooLarge` (413).
    """
    parser = FormParser(content_type, limits)
    fields: list[Field] = []
    files: list[str] = []
    audio = False
    received = 0
    async for chunk in body:
        received += len(chunk)
        if received > limits.body:
            raise TooLarge(f"The form is larger than the {limits.body} bytes that one may have.", param=audio_field)
        for event in parser.feed(chunk):
            if isinstance(event, bytes):
                if audio:
                    into.write(event)
            elif isinstance(event, FileStart):
                audio = event.name == audio_field
                if audio and audio_field in files:
                    raise InvalidInput(f"There are two '{audio_field}' parts; send one file.", param=audio_field)
                files.append(event.name)
            else:
                fields.append(event)
    parser.close()
    if audio_field not in files and not any(field.name == reference_field for field in fields):
        raise InvalidInput(_missing(audio_field, fields, files), param=audio_field)
    return Form(tuple(fields), tuple(name for name in files if name != audio_field))


def _missing(audio_field: str, fields: list[Field], files: list[str]) -> str:
    if any(field.name == audio_field for field in fields):
        return f"'{audio_field}' was sent as text; send it as a file, with a file name."
    there = f"; there is a file part '{files[0][:100]}', which must be renamed" if files else ""
    return f"Missing required field '{audio_field}': the audio file{there}."
