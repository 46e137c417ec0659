"""The Lambda function behind API Gateway's REST API.

With SnapStart an execution environment begins as a copy of one that was initialized long before: what was
loaded then stays, and everything that may be used once or for a while only is made again.
https://docs.aws.amazon.com/lambda/latest/dg/snapstart-best-practices.html
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

from voxgate.hosts.gateway import build_application
from voxgate.hosts.lambda_rest import Handler, build_handler, for_one_at_a_time
from voxgate.settings import Settings, will_be_snapshot
from voxgate.wiring import build_gateway, build_store

settings = for_one_at_a_time(Settings.from_environment())


def _made() -> Handler:
    """Connections, credentials, event loop, what is remembered of keys and providers: all of it new."""
    gateway = build_gateway(settings, build_store(settings))
    return build_handler(build_application(gateway), asyncio.new_event_loop(), gateway.metrics)


_answer = _made()


def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    return _answer(event, context)


def restored() -> None:
    """After a snapshot: none of its copies may share what another has."""
    global _answer  # noqa: PLW0603 - Lambda keeps the module, and nothing else, across its requests
    random.seed()
    _answer = _made()


def _load() -> None:
    """What a request loads when it first needs it."""
    import av.subtitles.stream  # noqa: F401 - loading it is the point

    import voxgate.audio.convert
    import voxgate.audio.probe
    import voxgate.dialects.openapi
    import voxgate.providers.http  # noqa: F401 - likewise


if will_be_snapshot():
    from snapshot_restore_py import register_after_restore  # Lambda's own package

    _load()
    register_after_restore(restored)
