"""An engine that neither works nor ends: it is noticed and replaced."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from conftest import DATA
from fakes import whisper_model
from voxgate.engines import Job, batch_pool
from voxgate.engines.batch_pool import BatchPool
from voxgate.errors import ProviderError

PATIENCE = 60.0
SPEECH = Job(path=str(DATA / "a-flac.flac"), container="flac", max_seconds=60.0, seconds=1.0)
# The warm-up is done by then.
STUCK = """
import sys, time
from voxgate.engines import batch_worker, worker
from voxgate.engines.models import Models

batch_worker._HANGS, batch_worker._HANGS_TIMES = 0.5, 0.0
Models.decode = lambda *_: time.sleep(600)
worker.main(["whisper", sys.argv[1]])
"""


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    model = whisper_model.build(tmp_path_factory.mktemp("models") / "tiny")
    return {"models": {"tiny": str(model)}, "device": "cpu", "beam_size": 1, "batch_size": 1, "guards": {"speech": 0.1}}


def test_a_process_that_stands_still_is_replaced(options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_pool, "_SILENCE", 2.0)
    monkeypatch.setattr(batch_pool, "_SILENCES", 2)

    async def run() -> None:
        pool = BatchPool(options=options, queue=8)
        try:
            async with asyncio.timeout(PATIENCE):
                await pool.start()
                await pool.recognize(SPEECH)
                before = set(psutil.Process().children())
                (engine,) = (child for child in before if "voxgate.engines.worker" in child.cmdline())
                await asyncio.sleep(3)  # who has nothing to do and says so is left alone
                assert engine.is_running()
                os.kill(engine.pid, signal.SIGSTOP)
                with pytest.raises(ProviderError):
                    await pool.recognize(SPEECH)
                while not pool.ready:
                    await asyncio.sleep(0.05)
                await pool.recognize(SPEECH)
                assert not engine.is_running()
        finally:
            await pool.close()

    asyncio.run(run())


def test_a_process_whose_batch_never_ends_ends_itself(options: dict[str, object], tmp_path: Path) -> None:
    asked = json.dumps({"job": 1, "do": asdict(SPEECH)}).encode() + b"\n"
    log = tmp_path / "log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", STUCK, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    with process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            assert "ready" in json.loads(process.stdout.readline())
            process.stdin.write(asked)
            process.stdin.flush()
            assert process.wait(PATIENCE) == 1
        finally:
            process.kill()
    assert "a batch has not ended in " in log.read_text(encoding="utf-8")
