"""Providers that lie, bomb, stall and echo: what they answer costs nobody else anything, and never us our keys."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import re
import resource
import socket
import tempfile
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import av
import httpx
import numpy as np
import pytest
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from botocore.exceptions import EndpointConnectionError

from conftest import DATA, Server, start_server, stop_server
from customers import LITELLM, OPENAI, ROUTER, STATS, Customer, Office, envelope, send
from fakes.clock import Clock
from fakes.upstreams import (
    GOOD,
    KEY,
    TEXT,
    DeepgramUpstream,
    InferenceUpstream,
    MistralUpstream,
    OpenAIUpstream,
    Script,
    Upstream,
)
from voxgate.accounts import Entry, EntryKind, Key, Scope, keys
from voxgate.accounts.sqlite import SqliteStore
from voxgate.audio.sniff import MP3
from voxgate.catalog import Deployment, ProviderEntry
from voxgate.dialects import Dialect
from voxgate.dialects.openai import OpenAIDialect
from voxgate.errors import TooLarge
from voxgate.fallback import Fallback
from voxgate.formats import Body
from voxgate.hosts.http import Application, Request, Response, transcription
from voxgate.model import Outcome, TranscriptionRequest
from voxgate.providers.http import HttpProvider, Timeouts
from voxgate.providers.openai import OpenAIAdapter
from voxgate.providers.prepare import Prepared
from voxgate.providers.secrets import StoredSecrets
from voxgate.receive import Upload
from voxgate.routing.health import Health
from voxgate.settings import Settings
from voxgate.wiring import build_gateway

pytestmark = pytest.mark.usefixtures("untraced")

TRANSLATIONS = "/v1/audio/translations"
SPEECH = DATA / "b-slt.mp3"
DURATION = 3.04
MB = 1024 * 1024
LATE = Script(delay=20)
CACHED = {"x-voxgate-cache": "read-write"}
DEBUG = frozenset({Scope.TRANSCRIBE, Scope.DEBUG})
GRANULARITIES = {"timestamp_granularities[]": ["word", "segment"]}

# --- The gateway, its models and its providers ------------------------------------------------------

PROVIDERS: dict[str, type[Upstream]] = {
    "a": OpenAIUpstream,
    "b": OpenAIUpstream,
    "c": OpenAIUpstream,
    "mistral": MistralUpstream,
    "deepgram": DeepgramUpstream,
    "inference": InferenceUpstream,
}
KINDS = ("a", "mistral", "deepgram", "inference")


@dataclass(frozen=True)
class Place:
    """A gateway and its providers."""

    server: Server
    office: Office
    upstreams: dict[str, Upstream] = field(repr=False)
    client: httpx.Client = field(repr=False)
    rich: Customer

    def ask(
        self,
        model: str,
        path: str = ROUTER,
        *,
        customer: Customer | None = None,
        headers: dict[str, str] | None = None,
        **form: Any,
    ) -> httpx.Response:
        """One request, at the first of the model's providers first."""
        who = (customer or self.rich).headers | (headers or {})
        if path == ROUTER:
            form = {"preference": "cost"} | form
        with httpx.Client(base_url=self.server.url, headers=who, transport=_Shared(self.client), timeout=60) as client:
            return send(client, path, model=model, **form)

    def served(self, response: httpx.Response) -> tuple[str, str]:
        assert response.status_code == 200, response.text
        return response.headers["x-voxgate-provider"], response.headers["x-voxgate-attempts"]

    def failures(self, deployment: str) -> int:
        admin = self.office.key(self.rich.account, scopes=frozenset({Scope.ADMIN}))
        seen = self.client.get(f"{self.server.url}/v1/providers", headers=admin.headers).json()["data"]
        (found,) = [each["failures"] for each in seen if each["id"] == deployment]
        return int(found)

    def spooled(self) -> int:
        return len(list((self.server.data_dir / "spool").rglob("audio-*")))


