"""`voxgate transcribe`: a client of any gateway that speaks OpenAI's contract."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import httpx

EXTENSIONS = {"text": "txt", "json": "json", "verbose_json": "json", "srt": "srt", "vtt": "vtt"}


class ClientError(Exception):
    """What went wrong, in words for the person at the terminal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    base_url: str
    api_key: str
    model: str
    format: str
    language: str | None = None
    prompt: str | None = None
    timeout: float = 600.0


def transcribe(path: Path, options: Options) -> str:
    """The body of the answer. Raises `ClientError`; shows a progress bar where stderr is a terminal."""
    data = {"model": options.model, "response_format": options.format}
    if options.language:
        data["language"] = options.language
    if options.prompt:
        data["prompt"] = options.prompt
    try:
        with path.open("rb") as file, _progress(path) as advance:
            response = httpx.post(
                f"{options.base_url.rstrip('/').removesuffix('/v1')}/v1/audio/transcriptions",
                headers={"authorization": f"Bearer {options.api_key}"},
                data=data,
                # A pipe has no length to announce, so it is read first.
                files={"file": (path.name, cast(BinaryIO, _Counted(file, advance)) if path.is_file() else file.read())},
                timeout=httpx.Timeout(options.timeout, connect=5.0),
            )
    except UnicodeEncodeError as error:
        raise ClientError("The API key has characters that no API key has.") from error
    except OSError as error:
        raise ClientError(f"{path}: {error.strerror}.") from error
    except httpx.HTTPError as error:
        raise ClientError(f"{options.base_url} cannot be reached: {error}.") from error
    if response.status_code != 200:
        raise ClientError(f"{path}: {_message(response)}")
    return response.text


def _message(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        return f"{error['message']} ({response.status_code} {error['code']})"
    except (json.JSONDecodeError, KeyError, TypeError):
        return f"The server answered {response.status_code}, and not in the form of this API."


class _Counted:
    """A file that tells how much of it was read; httpx asks for its length by the descriptor."""

    def __init__(self, file: BinaryIO, advance: Callable[[int], None]) -> None:
        self._file = file
        self._advance = advance

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._advance(len(data))
        return data

    def fileno(self) -> int:
        return self._file.fileno()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def __iter__(self) -> Iterator[bytes]:
        return iter(lambda: self.read(64 * 1024), b"")


@contextlib.contextmanager
def _progress(path: Path) -> Iterator[Callable[[int], None]]:
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    size = path.stat().st_size
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"{path.name}: uploading", total=size)

        def advance(amount: int) -> None:
            progress.advance(task, amount)
            if progress.tasks[0].completed >= size:
                progress.update(task, description=f"{path.name}: transcribing", total=None)

        yield advance
