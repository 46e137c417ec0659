"""How much audio the inference service hears in a second, beside faster-whisper itself; and what overload does to it.

VOXGATE_BENCH_MODEL=DIRECTORY takes that model, as it is by default; else it is one of tiny shape and random weights,
which takes whatever it hears for speech. The peers are asked for one recording after the other, in this process, by
turns with the service.
"""

from __future__ import annotations

import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from faster_whisper import BatchedInferencePipeline, WhisperModel

from conftest import Server, inference_service
from customers import OPENAI, SPEECH
from fakes import whisper_model
from overload import PATIENCE, Load, Upload, capacity, overload
from voxgate.engines.whisper import usual_type

from .busy import speech
from .report import Goal, Report

DURATIONS = (5, 30, 600)  # seconds
AT_ONCE = (1, 8, 64)
ROUNDS = 3
TURN = 3.0  # seconds that a turn takes at least
LONG = 60.0  # seconds, after which a case has no more turns
SHARE = 0.95  # of what the better peer does

OVERLOAD_SECONDS = 60.0
TIMES = 3.0
GOODPUT, REFUSED_MS, GROWTH = 0.9, 50.0, 1.05


def run() -> Report:
    report = Report(
        f"inference: audio seconds a second, the median of {ROUNDS} turns, or fewer where they take long",
        ("recordings at once", "voxgate", "WhisperModel", "BatchedInferencePipeline", "by the better one"),
    )
    given = os.environ.get("VOXGATE_BENCH_MODEL", "")
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        model = Path(given).resolve() if given else whisper_model.build(place / "tiny-random")
        environment = {"VOXGATE_WHISPER_MODEL": str(model), **({} if given else whisper_model.UNGUARDED)}
        report.notes.append(f"model: {model.name}")
        with inference_service(place / "service", **environment) as server:
            _speeds(report, server, peers(model, unguarded=not given))
        # Another one, so that what was learnt of long recordings does not count.
        with inference_service(place / "overload", **environment) as server:
            _overload(report, server)
    return report


Peer = Callable[[bytes], None]


def peers(model: Path, *, unguarded: bool) -> list[Peer]:
    """With the options that the service has."""
    plain = WhisperModel(str(model), compute_type=usual_type("auto"))
    batched = BatchedInferencePipeline(plain)
    options: dict[str, Any] = {"language": "en", "vad_filter": True, "condition_on_previous_text": False}
    if unguarded:
        options |= {"beam_size": 1, "compression_ratio_threshold": None, "log_prob_threshold": None}
        options |= {"no_speech_threshold": None}

    def one(audio: bytes) -> None:
        for _ in plain.transcribe(io.BytesIO(audio), **options)[0]:
            pass

    def windows(audio: bytes) -> None:
        for _ in batched.transcribe(io.BytesIO(audio), without_timestamps=False, **options)[0]:
            pass

    return [one, windows]


def _speeds(report: Report, server: Server, others: list[Peer]) -> None:
    worst = float("inf")
    with httpx.Client(base_url=server.url, timeout=3600, limits=httpx.Limits(max_connections=None)) as client:
        for duration in DURATIONS:
            audio = speech(duration)

            def ask(_: int, audio: bytes = audio) -> None:
                form = {"model": "default", "language": "en"}
                client.post(OPENAI, data=form, files={"file": audio}).raise_for_status()

            ask(0)
            for other in others:
                other(audio)
            for count in AT_ONCE:
                turns: list[list[float]] = []
                with ThreadPoolExecutor(count) as pool:
                    begun = time.perf_counter()
                    while len(turns) < ROUNDS and (not turns or time.perf_counter() < begun + LONG):
                        turn = [_speed(partial(_all, pool, ask, count), duration * count)]
                        turn += [_speed(partial(other, audio), duration) for other in others]
                        turns.append(turn)
                ours, *theirs = (statistics.median(figures) for figures in zip(*turns, strict=True))
                # Each turn by itself, since what else the machine does changes.
                share = statistics.median(turn[0] / max(turn[1:]) for turn in turns)
                worst = min(worst, share)
                report.rows.append((f"{count} of {duration} s", ours, *theirs, share))
    report.goals.append(
        Goal(f"the slowest case by the better peer, at least {SHARE:g}", worst, worst >= SHARE),
    )


def _all(pool: ThreadPoolExecutor, ask: Callable[[int], None], count: int) -> None:
    for _ in pool.map(ask, range(count)):
        pass


def _speed(work: Callable[[], object], seconds: float) -> float:
    """Audio seconds a second; the work is repeated for as long as a turn is."""
    done, begun = 0, time.perf_counter()
    while done == 0 or time.perf_counter() - begun < TURN:
        work()
        done += 1
    return done * seconds / (time.perf_counter() - begun)


def _overload(report: Report, server: Server) -> None:
    upload = Upload.of(SPEECH.read_bytes(), model="default", language="en")
    before = capacity(server, upload, 10.0)
    load = overload(server, upload, most=before, times=TIMES, seconds=OVERLOAD_SECONDS)
    after = capacity(server, upload, 10.0)
    batch = load.work.batch_seconds
    most = statistics.mean((before, after))
    refused = sorted(answer.took * 1000 for answer in load.of(503))
    served, late = len(load.served), len(load.of(502)) + len(load.of(200)) - len(load.served)
    asked = (
        f"overload: {TIMES:g} times {before:.1f} requests a second for {OVERLOAD_SECONDS:g} s, "
        f"each with time for {PATIENCE} batches of {batch:.2f} s"
    )
    became = (
        f"{len(load.answers)} asked, {served} served in time, {late} accepted and not, {len(refused)} refused, "
        f"{len(load.of(0))} connections broken"
    )
    rate = (
        f"{load.goodput:.1f} a second of {most:.1f} ({before:.1f} before, {after:.1f} after); "
        f"{load.work.windows:.0f} windows were decoded"
    )
    memory = f"refused in {_spread(refused)} ms; memory {load.grown:.3f} times what it was"
    report.notes += [asked, became, rate, memory]
    report.goals += [
        Goal(f"goodput by capacity, at least {GOODPUT:g}", load.goodput / most, load.goodput >= GOODPUT * most),
        Goal(
            "batches that the latest answer missed its deadline by, at most 1", load.latest / batch, _met(load, batch)
        ),
        Goal(
            f"ms to refuse, 99 of 100, at most {REFUSED_MS:g}",
            _percentile(refused, 99),
            _percentile(refused, 99) <= REFUSED_MS,
        ),
        Goal(f"memory by what it was, at most {GROWTH:g}", load.grown, load.grown <= GROWTH),
    ]


def _met(load: Load, batch: float) -> bool:
    return load.latest <= batch and not load.of(0)


def _percentile(figures: list[float], percent: int) -> float:
    return figures[min(len(figures) * percent // 100, len(figures) - 1)] if figures else 0.0


def _spread(figures: list[float]) -> str:
    return (
        f"{_percentile(figures, 50):.1f} (median), {_percentile(figures, 99):.1f} (p99), {max(figures, default=0):.1f}"
    )
