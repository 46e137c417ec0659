"""The use case, top to bottom: a form comes in, a transcript goes out.

What may be refused early is: the key before the body, the size before the body where its length
is declared, the form while it arrives, the audio before an engine sees it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from voxgate.audio import UnusableAudio
from voxgate.catalog import Catalog, Deployment, Model
from voxgate.dialects import Dialect
from voxgate.errors import (
    FailureClass,
    InvalidInput,
    Overloaded,
    ProviderError,
    ProviderUnavailable,
    TooLarge,
)
from voxgate.model import Capabilities, Outcome, Transcript, TranscriptionRequest
from voxgate.multipart import Limits
from voxgate.providers import Call, Provider
from voxgate.receive import Form, Upload, receive
from voxgate.routing import choose

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is calling: the ids that may be logged."""

    account_id: str
    key_id: str


class Authenticator(Protocol):
    async def __call__(self, headers: Mapping[str, str]) -> Caller:
        """Raises `Unauthenticated`."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """A request as a host hands it over: headers in lower case, the body not yet read.
    `content_length` is None where the client did not say."""

    id: str
    headers: Mapping[str, str]
    body: AsyncIterator[bytes]
    content_length: int | None


class Transcriber:
    def __init__(
        self,
        *,
        catalog: Catalog,
        providers: Mapping[str, Provider],
        authenticate: Authenticator,
        spool_dir: Path,
        limits: Limits,
        max_audio_seconds: float,
        provider_timeout: float,
        request_timeout: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._catalog = catalog
        self._providers = providers
        self._authenticate = authenticate
        self._spool_dir = spool_dir
        self._limits = limits
        self._max_audio_seconds = max_audio_seconds
        self._provider_timeout = provider_timeout
        self._request_timeout = request_timeout
        self._clock = clock
        # Few threads: each keeps a heap of its own, which eight uploads at once would add up.
        self._measurers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="measure")

    async def __call__(self, dialect: Dialect, incoming: Incoming) -> Outcome:
        """Raises the `VoxgateError` that the client is to see. Leaves no file behind."""
        await self._authenticate(incoming.headers)
        self._refuse_by_length(dialect, incoming.content_length)
        with Upload(self._spool_dir) as upload:
            form = await receive(
                incoming.body,
                incoming.headers.get("content-type"),
                limits=self._limits,
                audio_field=dialect.audio_field,
                into=upload,
            )
            request, model = self._understand(dialect, form)
            deployments = choose(model, request, await self._capabilities(model))
            call = await self._measure(dialect, request, upload)
            deployment, transcript, latency = await self._attempt(dialect, call, deployments)
        return Outcome(
            id=incoming.id,
            created=int(self._clock()),
            request=request,
            transcript=transcript,
            provider=deployment.provider.name,
            upstream_model=deployment.upstream_model,
            language_style=model.language_style,
            latency=latency,
        )

    def _refuse_by_length(self, dialect: Dialect, content_length: int | None) -> None:
        if content_length is not None and content_length > self._limits.body:
            raise TooLarge(
                f"Maximum content size limit ({self._limits.file}) exceeded ({content_length} bytes announced): "
                "send a shorter recording, or a compressed one.",
                param=dialect.audio_field,
            )

    def _understand(self, dialect: Dialect, form: Form) -> tuple[TranscriptionRequest, Model]:
        request = dialect.parse(form.fields, form.files)
        return request, self._catalog.find(request.model)

    async def _capabilities(self, model: Model) -> dict[str, Capabilities]:
        names = {deployment.provider.name for deployment in model.deployments}
        try:
            return {name: await self._providers[name].capabilities() for name in names}
        except (ProviderError, OSError, TimeoutError) as error:
            logger.warning("a provider of %s does not start: %s", model.id, error)
            raise ProviderUnavailable(f"The recognizer of '{model.id}' does not start.") from error

    async def _measure(self, dialect: Dialect, request: TranscriptionRequest, upload: Upload) -> Call:
        # PyAV is loaded by the first request that brings audio, not at the function's start.
        from voxgate.audio.probe import probe
        from voxgate.audio.sniff import sniff

        def measure() -> Call:
            container = sniff(upload.file)
            measured = probe(upload.file, container, max_seconds=self._max_audio_seconds)
            return Call(
                request=request, upstream_model="", audio=upload, container=container, duration=measured.duration
            )

        try:
            return await _whole(asyncio.get_running_loop().run_in_executor(self._measurers, measure))
        except UnusableAudio as error:
            raise InvalidInput(str(error), param=dialect.audio_field) from error

    async def _attempt(
        self, dialect: Dialect, call: Call, deployments: tuple[Deployment, ...]
    ) -> tuple[Deployment, Transcript, float]:
        failures: list[str] = []
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._request_timeout
        for deployment in deployments:
            provider = self._providers[deployment.provider.name]
            begun = loop.time()
            try:
                async with asyncio.timeout_at(min(begun + self._provider_timeout, deadline)):
                    transcript = await provider.transcribe(replace(call, upstream_model=deployment.upstream_model))
                return deployment, transcript, loop.time() - begun
            except TimeoutError:
                failures.append(f"{deployment.provider.name}: timed out after {loop.time() - begun:.0f} s")
            except ProviderError as error:
                if error.failure is FailureClass.CALLER_FAULT:
                    param = dialect.audio_field if error.param == "file" else error.param
                    raise InvalidInput(error.message, param=param) from error
                logger.warning("%s failed: %s: %s", deployment.provider.name, error.failure, error.message)
                failures.append(f"{deployment.provider.name}: {error.failure}")
            except Overloaded:
                if deployment is deployments[-1]:
                    raise
        raise ProviderUnavailable(f"Every provider for this model failed ({'; '.join(failures)}).")


async def _whole(work: asyncio.Future[_T]) -> _T:
    """Wait for a thread also when cancelled: it reads a file that is closed after it."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise
