"""What a server and the commands write, after a spread of all that can happen, holds no key, no hash and no word."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from conftest import Server, start_server, stop_server
from customers import CONTRACTS, OPENAI, STATS, Customer, Office, send, wav
from fakes.inference import Inference
from voxgate.accounts import RateLimits, keys

WORDS = "xylophone zanzibar quixotic"
PROMPT = "whisperedprompt"
ORDERS = ["order-of-mrs-abernathy", "order-of-mr-bellweather"]


@dataclass
class Written:
    """Everything that came out anywhere; `shown` are the keys that a command was to show."""

    secrets: set[str] = field(default_factory=set)
    shown: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def command(self, office: Office, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = office.run(*arguments)
        self.texts[f"voxgate {' '.join(arguments)} ({len(self.texts)})"] = done.stdout + done.stderr
        return done

    def answer(self, response: httpx.Response) -> None:
        head = "\n".join(f"{name}: {value}" for name, value in response.headers.items())
        body = response.text if response.status_code >= 400 or response.request.method == "GET" else ""
        url = f"{response.request.method} {response.request.url.path} {response.status_code} ({len(self.texts)})"
        self.texts[url] = f"{head}\n{body}"


def drive(written: Written, server: Server, office: Office, upstream: Inference) -> None:
    tell = written.command
    tell(office, "accounts", "create", "acme", "--credit", "1.00")
    customers = []
    for options in ([], ["--json"], ["--name", "poor", "--budget", "0.000001"], ["--requests-per-minute", "1"]):
        done = tell(office, "keys", "create", "acme", *options)
        (key,) = re.findall(r"vg_[0-9A-Za-z]{36}", done.stdout)
        (key_id,) = set(re.findall(r"key_[0-9a-f]{16}", done.stdout))
        written.shown[f"voxgate keys create acme {' '.join(options)}".strip()] = key
        customers.append(Customer("acme", key, key_id))
    rich, revoked, poor, slow = customers
    unknown, mistyped = keys.generate(), keys.generate()[:-1] + "!"
    broke = office.open(credit=0)
    crowded = office.open(limits=RateLimits(1, 1, 1))
    tell(office, "keys", "revoke", revoked.key_id, "--yes")
    done = tell(office, "keys", "rotate", poor.key_id, "--yes")
    (rotated,) = re.findall(r"vg_[0-9A-Za-z]{36}", done.stdout)
    written.shown[f"voxgate keys rotate {poor.key_id} --yes"] = rotated
    presented = [rich.key, revoked.key, rotated, slow.key, unknown, mistyped, broke.key, crowded.key, server.key]
    written.secrets.update(presented, [poor.key])

    with httpx.Client(base_url=server.url, timeout=60) as client:
        for key in presented:
            client.headers["authorization"] = f"Bearer {key}"
            for path in CONTRACTS.values():
                written.answer(send(client, path, prompt=PROMPT) if path != STATS else send(client, path))
            for path in ("/v1/models", "/v1/models/whisper-9", "/v1/usage", "/v1/balance"):
                written.answer(client.get(path))
            written.answer(send(client, OPENAI, audio=b"no audio at all"))
            written.answer(client.get("/v1/usage", params={"after": key}))
            written.answer(client.post(OPENAI, content=b"nothing"))
            for order in ORDERS:
                client.headers["idempotency-key"] = order
                for form in ({}, {}, {"audio": wav(1)}, {"audio": b""}):
                    written.answer(send(client, OPENAI, **form))
            client.headers["idempotency-key"] = ORDERS[0] + "." * 255
            written.answer(send(client))
            del client.headers["idempotency-key"]
            for status in (400, 500, 503):
                with upstream.failing(status):
                    written.answer(send(client, audio=wav(0.1)))
        for header in ("", rich.key, f"Basic {rich.key}", f"Bearer {rich.key} {rich.key}", f"Bearer{rich.key}"):
            client.headers["authorization"] = header
            written.answer(send(client))
        del client.headers["authorization"]
        client.headers["x-api-key"] = rich.key
        for path in CONTRACTS.values():
            written.answer(send(client, path))
    tell(office, "accounts", "suspend", "acme")
    tell(office, "accounts", "resume", "acme")
    tell(office, "accounts", "change", "acme", "--budget", "5")
    tell(office, "accounts", "credit", "acme", "1", "--note", "paid")
    for more in (["--json"], []):
        for command in (
            ["accounts", "list"],
            ["accounts", "show", "acme"],
            ["keys", "list", "acme"],
            ["audit"],
            ["sweep"],
        ):
            tell(office, *command, *more)
        tell(office, "usage", "acme", *more)
        tell(office, "usage", "acme", "--requests", *more)
    for wrong in (["keys", "revoke", rich.key], ["accounts", "show", rich.key]):
        office.run(*wrong)  # what somebody types is repeated to them
    tell(office, "keys", "revoke", "key_missing")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    directory = tmp_path_factory.mktemp("secrets")
    written, office = Written(), Office(directory)
    with Inference() as upstream:
        upstream.text = WORDS
        process, server = start_server(directory, VOXGATE_INFERENCE_URL=upstream.url)
        assert process.stdout is not None
        try:
            drive(written, server, office, upstream)
            break_down(written, server, directory)
            process.terminate()
            written.texts["stdout"] = process.stdout.read()
        finally:
            stop_server(process)
    written.texts["log"] = (directory / "log").read_text(encoding="utf-8")
    assert len(written.texts["log"].splitlines()) > 200
    return written


def break_down(written: Written, server: Server, directory: Path) -> None:
    """A request that fails within the server itself, with its traceback in the log."""
    spool = directory / "spool"
    for path in spool.iterdir():
        path.rmdir()
    with httpx.Client(base_url=server.url, headers=server.auth, timeout=60) as client:
        response = send(client, audio=wav(200), prompt=PROMPT)
    assert response.status_code == 500
    written.answer(response)


def hidden(secret: str) -> set[str]:
    """The key, what is left of it without its prefix, and its hash in every way one writes bytes."""
    digest = hashlib.sha256(secret.encode()).digest()
    encoded = base64.b64encode(digest).decode()
    return {
        secret,
        secret[3:],
        secret[3:20],
        digest.hex(),
        digest.hex().upper(),
        encoded.rstrip("="),
        repr(digest)[2:-1],
    }


def found(written: Written, needles: set[str]) -> list[str]:
    return [place for place, text in written.texts.items() if any(needle in text for needle in needles)]


def test_a_key_is_shown_once_by_the_command_that_makes_it_and_nowhere_else(written: Written) -> None:
    for key in written.secrets:
        shown = [place.rpartition(" (")[0] for place in found(written, hidden(key))]
        assert shown == [place for place, made in written.shown.items() if made == key]


def test_the_local_key_is_printed_by_the_server_only_when_it_is_new(written: Written) -> None:
    """On a server's first start, on its standard output, which the fixture has read; its log has it not."""
    assert "vg_" not in written.texts["log"]
    assert "vg_" not in written.texts["stdout"]


