"""The live socket as its clients use it: how they get in, what they say, and what they are told of what was heard."""

from __future__ import annotations

import contextlib
import io
import json
import random
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import httpx
import psutil
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from conftest import DATA, RECORDINGS, Server, start_server, stop_server, word_errors
from customers import CONTRACTS, SPEECH, Customer, Office, envelope, microdollars, send
from fakes.live import STREAM, Live, LiveInference, blocks, refusal, until, words
from voxgate.accounts import RateLimits, Scope, keys

SHORT, SHORT_TEXT = DATA / "a-wav-s16.wav", "please send the letter"
TEXT = "the weather is nice today and we are going to the park"
PAUSES = DATA / "long-slt.flac"  # three sentences
PAUSES_TEXT = next(recording.text for recording in RECORDINGS if recording.path == PAUSES)
TOKENS = "/v1/stt/tokens"
DRAIN = "6"  # seconds


def recorded(path: Path, kind: str = "s16le", rate: int = 16_000, channels: int = 1, **options: str) -> bytes:
    """A recording in another form: a raw one by the name of its samples, or Opus in `ogg` or `webm`."""
    codec = "libopus" if kind in ("ogg", "webm") else f"pcm_{kind}"
    layout = "mono" if channels == 1 else "stereo"
    content = io.BytesIO()
    with av.open(str(path)) as source, av.open(content, "w", format=kind, options=options) as made:
        stream: Any = made.add_stream(codec, rate=rate, layout=layout)
        for frame in source.decode(audio=0):
            made.mux(stream.encode(frame))
        made.mux(stream.encode(None))
    return content.getvalue()


SPOKEN = recorded(SPEECH)


@pytest.fixture(scope="module")
def office(server: Server) -> Office:
    return Office(server.data_dir)


@pytest.fixture(scope="module")
def rich(office: Office) -> Customer:
    return office.open(credit=10**9)


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, LiveInference]]:
    """A gateway before a recognizer that hears what it is told to."""
    directory = tmp_path_factory.mktemp("live")
    with LiveInference() as recognizer:
        process, server = start_server(directory, VOXGATE_INFERENCE_URL=recognizer.url)
        yield server, recognizer
        stop_server(process)


@pytest.fixture
def quick(fake: tuple[Server, LiveInference]) -> Iterator[Quick]:
    server, recognizer = fake
    yield Quick(server, recognizer)
    recognizer.forget()


class Quick:
    """Sessions that need no real recognizer."""

    def __init__(self, server: Server, recognizer: LiveInference) -> None:
        self.server, self.recognizer, self.office = server, recognizer, Office(server.data_dir)

    def live(self, customer: Customer | None = None, **how: Any) -> Live:
        return Live(self.server.url, customer or self.office.open(), **how)


def heard(server: Server, customer: Customer, audio: bytes, size: int = 3200, **how: Any) -> Live:
    """A session that is over, of that audio in pieces of that size."""
    with Live(server.url, customer, **how) as live:
        live.send(audio, size)
        live.close()
    return live


def wave(samples: bytes, kind: str, rate: int, channels: int) -> bytes:
    """These samples as a file."""
    tag, size = {"s16le": (1, 2), "f32le": (3, 4), "alaw": (6, 1), "mulaw": (7, 1)}[kind]
    form = struct.pack("<HHIIHHH", tag, channels, rate, rate * channels * size, channels * size, 8 * size, 0)
    head = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(samples))
    return b"RIFF" + struct.pack("<I", len(head) + len(samples)) + head + samples


def uploaded(server: Server, customer: Customer, audio: bytes) -> httpx.Response:
    with httpx.Client(base_url=server.url, headers=customer.headers, timeout=60) as client:
        response = send(client, audio=audio)
    assert response.status_code == 200, response.text
    return response


@pytest.fixture(scope="module")
def whole(server: Server, rich: Customer) -> str:
    """What the upload of `SHORT` says."""
    text = uploaded(server, rich, SHORT.read_bytes()).json()["text"]
    assert isinstance(text, str)
    return text


# --- Getting in -------------------------------------------------------------------------------------


def token(server: Server, customer: Customer, **body: Any) -> str:
    made = httpx.post(server.url + TOKENS, headers=customer.headers, json=body or None).json()["token"]
    assert isinstance(made, str)
    return made


