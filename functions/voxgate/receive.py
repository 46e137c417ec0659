"""A form off the wire: fields in memory, the audio in a spool that grows into a file."""

from __future__ import annotations

import contextlib
import hashlib
import io
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, BinaryIO, cast

from voxgate.errors import InvalidInput, TooLarge
from voxgate.multipart import Field, FileEnd, FileStart, FormParser, Limits

_IN_MEMORY = 256 * 1024


class Upload:
    """Received audio, held in memory up to 256 KiB and in an unnamed-to-others file above that.

    A context manager: leaving it removes the file, whatever happened inside.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._memory: io.BytesIO | None = io.BytesIO()
        self._file: IO[bytes] | None = None
        self.size = 0

    def write(self, data: bytes) -> None:
        self.size += len(data)
        if self._memory is not None and self.size > _IN_MEMORY:
            self._to_disk()
        (self._memory or cast(IO[bytes], self._file)).write(data)

    @property
    def file(self) -> BinaryIO:
        """The audio, seekable, whichever way it is held; the position is shared."""
        return cast(BinaryIO, self._memory or self._file)

    def path(self) -> Path:
        """The audio as a file on disk, for the recognizer's process to read."""
        if self._file is None:
            self._to_disk()
        file = cast(IO[bytes], self._file)
        file.flush()
        return Path(file.name)

    def digest(self) -> bytes:
        """The SHA-256 of the audio."""
        known = hashlib.sha256()
        self.file.seek(0)
        while chunk := self.file.read(_IN_MEMORY):
            known.update(chunk)
        return known.digest()

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(FileNotFoundError):  # whoever cleans temporary directories was faster
                self._file.close()
        self._memory = None

    def __enter__(self) -> Upload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _to_disk(self) -> None:
        memory, self._memory = self._memory, None
        # Mode 600 and a random name; `close` ends it, which removes it: it outlives this call by design.
        self._file = tempfile.NamedTemporaryFile(dir=self._directory, prefix="audio-")  # noqa: SIM115 - see close
        if memory is not None:
            self._file.write(memory.getbuffer())


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
            elif isinstance(event, FileEnd):
                audio = False
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
