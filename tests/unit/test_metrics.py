"""Metrics in CloudWatch's embedded format: what is gathered, and how it is written; and what a GPU says of itself."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from conftest import ROOT
from voxgate.hosts import prometheus
from voxgate.metrics import UNITS, Metrics


class Log(list[str]):
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self]


def made(environment: str = "prod") -> tuple[Metrics, Log]:
    log = Log()
    return Metrics(environment, write=log.append, clock=lambda: 1_700_000_000.5), log


def test_values_are_written_by_dimension_when_they_are_flushed() -> None:
    metrics, log = made()
    metrics.add("Latency", 12.5)
    metrics.add("Latency", 7.0)
    metrics.add("Requests", contract="openai")
    metrics.add("Requests", contract="router")
    assert log == []
    metrics.flush()
    metrics.flush()
    latency, openai, router = log.lines()
    assert latency == {
        "_aws": {
            "Timestamp": 1_700_000_000_500,
            "CloudWatchMetrics": [
                {
                    "Namespace": "Voxgate",
                    "Dimensions": [["environment"]],
                    "Metrics": [{"Name": "Latency", "Unit": "Milliseconds"}],
                }
            ],
        },
        "environment": "prod",
        "Latency": [12.5, 7.0],
    }
    assert openai["_aws"]["CloudWatchMetrics"][0]["Dimensions"] == [["environment"], ["environment", "contract"]]
    assert (openai["contract"], openai["Requests"], router["contract"]) == ("openai", [1], "router")


def test_an_array_has_at_most_a_hundred_values() -> None:
    metrics, log = made()
    for number in range(250):
        metrics.add("Latency", number)
    metrics.flush()
    assert [len(line["Latency"]) for line in log.lines()] == [100, 100, 50]


def test_without_an_environment_nothing_is_kept_and_nothing_written() -> None:
    metrics, log = made("")
    for _ in range(1000):
        metrics.add("Latency", 1.0)
    with metrics.stage("receive"):
        pass
    metrics.flush()
    assert log == []


def test_a_stage_is_timed_also_when_it_fails() -> None:
    metrics, log = made()
    with pytest.raises(KeyError), metrics.stage("attempt"):
        raise KeyError
    metrics.flush()
    (line,) = log.lines()
    assert (line["stage"], len(line["StageLatency"])) == ("attempt", 1)


def test_what_is_left_is_flushed_at_the_end() -> None:
    metrics, log = made()

    async def run() -> None:
        flushing = asyncio.create_task(metrics.flush_forever(every=60))
        await asyncio.sleep(0)
        metrics.add("Latency", 1.0)
        flushing.cancel()
        await asyncio.gather(flushing, return_exceptions=True)

    asyncio.run(run())
    assert len(log) == 1


def test_the_names_and_units_are_those_that_the_dashboard_reads() -> None:
    text = (ROOT / "infra" / "constructs" / "metrics.py").read_text(encoding="utf-8")
    table = dict(re.findall(r"^    ([A-Z]\w+) +(Count|Milliseconds|Seconds|Percent|None)\b", text, re.MULTILINE))
    assert table == UNITS


def smi(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A GPU's own tool, as it is found where there is a GPU."""
    path = directory / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory), prepend=os.pathsep)


def test_a_gpu_says_how_busy_and_how_full_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, monkeypatch, "echo '37, 2048, 24576'; echo '1, 2, 3'")
    assert asyncio.run(prometheus.gpu()) == [37, 2048, 24576]


@pytest.mark.parametrize("script", ["exit 9", "echo 'No devices were found'", "echo '[N/A], 1, 2'"])
def test_where_there_is_no_gpu_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    smi(tmp_path, monkeypatch, script)
    assert asyncio.run(prometheus.gpu()) == []


def test_a_gpu_that_does_not_answer_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, monkeypatch, f"echo $$ > {tmp_path}/pid; exec sleep 60")
    monkeypatch.setattr(prometheus, "_GPU_SECONDS", 0.5)
    begun = time.monotonic()
    assert asyncio.run(prometheus.gpu()) == []
    assert time.monotonic() < begun + 10
    asked = int((tmp_path / "pid").read_text())
    while psutil.pid_exists(asked) and psutil.Process(asked).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < begun + 20, "it is left behind"
        time.sleep(0.02)
