"""One provider after the other: every way to fail, at every place, through a real gateway."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from conftest import Server, start_server, stop_server
from customers import LITELLM, OPENAI, ROUTER, SPEECH, STATS, Customer, Office, envelope, send
from fakes.upstreams import (
    GOOD,
    KEY,
    TEXT,
    DeepgramUpstream,
    MistralUpstream,
    OpenAIUpstream,
    Script,
    Upstream,
    delta,
    done,
    limited,
    sse,
)
from voxgate.audio.sniff import MP3
from voxgate.catalog import Deployment, ProviderEntry
from voxgate.errors import ProviderUnavailable
from voxgate.fallback import Fallback, Outages
from voxgate.model import Delta, Feature, TranscriptionRequest
from voxgate.providers.http import HttpProvider, Timeouts
from voxgate.providers.openai import OpenAIAdapter
from voxgate.providers.prepare import Prepared
from voxgate.providers.secrets import StoredSecrets
from voxgate.receive import Upload
from voxgate.routing.health import Health

pytestmark = pytest.mark.usefixtures("untraced")

CREDIT = 1_000_000
COSTS = {"a": 52, "b": 104, "c": 155}  # 31 tenths of a second at 1,000, 2,000 and 3,000 a minute, rounded up
PRICES = {"a": "0.001", "b": "0.002", "c": "0.003"}
BAD = Script(status=503)
LATE = Script(delay=20)
FIRST_BYTE, PROVIDER = 1.0, 1.6  # seconds, of which a busy machine needs some itself
SLACK = 4.0  # seconds that a busy machine may add, far fewer than one who does not answer takes


@dataclass(frozen=True)
class Fault:
    """One way to fail, what it is called, how often it is tried, and the status that is told."""

    script: Script
    name: str
    attempts: int
    status: int | None


FAULTS = {
    "500": Fault(Script(status=500), "transient", 2, 500),
    "503": Fault(BAD, "transient", 2, 503),
    "302": Fault(Script(status=302), "transient", 2, 302),
    "hang-up": Fault(Script(hang_up=True), "transient", 2, None),
    "drop": Fault(Script(drop_after=40), "transient", 2, 200),
    "late": Fault(LATE, "transient", 2, None),
    "stall": Fault(Script(stall_after=40), "transient", 2, 200),
    "drip": Fault(Script(drip=0.05), "transient", 2, None),
    "bad-json": Fault(Script(body=b'{"text": "private words'), "transient", 2, 200),
    "page": Fault(Script(body=b"<html>private words</html>", content_type="text/html"), "transient", 2, 200),
    "empty": Fault(Script(body=b""), "transient", 2, 200),
    "shape": Fault(Script(body=b'{"private words": []}'), "transient", 2, 200),
    "401": Fault(Script(status=401), "credential", 1, 401),
    "403": Fault(Script(status=403), "credential", 1, 403),
    "402": Fault(Script(status=402), "quota", 1, 402),
    "404": Fault(Script(status=404), "unsupported", 1, 404),
    "413": Fault(Script(status=413), "unsupported", 1, 413),
    "429": Fault(Script(status=429), "rate_limit", 1, 429),
}
HUGE = Fault(Script(size=65 * 1024 * 1024), "transient", 2, 200)
PLACES = ("first", "last", "every")


@dataclass(frozen=True)
class Exchange:
    """A gateway and its three providers, `a` the cheapest, each of a wire format of its own."""

    server: Server
    office: Office
    upstreams: dict[str, Upstream] = field(repr=False)

    def request(self, model: str, *, path: str = ROUTER, customer: Customer | None = None, **form: Any) -> Answer:
        """One request, at the cheapest first, by a customer of its own."""
        customer = customer or self.office.open(credit=CREDIT)
        if path == ROUTER:
            form = {"preference": "cost"} | form
        with httpx.Client(base_url=self.server.url, headers=customer.headers, timeout=60) as client:
            begun = time.monotonic()
            response = send(client, path, model=model, **form)
        return Answer(response, time.monotonic() - begun, customer)

    def always(self, model: str, **scripts: Script) -> None:
        for name, script in scripts.items():
            self.upstreams[name].always(script, model)

    def asked(self, model: str) -> str:
        """How often each was asked, as in `a2b1c0`."""
        return "".join(f"{name}{len(upstream.asked(model))}" for name, upstream in self.upstreams.items())


@dataclass(frozen=True)
class Answer:
    response: httpx.Response
    seconds: float
    customer: Customer

    @property
    def status(self) -> int:
        return self.response.status_code

    @property
    def served(self) -> tuple[str, str]:
        assert self.status == 200, self.response.text
        assert self.response.json()["text"] == TEXT
        return self.response.headers["x-voxgate-provider"], self.response.headers["x-voxgate-attempts"]


MODELS = {f"{fault}-{place}": "abc" for fault in [*FAULTS, "400"] for place in PLACES}
MODELS |= dict.fromkeys(["huge", "hours", "one-limited", "silent-limit", "some-limited", "given-up"], "abc")
MODELS |= dict.fromkeys(
    ["mixed", "breaker", "recovers", "named", "slow-first", "convert", "endless-time", "endless-count"], "abc"
)
MODELS |= {"alone": "a", "other": "c", "good": "c", "slow": "a"}


def catalogue(upstreams: dict[str, Upstream]) -> str:
    lines = []
    for name, upstream in upstreams.items():
        lines += [f"[providers.{name}]", f'kind = "{upstream.kind}"', f'flavor = "{upstream.flavor}"']
        lines += [f'base_url = "{upstream.base_url}"', 'api_key = "env:UPSTREAM_KEY"']
    for model, names in MODELS.items():
        lines += [f'[models."{model}"]', "deployments = ["]
        for name in names:
            more = ', containers = ["flac"]' if model in ("convert", "mixed") and name == "a" else ""
            offer = f'provider = "{name}", upstream_model = "{model}", price_per_minute = "{PRICES[name]}"{more}'
            lines.append(f"  {{ {offer} }},")
        lines.append("]")
    return "\n".join(lines)


@contextlib.contextmanager
def opened(directory: Path, **environment: str) -> Iterator[Exchange]:
    upstreams: dict[str, Upstream] = {"a": OpenAIUpstream(), "b": MistralUpstream(), "c": DeepgramUpstream()}
    file = directory / "catalog.toml"
    file.write_text(catalogue(upstreams), encoding="utf-8")
    with contextlib.ExitStack() as stack:
        for upstream in upstreams.values():
            stack.enter_context(upstream)
        process, server = start_server(directory, VOXGATE_CATALOG=str(file), UPSTREAM_KEY=KEY, **environment)
        stack.callback(stop_server, process)
        yield Exchange(server, Office(directory), upstreams)


@pytest.fixture(scope="module")
def exchange(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exchange]:
    with opened(
        tmp_path_factory.mktemp("fallback"),
        VOXGATE_PROVIDER_FIRST_BYTE_TIMEOUT=str(FIRST_BYTE),
        VOXGATE_PROVIDER_TIMEOUT=str(PROVIDER),
        VOXGATE_REQUEST_TIMEOUT="20",
    ) as exchange:
        yield exchange


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exchange]:
    """One that gives each request three seconds in all."""
    with opened(tmp_path_factory.mktemp("hasty"), VOXGATE_REQUEST_TIMEOUT="3") as exchange:
        exchange.request("good")
        yield exchange


# --- Every fault at every place -------------------------------------------------------------------


@pytest.fixture(scope="module")
def matrix(exchange: Exchange) -> dict[tuple[str, str], Answer]:
    """All of them, several at a time: each has a model, and so breakers, of its own."""
    work: list[tuple[str, str]] = []
    for fault, known in (FAULTS | {"400": Fault(Script(status=400), "caller_fault", 1, 400)}).items():
        for place in PLACES:
            model = f"{fault}-{place}"
            first = known.script if place != "last" else BAD
            others = known.script if place == "every" else GOOD if place == "first" else BAD
            exchange.always(model, a=first, b=others, c=known.script if place != "first" else GOOD)
            work.append((fault, place))
    work.sort(key=lambda each: each[0] not in ("drip", "late", "stall"))  # what takes its time comes first
    customers = [exchange.office.open(credit=CREDIT) for _ in work]
    with ThreadPoolExecutor(6) as clients:
        answers = clients.map(
            lambda pair: exchange.request("-".join(pair[0]), customer=pair[1]), zip(work, customers, strict=True)
        )
        return dict(zip(work, answers, strict=True))


@pytest.mark.parametrize("fault", FAULTS)
def test_when_the_first_fails_the_second_serves(exchange: Exchange, matrix: Any, fault: str) -> None:
    answer, tries = matrix[fault, "first"], FAULTS[fault].attempts
    assert answer.served == ("b", str(tries + 1))
    assert exchange.asked(f"{fault}-first") == f"a{tries}b1c0"
    assert exchange.office.money(answer.customer.account) == (CREDIT - COSTS["b"], 0)
    assert answer.response.headers["x-voxgate-cost"] == "0.000104"


def shown(name: str, fault: Fault) -> str:
    status = f" ({fault.status})" if fault.status else ""
    return "; ".join([f"{name}: {fault.name}{status}"] * fault.attempts)


def failed(exchange: Exchange, answer: Answer, expected: list[str]) -> None:
    error = envelope(answer.response)
    assert (answer.status, error["code"], error["type"]) == (502, "provider_unavailable", "server_error")
    assert error["message"] == f"Every provider for this model failed ({'; '.join(expected)})."
    assert "private" not in answer.response.text
    assert KEY not in answer.response.text
    assert exchange.office.money(answer.customer.account) == (CREDIT, 0)


@pytest.mark.parametrize("fault", FAULTS)
def test_when_the_last_fails_too_each_attempt_is_told(exchange: Exchange, matrix: Any, fault: str) -> None:
    bad = FAULTS["503"]
    expected = [shown("a", bad), shown("b", bad), shown("c", FAULTS[fault])]
    failed(exchange, matrix[fault, "last"], expected)
    assert exchange.asked(f"{fault}-last") == f"a2b2c{FAULTS[fault].attempts}"


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "429"])
def test_when_every_one_fails_each_attempt_is_told(exchange: Exchange, matrix: Any, fault: str) -> None:
    tries = FAULTS[fault].attempts
    failed(exchange, matrix[fault, "every"], [shown(name, FAULTS[fault]) for name in "abc"])
    assert exchange.asked(f"{fault}-every") == f"a{tries}b{tries}c{tries}"


@pytest.mark.parametrize(("place", "asked"), [("first", "a1b0c0"), ("last", "a2b2c1"), ("every", "a1b0c0")])
def test_the_callers_fault_is_told_at_once(exchange: Exchange, matrix: Any, place: str, asked: str) -> None:
    answer = matrix["400", place]
    error = envelope(answer.response)
    assert (answer.status, error["code"], error["type"]) == (400, "invalid_input", "invalid_request_error")
    assert "corrupt" in error["message"]
    assert error["param"] == "file"
    assert exchange.asked(f"400-{place}") == asked
    assert exchange.office.money(answer.customer.account) == (CREDIT, 0)


def test_an_endless_answer_is_a_failure(exchange: Exchange) -> None:
    exchange.always("huge", a=HUGE.script)
    assert exchange.request("huge").served == ("b", "3")


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("endless-time", b'"segments": [{"start": 0.0, "end": 1e999, "text": "x"}]'),
        ("endless-count", b'"usage": {"input_tokens": 1e999, "output_tokens": 1}'),
    ],
)
def test_an_answer_that_cannot_be_told_is_a_failure(exchange: Exchange, model: str, more: bytes) -> None:
    exchange.always(model, a=Script(body=b'{"text": "x", ' + more + b"}"))
    answer = exchange.request(model)
    assert answer.served == ("b", "3")
    assert exchange.office.money(answer.customer.account) == (CREDIT - COSTS["b"], 0)


@pytest.mark.parametrize(("fault", "limit"), [("late", FIRST_BYTE), ("stall", FIRST_BYTE), ("drip", PROVIDER)])
def test_no_attempt_takes_longer_than_it_may(matrix: Any, fault: str, limit: float) -> None:
    assert 2 * limit <= matrix[fault, "first"].seconds < 2 * limit + SLACK
    assert 6 * limit <= matrix[fault, "every"].seconds < 6 * limit + 2 * SLACK


# --- Rate limits ------------------------------------------------------------------------------------


def test_when_all_are_at_their_limits_the_shortest_wait_is_told(exchange: Exchange) -> None:
    exchange.always("hours", a=limited(4000), b=limited(70), c=limited(900, as_date=True))
    for asked in ("a1b1c1", "a1b1c1"):  # the second time nobody is asked
        answer = exchange.request("hours")
        error = envelope(answer.response)
        assert (answer.status, error["code"], error["type"]) == (429, "rate_limited", "rate_limit_error")
        assert 68 <= int(answer.response.headers["retry-after"]) <= 70
        assert exchange.asked("hours") == asked
        assert exchange.office.money(answer.customer.account) == (CREDIT, 0)


def test_all_429_of_the_matrix_is_429(exchange: Exchange, matrix: Any) -> None:
    answer = matrix["429", "every"]
    assert answer.status == 429
    assert 1 <= int(answer.response.headers["retry-after"]) <= 5
    assert exchange.asked("429-every") == "a1b1c1"


def test_one_at_its_limit_is_left_alone_for_as_long_as_it_says(exchange: Exchange) -> None:
    exchange.always("one-limited", a=limited(2))
    assert exchange.request("one-limited").served == ("b", "2")
    exchange.always("one-limited", a=GOOD)
    assert exchange.request("one-limited").served == ("b", "1")
    assert exchange.asked("one-limited") == "a1b2c0"
    time.sleep(2.05)
    assert exchange.request("one-limited").served == ("a", "1")


def test_a_limit_among_other_failures_is_no_429(exchange: Exchange) -> None:
    exchange.always("some-limited", a=limited(60), b=Script(status=402), c=limited(60))
    answer = exchange.request("some-limited")
    expected = ["a: rate_limit (429)", "b: quota (402)", "c: rate_limit (429)"]
    failed(exchange, answer, expected)


# --- Which ones are tried ---------------------------------------------------------------------------


def test_one_that_is_named_is_not_replaced(exchange: Exchange) -> None:
    exchange.always("named", b=BAD)
    answer = exchange.request("named", path=STATS, provider_id="b")
    failed(exchange, answer, [shown("b", FAULTS["503"])])
    assert exchange.asked("named") == "a0b2c0"
    assert exchange.request("c/named").served == ("c", "1")
    answer = exchange.request("b/named")
    failed(exchange, answer, [shown("b", FAULTS["503"])])


def test_another_model_serves_in_its_place(exchange: Exchange) -> None:
    exchange.always("alone", a=BAD)
    answer = exchange.request("alone", path=LITELLM, fallbacks='["other"]')
    assert answer.served == ("c", "3")
    extra = answer.response.json()["extra_fields"]
    assert (extra["model_requested"], extra["model_deployment"], extra["provider"]) == ("alone", "other", "c")
    assert exchange.office.money(answer.customer.account) == (CREDIT - COSTS["c"], 0)


@pytest.mark.parametrize("path", [OPENAI, ROUTER, LITELLM, STATS])
def test_every_contract_falls_back(exchange: Exchange, path: str) -> None:
    exchange.upstreams["a"].will(Script(status=401), model="convert")
    provider, attempts = exchange.request("convert", path=path).served
    assert (provider, attempts) in (("b", "2"), ("c", "2"), ("c", "1"), ("b", "1"))  # not all go by the price
    exchange.upstreams["a"].forget()


# --- Time, and customers who leave ------------------------------------------------------------------


def test_all_attempts_share_one_deadline(hasty: Exchange) -> None:
    hasty.always("given-up", a=LATE, b=LATE, c=LATE)
    answer = hasty.request("given-up")
    failed(hasty, answer, ["a: transient", "b: transient", "c: transient"])
    assert 2.95 <= answer.seconds <= 3 + SLACK
    assert hasty.asked("given-up") == "a1b1c1"


def test_the_rest_of_the_time_is_the_next_ones(hasty: Exchange) -> None:
    hasty.always("slow-first", a=Script(status=402, delay=0.75), b=LATE)
    answer = hasty.request("slow-first")
    assert answer.served == ("c", "3")
    assert answer.seconds <= 3 + SLACK


def in_process(
    upstream: Upstream,
    *,
    seconds: float = 10.0,
    attempt: float = 60.0,
    pause: float = 0.0,
    outages: Outages | None = None,
    health: Health | None = None,
    heard: Callable[[Delta], Awaitable[None]] | None = None,
) -> tuple[float, str]:
    """How long one request takes of `seconds`, and its text or its failure; `pause` is that before a retry, and
    an `attempt` has so many seconds. With `heard` it is a stream."""
    entry = ProviderEntry(name="a", kind="openai", base_url=upstream.base_url, api_key="env:UPSTREAM_KEY")
    offer = Deployment(provider=entry, upstream_model="m", price=1, features=frozenset({Feature.STREAMING}))

    async def run() -> tuple[float, str]:
        provider = HttpProvider(
            adapter=OpenAIAdapter(),
            base_url=entry.base_url,
            api_key=entry.api_key,
            secrets=StoredSecrets({"UPSTREAM_KEY": KEY}),
            timeouts=Timeouts(),
        )
        fallback = Fallback(
            providers={"a": provider},
            health=health or Health(),
            outages=outages,
            provider_timeout=attempt,
            request_timeout=seconds,
            uniform=lambda low, high: pause,
        )
        spool = Path(tempfile.gettempdir())
        try:
            with Upload(spool) as upload:
                upload.write(SPEECH.read_bytes())
                asked = TranscriptionRequest(model="m")
                prepared = Prepared(
                    request=asked, audio=upload, container=MP3, duration=3.03, spool_dir=spool, heard=heard
                )
                async with prepared:
                    begun = time.monotonic()
                    try:
                        served = await fallback.serve(
                            prepared, (offer,), attempted=lambda *_: None, told=lambda: heard is not None
                        )
                        text = served.transcript.text
                    except ProviderUnavailable as error:
                        text = error.message
                    return time.monotonic() - begun, text
        finally:
            await provider.close()

    return asyncio.run(run())


def test_the_pause_before_a_retry_ends_with_the_deadline() -> None:
    with OpenAIUpstream() as upstream:
        upstream.always(Script(status=500, delay=2.8))
        seconds, message = in_process(upstream, seconds=3.0, pause=0.25)
        assert "a: transient (500)" in message
        assert seconds <= 3 + SLACK
        assert len(upstream.sent) == 1


READ = sse(delta("a"), delta(" b"), 0.2, delta(" c"), done("a b c"))
HUNG = sse(delta("a"), delta(" b"), 30.0)


@pytest.mark.parametrize(
    ("script", "reads", "seconds", "text", "blamed"),
    [
        # What its reader takes is none of an attempt's 0.8 seconds, which are enough,
        (READ, 0.6, 10.0, "a b c", None),
        # or are not, whether the reader takes any or not,
        (HUNG, 0.0, 10.0, "a: transient", 0.8),
        (HUNG, 0.6, 10.0, "a: transient", 2.0),
        # and the end of the request's own time is the reader's fault.
        (READ, 1.4, 2.0, "a: transient", None),
    ],
    ids=["slow reader", "hung", "hung and slow reader", "much too slow reader"],
)
def test_the_time_that_a_reader_takes_is_not_its_providers(
    script: Script, reads: float, seconds: float, text: str, blamed: float | None
) -> None:
    health = Health()

    async def heard(_: Delta) -> None:
        await asyncio.sleep(reads)

    with OpenAIUpstream() as upstream:
        upstream.always(script)
        took, said = in_process(upstream, seconds=seconds, attempt=0.8, health=health, heard=heard)
    assert text in said
    assert took <= seconds + SLACK
    assert health.report("a/m").failures == (blamed is not None)
    assert blamed is None or blamed - 0.1 <= took <= blamed + SLACK
    speed = health.speed("a/m")
    assert speed is None or speed * 3.03 < 0.6


class Unreachable:
    """A store that is out of order itself."""

    async def outages(self) -> dict[str, float]:
        raise OSError("the table cannot be reached")

    async def report_outage(self, deployment: str, until: float) -> None:
        raise OSError("the table cannot be reached")


def test_a_store_that_cannot_say_who_is_out_of_order_costs_nobody_an_answer() -> None:
    with OpenAIUpstream() as upstream:
        upstream.will(BAD)
        assert in_process(upstream, outages=Unreachable())[1] == TEXT


def test_a_customer_who_hangs_up_stops_the_attempts(exchange: Exchange) -> None:
    exchange.always("given-up", a=Script(delay=FIRST_BYTE - 0.1, status=503))
    customer = exchange.office.open(credit=CREDIT)
    client = httpx.Client(base_url=exchange.server.url, headers=customer.headers, timeout=0.25)
    with client, pytest.raises(httpx.ReadTimeout):
        send(client, ROUTER, model="given-up", preference="cost")
    assert exchange.upstreams["a"].hung_up.acquire(timeout=2)
    time.sleep(0.4)
    assert exchange.asked("given-up") == "a1b0c0"
    until(lambda: exchange.office.money(customer.account) == (CREDIT, 0))


def until(true: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- Nothing is left behind -------------------------------------------------------------------------


def handles(server: Server) -> tuple[int, int, int]:
    """Open files that are no connections, connections, and threads."""
    process = psutil.Process(server.pid)
    links = []
    for link in Path(f"/proc/{server.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(str(link.readlink()))
    sockets = sum(link.startswith("socket:") for link in links)
    return len(links) - sockets, sockets, process.num_threads()


QUICK = [Script(status=status) for status in (500, 401, 402, 404, 400)]
QUICK += [limited(0), Script(hang_up=True), Script(drop_after=30), Script(body=b"nonsense"), GOOD]


def test_nothing_is_left_after_mixed_failures(exchange: Exchange) -> None:
    customer = exchange.office.open(credit=10**8)

    def one(number: int) -> tuple[int, int]:
        answer = exchange.request("mixed", customer=customer)
        provider = answer.response.headers.get("x-voxgate-provider", "")
        return answer.status, COSTS.get(provider, 0)

    def many(count: int) -> list[tuple[int, int]]:
        for place, upstream in enumerate(exchange.upstreams.values()):
            upstream.will(*(QUICK[(n * (place + 1) + n // 7) % len(QUICK)] for n in range(6 * count)), model="mixed")
        with ThreadPoolExecutor(8) as clients:
            return list(clients.map(one, range(count)))

    results = many(24)
    before = handles(exchange.server)
    results += many(500)
    until(lambda: handles(exchange.server)[0] <= before[0])
    files, sockets, threads = handles(exchange.server)
    assert files <= before[0]
    assert sockets <= 3 * 8 + 16
    assert threads <= before[2] + 2
    assert list((exchange.server.data_dir / "spool").rglob("audio-*")) == []
    statuses = Counter(status for status, _ in results)
    assert statuses.keys() <= {200, 400, 429, 502}
    assert len(statuses) >= 2
    charged = sum(cost for _, cost in results)
    assert exchange.office.money(customer.account) == (10**8 - charged, 0)


# --- The breaker ------------------------------------------------------------------------------------


def test_one_bad_and_one_silent_provider_of_three_cost_nobody_an_answer(exchange: Exchange) -> None:
    exchange.always("breaker", a=Script(status=500), b=LATE)
    customer = exchange.office.open(credit=10**8)
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda _: exchange.request("breaker", customer=customer), range(500)))
    assert Counter(answer.status for answer in answers) == {200: 500}
    assert {answer.served[0] for answer in answers} == {"c"}
    assert sum(answer.seconds > 1.5 * FIRST_BYTE for answer in answers) <= 16  # those that were there before it opened
    assert exchange.office.money(customer.account) == (10**8 - 500 * COSTS["c"], 0)
    # Once it is open the others are not asked; what that costs is measured by the benches.
    after = [exchange.request("breaker", customer=customer).served for _ in range(30)]
    assert {provider for provider, _ in after} == {"c"}
    assert sum(attempts != "1" for _, attempts in after) <= 2  # a probe each, where their time is over


def test_when_all_breakers_are_open_they_are_tried_all_the_same(exchange: Exchange) -> None:
    exchange.always("recovers", a=BAD, b=BAD, c=BAD)
    for _ in range(3):
        assert exchange.request("recovers").status == 502
    exchange.always("recovers", a=GOOD, b=GOOD, c=GOOD)
    assert exchange.request("recovers").served == ("a", "1")
