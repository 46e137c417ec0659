"""The streaming ingress: what Lambda cannot carry, as an ASGI app (`python -m ingress.main`)."""

from __future__ import annotations

from voxgate.hosts.asgi import AsgiApp
from voxgate.hosts.gateway import build_application, build_sockets
from voxgate.hosts.serve import serve
from voxgate.settings import Settings
from voxgate.wiring import build_gateway, build_store

settings = Settings.from_environment()
gateway = build_gateway(settings, build_store(settings))
app = AsgiApp(
    build_application(gateway),
    sockets=build_sockets(gateway),
    start=gateway.start,
    stop=gateway.close,
    slowest_upload=settings.slowest_upload,
)

if __name__ == "__main__":
    serve(app, drain_seconds=settings.drain_seconds)
