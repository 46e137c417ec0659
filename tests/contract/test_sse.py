"""A transcript as server-sent events: what clients read, what it costs, and what is left when they hang up."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import io
import itertools
import json
import math
import os
import random
import socket
import struct
import subprocess
import threading
import time
import wave
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import av
import httpx
import openai
import psutil
import pytest
import uvicorn
from openai.types.audio import TranscriptionTextDeltaEvent, TranscriptionTextDoneEvent, TranscriptionTextSegmentEvent

from conftest import DATA, Server, start_server, stop_server
from customers import (
    COST,
    HOSTS,
    LITELLM,
    OPENAI,
    ROUTER,
    SPEECH,
    STATS,
    WINDOWS,
    Customer,
    Host,
    Office,
    envelope,
    microdollars,
    send,
)
from fakes.api_gateway import ApiGateway, Context, Front
from fakes.upstreams import (
    CUT,
    GOOD,
    KEY,
    SEGMENTS,
    TEXT,
    DeepgramUpstream,
    InferenceUpstream,
    MistralUpstream,
    OpenAIUpstream,
    Script,
    Upstream,
    delta,
    done,
    sse,
)
from voxgate.accounts import RateLimits, UsageRecord
from voxgate.accounts.sqlite import SqliteStore
from voxgate.hosts import frames
from voxgate.hosts import http as http_host
from voxgate.hosts.asgi import AsgiApp
from voxgate.hosts.gateway import build_application
from voxgate.hosts.lambda_rest import build_handler
from voxgate.hosts.serve import _Protocol, bind, url
from voxgate.settings import Settings
from voxgate.wiring import Gateway, build_gateway

CLIENTS = Path(__file__).parent / "clients"
TRANSLATIONS = "/v1/audio/translations"
PAUSES = DATA / "long-slt.flac"  # three sentences
DURATION = 3.03175
CREDIT = 1_000_000
CACHED = {"x-voxgate-cache": "read-write"}
each_host = pytest.mark.parametrize("host", HOSTS)

# --- The gateway, its models and its providers ------------------------------------------------------

PROVIDERS: dict[str, type[Upstream]] = {
    "a": OpenAIUpstream,
    "b": OpenAIUpstream,
    "mistral": MistralUpstream,
    "deepgram": DeepgramUpstream,
    "inference": InferenceUpstream,
}
GPT = 'a streaming = true, logprobs = true, response_format = "json"'
# Deployments: a provider, and after a blank what else its entry says.
MODELS: dict[str, tuple[str, ...]] = {
    "gpt": (GPT,),
    "whisper": ("a words = true",),  # which does not stream
    "diarize": ('a response_format = "diarized_json", diarization = true, streaming = true',),
    "voxtral": ("mistral streaming = true, diarization = true, keywords = true",),
    "nova": ("deepgram diarization = true",),
    "ours": ("inference",),
    "real": ("real",),
}
SOURCES = ["gpt", "whisper", "voxtral", "nova", "ours"]
DIARIZING = ["diarize", "voxtral", "nova"]
_numbers = itertools.count()


def pair(*offers: str) -> str:
    """A model of a test's own, at the first provider unless that fails."""
    name = f"pair-{next(_numbers)}"
    MODELS[name] = offers or (GPT, GPT.replace("a", "b", 1))
    return name


@dataclass(frozen=True)
class Place:
    """Both hosts, in this process, over the same accounts and providers; `real` is a `voxgate inference`."""

    urls: dict[Host, str]
    gateway: Gateway
    loop: asyncio.AbstractEventLoop
    office: Office
    rich: Customer
    real: Server
    upstreams: dict[str, Upstream] = field(repr=False)

    def stream(self, model: str, host: Host = "asgi", *, customer: Customer | None = None, **form: Any) -> Wire:
        return Wire(self.urls[host], customer or self.rich, model=model, **form)

    def told(self, model: str, host: Host = "asgi", **form: Any) -> list[dict[str, Any]]:
        """All events of a stream that goes well."""
        with self.stream(model, host, **form) as wire:
            assert wire.status == 200, wire.whole()
            return list(wire.events())

    def whole(
        self, model: str, host: Host = "asgi", path: str = OPENAI, headers: dict[str, str] | None = None, **form: Any
    ) -> httpx.Response:
        """The answer that is no stream, unless the form asks for one."""
        customer = form.pop("customer", self.rich)
        who = customer.headers | (headers or {})
        with httpx.Client(base_url=self.urls[host], headers=who, timeout=30) as client:
            return send(client, path, model=model, **form)

    def records(self, customer: Customer) -> list[UsageRecord]:
        async def work() -> list[UsageRecord]:
            store = SqliteStore(self.office.data_dir / "voxgate.sqlite")
            try:
                return await store.records(customer.account, 0.0, time.time() + 60)
            finally:
                await store.close()

        return asyncio.run(work())

    def settled(self, customer: Customer, within: float = 5.0) -> int:
        """What was spent, as soon as nothing is held."""
        until(lambda: not self.office.money(customer.account)[1], within)
        return CREDIT - self.office.money(customer.account)[0]

    def left(self) -> Left:
        return Left(
            tasks=len(asyncio.all_tasks(self.loop)),
            threads=threading.active_count(),
            files=len([path for path in self.gateway.spool_dir.rglob("*") if path.is_file()]),
            sockets=len(self.sockets()),
        )

    def sockets(self) -> list[Any]:
        """The server's ends of connections."""
        port = urlsplit(self.urls["asgi"]).port
        every = psutil.Process().net_connections("tcp")
        return [each for each in every if each.laddr.port == port and each.status not in ("LISTEN", "TIME_WAIT")]


@dataclass(frozen=True)
class Left:
    tasks: int
    threads: int
    files: int
    sockets: int


