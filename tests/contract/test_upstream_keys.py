"""Providers' keys in Secrets Manager, and what several gateways tell each other, over moto and SQLite."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import httpx
import pytest
from moto import mock_aws

from conftest import DATA
from fakes.api_gateway import ApiGateway
from fakes.upstreams import KEY, OpenAIUpstream, Script
from voxgate.accounts import Entry, EntryKind, Key, keys
from voxgate.accounts.sqlite import SqliteStore
from voxgate.hosts.gateway import build_application
from voxgate.hosts.lambda_rest import build_handler
from voxgate.settings import Settings
from voxgate.wiring import build_gateway

SECRET = "voxgate/up"
CALLER = keys.generate()
CATALOG = """
[providers.up]
kind = "openai"
base_url = "{up}"
api_key = "secret:voxgate/up"
[providers.spare]
kind = "openai"
base_url = "{spare}"
[models.alone]
deployments = [{{ provider = "up", upstream_model = "alone", price_per_minute = "0.001" }}]
[models.both]
deployments = [
  {{ provider = "up", upstream_model = "both", price_per_minute = "0.001" }},
  {{ provider = "spare", upstream_model = "both", price_per_minute = "0.002" }},
]
"""


@pytest.fixture
def aws() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, mock_aws():
        for name, value in {"DEFAULT_REGION": "eu-central-1", "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s"}.items():
            patch.setenv(f"AWS_{name}", value)
        boto3.client("secretsmanager").create_secret(Name=SECRET, SecretString=KEY)
        yield


@pytest.fixture
def upstreams() -> Iterator[tuple[OpenAIUpstream, OpenAIUpstream]]:
    with OpenAIUpstream() as up, OpenAIUpstream(key="") as spare:
        yield up, spare


@contextlib.contextmanager
def gateway(directory: Path, upstreams: tuple[OpenAIUpstream, OpenAIUpstream]) -> Iterator[httpx.Client]:
    """A process's worth of gateway, on the accounts in that directory."""
    loop = asyncio.new_event_loop()
    catalog = directory / "catalog.toml"
    catalog.write_text(CATALOG.format(up=upstreams[0].base_url, spare=upstreams[1].base_url), encoding="utf-8")
    store = SqliteStore(directory / "voxgate.sqlite")

    async def furnish() -> None:
        if not await store.accounts():
            account = await store.create_account("acme")
            await store.post(Entry(account.id, EntryKind.TOP_UP, 1_000_000, time.time(), "opening"))
            await store.create_key(Key(id="key_1", account_id=account.id, created=0), keys.digest(CALLER))

    loop.run_until_complete(furnish())
    built = build_gateway(Settings(catalog=str(catalog), data_dir=directory, spool_dir=directory), store, {})
    transport = ApiGateway(build_handler(build_application(built), loop))
    with httpx.Client(base_url="https://api", headers={"authorization": f"Bearer {CALLER}"}, transport=transport) as it:
        yield it
    loop.run_until_complete(built.close())
    loop.close()


def ask(client: httpx.Client, model: str) -> httpx.Response:
    files = {"file": ("a.mp3", (DATA / "b-slt.mp3").read_bytes())}
    return client.post("/audio/transcriptions", data={"model": model, "preference": "cost"}, files=files)


Upstreams = tuple[OpenAIUpstream, OpenAIUpstream]


def test_a_key_comes_from_secrets_manager(aws: None, tmp_path: Path, upstreams: Upstreams) -> None:
    with gateway(tmp_path, upstreams) as client:
        assert ask(client, "alone").status_code == 200


def test_a_rotated_key_is_used_as_soon_as_the_old_one_is_refused(
    aws: None, tmp_path: Path, upstreams: Upstreams
) -> None:
    with gateway(tmp_path, upstreams) as client:
        assert ask(client, "alone").status_code == 200
        upstreams[0].key = "the-new-key"
        boto3.client("secretsmanager").put_secret_value(SecretId=SECRET, SecretString="the-new-key")
        refused = ask(client, "alone").json()["error"]
        assert (refused["code"], "credential" in refused["message"]) == ("provider_unavailable", True)
        assert ask(client, "alone").status_code == 200


def test_a_key_that_is_not_there_is_the_next_ones_turn(aws: None, tmp_path: Path, upstreams: Upstreams) -> None:
    boto3.client("secretsmanager").delete_secret(SecretId=SECRET, ForceDeleteWithoutRecovery=True)
    with gateway(tmp_path, upstreams) as client:
        answer = ask(client, "both")
        assert (answer.headers["x-voxgate-provider"], upstreams[0].sent) == ("spare", [])


def test_a_new_process_knows_what_is_out_of_order(aws: None, tmp_path: Path, upstreams: Upstreams) -> None:
    upstreams[0].always(Script(status=500))
    with gateway(tmp_path, upstreams) as first:
        for _ in range(6):
            assert ask(first, "both").headers["x-voxgate-provider"] == "spare"
        asked = len(upstreams[0].sent)
        with gateway(tmp_path, upstreams) as second:
            answer = ask(second, "both")
    assert (answer.headers["x-voxgate-provider"], answer.headers["x-voxgate-attempts"]) == ("spare", "1")
    assert len(upstreams[0].sent) == asked