WAYS = [("key", "header"), ("key", "subprotocol"), ("token", "header"), ("token", "subprotocol"), ("token", "query")]


@pytest.mark.parametrize(("what", "way"), WAYS)
def test_a_key_or_a_token_opens_a_session(quick: Quick, what: str, way: str) -> None:
    customer = quick.office.open()
    given = customer.key if what == "key" else token(quick.server, customer)
    ways: dict[str, dict[str, Any]] = {
        "header": {"headers": {"authorization": f"Bearer {given}"}},
        "subprotocol": {"subprotocols": ["voxgate.key", given]},
        "query": {"token": given},
    }
    with Live(quick.server.url, None, **ways[way]) as live:
        assert live.connection.subprotocol == ("voxgate.key" if way == "subprotocol" else None)
        live.send(blocks(1, 2))
        done = live.close()
    assert live.messages[0]["ignored"] == []
    assert microdollars(done["balance"]) == 1_000_000 - 100


NOBODY = keys.generate()
WRONG: dict[str, dict[str, Any]] = {
    "nothing": {},
    "unknown key": {"headers": {"authorization": f"Bearer {NOBODY}"}},
    "no key at all": {"headers": {"authorization": "Bearer hello"}},
    "another scheme": {"headers": {"authorization": f"Basic {NOBODY}"}},
    "unknown key as a subprotocol": {"subprotocols": ["voxgate.key", NOBODY]},
    "half a subprotocol": {"subprotocols": ["voxgate.key"]},
    "another subprotocol": {"subprotocols": ["graphql-ws", NOBODY]},
    "no token": {"token": "vt_hello"},
    "empty token": {"token": ""},
    "token that nobody made": {"token": f"vt_{NOBODY[3:]}"},
}


@pytest.mark.parametrize("how", WRONG)
def test_who_is_unknown_is_told_so_before_the_upgrade(server: Server, how: str) -> None:
    refused = refusal(server.url, None, **WRONG[how])
    assert (refused.status, refused.error["code"]) == (401, "unauthenticated")
    assert refused.error["type"] == "authentication_error"
    assert refused.headers["www-authenticate"].startswith("Bearer")
    assert NOBODY not in json.dumps(refused.error)