class _Shared(httpx.BaseTransport):
    """Connections outlive the client, which takes longer to make than a request."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return self._client.send(request, stream=True)


@contextlib.contextmanager
def opened(directory: Path, models: dict[str, tuple[str, ...]], **environment: str) -> Iterator[Place]:
    """`models` are deployments, each a provider and, after a blank, what else its entry says."""
    with contextlib.ExitStack() as stack:
        upstreams = {name: stack.enter_context(kind()) for name, kind in PROVIDERS.items()}
        lines = []
        for name, upstream in upstreams.items():
            lines += [f"[providers.{name}]", f'kind = "{upstream.kind}"', f'flavor = "{upstream.flavor}"']
            lines += [f'base_url = "{upstream.base_url}"', 'api_key = "env:UPSTREAM_KEY"']
        for model, offers in models.items():
            lines += [f'[models."{model}"]', "deployments = ["]
            for price, offer in enumerate(offers, start=1):
                name, _, more = offer.partition(" ")
                what = f'provider = "{name}", upstream_model = "{model}", price_per_minute = "0.00{price}"'
                lines.append(f"  {{ {what}{more and f', {more}'} }},")
            lines.append("]")
        catalog = directory / "catalog.toml"
        catalog.write_text("\n".join(lines), encoding="utf-8")
        process, server = start_server(directory, VOXGATE_CATALOG=str(catalog), UPSTREAM_KEY=KEY, **environment)
        stack.callback(stop_server, process)
        client = stack.enter_context(httpx.Client(verify=False, timeout=60))
        office = Office(directory)
        yield Place(server, office, upstreams, client, office.open(credit=10**9, scopes=DEBUG))


MODELS: dict[str, tuple[str, ...]] = {}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with opened(tmp_path_factory.mktemp("hostile"), MODELS, VOXGATE_REQUEST_TIMEOUT="30") as place:
        yield place


def until(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- What is kept of an answer, and how much of it is read ------------------------------------------

MODELS |= {f"plain-{kind}": (kind,) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_no_cookie_of_a_provider_is_sent_back(place: Place, kind: str) -> None:
    upstream, model = place.upstreams[kind], f"plain-{kind}"
    cookies = ["s=private", "t=private; Path=/; Max-Age=9999", "u=private; Domain=127.0.0.1", "v=private; HttpOnly"]
    upstream.will(*[Script(headers=tuple(("set-cookie", cookie) for cookie in cookies))] * 3, model=model)
    for _ in range(4):
        answer = place.ask(model, customer=place.office.open())
        assert answer.status_code == 200
        assert "set-cookie" not in answer.headers
    assert len(upstream.asked(model)) == 4
    assert [sent.headers.get("cookie") for sent in upstream.asked(model)] == [None] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_asked_for_as_it_is(place: Place, kind: str) -> None:
    assert place.ask(f"plain-{kind}").status_code == 200
    assert place.upstreams[kind].asked(f"plain-{kind}")[-1].headers.get("accept-encoding", "identity") == "identity"


def gzipped(content: bytes) -> bytes:
    packer = zlib.compressobj(wbits=31)
    return packer.compress(content) + packer.flush()


def bomb(size: int) -> bytes:
    """Zeros, compressed twice, without their last check."""
    packer = zlib.compressobj(9, wbits=31)
    head = packer.compress(bytes(MB)) + packer.flush(zlib.Z_FULL_FLUSH)
    again = packer.compress(bytes(MB)) + packer.flush(zlib.Z_FULL_FLUSH)
    return gzipped(head + again * (size // MB - 1))


HEARD = json.dumps({"text": "of another encoding"}).encode()
ENCODED = {
    "gzip": gzipped(HEARD),
    "x-gzip": gzipped(HEARD),
    "GZIP": gzipped(HEARD),
    "gzip, gzip": gzipped(gzipped(HEARD)),
    "deflate": zlib.compress(HEARD),
    "br": b"\x0b\x0c\x80" + HEARD + b"\x03",
    "zstd": HEARD,
    "identity, gzip": gzipped(HEARD),
    "nonsense": HEARD,
}
MODELS |= {f"encoded-{number}": ("a", "b") for number in range(len(ENCODED))}
MODELS |= {"identity": ("a", "b"), "bomb": ("a", "b")}


@pytest.mark.parametrize("encoding", ENCODED)
def test_what_comes_encoded_is_not_read(place: Place, encoding: str) -> None:
    model = f"encoded-{list(ENCODED).index(encoding)}"
    place.upstreams["a"].always(Script(body=ENCODED[encoding], headers=(("content-encoding", encoding),)), model)
    answer = place.ask(model)
    assert place.served(answer) == ("b", "3")  # after a second try, as with all that may pass
    assert answer.json()["text"] == TEXT


def test_an_answer_may_say_that_it_is_as_it_is(place: Place) -> None:
    place.upstreams["a"].always(Script(headers=(("content-encoding", "identity"),)), "identity")
    assert place.served(place.ask("identity")) == ("a", "1")


def most_memory(server: Server) -> int:
    """Bytes: the most that the process ever had."""
    status = Path(f"/proc/{server.pid}/status").read_text(encoding="ascii")
    (found,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return int(found) * 1024


def test_a_bomb_does_not_go_off(place: Place) -> None:
    small = bomb(1024 * MB)
    assert len(small) < 20_000
    place.upstreams["a"].always(Script(body=small, headers=(("content-encoding", "gzip, gzip"),)), "bomb")
    before = most_memory(place.server)
    assert place.served(place.ask("bomb"))[0] == "b"
    assert most_memory(place.server) - before < 100 * MB


MODELS |= {f"size-{size}": ("a", "b") for size in (1, 12, 40)}


@pytest.mark.parametrize(("size", "who"), [(1, "a"), (12, "b"), (40, "b")])
def test_an_answer_is_bounded_by_what_can_be_said_in_the_time(place: Place, size: int, who: str) -> None:
    place.upstreams["a"].always(Script(size=size * MB), f"size-{size}")
    assert place.served(place.ask(f"size-{size}"))[0] == who


def silence(seconds: int) -> bytes:
    """As FLAC of a few hundred bytes a second."""
    file, rate = io.BytesIO(), 8000
    with av.open(file, "w", format="flac") as media:
        stream = media.add_stream("flac", rate=rate)
        assert isinstance(stream, AudioStream)
        stream.layout = "mono"
        for minute in range(seconds // 60):
            frame = AudioFrame(format="s16", layout="mono", samples=60 * rate)
            frame.planes[0].update(bytes(120 * rate))
            frame.sample_rate, frame.pts = rate, minute * 60 * rate
            media.mux(stream.encode(frame))
        media.mux(stream.encode(None))
    return file.getvalue()


@pytest.fixture(scope="module")
def hours() -> bytes:
    """Two: 16 seconds' work to make Opus of."""
    return silence(7200)


MODELS |= {"long": ("a",)}


def test_while_a_long_answer_is_read_others_are_answered(place: Place, hours: bytes) -> None:
    segment = b'{"start": 1.0, "end": 2.0, "text": "a"}'
    body = b'{"text": "a", "segments": [' + b", ".join([segment] * 200_000) + b"]}"
    assert 7 * MB < len(body) < 9 * MB
    place.upstreams["a"].always(Script(body=body), "long")
    longest, sent = 0.0, time.monotonic()
    with ThreadPoolExecutor(1) as clients:
        answer = clients.submit(place.ask, "long", audio=hours, response_format="text")
        while not answer.done():
            begun = time.monotonic()
            assert place.client.get(f"{place.server.url}/health").status_code == 200
            longest = max(longest, time.monotonic() - begun)
            time.sleep(0.01)
    assert place.served(answer.result()) == ("a", "1")
    assert longest < (time.monotonic() - sent) / 4  # most of it is the reading, whatever the machine


# --- Numbers, texts and shapes that are none --------------------------------------------------------


def raw(value: Any) -> bytes:
    """As JSON, in which a text that begins with `@` stands for itself."""
    return re.sub(r'"@([^"]*)"', r"\1", json.dumps(value)).encode()


SEGMENT = {"id": 0, "seek": 0, "start": 0.5, "end": 1.5, "text": TEXT, "tokens": [1, 2], "no_speech_prob": 0.5}
WORD = {"word": "Please", "start": 0.5, "end": 1.0, "confidence": 0.5}
WHOLE = {"text": TEXT, "language": "english", "duration": 3.03, "segments": [SEGMENT], "words": [WORD]}
ENDLESS, NAN, HUGE, DIGITS, HALF = "@1e400", "@NaN", "@" + "9" * 400, "@" + "9" * 5000, "\ud800"


def top(**fields: Any) -> bytes:
    return raw(WHOLE | fields)


def segment(**fields: Any) -> bytes:
    return top(segments=[SEGMENT | fields])


def word(**fields: Any) -> bytes:
    return top(words=[WORD | fields])


