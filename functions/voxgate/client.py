"""`voxgate transcribe`: a client of any gateway that speaks OpenAI's contract."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, cast

import httpx

EXTENSIONS = {"text": "txt", "json": "json", "verbose_json": "json", "srt": "srt", "vtt": "vtt"}


class ClientError(Exception):
    """What went wrong, in words for the person at the terminal."""


def transcribe(path: Path, base_url: str, api_key: str, fields: Mapping[str, str | None]) -> str:
    """The body of the answer to the file and what is not None of the form's other fields. Raises
    `ClientError`; shows a progress bar where stderr is a terminal."""
    try:
        with path.open("rb") as file, _progress(path) as advance:
            response = httpx.post(
                f"{base_url.rstrip('/').removesuffix('/v1')}/v1/audio/transcriptions",
                headers={"authorization": f"Bearer {api_key}"},
                data={name: value for name, value in fields.items() if value is not None},
                # A pipe has no length to announce, so it is read first.
                files={"file": (path.name, cast(BinaryIO, _Counted(file, advance)) if path.is_file() else file.read())},
                timeout=httpx.Timeout(600.0, connect=5.0),
            )
    except UnicodeEncodeError as error:
        raise ClientError("The API key has characters that no API key has.") from error
    except OSError as error:
        raise ClientError(f"{path}: {error.strerror}.") from error
    except httpx.HTTPError as error:
        raise ClientError(f"{base_url} cannot be reached: {error}.") from error
    if response.status_code != 200:
        raise ClientError(f"{path}: {refusal(response.status_code, response.content)}")
    return response.text


def refusal(status: int, body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
        return f"{error['message']} ({status} {error['code']})"
    except (ValueError, KeyError, TypeError):
        return f"The server answered {status}, and not in the form of this API."


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