BAD: dict[str, tuple[dict[str, Any], int, str, str | None]] = {
    "no model": ({"model_id": None}, 400, "invalid_input", "model_id"),
    "empty model": ({"model_id": ""}, 400, "invalid_input", "model_id"),
    "unknown model": ({"model_id": "whisper-9"}, 404, "model_not_found", "model_id"),
    "encoding": ({"encoding": "mp3"}, 400, "invalid_input", "encoding"),
    "another encoding": ({"encoding": "pcm_s24le"}, 400, "invalid_input", "encoding"),
    "slow": ({"sample_rate": 7999}, 400, "invalid_input", "sample_rate"),
    "fast": ({"sample_rate": 48001}, 400, "invalid_input", "sample_rate"),
    "rate": ({"sample_rate": "16k"}, 400, "invalid_input", "sample_rate"),
    "long rate": ({"sample_rate": "1" * 5000}, 400, "invalid_input", "sample_rate"),
    "no channel": ({"channels": 0}, 400, "invalid_input", "channels"),
    "nine channels": ({"channels": 9}, 400, "invalid_input", "channels"),
    "channels": ({"channels": "stereo"}, 400, "invalid_input", "channels"),
    "language": ({"language": "xx-nothing"}, 400, "invalid_input", "language"),
    "language not spoken": ({"language": "fr"}, 400, "invalid_input", "language"),
    "interim": ({"interim_results": "perhaps"}, 400, "invalid_input", "interim_results"),
    "provider": ({"provider_id": "nobody"}, 404, "model_not_found", "model_id"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_had_is_refused_by_its_name(server: Server, office: Office, rich: Customer, what: str) -> None:
    query, status, code, param = BAD[what]
    refused = refusal(server.url, rich, **query)
    assert (refused.status, refused.error["code"]) == (status, code)
    if param is not None:
        assert refused.error["param"] == param
    assert office.money(rich.account)[1] == 0


def test_who_may_not_is_refused_before_the_upgrade(server: Server, office: Office) -> None:
    customer = office.open()
    forbidden = {
        "scope": (office.key(customer.account, scopes=frozenset({Scope.USAGE})), 403, "permission_denied"),
        "model": (office.key(customer.account, models=("whisper-large-v3",)), 403, "model_not_allowed"),
        "expired": (office.key(customer.account, expires=int(time.time()) - 1), 401, "unauthenticated"),
        "poor": (office.open(credit=0), 402, "insufficient_quota"),
    }
    for customer, status, code in forbidden.values():
        refused = refusal(server.url, customer)
        assert (refused.status, refused.error["code"]) == (status, code)
    limited = office.open(limits=RateLimits(requests_per_minute=1))
    assert refusal(server.url, limited, model_id="whisper-9").status == 404
    refused = refusal(server.url, limited)
    assert (refused.status, refused.error["code"]) == (429, "rate_limited")
    assert int(refused.headers["retry-after"]) >= 1


@pytest.mark.parametrize("known", [True, False])
def test_a_request_without_an_upgrade_is_told_what_to_do(server: Server, rich: Customer, known: bool) -> None:
    headers = rich.headers if known else {}
    response = httpx.get(server.url + STREAM, params={"model_id": "whisper-1"}, headers=headers)
    assert response.status_code == 426
    assert response.headers["upgrade"].lower() == "websocket"  # RFC 9110, 15.5.22
    envelope(response)


# --- Tokens -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "seconds"), [(None, 60), ({}, 60), ({"expires_in": 1}, 1), ({"expires_in": 3600}, 3600)]
)
def test_a_token_lasts_as_long_as_was_asked(server: Server, rich: Customer, body: Any, seconds: int) -> None:
    before = int(time.time())
    response = httpx.post(server.url + TOKENS, headers=rich.headers, json=body)
    assert response.status_code == 200, response.text
    made = response.json()
    assert made.keys() == {"token", "expires_in", "expires_at"}
    assert made["token"].startswith("vt_")
    assert made["expires_in"] == seconds
    assert before + seconds <= made["expires_at"] <= int(time.time()) + seconds + 1


BODIES = [
    *(json.dumps({"expires_in": value}).encode() for value in (0, 3601, -1, "soon", [60], 10**400)),
    b"{",
    b"[]",
    b'"x"',
    b"\xff",
    b"[" * 100_000,
    b'{"expires_in": NaN}',
    b'{"expires_in": 1e400}',
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:24]))
def test_a_bad_body_makes_no_token(server: Server, rich: Customer, body: bytes) -> None:
    headers = rich.headers | {"content-type": "application/json"}
    response = httpx.post(server.url + TOKENS, headers=headers, content=body)
    assert response.status_code == 400
    error = envelope(response)
    assert error["code"] == "invalid_input"
    assert error["param"] in ("expires_in", None)
    assert "None" not in error["message"]


def test_only_a_key_that_may_transcribe_makes_tokens(server: Server, office: Office, rich: Customer) -> None:
    assert httpx.post(server.url + TOKENS).status_code == 401
    made = {"authorization": f"Bearer {token(server, rich)}"}
    assert httpx.post(server.url + TOKENS, headers=made).status_code == 401
    reader = office.key(rich.account, scopes=frozenset({Scope.USAGE}))
    assert httpx.post(server.url + TOKENS, headers=reader.headers).status_code == 403
    assert httpx.get(server.url + TOKENS, headers=rich.headers).status_code == 405


def test_a_token_opens_nothing_else(server: Server, rich: Customer) -> None:
    made = Customer(rich.account, token(server, rich), rich.key_id)
    with httpx.Client(base_url=server.url, headers=made.headers, timeout=60) as client:
        answers = [send(client, path) for path in CONTRACTS.values()]
        answers += [client.get(path) for path in ("/v1/balance", "/v1/usage", "/v1/models")]
        answers += [client.get("/v1/balance", params={"token": made.key}, headers={"authorization": ""})]
        answers += [send(client, CONTRACTS["litellm"])]
    assert {answer.status_code for answer in answers} == {401}
    assert {envelope(answer)["code"] for answer in answers} == {"unauthenticated"}