ODD: dict[str, bytes] = {
    **{f"{name}-{what}": segment(**{name: value}) for name in ("seek", "end")
       for what, value in {"endless": ENDLESS, "nan": NAN, "huge": HUGE, "digits": DIGITS, "text": "soon",
                           "number-as-text": "1", "endless-as-text": "1e400", "nan-as-text": "nan", "list": [1],
                           "minus": -7, "true": True, "null": None, "1e307": "@1e307"}.items()},
    **{f"{name}-{what}": segment(**{name: value}) for name in ("no_speech_prob", "avg_logprob", "temperature", "start")
       for what, value in {"endless": ENDLESS, "huge": HUGE, "text": "x", "minus": -7, "seven": 7}.items()},
    **{f"confidence-{what}": word(confidence=value)
       for what, value in {"seven": 7, "minus": -7, "endless": ENDLESS, "nan": NAN, "1e300": 1e300,
                           "huge": HUGE, "text": "0.5", "true": True, "list": []}.items()},
    "tokens-endless": segment(tokens=[ENDLESS]), "tokens-text": segment(tokens="abc"),
    "tokens-object": segment(tokens={"a": 1}), "tokens-huge": segment(tokens=[HUGE, DIGITS]),
    "tokens-number": segment(tokens=5), "tokens-null": segment(tokens=[None]),
    "negative": segment(start=-5, end=-3), "reversed": segment(start=2.5, end=0.5),
    "beyond": segment(end=99_999), "wholly-beyond": segment(start=50, end=60),
    "word-negative": word(start=-5, end=-3), "word-reversed": word(start=2.5, end=0.5),
    "word-beyond": word(end=99_999), "word-wholly-beyond": word(start=50, end=60), "word-endless": word(end=ENDLESS),
    "word-1e308": word(end="@1e308", confidence="@1e308"),
    "unread-nan": top(x=NAN), "unread-endless": top(x=ENDLESS), "unread-digits": top(x=DIGITS),
    "unread-deep": top(x="@" + "[" * 100_000 + "]" * 100_000), "duration-endless": top(duration=ENDLESS),
    "segments-object": top(segments={}), "segments-full-object": top(segments={"start": 1}),
    "segments-text": top(segments="abc"), "segments-number": top(segments=5), "segments-null": top(segments=[None]),
    "words-object": top(words={}), "words-text": top(words="abc"), "words-null": top(words=[None]),
    "half-text": top(text=f"a{HALF}"), "half-segment": segment(text=HALF), "half-word": word(word=HALF),
    "half-language": top(language=HALF), "half-speaker": segment(speaker=HALF), "half-name": top(**{HALF: HALF}),
    "half-languages": top(language=None, languages=[{"code": HALF}]),
    "zeros": top(text="a\0b\r\n\x1b[31m\u2028"), "speaker-object": segment(speaker={"a": 1}),
    "speaker-endless": segment(speaker=ENDLESS), "language-number": top(language=5),
    **{f"languages-{number}": top(language=None, languages=value) for number, value in
       enumerate(["en", ["en"], [5], [None], {"code": "en"}, [{"code": 5}], [{}], [{"code": "en"}, 5], 7])},
    **{f"usage-{number}": top(usage=value) for number, value in
       enumerate(["x", [], [1], 5, {"input_tokens": "abc", "output_tokens": 1}, {"input_tokens": -1},
                  {"input_tokens": -1, "output_tokens": -1}, {"input_tokens": ENDLESS, "output_tokens": 1},
                  {"input_tokens": HUGE, "output_tokens": HUGE}, {"input_tokens": DIGITS, "output_tokens": 1},
                  {"input_tokens": 1, "output_tokens": 1, "input_token_details": [1]},
                  {"input_tokens": 1, "output_tokens": 1, "input_token_details": {"text_tokens": ENDLESS}},
                  {"input_tokens": 1, "output_tokens": 1, "input_token_details": {"text_tokens": "x"}},
                  {"type": "duration", "seconds": ENDLESS}])},
    **{f"logprobs-{number}": top(logprobs=value) for number, value in
       enumerate(["x", {}, [5], [{"token": "a", "logprob": ENDLESS}], [{"token": HALF, "logprob": -1}],
                  [{"token": "a", "logprob": -1, "bytes": [ENDLESS]}], [{"token": "a", "logprob": -1, "bytes": "abc"}],
                  [{"token": "a", "logprob": -1, "bytes": [HUGE, -1]}], [{"token": "a", "logprob": 7}]])},
}  # fmt: skip


def listened(*, channel: Any = None, heard: Any = None, **results: Any) -> bytes:
    """Deepgram's shape."""
    said = {"word": "please", "punctuated_word": "Please", "start": 0.5, "end": 1.0, "confidence": 0.5}
    utterance = {"start": 0.5, "end": 1.0, "transcript": TEXT, "words": [said], "speaker": 0}
    first = {"transcript": TEXT, "confidence": 0.9, "words": [said | (heard or {})]}
    channels = [{"alternatives": [first], "detected_language": "en"} | (channel or {})]
    return raw({"results": {"channels": channels, "utterances": [utterance | results.pop("said", {})]} | results})


ODD_OF_DEEPGRAM: dict[str, bytes] = {
    **{f"confidence-{number}": listened(heard={"confidence": value}) for number, value in
       enumerate([7, -7, ENDLESS, NAN, "x", HUGE, 1e300])},
    **{f"word-{number}": listened(heard=value) for number, value in
       enumerate([{"start": 2, "end": 1}, {"end": 99_999}, {"start": 50, "end": 60}, {"start": -5, "end": -3},
                  {"end": ENDLESS}, {"end": "@1e307"}, {"start": "soon"}, {"punctuated_word": HALF}, {"end": HUGE}])},
    **{f"utterance-{number}": listened(said=value) for number, value in
       enumerate([{"start": 2, "end": 1}, {"end": 99_999}, {"start": 50, "end": 60}, {"start": -5, "end": -3},
                  {"end": ENDLESS}, {"end": "@1e307"}, {"words": {}}, {"words": [5]}, {"words": "abc"},
                  {"speaker": ENDLESS}, {"speaker": {"a": 1}}, {"transcript": HALF}])},
    **{f"utterances-{number}": listened(utterances=value) for number, value in
       enumerate([{}, {"start": 1}, "abc", 5, [None]])},
    **{f"language-{number}": listened(channel={"detected_language": value}) for number, value in
       enumerate([5, HALF, ["en"], {}])},
}  # fmt: skip


@dataclass(frozen=True)
class Form:
    """One way to ask."""

    path: str
    fields: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


FORMS = {
    "json": Form(OPENAI, {}),
    "text": Form(OPENAI, {"response_format": "text"}),
    "srt": Form(OPENAI, {"response_format": "srt"}),
    "vtt": Form(OPENAI, {"response_format": "vtt"}),
    "verbose": Form(OPENAI, {"response_format": "verbose_json"} | GRANULARITIES),
    "diarized": Form(OPENAI, {"response_format": "diarized_json"}),
    "kept": Form(OPENAI, {"response_format": "verbose_json"} | GRANULARITIES, CACHED),
    "again": Form(OPENAI, {"response_format": "verbose_json"} | GRANULARITIES, CACHED),
    "router": Form(ROUTER, {"response_format": "verbose_json"} | GRANULARITIES),
    "litellm": Form(LITELLM, GRANULARITIES),
    "stats": Form(STATS, {}),
}
OFFERS = {
    "a": ("a words = true, diarization = true, logprobs = true", ODD),
    "deepgram": ("deepgram words = true, diarization = true", ODD_OF_DEEPGRAM),
}
CASES = [(kind, case) for kind, (_, cases) in OFFERS.items() for case in cases]
MODELS |= {f"odd-{kind}-{case}": (OFFERS[kind][0],) for kind, case in CASES}
MODELS |= {f"odd-first-{kind}-{case}": (OFFERS[kind][0], "b") for kind, case in CASES}


@pytest.fixture(scope="module")
def odd(place: Place) -> dict[tuple[str, str], dict[str, httpx.Response]]:
    """What each of these answers becomes in each form, and, as `first`, where there is another provider."""

    def all_forms(kind: str, case: str) -> dict[str, httpx.Response]:
        script, first = Script(body=OFFERS[kind][1][case]), f"odd-first-{kind}-{case}"
        place.upstreams[kind].always(script, model := f"odd-{kind}-{case}")
        place.upstreams[kind].always(script, first)
        found = {name: place.ask(model, form.path, headers=form.headers, **form.fields) for name, form in FORMS.items()}
        return found | {"first": place.ask(first)}

    with ThreadPoolExecutor(8) as clients:
        return dict(zip(CASES, clients.map(lambda case: all_forms(*case), CASES), strict=True))


def strict(text: str) -> Any:
    def none(number: str) -> float:
        raise AssertionError(f"{number} is no JSON")

    return json.loads(text, parse_constant=none)


