"""The gateway's routes: all five contracts' HTTP paths, what a key may read, health, and the description."""

from __future__ import annotations

from voxgate.errors import InvalidInput
from voxgate.hosts import reading
from voxgate.hosts.http import Application, Handler, Request, Response, health, json_response, transcription
from voxgate.wiring import Gateway, all_dialects


def build_application(gateway: Gateway) -> Application:
    routes: dict[str, dict[str, Handler]] = {
        dialect.path: {"POST": transcription(gateway.transcriber, dialect)} for dialect in all_dialects()
    }
    routes |= reading.routes(gateway)
    routes |= {path: {"GET": health} for path in ("/health", "/health/live")}
    routes |= {"/openapi.json": {"GET": _openapi}, "/v1/stt/stream": {"GET": _live}}
    return Application(routes)


async def _live(request: Request) -> Response:
    raise InvalidInput("The live socket is not offered yet; send a file to /v1/stt/transcribe.", param="stream")


async def _openapi(request: Request) -> Response:
    from voxgate.dialects.openapi import document  # takes 100 ms, so it is made when asked for

    return json_response(document(all_dialects()))