def test_a_token_ends_and_what_it_opened_goes_on(quick: Quick) -> None:
    customer = quick.office.open()
    made = token(quick.server, customer, expires_in=2)
    with Live(quick.server.url, None, headers={"authorization": f"Bearer {made}"}) as live:
        live.read()
        time.sleep(3.1)
        refused = refusal(quick.server.url, None, token=made)
        assert (refused.status, refused.error["code"]) == (401, "unauthenticated")
        live.send(blocks(1, 1))
        assert live.close()["text"] == "word1"


def test_a_token_has_the_models_limits_and_budgets_of_its_key(quick: Quick) -> None:
    customer = quick.office.open()
    key = quick.office.key(
        customer.account, models=("whisper-1",), budget=100, limits=RateLimits(concurrent_requests=1)
    )
    made = token(quick.server, key)
    assert refusal(quick.server.url, None, token=made, model_id="whisper-large-v3").error["code"] == "model_not_allowed"
    with Live(quick.server.url, None, token=made) as live:
        live.read()
        assert refusal(quick.server.url, key).status == 429
        live.send(blocks(1, 4))
        last = live.rest()
    assert (last["error"]["code"], microdollars(last["cost"])) == ("insufficient_quota", 100)
    assert quick.office.money(customer.account) == (1_000_000 - 100, 0)
    assert refusal(quick.server.url, None, token=made).status == 402


# --- What is said -----------------------------------------------------------------------------------


def test_a_session_says_what_it_is_and_what_it_hears(server: Server, office: Office) -> None:
    customer = office.open()
    with Live(server.url, customer, utm_source="x", beam_size="5", language="en-US") as live:
        ready = live.read()
        assert live.connection.response is not None
        assert live.connection.response.headers["x-request-id"] == ready["session_id"]
        assert ready | {"session_id": "", "language": ""} == {
            "type": "ready",
            "sequence": 0,
            "session_id": "",
            "model": "whisper-1",
            "provider": "embedded",
            "language": "",
            "encoding": "pcm_s16le",
            "sample_rate": 16000,
            "channels": 1,
            "interim_results": True,
            "ignored": ready["ignored"],
        }
        assert sorted(ready["ignored"]) == ["beam_size", "utm_source"]
        assert ready["language"] == "en"
        live.send(SPOKEN, 3200)
        live.listen()  # before its end
        done = live.close()
    assert word_errors(TEXT, done["text"]) <= 0.1
    assert done["duration"] == pytest.approx(3.03, abs=0.05)
    for final in live.of("final"):
        assert 0 <= final["start"] < final["end"] <= done["duration"] + 0.001
        assert final["words"], final
        assert " ".join(word["word"] for word in final["words"]) == final["text"].strip()
        assert all(word["confidence"] is None or 0 <= word["confidence"] <= 1 for word in final["words"])
    said = [word for final in live.of("final") for word in final["words"]]
    assert said[0]["start"] < 1 < 2 < said[-1]["end"]


@pytest.mark.parametrize("milliseconds", [2, 20, 333, 8192])
def test_the_size_of_a_frame_does_not_matter(server: Server, rich: Customer, whole: str, milliseconds: int) -> None:
    live = heard(server, rich, recorded(SHORT), 32 * milliseconds)
    assert word_errors(whole, live.messages[-1]["text"]) <= 0.05
    assert microdollars(live.messages[-1]["cost"]) == 110


def test_a_sample_may_be_split_and_the_last_one_be_cut_off(server: Server, rich: Customer, whole: str) -> None:
    sizes, at = random.Random(1), 0
    speech = recorded(SHORT) + b"\1"
    with Live(server.url, rich) as live:
        while at < len(speech):
            size = sizes.choice([1, 3, 7, 641, 3333])
            live.send(speech[at : at + size])
            if sizes.random() < 0.15:
                live.send(b"")
                live.connection.send(b"", text=False)
            at += size
        done = live.close()
    assert word_errors(whole, done["text"]) <= 0.05
    assert microdollars(done["cost"]) == 110


FORMS: list[tuple[str, str, int, int]] = [
    ("pcm_s16le", "s16le", 8_000, 1),
    ("pcm_s16le", "s16le", 44_100, 2),
    ("pcm_s16le", "s16le", 48_000, 1),
    ("pcm_f32le", "f32le", 16_000, 1),
    ("pcm_f32le", "f32le", 48_000, 2),
    ("mulaw", "mulaw", 8_000, 1),
    ("alaw", "alaw", 8_000, 2),
    ("mulaw", "mulaw", 16_000, 1),
    ("opus", "ogg", 48_000, 1),
    ("opus", "webm", 48_000, 2),
]


