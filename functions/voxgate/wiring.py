"""The only place where parts are chosen and put together."""

from __future__ import annotations

import asyncio
import functools
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from voxgate import dialects
from voxgate.accounts import RateLimits, Store
from voxgate.accounts.credentials import Authenticator
from voxgate.cache import Cache
from voxgate.catalog import Catalog, ProviderEntry, load
from voxgate.engines import Pool
from voxgate.engines.batch_pool import BatchPool
from voxgate.engines.pool import EnginePool
from voxgate.errors import InvalidSettings
from voxgate.metering import Meter, sweep_forever
from voxgate.metrics import Metrics
from voxgate.multipart import Limits
from voxgate.providers import Provider
from voxgate.providers.embedded import EmbeddedProvider
from voxgate.providers.secrets import StoredSecrets
from voxgate.routing.health import Health
from voxgate.settings import Settings
from voxgate.staging import Staging
from voxgate.transcribe import Transcriber

if TYPE_CHECKING:
    import ssl

    from voxgate.providers.live import LiveWire
    from voxgate.staging.s3 import S3Staging

_SPOOL = "voxgate-spool-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """A running gateway's parts. `start` and `close` are for hosts with a life cycle."""

    settings: Settings
    catalog: Catalog
    transcriber: Transcriber
    meter: Meter
    health: Health
    store: Store
    staging: Staging
    providers: Mapping[str, Provider]
    pool: Pool | None
    spool_dir: Path
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def metrics(self) -> Metrics:
        return self.transcriber.metrics

    async def start(self) -> None:
        if self.pool is not None:
            await self.pool.start()
        self.tasks.append(asyncio.create_task(sweep_forever(self.store, self.staging)))
        self.tasks.append(asyncio.create_task(self.metrics.flush_forever()))

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for provider in self.providers.values():
            await provider.close()
        await self.store.close()
        await self.staging.close()
        shutil.rmtree(self.spool_dir, ignore_errors=True)


def build_gateway(settings: Settings, store: Store, environ: Mapping[str, str] = os.environ) -> Gateway:
    """Raises `InvalidCatalog`."""
    catalog = load_catalog(settings, environ)
    pool = None
    providers: dict[str, Provider] = {}
    secrets = StoredSecrets(environ)
    for entry in catalog.providers:
        if entry.base_url:
            providers[entry.name] = _remote(entry, settings, secrets)
            continue
        pool = pool or build_pool(settings)
        providers[entry.name] = EmbeddedProvider(pool=pool, max_audio_seconds=settings.max_audio_seconds)
    spool_dir = make_spool(settings.spool_dir)
    authenticate = Authenticator(store, account_limits=_limits(settings), key_limits=_limits(settings, "key_"))
    staging = build_staging(settings)
    health = Health()
    # An upload, its transcription, and what is between: nothing is held for longer than both may take.
    meter = Meter(authenticate=authenticate, store=store, staging=staging, lease=2 * settings.request_timeout + 60)
    transcriber = Transcriber(
        catalog=catalog,
        providers=providers,
        gate=meter,
        health=health,
        outages=store,
        staging=staging if settings.staging_bucket else None,
        cache=Cache(staging),
        metrics=Metrics(settings.environment),
        uploads_at_once=settings.uploads_at_once,
        spool_dir=spool_dir,
        limits=Limits(),
        max_audio_seconds=settings.max_audio_seconds,
        provider_timeout=settings.provider_timeout,
        request_timeout=settings.request_timeout,
    )
    return Gateway(
        settings=settings,
        catalog=catalog,
        transcriber=transcriber,
        meter=meter,
        health=health,
        store=store,
        staging=staging,
        providers=providers,
        pool=pool,
        spool_dir=spool_dir,
    )


def load_catalog(settings: Settings, environ: Mapping[str, str] = os.environ) -> Catalog:
    """Raises `InvalidCatalog`."""
    return load(settings.catalog, environ, embedded=settings.embedded > 0)


def build_pool(settings: Settings) -> Pool:
    cores = os.cpu_count() or 1
    if settings.whisper_model:
        options = {
            "models": whisper_models(settings),
            "directory": str(settings.data_dir / "models"),
            "device": settings.whisper_device,
            "compute_type": settings.whisper_compute_type,
            "beam_size": settings.whisper_beam,
            "batch_size": settings.whisper_batch,
            "threads": settings.engine_workers or cores,
            "budget": int(settings.whisper_memory * 1e9),
            "guards": {
                "speech": settings.whisper_speech_threshold,
                "steady": settings.whisper_steady_threshold,
                "no_speech": settings.whisper_no_speech_threshold,
                "logprob": settings.whisper_logprob_threshold,
                "compression": settings.whisper_compression_threshold,
            },
        }
        return BatchPool(options=options, queue=settings.engine_queue or 1024)
    return EnginePool(
        arguments=["sphinx"],
        workers=settings.engine_workers or min(cores, 4),
        queue=settings.engine_queue or 64,
        live=settings.live_workers or min(3 * cores, 16),  # each takes a fifth of a core, and 200 MB
    )


