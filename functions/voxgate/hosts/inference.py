"""The inference service: one engine behind OpenAI's contract, for the gateway's hosts to call.

It knows no customers: it is for a private network, and answers whoever reaches it.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping
from pathlib import Path

from voxgate.accounts import Scope
from voxgate.accounts.credentials import ANYONE, Caller
from voxgate.catalog import Catalog, Deployment, Model, ProviderEntry
from voxgate.dialects.live import PATH
from voxgate.dialects.openai import InferenceDialect, TranslationDialect
from voxgate.engines import Pool
from voxgate.errors import Overloaded, ProviderUnavailable
from voxgate.hosts.asgi import AsgiApp
from voxgate.hosts.http import Application, Request, Response, health, json_response, transcription
from voxgate.hosts.prometheus import gpu, prometheus
from voxgate.hosts.reading import models as list_models
from voxgate.hosts.sockets import Sockets
from voxgate.hosts.tokens import no_upgrade
from voxgate.live import Live
from voxgate.metering import Unmetered
from voxgate.metrics import Metrics
from voxgate.multipart import Limits
from voxgate.providers.embedded import EmbeddedProvider
from voxgate.routing.health import Health
from voxgate.settings import Settings
from voxgate.transcribe import Transcriber, deadline, priority
from voxgate.wiring import build_references


def build_inference(*, pool: Pool, models: list[str], settings: Settings, spool_dir: Path) -> AsgiApp:
    """`models` are what the engine's are called here; the first is also the `default`. Staged audio is fetched from
    the settings' bucket, and from nowhere else."""
    entry = ProviderEntry(name="embedded", kind="inference")
    deployments = {name: (Deployment(provider=entry, upstream_model=name, price=0),) for name in models}
    catalog = Catalog(
        [
            Model(id=name, aliases=("default",) if name == models[0] else (), deployments=deployments[name])
            for name in models
        ]
    )

    def check(headers: Mapping[str, str]) -> None:
        """Before the body: what would come too late in any case is refused at once."""
        pool.admission.check(priority(headers), 0.0, min(deadline(headers), settings.provider_timeout))

    gate = Unmetered(check)
    provider = EmbeddedProvider(pool=pool, max_audio_seconds=settings.max_audio_seconds)
    references = build_references(settings)
    transcriber = Transcriber(
        catalog=catalog,
        providers={"embedded": provider},
        gate=gate,
        health=Health(),
        references=references,
        spool_dir=spool_dir,
        limits=Limits(),
        max_audio_seconds=settings.max_audio_seconds,
        provider_timeout=settings.provider_timeout,
        request_timeout=settings.request_timeout,
    )

    async def ready(request: Request) -> Response:
        if pool.failed:
            raise ProviderUnavailable("The model could not be loaded; the log says why.")
        if not pool.ready:
            raise Overloaded("The model is being loaded.", retry_after=2)
        return json_response({"status": "ready"})

    metrics = Metrics(settings.environment)
    reporting: list[asyncio.Task[None]] = []

    async def start() -> None:
        # Serve at once: readiness, not the open port, says that the model is there.
        pool.begin()
        if settings.environment:
            reporting.append(asyncio.create_task(_report(metrics, provider)))

    async def stop() -> None:
        for task in reporting:
            task.cancel()
        await provider.close()
        if references is not None:
            await references.close()
        shutil.rmtree(spool_dir, ignore_errors=True)

    application = Application(
        {
            "/v1/audio/transcriptions": {"POST": transcription(transcriber, InferenceDialect())},
            PATH: {"GET": no_upgrade},
            "/v1/audio/translations": {"POST": transcription(transcriber, TranslationDialect())},
            "/health": {"GET": health},
            "/health/live": {"GET": health},
            "/health/ready": {"GET": ready},
            "/metrics": {"GET": prometheus(provider, pool)},
            **list_models(catalog, _anyone),
        }
    )
    live = Live(transcriber=transcriber, gate=Unmetered(), max_seconds=settings.max_audio_seconds)
    return AsgiApp(
        application,
        sockets=Sockets(live, transcriber.metrics),
        start=start,
        stop=stop,
        slowest_upload=settings.slowest_upload,
    )


async def _report(metrics: Metrics, provider: EmbeddedProvider) -> None:
    """Each minute, what the number of machines is scaled by, zeroes too, and how busy this one is."""
    while True:
        metrics.add("QueuedAudioSeconds", provider.queued_seconds)
        if found := await gpu():
            busy, used, total = found
            metrics.add("GpuUtilization", busy)
            metrics.add("GpuMemoryUtilization", 100 * used / total)
        metrics.flush()
        await asyncio.sleep(60)


async def _anyone(request: Request, scope: Scope | None) -> Caller:
    return ANYONE