@pytest.mark.parametrize(("encoding", "kind", "rate", "channels"), FORMS)
def test_every_encoding_is_heard(
    server: Server, rich: Customer, encoding: str, kind: str, rate: int, channels: int
) -> None:
    options = {"live": "1"} if kind == "webm" else {}  # sizes are not known when a browser records
    audio = recorded(SHORT, kind, rate, channels, **options)  # at 8 kHz it is not well understood, but alike
    query: dict[str, Any] = {} if encoding == "opus" else {"sample_rate": rate, "channels": channels}
    live = heard(server, rich, audio, 1333, encoding=encoding, **query)
    ready, done = live.messages[0], live.messages[-1]
    assert ready["encoding"] == encoding
    if encoding != "opus":
        assert (ready["sample_rate"], ready["channels"]) == (rate, channels)
        seconds = len(audio) / {"s": 2, "f": 4}.get(kind[0], 1) / rate / channels
        assert done["duration"] == pytest.approx(seconds, abs=0.001)
        audio = wave(audio, kind, rate, channels)
    upload = uploaded(server, rich, audio)
    assert word_errors(upload.json()["text"], done["text"]) <= 0.05
    assert done["cost"] == upload.headers["x-voxgate-cost"]


def test_opus_costs_what_its_file_costs_however_it_is_split(server: Server, rich: Customer) -> None:
    path = DATA / "a-opus.opus"
    upload = uploaded(server, rich, path.read_bytes())
    live = heard(server, rich, path.read_bytes(), 1, encoding="opus")
    assert live.messages[-1]["cost"] == upload.headers["x-voxgate-cost"]
    assert word_errors(upload.json()["text"], live.messages[-1]["text"]) <= 0.25


def test_no_number_of_a_sample_breaks_it(server: Server, rich: Customer) -> None:
    worst = [float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 1e-45, 2.0]
    junk = struct.pack("<7f", *worst) * 10
    silence = struct.pack("<f", 0.0) * 8000
    live = heard(server, rich, junk + silence + recorded(SHORT, "f32le") + silence, encoding="pcm_f32le")
    assert word_errors(SHORT_TEXT, live.messages[-1]["text"]) <= 0.5


def test_without_interim_results_there_are_finals_alone(server: Server, rich: Customer) -> None:
    live = heard(server, rich, recorded(SHORT), interim_results="false")
    assert live.messages[0]["interim_results"] is False
    assert not live.of("partial")
    assert live.finals


def test_sentences_with_pauses_are_finals_of_their_own(server: Server, rich: Customer) -> None:
    with Live(server.url, rich) as live:
        live.send(recorded(PAUSES))
        live.wait("final")
        live.wait("final")  # while the session goes on
        done = live.close()
    assert word_errors(PAUSES_TEXT, done["text"]) <= 0.15
    assert len(live.finals) >= 3
    assert done["duration"] == pytest.approx(5.367563, abs=0.001)


def test_an_utterance_can_be_ended_in_the_middle(server: Server, rich: Customer) -> None:
    with Live(server.url, rich) as live:
        live.tell("finalize")  # nothing was said
        live.send(recorded(SHORT))
        live.tell("finalize")
        first = live.wait("final")
        live.tell("finalize")
        live.tell("finalize")
        live.send(recorded(SHORT))
        done = live.close()
    assert word_errors(SHORT_TEXT, first["text"]) <= 0.25
    assert first["end"] <= 1.02
    later = [final for final in live.of("final") if final is not first]
    assert word_errors(SHORT_TEXT, " ".join(final["text"] for final in later)) <= 0.25
    assert later[0]["start"] >= 1.0
    assert done["duration"] == pytest.approx(2.02, abs=0.01)


@pytest.mark.parametrize("name", ["silence.flac", "tone.flac"])
def test_where_nothing_is_said_nothing_comes(server: Server, rich: Customer, name: str) -> None:
    live = heard(server, rich, recorded(DATA / name))
    done = live.messages[-1]
    assert (live.finals, done["text"]) == ([], "")
    assert (done["duration"], microdollars(done["cost"])) == (2.0, 200)


