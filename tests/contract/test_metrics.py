"""What a request leaves behind in the log for the dashboard, from a real gateway."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import DATA
from fakes.api_gateway import ApiGateway
from fakes.inference import Inference
from voxgate.accounts import Entry, EntryKind, Key, keys
from voxgate.accounts.sqlite import SqliteStore
from voxgate.hosts.gateway import build_application
from voxgate.hosts.http import Application, Request
from voxgate.hosts.lambda_rest import build_handler
from voxgate.settings import Settings
from voxgate.wiring import build_gateway

CATALOG = """
[providers.embedded]
kind = "inference"
base_url = "env:VOXGATE_INFERENCE_URL"

[models.whisper-1]
deployments = [
  { provider = "embedded", upstream_model = "default", price_per_minute = "0.006", upstream_price_per_minute = "0.003" }
]
"""


@dataclass(frozen=True)
class Place:
    client: httpx.Client
    upstream: Inference
    application: Application
    loop: asyncio.AbstractEventLoop


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    loop = asyncio.new_event_loop()
    with Inference() as upstream:
        store = SqliteStore(tmp_path / "voxgate.sqlite")
        secret = keys.generate()

        async def furnish() -> None:
            account = await store.create_account("acme")
            await store.post(Entry(account.id, EntryKind.TOP_UP, 1_000_000, time.time(), "opening"))
            await store.create_key(Key(id="key_1", account_id=account.id, created=0), keys.digest(secret))

        loop.run_until_complete(furnish())
        catalog = tmp_path / "catalog.toml"
        catalog.write_text(CATALOG, encoding="utf-8")
        settings = Settings(catalog=str(catalog), data_dir=tmp_path, spool_dir=tmp_path, environment="dev")
        gateway = build_gateway(settings, store, {"VOXGATE_INFERENCE_URL": upstream.url})
        application = build_application(gateway)
        transport = ApiGateway(build_handler(application, loop, gateway.metrics))
        headers = {"authorization": f"Bearer {secret}"}
        with httpx.Client(base_url="https://api", headers=headers, transport=transport) as client:
            yield Place(client, upstream, application, loop)
        loop.run_until_complete(gateway.close())
    loop.close()


def ask(client: httpx.Client) -> httpx.Response:
    files = {"file": ("a.mp3", (DATA / "b-slt.mp3").read_bytes())}
    return client.post("/audio/transcriptions", data={"model": "whisper-1"}, files=files)


def written(capsys: pytest.CaptureFixture[str]) -> dict[tuple[str, str], list[float]]:
    """By the metric's name and the value of its second dimension."""
    found: dict[tuple[str, str], list[float]] = {}
    for line in capsys.readouterr().out.splitlines():
        told: dict[str, Any] = json.loads(line)
        if "_aws" in told:
            (directive,) = told["_aws"]["CloudWatchMetrics"]
            own = told[directive["Dimensions"][-1][-1]] if len(directive["Dimensions"]) > 1 else ""
            found |= {(metric["Name"], own): told[metric["Name"]] for metric in directive["Metrics"]}
    return found


def test_a_request_is_counted_timed_and_billed(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(place.client).status_code == 200
    found = written(capsys)
    assert found["Requests", "router"] == [1]
    assert found["AudioSeconds", "embedded"] == [3.1]
    assert found["RevenueMicrodollars", "embedded"] == [310]
    assert found["CostMicrodollars", "embedded"] == [155]
    (latency,) = found["Latency", ""]
    stages = {stage: sum(values) for (name, stage), values in found.items() if name == "StageLatency"}
    assert stages.keys() == {"receive", "understand", "hold", "attempt", "settle"}
    assert 0 < sum(stages.values()) <= latency
    assert not any(name == "Errors" for name, _ in found)


def test_a_failure_is_counted_by_its_code_and_by_who_failed(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    with place.upstream.failing():
        assert ask(place.client).status_code == 502
    place.client.post("/audio/transcriptions", headers={"authorization": "Bearer nobody"})
    found = written(capsys)
    assert found["Errors", "provider_unavailable"] == [1]
    assert found["ProviderUnavailable", ""] == [1]
    assert found["ProviderFailures", "embedded"] == [1, 1]
    assert found["Errors", "unauthenticated"] == [1]
    assert ("AudioSeconds", "embedded") not in found


def test_a_stream_that_is_cut_is_billed_as_far_as_it_was_told(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.upstream.pause = 1.0
    form = {"model": "whisper-1", "stream": "true"}
    files = {"file": ("a.mp3", (DATA / "b-slt.mp3").read_bytes())}
    asked = place.client.build_request("POST", "/v1/audio/transcriptions", data=form, files=files)

    async def body() -> AsyncIterator[bytes]:
        yield asked.read()

    async def cut() -> None:
        request = Request("POST", asked.url.path, dict(asked.headers), body(), streams=True)
        parts = (await place.application.handle(request)).parts
        assert parts is not None
        async for _ in parts:
            break
        await parts.aclose()

    place.loop.run_until_complete(cut())
    place.client.get("/health")  # at the end of a request the function writes them
    found = written(capsys)
    assert found["AudioSeconds", "embedded"] == [0.1]
    assert found["RevenueMicrodollars", "embedded"] == [10]
    assert found["CostMicrodollars", "embedded"] == [5]