def until(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def cost(seconds: float, price: int = 6000) -> int:
    return math.ceil(price * math.ceil(round(seconds * 10, 4)) / 600)


def catalogue(providers: dict[str, Upstream], real: str) -> str:
    lines = ["[providers.real]", 'kind = "inference"', f'base_url = "{real}"']
    for name, upstream in providers.items():
        lines += [f"[providers.{name}]", f'kind = "{upstream.kind}"', f'flavor = "{upstream.flavor}"']
        lines += [f'base_url = "{upstream.base_url}"', 'api_key = "env:UPSTREAM_KEY"']
    for model, offers in MODELS.items():
        lines += [f'[models."{model}"]', "deployments = ["]
        for price, offer in zip(("0.006", "0.6"), offers, strict=False):
            name, _, more = offer.partition(" ")
            own = "default" if name == "real" else model
            what = f'provider = "{name}", upstream_model = "{own}", price_per_minute = "{price}"'
            lines.append(f"  {{ {what}{more and f', {more}'} }},")
        lines.append("]")
    return "\n".join(lines)


@contextlib.contextmanager
def on_socket(gateway: Gateway) -> Iterator[tuple[str, asyncio.AbstractEventLoop]]:
    """The ASGI host in a thread. What the kernel buffers of its answers is little, so that it is soon told that
    a reader is slow."""
    started, loops = threading.Event(), list[asyncio.AbstractEventLoop]()

    async def start() -> None:
        await gateway.start()
        loops.append(asyncio.get_running_loop())
        started.set()

    slowest = gateway.settings.slowest_upload
    app = AsgiApp(build_application(gateway), start=start, stop=gateway.close, slowest_upload=slowest)
    config = uvicorn.Config(
        app,
        http=_Protocol,
        loop="uvloop",
        lifespan="on",
        ws="none",
        log_config=None,
        access_log=False,
        timeout_keep_alive=620,
        timeout_graceful_shutdown=5,
    )
    listening = bind("127.0.0.1", 0)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    assert started.wait(30)
    yield url(listening), loops[0]
    server.should_exit = True
    thread.join(30)
    listening.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("sse")
    with contextlib.ExitStack() as stack:
        upstreams = {name: stack.enter_context(kind()) for name, kind in PROVIDERS.items()}
        process, real = start_server(directory / "real", "inference", VOXGATE_ENGINE_WORKERS="1")
        stack.callback(stop_server, process)
        catalog = directory / "catalog.toml"
        catalog.write_text(catalogue(upstreams, real.url), encoding="utf-8")

        def gateway(name: str) -> Gateway:
            settings = Settings(catalog=str(catalog), data_dir=directory, spool_dir=directory / name)
            return build_gateway(settings, SqliteStore(directory / "voxgate.sqlite"), {"UPSTREAM_KEY": KEY})

        loop = asyncio.new_event_loop()
        function = gateway("function")
        front = stack.enter_context(Front(build_handler(build_application(function), loop)))
        served = gateway("served")
        address, served_on = stack.enter_context(on_socket(served))
        office = Office(directory)
        rich = office.open(credit=10**9)
        urls: dict[Host, str] = {"asgi": address, "lambda": front.url}
        yield Place(urls, served, served_on, office, rich, real, upstreams)
        loop.run_until_complete(function.close())
        loop.close()


@pytest.fixture(autouse=True)
def as_they_are(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "place" in request.fixturenames:
        for upstream in request.getfixturevalue("place").upstreams.values():
            upstream.forget()


# --- The wire ---------------------------------------------------------------------------------------


class EventStream:
    """Reads https://html.spec.whatwg.org/multipage/server-sent-events.html as narrowly as we write it: one line
    of `data: ` and one blank one for each event, and comments of one line."""

    def __init__(self) -> None:
        self.rest = b""
        self.comments: list[str] = []

    def feed(self, content: bytes) -> list[dict[str, Any]]:
        *blocks, self.rest = (self.rest + content).split(b"\n\n")
        events = []
        for block in blocks:
            line = block.decode("utf-8", "strict")
            assert "\n" not in line
            assert "\r" not in line
            if line.startswith(":"):
                self.comments.append(line[1:])
                continue
            assert line.startswith("data: "), line
            body = json.loads(line.removeprefix("data: "), parse_constant=_no_number)
            assert isinstance(body, dict)
            events.append(body)
        return events

    def end(self) -> None:
        assert self.rest == b"", "the last event is not whole"


def _no_number(text: str) -> float:
    raise AssertionError(text)


class Broken(Exception):
    """The connection ended before the answer did."""


class Wire:
    """One streamed request on a socket of its own, whose answer is read chunk by chunk (RFC 9112, 7.1).
    `receive` bounds what the kernel takes of it before anybody reads."""

    def __init__(
        self,
        base_url: str,
        customer: Customer,
        *,
        path: str = OPENAI,
        audio: bytes | None = None,
        headers: dict[str, str] | None = None,
        receive: int = 0,
        **form: Any,
    ) -> None:
        form = {"stream": "true"} | form
        content = SPEECH.read_bytes() if audio is None else audio
        who = customer.headers | {"connection": "close"} | (headers or {})
        request = httpx.Request(
            "POST", base_url + path, headers=who, data=form, files={"file": ("speech.mp3", content)}
        )
        address = urlsplit(base_url)
        self.socket = socket.socket()
        self.socket.settimeout(30)
        if receive:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        self.socket.connect((address.hostname, address.port))
        lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in request.headers.items()), "", ""]
        self.socket.sendall("\r\n".join(lines).encode() + request.read())
        self.parser = EventStream()
        self._file = self.socket.makefile("rb")
        self._head: tuple[int, dict[str, str]] | None = None

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()

    def hang_up(self, *, reset: bool = False) -> None:
        if reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._file.close()
        self.socket.close()

    @property
    def status(self) -> int:
        return self._read_head()[0]

    @property
    def headers(self) -> dict[str, str]:
        return self._read_head()[1]

    def _read_head(self) -> tuple[int, dict[str, str]]:
        if self._head is None:
            first = self._line().decode()
            assert first.startswith("HTTP/1.1 "), first
            headers: dict[str, str] = {}
            while line := self._line().decode():
                name, _, value = line.partition(": ")
                assert name.lower() not in headers
                headers[name.lower()] = value
            self._head = int(first.split(" ")[1]), headers
        return self._head

    def _line(self) -> bytes:
        line = self._file.readline()
        if not line.endswith(b"\r\n"):
            raise Broken
        return line[:-2]

    def chunks(self) -> Iterator[bytes]:
        headers = self.headers
        if "content-length" in headers:
            yield self._exactly(int(headers["content-length"]))
            return
        assert headers["transfer-encoding"] == "chunked"
        while size := int(self._line(), 16):
            yield self._exactly(size)
            assert self._line() == b""
        assert self._line() == b""

    def _exactly(self, size: int) -> bytes:
        content = self._file.read(size)
        if len(content) < size:
            raise Broken
        return content

    def whole(self) -> bytes:
        return b"".join(self.chunks())

    def events(self) -> Iterator[dict[str, Any]]:
        """Each as soon as it is there; the stream has to end with a whole one."""
        for chunk in self.chunks():
            yield from self.parser.feed(chunk)
        self.parser.end()


def parsed(content: bytes) -> list[dict[str, Any]]:
    parser = EventStream()
    events = parser.feed(content)
    parser.end()
    return events


def deltas(events: list[dict[str, Any]]) -> list[str]:
    return [event["delta"] for event in events if event["type"] == "transcript.text.delta"]


def text_of(events: list[dict[str, Any]]) -> str:
    """The text that a well-formed stream of deltas tells."""
    *before, end = events
    assert {event["type"] for event in before} <= {"transcript.text.delta"}
    assert all(deltas(before)), "an empty delta"
    assert end["type"] == "transcript.text.done"
    assert "".join(deltas(before)) == end["text"]
    return str(end["text"])


# --- What clients read ------------------------------------------------------------------------------


@each_host
@pytest.mark.parametrize("model", SOURCES)
def test_the_bytes_are_events_and_nothing_on_the_way_keeps_them(place: Place, model: str, host: Host) -> None:
    with place.stream(model, host) as wire:
        assert wire.status == 200
        assert wire.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert wire.headers["cache-control"] == "no-cache"
        assert wire.headers["x-request-id"].startswith("req_")
        assert [window for window in WINDOWS if window not in wire.headers] == []
        if host == "asgi":  # what it cost is not known when it begins
            assert "content-length" not in wire.headers
            assert wire.headers["transfer-encoding"] == "chunked"
            assert wire.headers["x-accel-buffering"] == "no"
        assert text_of(list(wire.events())) == TEXT
        assert wire.parser.comments == []


@each_host
@pytest.mark.parametrize("response_format", ["json", "text"])
@pytest.mark.parametrize("path", [OPENAI, LITELLM], ids=["openai", "litellm"])
@pytest.mark.parametrize("model", SOURCES)
def test_the_deltas_joined_are_the_text_of_the_whole_answer(
    place: Place, model: str, path: str, response_format: str, host: Host
) -> None:
    events = place.told(model, host, path=path, response_format=response_format)
    assert text_of(events) == place.whole(model, host, path).json()["text"] == TEXT


def test_a_provider_that_streams_is_asked_to_and_told_on_word_by_word(place: Place) -> None:
    assert deltas(place.told("gpt")) == ["Please", " send", " the", " letter.", " Thanks,", " Zoë!"]
    sent = place.upstreams["a"].asked("gpt")[-1]
    assert ("stream", "true") in sent.form
    place.whole("gpt")
    assert "stream" not in dict(place.upstreams["a"].asked("gpt")[-1].form)
    place.told("whisper")
    assert "stream" not in dict(place.upstreams["a"].asked("whisper")[-1].form)