def test_who_closes_at_once_is_told_that_nothing_came(server: Server, office: Office) -> None:
    customer = office.open()
    for encoding in ("pcm_s16le", "opus"):
        with Live(server.url, customer, encoding=encoding) as live:
            done = live.close()
        assert [message["type"] for message in live.messages] == ["ready", "done"]
        assert (done["text"], done["duration"], done["usage"]["seconds"]) == ("", 0, 0)
        assert (microdollars(done["cost"]), microdollars(done["balance"])) == (0, 1_000_000)
    assert office.money(customer.account) == (1_000_000, 0)


def test_two_sessions_at_once_hear_each_its_own(server: Server, rich: Customer) -> None:
    speech = {SHORT: SHORT_TEXT, DATA / "c-slt.mp3": "she said that they would come back in the morning"}
    with ThreadPoolExecutor(2) as pool:
        lives = list(pool.map(lambda path: heard(server, rich, recorded(path)), speech))
    for live, text in zip(lives, speech.values(), strict=True):
        assert word_errors(text, live.messages[-1]["text"]) <= 0.15
    assert len({live.messages[0]["session_id"] for live in lives}) == 2


def test_many_sessions_at_once_hear_each_its_own(quick: Quick) -> None:
    customer = quick.office.open()

    def one(number: int) -> list[str]:
        with quick.live(customer) as live:
            live.send(blocks(number, number + 9), 1600 + number)
            live.close()
        return live.finals

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(1, 161, 10))) == [words(number, number + 9) for number in range(1, 161, 10)]
    assert quick.office.money(customer.account) == (1_000_000 - 16 * 500, 0)


def test_a_full_recognizer_says_so_before_the_upgrade(tmp_path: Path) -> None:
    process, server = start_server(tmp_path, VOXGATE_LIVE_WORKERS="2", VOXGATE_ENGINE_WORKERS="1")
    office = Office(tmp_path)
    customer = office.open()

    def crowd(stack: contextlib.ExitStack) -> None:
        for _ in range(64):
            stack.enter_context(Live(server.url, customer)).read()

    try:
        with contextlib.ExitStack() as stack, pytest.raises(InvalidStatus) as refused:
            crowd(stack)
        response = refused.value.response
        assert response.status_code == 503
        assert json.loads(response.body)["error"]["code"] == "overloaded"
        assert int(response.headers["retry-after"]) >= 1
        until(lambda: _takes(server, customer))
        until(lambda: office.money(customer.account) == (1_000_000, 0))
    finally:
        stop_server(process)


def _takes(server: Server, customer: Customer) -> bool:
    try:
        with Live(server.url, customer) as live:
            live.close()
    except InvalidStatus:
        return False
    return True


# --- What is wrong ----------------------------------------------------------------------------------

GARBAGE = [
    "",
    "hello",
    "null",
    "7",
    "[]",
    '"close"',
    "{}",
    '{"type": null}',
    '{"type": 7}',
    '{"type": ["close"]}',
    '{"type": "Close"}',
    '{"type": "audio"}',
    '{"type": NaN}',
    '{"type": ' + "9" * 5000 + "}",
    '{"type": 1e999}',
    "[" * 100_000,
    '{"type": "close"',
    '{"type": "close"} {}',
    "\0",
    "x" * 524_288,
]


@pytest.mark.parametrize("spoken", [False, True], ids=["before any audio", "amid audio"])
def test_what_is_no_message_is_told_of_and_the_session_goes_on(quick: Quick, spoken: bool) -> None:
    with quick.live() as live:
        if spoken:
            live.send(blocks(1, 1) + b"\xc8")  # in the middle of a sample
        for garbage in GARBAGE:
            live.connection.send(garbage)
        for _ in GARBAGE:
            error = live.wait("error")
            assert (error["fatal"], error["error"]["code"]) == (False, "invalid_input")
            assert error["error"]["type"] == "invalid_request_error"
            assert len(error["error"]["message"]) < 500
        live.send(b"\0" + blocks(2, 2)[2:] if spoken else blocks(1, 2))
        done = live.close()
    assert live.finals == words(1, 2)
    assert done["duration"] == pytest.approx(1.0)


