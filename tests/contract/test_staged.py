"""Audio by reference: the gateway stages it in the bucket, and our inference service fetches it from there."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
import uvicorn
from botocore.exceptions import EndpointConnectionError
from moto import mock_aws

from conftest import DATA
from fakes.api_gateway import ApiGateway
from fakes.upstreams import InferenceUpstream, Script
from voxgate.accounts import Entry, EntryKind, Key, keys
from voxgate.accounts.sqlite import SqliteStore
from voxgate.hosts.gateway import build_application
from voxgate.hosts.inference import build_inference
from voxgate.hosts.lambda_rest import build_handler
from voxgate.hosts.serve import bind, url
from voxgate.settings import Settings
from voxgate.staging import Staging, audio_key
from voxgate.staging.s3 import S3Staging
from voxgate.wiring import build_gateway, build_pool, make_spool

SPEECH = DATA / "a-mp3-cbr.mp3"  # "Please send the letter."
CATALOG = """
[providers.self]
kind = "inference"
base_url = "{}"
staged = true
[providers.other]
kind = "inference"
base_url = "{}"
[models.m]
deployments = [
  {{ provider = "self", upstream_model = "default", price_per_minute = "0.001" }},
  {{ provider = "other", upstream_model = "default", price_per_minute = "0.001" }},
]
"""


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch, mock_aws():
        for name, value in {"DEFAULT_REGION": "eu-central-1", "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s"}.items():
            patch.setenv(f"AWS_{name}", value)
        s3 = boto3.client("s3")
        for bucket in ("staging", "others"):
            s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
        yield s3


@pytest.fixture(scope="module")
def service(bucket: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`voxgate inference` with its real recognizer, in this process, where the bucket is."""
    settings = Settings(staging_bucket="staging", engine_workers=1)
    pool = build_pool(settings)
    spool = make_spool(tmp_path_factory.mktemp("spool"))
    app = build_inference(pool=pool, models=["pocketsphinx"], settings=settings, spool_dir=spool)
    listening = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    address = url(listening)
    while httpx.get(f"{address}/health/ready").status_code != 200:
        time.sleep(0.05)
    yield address
    server.should_exit = True
    thread.join()
    listening.close()


@dataclass(frozen=True)
class Gateway:
    client: httpx.Client
    other: InferenceUpstream
    staging: Staging

    def ask(self, **headers: str) -> httpx.Response:
        files = {"file": ("a.mp3", SPEECH.read_bytes())}
        return self.client.post("/v1/audio/transcriptions", data={"model": "m"}, files=files, headers=headers)


@pytest.fixture
def gateway(bucket: Any, service: str, tmp_path: Path) -> Iterator[Gateway]:
    loop = asyncio.new_event_loop()
    with InferenceUpstream(key="") as other:
        catalog = tmp_path / "catalog.toml"
        catalog.write_text(CATALOG.format(service, other.base_url), encoding="utf-8")
        settings = Settings(catalog=str(catalog), staging_bucket="staging", data_dir=tmp_path, spool_dir=tmp_path)
        store = SqliteStore(tmp_path / "voxgate.sqlite")
        secret = keys.generate()

        async def furnish() -> None:
            account = await store.create_account("acme")
            await store.post(Entry(account.id, EntryKind.TOP_UP, 1_000_000, time.time(), "opening"))
            await store.create_key(Key(id="key_1", account_id=account.id, created=0), keys.digest(secret))

        loop.run_until_complete(furnish())
        built = build_gateway(settings, store, {})
        handler = build_handler(build_application(built), loop)
        headers = {"authorization": f"Bearer {secret}"}
        with httpx.Client(base_url="https://api", headers=headers, transport=ApiGateway(handler)) as client:
            yield Gateway(client, other, built.staging)
        loop.run_until_complete(built.close())
    loop.close()


def staged(bucket: Any) -> list[str]:
    found = bucket.list_objects_v2(Bucket="staging", Prefix="staging/").get("Contents", [])
    return [item["Key"] for item in found]


