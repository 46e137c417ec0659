"""Providers' API keys: from the environment, or from AWS Secrets Manager, and never in a file of ours."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from voxgate.errors import FailureClass, ProviderError

if TYPE_CHECKING:
    from mypy_boto3_secretsmanager.client import SecretsManagerClient

_SECONDS = 300.0
_MISSING_SECONDS = 10.0


class StoredSecrets:
    """What Secrets Manager said is remembered for five minutes, so that a key that is rotated there is used
    within them, or, when the old one is refused, within ten seconds. While it does not answer, what it said last
    stands."""

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
        self._forgotten: dict[str, float] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def get(self, reference: str) -> str:
        """The secret that `env:NAME` or `secret:ID` means. Raises `ProviderError` where there is none."""
        kind, _, name = reference.partition(":")
        if kind == "env":
            value = self._environ.get(name, "").strip()
            if value.startswith("secret:"):  # a deployment's variables name secrets, and hold none
                return await self.get(value)
        else:
            async with self._locks[name]:  # one look-up for all who wait for it
                value = await self._stored(name)
        if not value:
            raise ProviderError(FailureClass.CREDENTIAL, f"There is no API key at '{reference}'.")
        return value

    def forget(self, reference: str) -> None:
        """Ask for it anew the next time."""
        if reference.startswith("env:"):
            reference = self._environ.get(reference[4:], "").strip()
        name, now = reference.removeprefix("secret:"), self._clock()
        if name in self._known and now >= self._forgotten.get(name, 0.0):
            self._forgotten[name] = now + _MISSING_SECONDS
            self._known[name] = (0.0, self._known[name][1])

    async def _stored(self, name: str) -> str:
        until, value = self._known.get(name, (0.0, ""))
        if self._clock() >= until:
            found = await asyncio.to_thread(self._fetch, name)
            value = value if found is None else found
            self._known[name] = (self._clock() + (_SECONDS if found else _MISSING_SECONDS), value)
        return value

    def _fetch(self, name: str) -> str | None:
        """None where it does not answer; empty where there is nothing."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self._client = self._client or self._make_client()
            return self._client.get_secret_value(SecretId=name).get("SecretString", "").strip()
        except ClientError as error:
            gone = error.response.get("Error", {}).get("Code") == "ResourceNotFoundException"
            return "" if gone else None
        except BotoCoreError:
            return None


def _new_client() -> SecretsManagerClient:
    import boto3
    from botocore.config import Config

    return boto3.session.Session().client(
        "secretsmanager", config=Config(connect_timeout=2, read_timeout=5, retries={"mode": "standard"})
    )
