"""The Lambda handlers with the stores that they have on AWS: one DynamoDB table and one S3 bucket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import httpx
import pytest
from moto import mock_aws

from conftest import DATA
from fakes.api_gateway import ApiGateway
from fakes.bucket import REGION, bucket
from fakes.inference import Inference
from fakes.store import create_table
from voxgate.accounts import Entry, EntryKind, Key, RateLimits, keys
from voxgate.cli import main
from voxgate.hosts.gateway import build_application
from voxgate.hosts.lambda_rest import build_handler
from voxgate.settings import Settings
from voxgate.wiring import build_gateway, build_store

SPEECH = DATA / "b-slt.mp3"
COST = 310
PATHS = [
    "/v1/audio/transcriptions",
    "/v1/stt/transcribe",
    "/audio/transcriptions",
    "/litellm/v1/audio/transcriptions",
]


@dataclass(frozen=True)
class Cloud:
    client: httpx.Client
    upstream: Inference
    account: str
    loop: asyncio.AbstractEventLoop

    def transcribe(self, path: str = PATHS[0], **headers: str) -> httpx.Response:
        audio, model = ("audio", "model_id") if path == PATHS[1] else ("file", "model")
        content = SPEECH.read_bytes()
        return self.client.post(path, data={model: "whisper-1"}, files={audio: ("a.mp3", content)}, headers=headers)

    def keys_in(self, bucket: str) -> list[str]:
        found = boto3.client("s3").list_objects_v2(Bucket=bucket).get("Contents", [])
        return [item["Key"] for item in found]


@pytest.fixture(scope="module")
def aws() -> Iterator[None]:
    """For all tests, since a session's first clients take long to make."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"DEFAULT_REGION": REGION, "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s"}.items():
            patch.setenv(f"AWS_{name}", value)
        with mock_aws():
            yield


@pytest.fixture
def cloud(aws: None, tmp_path: Path) -> Iterator[Cloud]:
    loop = asyncio.new_event_loop()
    with bucket(boto3.client("s3"), "staging"), Inference() as upstream:
        create_table(boto3.client("dynamodb"), "voxgate")
        settings = Settings(table="voxgate", staging_bucket="staging", spool_dir=tmp_path)
        store = build_store(settings)
        account = loop.run_until_complete(store.create_account("acme", limits=RateLimits(requests_per_minute=60)))
        opening = Entry(account.id, EntryKind.TOP_UP, 1_000_000, time.time(), "opening")
        loop.run_until_complete(store.post(opening))
        secret = keys.generate()
        key = Key(id="key_1", account_id=account.id, created=int(time.time()))
        loop.run_until_complete(store.create_key(key, keys.digest(secret)))
        gateway = build_gateway(settings, store, {"VOXGATE_INFERENCE_URL": upstream.url})
        handler = build_handler(build_application(gateway), loop)
        headers = {"authorization": f"Bearer {secret}"}
        with httpx.Client(base_url="https://api", headers=headers, transport=ApiGateway(handler)) as client:
            yield Cloud(client, upstream, account.id, loop)
        loop.run_until_complete(gateway.close())
        boto3.client("dynamodb").delete_table(TableName="voxgate")
    loop.close()


@pytest.mark.parametrize("path", PATHS)
def test_each_contract_is_metered(cloud: Cloud, path: str) -> None:
    answer = cloud.transcribe(path)
    assert answer.status_code == 200
    assert answer.headers["x-voxgate-cost"] == "0.00031"
    assert answer.headers["x-voxgate-balance"] == "0.99969"
    assert answer.headers["x-ratelimit-limit-requests"] == "60"
    balance = cloud.client.get("/v1/balance").json()
    assert (balance["balance_microdollars"], balance["held_microdollars"]) == (1_000_000 - COST, 0)
    used = cloud.client.get("/v1/usage").json()["total"]
    assert (used["requests"], used["errors"], used["seconds"], used["cost_microdollars"]) == (1, 0, 3.1, COST)


def test_a_large_answer_is_had_again_from_the_bucket(cloud: Cloud) -> None:
    cloud.upstream.text = "long " * 100_000
    key = {"Idempotency-Key": "one"}
    first, again = cloud.transcribe(**key), cloud.transcribe(**key)
    assert len(first.content) > 400_000
    assert again.content == first.content
    assert again.headers["idempotency-replayed"] == "true"
    assert again.headers["x-voxgate-cost"] == "0.00"
    assert cloud.upstream.served == 1
    (staged,) = cloud.keys_in("staging")
    assert staged.startswith(f"results/{cloud.account}/")
    head = boto3.client("s3").head_object(Bucket="staging", Key=staged)
    assert head["ServerSideEncryption"] in ("AES256", "aws:kms")


def test_a_failure_costs_nothing_and_holds_nothing(cloud: Cloud) -> None:
    with cloud.upstream.failing():
        assert cloud.transcribe().status_code == 502
    balance = cloud.client.get("/v1/balance").json()
    assert (balance["balance_microdollars"], balance["held_microdollars"]) == (1_000_000, 0)


def test_the_command_line_works_on_the_table(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    cloud.transcribe()
    for arguments in (["accounts", "credit", "acme", "1.00"], ["sweep"], ["audit"], ["usage", "acme"]):
        with pytest.raises(SystemExit) as done:
            main([*arguments, "--table", "voxgate"])
        assert done.value.code == 0
    said = capsys.readouterr().out
    assert "$1.99969 now" in said
    assert "All 1 balances" in said
    assert "whisper-1" in said


def test_the_command_line_takes_a_region_and_a_profile(
    cloud: Cloud, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    profiles = tmp_path / "config"
    profiles.write_text(
        "[profile ops]\nregion = eu-central-1\naws_access_key_id = k\naws_secret_access_key = s\n", encoding="utf-8"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(profiles))
    for options, status in (
        (["--region", "eu-central-1"], 0),
        (["--profile", "ops"], 0),
        (["--region", "us-west-2"], "ResourceNotFoundException"),
        (["--profile", "nobody"], "nobody"),
    ):
        with pytest.raises(SystemExit) as done:
            main(["accounts", "list", "--table", "voxgate", *options])
        assert done.value.code == status or str(status) in str(done.value.code)
    assert "acme" in capsys.readouterr().out


def test_the_scheduled_sweep_counts_what_it_gave_back(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOXGATE_TABLE", "voxgate")
    from sweep.handler import handler

    assert handler({}, None) == {"holds": 0, "amount": 0, "slots": 0}
