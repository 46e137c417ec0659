"""The gateway's routes: all five contracts' HTTP paths, what a key may read, health, and the description."""

from __future__ import annotations

from typing import TYPE_CHECKING

from voxgate.dialects import live
from voxgate.hosts import reading, tokens
from voxgate.hosts.http import Application, Handler, Request, Response, health, json_response, transcription
from voxgate.wiring import Gateway, all_dialects

if TYPE_CHECKING:
    from voxgate.hosts.sockets import Sockets


def build_application(gateway: Gateway) -> Application:
    routes: dict[str, dict[str, Handler]] = {
        dialect.path: {"POST": transcription(gateway.transcriber, dialect)} for dialect in all_dialects()
    }
    routes |= reading.routes(gateway)
    routes |= {path: {"GET": health} for path in ("/health", "/health/live")}
    routes |= {live.PATH: {"GET": tokens.no_upgrade}, "/v1/stt/tokens": {"POST": tokens.tokens(gateway.meter)}}
    routes |= {"/openapi.json": {"GET": _openapi}}
    return Application(routes)


def build_sockets(gateway: Gateway) -> Sockets:
    from voxgate.hosts.sockets import Sockets
    from voxgate.live import Live

    most = gateway.settings.max_audio_seconds
    return Sockets(Live(transcriber=gateway.transcriber, gate=gateway.meter, max_seconds=most), gateway.metrics)


async def _openapi(request: Request) -> Response:
    from voxgate.dialects.openapi import document  # takes 100 ms, so it is made when asked for

    return json_response(document(all_dialects()))
