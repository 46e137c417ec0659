"""The processes around the gateway that `metering` measures: `python -m tests.bench.peers NAME`.

`upstream` is an inference service that answers at once, `bare` the gateway's host without the
meter; both print their address. `flood RATE SECONDS KIND` asks with API keys that do not exist, and
prints how many refusals a second it got.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import time

from voxgate.accounts import keys

CONNECTIONS = 4
ANSWER = {
    "task": "transcribe",
    "language": "english",
    "duration": 3.03,
    "text": "the weather is nice today and we are going to the park",
    "segments": [{"id": 0, "start": 0.0, "end": 3.03, "text": "the weather is nice today"}],
}


def main() -> None:
    name, *arguments = sys.argv[1:]
    if name == "upstream":
        asyncio.run(_upstream())
    elif name == "bare":
        _bare()
    else:
        url, rate, seconds, kind = arguments
        asyncio.run(_flood(url, float(rate), float(seconds), kind))


async def _upstream() -> None:
    body = json.dumps(ANSWER).encode()
    answer = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await reader.readexactly(_length(await reader.readuntil(b"\r\n\r\n")))
                writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


def _bare() -> None:
    """What `voxgate serve` does, with another gate: all that differs is the meter."""
    from voxgate.hosts.asgi import AsgiApp
    from voxgate.hosts.gateway import build_application
    from voxgate.hosts.serve import bind, run, url
    from voxgate.metering import Unmetered
    from voxgate.multipart import Limits
    from voxgate.settings import Settings
    from voxgate.transcribe import Transcriber
    from voxgate.wiring import build_gateway, build_store

    settings = Settings.from_environment()
    built = build_gateway(settings, build_store(settings))
    transcriber = Transcriber(
        catalog=built.catalog,
        providers=built.providers,
        gate=Unmetered(),
        health=built.health,
        outages=None,
        staging=None,
        cache=None,
        spool_dir=built.spool_dir,
        limits=Limits(),
        max_audio_seconds=settings.max_audio_seconds,
        provider_timeout=settings.provider_timeout,
        request_timeout=settings.request_timeout,
    )
    gateway = dataclasses.replace(built, transcriber=transcriber)
    listening = bind("127.0.0.1", 0)

    async def start() -> None:
        await gateway.start()
        print(url(listening), flush=True)

    run(AsgiApp(build_application(gateway), start=start, stop=gateway.close), listening)


async def _flood(url: str, rate: float, seconds: float, kind: str) -> None:
    """Each key once: `wrong` ones have to be looked up, `mistyped` ones are told by their checksum."""
    host, _, port = url.removeprefix("http://").partition(":")
    share = int(rate * seconds) // CONNECTIONS
    sent = [[keys.generate() for _ in range(share)] for _ in range(CONNECTIONS)]
    print("begins", flush=True)
    begun = time.perf_counter()

    async def ask(lane: int) -> int:
        reader, writer = await asyncio.open_connection(host, int(port))
        refused = 0
        for number, key in enumerate(sent[lane]):
            shown = key if kind == "wrong" else key[:-6] + "000000"
            due = begun + (number * CONNECTIONS + lane) / rate
            await asyncio.sleep(max(due - time.perf_counter(), 0))
            writer.write(
                f"POST /v1/audio/transcriptions HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {shown}\r\n"
                "content-length: 0\r\n\r\n".encode()
            )
            head = await reader.readuntil(b"\r\n\r\n")
            refused += head.startswith(b"HTTP/1.1 401 ")
            await reader.readexactly(_length(head))
        writer.close()
        return refused

    refused = sum(await asyncio.gather(*map(ask, range(CONNECTIONS))))
    print(refused / (time.perf_counter() - begun))


def _length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.partition(b":")[2])
    raise ValueError(f"there is no length in {head!r}")


if __name__ == "__main__":
    main()
