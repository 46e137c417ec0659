"""What failing providers cost a customer: before their breakers open, and after.

Three providers: one answers 500, one does not answer, one serves. Requests for it alone, and
requests for all three in the order of that list, by turns.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from conftest import Server, start_server, stop_server
from customers import ROUTER, Office, send
from fakes.upstreams import KEY, OpenAIUpstream, Script

from .report import Goal, Report

REQUESTS, CLIENTS = 500, 8
PAIRS = 200
MOST_ADDED = 2.0  # ms
FIRST_BYTE = "1"  # seconds
PRICES = {"failing": "0.001", "silent": "0.002", "good": "0.003"}
MODELS = {"alone": ["good"], "beside": list(PRICES)}


def run() -> Report:
    report = Report("fallback: a provider that fails and one that is silent", ("what", "requests", "served", "ms"))
    with tempfile.TemporaryDirectory() as name, _gateway(Path(name)) as server:
        customer = Office(server.data_dir).open(credit=10**9)

        def ask(client: httpx.Client, model: str) -> tuple[bool, float]:
            begun = time.perf_counter()
            response = send(client, ROUTER, model=model, preference="cost")
            return response.status_code == 200, time.perf_counter() - begun

        with httpx.Client(base_url=server.url, headers=customer.headers, timeout=60) as client:
            with ThreadPoolExecutor(CLIENTS) as clients:
                answers = list(clients.map(lambda _: ask(client, "beside"), range(REQUESTS)))
            served = sum(good for good, _ in answers)
            slowest = max(seconds for _, seconds in answers)
            report.rows.append((f"{CLIENTS} clients, from the first request on", REQUESTS, served, slowest * 1000))
            pairs = [(ask(client, "alone")[1], ask(client, "beside")[1]) for _ in range(PAIRS)]
    alone, beside = (statistics.median(times) * 1000 for times in zip(*pairs, strict=True))
    report.rows += [("median of the good one alone", PAIRS, PAIRS, alone), ("median beside", PAIRS, PAIRS, beside)]
    report.notes.append("The first line's time is the slowest request's: it waited for the silent one.")
    report.goals += [
        Goal("all are served, %", 100 * served / REQUESTS, served == REQUESTS),
        Goal(f"median added by the bad ones once their breakers are open, ms (at most {MOST_ADDED:g})", beside - alone,
             beside - alone <= MOST_ADDED),
    ]  # fmt: skip
    return report


@contextlib.contextmanager
def _gateway(directory: Path) -> Iterator[Server]:
    with contextlib.ExitStack() as stack:
        lines = []
        for name in PRICES:
            upstream = stack.enter_context(OpenAIUpstream())
            upstream.always({"failing": Script(status=500), "silent": Script(delay=60), "good": Script()}[name])
            lines += [f"[providers.{name}]", 'kind = "openai"', f'base_url = "{upstream.base_url}"']
            lines += ['api_key = "env:UPSTREAM_KEY"']
        for model, names in MODELS.items():
            offers = [
                f'{{ provider = "{n}", upstream_model = "m-{model}", price_per_minute = "{PRICES[n]}" }}' for n in names
            ]
            lines += [f"[models.{model}]", f"deployments = [{', '.join(offers)}]"]
        catalog = directory / "catalog.toml"
        catalog.write_text("\n".join(lines), encoding="utf-8")
        process, server = start_server(
            directory,
            VOXGATE_CATALOG=str(catalog),
            VOXGATE_PROVIDER_FIRST_BYTE_TIMEOUT=FIRST_BYTE,
            UPSTREAM_KEY=KEY,
        )
        stack.callback(stop_server, process)
        yield server
