"""The use case, top to bottom: a form comes in, a transcript goes out.

What may be refused early is: the key, the rate and the credit before the body, the size before the
body where its length is declared, the form while it arrives, the audio before an engine sees it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from voxgate.accounts.credentials import Caller
from voxgate.audio import UnusableAudio
from voxgate.catalog import Catalog, Deployment, Model, started_tenths
from voxgate.dialects import Dialect
from voxgate.errors import (
    FailureClass,
    Forbidden,
    InvalidInput,
    Overloaded,
    ProviderError,
    ProviderUnavailable,
    RequestTimeout,
    TooLarge,
)
from voxgate.metering import Gate, Reply, Tab, fingerprint, whole
from voxgate.model import Capabilities, Outcome, Transcript, TranscriptionRequest
from voxgate.multipart import Limits
from voxgate.providers import Call, Provider
from voxgate.receive import Form, Upload, receive
from voxgate.routing import choose

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Incoming:
    """A request as a host hands it over: headers in lower case, the body not yet read.
    `content_length` is None where the client did not say. `told` takes the headers that the answer
    is to carry, whatever it will be."""

    id: str
    headers: Mapping[str, str]
    body: AsyncIterator[bytes]
    content_length: int | None
    told: MutableMapping[str, str]


class Transcriber:
    def __init__(
        self,
        *,
        catalog: Catalog,
        providers: Mapping[str, Provider],
        gate: Gate,
        spool_dir: Path,
        limits: Limits,
        max_audio_seconds: float,
        provider_timeout: float,
        request_timeout: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._catalog = catalog
        self._providers = providers
        self._gate = gate
        self._spool_dir = spool_dir
        self._limits = limits
        self._max_audio_seconds = max_audio_seconds
        self._provider_timeout = provider_timeout
        self._request_timeout = request_timeout
        self._clock = clock
        # Few threads: each keeps a heap of its own, which eight uploads at once would add up.
        self._measurers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="measure")

    async def __call__(self, dialect: Dialect, incoming: Incoming) -> Reply:
        """Raises the `VoxgateError` that the client is to see. Leaves no file and no hold behind."""
        async with self._gate.request(
            incoming.id, dialect.name, incoming.headers, dialect.key_header, incoming.told
        ) as tab:
            self._refuse_by_length(dialect, incoming.content_length)
            with Upload(self._spool_dir) as upload:
                return await self._serve(dialect, incoming, tab, upload)

    async def _serve(self, dialect: Dialect, incoming: Incoming, tab: Tab, upload: Upload) -> Reply:
        form = await self._receive(dialect, incoming, upload)
        request, model = self._understand(dialect, form)
        tab.note(model=model.id, size=upload.size)
        if not tab.caller.may_use(request.model, model.id, *model.aliases):
            message = f"This API key may not use the model '{request.model}'; GET /v1/models lists those it may."
            raise Forbidden(message, code="model_not_allowed", param="model")
        deployments = choose(model, request, await self._capabilities(model))
        call, same = await self._measure(dialect, form, request, upload, tab.caller if tab.replayable else None)
        most = max(deployment.cost(call.duration) for deployment in deployments)
        replayed = await tab.hold(most, tenths=started_tenths(call.duration), fingerprint=same)
        if replayed is not None:
            return replayed
        deployment, transcript, latency = await self._attempt(dialect, tab, call, deployments)
        outcome = Outcome(
            id=incoming.id,
            created=int(self._clock()),
            request=request,
            transcript=transcript,
            provider=deployment.provider.name,
            upstream_model=deployment.upstream_model,
            language_style=model.language_style,
            latency=latency,
        )
        # Rendered before it is charged: what cannot be answered costs nothing.
        body = dialect.render(outcome)
        headers = {"content-type": body.content_type, "x-voxgate-provider": outcome.provider}
        if request.ignored:
            headers["x-voxgate-ignored-params"] = _header(request.ignored)
        tab.note(
            provider=outcome.provider,
            deployment=outcome.upstream_model,
            seconds=deployment.billable(call.duration) / 10,
        )
        return await tab.settle(deployment.cost(call.duration), Reply(headers, body.content))

    async def _receive(self, dialect: Dialect, incoming: Incoming, upload: Upload) -> Form:
        try:
            async with asyncio.timeout(self._request_timeout):
                return await receive(
                    incoming.body,
                    incoming.headers.get("content-type"),
                    limits=self._limits,
                    audio_field=dialect.audio_field,
                    into=upload,
                )
        except TimeoutError as error:
            message = f"The upload was not complete within {self._request_timeout:g} seconds."
            raise RequestTimeout(message) from error

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

    async def _measure(
        self, dialect: Dialect, form: Form, request: TranscriptionRequest, upload: Upload, hashed_for: Caller | None
    ) -> tuple[Call, str]:
        """What the audio is and how long it lasts; and for a caller who may ask again, a hash of
        what is asked."""
        # PyAV is loaded by the first request that brings audio, not at the function's start.
        from voxgate.audio.probe import probe
        from voxgate.audio.sniff import sniff

        def measure() -> tuple[Call, str]:
            container = sniff(upload.file)
            measured = probe(upload.file, container, max_seconds=self._max_audio_seconds)
            call = Call(
                request=request, upstream_model="", audio=upload, container=container, duration=measured.duration
            )
            if hashed_for is None:
                return call, ""
            fields = tuple((field.name, field.value) for field in form.fields)
            return call, fingerprint(hashed_for.account_id, dialect.path, fields, upload.digest())

        async def in_thread() -> tuple[Call, str]:
            return await asyncio.get_running_loop().run_in_executor(self._measurers, measure)

        try:
            return await whole(in_thread())  # it reads a file that is closed after it
        except UnusableAudio as error:
            raise InvalidInput(str(error), param=dialect.audio_field) from error

    async def _attempt(
        self, dialect: Dialect, tab: Tab, call: Call, deployments: tuple[Deployment, ...]
    ) -> tuple[Deployment, Transcript, float]:
        failures: list[str] = []
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._request_timeout
        for attempt, deployment in enumerate(deployments, start=1):
            tab.note(attempts=attempt)
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
                # Its words are not logged: a provider may quote what it heard.
                logger.warning("%s failed: %s (%s)", deployment.provider.name, error.failure, error.status)
                failures.append(f"{deployment.provider.name}: {error.failure}")
            except Overloaded:
                if deployment is deployments[-1]:
                    raise
        raise ProviderUnavailable(f"Every provider for this model failed ({'; '.join(failures)}).")


def _header(names: tuple[str, ...]) -> str:
    """Field names as a header value: what a client may put into a form must not become a header."""
    shown = ", ".join(dict.fromkeys(name[:64] for name in names[:32]))
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in shown)