CUE = re.compile(r"^(?:(\d+):)?(\d\d):(\d\d)[.,](\d{3}) --> (?:(\d+):)?(\d\d):(\d\d)[.,](\d{3})", re.MULTILINE)


def is_sane(value: Any) -> None:
    """Whatever times and probabilities are in there can be ones of this audio."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, list):
        for each in value:
            is_sane(each)
    elif isinstance(value, dict):
        if "start" in value:
            assert type(value["start"]) is type(value["end"]) is float
            assert 0 <= value["start"] <= value["end"] <= DURATION
        for name in ("confidence", "no_speech_prob"):
            assert value.get(name) is None or 0 <= value[name] <= 1
        for name in ("seek", "input_tokens", "output_tokens"):
            assert value.get(name) is None or (type(value[name]) is int and value[name] >= 0)
        for name, each in value.items():
            is_sane(name)
            if name != "extra_fields":  # in which it may say what it likes
                is_sane(each)


def is_served_sanely(answer: httpx.Response, form: str) -> None:
    if answer.status_code == 502:
        assert "transient (200)" in envelope(answer)["message"]
        return
    assert answer.status_code == 200, answer.text
    if form in ("text", "srt", "vtt"):
        for cue in CUE.findall(answer.text):
            hour, minute, second, part, *_ = numbers = [int(number or 0) for number in cue]
            assert hour == minute == numbers[4] == numbers[5] == 0
            assert second + part / 1000 <= numbers[6] + numbers[7] / 1000 <= DURATION
    else:
        is_sane(strict(answer.text))


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_an_odd_answer_is_a_failure_or_becomes_a_sane_one(place: Place, odd: Any, kind: str, case: str) -> None:
    assert place.upstreams[kind].asked(f"odd-{kind}-{case}")
    for form in FORMS:
        is_served_sanely(odd[kind, case][form], form)


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_where_it_is_a_failure_the_next_one_serves(place: Place, odd: Any, kind: str, case: str) -> None:
    assert place.upstreams[kind].asked(f"odd-first-{kind}-{case}")
    alone, answer = odd[kind, case]["json"], odd[kind, case]["first"]
    assert place.served(answer) == ((kind, "1") if alone.status_code == 200 else ("b", "3"))
    is_sane(strict(answer.text))


def test_most_of_them_cost_nobody_an_answer(odd: Any) -> None:
    """Nor is each of them refused: what nobody reads, and what can be put right, does no harm."""
    for kind, case in [
        ("a", "reversed"),
        ("a", "beyond"),
        ("a", "negative"),
        ("a", "confidence-seven"),
        ("a", "zeros"),
    ]:
        assert odd[kind, case]["verbose"].status_code == 200, case


# --- Refusals: whose fault it is, and who is told ---------------------------------------------------


def refusal(param: str | None, message: str = "It is not right.") -> bytes:
    return json.dumps({"error": {"message": message, "type": "invalid_request_error", "param": param}}).encode()


def flat(param: str | None) -> bytes:
    return json.dumps({"object": "error", "message": "It is not right.", "type": "x", "param": param}).encode()


def located(*where: str) -> bytes:
    return json.dumps({"detail": [{"loc": ["body", *where], "msg": "It is not right.", "type": "x"}]}).encode()


@dataclass(frozen=True)
class Refusal:
    """A provider's 400, what the customer had sent, and the field that is told, if any; `kind` answers it."""

    body: bytes
    sent: dict[str, Any] = field(default_factory=dict)
    told: str | None = None
    kind: str = "a"
    path: str = ROUTER
    status: int = 400


SAID = json.dumps({"err_code": "Bad Request", "err_msg": "It is not right."}).encode()
PAGE = b"<html><title>400 Request Header Or Cookie Too Large</title></html>"
OF_THE_CUSTOMER = {
    "null": Refusal(refusal(None)),
    "file": Refusal(refusal("file"), told="file"),
    "file-422": Refusal(refusal("file"), told="file", status=422),
    "file-of-stats": Refusal(refusal("file"), told="audio", path=STATS),
    "file-of-openai": Refusal(refusal("file"), told="file", path=OPENAI),
    "file-of-litellm": Refusal(refusal("file"), told="file", path=LITELLM),
    "language": Refusal(refusal("language"), {"language": "en"}, "language"),
    "prompt": Refusal(refusal("prompt"), {"prompt": "names"}, "prompt"),
    "temperature": Refusal(refusal("temperature"), {"temperature": "0.5"}, "temperature"),
    "further": Refusal(refusal("beam_size"), {"beam_size": "999"}, "beam_size"),
    "flat": Refusal(flat("file"), told="file", kind="mistral"),
    "located": Refusal(located("file"), told="file", kind="inference"),
    "deepgram": Refusal(SAID, told="file", kind="deepgram"),
}
OF_OURS = {
    "response_format": Refusal(refusal("response_format")),
    "response_format-sent": Refusal(refusal("response_format"), {"response_format": "srt"}),
    "chunking_strategy": Refusal(refusal("chunking_strategy")),
    "model": Refusal(refusal("model")),
    "granularities": Refusal(refusal("timestamp_granularities[]")),
    "include": Refusal(refusal("include")),
    "language-not-sent": Refusal(refusal("language")),
    "prompt-not-sent": Refusal(refusal("prompt")),
    "further-not-sent": Refusal(refusal("beam_size")),
    "page": Refusal(PAGE),
    "page-422": Refusal(PAGE, status=422),
    "empty": Refusal(b""),
    "list": Refusal(b"[1]"),
    "text": Refusal(b'"no"'),
    "cut": Refusal(b'{"error": {"message": "no", "param": "file"'),
    "deep": Refusal(b'{"error": ' + b"[" * 200_000),
    "flat-page": Refusal(PAGE, kind="mistral"),
    "flat-model": Refusal(flat("model"), kind="mistral"),
    "located-model": Refusal(located("model"), kind="inference"),
    "deepgram-page": Refusal(PAGE, kind="deepgram"),
    "deepgram-deep": Refusal(b"[" * 200_000, kind="deepgram"),
}
REFUSALS = OF_THE_CUSTOMER | OF_OURS
MODELS |= {f"refused-{name}": (refused.kind, "b") for name, refused in REFUSALS.items()}
MODELS |= {f"refused-alone-{name}": (refused.kind,) for name, refused in OF_OURS.items()}


def refused(place: Place, name: str, model: str, customer: Customer | None = None) -> httpx.Response:
    how = REFUSALS[name]
    place.upstreams[how.kind].always(Script(status=how.status, body=how.body), model)
    answer = place.ask(model, how.path, customer=customer, **how.sent)
    assert len(place.upstreams[how.kind].asked(model)) == 1
    return answer


@pytest.mark.parametrize("name", OF_THE_CUSTOMER)
def test_a_refusal_of_what_the_customer_sent_is_told(place: Place, name: str) -> None:
    customer = place.office.open()
    answer = refused(place, name, f"refused-{name}", customer)
    error = envelope(answer)
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_input", REFUSALS[name].told)
    assert "It is not right." in error["message"]
    assert place.upstreams["b"].asked(f"refused-{name}") == []
    assert place.office.money(customer.account) == (1_000_000, 0)