def test_half_a_character_is_no_failure_of_ours(quick: Quick) -> None:
    """JSON can say what UTF-8 cannot."""
    with quick.live() as live:
        for garbage in ('{"type": "\\ud800"}', '"\\udfff"', '{"\\ud800": 1}'):
            live.connection.send(garbage)
            error = live.wait("error")
            assert (error["fatal"], error["error"]["code"]) == (False, "invalid_input")
        live.send(blocks(1, 1))
        assert live.close()["text"] == "word1"


def test_controls_without_audio_and_with_more_than_their_type_are_taken(quick: Quick) -> None:
    with quick.live() as live:
        for text in ('{"type": "finalize"}', '{"type": "keepalive", "more": 1}', ' {"type":\n"finalize"} '):
            live.connection.send(text)
        live.send(blocks(1, 1))
        done = live.close()
    assert [message["type"] for message in live.messages] == ["ready", "partial", "final", "done"]
    assert done["text"] == "word1"


def test_what_follows_the_end_is_ignored(quick: Quick) -> None:
    with quick.live() as live:
        live.send(blocks(1, 1))
        live.tell("close")
        with contextlib.suppress(ConnectionClosed):
            live.send(blocks(2, 2))
            live.connection.send("garbage")
            live.tell("close")
        done = live.rest()
    assert (done["type"], done["text"], done["duration"], live.code) == ("done", "word1", 0.5, 1000)


MEBIBYTE = (2**20).to_bytes(8)
TOO_BIG = {  # RFC 6455, 5.2
    "audio": b"\x82\xff" + MEBIBYTE + bytes(4),
    "text": b"\x81\xff" + MEBIBYTE + bytes(4),
    "one byte": b"\x82\xff" + (524_289).to_bytes(8) + bytes(4),
}


@pytest.mark.parametrize("what", TOO_BIG)
def test_a_message_that_is_too_big_ends_the_session_as_soon_as_it_says_so(quick: Quick, what: str) -> None:
    customer = quick.office.open()
    with quick.live(customer) as live:
        live.send(blocks(1, 2))
        while len(live.finals) < 2:
            live.read()
        live.connection.socket.sendall(TOO_BIG[what] + bytes(100))
        last = live.rest()
    assert live.code == 1009
    assert last["type"] == "final"
    until(lambda: quick.office.money(customer.account) == (1_000_000 - 100, 0))


@pytest.mark.parametrize("message", [b"\0" * 2**20, "x" * 2**20], ids=["audio", "text"])
def test_nothing_of_a_mebibyte_is_heard(quick: Quick, message: str | bytes) -> None:
    customer = quick.office.open()
    with quick.live(customer, compression="deflate") as live:
        live.read()
        with contextlib.suppress(ConnectionClosed):
            live.connection.send(message)
        live.rest()
    assert live.code in (1009, 1006)  # who still sends may not come to read why
    until(lambda: quick.office.money(customer.account) == (1_000_000, 0))


def test_the_biggest_message_is_taken(quick: Quick) -> None:
    with quick.live() as live:
        live.send(blocks(0, 0) * 32 + b"\0\0" * 6144, 524_288)
        assert live.close()["duration"] == 524_288 / 32_000


