"""How fast and how well the embedded engine recognizes, through the API."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from conftest import RECORDINGS, start_server, stop_server, word_errors

from .report import Report


def run() -> Report:
    report = Report(
        "recognition: one request after the other, the embedded engine",
        ("fixture", "audio s", "ms", "real-time factor", "word error rate", "words"),
    )
    errors = spent = audio = 0.0
    words = invented = 0
    distinct: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        process, server = start_server(Path(directory))
        try:
            server.transcribe(RECORDINGS[0].path).raise_for_status()  # the first loads PyAV
            for recording in (recording for recording in RECORDINGS if recording.duration):
                begun = time.perf_counter()
                response = server.transcribe(recording.path)
                seconds = time.perf_counter() - begun
                heard = response.raise_for_status().json()["text"]
                rate = word_errors(recording.text, heard) if recording.text else None
                count = len(recording.text.split())
                report.rows.append(
                    (recording.file, recording.duration, seconds * 1000, seconds / recording.duration, rate, count)
                )
                if rate is None:
                    invented += len(heard.split())
                else:
                    distinct.setdefault(recording.text, []).append(rate)
                    errors, words = errors + rate * count, words + count
                    spent, audio = spent + seconds, audio + recording.duration
        finally:
            stop_server(process)
    report.notes = [
        f"speech: {audio:.1f} s in {spent:.1f} s, real-time factor {spent / audio:.3f}",
        f"{errors:.0f} errors in {words} words, word error rate {errors / words:.3f}",
        f"the same by sentence, each its mean: {_mean(distinct):.3f}, of {len(distinct)} sentences",
        f"words heard where nobody speaks: {invented}",
    ]
    return report


def _mean(distinct: dict[str, list[float]]) -> float:
    """Weighted by words, so that one sentence in many containers counts once."""
    errors = sum(sum(rates) / len(rates) * len(text.split()) for text, rates in distinct.items())
    return errors / sum(len(text.split()) for text in distinct)
