"""Staging in a directory of one machine: what `voxgate serve` uses."""

from __future__ import annotations

import io
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from voxgate.staging import checked
from voxgate.tasks import Threads

_PIECE = 1024 * 1024


class LocalStaging:
    """Implements `Staging` with files of mode 600 in directories of mode 700."""

    def __init__(self, directory: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._directory = directory.absolute()
        self._clock = clock
        self._threads = Threads("staging", 8)

    async def put(self, key: str, content: BinaryIO | bytes, *, content_type: str = "application/octet-stream") -> str:
        await self._threads.run(lambda: self._put(key, io.BytesIO(content) if isinstance(content, bytes) else content))
        return (self._directory / key).as_uri()

    async def get(self, key: str, *, limit: int) -> bytes:
        return await self._threads.run(lambda: self._get(key, limit))

    async def remove(self, key: str) -> None:
        await self._threads.run(lambda: self._remove(key))

    async def sweep(self, *, audio_seconds: float = 86_400, result_seconds: float = 2 * 86_400) -> int:
        now = self._clock()
        audio = await self._threads.run(lambda: self._sweep("staging", now - audio_seconds))
        return audio + await self._threads.run(lambda: self._sweep("results", now - result_seconds))

    async def close(self) -> None:
        await self._threads.close()

    @contextmanager
    def _folder(self, key: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """The key's directory, open, and its name in there. No link below the root is followed."""
        *folders, name = checked(key).split("/")
        if make:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        here = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for folder in folders:
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(folder, 0o700, dir_fd=here)
                there = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
                os.close(here)
                here = there
            yield here, name
        finally:
            os.close(here)

    def _put(self, key: str, content: BinaryIO) -> None:
        for _ in range(9):
            # A sweep, perhaps another process's, may take the account's still empty directory away.
            with suppress(FileNotFoundError):
                return self._write(key, content)
        return self._write(key, content)

    def _write(self, key: str, content: BinaryIO) -> None:
        with self._folder(key, make=True) as (folder, name):
            temporary = f".{secrets.token_hex(8)}"  # the dot keeps it from being any key's
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    content.seek(0)
                    shutil.copyfileobj(content, file, _PIECE)
                    file.flush()
                    os.fsync(descriptor)  # a power cut must not leave the name without the content
                os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=folder)
                raise

    def _get(self, key: str, limit: int) -> bytes:
        try:
            with self._folder(key) as (folder, name):
                descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
        except FileNotFoundError as error:
            raise KeyError(f"There is nothing at '{key}'.") from error
        with os.fdopen(descriptor, "rb") as file:
            if os.fstat(descriptor).st_size > limit:
                raise ValueError(f"'{key}' is larger than {limit} bytes.")
            return file.read()

    def _remove(self, key: str) -> None:
        with suppress(FileNotFoundError), self._folder(key) as (folder, name):
            os.unlink(name, dir_fd=folder)

    def _sweep(self, kind: str, before: float) -> int:
        removed = 0
        with suppress(FileNotFoundError):
            # `fwalk` follows no links; bottom-up, so that a directory comes after what was in it.
            for _, folders, files, here in os.fwalk(self._directory / kind, topdown=False):
                for name in files:
                    with suppress(FileNotFoundError):
                        if os.stat(name, dir_fd=here, follow_symlinks=False).st_mtime < before:
                            os.unlink(name, dir_fd=here)
                            removed += 1
                for name in folders:
                    with suppress(OSError):  # not empty, a link, or gone already
                        os.rmdir(name, dir_fd=here)
        return removed
