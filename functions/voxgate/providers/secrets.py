"""Providers' API keys: from the environment, or from AWS Secrets Manager, and never in a file of ours."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from voxgate.errors import FailureClass, ProviderError

if TYPE_CHECKING:
    from mypy_boto3_secretsmanager.client import SecretsManagerClient

_SECONDS = 300.0
_MISSING_SECONDS = 10.0


class StoredSecrets:
    """Implements `Secrets`. What Secrets Manager said is remembered for five minutes, so that a key that
    is rotated there is used within them, or at once when the old one is refused."""

    def __init__(
        self,
        environ: Mapping[str, str],
        *,
        client: Callable[[], SecretsManagerClient] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._environ = environ
        self._make_client = client or _new_client
        self._client: SecretsManagerClient | None = None
        self._clock = clock
        self._known: dict[str, tuple[float, str]] = {}
        self._lock = asyncio.Lock()

    async def get(self, reference: str) -> str:
        kind, _, name = reference.partition(":")
        if kind == "env":
            value = self._environ.get(name, "").strip()
        else:
            async with self._lock:  # one look-up for all who wait for it
                value = await self._stored(name)
        if not value:
            raise ProviderError(FailureClass.CREDENTIAL, f"There is no API key at '{reference}'.")
        return value

    def forget(self, reference: str) -> None:
        self._known.pop(reference.removeprefix("secret:"), None)

    async def _stored(self, name: str) -> str:
        until, value = self._known.get(name, (0.0, ""))
        if self._clock() >= until:
            value = await asyncio.to_thread(self._fetch, name)
            self._known[name] = (self._clock() + (_SECONDS if value else _MISSING_SECONDS), value)
        return value

    def _fetch(self, name: str) -> str:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self._client = self._client or self._make_client()
            return self._client.get_secret_value(SecretId=name).get("SecretString", "").strip()
        except (ClientError, BotoCoreError):
            return ""  # the provider counts as failing, and the next one is tried


def _new_client() -> SecretsManagerClient:
    import boto3
    from botocore.config import Config

    return boto3.session.Session().client(
        "secretsmanager", config=Config(connect_timeout=2, read_timeout=5, retries={"mode": "standard"})
    )
