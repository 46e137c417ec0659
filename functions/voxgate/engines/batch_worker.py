"""Whisper in a process of its own: many requests at once, whose windows share batches.

The lines are those of `engines.worker`, with the number of a `job` or of a `live` session in each. In: a job,
`cancel`, and a session's messages. Out: a job's `segment`s and one of
`done`, `error` (the audio's fault), `late` and `crash`; and each second `stats`.
"""

from __future__ import annotations

import base64
import dataclasses
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from voxgate import languages, weights
from voxgate.audio import UnusableAudio
from voxgate.engines import WINDOW_SECONDS, Job, told, window_count
from voxgate.engines.batching import Batcher, Cancelled, Late, Priority, Request
from voxgate.engines.models import Models
from voxgate.engines.whisper import Guards, Heard, Task, WhisperEngine, weight
from voxgate.engines.whisper_live import WhisperListening
from voxgate.engines.windows import Samples, Window
from voxgate.model import Segment

logger = logging.getLogger(__name__)
_SESSIONS = 64
_STATS_SECONDS = 1.0
# A batch that takes longer than so many seconds, and than so many times what one took at the warm-up, never ends.
_HANGS, _HANGS_TIMES = 300.0, 60.0
_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")  # as CUDA and cuBLAS say it
Send = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`models` maps names to what `weights.find` takes, with what it fetches in `directory`; the first is what is
    asked for by any other name."""

    models: dict[str, str]
    directory: str = ""
    device: str = "auto"
    compute_type: str = ""
    beam_size: int = 5
    batch_size: int = 0  # 0: what is the fastest
    threads: int = 2
    budget: int = 0
    guards: dict[str, float] = dataclasses.field(default_factory=dict)


class BatchWorker:
    def __init__(self, options: Options, send: Send) -> None:
        self._send = send
        self._models = Models(options.budget)
        self._engines: dict[str, WhisperEngine] = {}
        for name, where in options.models.items():
            begun = time.monotonic()
            directory = weights.find(where, Path(options.directory))
            self._models.make_room(weight(str(directory)))
            logger.info("loading %s from %s", name, directory)
            engine = WhisperEngine(
                str(directory),
                name=name,
                device=options.device,
                compute_type=options.compute_type,
                beam_size=options.beam_size,
                guards=Guards(**options.guards),
            )
            self._engines[name] = engine
            self._models.add(engine)
            logger.info("loaded %s in %.1f s", name, time.monotonic() - begun)
        first = next(iter(self._engines.values()))
        self._models.need(first.name)
        # Ready is who has decoded something.
        size, self._speed = first.warm_up(most=options.batch_size or 64)
        self._batcher = Batcher(self._decode, size=options.batch_size or size, threads=options.threads)
        self._first = first
        self._requests: dict[int, tuple[Request[Task], Heard]] = {}
        self._sessions: dict[int, _Session] = {}
        self._closed = threading.Event()
        self._reporting = threading.Thread(target=self._report, daemon=True)
        self._reporting.start()

    def hello(self) -> dict[str, Any]:
        ready = {name: told(engine.capabilities) for name, engine in self._engines.items()}
        return {"ready": ready, "sessions": _SESSIONS, "speed": self._speed, "batch": self._batcher.size}

    def take(self, message: dict[str, Any]) -> None:
        match message:
            case {"cancel": number}:
                if found := self._requests.get(number):
                    self._batcher.cancel(found[0])
            case {"live": number}:
                self._live(number, message)
            case {"job": number}:
                self._job(number, message)

    def close(self) -> None:
        self._closed.set()
        self._batcher.close()
        self._reporting.join()

    def _engine(self, name: str) -> WhisperEngine:
        return self._engines.get(name, self._first)

    def _decode(self, tasks: Any) -> Any:
        """In halves, from then on, where there is too little memory for all at once: longer texts than the warm-up's
        take more of it."""
        try:
            return self._models.decode(tasks[0].heard.model, tasks)
        except RuntimeError as error:
            if len(tasks) == 1 or not any(sign in str(error) for sign in _OUT_OF_MEMORY):
                raise
            half = (len(tasks) + 1) // 2
            logger.warning("batches of %d do not fit, and are of %d at most from now on: %s", len(tasks), half, error)
        self._batcher.size = min(self._batcher.size, half)
        return [*self._decode(tasks[:half]), *self._decode(tasks[half:])]

    def _job(self, number: int, message: dict[str, Any]) -> None:
        job = Job(**message["do"])
        engine = self._engine(job.model)
        try:
            heard = engine.heard(job)
        except Exception as error:  # the job fails, the others and the process stay
            logger.exception("the engine failed")
            self._send({"job": number, "crash": type(error).__name__})
            return

        def finish(error: BaseException | None) -> None:
            self._requests.pop(number, None)
            self._send({"job": number} | _ended(error, heard.language if any_told else None))

        any_told: list[bool] = []

        def tell(segment: Segment) -> None:
            any_told[:] = [True]
            self._send({"job": number, "segment": dataclasses.asdict(segment)})

        request = Request(
            engine.rows(heard),
            tell,
            finish,
            seconds=window_count(job.seconds) * WINDOW_SECONDS,
            priority=Priority[job.priority.upper()],
            deadline=time.monotonic() + job.left,
        )
        self._requests[number] = request, heard
        self._batcher.submit(request)

    def _live(self, number: int, message: dict[str, Any]) -> None:
        if "open" in message:
            asked = message["open"]
            engine = self._engine(asked.get("model", ""))
            listening = WhisperListening(
                self._understand(engine), engine.speech, asked["language"], interim=asked["interim"]
            )
            self._sessions[number] = _Session(number, listening, self._send)
            self._send({"live": number, "open": True})
        elif session := self._sessions.get(number):
            session.inbox.put(message)
            if "drop" in message or "end" in message:
                del self._sessions[number]

    def _understand(
        self, engine: WhisperEngine
    ) -> Callable[[Samples, str | None, bool], tuple[str | None, Segment | None]]:
        """Of one utterance, at once, before all recordings."""

        def understand(samples: Samples, language: str | None, words: bool) -> tuple[str | None, Segment | None]:
            job = Job(path="", container="", max_seconds=0.0, language=language, words=words)
            # A partial is not worth a second look.
            heard = engine.heard(job, tries=None if words else 1)
            ended: Future[None] = Future()
            segments: list[Segment] = []

            def rows() -> Any:
                yield engine.row(heard, Window(samples, ((0, len(samples)),)))

            def finish(error: BaseException | None) -> None:
                ended.set_exception(error) if error else ended.set_result(None)

            self._batcher.submit(Request(rows(), segments.append, finish, priority=Priority.LIVE))
            ended.result()
            if not segments:
                return None, None
            said = tuple(word for segment in segments for word in segment.words or ())
            text = "".join(segment.text for segment in segments)
            whole = Segment(segments[0].start, segments[-1].end, text, said if words else None)
            return languages.parse(heard.language or ""), whole

        return understand

    def _report(self) -> None:
        longest = max(_HANGS, _HANGS_TIMES * self._batcher.size / self._speed)
        while not self._closed.wait(_STATS_SECONDS):
            if self._batcher.decoding_for > longest:
                logger.error(
                    "a batch has not ended in %.0f s: the process ends, for another to take its place", longest
                )
                os._exit(1)
            stats = dataclasses.asdict(self._batcher.stats())
            self._send({"stats": stats | {"loaded": dict(self._models.loaded)}})
            for number, (request, heard) in tuple(self._requests.items()):
                if request.told == request.made and heard.passed:  # silence
                    self._send({"job": number, "passed": heard.passed})


class _Session:
    """One of live speech, in a thread of its own: it waits for its turn as the others do for theirs."""

    def __init__(self, number: int, listening: WhisperListening, send: Send) -> None:
        self.inbox: queue.Queue[dict[str, Any]] = queue.Queue()
        self._number = number
        self._listening = listening
        self._send = send
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            while self._take(self.inbox.get()):
                if self.inbox.empty():
                    self._step()
        except Exception as error:  # the session fails, the others and the process stay
            logger.exception("the engine failed")
            self._send({"live": self._number, "crash": type(error).__name__})

    def _take(self, message: dict[str, Any]) -> bool:
        match message:
            case {"pcm": pcm}:
                self._listening.push(base64.b64decode(pcm))
                self._send({"live": self._number, "took": True})
            case {"finalize": True}:
                self._listening.finalize()
            case {"end": True}:
                self._listening.end()
                self._step()
                self._send({"live": self._number, "ended": True})
                return False
            case {"drop": True}:
                return False
        return True

    def _step(self) -> None:
        for heard in self._listening.step():
            segment = dataclasses.asdict(heard.segment)
            self._send({"live": self._number, "segment": segment, "final": heard.final})


def _ended(error: BaseException | None, language: str | None) -> dict[str, Any]:
    match error:
        case None:
            return {"done": True, "language": languages.parse(language) if language else None}
        case UnusableAudio():
            return {"error": str(error)}
        case Late():
            return {"late": True}
        case Cancelled():
            return {"cancelled": True}
        case _:
            logger.error("the engine failed", exc_info=error)
            return {"crash": type(error).__name__}


def why(error: Exception) -> str:
    """Why a model cannot be loaded, and what helps."""
    said = str(error)
    if isinstance(error, weights.NoWeights):
        return said
    if "libcu" in said or "CUDA" in said.upper():
        if "out of memory" in said:
            return (
                f"There is too little GPU memory for the model ({said}): take a smaller one, or another compute type."
            )
        need = "CTranslate2 wants CUDA 12 with cuDNN 9; without a GPU set VOXGATE_WHISPER_DEVICE=cpu"
        return f"The GPU cannot be used ({said}): {need}."
    return f"The Whisper model cannot be loaded ({said})."
