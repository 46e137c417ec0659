"""The live socket before Deepgram's: what is said there of what a client said here, and what comes back."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from websockets.exceptions import ConnectionClosed

from conftest import Server, start_server, stop_server
from customers import Customer, Office, microdollars
from fakes.live import BLOCK, RATE, Heard, Live, LiveDeepgram, Message, blocks, catalogue, refusal, until
from fakes.upstreams import KEY
from voxgate.accounts import RateLimits

CREDIT = 1_000_000
WRONG = "another-secret-key"


def words(first: int, last: int) -> list[str]:
    """As Deepgram writes them."""
    return [f"Word{number}" for number in range(first, last + 1)]


MUTE = """
[providers.mute]
kind = "deepgram"
base_url = "http://127.0.0.1:{port}"
api_key = "env:UPSTREAM_KEY"
[models.mute]
deployments = [{{ provider = "mute", upstream_model = "nova-3", price_per_minute = "0.006" }}]
[models.pair]
deployments = [
  {{ provider = "p99", upstream_model = "nova-2", price_per_minute = "0.003" }},
  {{ provider = "p98", upstream_model = "nova-3", price_per_minute = "0.006" }},
]
"""


@dataclass
class Place:
    """A gateway before Deepgram. Each test has a model of its own there."""

    server: Server
    deepgram: LiveDeepgram
    office: Office
    number: int = 0

    @property
    def model(self) -> str:
        return f"m{self.number}"

    def live(self, customer: Customer | None = None, **how: Any) -> Live:
        return Live(self.server.url, customer or self.office.open(), **({"model_id": self.model} | how))

    def settled(self, customer: Customer) -> int:
        """What was spent, as soon as nothing is held."""
        until(lambda: not self.office.money(customer.account)[1])
        return CREDIT - self.office.money(customer.account)[0]


@contextlib.contextmanager
def serving(directory: Path, deepgram: LiveDeepgram) -> Iterator[Place]:
    with socket.create_server(("127.0.0.1", 0)) as mute:  # accepts, and nobody is there
        catalog = directory / "catalog.toml"
        models = catalogue(deepgram.url, "deepgram") + MUTE.format(port=mute.getsockname()[1])
        catalog.write_text(models, encoding="utf-8")
        process, server = start_server(
            directory,
            VOXGATE_CATALOG=str(catalog),
            VOXGATE_EMBEDDED="0",
            VOXGATE_PROVIDER_CONNECT_TIMEOUT="2",
            UPSTREAM_KEY=KEY,
            WRONG_KEY=WRONG,
        )
        yield Place(server, deepgram, Office(directory))
        stop_server(process)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with LiveDeepgram() as deepgram, serving(tmp_path_factory.mktemp("live-deepgram"), deepgram) as place:
        yield place


@pytest.fixture(autouse=True)
def as_it_is(place: Place) -> Iterator[None]:
    place.number += 1
    yield
    place.deepgram.forget()


@pytest.fixture(scope="module", autouse=True)
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Any]]]:
    """What takes longer than Deepgram waits for audio, on a server of its own, while the others are tried."""
    directory = tmp_path_factory.mktemp("live-waiting")
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(2))
        recognizer = stack.enter_context(LiveDeepgram())
        place = stack.enter_context(serving(directory, recognizer))

        def patient() -> tuple[Live, Heard]:
            with place.live(model_id="m1") as live:
                live.send(blocks(1, 2))
                heard = place.deepgram.session()
                with contextlib.suppress(TimeoutError):
                    while True:
                        live.read(timeout=12)
                live.send(blocks(3, 4))
                live.close()
            return live, heard

        def gone() -> Customer:
            """Who hangs up after the end, of which Deepgram takes no notice."""
            recognizer.session()

            def script(heard: Heard, message: str | bytes) -> bool:
                if heard is recognizer.sessions[0]:
                    return False
                heard.patience = 2.0
                return True

            recognizer.script = script
            customer = place.office.open(limits=RateLimits(concurrent_requests=1))
            with place.live(customer, model_id="m2") as live:
                live.send(blocks(1, 2))
                live.tell("close")
                heard = recognizer.session(1)
                until(lambda: heard.asked("CloseStream") == 1)
                live.hang_up()
            place.settled(customer)
            with place.live(customer, model_id="m3"):  # its place is free
                pass
            return customer

        yield {"patient": pool.submit(patient), "gone": pool.submit(gone)}
        pool.shutdown()


# --- Both ways --------------------------------------------------------------------------------------


def test_what_deepgram_hears_is_told_in_our_words(place: Place) -> None:
    customer = place.office.open()
    with place.live(customer, language="en-US") as live:
        ready = live.read()
        assert (ready["model"], ready["provider"], ready["ignored"]) == (place.model, f"p{place.number}", [])
        live.send(blocks(0, 3), 1001)
        live.wait("partial")  # while it is spoken
        done = live.close()
    assert live.finals == words(1, 3)
    assert [(final["start"], final["end"]) for final in live.of("final")] == [(0.5, 1.0), (1.0, 1.5), (1.5, 2.0)]
    for final in live.of("final"):
        times = {"start": final["start"], "end": final["end"]}
        assert final["words"] == [times | {"word": final["text"], "confidence": 0.75}]
        assert final["confidence"] == 0.75
    assert [partial["text"] for partial in live.of("partial")] == ["Word"] * 3
    assert done["text"] == "Word1 Word2 Word3"
    assert (done["duration"], done["usage"]["seconds"], microdollars(done["cost"])) == (2.0, 2.0, 200)
    assert place.settled(customer) == 200

    (heard,) = place.deepgram.sessions
    asked = {name: heard.query.get(name) for name in ("model", "encoding", "sample_rate", "interim_results")}
    assert asked == {"model": "up-1", "encoding": "linear16", "sample_rate": "16000", "interim_results": "true"}
    assert heard.query["language"].startswith("en")
    assert heard.headers["authorization"] == f"Token {KEY}"
    assert bytes(heard.audio) == blocks(0, 3)
    assert heard.texts[-1] == {"type": "CloseStream"}
    assert customer.key not in str(heard.headers)


@pytest.mark.parametrize(
    ("encoding", "rate", "channels"), [("pcm_s16le", 48_000, 2), ("pcm_f32le", 8000, 1), ("mulaw", 8000, 1)]
)
def test_whatever_comes_it_hears_linear16_at_16_khz(place: Place, encoding: str, rate: int, channels: int) -> None:
    sample = {"pcm_s16le": struct.pack("<h", 300), "pcm_f32le": struct.pack("<f", 300 / 32768), "mulaw": b"\xe5"}
    with place.live(encoding=encoding, sample_rate=rate, channels=channels) as live:
        live.send(sample[encoding] * channels * rate, 999)
        done = live.close()
    (heard,) = place.deepgram.sessions
    assert heard.seconds == pytest.approx(1.0, abs=0.002)
    assert done["duration"] == pytest.approx(1.0)
    assert microdollars(done["cost"]) == 100
    assert live.finals[0] == "Word3"


def test_finalize_is_said_there_and_nothing_comes_of_silence(place: Place) -> None:
    with place.live() as live:
        live.tell("finalize")
        live.send(blocks(1, 1) + blocks(2, 2)[: RATE // 2])
        live.tell("finalize")
        live.wait("final")
        live.wait("final")  # before there is more audio
        heard = place.deepgram.session()
        assert heard.texts[-1] == {"type": "Finalize"}
        live.send(blocks(0, 0) + blocks(3, 3))
        done = live.close()
    assert live.finals == words(1, 3)
    assert [final["end"] for final in live.of("final")] == [0.5, 0.75, 1.75]
    assert done["duration"] == 1.75


def test_without_interim_results_none_come(place: Place) -> None:
    with place.live(interim_results="false") as live:
        live.send(blocks(1, 2))
        live.close()
    assert place.deepgram.session().query.get("interim_results") != "true"
    assert not live.of("partial")
    assert live.finals == words(1, 2)


def test_an_utterance_in_several_results_is_told_once(place: Place) -> None:
    """`is_final` comes in parts where somebody speaks for long, of which the last is `speech_final`."""

    def script(heard: Heard, message: str | bytes) -> bool:
        if isinstance(message, str) or heard.told or heard.seconds < 2:
            return isinstance(message, bytes)
        heard.told = len(heard.audio)
        deepgram = place.deepgram
        heard.send({"type": "SpeechStarted", "channel": [0, 1], "timestamp": 0.1})
        heard.send(deepgram.result("one", 0.0, 0.4, last=False))
        heard.send(deepgram.result("one two", 0.0, 0.8, over=False))
        heard.send(deepgram.result("three", 0.8, 1.0, last=False))
        heard.send(deepgram.result("three four", 0.8, 1.5))
        heard.send({"type": "UtteranceEnd", "channel": [0, 1], "last_word_end": 1.5})
        return True

    place.deepgram.script = script
    with place.live() as live:
        live.send(blocks(1, 4))
        done = live.close()
    assert done["text"] == "One Two Three Four"
    said = [word["word"] for final in live.of("final") for word in final["words"]]
    assert said == ["One", "Two", "Three", "Four"]


def test_what_we_do_not_know_is_passed_over(place: Place) -> None:
    def script(heard: Heard, message: str | bytes) -> bool:
        if isinstance(message, bytes):
            heard.send({"type": "Warning", "description": "private words", "more": {"type": "Results"}})
            heard.send({"type": "TurnInfo"})
        return False

    place.deepgram.script = script
    with place.live() as live:
        live.send(blocks(1, 2))
        assert live.close()["text"] == "Word1 Word2"
    assert "private words" not in json.dumps(live.messages)


# --- Refused, lost and broken -----------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 429, 500, 503])
def test_what_deepgram_refuses_is_told_in_our_words_before_the_upgrade(place: Place, status: int) -> None:
    place.deepgram.refuses = status
    customer = place.office.open(limits=RateLimits(concurrent_requests=1))
    refused = refusal(place.server.url, customer, model_id=place.model)
    known = {429: (429, "rate_limited"), 503: (503, "overloaded")}
    assert (refused.status, refused.error["code"]) in ((502, "provider_unavailable"), known.get(status))
    assert "private words" not in refused.error["message"]
    assert place.office.money(customer.account) == (CREDIT, 0)


def test_a_key_that_deepgram_does_not_know_is_not_shown(place: Place) -> None:
    customer = place.office.open(limits=RateLimits(concurrent_requests=1))
    for _ in range(2):
        refused = refusal(place.server.url, customer, model_id="m99")
        assert (refused.status, refused.error["code"]) == (502, "provider_unavailable")
        for secret in (WRONG, KEY, "INVALID_AUTH", "Invalid credentials"):
            assert secret not in json.dumps(refused.error)
            assert secret not in str(refused.headers)
    assert place.office.money(customer.account) == (CREDIT, 0)
    assert WRONG not in (place.server.data_dir / "log").read_text(encoding="utf-8")


def test_the_next_provider_is_asked_before_the_session_begins(place: Place) -> None:
    customer = place.office.open()
    with place.live(customer, model_id="pair") as live:
        assert live.read()["provider"] == "p98"
        live.send(blocks(1, 2))
        done = live.close()
    assert live.finals == words(1, 2)
    assert microdollars(done["cost"]) == 100
    assert place.office.money(customer.account) == (CREDIT - 100, 0)
    assert [heard.query["model"] for heard in place.deepgram.sessions] == ["nova-3"]


def test_a_provider_that_does_not_shake_hands_is_our_502(place: Place) -> None:
    customer = place.office.open(limits=RateLimits(concurrent_requests=1))
    refused = refusal(place.server.url, customer, model_id="mute")
    assert (refused.status, refused.error["code"]) == (502, "provider_unavailable")
    assert place.office.money(customer.account) == (CREDIT, 0)


def lost(place: Place, live: Live, heard: Heard, seconds: float) -> None:
    """Break the connection as soon as all of it came and all that it says was told."""
    until(lambda: heard.seconds == seconds)
    while len(live.finals) < int(seconds / BLOCK):
        live.read()
    heard.drop()


def test_a_lost_deepgram_hears_again_what_came_after_the_last_final(place: Place) -> None:
    customer = place.office.open()
    speech = blocks(1, 8)
    with place.live(customer) as live:
        live.send(speech[: 7 * RATE // 2])  # 1.75 s
        lost(place, live, place.deepgram.session(), 1.75)
        live.send(speech[7 * RATE // 2 :])
        done = live.close()
    assert live.finals == words(1, 8)
    assert [(final["start"], final["end"]) for final in live.of("final")] == [(n / 2, n / 2 + 0.5) for n in range(8)]
    said = [word for final in live.of("final") for word in final["words"]]
    assert [(word["start"], word["end"]) for word in said] == [(n / 2, n / 2 + 0.5) for n in range(8)]
    first, second = place.deepgram.sessions
    assert bytes(first.audio) == speech[: 7 * RATE // 2]
    assert bytes(second.audio) == speech[3 * RATE :]
    assert (done["usage"]["seconds"], microdollars(done["cost"])) == (4.0, 400)
    assert place.settled(customer) == 400


def test_times_stay_right_across_silence_and_a_loss(place: Place) -> None:
    speech = blocks(1, 1) + blocks(0, 0) * 4 + blocks(2, 2)
    with place.live() as live:
        live.send(speech[: 5 * RATE])  # 2.5 s
        heard = place.deepgram.session()
        until(lambda: heard.seconds == 2.5)
        live.wait("final")
        live.tell("finalize")
        until(lambda: heard.asked("Finalize") == 1)
        heard.drop()
        live.send(speech[5 * RATE :])
        done = live.close()
    assert live.finals == words(1, 2)
    assert done["text"] == "Word1 Word2"
    assert live.of("final")[1]["start"] == 2.5


def test_the_second_loss_is_an_error(place: Place) -> None:
    customer = place.office.open()
    with place.live(customer) as live:
        live.send(blocks(1, 2))
        lost(place, live, place.deepgram.session(), 1.0)
        live.send(blocks(3, 3))
        again = place.deepgram.session(1)
        until(lambda: again.seconds == 0.5)
        while len(live.finals) < 3:
            live.read()
        again.drop()
        last = live.rest()
    assert (live.code, last["error"]["code"], last["fatal"]) == (4502, "provider_unavailable", True)
    assert live.finals == words(1, 3)
    assert (last["usage"]["seconds"], microdollars(last["cost"])) == (1.5, 150)
    assert place.settled(customer) == 150
    assert len(place.deepgram.sessions) == 2


@pytest.mark.parametrize("code", [1000, 1001, 1008, 1011])
def test_a_deepgram_that_closes_is_opened_again(place: Place, code: int) -> None:
    with place.live() as live:
        live.send(blocks(1, 2))
        heard = place.deepgram.session()
        until(lambda: heard.seconds == 1.0)
        while len(live.finals) < 2:
            live.read()
        heard.connection.close(code, "private words")
        live.send(blocks(3, 3))
        done = live.close()
    assert done["text"] == "Word1 Word2 Word3"
    assert microdollars(done["cost"]) == 150
    assert "private words" not in json.dumps(live.messages)


RESULT: Message = {
    "type": "Results",
    "channel_index": [0, 1],
    "duration": 0.5,
    "start": 0.0,
    "is_final": True,
    "speech_final": True,
    "channel": {
        "alternatives": [
            {
                "transcript": "Private words",
                "confidence": 0.75,
                "words": [{"word": "private", "start": 0.0, "end": 0.5, "confidence": 0.75}],
            }
        ]
    },
}
SPOKEN: Message = RESULT["channel"]["alternatives"][0]


def _alternative(**changes: Any) -> Message:
    return RESULT | {"channel": {"alternatives": [SPOKEN | changes]}}


NONSENSE: dict[str, Any] = {
    "no JSON": "private words {",
    "an array": "[]",
    "deep": "[" * 200_000,
    "no type": "{}",
    "type": '{"type": 7}',
    "binary": b"\0\1\2",
    "no channel": {name: value for name, value in RESULT.items() if name != "channel"},
    "channel": RESULT | {"channel": []},
    "no alternatives": RESULT | {"channel": {"alternatives": []}},
    "transcript": _alternative(transcript=7),
    "words": _alternative(words={"word": 1}),
    "a word": _alternative(words=["private"]),
    "start": RESULT | {"start": "soon"},
    "not a number": RESULT | {"start": math.nan},
    "infinite": RESULT | {"duration": math.inf},
    "before the start": RESULT | {"start": -5.0},
    "after the end": RESULT | {"start": 1e9},
    "a negative word": _alternative(words=[{"word": "x", "start": 0.4, "end": 0.1, "confidence": 0.75}]),
    "confidence": _alternative(confidence=math.nan, words=[]),
    "much confidence": _alternative(confidence=7, words=[]),
    "half of a pair": '{"type": "Results", "is_final": true, "start": 0, "duration": 0.5, "channel": '
    '{"alternatives": [{"transcript": "\\ud800", "words": []}]}}',
    "error": {"type": "Error", "description": "private words", "message": "private words", "variant": "x"},
    "huge": RESULT | {"more": "x" * 20_000_000},
    "huge text": _alternative(transcript="x" * 3_000_000),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_is_a_loss_or_nothing_and_never_a_failure_of_ours(place: Place, what: str) -> None:
    """All that comes is looked at as it is read: what is not as it is documented fails there."""

    def script(heard: Heard, message: str | bytes) -> bool:
        if isinstance(message, str):
            return False
        heard.told = len(heard.audio)
        heard.send(NONSENSE[what])
        return True

    place.deepgram.script = script
    customer = place.office.open(limits=RateLimits(concurrent_requests=1))
    with place.live(customer, lies=True) as live:
        with contextlib.suppress(ConnectionClosed):
            live.send(blocks(1, 1))
            live.tell("close")
        last = live.rest()
    if last["type"] == "error":
        assert (live.code, last["error"]["code"]) == (4502, "provider_unavailable")
        assert "private words" not in last["error"]["message"]
    else:
        assert (live.code, last["type"]) == (1000, "done")
    assert place.settled(customer) == microdollars(last["cost"])


def test_a_flood_of_nonsense_takes_no_memory(place: Place) -> None:
    def script(heard: Heard, message: str | bytes) -> bool:
        if isinstance(message, bytes):
            for _ in range(200):
                heard.send("x" * 1_000_000)
        return False

    place.deepgram.script = script
    process = psutil.Process(place.server.pid)
    before = process.memory_info().rss
    with place.live() as live:
        live.send(blocks(1, 1))
        last = live.rest()
    assert (live.code, last["error"]["code"]) == (4502, "provider_unavailable")
    assert process.memory_info().rss - before < 48 * 2**20


def test_who_hangs_up_leaves_no_connection_to_deepgram(place: Place) -> None:
    customer = place.office.open()
    with place.live(customer) as live:
        live.send(blocks(1, 2))
        live.wait("final")
        heard = place.deepgram.session()
        until(lambda: heard.seconds == 1.0)
        live.hang_up(reset=True)
    until(lambda: heard.connection.state.name == "CLOSED")
    assert place.settled(customer) == 100


# --- Twelve seconds later ---------------------------------------------------------------------------


def test_who_is_quiet_here_is_kept_alive_there(waiting: dict[str, Future[Any]]) -> None:
    live, heard = waiting["patient"].result(120)
    assert live.messages[-1]["text"].split() == words(1, 4)
    assert heard.asked("KeepAlive") >= 1
    assert heard.seconds == 2.0
    assert microdollars(live.messages[-1]["cost"]) == 200


def test_a_deepgram_that_does_not_come_to_an_end_is_given_up(waiting: dict[str, Future[Any]]) -> None:
    waiting["gone"].result(120)


def test_the_ledger_is_right_in_the_end(place: Place) -> None:
    audit = place.office.run("audit")
    assert audit.returncode == 0, audit.stdout
    assert place.office.tell("sweep") == {"holds": 0, "amount": 0, "slots": 0}
