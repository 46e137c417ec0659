"""The only place where parts are chosen and put together."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from voxgate import dialects
from voxgate.accounts import Accounts, keys
from voxgate.catalog import Catalog, ProviderEntry, load
from voxgate.engines.pool import EnginePool
from voxgate.errors import Unauthenticated
from voxgate.multipart import Limits
from voxgate.providers import Provider
from voxgate.settings import Settings
from voxgate.transcribe import Authenticator, Caller, Transcriber

_SPOOL = "voxgate-spool-"


@dataclass(frozen=True, slots=True)
class Gateway:
    """A running gateway's parts. `start` and `close` are for hosts with a life cycle."""

    settings: Settings
    catalog: Catalog
    transcriber: Transcriber
    authenticate: Authenticator
    accounts: Accounts
    providers: Mapping[str, Provider]
    pool: EnginePool | None
    spool_dir: Path

    async def start(self) -> None:
        if self.pool is not None:
            await self.pool.start()

    async def close(self) -> None:
        for provider in self.providers.values():
            await provider.close()
        await self.accounts.close()
        shutil.rmtree(self.spool_dir, ignore_errors=True)


def build_gateway(settings: Settings, accounts: Accounts, environ: Mapping[str, str] | None = None) -> Gateway:
    """Raises `InvalidCatalog`."""
    catalog = load(settings.catalog, os.environ if environ is None else environ)
    pool = None
    providers: dict[str, Provider] = {}
    for entry in catalog.providers:
        if entry.base_url:
            providers[entry.name] = _remote(entry, settings)
            continue
        pool = pool or build_pool(settings)
        providers[entry.name] = _embedded(pool, settings)
    spool_dir = make_spool(settings.spool_dir)
    authenticate = KeyAuthenticator(accounts)
    transcriber = Transcriber(
        catalog=catalog,
        providers=providers,
        authenticate=authenticate,
        spool_dir=spool_dir,
        limits=Limits(),
        max_audio_seconds=settings.max_audio_seconds,
        provider_timeout=settings.provider_timeout,
        request_timeout=settings.request_timeout,
    )
    return Gateway(settings, catalog, transcriber, authenticate, accounts, providers, pool, spool_dir)


def build_pool(settings: Settings) -> EnginePool:
    cores = os.cpu_count() or 1
    if settings.whisper_model:
        arguments = ["whisper", settings.whisper_model, settings.whisper_device, settings.whisper_compute_type]
        workers = settings.engine_workers or 1  # CTranslate2 uses all cores by itself
    else:
        arguments = ["sphinx"]
        workers = settings.engine_workers or min(cores, 4)
    return EnginePool(arguments=arguments, workers=workers, queue=settings.engine_queue)


def _remote(entry: ProviderEntry, settings: Settings) -> Provider:
    # httpx costs 150 ms to load, so only a deployment that calls somebody pays for it.
    from voxgate.providers.inference import InferenceProvider

    return InferenceProvider(base_url=entry.base_url, timeout=settings.provider_timeout)


def _embedded(pool: EnginePool, settings: Settings) -> Provider:
    from voxgate.providers.embedded import EmbeddedProvider

    return EmbeddedProvider(pool=pool, max_audio_seconds=settings.max_audio_seconds)


class KeyAuthenticator:
    """`Authorization: Bearer` against the store. Implements `transcribe.Authenticator`."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts

    async def __call__(self, headers: Mapping[str, str]) -> Caller:
        scheme, _, token = headers.get("authorization", "").strip().partition(" ")
        token = token.strip()
        if not token:
            raise Unauthenticated("You didn't provide an API key: send it as 'Authorization: Bearer KEY'.")
        if scheme.lower() != "bearer":
            raise Unauthenticated("The Authorization header must be 'Bearer KEY'.")
        key = await self._accounts.find_key(keys.digest(token)) if keys.well_formed(token) else None
        if key is None or key.revoked:
            raise Unauthenticated("Incorrect API key provided.")
        return Caller(key.account_id, key.id)


def all_dialects() -> list[dialects.Dialect]:
    from voxgate.dialects.litellm import LiteLLMDialect
    from voxgate.dialects.openai import OpenAIDialect
    from voxgate.dialects.router import RouterDialect
    from voxgate.dialects.stats import StatsDialect

    return [OpenAIDialect(), StatsDialect(), RouterDialect(), LiteLLMDialect()]


def make_spool(parent: Path) -> Path:
    """A private directory for uploads, and an end to those whose process was killed."""
    for left in parent.glob(f"{_SPOOL}*"):
        pid = left.name.removeprefix(_SPOOL).partition("-")[0]
        if pid.isdecimal() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"{_SPOOL}{os.getpid()}-", dir=parent))


def _alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError, OverflowError):
        try:
            os.kill(pid, 0)
        except PermissionError:  # another user's, so alive
            return True
        return True
    return False


def model_name(settings: Settings) -> str:
    """What the engine's model is called in lists of models."""
    return settings.whisper_model.rstrip("/").rsplit("/", 1)[-1] or "pocketsphinx-en-us"