@pytest.mark.parametrize("model", ["gpt", "voxtral", "ours"])
def test_each_delta_goes_out_when_it_comes(place: Place, model: str) -> None:
    upstream = place.upstreams[MODELS[model][0].partition(" ")[0]]
    first = {"type": "transcription.text.delta", "text": "one"} if model == "voxtral" else delta("one")
    last = {"type": "transcription.done"} if model == "voxtral" else {"type": "transcript.text.done"}
    upstream.will(sse(first, 2.0, last | {"text": "one"}), model=model)
    begun = time.monotonic()
    with place.stream(model) as wire:
        events = wire.events()
        assert next(events)["delta"] == "one"
        assert time.monotonic() - begun < 1.9
        assert [event["type"] for event in events] == ["transcript.text.done"]
        assert time.monotonic() - begun >= 2.0


@pytest.mark.parametrize("path", [OPENAI, LITELLM], ids=["openai", "litellm"])
@pytest.mark.parametrize("model", SOURCES)
def test_the_end_says_what_was_used_as_the_whole_answer_does(place: Place, model: str, path: str) -> None:
    end = place.told(model, path=path)[-1]
    whole = place.whole(model, path=path).json()["usage"]
    assert end["usage"] == whole
    assert whole["type"] == ("tokens" if model in ("gpt", "voxtral") else "duration")


@each_host
@pytest.mark.parametrize("model", SOURCES)
def test_litellm_counts_its_chunks(place: Place, model: str, host: Host) -> None:
    events = place.told(model, host, path=LITELLM)
    extra = [event["extra_fields"] for event in events]
    assert [fields["chunk_index"] for fields in extra] == list(range(len(events)))
    assert {fields["request_type"] for fields in extra} == {"transcription_stream"}
    whole = place.whole(model, host, LITELLM).json()["extra_fields"]
    assert extra[-1].keys() == whole.keys()
    same = ("provider", "model_requested", "model_deployment", "cache_debug")
    assert [extra[-1][name] for name in same] == [whole[name] for name in same]


@each_host
def test_logprobs_come_at_the_end_where_they_are_asked_for(place: Place, host: Host) -> None:
    events = place.told("gpt", host, include="logprobs")
    assert text_of(events) == TEXT
    assert events[-1]["logprobs"] == [{"token": "Zo", "logprob": -0.25, "bytes": [90, 111]}]
    assert "logprobs" not in place.told("gpt", host)[-1]


def logprobs(*tokens: str) -> list[dict[str, Any]]:
    return [{"token": token, "logprob": -0.5, "bytes": list(token.encode())} for token in tokens]


PROBABLE = [delta(text, logprobs=logprobs(text)) for text in ("Tell", " ", "me ", "it", " ")]


@each_host
@pytest.mark.parametrize("end", ["whole", "silent"])
def test_logprobs_come_with_the_deltas_that_they_are_of(place: Place, iterate: SdkCall, host: Host, end: str) -> None:
    whole = logprobs("Tell", " ", "me ", "it", " ")
    script = sse(*PROBABLE, done("Tell me it", **({"logprobs": whole} if end == "whole" else {})))
    place.upstreams["a"].will(script, script, model="gpt")
    heard = iterate("gpt", host, include=["logprobs"])
    assert (heard.error, text_of(heard.events)) == (None, "Tell me it")
    # White space that is kept back until more comes keeps its own.
    assert [event["logprobs"] for event in heard.events[:-1]] == [
        logprobs("Tell"),
        logprobs(" ", "me "),
        logprobs("it"),
    ]
    assert heard.events[-1]["logprobs"] == whole
    assert not any("logprobs" in event for event in place.told("gpt", host))


@pytest.mark.parametrize("model", DIARIZING)
def test_who_speaks_is_told_in_segments_where_that_is_asked_for(place: Place, model: str) -> None:
    *before, end = place.told(model, response_format="diarized_json")
    whole = place.whole(model, response_format="diarized_json").json()
    segments = [event for event in before if event["type"] == "transcript.text.segment"]
    assert [segment["speaker"] for segment in segments] == [segment["speaker"] for segment in whole["segments"]]
    for segment, same in zip(segments, whole["segments"], strict=True):
        assert segment.keys() == {"type", "id", "start", "end", "text", "speaker"}
        times = ("start", "end")
        assert [segment[name] for name in times] == [same[name] for name in times]
        assert segment["text"].strip() == same["text"].strip()
    assert len({segment["id"] for segment in segments}) == len(SEGMENTS)
    assert end["text"] == whole["text"] == TEXT
    if told := deltas(before):
        assert "".join(told) == TEXT


@pytest.mark.parametrize("path", [OPENAI, LITELLM], ids=["openai", "litellm"])
@pytest.mark.parametrize("model", DIARIZING)
def test_without_diarized_json_there_are_deltas_alone(place: Place, model: str, path: str) -> None:
    assert text_of(place.told(model, path=path)) == TEXT


def test_who_names_speakers_gets_no_segments_for_it(place: Place) -> None:
    assert text_of(place.told("voxtral", known_speaker_names="Zoë")) == TEXT


REFUSED = [(path, shape) for path in (OPENAI, LITELLM) for shape in ("verbose_json", "srt", "vtt")]
REFUSED += [(path, "json") for path in (ROUTER, STATS, TRANSLATIONS)]


@each_host
@pytest.mark.parametrize(("path", "shape"), REFUSED)
def test_what_cannot_be_streamed_is_refused_by_the_name_of_the_field(
    place: Place, path: str, shape: str, host: Host
) -> None:
    form: dict[str, Any] = {} if path == STATS else {"response_format": shape}
    customer = place.office.open(credit=CREDIT)
    refused = place.whole("gpt", host, path, customer=customer, stream="true", **form)
    assert refused.status_code == 400
    error = envelope(refused)
    assert (error["code"], error["param"]) == ("invalid_input", "stream")
    assert shape == "json" or shape in error["message"]
    assert place.office.money(customer.account) == (CREDIT, 0)


HEADED = pair()


@each_host
def test_a_stream_says_who_serves_it_and_at_which_attempt(place: Place, host: Host) -> None:
    def served(model: str, **more: Any) -> tuple[str, str]:
        with place.stream(model, host, **more) as wire:
            text_of(list(wire.events()))
            return wire.headers["x-voxgate-provider"], wire.headers["x-voxgate-attempts"]

    assert [served(model) for model in SOURCES] == [(MODELS[model][0].partition(" ")[0], "1") for model in SOURCES]
    place.upstreams["a"].will(Script(status=401), model=HEADED)
    assert served(HEADED) == ("b", "2")
    customer = place.office.open(credit=CREDIT)
    assert [served("ours", customer=customer, headers=CACHED)[1] for _ in range(2)] == ["1", "0"]


@each_host
def test_what_is_ignored_is_said_of_a_stream_too(place: Place, host: Host) -> None:
    with place.stream("gpt", host, beam_size="5") as wire:
        assert wire.headers.get("x-voxgate-ignored-params") == "beam_size"


def test_after_a_stream_its_connection_serves_the_next(place: Place) -> None:
    form = {"model": "gpt", "stream": "true"}
    ends = set()
    with httpx.Client(base_url=place.urls["asgi"], headers=place.rich.headers) as client:
        for _ in range(3):
            with client.stream("POST", OPENAI, data=form, files={"file": SPEECH.read_bytes()}) as response:
                ends.add(response.extensions["network_stream"].get_extra_info("client_addr"))
                assert text_of(parsed(response.read())) == TEXT
    assert len(ends) == 1


@pytest.mark.parametrize("value", ["false", "0", ""])
def test_who_wants_no_stream_gets_none(place: Place, value: str) -> None:
    assert place.whole("gpt", stream=value).headers["content-type"] == "application/json"


# --- SDKs -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Iterated:
    """What an SDK made of a stream, and the error in which it ended."""

    events: list[dict[str, Any]]
    error: dict[str, Any] | None = None


SdkCall = Callable[..., Iterated]
TYPES = (TranscriptionTextDeltaEvent, TranscriptionTextSegmentEvent, TranscriptionTextDoneEvent)


