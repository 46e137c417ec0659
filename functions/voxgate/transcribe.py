"""The use case, top to bottom: a form comes in, a transcript goes out.

What may be refused early is: the key, the rate and the credit before the body, the size before the
body where its length is declared, the form while it arrives, the audio before an engine sees it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from voxgate.accounts.credentials import Caller
from voxgate.audio import UnusableAudio
from voxgate.audio.sniff import Container
from voxgate.cache import Cache, entry_id, ttl
from voxgate.catalog import Catalog, Deployment, Model, started_tenths
from voxgate.dialects import Dialect, StreamingDialect, naming
from voxgate.errors import (
    ClientGone,
    Forbidden,
    InvalidInput,
    ModelNotFound,
    Overloaded,
    ProviderError,
    ProviderUnavailable,
    RequestTimeout,
    TooLarge,
    VoxgateError,
)
from voxgate.fallback import Fallback, Outages, Served
from voxgate.metering import Gate, Reply, Tab, fingerprint
from voxgate.metrics import Metrics
from voxgate.model import Capabilities, Exchange, Outcome, Priority, ResponseFormat, TranscriptionRequest
from voxgate.multipart import Limits
from voxgate.providers import Provider
from voxgate.providers.prepare import Prepared
from voxgate.receive import Form, Upload, receive
from voxgate.routing import Asked, choose
from voxgate.routing.health import Health
from voxgate.staging import References, Staging
from voxgate.streaming import HEADERS, Events, Narrator
from voxgate.tasks import Threads, given_up

logger = logging.getLogger(__name__)

_LONG_TEXT = 100_000  # characters, which take tens of milliseconds to render
DEADLINE, PRIORITY = "x-voxgate-deadline", "x-voxgate-priority"
_REFERENCE = "s3"  # the field of a form whose audio is staged


@dataclass(frozen=True, slots=True)
class Incoming:
    """A request as a host hands it over: headers in lower case, the body not yet read.
    `content_length` is None where the client did not say. `told` takes the headers that the answer
    is to carry, whatever it will be, and `events` the pieces of a transcript, where the client wants them."""

    id: str
    headers: Mapping[str, str]
    body: AsyncIterator[bytes]
    content_length: int | None
    told: MutableMapping[str, str]
    events: Events
    begun: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """For how many more seconds the client waits. Raises `InvalidInput`."""
        return self.begun + deadline(self.headers) - time.monotonic()


def deadline(headers: Mapping[str, str]) -> float:
    """For how many seconds the client waits, in `x-voxgate-deadline`. Raises `InvalidInput`."""
    text = headers.get(DEADLINE)
    if text is None:
        return math.inf
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidInput("'x-voxgate-deadline' is a number of seconds, above 0.", param=DEADLINE)
    return seconds


def priority(headers: Mapping[str, str]) -> Priority:
    """`interactive` or `batch`, in `x-voxgate-priority`. Raises `InvalidInput`."""
    text = headers.get(PRIORITY, Priority.INTERACTIVE)
    if text not in (Priority.INTERACTIVE, Priority.BATCH):
        raise InvalidInput("'x-voxgate-priority' is 'interactive' or 'batch'.", param=PRIORITY)
    return Priority(text)


@dataclass(kw_only=True, eq=False)
class Transcriber:
    """`staging` is where audio is put for providers that fetch it by reference, `references` where a
    client's references are fetched from; without it a form must bring its audio."""

    catalog: Catalog
    providers: Mapping[str, Provider]
    gate: Gate
    health: Health
    spool_dir: Path
    limits: Limits
    max_audio_seconds: float
    provider_timeout: float
    request_timeout: float
    outages: Outages | None = None
    staging: Staging | None = None
    references: References | None = None
    cache: Cache | None = None
    metrics: Metrics = field(default_factory=Metrics)
    uploads_at_once: int = 0
    clock: Callable[[], float] = time.time
    fallback: Fallback = field(init=False)
    _uploads: int = field(default=0, init=False)
    # Few threads: each keeps a heap of its own, which eight uploads at once would add up.
    _converters: Threads = field(default_factory=lambda: Threads("convert", 2), init=False)
    _measurers: Threads = field(default_factory=lambda: Threads("measure", 2), init=False)

    def __post_init__(self) -> None:
        self.fallback = Fallback(
            providers=self.providers,
            health=self.health,
            outages=self.outages,
            metrics=self.metrics,
            provider_timeout=self.provider_timeout,
            request_timeout=self.request_timeout,
        )

    async def __call__(self, dialect: Dialect, incoming: Incoming) -> Reply:
        """Raises the `VoxgateError` that the client is to see. Leaves no file and no hold behind."""
        async with self.gate.request(
            incoming.id, dialect.name, incoming.headers, dialect.key_header, incoming.told
        ) as tab:
            self._refuse_by_length(dialect, incoming.content_length)
            if 0 < self.uploads_at_once <= self._uploads:
                raise Overloaded("This server takes no more uploads at once; try again.", retry_after=1)
            with naming(file=dialect.audio_field, model=dialect.model_field), Upload(self.spool_dir) as upload:
                return await self._serve(dialect, incoming, tab, upload)

    async def _serve(self, dialect: Dialect, incoming: Incoming, tab: Tab, upload: Upload) -> Reply:
        with self.metrics.stage("receive"):
            form = await self._receive(dialect, incoming, upload)
        request = replace(dialect.parse(form.fields, form.files), priority=priority(incoming.headers))
        models = self.models(request, tab.caller)
        tab.note(model=models[0].id, size=upload.size)
        keep = None if self.cache is None else ttl(incoming.headers, tab.caller.cache_seconds)
        with self.metrics.stage("understand"):
            hashed = tab.replayable or keep is not None
            container, duration, digest = await self._measure(dialect, upload, hashed=hashed)
        account_id = tab.caller.account_id
        deployments = await self.choose(models, Asked(request, duration, upload.size), seconds=incoming.left)
        entry = None if keep is None else entry_id(request, digest)
        served = await self._hit(account_id, entry, deployments)
        hit = entry if served else None
        candidates = (served.deployment,) if served else deployments
        most = max(deployment.cost(duration, hit=hit is not None) for deployment in candidates)
        fields = tuple((field.name, field.value) for field in form.fields)
        same = fingerprint(account_id, dialect.path, fields, digest) if tab.replayable else ""
        exchange = Exchange() if tab.caller.debug else None
        narrator = None
        if request.stream:
            diarized = request.response_format is ResponseFormat.DIARIZED_JSON
            narrator = Narrator(cast(StreamingDialect, dialect), incoming.events, diarized=diarized)
        if request.ignored:
            incoming.told["x-voxgate-ignored-params"] = _header(request.ignored)
        async with Prepared(
            request=request,
            audio=upload,
            container=container,
            duration=duration,
            spool_dir=self.spool_dir,
            staging=self.staging,
            ids=(account_id, incoming.id),
            exchange=exchange,
            threads=self._converters,
            heard=narrator.heard if narrator else None,
        ) as prepared:
            if served is None and not tab.replayable:  # that one may have its answer already
                prepared.begin(deployments[0])
            with self.metrics.stage("hold"):
                replayed = await tab.hold(most, tenths=started_tenths(duration), fingerprint=same)
            if replayed is not None:
                return replayed
            async with self._charged_as_far(tab, prepared, narrator):
                if served is None:
                    with self.metrics.stage("attempt"):
                        served = await self._attempt(incoming, tab, prepared, deployments, narrator)
                outcome = Outcome(
                    id=incoming.id,
                    created=int(self.clock()),
                    request=request,
                    transcript=served.transcript,
                    provider=served.deployment.provider.name,
                    upstream_model=served.deployment.upstream_model,
                    language_style=models[0].language_style,
                    latency=served.latency,
                    attempts=served.attempts,
                    converted=served.converted,
                    hit=hit,
                    exchange=exchange,
                )
                incoming.events.headers = _served_by(outcome.provider, outcome.attempts)
                reply = await self._answer(dialect, tab, outcome, served.deployment, narrator)
        # What nobody paid for is not kept, nor that nothing was heard.
        if self.cache is not None and keep and entry and hit is None and served.transcript.text:
            await self.cache.put(account_id, entry, served.deployment.id, served.transcript, ttl=keep)
        return reply

    @contextlib.asynccontextmanager
    async def _charged_as_far(self, tab: Tab, prepared: Prepared, narrator: Narrator | None) -> AsyncIterator[None]:
        """A client that hangs up pays for what it was told, as it pays for nothing where it was told nothing."""
        try:
            yield
        except BaseException:
            if given_up() and narrator is not None and narrator.owed_until and prepared.serving is not None:
                serving, until = prepared.serving, min(narrator.owed_until, prepared.duration)
                tab.note(status=ClientGone.status)
                await self.charge(tab, serving, until, Reply(HEADERS, narrator.cut()))
            raise

    async def _hit(self, account_id: str, entry: str | None, deployments: tuple[Deployment, ...]) -> Served | None:
        """What the cache has, if who heard it may serve this request."""
        found = await self.cache.get(account_id, entry) if self.cache is not None and entry is not None else None
        heard_by = next((d for d in deployments if found and d.id == found.deployment), None)
        if found is None or heard_by is None:
            return None
        return Served(heard_by, found.transcript, latency=0.0, attempts=0, converted=None)

    async def _attempt(
        self,
        incoming: Incoming,
        tab: Tab,
        prepared: Prepared,
        deployments: tuple[Deployment, ...],
        narrator: Narrator | None,
    ) -> Served:
        attempts = 0

        def attempted(number: int, deployment: Deployment) -> None:
            nonlocal attempts
            attempts = number
            tab.note(attempts=number)
            incoming.events.headers = _served_by(deployment.provider.name, number)

        try:
            return await self.fallback.serve(
                prepared,
                deployments,
                attempted=attempted,
                told=lambda: narrator is not None and narrator.begun,
                seconds=incoming.left,
            )
        finally:
            incoming.told["x-voxgate-attempts"] = str(attempts)  # on a failure's answer, too

    async def _answer(
        self, dialect: Dialect, tab: Tab, outcome: Outcome, deployment: Deployment, narrator: Narrator | None
    ) -> Reply:
        # Rendered before it is charged: what cannot be answered costs nothing.
        if narrator is not None:
            headers, content = HEADERS, await narrator.done(outcome)
        else:
            long = len(outcome.transcript.text) > _LONG_TEXT
            body = await asyncio.to_thread(dialect.render, outcome) if long else dialect.render(outcome)
            headers, content = {"content-type": body.content_type}, body.content
        headers = headers | _served_by(outcome.provider, outcome.attempts)
        tab.note(converted=outcome.converted or "")
        duration, hit = outcome.transcript.duration, outcome.hit is not None
        with self.metrics.stage("settle"):
            return await self.charge(tab, deployment, duration, Reply(headers, content), hit=hit)

    async def charge(
        self, tab: Tab, deployment: Deployment, seconds: float, reply: Reply, *, hit: bool = False
    ) -> Reply:
        """Settles for that much audio; the reply with what it cost."""
        provider, billed = deployment.provider.name, deployment.billable(seconds) / 10
        cost = deployment.cost(seconds, hit=hit)
        tab.note(provider=provider, deployment=deployment.upstream_model, seconds=billed)
        reply = await tab.settle(cost, reply)
        self.metrics.add("AudioSeconds", billed, provider=provider)
        self.metrics.add("RevenueMicrodollars", cost, provider=provider)
        if not hit and deployment.upstream_price is not None:
            self.metrics.add("CostMicrodollars", deployment.upstream_cost(seconds), provider=provider)
        return reply

    async def _receive(self, dialect: Dialect, incoming: Incoming, upload: Upload) -> Form:
        self._uploads += 1
        try:
            async with asyncio.timeout(self.request_timeout):
                form = await receive(
                    incoming.body,
                    incoming.headers.get("content-type"),
                    limits=self.limits,
                    audio_field=dialect.audio_field,
                    into=upload,
                    reference_field=_REFERENCE if self.references else "",
                )
                return form if self.references is None else await self._fetched(self.references, form, upload)
        except TimeoutError as error:
            message = f"The upload was not complete within {self.request_timeout:g} seconds."
            raise RequestTimeout(message) from error
        finally:
            self._uploads -= 1

    async def _fetched(self, references: References, form: Form, upload: Upload) -> Form:
        """The form without its reference, and what that refers to in the upload."""
        named = [field.value for field in form.fields if field.name == _REFERENCE]
        if not named:
            return form
        if len(named) > 1 or upload.size:
            raise InvalidInput(f"Send the file or one '{_REFERENCE}', not both.", param=_REFERENCE)
        try:
            await references.fetch(named[0], upload.write, limit=self.limits.file)
        except (KeyError, ValueError) as error:
            raise InvalidInput(str(error.args[0]), param=_REFERENCE) from error
        return Form(tuple(field for field in form.fields if field.name != _REFERENCE), form.files)

    def _refuse_by_length(self, dialect: Dialect, content_length: int | None) -> None:
        if content_length is not None and content_length > self.limits.body:
            raise TooLarge(
                f"Maximum content size limit ({self.limits.file}) exceeded ({content_length} bytes announced): "
                "send a shorter recording, or a compressed one.",
                param=dialect.audio_field,
            )

    def models(self, request: TranscriptionRequest, caller: Caller) -> list[Model]:
        """The model that was asked for, then those to fall back to. Raises `ModelNotFound`, `Forbidden`."""
        models: list[Model] = []
        for name in (request.model, *request.routing.fallbacks):
            param = "fallbacks" if models else "model"
            try:
                model = self.catalog.find(name)
            except ModelNotFound as error:
                raise ModelNotFound(error.message, param=param) from error
            if not caller.may_use(name, model.id, *model.aliases):
                message = f"This API key may not use the model '{name}'; GET /v1/models lists those it may."
                raise Forbidden(message, code="model_not_allowed", param=param)
            models.append(model)
        return models

    async def choose(self, models: list[Model], asked: Asked, *, seconds: float = math.inf) -> tuple[Deployment, ...]:
        """The asked model's deployments, then its fallbacks': these may be unable to, the first may not."""
        await self.fallback.learn()
        chosen: list[Deployment] = []
        refusal: VoxgateError | None = None
        for model in models:
            try:
                chosen += choose(model, asked, await self._capabilities(model, seconds), self.health)
            except (ModelNotFound, InvalidInput) as error:
                refusal = refusal or error
        if not chosen and refusal is not None:
            raise refusal
        return tuple(dict.fromkeys(chosen))

    async def _capabilities(self, model: Model, seconds: float) -> dict[str, Capabilities]:
        """Of the deployments whose engine says itself what it can. One that does not start in time can nothing."""
        known: dict[str, Capabilities] = {}
        for each in [deployment for deployment in model.deployments if deployment.features is None]:
            provider = self.providers[each.provider.name]
            try:
                async with asyncio.timeout(min(seconds, self.request_timeout)):
                    known[each.id] = await provider.capabilities(each.upstream_model) or Capabilities()
            except TimeoutError as error:
                if len(model.deployments) == 1:
                    raise Overloaded(f"The recognizer of '{model.id}' is starting.", retry_after=2) from error
            except (ProviderError, OSError) as error:
                logger.warning("the provider %s does not start: %s", each.provider.name, error)
                if len(model.deployments) == 1:
                    raise ProviderUnavailable(f"The recognizer of '{model.id}' does not start.") from error
        return known

    async def _measure(self, dialect: Dialect, upload: Upload, *, hashed: bool) -> tuple[Container, float, bytes]:
        """What the audio is, how many seconds it lasts, and its SHA-256 where it is to be `hashed`."""
        # PyAV is loaded by the first request that brings audio, not at the function's start.
        from voxgate.audio.probe import probe
        from voxgate.audio.sniff import sniff

        def measure() -> tuple[Container, float, bytes]:
            container = sniff(upload.file)
            duration = probe(upload.file, container, max_seconds=self.max_audio_seconds)
            return container, duration, upload.digest() if hashed else b""

        try:
            return await self._measurers.run(measure)  # it reads a file that is closed after it
        except UnusableAudio as error:
            raise InvalidInput(str(error), param=dialect.audio_field) from error


def _served_by(provider: str, attempts: int) -> dict[str, str]:
    return {"x-voxgate-provider": provider, "x-voxgate-attempts": str(attempts)}


def _header(names: tuple[str, ...]) -> str:
    """Field names as a header value: what a client may put into a form must not become a header."""
    shown = ", ".join(dict.fromkeys(name[:64] for name in names[:32]))
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in shown)
