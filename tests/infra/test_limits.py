"""The limits of Lambda's events and answers, on the path that an upload takes."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import edge_function as edge
from customers import OPENAI, Customer, Office, wav
from fakes.api_gateway import ApiGateway, Context
from fakes.inference import Inference
from make_events import BOUNDARY, event, form
from voxgate.accounts.sqlite import SqliteStore
from voxgate.hosts.gateway import build_application
from voxgate.hosts.http import Application, Request, Response
from voxgate.hosts.lambda_rest import Handler, build_handler
from voxgate.settings import Settings
from voxgate.wiring import build_gateway

MIB = 1024 * 1024
# https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html: 6 MB, as Lambda says it when it refuses.
LARGEST_EVENT = 6_291_556
HEADERS = 10_240  # API Gateway's limit for all of them


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture
def handler(tmp_path: Path, loop: asyncio.AbstractEventLoop) -> Iterator[Handler]:
    with Inference() as upstream:
        gateway = build_gateway(
            Settings(data_dir=tmp_path, spool_dir=tmp_path / "spool"),
            SqliteStore(tmp_path / "voxgate.sqlite"),
            {"VOXGATE_INFERENCE_URL": upstream.url},
        )
        yield build_handler(build_application(gateway), loop)
        loop.run_until_complete(gateway.close())


@pytest.fixture
def customer(tmp_path: Path) -> Customer:
    return Office(tmp_path).open(credit=10**9)


def upload(size: int) -> bytes:
    """A form of exactly `size` bytes, most of it one recording."""
    overhead = len(form({"model": "whisper-1"}, ("a.wav", b"")))
    empty = len(wav(0))
    recording = wav((size - overhead - empty) / 8000, rate=8000)
    body = form({"model": "whisper-1"}, ("a.wav", recording))
    assert len(body) == size
    return body


def route(body: bytes, *, ingress: str = "the-ingress") -> edge.Outcome:
    headers = {"content-length": str(len(body)), "content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    return edge.run([edge.event(OPENAI, headers=headers)], edge.code(ingress=ingress))[0]


def test_an_upload_of_4_mib_goes_to_lambda_fits_its_event_and_is_transcribed(
    handler: Handler, customer: Customer
) -> None:
    body = upload(4 * MIB)
    assert route(body) == edge.Outcome(origin=None, answer=None)
    invocation = event(OPENAI, body, key=f"Bearer {customer.key}")
    assert len(json.dumps(invocation)) + 2 * HEADERS < LARGEST_EVENT, "with the longest headers, given twice"
    answer = handler(invocation, Context())
    assert answer["statusCode"] == 200, answer["body"]
    assert json.loads(answer["body"])["text"].startswith("heard")


def test_an_upload_of_4_4_mib_would_still_pass_api_gateway_and_goes_to_the_ingress() -> None:
    body = upload(int(4.4 * MIB))
    assert route(body).origin == "the-ingress"
    refused = route(body, ingress="")
    assert (refused.status, refused.error["param"]) == (413, "file")


def test_what_the_cut_lets_through_fits_however_its_base64_ends() -> None:
    for size in (edge.CUT - 2, edge.CUT - 1, edge.CUT):
        assert (size + 2) // 3 * 4 + 2 * HEADERS + 4096 < LARGEST_EVENT


def verbose(words: int) -> bytes:
    """A long answer: `verbose_json` with the times of each word."""
    listed = [{"word": f"w{number % 997}", "start": number / 3, "end": number / 3 + 0.3} for number in range(words)]
    return json.dumps({"task": "transcribe", "text": "…", "words": listed}, ensure_ascii=False).encode()


LONG = verbose(120_000)


def noise(size: int) -> bytes:
    """Text that gzip can make little of."""
    import random

    return random.Random(7).randbytes(size // 2).hex().encode()


Answer = Callable[..., tuple[dict[str, Any], httpx.Response]]


@pytest.fixture
def answer(loop: asyncio.AbstractEventLoop) -> Answer:
    """What Lambda would give back for a body of ours, and what the client makes of it."""

    def ask(body: bytes, accept_encoding: str) -> tuple[dict[str, Any], httpx.Response]:
        async def give(request: Request) -> Response:
            return Response(200, {"content-type": "application/json", "x-voxgate-provider": "self"}, body)

        given: list[dict[str, Any]] = []
        handler = build_handler(Application({"/": {}, "/x": {"GET": give}}), loop)

        def invoke(event: dict[str, Any], context: Any) -> dict[str, Any]:
            given.append(handler(event, context))
            return given[0]

        with httpx.Client(transport=ApiGateway(invoke), base_url="https://api.example.com") as client:
            response = client.get("/x", headers={"accept-encoding": accept_encoding})
        return given[0], response

    return ask


def size_of(given: dict[str, Any]) -> int:
    """As Lambda's own Python client writes it."""
    return len(json.dumps(given, ensure_ascii=False).encode())


@pytest.mark.parametrize("accept", ["gzip, deflate", "br;q=1.0, GZIP;q=0.5", "*", "x-gzip"])
def test_an_answer_over_6_mb_is_compressed_for_who_takes_it(accept: str, answer: Answer) -> None:
    assert len(LONG) > LARGEST_EVENT
    given, response = answer(LONG, accept)
    assert size_of(given) < LARGEST_EVENT
    assert given["isBase64Encoded"] is True
    assert response.status_code == 200
    assert response.headers["content-encoding"] == "gzip"
    assert response.headers["content-type"] == "application/json"
    assert response.content == LONG


@pytest.mark.parametrize("accept", ["", "identity", "br", "gzip;q=0", "gzip; q=0.000", "*;q=0", "*, gzip;q=0"])
def test_who_takes_nothing_compressed_is_told_what_to_do(accept: str, answer: Answer) -> None:
    given, response = answer(LONG, accept)
    assert size_of(given) < 10_000
    assert response.status_code == 413
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_input")
    assert "Accept-Encoding: gzip" in error["message"]
    assert "Idempotency-Key" in error["message"]
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-voxgate-provider"] == "self"
    assert "x-request-id" in response.headers


def test_an_answer_that_compression_does_not_help_is_refused_too(answer: Answer) -> None:
    assert len(gzip.compress(noise(10 * MIB))) > LARGEST_EVENT * 3 / 4
    _, response = answer(noise(10 * MIB), "gzip")
    assert response.status_code == 413


def test_what_counts_is_the_size_as_json_within_json(answer: Answer) -> None:
    quotes = b'"' * (4 * MIB)  # each becomes two
    given, response = answer(quotes, "gzip")
    assert given["isBase64Encoded"] is True
    assert response.content == quotes


@pytest.mark.parametrize("size", [1000, 5 * MIB])
def test_an_answer_that_fits_is_sent_as_it_is(size: int, answer: Answer) -> None:
    given, response = answer(b"x" * size, "gzip")
    assert given["isBase64Encoded"] is False
    assert size_of(given) < LARGEST_EVENT
    assert "content-encoding" not in response.headers
    assert response.content == b"x" * size
