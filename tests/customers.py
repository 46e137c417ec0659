"""An operator, customers, and the two hosts that serve them over one data directory."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import os
import secrets
import socket
import struct
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import httpx
import pytest

from conftest import DATA, Server
from fakes.api_gateway import ApiGateway
from fakes.inference import Inference
from voxgate.accounts import Entry, EntryKind, Key, RateLimits, Store, keys
from voxgate.accounts.sqlite import SqliteStore
from voxgate.cli import main
from voxgate.hosts.lambda_rest import Handler

T = TypeVar("T")
Host = Literal["asgi", "lambda"]
OPENAI, STATS, ROUTER = "/v1/audio/transcriptions", "/v1/stt/transcribe", "/audio/transcriptions"
LITELLM = "/litellm/v1/audio/transcriptions"
CONTRACTS = {"openai": OPENAI, "stats": STATS, "router": ROUTER, "litellm": LITELLM}
HOSTS: list[Host] = ["asgi", "lambda"]
SPEECH = DATA / "b-slt.mp3"
COST = 310  # micro-dollars: 3.03 s are 31 started tenths, at 6,000 a minute
WINDOWS = [
    f"x-ratelimit-{what}-{of}" for of in ("requests", "audio-seconds") for what in ("limit", "remaining", "reset")
]


def wav(seconds: float, *, rate: int = 8000) -> bytes:
    """Silence of 8 bits."""
    size = round(seconds * rate)
    form = struct.pack("<IHHIIHH", 16, 1, 1, rate, rate, 1, 8)
    return (
        b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt " + form + b"data" + struct.pack("<I", size) + b"\x80" * size
    )


def command(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What the `voxgate` command says, and its status, run in this process: one of its own takes half a second."""
    given = [str(argument) for argument in arguments]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        for name in [name for name in os.environ if name.startswith("VOXGATE_")]:
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            main(given)
        except SystemExit as end:  # as the interpreter takes it
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=err)
    return subprocess.CompletedProcess(["voxgate", *given], status, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class Customer:
    account: str
    key: str
    key_id: str

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}


@dataclass(frozen=True)
class Office:
    """The operator of one data directory: at the command line, or, where only the result matters,
    with the store itself, which is quicker."""

    data_dir: Path
    _number = itertools.count(1)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return command(*arguments, "--data-dir", self.data_dir)

    def tell(self, *arguments: str) -> Any:
        """What the command says with `--json`."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def keys_create(self, account: str, *options: str) -> Customer:
        made = self.tell("keys", "create", account, *options)
        return Customer(account, made["key"], made["id"])

    def money(self, account: str) -> tuple[int, int]:
        """The balance and what of it is held."""

        async def work(store: Store) -> tuple[int, int]:
            now = await store.balance(account)
            return now.balance, now.held

        return self._with_store(work)

    def open(
        self, *, credit: int = 1_000_000, limits: RateLimits | None = None, budget: int | None = None, **key: Any
    ) -> Customer:
        """An account and its key; `key` are fields of `Key`."""

        async def work(store: Store) -> Customer:
            name = f"customer-{next(self._number)}"
            account = await store.create_account(name, limits=limits or RateLimits(), budget=budget)
            if credit:
                await store.post(Entry(account.id, EntryKind.TOP_UP, credit, time.time(), "opening"))
            return await _key(store, account.id, **key)

        return self._with_store(work)

    def key(self, account: str, **fields: Any) -> Customer:
        return self._with_store(lambda store: _key(store, account, **fields))

    def suspend(self, customer: Customer) -> None:
        assert self.run("accounts", "suspend", customer.account).returncode == 0

    def _with_store(self, work: Callable[[Store], Awaitable[T]]) -> T:
        async def run() -> T:
            store = SqliteStore(self.data_dir / "voxgate.sqlite")
            try:
                return await work(store)
            finally:
                await store.close()

        return asyncio.run(run())


async def _key(store: Store, account: str, **fields: Any) -> Customer:
    key = Key(id=f"key_{secrets.token_hex(8)}", account_id=account, created=int(time.time()), **fields)
    secret = keys.generate()
    await store.create_key(key, keys.digest(secret))
    return Customer(account, secret, key.id)


@dataclass(frozen=True)
class House:
    """A server on a socket and the Lambda handler, over the same accounts and the same inference."""

    server: Server
    handler: Handler
    upstream: Inference
    office: Office
    rich: Customer  # for tests that do not look at a balance

    def transport(self, host: Host) -> httpx.BaseTransport:
        return httpx.HTTPTransport(verify=False) if host == "asgi" else ApiGateway(self.handler)

    def url(self, host: Host) -> str:
        return self.server.url if host == "asgi" else "https://api.example.com"

    def client(self, host: Host, headers: dict[str, str] | None = None) -> httpx.Client:
        return httpx.Client(base_url=self.url(host), headers=headers, transport=self.transport(host), timeout=60)

    def request(
        self, host: Host, customer: Customer, path: str = OPENAI, headers: dict[str, str] | None = None, **form: Any
    ) -> httpx.Response:
        """One transcription over a connection of its own."""
        with self.client(host, customer.headers | (headers or {})) as client:
            return send(client, path, **form)

    def get(self, host: Host, customer: Customer, path: str, **query: str) -> httpx.Response:
        with self.client(host, customer.headers) as client:
            return client.get(path, params=query)

    @contextlib.contextmanager
    def uploading(self, customer: Customer) -> Iterator[None]:
        """A customer whose upload has been let in and does not go on."""
        address = urlsplit(self.server.url)
        with socket.create_connection((address.hostname or "", address.port or 0), timeout=30) as wire:
            lines = [f"POST {OPENAI} HTTP/1.1", "Host: voxgate", f"Authorization: Bearer {customer.key}"]
            lines += ["Content-Type: multipart/form-data; boundary=b", "Content-Length: 1000000"]
            wire.sendall("\r\n".join([*lines, "Expect: 100-continue", "", ""]).encode())
            assert wire.recv(1000).startswith(b"HTTP/1.1 100 ")
            yield


def send(client: httpx.Client, path: str = OPENAI, *, audio: bytes | None = None, **fields: Any) -> httpx.Response:
    """One form, its audio's field and its model's as the contract calls them."""
    file, model = ("audio", "model_id") if path == STATS else ("file", "model")
    content = SPEECH.read_bytes() if audio is None else audio
    fields = {model: fields.pop("model", "whisper-1")} | fields
    return client.post(path, data=fields, files={file: ("speech.mp3", content)})


def envelope(response: httpx.Response) -> dict[str, Any]:
    """The error in the answer, which has all four keys and no other."""
    body = response.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"].startswith("req_")
    return error


def microdollars(header: str) -> int:
    """An amount of a header, in dollars, exactly."""
    whole, _, decimals = header.partition(".")
    assert whole.isdecimal()
    assert decimals.isdecimal()
    assert 2 <= len(decimals) <= 6
    return int(whole) * 1_000_000 + int(decimals.ljust(6, "0"))