def _remote(entry: ProviderEntry, settings: Settings, secrets: StoredSecrets) -> Provider:
    # httpx costs 150 ms to load, so only a deployment that calls somebody pays for it.
    from voxgate.providers.deepgram import DeepgramAdapter, DeepgramLive
    from voxgate.providers.http import Adapter, HttpProvider, Timeouts
    from voxgate.providers.inference import InferenceAdapter, InferenceLive
    from voxgate.providers.openai import MistralAdapter, OpenAIAdapter

    adapters: dict[tuple[str, str], tuple[Adapter, LiveWire | None]] = {
        ("inference", ""): (InferenceAdapter(), InferenceLive()),
        ("openai", ""): (OpenAIAdapter(), None),
        ("openai", "mistral"): (MistralAdapter(), None),
        ("deepgram", ""): (DeepgramAdapter(), DeepgramLive()),
    }
    adapter, live = adapters[entry.kind, entry.flavor]
    return HttpProvider(
        adapter=adapter,
        live=live,
        base_url=entry.base_url,
        api_key=entry.api_key,
        secrets=secrets,
        timeouts=Timeouts(connect=settings.provider_connect_timeout, first_byte=settings.provider_first_byte_timeout),
        tls=_tls(),
    )


@functools.cache
def _tls() -> ssl.SSLContext:
    """One for all providers: the certificates take 25 ms to load. Built in, so no setting can turn it off."""
    import httpx

    return httpx.create_ssl_context(trust_env=False)


def build_store(settings: Settings) -> Store:
    if settings.table:
        from voxgate.accounts.dynamodb import DynamoStore
        from voxgate.accounts.table import new_client

        return DynamoStore(settings.table, client=new_client(settings.region, settings.profile))
    from voxgate.accounts.sqlite import SqliteStore

    return SqliteStore(settings.data_dir / "voxgate.sqlite")


def build_staging(settings: Settings) -> Staging:
    if bucket := build_references(settings):
        return bucket
    if settings.table:
        # A directory is one machine's: another could not give the answer again.
        raise InvalidSettings("VOXGATE_TABLE needs VOXGATE_STAGING_BUCKET beside it.")
    from voxgate.staging.local import LocalStaging

    return LocalStaging(settings.data_dir / "staging")


def build_references(settings: Settings) -> S3Staging | None:
    """Where audio may be fetched from by reference."""
    if not settings.staging_bucket:
        return None
    from voxgate.staging.s3 import S3Staging

    return S3Staging(settings.staging_bucket, kms_key_id=settings.staging_key)


def _limits(settings: Settings, prefix: str = "") -> RateLimits:
    """The settings are named like the limits; 0 is none."""
    return RateLimits(*(getattr(settings, f"{prefix}{limit.name}") or None for limit in fields(RateLimits)))


def all_dialects() -> list[dialects.Dialect]:
    from voxgate.dialects.litellm import LiteLLMDialect
    from voxgate.dialects.openai import OpenAIDialect, TranslationDialect
    from voxgate.dialects.router import RouterDialect
    from voxgate.dialects.stats import StatsDialect

    return [OpenAIDialect(), TranslationDialect(), StatsDialect(), RouterDialect(), LiteLLMDialect()]


def make_spool(parent: Path) -> Path:
    """A private directory for uploads, and an end to those whose process was killed."""
    for left in parent.glob(f"{_SPOOL}*"):
        pid = left.name.removeprefix(_SPOOL).partition("-")[0]
        if pid.isdecimal() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"{_SPOOL}{os.getpid()}-", dir=parent))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's, so alive
        pass
    return True


def whisper_models(settings: Settings) -> dict[str, str]:
    """What they are called, and where they are; the first is the one that is asked for by any other name."""
    named: dict[str, str] = {}
    for each in filter(str.strip, settings.whisper_model.split(",")):
        name, equals, where = (part.strip() for part in each.partition("="))
        where = where if equals else name
        name = name if equals else name.rstrip("/").rsplit("/", 1)[-1]
        if not name or not where or name in named:
            raise InvalidSettings(f"VOXGATE_WHISPER_MODEL has a model without a name, or two of one name: '{each}'.")
        named[name] = where
    if settings.whisper_model and not named:
        raise InvalidSettings("VOXGATE_WHISPER_MODEL has no model.")
    return named


def model_names(settings: Settings) -> list[str]:
    """What the engine's models are called in lists of models."""
    return list(whisper_models(settings)) or ["pocketsphinx-en-us"]
