"""One engine in a process of its own: jobs come in on standard input, what is heard goes out.

Both ways a line is one JSON object. Out: `ready` once, then for each job `language`, any number
of `segment`s, and one of `done`, `cancelled`, `error` (the audio's fault) or `crash` (ours).
SIGUSR1 cancels the job at hand. A process is used because pocketsphinx holds the interpreter's
lock for seconds, and because one that hangs or dies takes nothing else with it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import asdict
from typing import Any

from voxgate.audio import UnusableAudio
from voxgate.engines import Engine, Job

_cancelled = False


class _Cancelled(Exception):
    pass


def main(arguments: list[str]) -> None:
    # Libraries print; what they say must not land between our lines.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGUSR1, _cancel)
    # Ctrl-C in a terminal and a service manager's stop reach the whole group; they are the server's to
    # handle, which lets its requests finish and then closes our input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(5)  # recognition takes every cycle it can get; the server must stay quick beside it
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    engine = load(arguments)
    capabilities = engine.capabilities
    languages = None if capabilities.languages is None else sorted(capabilities.languages)
    _send(out, {"ready": engine.name, "languages": languages, "features": sorted(capabilities.features)})
    for line in sys.stdin:
        _work(engine, Job(**json.loads(line)), out)


def load(arguments: list[str]) -> Engine:
    """`sphinx`, or `whisper MODEL DEVICE COMPUTE-TYPE`."""
    match arguments:
        case ["sphinx"]:
            from voxgate.engines.sphinx import SphinxEngine

            return SphinxEngine()
        case ["whisper", model, device, compute_type]:
            from voxgate.engines.whisper import WhisperEngine

            return WhisperEngine(model=model, device=device, compute_type=compute_type)
        case _:
            raise SystemExit(f"unknown engine: {arguments}")


def _work(engine: Engine, job: Job, out: Any) -> None:
    global _cancelled  # noqa: PLW0603 - a signal handler has nowhere else to leave its word
    _cancelled = False
    try:
        recognition = engine.transcribe(job)
        _send(out, {"language": recognition.language})
        for segment in recognition.segments:
            if _cancelled:
                raise _Cancelled
            _send(out, {"segment": asdict(segment)})
        _send(out, {"done": True})
    except _Cancelled:
        _send(out, {"cancelled": True})
    except UnusableAudio as error:
        _send(out, {"error": str(error)})
    except Exception as error:  # the process's entry point: the job fails, the engine stays
        logging.getLogger(__name__).exception("the engine failed")
        _send(out, {"crash": type(error).__name__})


def _end_with(parent: int) -> None:
    """A server that was killed cannot say so; what it left must not go on computing."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _cancel(number: int, frame: object) -> None:
    global _cancelled  # noqa: PLW0603 - as above
    _cancelled = True


def _send(out: Any, message: dict[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