@pytest.mark.parametrize("name", OF_OURS)
def test_a_refusal_of_what_we_chose_is_the_next_ones_turn(place: Place, name: str) -> None:
    answer = refused(place, name, f"refused-{name}")
    assert place.served(answer) == ("b", "2")


@pytest.mark.parametrize("name", OF_OURS)
def test_and_its_words_are_not_the_customers_to_read(place: Place, name: str) -> None:
    how = REFUSALS[name]
    if how.status == 422 and how.kind == "deepgram":
        pytest.skip("Deepgram's 422 is an incomplete upload, which is ours to repeat and not a refusal")
    error = envelope(answer := refused(place, name, f"refused-alone-{name}"))
    assert (answer.status_code, error["code"]) == (502, "provider_unavailable")
    assert f"{how.kind}: unsupported ({how.status})" in error["message"]
    assert "not right" not in answer.text


def forms_of(key: str) -> list[str]:
    """How a provider may repeat a key."""
    coded = [base64.b64encode(text.encode()).decode() for text in (key, f"Bearer {key}")]
    return [key, f"Bearer {key}", quote(key, safe=""), *coded]


LEAKS = {
    "plain": f"Your key is {KEY}.",
    "coded": f"You sent {forms_of(KEY)[3]} and {forms_of(KEY)[4]}.",
    "twice": f"{KEY}{KEY}",
    "cut": "x" * (300 - len(KEY) // 2) + KEY,
}
MODELS |= {f"leak-{kind}-{leak}": (kind,) for kind in KINDS for leak in LEAKS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leak", LEAKS)
def test_a_customer_is_not_told_the_providers_key(place: Place, kind: str, leak: str) -> None:
    body = refusal("file", LEAKS[leak])
    if kind == "deepgram":
        body = json.dumps({"err_code": "Bad Request", "err_msg": LEAKS[leak]}).encode()
    place.upstreams[kind].always(Script(status=400, body=body), f"leak-{kind}-{leak}")
    answer = place.ask(f"leak-{kind}-{leak}")
    assert answer.status_code == 400
    for form in forms_of(KEY):
        assert form not in answer.text
    assert KEY[: len(KEY) // 2] not in answer.text
    if leak != "cut":
        assert "[removed]" in envelope(answer)["message"]


MODELS |= {"too-large": ("inference", "b")}


def test_a_file_that_our_own_service_finds_too_large_is(place: Place) -> None:
    body = json.dumps(TooLarge("Maximum content size limit exceeded.", param="file").envelope()).encode()
    place.upstreams["inference"].always(Script(status=413, body=body), "too-large")
    answer = place.ask("too-large")
    error = envelope(answer)
    assert (answer.status_code, error["param"], error["type"]) == (413, "file", "invalid_request_error")
    assert "Maximum content size" in error["message"]


MODELS |= {"translated": ("a translation = true",)}


@pytest.mark.parametrize("stream", ["true", "True", "1"])
def test_a_translation_is_not_streamed(place: Place, stream: str) -> None:
    answer = place.ask("translated", TRANSLATIONS, stream=stream)
    assert (answer.status_code, envelope(answer)["param"]) == (400, "stream")
    assert place.upstreams["a"].asked("translated") == []


def test_a_translation_that_is_not_to_be_streamed_is_one(place: Place) -> None:
    assert place.ask("translated", TRANSLATIONS, stream="false").status_code == 200
    place.upstreams["a"].sent.clear()


MODELS |= {"channels": ("deepgram",)}


def test_deepgram_is_not_asked_for_several_transcripts_nor_to_send_them_elsewhere(place: Place) -> None:
    private: dict[str, Any] = {
        "multichannel": "true",
        "channels": "2",
        "callback": "http://127.0.0.1/",
        "callback_method": "put",
    }
    assert place.ask("channels", filler_words="true", **private).status_code == 200
    (sent,) = place.upstreams["deepgram"].asked("channels")
    query = dict(sent.query)
    assert query["filler_words"] == "true"
    assert private.keys().isdisjoint(query)


# --- Refusals that cannot be read, and waits that make no sense -------------------------------------

DATES = [
    "Wed, 21 Oct 2099 99999999999999999999:00:00 GMT",
    "Wed, 99999999999999999999 Oct 2099 07:28:00 GMT",
    "Wed, 21 Oct 99999999999999999999 07:28:00 GMT",
    "Wed, 21 Oct 2099 07:28:00 +99999999999999999999",
    "Wed, 21 Oct 2099 07:28:00 -9999",
    "Wed, 21 Oct 0001 07:28:00 -0000",
    "Wed, 21 Oct 9999 23:59:59 -2359",
    "Wed, 31 Feb 2099 07:28:00 GMT",
    "1e400",
    "-1e400",
    "nan",
    "9" * 5000,
    "5, 6",
    "",
]
MODELS |= {f"date-{number}": ("a", "b") for number in range(len(DATES))}
MODELS |= {f"date-alone-{number}": ("a",) for number in range(len(DATES))}


@pytest.mark.parametrize("number", range(len(DATES)))
def test_a_wait_that_makes_no_sense_is_still_a_rate_limit(place: Place, number: int) -> None:
    script = Script(status=429, headers=(("retry-after", DATES[number]),))
    for model in (f"date-{number}", f"date-alone-{number}"):
        place.upstreams["a"].always(script, model)
    assert place.served(place.ask(f"date-{number}")) == ("b", "2")
    answer = place.ask(f"date-alone-{number}")
    assert (answer.status_code, envelope(answer)["code"]) == (429, "rate_limited")
    assert 1 <= int(answer.headers["retry-after"]) <= 24 * 3600


DEEP = {"list": b"[" * 200_000, "error": b'{"error": ' + b"[" * 200_000, "detail": b'{"detail": ' + b'{"a":' * 100_000}
MODELS |= {f"deep-{status}-{kind}-{name}": (kind,) for status in (401, 429) for kind in KINDS for name in DEEP}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DEEP)
def test_a_401_is_one_whatever_it_says(place: Place, kind: str, name: str) -> None:
    model = f"deep-401-{kind}-{name}"
    place.upstreams[kind].always(Script(status=401, body=DEEP[name]), model)
    answer = place.ask(model)
    assert answer.status_code == 502
    assert f"{kind}: credential (401)" in envelope(answer)["message"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DEEP)
def test_a_429_is_one_whatever_it_says_and_is_waited_out(place: Place, kind: str, name: str) -> None:
    model = f"deep-429-{kind}-{name}"
    place.upstreams[kind].always(Script(status=429, body=DEEP[name], headers=(("retry-after", "600"),)), model)
    for attempts in ("1", "0"):  # the second time nobody is asked, and that is told
        answer = place.ask(model)
        assert (answer.status_code, answer.headers["x-voxgate-attempts"]) == (429, attempts)
        assert 590 <= int(answer.headers["retry-after"]) <= 600
    assert len(place.upstreams[kind].asked(model)) == 1


# --- The cache --------------------------------------------------------------------------------------

MODELS |= {"kept": ("a",), "silent": ("a",), "uncached": ("a",)}


def ruined(entry: Path, how: str) -> None:
    entry.unlink()
    if how == "directory":  # can neither be read nor replaced
        entry.mkdir()
    elif how == "endless":
        with entry.open("wb") as file:
            file.truncate(65 * MB)
    else:
        entry.write_bytes({"garbage": b"garbage", "no-text": b"\xff\xfe", "deep": b"[" * 200_000, "empty": b""}[how])


@pytest.mark.parametrize("how", ["directory", "endless", "garbage", "no-text", "deep", "empty"])
def test_an_entry_that_cannot_be_read_costs_nobody_an_answer(place: Place, how: str) -> None:
    customer = place.office.open()
    assert place.served(place.ask("kept", customer=customer, headers=CACHED)) == ("a", "1")
    (entry,) = (place.server.data_dir / "staging" / "results" / customer.account).glob("cache-*")
    ruined(entry, how)
    answer = place.ask("kept", customer=customer, headers=CACHED)
    assert place.served(answer) == ("a", "1")
    assert answer.json()["text"] == TEXT
    assert place.office.money(customer.account) == (1_000_000 - 2 * 52, 0)
    again = "1" if how == "directory" else "0"
    assert place.served(place.ask("kept", customer=customer, headers=CACHED)) == ("a", again)


def test_a_cache_that_cannot_be_written_costs_nobody_an_answer(place: Place) -> None:
    customer = place.office.open()
    results = place.server.data_dir / "staging" / "results"
    results.mkdir(parents=True, exist_ok=True)
    (results / customer.account).write_bytes(b"no directory")
    for _ in range(2):
        assert place.served(place.ask("kept", customer=customer, headers=CACHED)) == ("a", "1")
    assert place.office.money(customer.account) == (1_000_000 - 2 * 52, 0)


def test_that_nothing_was_heard_is_not_kept(place: Place) -> None:
    customer = place.office.open()
    place.upstreams["a"].will(Script(body=b'{"text": ""}'), model="silent")
    assert place.ask("silent", customer=customer, headers=CACHED).json()["text"] == ""
    answer = place.ask("silent", customer=customer, headers=CACHED)
    assert (answer.json()["text"], answer.headers["x-voxgate-attempts"]) == (TEXT, "1")


@pytest.mark.parametrize("ttl", ["abc", "0", "-1", "1e9", "", "99999999999999999999"])
@pytest.mark.parametrize("cache", [{}, {"x-voxgate-cache": "off"}])
def test_how_long_to_keep_what_is_not_kept_does_not_matter(place: Place, ttl: str, cache: dict[str, str]) -> None:
    answer = place.ask("uncached", headers=cache | {"x-voxgate-cache-ttl": ttl})
    assert place.served(answer) == ("a", "1")


class Torn(OpenAIDialect):
    """One that cannot write down what was heard, or whose customer leaves before it is charged."""

    def __init__(self, how: str) -> None:
        self.how = how

    def render(self, outcome: Outcome) -> Body:
        if self.how == "fails":
            raise RuntimeError("it cannot be told")
        if self.how == "leaves":
            raise asyncio.CancelledError
        return super().render(outcome)


@pytest.mark.parametrize("how", ["fails", "leaves"])
def test_what_nobody_was_told_nobody_has_for_less_later(tmp_path: Path, how: str) -> None:
    with OpenAIUpstream() as upstream, contextlib.closing(asyncio.new_event_loop()) as loop:
        catalog, secret = tmp_path / "catalog.toml", keys.generate()
        catalog.write_text(
            f'[providers.a]\nkind = "openai"\nbase_url = "{upstream.base_url}"\napi_key = "env:UPSTREAM_KEY"\n'
            '[models.m]\ndeployments = [{ provider = "a", upstream_model = "m", price_per_minute = "0.001" }]\n'
        )
        store = SqliteStore(tmp_path / "voxgate.sqlite")

        async def furnish() -> str:
            account = await store.create_account("acme")
            await store.post(Entry(account.id, EntryKind.TOP_UP, 1_000_000, time.time(), "opening"))
            await store.create_key(Key(id="key_1", account_id=account.id, created=0), keys.digest(secret))
            return account.id

        account = loop.run_until_complete(furnish())
        settings = Settings(catalog=str(catalog), data_dir=tmp_path, spool_dir=tmp_path)
        gateway = build_gateway(settings, store, {"UPSTREAM_KEY": KEY})

        def ask(dialect: Dialect) -> Response:
            form = httpx.Request("POST", "https://api", data={"model": "m"}, files={"file": ("a", SPEECH.read_bytes())})
            headers = {"authorization": f"Bearer {secret}", "content-type": form.headers["content-type"]} | CACHED

            async def body() -> AsyncIterator[bytes]:
                yield form.read()

            application = Application({OPENAI: {"POST": transcription(gateway.transcriber, dialect)}})
            return loop.run_until_complete(application.handle(Request("POST", OPENAI, headers, body())))

        try:
            with contextlib.suppress(asyncio.CancelledError):
                assert ask(Torn(how)).status == 500
            charged = 1_000_000 - loop.run_until_complete(store.balance(account)).balance
            assert charged == 0
            answer = ask(OpenAIDialect())
            assert (answer.status, answer.headers["x-voxgate-attempts"]) == (200, "1")
            assert ask(OpenAIDialect()).headers["x-voxgate-attempts"] == "0"
            assert len(upstream.sent) == 2
        finally:
            loop.run_until_complete(gateway.close())


# --- Time: each one's share, and conversions within it ----------------------------------------------

SECONDS = 3.0
# What a busy machine may add: less than one who had the whole time twice.
SLACK = 0.9 * SECONDS
STALLS = {"silent": LATE, "stalls": Script(stall_after=10), "drips": Script(drip=0.3)}
SLOW: dict[str, tuple[str, ...]] = {f"first-{stall}": ("a", "b") for stall in STALLS}
SLOW |= {"all": ("a", "b", "c"), "one": ("a",)}
SLOW |= {"convert": ('a containers = ["ogg"]',), "convert-first": ('a containers = ["ogg"]', "b")}
SLOW |= {"damaged": ('a containers = ["ogg"]', "b"), "full": ('a containers = ["flac"]', "b")}
MODELS |= {"left": ('a containers = ["ogg"]',)}


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One whose providers may each take all of the time."""
    limits = dict.fromkeys(("VOXGATE_REQUEST_TIMEOUT", "VOXGATE_PROVIDER_TIMEOUT"), str(SECONDS))
    with opened(tmp_path_factory.mktemp("hasty"), SLOW, **limits) as place:
        yield place


@dataclass(frozen=True)
class Timed:
    response: httpx.Response
    seconds: float


@pytest.fixture(scope="module")
def slow(hasty: Place, hours: bytes) -> dict[str, Timed]:
    """All that takes its time, side by side."""
    for stall, script in STALLS.items():
        hasty.upstreams["a"].always(script, f"first-{stall}")
    for name in "abc":
        hasty.upstreams[name].always(LATE, "all")
    hasty.upstreams["a"].always(LATE, "one")
    names = [*(f"first-{stall}" for stall in STALLS), "all", "one", "convert", "convert-first"]

    def ask(model: str) -> Timed:
        audio = hours if model.startswith("convert") else None
        begun = time.monotonic()
        return Timed(hasty.ask(model, audio=audio), time.monotonic() - begun)

    with ThreadPoolExecutor(len(names)) as clients:
        return dict(zip(names, clients.map(ask, names), strict=True))


@pytest.mark.parametrize("stall", STALLS)
def test_one_that_stalls_leaves_the_next_its_share(hasty: Place, slow: dict[str, Timed], stall: str) -> None:
    timed = slow[f"first-{stall}"]
    assert hasty.served(timed.response)[0] == "b"
    assert timed.response.json()["text"] == TEXT
    assert timed.seconds < SECONDS + SLACK


def test_when_all_stall_each_had_its_share(hasty: Place, slow: dict[str, Timed]) -> None:
    timed = slow["all"]
    error = envelope(timed.response)
    assert (timed.response.status_code, error["code"]) == (502, "provider_unavailable")
    for name in "abc":
        assert f"{name}: transient" in error["message"]
        assert hasty.upstreams[name].asked("all")
    assert 0.9 * SECONDS < timed.seconds < SECONDS + SLACK


def test_one_that_is_alone_has_all_of_it(hasty: Place, slow: dict[str, Timed]) -> None:
    assert slow["one"].response.status_code == 502
    assert 0.9 * SECONDS < slow["one"].seconds < SECONDS + SLACK
    assert len(hasty.upstreams["a"].asked("one")) == 1


def test_a_conversion_ends_with_the_requests_time(hasty: Place, slow: dict[str, Timed]) -> None:
    timed = slow["convert"]
    assert (timed.response.status_code, envelope(timed.response)["code"]) == (502, "provider_unavailable")
    assert timed.seconds < SECONDS + 3 + SLACK  # the upload is measured before
    assert hasty.upstreams["a"].asked("convert") == []
    assert hasty.failures("a/convert") == 0
    until(lambda: hasty.spooled() == 0, 2)


def test_one_that_is_not_done_in_time_leaves_the_next_its_share(hasty: Place, slow: dict[str, Timed]) -> None:
    timed = slow["convert-first"]
    assert hasty.served(timed.response)[0] == "b"
    assert timed.seconds < SECONDS + 3 + SLACK
    assert hasty.upstreams["a"].asked("convert-first") == []
    assert hasty.failures("a/convert-first") == 0


def damaged() -> bytes:
    """A recording whose length is known and of which most cannot be decoded."""
    content = (DATA / "a-m4a-moovfirst.m4a").read_bytes()
    size = len(content)
    return content[: size // 2] + bytes(int(size * 0.95) - size // 2) + content[int(size * 0.95) :]


def test_what_cannot_be_converted_may_still_be_taken_as_it_is(hasty: Place) -> None:
    audio = damaged()
    for _ in range(6):
        assert hasty.served(hasty.ask("damaged", audio=audio))[0] == "b"
    assert hasty.upstreams["a"].asked("damaged") == []
    assert hasty.upstreams["b"].asked("damaged")[0].audio == audio
    assert hasty.failures("a/damaged") == 0
    assert hasty.served(hasty.ask("damaged"))[0] == "a"  # it is not out of order


def noise(seconds: int) -> bytes:
    file, rate = io.BytesIO(), 16_000
    samples = np.random.default_rng(1).integers(-9000, 9000, seconds * rate, dtype=np.int16)
    with av.open(file, "w", format="mp3") as media:
        stream = media.add_stream("mp3", rate=rate)
        assert isinstance(stream, AudioStream)
        stream.layout, stream.bit_rate = "mono", 16_000
        resampler = av.AudioResampler(format=stream.format, layout="mono", rate=rate, frame_size=576)
        frame = AudioFrame.from_ndarray(samples.reshape(1, -1), format="s16", layout="mono")
        frame.sample_rate = rate
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            media.mux(stream.encode(piece))
        media.mux(stream.encode(None))
    return file.getvalue()


@contextlib.contextmanager
def full(server: Server, size: int) -> Iterator[None]:
    """No file of its grows beyond `size`, which is an `OSError` there, as with a full disk."""
    before = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_not_the_providers_fault(hasty: Place) -> None:
    audio = noise(240)  # 7 MB as FLAC
    with full(hasty.server, 5 * MB):
        answer = hasty.ask("full", audio=audio)
    assert hasty.served(answer)[0] == "b"
    assert hasty.upstreams["a"].asked("full") == []
    assert hasty.failures("a/full") == 0
    until(lambda: hasty.spooled() == 0, 2)
    assert hasty.served(hasty.ask("full", audio=audio))[0] == "a"


def test_a_conversion_stops_when_its_customer_leaves(place: Place, hours: bytes) -> None:
    customer = place.office.open()
    before = place.spooled()
    request = httpx.Request(
        "POST",
        place.server.url + ROUTER,
        headers=customer.headers,
        data={"model": "left"},
        files={"file": ("a.flac", hours)},
    )
    head = [f"POST {ROUTER} HTTP/1.1", *(f"{name}: {value}" for name, value in request.headers.items()), "", ""]
    address = urlsplit(place.server.url)
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=30) as wire:
        wire.sendall("\r\n".join(head).encode() + request.read())
        until(lambda: place.spooled() == before + 2, 10)  # what came, and what is made of it
        time.sleep(0.2)
    until(lambda: place.spooled() == before, 2)
    until(lambda: place.office.money(customer.account) == (1_000_000, 0), 5)
    assert place.upstreams["a"].asked("left") == []
    assert place.failures("a/left") == 0


# --- One probe, and what others know ----------------------------------------------------------------


def offer(upstream: Upstream, name: str) -> Deployment:
    entry = ProviderEntry(name=name, kind="openai", base_url=upstream.base_url, api_key="env:UPSTREAM_KEY")
    return Deployment(provider=entry, upstream_model="m", price=1, features=frozenset())


async def serve_together(fallback: Fallback, offers: tuple[Deployment, ...], count: int) -> list[str]:
    """Who served each of so many requests that begin at once."""
    spool = Path(tempfile.gettempdir())

    async def one() -> str:
        with Upload(spool) as upload:
            upload.write(SPEECH.read_bytes())
            request = TranscriptionRequest(model="m")
            async with Prepared(
                request=request, audio=upload, container=MP3, duration=3.03, spool_dir=spool
            ) as prepared:
                served = await fallback.serve(prepared, offers, attempted=lambda *_: None)
                return served.deployment.provider.name

    return list(await asyncio.gather(*(one() for _ in range(count))))


@pytest.mark.parametrize("probe", [GOOD, Script(status=500), Script(delay=0.5, status=500), Script(delay=0.5)])
def test_one_of_many_that_come_at_once_is_the_probe(probe: Script) -> None:
    with OpenAIUpstream() as bad, OpenAIUpstream() as well:
        offers = (offer(bad, "a"), offer(well, "b"))
        clock, secrets = Clock(), StoredSecrets({"UPSTREAM_KEY": KEY})
        health = Health(clock=clock)

        async def run() -> list[str]:
            providers = {
                deployment.provider.name: HttpProvider(
                    adapter=OpenAIAdapter(),
                    base_url=deployment.provider.base_url,
                    api_key=deployment.provider.api_key,
                    secrets=secrets,
                    timeouts=Timeouts(),
                    tls=False,
                )
                for deployment in offers
            }
            fallback = Fallback(
                providers=providers, health=health, outages=None, provider_timeout=10, request_timeout=10
            )
            try:
                bad.always(Script(status=500))
                await serve_together(fallback, offers, 8)
                assert not health.available("a/m")
                clock.now += 15
                assert health.available("a/m")
                bad.sent.clear()
                bad.always(probe)
                return await serve_together(fallback, offers, 24)
            finally:
                for provider in providers.values():
                    await provider.close()

        served = asyncio.run(run())
        assert len(bad.sent) == 1
        assert served.count("a") == (1 if probe.status == 200 else 0)
        assert served.count("a") + served.count("b") == 24


class Young(asyncio.SelectorEventLoop):
    """On a machine that started just now, as a function's does."""

    age = 6.0

    def time(self) -> float:
        real = super().time()
        self._born = getattr(self, "_born", real)
        return real - self._born + self.age


@dataclass
class Others:
    """A store in which somebody has reported `a/m`."""

    asked: int = 0

    async def outages(self) -> dict[str, float]:
        self.asked += 1
        return {"a/m": time.time() + 60}

    async def report_outage(self, deployment: str, until: float) -> None:
        raise AssertionError


@pytest.mark.parametrize("age", [0.0, 6.0, 29.0, 31.0, 1e6])
def test_what_others_know_is_asked_for_at_once_however_young_the_machine_is(age: float) -> None:
    others, health = Others(), Health()
    fallback = Fallback(providers={}, health=health, outages=others, provider_timeout=1, request_timeout=1)

    class Aged(Young):
        pass

    Aged.age = age

    async def run() -> None:
        await fallback.learn()
        assert (others.asked, health.available("a/m")) == (1, False)
        await fallback.learn()
        assert others.asked == 1

    with asyncio.Runner(loop_factory=Aged) as runner:
        runner.run(run())


# --- Keys -------------------------------------------------------------------------------------------


@dataclass
class Manager:
    """AWS's client, as far as it is used; `secret` None is one that cannot be reached."""

    secret: str | None = "first"
    asked: int = 0

    def get_secret_value(self, *, SecretId: str) -> dict[str, str]:
        self.asked += 1
        if self.secret is None:
            raise EndpointConnectionError(endpoint_url="https://secretsmanager")
        return {"SecretString": self.secret}


@dataclass
class Vault:
    manager: Manager = field(default_factory=Manager)
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        client: Any = lambda: self.manager  # noqa: E731
        self.secrets = StoredSecrets({}, client=client, clock=self.clock)

    def get(self) -> str:
        return asyncio.run(self.secrets.get("secret:up"))

    def refuse(self) -> None:
        self.secrets.forget("secret:up")


@pytest.mark.parametrize("after", [1.0, 301.0, 86_400.0])
@pytest.mark.parametrize("refused", [False, True])
def test_a_key_that_was_known_is_kept_while_it_cannot_be_looked_up(after: float, refused: bool) -> None:
    vault = Vault()
    assert vault.get() == "first"
    vault.manager.secret = None
    vault.clock.now += after
    if refused:
        vault.refuse()
    assert [vault.get() for _ in range(5)] == ["first"] * 5
    vault.manager.secret = "second"
    vault.clock.now += 301
    assert vault.get() == "second"


def test_while_it_cannot_be_looked_up_that_is_not_tried_for_each_request() -> None:
    vault = Vault()
    vault.get()
    vault.manager.secret = None
    vault.clock.now += 301
    before = vault.manager.asked
    for _ in range(20):
        vault.get()
    assert vault.manager.asked - before == 1


def test_a_refused_key_is_looked_up_again_at_most_once_in_ten_seconds() -> None:
    vault = Vault()
    for _ in range(50):
        vault.get()
        vault.refuse()
    assert vault.manager.asked <= 2
    before = vault.manager.asked
    for _ in range(30):
        vault.clock.now += 1
        vault.get()
        vault.refuse()
    assert vault.manager.asked - before <= 4


def test_a_key_that_was_changed_is_used_once_the_old_one_is_refused() -> None:
    vault = Vault()
    assert vault.get() == "first"
    for secret in ("second", "third"):
        vault.clock.now += 60
        vault.manager.secret = secret
        vault.refuse()
        assert vault.get() == secret


CURIOUS = {
    "odd": "sk/+=x&y z",
    "quoted": 'a"b\\c',
    **{f"short-{key}": key for key in "te1"},
}


@pytest.fixture(scope="module")
def curious(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Customer, Upstream]]:
    """A gateway whose providers' keys are odd ones, and a customer who may see what is sent."""
    directory = tmp_path_factory.mktemp("curious")
    with OpenAIUpstream(key="") as upstream:
        lines, environment = [], {}
        for number, (name, key) in enumerate(CURIOUS.items()):
            lines += [
                f'[providers."{name}"]',
                'kind = "openai"',
                f'base_url = "{upstream.base_url}"',
                f'api_key = "env:KEY_{number}"',
            ]
            offered = f'provider = "{name}", upstream_model = "{name}", price_per_minute = "0.001"'
            lines += [f'[models."{name}"]', f"deployments = [{{ {offered} }}]"]
            environment[f"KEY_{number}"] = key
        catalog = directory / "catalog.toml"
        catalog.write_text("\n".join(lines), encoding="utf-8")
        process, server = start_server(directory, VOXGATE_CATALOG=str(catalog), **environment)
        yield server, Office(directory).open(scopes=DEBUG), upstream
        stop_server(process)


Curious = tuple[Server, Customer, Upstream]


def seen(curious: Curious, name: str, said: dict[str, Any], **form: Any) -> dict[str, Any]:
    server, customer, upstream = curious
    upstream.will(Script(body=json.dumps(said).encode()), model=name)
    with httpx.Client(base_url=server.url, headers=customer.headers, timeout=30) as client:
        answer = send(client, LITELLM, model=name, **form)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["text"] == TEXT
    found: dict[str, Any] = body["extra_fields"]
    return found


@pytest.mark.parametrize("name", ["odd", "quoted"])
def test_no_form_of_a_key_is_seen(curious: Curious, name: str) -> None:
    key = CURIOUS[name]
    said = {form: [form, {"header": f"x {form} y"}] for form in forms_of(key)}
    shown = seen(curious, name, {"text": TEXT, "heard": said}, prompt=f"my {key}")
    texts = "\n".join(texts_in(shown))
    for form in forms_of(key):
        assert form not in texts
    assert "[removed]" in texts


def texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from texts_in(each)


@pytest.mark.parametrize("name", [name for name in CURIOUS if name.startswith("short")])
def test_a_key_of_one_character_spoils_nothing(curious: Curious, name: str) -> None:
    shown = seen(curious, name, {"text": TEXT, "number": 1})
    assert shown["raw_response"] == {"text": TEXT, "number": 1}
    assert shown["raw_request"]["method"] == "POST"


def test_nor_does_it_spoil_what_a_customer_is_told(curious: Curious) -> None:
    server, customer, upstream = curious
    upstream.will(Script(status=400, body=refusal("file", "The file is not one.")), model="short-e")
    with httpx.Client(base_url=server.url, headers=customer.headers, timeout=30) as client:
        answer = send(client, LITELLM, model="short-e")
    error = envelope(answer)
    assert (answer.status_code, error["param"]) == (400, "file")
    assert "The file is not one." in error["message"]
