"""What the inference service is at, in Prometheus's text format.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator

from voxgate.engines import Pool
from voxgate.engines.batch_pool import BatchPool
from voxgate.hosts.http import Handler, Request, Response
from voxgate.providers.embedded import EmbeddedProvider

_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MEGABYTE = 1024 * 1024


def prometheus(provider: EmbeddedProvider, pool: Pool) -> Handler:
    async def handle(request: Request) -> Response:
        lines = [*_gauge("ready", "Whether requests are served.", int(pool.ready))]
        lines += _gauge("queue_audio_seconds", "Of audio that waits or is at work.", round(provider.queued_seconds, 3))
        lines += _gauge("queue_requests", "That wait or are at work.", pool.admission.queued)
        if isinstance(pool, BatchPool):
            lines += _of_batches(pool)
        lines += await _of_gpu()
        return Response(200, {"content-type": _TYPE}, "".join(f"{line}\n" for line in lines).encode())

    return handle


def _of_batches(pool: BatchPool) -> Iterator[str]:
    stats = pool.stats
    yield from _gauge("windows_per_second", "That are decoded while there is work.", round(pool.admission.speed, 3))
    yield from _head("batch_size", "histogram", "Windows that were decoded at a time.")
    count = 0
    for size, batches in sorted(stats.batches.items()):
        count += batches
        yield f'voxgate_batch_size_bucket{{le="{size}"}} {count}'
    yield f'voxgate_batch_size_bucket{{le="+Inf"}} {count}'
    yield f"voxgate_batch_size_sum {sum(size * batches for size, batches in stats.batches.items())}"
    yield f"voxgate_batch_size_count {count}"
    yield from _head("stage_seconds_total", "counter", "Spent on preparing, waiting for a turn, and decoding.")
    for stage in ("preparing", "waiting", "decoding"):
        yield f'voxgate_stage_seconds_total{{stage="{stage}"}} {stats.sums.get(stage, 0.0):.3f}'
    yield from _head("audio_seconds_total", "counter", "Of speech, decoded.")
    yield f"voxgate_audio_seconds_total {stats.sums.get('seconds', 0.0):.3f}"
    heard, took = stats.sums.get("seconds", 0.0), stats.sums.get("decoding", 0.0)
    yield from _gauge(
        "real_time_factor", "Seconds of decoding for one of speech.", round(took / heard if heard else 0, 4)
    )
    yield from _head("model_loaded", "gauge", "Whether the weights are in memory.")
    for name, loaded in stats.loaded.items():
        yield f'voxgate_model_loaded{{model="{_escaped(name)}"}} {int(loaded)}'


async def _of_gpu() -> list[str]:
    found = await gpu()
    if not found:
        return []
    busy, used, total = found
    return [
        *_gauge("gpu_utilization_ratio", "Share of the time.", round(busy / 100, 2)),
        *_gauge("gpu_memory_used_bytes", "On the first GPU.", int(used * _MEGABYTE)),
        *_gauge("gpu_memory_total_bytes", "On the first GPU.", int(total * _MEGABYTE)),
    ]


def _gauge(name: str, what: str, value: float) -> Iterator[str]:
    yield from _head(name, "gauge", what)
    yield f"voxgate_{name} {value}"


def _head(name: str, kind: str, what: str) -> Iterator[str]:
    yield f"# HELP voxgate_{name} {what}"
    yield f"# TYPE voxgate_{name} {kind}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


async def gpu() -> list[float]:
    """The percentage of its time, and the megabytes of its memory that are used and that it has; nothing where there
    is none."""
    query = ("--query-gpu=utilization.gpu,memory.used,memory.total", "--format=csv,noheader,nounits")
    try:
        asked = await asyncio.create_subprocess_exec("nvidia-smi", *query, stdout=subprocess.PIPE)
        said, _ = await asked.communicate()
        busy, used, total = map(float, said.decode().partition("\n")[0].split(","))
    except (OSError, ValueError):
        return []
    return [busy, used, total]