def test_no_idempotency_key_is_written_anywhere(written: Written) -> None:
    for order in ORDERS:
        assert found(written, {order, *hidden(order)}) == []


def test_no_word_of_what_was_said_or_prompted_is_written_anywhere(written: Written) -> None:
    assert found(written, {*WORDS.split(), PROMPT}) == []


def test_what_was_searched_has_all_that_it_was_to_have(written: Written) -> None:
    """The search above finds nothing, so this says that there was something to find it in."""
    statuses = {re.findall(r" (\d{3}) \(", place)[0] for place in written.texts if place.startswith(("GET", "POST"))}
    assert statuses == {"200", "400", "401", "402", "404", "409", "429", "500", "502"}
    log = written.texts["log"]
    assert "Traceback (most recent call last)" in log
    assert all(f" {status} " in log for status in statuses)
    assert "embedded/default failed" in log
    assert written.texts["log"].count("req_") > 200
    commands = [place for place in written.texts if place.startswith("voxgate")]
    assert len(commands) > 20
    assert any(json.loads(written.texts[place]) for place in commands if "usage acme --requests --json" in place)


def test_a_key_that_somebody_puts_into_an_address_is_not_logged(tmp_path: Path) -> None:
    process, server = start_server(tmp_path, VOXGATE_INFERENCE_URL="http://127.0.0.1:9")
    try:
        for path in (f"/v1/{server.key}", f"/v1/models/{server.key}", f"/v1/models?api_key={server.key}"):
            assert httpx.get(server.url + path, headers=server.auth).status_code in (200, 404)
    finally:
        stop_server(process)
    log = (tmp_path / "log").read_text(encoding="utf-8")
    assert "GET /v1/" in log
    assert server.key not in log


def test_the_database_has_no_key_and_no_word_either(written: Written, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of answers it has those that were asked for under an Idempotency-Key, and those alone."""
    directory = next(tmp_path_factory.getbasetemp().glob("secrets*"))
    content = b"".join(path.read_bytes() for path in directory.glob("voxgate.sqlite*"))
    for secret in (*written.secrets, *ORDERS, PROMPT):
        assert secret.encode() not in content
    assert WORDS.encode() in content
