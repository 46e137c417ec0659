"""What the inference service is at, in Prometheus's text format.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Iterator, Mapping

from voxgate.engines import Pool
from voxgate.engines.batch_pool import BatchPool
from voxgate.hosts.http import Handler, Request, Response
from voxgate.providers.embedded import EmbeddedProvider

_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MEGABYTE = 1024 * 1024
_GPU_SECONDS = 3.0  # a driver that hangs keeps whoever asks it
_SIZES = [2**power for power in range(9)]  # the same always and everywhere: Prometheus adds them up over machines


def prometheus(provider: EmbeddedProvider, pool: Pool) -> Handler:
    async def handle(request: Request) -> Response:
        queued = round(max(provider.queued_seconds, 0.0), 3)  # what was added may leave a rest
        told = [
            _metric("ready", "Whether requests are served.", {"": int(pool.ready)}),
            _metric("queue_audio_seconds", "Of audio that waits or is at work.", {"": queued}),
            _metric("queue_requests", "That wait or are at work.", {"": pool.admission.queued}),
        ]
        if isinstance(pool, BatchPool):
            told += _of_batches(pool)
        if found := await gpu():
            busy, used, total = found
            told += (
                _metric("gpu_utilization_ratio", "Share of the time.", {"": round(busy / 100, 2)}),
                _metric("gpu_memory_used_bytes", "On the first GPU.", {"": int(used * _MEGABYTE)}),
                _metric("gpu_memory_total_bytes", "On the first GPU.", {"": int(total * _MEGABYTE)}),
            )
        return Response(200, {"content-type": _TYPE}, "".join(told).encode())

    return handle


def _of_batches(pool: BatchPool) -> Iterator[str]:
    stats = pool.stats
    yield _metric("windows_per_second", "That are decoded while there is work.", {"": round(pool.admission.speed, 3)})
    count = sum(stats.batches.values())
    sizes: dict[str, float] = {
        f'_bucket{{le="{most}"}}': sum(batches for size, batches in stats.batches.items() if size <= most)
        for most in _SIZES
    }
    decoded = sum(size * batches for size, batches in stats.batches.items())
    sizes |= {'_bucket{le="+Inf"}': count, "_sum": decoded, "_count": count}
    yield _metric("batch_size", "Windows that were decoded at a time.", sizes, kind="histogram")
    stages = {f'{{stage="{s}"}}': f"{stats.sums.get(s, 0.0):.3f}" for s in ("preparing", "waiting", "decoding")}
    what = "Spent on preparing, waiting for a turn, and decoding."
    yield _metric("stage_seconds_total", what, stages, kind="counter")
    heard, took = stats.sums.get("seconds", 0.0), stats.sums.get("decoding", 0.0)
    yield _metric("audio_seconds_total", "Of speech, decoded.", {"": f"{heard:.3f}"}, kind="counter")
    factor = round(took / heard if heard else 0, 4)
    yield _metric("real_time_factor", "Seconds of decoding for one of speech.", {"": factor})
    loaded = {f'{{model="{_escaped(name)}"}}': int(there) for name, there in stats.loaded.items()}
    yield _metric("model_loaded", "Whether the weights are in memory.", loaded)


def _metric(name: str, what: str, samples: Mapping[str, float | str], *, kind: str = "gauge") -> str:
    """A metric's lines; the samples go by what follows its name."""
    head = f"# HELP voxgate_{name} {what}\n# TYPE voxgate_{name} {kind}\n"
    return head + "".join(f"voxgate_{name}{suffix} {value}\n" for suffix, value in samples.items())


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


async def gpu() -> list[float]:
    """The percentage of its time, and the megabytes of its memory that are used and that it has; nothing where there
    is none, or none that answers."""
    query = ("--query-gpu=utilization.gpu,memory.used,memory.total", "--format=csv,noheader,nounits")
    try:
        asked = await asyncio.create_subprocess_exec("nvidia-smi", *query, stdout=subprocess.PIPE)
    except OSError:
        return []
    try:
        async with asyncio.timeout(_GPU_SECONDS):
            said, _ = await asked.communicate()
        busy, used, total = map(float, said.decode().partition("\n")[0].split(","))
    except (TimeoutError, ValueError):
        return []
    finally:
        if asked.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                asked.kill()
            with contextlib.suppress(TimeoutError):  # in the driver it cannot even be killed
                async with asyncio.timeout(_GPU_SECONDS):
                    await asked.communicate()
    return [busy, used, total]
