"""The audio as each deployment takes it: as it came, converted, or by reference."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from voxgate.audio import UnusableAudio
from voxgate.audio.sniff import OGG, Container
from voxgate.catalog import Deployment
from voxgate.errors import FailureClass, ProviderError
from voxgate.model import Delta, Exchange, TranscriptionRequest
from voxgate.providers import Call
from voxgate.receive import Upload
from voxgate.staging import Staging, audio_key
from voxgate.tasks import Threads, whole

logger = logging.getLogger(__name__)

_STAGING_SECONDS = 30.0
_FLAC_BYTES = 24_000  # a second of speech at 16 kHz, with room


@dataclass(kw_only=True, eq=False)
class Prepared:
    """One request's audio. A context manager: leaving it removes whatever was made of the audio.

    `staging` and `ids`, the account's and the request's, are for providers that are given a reference.
    """

    request: TranscriptionRequest
    audio: Upload
    container: Container
    duration: float
    spool_dir: Path
    staging: Staging | None = None
    ids: tuple[str, str] = ("", "")
    exchange: Exchange | None = None
    threads: Threads = field(default_factory=lambda: Threads("convert", 1))
    heard: Callable[[Delta], Awaitable[None]] | None = None
    serving: Deployment | None = field(default=None, init=False)
    _staged: asyncio.Task[str | None] | None = field(default=None, init=False)
    _made: dict[Container, Upload] = field(default_factory=dict, init=False)

    async def __aenter__(self) -> Prepared:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await whole(self._unstage())
        finally:
            for upload in self._made.values():
                upload.close()

    def begin(self, deployment: Deployment) -> None:
        """Stage the audio for it if it takes a reference, beside whatever is done meanwhile."""
        wanted = deployment.provider.staged and self._as_it_is(deployment)
        if self.staging is not None and wanted and self._staged is None:
            self._staged = asyncio.create_task(self._stage(self.staging))

    async def call(self, deployment: Deployment) -> Call:
        """One attempt's call. Raises `ProviderError` (unsupported) where no file fits."""
        self.serving = deployment
        audio, container = await self._fitting(deployment)
        self.begin(deployment)
        # Also for one that takes no reference: both would read the same file.
        reference = await asyncio.shield(self._staged) if self._staged is not None else None
        return Call(
            request=self.request,
            deployment=deployment,
            audio=audio,
            container=container,
            duration=self.duration,
            reference=reference if deployment.provider.staged and audio is self.audio else None,
            exchange=self.exchange,
            heard=self.heard,
        )

    async def _stage(self, staging: Staging) -> str | None:
        """The reference; None where the audio has to be sent."""
        try:
            async with asyncio.timeout(_STAGING_SECONDS):
                return await staging.put(
                    audio_key(*self.ids), self.audio.file, content_type=self.container.content_type
                )
        except Exception:  # whatever the network has: the bytes are still here
            logger.exception("the audio cannot be staged")
            return None

    async def _unstage(self) -> None:
        if self._staged is None or self.staging is None:
            return
        self._staged.cancel()
        await asyncio.wait([self._staged])
        try:
            await self.staging.remove(audio_key(*self.ids))
        except Exception:  # it goes by its age
            logger.exception("staged audio cannot be removed")

    async def _fitting(self, deployment: Deployment) -> tuple[Upload, Container]:
        if self._as_it_is(deployment):
            return self.audio, self.container
        # PyAV is loaded for this alone where the audio was measured by another process.
        from voxgate.audio.convert import TARGETS

        for target in TARGETS:
            likely = _FLAC_BYTES * self.duration if target != OGG else 0
            if not _takes(deployment, target) or not _fits(deployment, likely):
                continue
            made = await self._converted(target)
            if _fits(deployment, made.size):
                return made, target
        raise ProviderError(FailureClass.UNSUPPORTED, "The provider takes no file that this audio can be made into.")

    def _as_it_is(self, deployment: Deployment) -> bool:
        return _takes(deployment, self.container) and _fits(deployment, self.audio.size)

    async def _converted(self, target: Container) -> Upload:
        if target not in self._made:
            made = Upload(self.spool_dir)
            self._made[target] = made  # from here on it is closed at the end
            stop = threading.Event()
            try:
                await self.threads.run(lambda: self._convert(target, made, stop), stop=stop.set)
            except BaseException as error:
                del self._made[target]
                made.close()
                if isinstance(error, UnusableAudio | OSError):  # another deployment may take it as it is
                    raise ProviderError(FailureClass.UNSUPPORTED, "The audio cannot be converted.") from error
                raise
        return self._made[target]

    def _convert(self, target: Container, made: Upload, stop: threading.Event) -> None:
        from voxgate.audio.convert import convert

        # Another position in the same file: an attempt that was given up may still be reading it.
        with self.audio.path().open("rb") as source, made.path().open("r+b") as into:
            convert(source, self.container, target, into, max_seconds=self.duration + 60, stop=stop)
            made.size = into.seek(0, 2)


def _takes(deployment: Deployment, container: Container) -> bool:
    return deployment.containers is None or container.name in deployment.containers


def _fits(deployment: Deployment, size: float) -> bool:
    return deployment.max_bytes is None or size <= deployment.max_bytes