def test_the_service_hears_what_was_staged_and_nothing_is_left_there(gateway: Gateway, bucket: Any) -> None:
    response = gateway.ask()
    assert response.status_code == 200, response.text
    assert (response.headers["x-voxgate-provider"], gateway.other.sent) == ("self", [])
    assert response.json()["text"] == "please send the letter"
    assert staged(bucket) == []


def test_where_nothing_can_be_staged_the_audio_is_sent(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object, **__: object) -> str:
        raise EndpointConnectionError(endpoint_url="https://s3")

    monkeypatch.setattr(gateway.staging, "put", fail)
    assert gateway.ask().headers["x-voxgate-provider"] == "self"


def test_what_cannot_be_removed_costs_nobody_an_answer(
    gateway: Gateway, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise EndpointConnectionError(endpoint_url="https://s3")

    monkeypatch.setattr(gateway.staging, "remove", fail)
    assert gateway.ask().status_code == 200
    (left,) = staged(bucket)
    bucket.delete_object(Bucket="staging", Key=left)


def test_a_provider_that_takes_no_reference_gets_the_bytes_of_what_is_staged(gateway: Gateway, bucket: Any) -> None:
    """The service is given up because its answers are, and the next one is sent the whole file."""
    gateway.other.always(Script())
    response = gateway.client.post(
        "/audio/transcriptions",
        data={"model": "m", "allowed_providers": "other"},
        files={"file": ("a.mp3", SPEECH.read_bytes())},
    )
    assert response.headers["x-voxgate-provider"] == "other"
    assert gateway.other.sent[-1].audio == SPEECH.read_bytes()
    assert staged(bucket) == []


def test_a_refused_request_leaves_nothing_staged(gateway: Gateway, bucket: Any) -> None:
    long = {"file": ("a.wav", (DATA / "long-slt.flac").read_bytes())}
    for _ in range(3):
        gateway.client.post("/v1/audio/transcriptions", data={"model": "m", "language": "xx"}, files=long)
    assert staged(bucket) == []


def ask(service: str, **fields: str) -> httpx.Response:
    parts = {name: (None, value) for name, value in ({"model": "default"} | fields).items()}
    return httpx.post(f"{service}/v1/audio/transcriptions", files=parts, timeout=60)


def put(name: str, bucket: str = "staging") -> str:
    boto3.client("s3").put_object(Bucket=bucket, Key=name, Body=SPEECH.read_bytes())
    return f"s3://{bucket}/{name}"


def test_only_staged_audio_of_the_own_bucket_is_fetched(service: str) -> None:
    good = put(audio_key("acct_1", "req_1"))
    assert ask(service, s3=good).status_code == 200
    for reference in (
        put("results/acct_1/req_1"),
        put("elsewhere/req_1"),
        put(audio_key("acct_1", "req_1"), "others"),
        good + "/../req_1",
        "s3://staging/staging/acct_1/../acct_1/req_1",
        "https://example.com/a.mp3",
        "file:///etc/passwd",
        "",
    ):
        error = ask(service, s3=reference)
        assert (error.status_code, error.json()["error"]["param"]) == (400, "s3"), reference
    gone = ask(service, s3="s3://staging/staging/acct_1/req_2")
    assert (gone.status_code, gone.json()["error"]["param"]) == (400, "s3")


def test_a_reference_and_a_file_are_one_too_many(service: str) -> None:
    good = put(audio_key("acct_1", "req_1"))
    both = httpx.post(
        f"{service}/v1/audio/transcriptions",
        data={"model": "default", "s3": good},
        files={"file": ("a.mp3", SPEECH.read_bytes())},
    )
    assert (both.status_code, both.json()["error"]["param"]) == (400, "s3")


def test_what_is_staged_is_read_up_to_the_limit(bucket: Any) -> None:
    reference = put(audio_key("acct_1", "req_3"))
    staging = S3Staging("staging")
    pieces: list[bytes] = []

    async def run() -> None:
        await staging.fetch(reference, pieces.append, limit=10**6)
        with pytest.raises(ValueError, match="larger than 100 bytes"):
            await staging.fetch(reference, pieces.append, limit=100)
        await staging.close()

    asyncio.run(run())
    assert b"".join(pieces) == SPEECH.read_bytes()
