"""One engine in a process of its own: jobs come in on standard input, what is heard goes out.

Both ways a line is one JSON object. Out: `ready` once, then for each job `language`, any number
of `segment`s, and one of `done`, `cancelled`, `error` (the audio's fault) or `crash` (ours); for each
session of live speech, by its number, `open`, `segment`s, and one of `ended` and `crash`.
SIGUSR1 cancels the job at hand. A process is used because pocketsphinx holds the interpreter's
lock for seconds, and because one that hangs or dies takes nothing else with it.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import asdict
from queue import Queue
from typing import Any

from voxgate.audio import UnusableAudio
from voxgate.engines import Engine, Job, Listening, told

_INBOX = 16  # messages, after which the host waits
_STEP_SECONDS = 0.5  # after which there is a step though more messages wait
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
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    if arguments[:1] == ["whisper"]:
        _batches(arguments[1], out)
        return
    os.nice(5)  # recognition takes every cycle it can get; the server must stay quick beside it
    engine = load(arguments)
    _send(out, {"ready": {engine.name: told(engine.capabilities)}, "sessions": 1})
    inbox: Queue[str] = Queue(_INBOX)
    threading.Thread(target=_read, args=(inbox,), daemon=True).start()
    live = _Live(engine, out)
    while line := inbox.get():
        message = json.loads(line)
        if "live" in message:
            live.take(message, more=not inbox.empty())
        else:
            _work(engine, Job(**message), out)


def _batches(options: str, out: Any) -> None:
    from voxgate.engines.batch_worker import BatchWorker, Options, why

    lock = threading.Lock()

    def send(message: dict[str, Any]) -> None:
        with lock:
            _send(out, message)

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        worker = BatchWorker(Options(**json.loads(options)), send)
    except Exception as error:  # noqa: BLE001 - the process's entry point: some libraries raise nothing better
        send({"failed": why(error)})
        return
    send(worker.hello())
    for line in sys.stdin:
        worker.take(json.loads(line))
    worker.close()


def _read(inbox: Queue[str]) -> None:
    for line in sys.stdin:
        inbox.put(line)
    inbox.put("")


class _Live:
    """The sessions of live speech of this process."""

    def __init__(self, engine: Engine, out: Any) -> None:
        self._engine = engine
        self._out = out
        self._sessions: dict[int, Listening] = {}
        self._stepped = 0.0

    def take(self, message: dict[str, Any], *, more: bool) -> None:
        """`more` are waiting already, and are looked at first, for partials of what is over help nobody."""
        number = message["live"]
        try:
            self._take(number, message)
            if not more or time.monotonic() > self._stepped + _STEP_SECONDS:
                for number in tuple(self._sessions):
                    self._step(number)
                self._stepped = time.monotonic()
        except Exception as error:  # the session fails, the others and the engine stay
            logging.getLogger(__name__).exception("the engine failed")
            if failed := self._sessions.pop(number, None):
                failed.close()
            _send(self._out, {"live": number, "crash": type(error).__name__})

    def _take(self, number: int, message: dict[str, Any]) -> None:
        match message:
            case {"open": {"language": language, "interim": interim}}:
                self._sessions[number] = self._engine.listen(language, interim=interim)
                _send(self._out, {"live": number, "open": True})
            case _ if number not in self._sessions:
                pass  # it failed, and its host does not know yet
            case {"pcm": pcm}:
                self._sessions[number].push(base64.b64decode(pcm))
                _send(self._out, {"live": number, "took": True})
            case {"finalize": True}:
                self._sessions[number].finalize()
            case {"drop": True}:
                self._sessions.pop(number).close()
            case {"end": True}:
                self._sessions[number].end()
                self._step(number)
                self._sessions.pop(number).close()
                _send(self._out, {"live": number, "ended": True})

    def _step(self, number: int) -> None:
        for heard in self._sessions[number].step():
            _send(self._out, {"live": number, "segment": asdict(heard.segment), "final": heard.final})


def load(arguments: list[str]) -> Engine:
    """`sphinx`. Whisper is none of these: see `engines.batch_worker`."""
    match arguments:
        case ["sphinx"]:
            from voxgate.engines.sphinx import SphinxEngine

            return SphinxEngine()
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