BROKEN = {
    "no opus": b"RIFF and so on, but no opus at all" * 100,
    "mp3": SPEECH.read_bytes(),
    "wav": SHORT.read_bytes(),
    "no sound": (DATA / "noaudio.webm").read_bytes(),
    "html": (DATA / "not-html.html").read_bytes() * 100,
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_opus_is_an_error(quick: Quick, what: str) -> None:
    customer = quick.office.open()
    with quick.live(customer, encoding="opus") as live:
        with contextlib.suppress(ConnectionClosed):
            live.send(BROKEN[what], 1000)
            live.tell("close")
        last = live.rest()
    assert (last["type"], last["fatal"], last["error"]["code"], live.code) == ("error", True, "invalid_input", 4400)
    assert microdollars(last["cost"]) == 0
    assert quick.office.money(customer.account) == (1_000_000, 0)


@pytest.mark.parametrize("path", ["a-opus.opus", "a-webm.webm"])
def test_opus_that_breaks_off_or_breaks_ends_in_a_documented_way(quick: Quick, path: str) -> None:
    content, moments = (DATA / path).read_bytes(), random.Random(3)
    for number in range(8):
        broken = bytearray(content[: moments.randrange(len(content))])
        if number % 2 and broken:
            broken[moments.randrange(len(broken))] ^= 0xFF
        with quick.live(encoding="opus") as live:
            with contextlib.suppress(ConnectionClosed):
                live.send(bytes(broken), 300)
                live.tell("close")
            last = live.rest()
        assert (last["type"], live.code) in (("done", 1000), ("error", 4400))


# --- Pings, hang-ups and the end --------------------------------------------------------------------


def test_a_ping_has_its_pong(quick: Quick) -> None:
    with quick.live() as live:
        live.read()
        assert live.connection.ping(b"are you there").wait(60)
        live.close()


def test_who_hangs_up_leaves_no_process_no_place_and_no_hold(server: Server, office: Office) -> None:
    customer = office.open(limits=RateLimits(concurrent_requests=1))
    process, moments = psutil.Process(server.pid), random.Random(5)
    speech = recorded(SHORT)

    def one(speaks: bool) -> None:
        while True:
            try:
                live = Live(server.url, customer)
                break
            except InvalidStatus as refused:  # the last one's place is given back after its end
                if refused.response.status_code not in (429, 503):
                    raise
                time.sleep(0.02)
        with live:
            live.send(speech[: moments.randrange(len(speech))] if speaks else b"")
            time.sleep(moments.uniform(0, 0.2))
            live.hang_up(reset=moments.random() < 0.5)

    one(True)
    until(lambda: not office.money(customer.account)[1])
    until(lambda: _takes(server, customer))
    before = len(process.children(recursive=True))
    for number in range(10):
        one(bool(number % 3))
    until(lambda: _takes(server, customer))
    until(lambda: not office.money(customer.account)[1])
    assert len(process.children(recursive=True)) <= before
    spent = 1_000_000 - office.money(customer.account)[0]
    assert spent <= 11 * 110


def test_a_server_that_is_told_to_stop_says_what_it_heard(tmp_path: Path) -> None:
    office = Office(tmp_path)
    with LiveInference() as recognizer:
        process, server = start_server(tmp_path, VOXGATE_INFERENCE_URL=recognizer.url, VOXGATE_DRAIN_SECONDS=DRAIN)
        customer = office.open()
        with Live(server.url, customer) as live:
            live.send(blocks(1, 2) + b"\x2c\x01" * 800)  # and a bit of the third
            until(lambda: recognizer.session().seconds == 1.05)
            process.terminate()
            done = live.rest()
            live.connection.close()
        stop_server(process)
    assert (done["type"], live.code) == ("done", 1012)
    assert live.finals == words(1, 3)
    assert microdollars(done["cost"]) == 110
    assert office.money(customer.account) == (1_000_000 - 110, 0)


def test_the_recognizer_alone_speaks_the_same(tmp_path: Path) -> None:
    process, server = start_server(tmp_path, "inference", VOXGATE_DRAIN_SECONDS=DRAIN, VOXGATE_ENGINE_WORKERS="1")
    model = "default"
    try:
        with Live(server.url, None, model_id=model) as live:
            live.send(recorded(SHORT), 3200)
            done = live.close()
        assert word_errors(SHORT_TEXT, done["text"]) <= 0.25
        assert "balance" not in done
        assert refusal(server.url, None, model_id=model, encoding="mp3").status == 400
        with Live(server.url, None, model_id=model) as live:
            live.send(recorded(SHORT), 3200)
            live.listen()
            process.terminate()
            done = live.rest()
        assert (done["type"], live.code) == ("done", 1012)
        assert live.finals
    finally:
        stop_server(process)


def test_all_of_a_slow_readers_messages_come_in_order(quick: Quick) -> None:
    """The schemas and sequence numbers are looked at as they are read."""
    with quick.live(receive=4096) as live:

        def speak() -> None:
            live.send(blocks(1, 60), 1600)
            live.tell("close")

        sender = threading.Thread(target=speak)
        sender.start()
        time.sleep(0.5)
        done = live.rest()
        sender.join()
    assert live.finals == words(1, 60)
    assert (done["type"], live.code) == ("done", 1000)
