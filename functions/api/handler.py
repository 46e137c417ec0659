"""The Lambda function behind API Gateway's REST API."""

from __future__ import annotations

import asyncio

from voxgate.hosts.gateway import build_application
from voxgate.hosts.lambda_rest import build_handler, for_one_at_a_time
from voxgate.settings import Settings
from voxgate.wiring import build_gateway, build_store

settings = for_one_at_a_time(Settings.from_environment())
gateway = build_gateway(settings, build_store(settings))
handler = build_handler(build_application(gateway), asyncio.new_event_loop())
