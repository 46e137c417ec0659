"""The inference service's container (`python -m inference.main`)."""

from __future__ import annotations

from voxgate.hosts.inference import build_inference
from voxgate.hosts.serve import serve
from voxgate.settings import Settings
from voxgate.wiring import build_pool, make_spool, model_names

settings = Settings.from_environment()
app = build_inference(
    pool=build_pool(settings),
    models=model_names(settings),
    settings=settings,
    spool_dir=make_spool(settings.spool_dir),
)

if __name__ == "__main__":
    serve(app, drain_seconds=settings.drain_seconds)