def _error(error: openai.APIError) -> dict[str, Any]:
    known = {"name": type(error).__name__, "status": getattr(error, "status_code", None)}
    return known | {"code": error.code, "message": error.message, "type": error.type, "param": error.param}


@pytest.fixture(params=["sync", "async", "node"])
def iterate(request: pytest.FixtureRequest, place: Place) -> SdkCall:
    """The stream that one of the SDKs asks for."""

    def options(host: Host) -> dict[str, Any]:
        return {"api_key": place.rich.key, "base_url": f"{place.urls[host]}/v1", "max_retries": 0}

    def with_sync(model: str, host: Host, **more: Any) -> Iterated:
        events: list[dict[str, Any]] = []
        with openai.OpenAI(**options(host)) as client:
            try:
                for event in client.audio.transcriptions.create(model=model, file=SPEECH, stream=True, **more):
                    assert isinstance(event, TYPES)
                    events.append(event.to_dict())
            except openai.APIError as error:
                return Iterated(events, _error(error))
        return Iterated(events)

    def with_async(model: str, host: Host, **more: Any) -> Iterated:
        events: list[dict[str, Any]] = []

        async def work() -> Iterated:
            async with openai.AsyncOpenAI(**options(host)) as client:
                try:
                    stream = await client.audio.transcriptions.create(model=model, file=SPEECH, stream=True, **more)
                    async for event in stream:
                        assert isinstance(event, TYPES)
                        events.append(event.to_dict())
                except openai.APIError as error:
                    return Iterated(events, _error(error))
            return Iterated(events)

        return asyncio.run(work())

    def with_node(model: str, host: Host, **more: Any) -> Iterated:
        node = request.getfixturevalue("node")
        finished = subprocess.run(
            [node, str(CLIENTS / "stream.mjs"), str(SPEECH), json.dumps({"model": model} | more)],
            env=os.environ | {"VOXGATE_BASE_URL": place.urls[host], "VOXGATE_API_KEY": place.rich.key},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
        outcome = json.loads(finished.stdout)
        for event in outcome["events"]:
            del event["after"]
        return Iterated(outcome["events"], outcome["end"])

    return {"sync": with_sync, "async": with_async, "node": with_node}[request.param]


# Node takes half a second to start.
ITERATED = [(sdk, model) for sdk in ("sync", "async") for model in SOURCES]
ITERATED += [("node", model) for model in ("gpt", "nova")]


@each_host
@pytest.mark.parametrize(("iterate", "model"), ITERATED, indirect=["iterate"])
def test_the_sdks_iterate_a_stream(place: Place, iterate: SdkCall, model: str, host: Host) -> None:
    heard = iterate(model, host)
    assert heard.error is None
    assert text_of(heard.events) == TEXT
    assert heard.events == place.told(model, host)


@each_host
def test_the_sdks_take_the_segments_of_speakers(iterate: SdkCall, host: Host) -> None:
    heard = iterate("nova", host, response_format="diarized_json")
    assert heard.error is None
    assert [e["speaker"] for e in heard.events if e["type"] == "transcript.text.segment"] == ["0", "1"]


@each_host
def test_the_sdks_raise_what_was_wrong_before_the_stream(place: Place, iterate: SdkCall, host: Host) -> None:
    refused = iterate("gpt", host, temperature=2)
    assert refused.events == []
    assert refused.error is not None
    assert (refused.error["name"], refused.error["status"], refused.error["param"]) == (
        "BadRequestError",
        400,
        "temperature",
    )


FAULTS = {
    "error": sse(delta("one"), {"error": {"message": "private words", "type": "server_error", "code": "x"}}),
    "cut": sse(delta("one"), CUT),
    "no end": sse(delta("one")),
    "only DONE": sse(delta("one"), done=True),
    "no JSON": sse(delta("one"), b"data: {private words\n\n"),
    "no text": sse(delta("one"), {"type": "transcript.text.delta", "delta": 7}),
}
BROKEN = {name: pair(GPT) for name in FAULTS}


RAISED = [(sdk, fault) for sdk in ("sync", "async") for fault in FAULTS]
RAISED += [("node", fault) for fault in ("error", "cut")]


@pytest.mark.parametrize(("iterate", "fault"), RAISED, indirect=["iterate"])
def test_the_sdks_raise_what_goes_wrong_after_the_start(place: Place, iterate: SdkCall, fault: str) -> None:
    model = BROKEN[fault]
    place.upstreams["a"].will(FAULTS[fault], model=model)
    heard = iterate(model, "asgi")
    assert deltas(heard.events) == ["one"]
    assert heard.error is not None
    assert (heard.error["name"], heard.error["code"]) == ("APIError", "provider_unavailable")
    assert "private words" not in heard.error["message"]
    assert len(place.upstreams["a"].asked(model)) == 1


BROKEN |= {f"raw {name}": pair() for name in FAULTS}


@pytest.mark.parametrize("fault", FAULTS)
def test_after_the_first_delta_nobody_else_is_asked_and_nothing_is_charged(place: Place, fault: str) -> None:
    model, customer = BROKEN[f"raw {fault}"], place.office.open(credit=CREDIT)
    place.upstreams["a"].will(FAULTS[fault], model=model)
    first, *rest = place.told(model, customer=customer)
    assert first["delta"] == "one"
    (last,) = rest
    assert last.keys() == {"error"}
    assert last["error"].keys() == {"message", "type", "param", "code"}
    assert (len(place.upstreams["a"].asked(model)), len(place.upstreams["b"].asked(model))) == (1, 0)
    assert place.settled(customer) == 0


BEFORE = {
    "500": Script(status=500),
    "401": Script(status=401),
    "cut": sse(CUT),
    "empty": sse(),
    "only DONE": sse(done=True),
    "comment and cut": sse(b": wait\n\n", CUT),
    "error": sse({"error": {"message": "private words"}}),
    "no JSON": sse(b"data: {\n\n"),
    "unknown and cut": sse({"type": "transcript.text.other", "delta": "x"}, CUT),
    "empty delta and cut": sse(delta(""), CUT),
    "space and cut": sse(delta(" "), CUT),
}
FALLEN = {name: pair() for name in BEFORE}
ALONE = {name: pair(GPT) for name in BEFORE}


@each_host
@pytest.mark.parametrize("fault", BEFORE)
def test_before_the_first_delta_the_next_provider_serves(place: Place, fault: str, host: Host) -> None:
    model = FALLEN[fault]
    place.upstreams["a"].always(BEFORE[fault], model=model)
    assert text_of(place.told(model, host)) == TEXT
    assert len(place.upstreams["b"].asked(model)) == 1


@each_host
@pytest.mark.parametrize("fault", BEFORE)
def test_before_the_first_delta_a_failure_has_its_status(place: Place, fault: str, host: Host) -> None:
    model, customer = ALONE[fault], place.office.open(credit=CREDIT)
    place.upstreams["a"].always(BEFORE[fault], model=model)
    refused = place.whole(model, host, customer=customer, stream="true")
    assert (refused.status_code, envelope(refused)["code"]) == (502, "provider_unavailable")
    assert place.settled(customer) == 0


def test_what_is_wrong_with_the_request_has_its_status(place: Place) -> None:
    place.upstreams["a"].will(Script(status=400), model="gpt")
    refused = place.whole("gpt", stream="true")
    assert (refused.status_code, envelope(refused)["param"]) == (400, "file")
    poor = place.office.open(credit=COST - 1)
    assert place.whole("gpt", stream="true", customer=poor).status_code == 402
    assert place.whole("gpt", stream="true", audio=b"no audio").status_code == 400
    assert place.whole("gpt-9", stream="true").status_code == 404


LAMBDA_CUT = pair()


def test_where_nothing_has_gone_out_a_failure_has_its_status_on_lambda(place: Place) -> None:
    place.upstreams["a"].always(FAULTS["cut"], model=LAMBDA_CUT)
    place.upstreams["b"].always(FAULTS["cut"], model=LAMBDA_CUT)
    refused = place.whole(LAMBDA_CUT, "lambda", stream="true")
    assert (refused.status_code, envelope(refused)["code"]) == (502, "provider_unavailable")


# --- What providers send ----------------------------------------------------------------------------

SPLIT = b"data: " + json.dumps(delta("Zoë"), ensure_ascii=False).encode() + b"\n\n"
CODED = json.dumps(done("Zoë"), indent=1, ensure_ascii=False).encode().replace(b"\n", b"\ndata: ")
WRITTEN = {
    "CRLF": sse(delta("Zoë"), done("Zoë"), end="\r\n"),
    "CR": sse(delta("Zoë"), done("Zoë"), end="\r"),
    "named": sse(delta("Zoë"), done("Zoë"), named=True),
    "DONE": sse(delta("Zoë"), done("Zoë"), done=True),
    "comments": sse(b": hello\n\n", delta("Zoë"), b":\n\n: more\n", done("Zoë")),
    "other fields": sse(b"id: 1\nretry: 5\n", delta("Zoë"), b"nonsense\n\n", done("Zoë")),
    "byte order mark": sse(b"\xef\xbb\xbf", delta("Zoë"), done("Zoë")),
    "several lines": sse(delta("Zoë"), b"data: " + CODED + b"\n\n"),
    "no space": sse(b"data:" + SPLIT[6:], done("Zoë")),
    "byte by byte": sse(*[SPLIT[n : n + 1] for n in range(len(SPLIT))], done("Zoë")),
    "all at once": sse(SPLIT + b"data: " + CODED + b"\n\n"),
    "pauses": sse(delta("Z"), 0.05, delta("o"), 0.05, delta("ë"), done("Zoë")),
    "unknown events": sse({"type": "transcript.text.other"}, delta("Zoë"), {"type": "ping"}, done("Zoë")),
    "another type's case": Script(
        events=sse(delta("Zoë"), done("Zoë")).events, content_type="Text/Event-Stream; charset=UTF-8"
    ),
    "a whole answer": Script(body=json.dumps({"text": "Zoë"}).encode()),
    "white space": sse(delta(" "), delta(" Zoë "), delta(" "), done("Zoë")),
    "the end says more": sse(delta("Z"), done("Zoë")),
    "nothing before the end": sse(done("Zoë")),
}


@pytest.mark.parametrize("model", ["gpt", "ours"])
@pytest.mark.parametrize("how", WRITTEN)
def test_a_provider_may_write_its_events_as_the_standard_allows(place: Place, how: str, model: str) -> None:
    upstream = place.upstreams["a" if model == "gpt" else "inference"]
    upstream.will(WRITTEN[how], model=model)
    assert text_of(place.told(model)) == "Zoë"
    assert len(upstream.asked(model)) == 1


LINES = "a\x85b\u2028c\u2029d"  # what some take for the end of a line, and JSON does not escape
LINED = pair(GPT)


def test_only_a_line_end_ends_a_line(place: Place, iterate: SdkCall) -> None:
    place.upstreams["a"].always(sse(delta(LINES), done(LINES)), model=LINED)
    heard = iterate(LINED, "asgi")
    assert heard.error is None
    assert text_of(heard.events) == LINES


def test_a_line_end_of_unicode_goes_through_from_an_answer_that_is_no_stream(place: Place, iterate: SdkCall) -> None:
    place.upstreams["a"].will(Script(body=json.dumps({"text": LINES}).encode()), model="whisper")
    heard = iterate("whisper", "asgi")
    assert (heard.error, text_of(heard.events)) == (None, LINES)


@pytest.mark.parametrize("end", ["whole", "silent"])
def test_mistrals_segments_come_beside_its_deltas(place: Place, end: str) -> None:
    """`speaker_id` may be left out (https://docs.mistral.ai/api/endpoint/audio/transcriptions#operation-stream)."""
    segment = {"type": "transcription.segment", "text": " a b", "start": 0.0, "end": 1.0}
    more = {"segments": [segment]} if end == "whole" else {}
    told = [{"type": "transcription.text.delta", "text": text} for text in ("a", " b")]
    script = sse(*told, segment, {"type": "transcription.done", "text": "a b", **more}, named=True)
    place.upstreams["mistral"].will(script, model="voxtral")
    assert text_of(place.told("voxtral")) == "a b"


def test_names_to_listen_for_are_spelled_as_they_were_given(place: Place) -> None:
    told = [{"type": "transcription.text.delta", "text": text} for text in ("in", " New", "_York", " now")]
    end = {"type": "transcription.done", "text": "in New_York now"}
    script = replace(sse(*told, end), body=json.dumps(end).encode())  # it may be asked to stream this, or not
    place.upstreams["mistral"].will(script, script, model="voxtral")
    form: dict[str, Any] = {"keywords[]": "New York"}
    events = place.told("voxtral", **form)
    assert text_of(events) == place.whole("voxtral", **form).json()["text"] == "in New York now"


def test_what_was_told_stands_where_the_end_says_otherwise(place: Place) -> None:
    place.upstreams["a"].will(sse(delta("Tell"), delta(" me"), done("Told you")), model="gpt")
    assert text_of(place.told("gpt")) == "Tell me"


@each_host
def test_silence_is_an_end_and_nothing_before_it(place: Place, host: Host) -> None:
    place.upstreams["a"].will(sse(done("")), Script(body=b'{"text": ""}'), model="gpt")
    for _ in range(2):
        (end,) = place.told("gpt", host)
        assert (end["type"], end["text"]) == ("transcript.text.done", "")


def test_segments_stay_within_the_recording(place: Place) -> None:
    segment = {"type": "transcript.text.segment", "id": "x", "start": 1.0, "end": 999.0, "text": "a", "speaker": "A"}
    place.upstreams["a"].will(sse(segment, done("a")), model="diarize")
    told, _ = place.told("diarize", response_format="diarized_json")
    assert (told["start"], told["end"]) == (1.0, pytest.approx(DURATION, abs=0.02))


ENDLESS = pair(GPT)
PACKED = pair(GPT)


def test_a_line_without_an_end_is_given_up(place: Place) -> None:
    upstream = place.upstreams["a"]
    upstream.always(sse(b"data: {", *[b"x" * 1_000_000] * 48), model=ENDLESS)
    before = upstream.told
    assert place.whole(ENDLESS, stream="true").status_code == 502
    attempts = len(upstream.asked(ENDLESS))
    assert upstream.told - before <= attempts * 14_000_000


def test_packed_events_are_not_unpacked(place: Place) -> None:
    events = b"".join(each for each in sse(delta("x" * 1_000_000), done("x")).events or () if isinstance(each, bytes))
    packed = Script(events=(gzip.compress(events),), headers=(("content-encoding", "gzip"),))
    place.upstreams["a"].always(packed, model=PACKED)
    assert place.whole(PACKED, stream="true").status_code == 502


# --- Engines ----------------------------------------------------------------------------------------


def joined(seconds: float, gap: float) -> bytes:
    """The fixture with three sentences, as often as it fits, as WAV of 16 kHz."""
    resampler = av.AudioResampler(format="s16", layout="mono", rate=16_000)
    speech = b""
    with av.open(str(PAUSES)) as container:
        for frame in container.decode(audio=0):
            speech += b"".join(each.to_ndarray().tobytes() for each in resampler.resample(frame))
    piece = speech + bytes(2 * int(16_000 * gap))
    sound = (piece * math.ceil(seconds * 32_000 / len(piece)))[: int(seconds * 32_000)]
    file = io.BytesIO()
    with wave.open(file, "wb") as made:
        made.setparams((1, 2, 16_000, 0, "NONE", ""))
        made.writeframes(sound)
    return file.getvalue()


@pytest.fixture(scope="module")
def two_minutes() -> bytes:
    return joined(120.0, 30.0)


@dataclass(frozen=True)
class Embedded:
    """The gateway with its own engine."""

    server: Server
    office: Office

    def stream(self, customer: Customer, audio: bytes, **more: Any) -> Wire:
        return Wire(self.server.url, customer, model="whisper-1", audio=audio, **more)


@pytest.fixture(scope="module")
def embedded(server: Server) -> Embedded:
    return Embedded(server, Office(server.data_dir))


@pytest.fixture(scope="module")
def three_sentences(embedded: Embedded) -> dict[str, Any]:
    """What the engine makes of `PAUSES`, which takes it most of a second, where that is not streamed."""
    whole: dict[str, Any] = embedded.server.transcribe(PAUSES).json()
    return whole


def test_the_engines_segments_are_told_one_by_one(embedded: Embedded, three_sentences: dict[str, Any]) -> None:
    customer, audio = embedded.office.open(credit=CREDIT), PAUSES.read_bytes()
    with embedded.stream(customer, audio) as wire:
        events = list(wire.events())
    assert len(deltas(events)) == 3
    whole = three_sentences
    assert text_of(events) == whole["text"]
    assert events[-1]["usage"] == whole["usage"]


def test_the_inference_services_segments_are_told_one_by_one(place: Place, three_sentences: dict[str, Any]) -> None:
    events = place.told("real", audio=PAUSES.read_bytes())
    assert len(deltas(events)) == 3
    assert text_of(events) == three_sentences["text"]


def test_the_engine_streams_on_lambda_too(tmp_path: Path, three_sentences: dict[str, Any]) -> None:
    loop = asyncio.new_event_loop()
    settings = Settings(engine_workers=1, data_dir=tmp_path, spool_dir=tmp_path / "spool")
    gateway = build_gateway(settings, SqliteStore(tmp_path / "voxgate.sqlite"))
    customer = Office(tmp_path).open(credit=CREDIT)
    with (
        Front(build_handler(build_application(gateway), loop)) as front,
        Wire(front.url, customer, model="whisper-1", audio=PAUSES.read_bytes()) as wire,
    ):
        events = list(wire.events())
    loop.run_until_complete(gateway.close())
    loop.close()
    assert len(deltas(events)) == 3
    assert text_of(events) == three_sentences["text"]


def test_the_first_delta_of_two_minutes_comes_before_a_quarter_of_the_time(
    embedded: Embedded, two_minutes: bytes
) -> None:
    customer = embedded.office.open(credit=CREDIT)
    begun = time.monotonic()
    with embedded.stream(customer, two_minutes) as wire:
        stream = wire.events()
        events = [next(stream)]
        first = time.monotonic() - begun
        events += stream
        whole = time.monotonic() - begun
    assert first < whole / 4
    assert len(deltas(events)) >= 12
    text_of(events)
    assert embedded.office.money(customer.account) == (CREDIT - cost(120.0), 0)


def cpu(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return -1.0
    return float(times.user + times.system)


def engines(pid: int) -> list[psutil.Process]:
    found = psutil.Process(pid).children(recursive=True)
    return [process for process in found if "voxgate.engines.worker" in " ".join(process.cmdline())]


@pytest.mark.parametrize("where", ["here", "inference"])
def test_who_hangs_up_stops_the_engine_within_a_second(
    place: Place, embedded: Embedded, two_minutes: bytes, where: str
) -> None:
    office, pid = (embedded.office, embedded.server.pid) if where == "here" else (place.office, place.real.pid)
    address, model = (embedded.server.url, "whisper-1") if where == "here" else (place.urls["asgi"], "real")
    customer = office.open(credit=CREDIT)
    before = {process: cpu(process) for process in engines(pid)}
    wire = Wire(address, customer, model=model, audio=two_minutes)
    stream = wire.events()
    for _ in range(2):
        next(stream)
    working = [process for process, spent in before.items() if cpu(process) > spent + 0.1]
    assert len(working) == 1
    wire.hang_up()
    time.sleep(1.2)
    then = cpu(working[0])
    time.sleep(0.5)
    assert cpu(working[0]) <= max(then, 0) + 0.02  # it is at rest, or is no more
    until(lambda: not office.money(customer.account)[1], 5)
    spent = CREDIT - office.money(customer.account)[0]
    # Two sentences of the first five seconds were read, and at most a few more were heard.
    assert cost(2.0) <= spent <= cost(40.0)


def test_who_hangs_up_pays_up_to_the_end_of_a_segment(embedded: Embedded, two_minutes: bytes) -> None:
    customer = embedded.office.open(credit=CREDIT)
    key = {"Idempotency-Key": "cut"}
    with embedded.stream(customer, two_minutes, headers=key) as wire:
        stream = wire.events()
        read = [next(stream)["delta"] for _ in range(3)]
    until(lambda: not embedded.office.money(customer.account)[1], 5)
    left, _ = embedded.office.money(customer.account)
    with embedded.stream(customer, two_minutes, headers=key) as again:
        assert again.status == 200
        assert again.headers["idempotency-replayed"] == "true"
        *told, last = list(again.events())
    assert deltas(told)[:3] == read
    assert last["error"]["code"] == "client_gone"
    assert embedded.office.money(customer.account) == (left, 0)
    # The sentences' ends, as the engine tells them for the first of the repetitions.
    form = {"response_format": "verbose_json"}
    whole = embedded.server.transcribe(("a.wav", joined(41.0, 30.0)), **form).json()["segments"]
    assert CREDIT - left == cost(whole[len(told) - 1]["end"])


# --- Money ------------------------------------------------------------------------------------------


@each_host
@pytest.mark.parametrize("model", SOURCES)
def test_a_stream_is_metered_as_the_whole_answer_is(place: Place, model: str, host: Host) -> None:
    customer = place.office.open(credit=CREDIT)
    place.told(model, host, customer=customer)
    assert place.settled(customer) == COST
    assert place.whole(model, host, customer=customer).status_code == 200
    records = place.records(customer)
    assert len(records) == 2
    same = ("contract", "status", "model", "provider", "deployment", "seconds", "size", "cost", "attempts", "converted")
    streamed, whole = ([getattr(record, name) for name in same] for record in records)
    assert streamed == whole


@each_host
@pytest.mark.parametrize("path", [OPENAI, LITELLM], ids=["openai", "litellm"])
def test_the_same_stream_again_is_the_same_to_the_byte_and_costs_nothing(place: Place, host: Host, path: str) -> None:
    customer, key = place.office.open(credit=CREDIT), {"Idempotency-Key": "order 1"}
    with place.stream("gpt", host, customer=customer, path=path, headers=key) as wire:
        first = wire.whole()
        assert "idempotency-replayed" not in wire.headers
    assert place.settled(customer) == COST
    asked = len(place.upstreams["a"].asked("gpt"))
    for again in HOSTS:
        with place.stream("gpt", again, customer=customer, path=path, headers=key) as wire:
            assert wire.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert wire.headers["cache-control"] == "no-cache"
            assert wire.headers["idempotency-replayed"] == "true"
            assert microdollars(wire.headers["x-voxgate-cost"]) == 0
            assert wire.whole() == first
    assert text_of(parsed(first)) == TEXT
    assert len(place.upstreams["a"].asked("gpt")) == asked
    assert place.settled(customer) == COST


def test_a_key_in_use_by_a_stream_is_a_conflict(place: Place) -> None:
    customer, key = place.office.open(credit=CREDIT), {"Idempotency-Key": "order 1"}
    place.upstreams["inference"].will(told_slowly(0.05, *LONG), model="ours")
    with place.stream("ours", customer=customer, headers=key) as wire:
        next(wire.events())
        refused = place.whole("ours", customer=customer, headers=key, stream="true")
        assert (refused.status_code, "retry-after" in refused.headers) == (409, True)
    place.settled(customer)


def test_the_same_key_for_a_stream_and_for_the_whole_is_a_conflict(place: Place) -> None:
    customer, key = place.office.open(credit=CREDIT), {"Idempotency-Key": "order 1"}
    place.told("gpt", customer=customer, headers=key)
    place.settled(customer)
    assert place.whole("gpt", customer=customer, headers=key).status_code == 409


@each_host
@pytest.mark.parametrize("model", SOURCES)
def test_what_is_cached_is_told_from_the_cache(place: Place, model: str, host: Host) -> None:
    customer = place.office.open(credit=CREDIT)
    events = []
    for _ in range(2):
        with place.stream(model, host, customer=customer, path=LITELLM, headers=CACHED) as wire:
            events.append(list(wire.events()))
    assert [text_of(each) for each in events] == [TEXT, TEXT]
    hits = [each[-1]["extra_fields"]["cache_debug"] for each in events]
    assert hits[0] is None
    assert hits[1]["cache_hit"] is True
    assert place.settled(customer) == COST + cost(DURATION, 600)


LONG = [delta(f"w{n} ", end=round(n * 0.05, 2)) for n in range(1, 61)]


def told_slowly(pause: float, *events: dict[str, Any]) -> Script:
    return sse(*[each for event in events for each in (event, pause)])


def test_who_hangs_up_pays_for_what_was_told_until_then_and_can_read_it_again(place: Place) -> None:
    customer, key = place.office.open(credit=CREDIT), {"Idempotency-Key": "order 1"}
    place.upstreams["inference"].will(told_slowly(0.02, *LONG), model="ours")
    with place.stream("ours", customer=customer, headers=key) as wire:
        stream = wire.events()
        read = [next(stream)["delta"] for _ in range(20)]
    spent = place.settled(customer)
    assert place.upstreams["inference"].hung_up.acquire(timeout=2)
    with place.stream("ours", customer=customer, headers=key) as again:
        assert again.headers["idempotency-replayed"] == "true"
        *told, last = list(again.events())
    assert deltas(told)[:20] == read
    assert last["error"]["code"] == "client_gone"
    assert spent == cost(0.05 * len(told))
    assert cost(1.0) <= spent <= cost(1.75)
    assert place.settled(customer) == spent


def test_who_hangs_up_pays_also_where_the_providers_connection_fails_by_that(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = httpx.Response.aclose

    async def fail(response: httpx.Response) -> None:
        await close(response)
        raise httpx.ReadError("reset")

    customer = place.office.open(credit=CREDIT)
    upstream = place.upstreams["inference"]
    upstream.will(told_slowly(0.02, *LONG), model="ours")
    asked = len(upstream.asked("ours"))
    monkeypatch.setattr(httpx.Response, "aclose", fail)
    with place.stream("ours", customer=customer) as wire:
        for _, _ in zip(range(20), wire.events(), strict=False):
            pass
    spent = place.settled(customer)
    (record,) = place.records(customer)
    assert (record.status, record.cost) == (499, spent)
    assert cost(1.0) <= spent <= cost(1.75)
    assert len(upstream.asked("ours")) == asked + 1


def test_a_stream_that_was_cut_is_in_the_usage(place: Place) -> None:
    customer = place.office.open(credit=CREDIT)
    place.upstreams["inference"].will(told_slowly(0.02, *LONG), model="ours")
    with place.stream("ours", customer=customer) as wire:
        for _, _ in zip(range(20), wire.events(), strict=False):
            pass
    spent = place.settled(customer)
    (record,) = place.records(customer)
    assert record.cost == spent
    assert (record.provider, record.deployment, record.model) == ("inference", "ours", "ours")
    assert cost(record.seconds) == spent
    assert record.status == 499


def test_text_without_times_is_not_free_for_who_hangs_up_before_the_end(place: Place) -> None:
    customer = place.office.open(credit=CREDIT)
    place.upstreams["a"].will(sse(delta("all"), delta(" of it"), 5.0, done("all of it")), model="gpt")
    with place.stream("gpt", customer=customer) as wire:
        stream = wire.events()
        assert next(stream)["delta"] + next(stream)["delta"] == "all of it"
    assert 0 < place.settled(customer) <= COST


def test_who_hangs_up_before_anything_was_told_pays_nothing(place: Place) -> None:
    customer = place.office.open(credit=CREDIT)
    place.upstreams["inference"].will(Script(events=(), delay=10.0), model="ours")
    wire = place.stream("ours", customer=customer)
    place.upstreams["inference"].wait_for_request()
    time.sleep(0.1)
    wire.hang_up()
    assert place.upstreams["inference"].hung_up.acquire(timeout=2)
    assert place.settled(customer) == 0


def test_a_stream_takes_one_of_the_places_that_its_customer_has(place: Place) -> None:
    customer = place.office.open(credit=CREDIT, limits=RateLimits(concurrent_requests=1))
    place.upstreams["inference"].will(told_slowly(0.1, *LONG), model="ours")
    with place.stream("ours", customer=customer) as wire:
        next(wire.events())
        assert place.whole("ours", customer=customer).status_code == 429
        assert place.whole("ours", "lambda", customer=customer).status_code == 429
        assert place.office.money(customer.account) == (CREDIT, COST)
    place.settled(customer)
    assert place.whole("ours", customer=customer).status_code == 200
    place.told("ours", customer=customer)
    until(lambda: place.whole("ours", customer=customer).status_code == 200, 2)


# --- Cut, slow and silent ---------------------------------------------------------------------------


def test_two_hundred_streams_that_are_cut_leave_nothing_behind(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    customer = place.office.open(credit=10_000_000)
    chance = random.Random(20)
    upstream = place.upstreams["inference"]
    upstream.always(told_slowly(0.005, *LONG), model="ours")
    place.told("ours", customer=place.rich)  # so that what is there for all requests is there
    until(lambda: not place.sockets(), 5)
    before = place.left()

    def cut(number: int) -> tuple[str, int]:
        events = chance.randint(0, 45)
        wire = place.stream("ours", customer=customer)
        asked, read = "", 0
        try:
            if events:
                stream = wire.events()
                while read < events:
                    assert next(stream)["type"] == "transcript.text.delta"
                    read += 1
                asked = wire.headers["x-request-id"]
            else:
                time.sleep(chance.random() * 0.05)
        finally:
            wire.hang_up(reset=number % 3 == 0)
        return asked, read

    with ThreadPoolExecutor(8) as pool:
        cuts = dict(pool.map(cut, range(200)))
    until(lambda: not place.office.money(customer.account)[1], 10)
    # What is closed takes a moment.
    until(lambda: place.left().sockets <= before.sockets and place.left().tasks <= before.tasks, 5)
    after = place.left()
    assert (after.files, after.sockets) == (before.files, before.sockets) == (0, 0)
    assert after.tasks <= before.tasks
    assert after.threads <= before.threads + 12  # of the providers, which are in this process too
    records = {record.request_id: record for record in place.records(customer)}
    assert 10_000_000 - place.office.money(customer.account)[0] == sum(each.cost for each in records.values())
    ends = {cost(n * 0.05): n for n in range(1, 61)} | {0: 0}
    wrong = []
    for request_id, read in cuts.items():
        if read:
            heard = ends[records[request_id].cost]  # a segment's end, and no other amount
            if not read - 1 <= heard <= read + 40:
                wrong.append((read, heard, records[request_id].status))
    assert wrong == []
    gc.collect()
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_slow_reader_holds_up_its_provider_and_is_let_go(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(frames, "STALL_SECONDS", 1.0)
    upstream, customer = place.upstreams["inference"], place.office.open(credit=CREDIT)
    many = [delta("x" * 10_000, end=n / 200) for n in range(600)]
    upstream.will(sse(*many, done("x")), model="ours")
    before, sockets = upstream.told, len(place.sockets())
    wire = place.stream("ours", customer=customer, receive=4096)
    try:
        assert wire.status == 200
        time.sleep(0.7)
        assert upstream.told - before < 3_000_000, "what nobody reads is kept"
        assert place.settled(customer, within=3.0) < COST
        assert upstream.hung_up.acquire(timeout=2)
        gc.collect()
        assert "never retrieved" not in caplog.text
        until(lambda: len(place.sockets()) <= sockets, 2)
        with pytest.raises((Broken, ConnectionError)):
            list(wire.events())
    finally:
        wire.hang_up()


def test_a_reader_who_is_only_slow_gets_all_of_it(place: Place) -> None:
    upstream = place.upstreams["inference"]
    many = [delta("x" * 10_000, end=n / 100) for n in range(150)]
    upstream.will(sse(*many, done("x" * 1_500_000)), model="ours")
    with place.stream("ours", receive=4096) as wire:
        stream = wire.events()
        first = next(stream)
        time.sleep(0.8)
        assert text_of([first, *stream]) == "x" * 1_500_000


SLOW = pair("inference")


def test_a_slow_reader_does_not_make_its_provider_look_slow_or_broken(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "STALL_SECONDS", 1.0)
    upstream = place.upstreams["inference"]
    many = [delta("x" * 10_000, end=n / 200) for n in range(150)]
    upstream.will(sse(*many, done("x" * 1_500_000)), model=SLOW)
    with place.stream(SLOW, receive=4096) as wire:
        stream = wire.events()
        first = next(stream)
        time.sleep(0.8)
        text_of([first, *stream])
    speed = place.gateway.health.speed(f"inference/{SLOW}")
    assert speed is None or speed * DURATION < 0.6


def test_a_slow_reader_does_not_use_up_its_providers_time(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place.gateway.transcriber.fallback, "provider_timeout", 0.5)
    upstream = place.upstreams["inference"]
    many = [delta("x" * 10_000, end=n / 200) for n in range(150)]
    upstream.will(sse(*many, done("x" * 1_500_000)), model=SLOW)
    with place.stream(SLOW, receive=4096) as wire:
        stream = wire.events()
        first = next(stream)
        time.sleep(1.0)
        assert text_of([first, *stream]) == "x" * 1_500_000


def test_in_silence_a_comment_says_that_it_goes_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_host, "_HEARTBEAT_SECONDS", 0.2)
    upstream = place.upstreams["inference"]
    upstream.will(sse(0.7, delta("one"), 0.5, delta(" two"), done("one two")), model="ours")
    with place.stream("ours") as wire:
        stream = wire.events()
        assert wire.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert next(stream)["delta"] == "one"
        assert len(wire.parser.comments) >= 2
        assert text_of([{"type": "transcript.text.delta", "delta": "one"}, *stream]) == "one two"
        assert len(wire.parser.comments) >= 4


def test_a_function_sends_all_of_it_at_the_end_however_long_that_is(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_host, "_HEARTBEAT_SECONDS", 0.1)
    place.upstreams["inference"].will(sse(0.4, delta("one"), 0.4, delta(" two"), done("one two")), model="ours")
    assert text_of(place.told("ours", "lambda")) == "one two"


def test_what_a_function_had_no_time_to_send_costs_nothing(place: Place, tmp_path: Path) -> None:
    """Its client has had none of it."""
    loop = asyncio.new_event_loop()
    settings = replace(place.gateway.settings, spool_dir=tmp_path)
    gateway = build_gateway(settings, SqliteStore(place.office.data_dir / "voxgate.sqlite"), {"UPSTREAM_KEY": KEY})
    handler = build_handler(build_application(gateway), loop)
    customer = place.office.open(credit=CREDIT)
    place.upstreams["inference"].will(sse(delta("one"), 5.0, delta(" two"), done("one two")), model="ours")
    transport = ApiGateway(handler, context=Context(milliseconds=2000))
    with httpx.Client(base_url="https://api", headers=customer.headers, transport=transport) as client:
        response = send(client, OPENAI, model="ours", stream="true")
    assert (response.status_code, envelope(response)["code"]) == (502, "provider_unavailable")
    assert place.office.money(customer.account) == (CREDIT, 0)
    loop.run_until_complete(gateway.close())
    loop.close()


QUIET = pair(GPT, "inference")


def test_after_a_comment_another_provider_may_still_serve_and_a_failure_is_an_event(
    place: Place, iterate: SdkCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_host, "_HEARTBEAT_SECONDS", 0.1)
    slow = Script(status=401, delay=0.35)
    place.upstreams["a"].will(slow, slow, model=QUIET)
    place.upstreams["inference"].will(GOOD, Script(status=401), model=QUIET)
    heard = iterate(QUIET, "asgi")
    assert (heard.error, text_of(heard.events)) == (None, TEXT)
    place.upstreams["a"].will(slow, model=QUIET)
    failed = iterate(QUIET, "asgi")
    assert failed.events == []
    assert failed.error is not None
    assert (failed.error["name"], failed.error["code"]) == ("APIError", "provider_unavailable")


QUIETER = pair(GPT, "inference")


def test_a_stream_that_begins_with_a_comment_does_not_guess_who_will_serve_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_host, "_HEARTBEAT_SECONDS", 0.1)
    place.upstreams["a"].will(Script(status=401, delay=0.35), model=QUIETER)
    with place.stream(QUIETER) as wire:
        assert {"x-voxgate-provider", "x-voxgate-attempts"}.isdisjoint(wire.headers)
        assert text_of(list(wire.events())) == TEXT
        assert wire.parser.comments


def test_who_asked_for_no_stream_gets_no_comment(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_host, "_HEARTBEAT_SECONDS", 0.1)
    place.upstreams["a"].will(Script(delay=0.3), model="gpt")
    assert place.whole("gpt").headers["content-type"] == "application/json"


# --- The server's end -------------------------------------------------------------------------------


@dataclass
class Ending:
    """A server of its own, to be told to end."""

    process: subprocess.Popen[str]
    server: Server
    office: Office
    upstream: InferenceUpstream
    customer: Customer

    def stream(self, **more: Any) -> Wire:
        return Wire(self.server.url, self.customer, model="whisper-1", **more)


@pytest.fixture(params=[1])
def ending(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ending]:
    with InferenceUpstream(key="") as upstream:
        environment = {"VOXGATE_INFERENCE_URL": upstream.url, "VOXGATE_DRAIN_SECONDS": str(request.param)}
        process, server = start_server(tmp_path, **environment)
        office = Office(tmp_path)
        yield Ending(process, server, office, upstream, office.open(credit=CREDIT))
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize("ending", [10], indirect=True)
def test_a_server_that_ends_finishes_the_streams_that_run(ending: Ending) -> None:
    ending.upstream.will(told_slowly(0.02, *LONG, done(" ".join(f"w{n}" for n in range(1, 61)))))
    with ending.stream() as wire:
        stream = wire.events()
        first = next(stream)
        ending.process.terminate()
        assert len(deltas([first, *stream])) == 60
    ending.process.wait(5)
    assert ending.office.money(ending.customer.account) == (CREDIT - COST, 0)


@pytest.mark.parametrize("reader", ["quick", "slow"])
def test_a_server_that_cannot_wait_settles_the_streams_that_run(ending: Ending, reader: str) -> None:
    many = [delta("x" * 10_000, end=round(n * 0.05, 2)) for n in range(1, 61)] * 3
    script = told_slowly(0.2, *LONG) if reader == "quick" else sse(*many, 20.0)
    ending.upstream.will(script)
    with ending.stream(receive=4096) as wire:
        stream = wire.events()
        for _ in range(3):
            next(stream)
        ending.process.terminate()
        if reader == "quick":
            with contextlib.suppress(Broken, ConnectionError):
                list(stream)
        ending.process.wait(8)
    balance, held = ending.office.money(ending.customer.account)
    assert held == 0
    assert cost(0.15) <= CREDIT - balance <= COST
