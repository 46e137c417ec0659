"""What the live socket has of HTTP: the tokens that open it, for pages that are to hold no key."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable

from voxgate.accounts import Scope, keys
from voxgate.dialects.live import TokenForm
from voxgate.errors import InvalidInput, UpgradeRequired
from voxgate.hosts.http import Handler, Request, Response, json_response
from voxgate.metering import Meter

_MOST_BODY = 1024


async def no_upgrade(request: Request) -> Response:
    raise UpgradeRequired("This is a WebSocket's address; to send a file, POST it to /v1/stt/transcribe.")


def tokens(meter: Meter, clock: Callable[[], float] = time.time) -> Handler:
    async def handle(request: Request) -> Response:
        caller = await meter.reading(request.id, request.headers, Scope.TRANSCRIBE, request.told)
        form = await _token_form(request)
        token, expires = keys.generate(keys.TOKEN), math.ceil(clock()) + form.expires_in
        key = await meter.store.find_key(caller.key_id)
        await meter.store.create_token(keys.digest(token), key, expires)
        return json_response({"token": token, "expires_in": form.expires_in, "expires_at": expires})

    return handle


async def _token_form(request: Request) -> TokenForm:
    body = b""
    async for chunk in request.body:
        body += chunk
        if len(body) > _MOST_BODY:
            raise InvalidInput("The body is too long: it is an object with 'expires_in'.")
    if not body.strip():
        return TokenForm()
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidInput("The body must be JSON.") from error
    return TokenForm.of(given)
