"""The inference service: one engine behind OpenAI's contract, for the gateway's hosts to call.

It knows no customers: it is for a private network, and answers whoever reaches it.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

from voxgate.accounts import Scope
from voxgate.accounts.credentials import ANYONE, Caller
from voxgate.catalog import Catalog, Deployment, Model, ProviderEntry
from voxgate.dialects.live import PATH
from voxgate.dialects.openai import InferenceDialect, TranslationDialect
from voxgate.engines.pool import EnginePool
from voxgate.errors import Overloaded, ProviderUnavailable
from voxgate.hosts.asgi import AsgiApp
from voxgate.hosts.http import Application, Request, Response, health, json_response, transcription
from voxgate.hosts.reading import models
from voxgate.hosts.sockets import Sockets
from voxgate.hosts.tokens import no_upgrade
from voxgate.live import Live
from voxgate.metering import Unmetered
from voxgate.metrics import Metrics
from voxgate.multipart import Limits
from voxgate.providers.embedded import EmbeddedProvider
from voxgate.routing.health import Health
from voxgate.settings import Settings
from voxgate.transcribe import Transcriber
from voxgate.wiring import build_references


def build_inference(*, pool: EnginePool, model: str, settings: Settings, spool_dir: Path) -> AsgiApp:
    """`model` is what the engine's model is called here, besides `default`. Staged audio is fetched from the
    settings' bucket, and from nowhere else."""
    entry = ProviderEntry(name="embedded", kind="inference")
    deployment = Deployment(provider=entry, upstream_model=model, price=0)
    catalog = Catalog([Model(id=model, aliases=("default",), deployments=(deployment,))])
    provider = EmbeddedProvider(pool=pool, max_audio_seconds=settings.max_audio_seconds)
    references = build_references(settings)
    transcriber = Transcriber(
        catalog=catalog,
        providers={"embedded": provider},
        gate=Unmetered(),
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
            **models(catalog, _anyone),
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
        for name, percent in zip(("GpuUtilization", "GpuMemoryUtilization"), await _gpu(), strict=False):
            metrics.add(name, percent)
        metrics.flush()
        await asyncio.sleep(60)


async def _gpu() -> list[float]:
    """The percentages of its time and of its memory that are in use; nothing where there is none."""
    query = ("--query-gpu=utilization.gpu,memory.used,memory.total", "--format=csv,noheader,nounits")
    try:
        asked = await asyncio.create_subprocess_exec("nvidia-smi", *query, stdout=subprocess.PIPE)
        said, _ = await asked.communicate()
        busy, used, total = map(float, said.decode().partition("\n")[0].split(","))
    except (OSError, ValueError):
        return []
    return [busy, 100 * used / total]


async def _anyone(request: Request, scope: Scope | None) -> Caller:
    return ANYONE
