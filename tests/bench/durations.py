"""How exactly durations are measured, by which customers are billed.

Ours beside what the header claims, as PyAV reads it, and beside mutagen's answer.
"""

from __future__ import annotations

from pathlib import Path

import av
import mutagen

from conftest import RECORDINGS
from voxgate.audio.probe import probe
from voxgate.audio.sniff import sniff

from .report import Goal, Report

CLOSE = 50.0  # ms


def run() -> Report:
    report = Report(
        "durations: s, and errors in ms (- is no answer)",
        ("fixture", "true", "ours", "header", "mutagen", "ours off", "header off", "mutagen off"),
    )
    errors: list[tuple[float | None, ...]] = []
    for recording in (recording for recording in RECORDINGS if recording.duration):
        path = str(recording.path)
        found = (_ours(path), _header(path), _mutagen(path))
        off = tuple(None if seconds is None else (seconds - recording.duration) * 1000 for seconds in found)
        errors.append(off)
        report.rows.append((recording.file, recording.duration, *found, *off))
    for number, who in enumerate(("ours", "header", "mutagen")):
        column = [row[number] for row in errors]
        answers = [abs(error) for error in column if error is not None]
        close = sum(error <= CLOSE for error in answers)
        report.notes.append(
            f"{who:8}{close} of {len(column)} within {CLOSE:g} ms, {len(column) - len(answers)} without an answer, "
            f"largest error {max(answers):.1f} ms"
        )
        if who == "ours":
            report.goals.append(Goal("ours within 50 ms, share of fixtures", close / len(column), close == len(column)))
    return report


def _ours(path: str) -> float:
    with Path(path).open("rb") as file:
        return probe(file, sniff(file), max_seconds=3600)


def _header(path: str) -> float | None:
    with av.open(path) as container:
        stream = container.streams.audio[0]
        if stream.duration and stream.time_base:
            return float(stream.duration * stream.time_base)
        return container.duration / av.time_base if container.duration else None


def _mutagen(path: str) -> float | None:
    try:
        file = mutagen.File(path)
    except mutagen.MutagenError:
        return None
    return None if file is None or not file.info.length else float(file.info.length)
