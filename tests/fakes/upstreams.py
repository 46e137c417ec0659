"""Providers that hear what they are told to, on real sockets: one class for each wire format.

What they answer and refuse is what the provider's documentation shows. A `Script` replaces the next
answer, or all of them, and says how it goes wrong. All that was sent to them is kept, parsed.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import re
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

KEY = "upstream-secret-key"
TEXT = "Please send the letter. Thanks, Zoë!"
SEGMENTS = [(0.0, 1.26, " Please send the letter."), (1.5, 2.94, " Thanks, Zoë!")]
WORDS = [
    ("Please", 0.0, 0.32, 0.9),
    ("send", 0.32, 0.56, 0.8),
    ("the", 0.56, 0.64, 0.5),
    ("letter.", 0.64, 1.26, 0.7),
    ("Thanks,", 1.5, 2.1, 1.0),
    ("Zoë!", 2.1, 2.94, 0.25),
]


@dataclass(frozen=True, kw_only=True)
class Script:
    """One answer. `body` None is the wire format's own for that status, padded to `size` bytes with
    spaces. After `stall_after` bytes of it nothing more comes until the other side hangs up, after
    `drop_after` the connection is closed; each byte takes `drip` seconds, the first `delay`.
    `hang_up` closes before there is a status line.

    `events` is a stream of server-sent events, see `sse`: bytes are sent, numbers are seconds of silence, and
    `CUT` closes the connection there; with a `body`, too, that is for who asks for no stream. Without them a
    provider that streams tells its own answer in events where it is asked to, unless it is `whole`."""

    status: int = 200
    body: bytes | None = None
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
    delay: float = 0.0
    stall_after: int | None = None
    drop_after: int | None = None
    drip: float = 0.0
    size: int = 0
    hang_up: bool = False
    events: tuple[bytes | float, ...] | None = None
    whole: bool = False


GOOD = Script()
CUT = -1.0


def sse(*told: dict[str, Any] | bytes | float, end: str = "\n", named: bool = False, done: bool = False) -> Script:
    """A stream of these events (https://html.spec.whatwg.org/multipage/server-sent-events.html), with lines that
    `end` so, `named` by a field `event`, and `[DONE]` after them. Bytes go out as they are."""
    pieces = [_event(each, end, named) if isinstance(each, dict) else each for each in told]
    return Script(events=(*pieces, f"data: [DONE]{end}{end}".encode()) if done else tuple(pieces))


def _event(body: dict[str, Any], end: str, named: bool) -> bytes:
    lines = [f"event: {body['type']}"] if named else []
    return end.join([*lines, f"data: {json.dumps(body, ensure_ascii=False)}", "", ""]).encode()


def delta(text: str, **more: Any) -> dict[str, Any]:
    """OpenAI's, and with an `end` our inference service's."""
    return {"type": "transcript.text.delta", "delta": text, **more}


def done(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "transcript.text.done", "text": text, **more}


def limited(retry_after: int | None = None, *, as_date: bool = False) -> Script:
    """A 429, with its wait in seconds or as a date."""
    if retry_after is None:
        return Script(status=429)
    shown = email.utils.formatdate(time.time() + retry_after, usegmt=True) if as_date else str(retry_after)
    return Script(status=429, headers=(("retry-after", shown),))


@dataclass(frozen=True)
class File:
    name: str
    content_type: str
    content: bytes


@dataclass(frozen=True)
class Sent:
    """One request as it arrived; header names in lower case. `form` has the fields in their order, and
    `audio` is the file part, or the whole body where there is no form."""

    path: str
    query: list[tuple[str, str]]
    headers: dict[str, str]
    body: bytes
    form: list[tuple[str, str]]
    files: dict[str, File]

    @property
    def audio(self) -> bytes:
        return self.files["file"].content if self.files else self.body

    @property
    def model(self) -> str:
        return dict(self.form or self.query).get("model", "")


class Upstream:
    """A context manager. `base_url` is what the catalogue says; `key` what it expects, or nothing."""

    kind = "openai"
    flavor = ""
    prefix = "/v1"
    path = "/v1/audio/transcriptions"
    streams = True

    def __init__(self, *, key: str = KEY) -> None:
        self.key = key
        self.told = 0  # bytes of events that went out
        self.sent: list[Sent] = []
        self.hung_up = threading.Semaphore(0)  # one for each client that left before it had its answer
        self._next: dict[str, list[Script]] = defaultdict(list)
        self._always: dict[str, Script] = {}
        self._arrived = threading.Semaphore(0)
        self._lock = threading.Lock()
        upstream = self

        class Handler(_Handler):
            def do_POST(self) -> None:
                upstream._serve(self)

        self._server = _Server(("127.0.0.1", 0), Handler)
        # What nobody reads is to stop it soon.
        self._server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.base_url = self.url + self.prefix

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def will(self, *scripts: Script, model: str = "") -> None:
        """What it answers next, one after the other, to requests for that model, or for any."""
        self._next[model] += scripts

    def always(self, script: Script, model: str = "") -> None:
        """What it answers where there is nothing next."""
        self._always[model] = script

    def forget(self) -> None:
        self.sent.clear()
        self._next.clear()
        self._always.clear()

    def asked(self, model: str = "") -> list[Sent]:
        return [sent for sent in self.sent if model in ("", sent.model)]

    def wait_for_request(self) -> None:
        assert self._arrived.acquire(timeout=20)

    def answer(self, sent: Sent) -> tuple[int, Any]:
        """What the provider makes of a request."""
        raise NotImplementedError

    def failure(self, status: int) -> Any:
        """The body of one of the provider's own failures."""
        raise NotImplementedError

    def tell(self, sent: Sent, answer: dict[str, Any]) -> Script:
        """The answer as the provider streams it."""
        raise NotImplementedError

    def _serve(self, handler: _Handler) -> None:
        body = handler.rfile.read(int(handler.headers["content-length"]))
        sent = _parsed(handler, body)
        with self._lock:
            self.sent.append(sent)
            waiting = next((self._next[name] for name in (sent.model, "") if self._next[name]), None)
            always = self._always.get(sent.model, self._always.get("", GOOD))
            script = waiting.pop(0) if waiting else always
        self._arrived.release()
        script = self._streamed(script, sent)
        if script.events is None:
            handler.play(script, lambda: self._body(script, sent), self.hung_up.release)
        else:
            handler.stream(script, self._count, self.hung_up.release)

    def _count(self, size: int) -> None:
        self.told += size

    def _streamed(self, script: Script, sent: Sent) -> Script:
        """Its own answer as events, where it is to give that and is asked to stream."""
        asked = self.streams and dict(sent.form).get("stream") == "true" and not script.whole
        if script.events is not None and script.body is not None and not asked:
            return replace(script, events=None)
        if script.events is not None or not asked or script.status != 200 or script.body is not None or script.size:
            return script
        status, answer = self.answer(sent)
        if status != 200:
            return script
        events = self.tell(sent, answer).events
        return replace(script, events=events, content_type="text/event-stream; charset=utf-8")

    def _body(self, script: Script, sent: Sent) -> tuple[int, bytes]:
        status, answer = script.status, script.body
        if answer is None:
            own = self.answer(sent) if status == 200 else (status, self.failure(status))
            status, answer = own[0], json.dumps(own[1], ensure_ascii=False).encode()
        return status, answer + b" " * (script.size - len(answer))


class OpenAIUpstream(Upstream):
    """https://platform.openai.com/docs/api-reference/audio/createTranscription."""

    language = "english"
    logprobs = True
    confident = False

    def answer(self, sent: Sent) -> tuple[int, Any]:
        form, granularities = dict(sent.form), [v for n, v in sent.form if n == "timestamp_granularities[]"]
        shape = form.get("response_format", "json")
        if self.key and sent.headers.get("authorization") != f"Bearer {self.key}":
            return 401, self.failure(401)
        if "file" not in sent.files or not form.get("model"):
            return 400, self._error("you must provide a model parameter", "invalid_request_error", "model")
        if granularities and shape != "verbose_json":
            return 400, self._error("needs verbose_json", "invalid_request_error", "timestamp_granularities")
        spent = {"type": "tokens", "input_tokens": 14, "output_tokens": 45, "total_tokens": 59}
        answer: dict[str, Any] = {"text": TEXT}
        if shape == "json":
            if "logprobs" in [value for name, value in sent.form if name == "include[]"]:
                answer["logprobs"] = [{"token": "Zo", "logprob": -0.25, "bytes": [90, 111]}]
            return 200, answer | {"usage": spent | {"input_token_details": {"text_tokens": 4, "audio_tokens": 10}}}
        answer |= {"task": "transcribe", "duration": 3.03, "usage": {"type": "duration", "seconds": 4}}
        if shape == "diarized_json":
            segments = [
                {
                    "type": "transcript.text.segment",
                    "id": f"seg_{n}",
                    "start": s,
                    "end": e,
                    "text": t,
                    "speaker": "AB"[n],
                }
                for n, (s, e, t) in enumerate(SEGMENTS)
            ]
            return 200, answer | {"segments": segments}
        answer["language"] = self.language
        if "segment" in granularities or not granularities:
            answer["segments"] = [
                {"id": n, "seek": 0, "start": s, "end": e, "text": t, "tokens": [50364, 2555, n]}
                | ({"temperature": 0.0, "avg_logprob": -0.3, "compression_ratio": 1.25, "no_speech_prob": 0.01})
                for n, (s, e, t) in enumerate(SEGMENTS)
            ]
        if "word" in granularities:
            answer["words"] = [
                {"word": w, "start": s, "end": e} | ({"confidence": c} if self.confident else {})
                for w, s, e, c in WORDS
            ]
        return 200, answer

    def tell(self, sent: Sent, answer: dict[str, Any]) -> Script:
        """https://developers.openai.com/api/reference/resources/audio/subresources/transcriptions/streaming-events"""
        usage = {"usage": answer["usage"]}
        if "segments" in answer:  # what a diarizing model tells twice: as it hears it, and whole
            told: list[dict[str, Any]] = []
            for segment in answer["segments"]:
                told += [delta(segment["text"], segment_id=segment["id"]), segment]
            return sse(*told, done(TEXT, **usage))
        logprobs = {name: answer[name] for name in ("logprobs",) if name in answer}
        return sse(*[delta(word, **logprobs) for word in pieces(TEXT)], done(TEXT, **logprobs, **usage))

    def failure(self, status: int) -> Any:
        known = {
            400: ("Audio file might be corrupted or unsupported", "invalid_request_error", "file", "invalid_value"),
            401: (f"Incorrect API key provided: {self.key}.", "invalid_request_error", None, "invalid_api_key"),
            402: ("You exceeded your current quota.", "insufficient_quota", None, "insufficient_quota"),
            404: ("The model does not exist", "invalid_request_error", None, "model_not_found"),
            429: ("Rate limit reached", "requests", None, "rate_limit_exceeded"),
        }
        return self._error(*known.get(status, (f"private words of a {status}", "server_error", None, None)))

    def _error(self, message: str, kind: str, param: str | None, code: str | None = None) -> Any:
        return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class InferenceUpstream(OpenAIUpstream):
    """`voxgate inference`."""

    kind = "inference"
    prefix = ""
    confident = True

    def tell(self, sent: Sent, answer: dict[str, Any]) -> Script:
        form = [(n, v) for n, v in sent.form if n != "response_format"]
        more = [("timestamp_granularities[]", each) for each in ("word", "segment")]
        _, whole = self.answer(replace(sent, form=[*form, ("response_format", "verbose_json"), *more]))
        told = [delta(t if n else t.lstrip(), end=e) for n, (_, e, t) in enumerate(SEGMENTS)]
        return sse(*told, done(TEXT, **{name: whole[name] for name in ("language", "segments", "words", "usage")}))


class MistralUpstream(Upstream):
    """https://docs.mistral.ai/api/endpoint/audio/transcriptions."""

    flavor = "mistral"

    def answer(self, sent: Sent) -> tuple[int, Any]:
        form = dict(sent.form)
        granularity = form.get("timestamp_granularities", form.get("timestamp_granularities[]"))
        if sent.headers.get("authorization") != f"Bearer {self.key}":
            return 401, self.failure(401)
        if "file" not in sent.files or {"file_url", "file_id"} & form.keys():
            return 400, self._error("exactly one of file, file_url, file_id", "invalid_request_file", "file")
        if granularity and "language" in form:
            return 400, self._error("timestamp_granularities and language", "invalid_request_error", "language")
        if any(" " in value or "," in value for name, value in sent.form if name == "context_bias"):
            return 400, self._error("context_bias", "invalid_request_error", "context_bias")
        segments = []
        if granularity == "segment":
            speakers = ["speaker_1", "speaker_2"] if form.get("diarize") == "true" else [None, None]
            segments = [
                {"text": t, "start": s, "end": e, "speaker_id": who, "type": "transcription_segment"}
                for who, (s, e, t) in zip(speakers, SEGMENTS, strict=True)
            ]
        usage = {"prompt_audio_seconds": 3, "prompt_tokens": 4, "total_tokens": 39, "completion_tokens": 35}
        language = form.get("language", "en")
        return 200, {
            "model": form["model"],
            "text": TEXT,
            "language": language,
            "segments": segments,
            "usage": usage,
        }

    def tell(self, sent: Sent, answer: dict[str, Any]) -> Script:
        told: list[dict[str, Any]] = [{"type": "transcription.language", "audio_language": "en"}]
        if answer["segments"]:
            for segment in answer["segments"]:
                told.append({"type": "transcription.text.delta", "text": segment["text"]})
                told.append(segment | {"type": "transcription.segment"})
        else:
            told += [{"type": "transcription.text.delta", "text": word} for word in pieces(TEXT)]
        return sse(*told, answer | {"type": "transcription.done"}, named=True, done=True)

    def failure(self, status: int) -> Any:
        if status == 401:
            return {"detail": "Unauthorized"}  # what stands before the API answers in a shape of its own
        known = {
            400: ("Audio input could not be decoded", "invalid_request_file", "file", "3310"),
            402: ("Payment required", "payment_required", None, "1200"),
            429: ("Rate limit exceeded", "rate_limited", None, "1300"),
        }
        return self._error(*known.get(status, (f"private words of a {status}", "internal_error", None, "1500")))

    def _error(self, message: str, kind: str, param: str | None, code: str = "1500") -> Any:
        return {"object": "error", "message": message, "type": kind, "param": param, "code": code}


class DeepgramUpstream(Upstream):
    """https://developers.deepgram.com/reference/speech-to-text/listen-pre-recorded."""

    kind = "deepgram"
    prefix = ""
    path = "/v1/listen"
    streams = False

    def answer(self, sent: Sent) -> tuple[int, Any]:
        query = dict(sent.query)
        if sent.headers.get("authorization") != f"Token {self.key}":
            return 401, self.failure(401)
        diarized = query.get("diarize") == "true"
        words: list[dict[str, Any]] = [
            {"word": w.strip(".,!").lower(), "start": s, "end": e, "confidence": c, "punctuated_word": w}
            | ({"speaker": int(s > 1.4), "speaker_confidence": 0.5} if diarized else {})
            for w, s, e, c in WORDS
        ]
        channel: dict[str, Any] = {"alternatives": [{"transcript": TEXT, "confidence": 0.99, "words": words}]}
        if query.get("detect_language") == "true":
            channel |= {"detected_language": "en"}
        results: dict[str, Any] = {"channels": [channel]}
        if query.get("utterances") == "true":
            results["utterances"] = [
                {"start": s, "end": e, "confidence": 0.9, "channel": 0, "transcript": t.strip(), "id": f"u{n}"}
                | {"words": [w for w in words if s <= w["start"] < e]}
                | ({"speaker": n} if diarized else {})
                for n, (s, e, t) in enumerate(SEGMENTS)
            ]
        metadata = {"request_id": "2479c8c8", "sha256": "154e", "created": "2026-02-06T19:56:16.180Z", "channels": 1}
        return 200, {"metadata": metadata | {"duration": 3.03175, "models": ["30089e05"]}, "results": results}

    def failure(self, status: int) -> Any:
        known = {
            400: ("Bad Request", "Bad Request: failed to process audio: corrupt or unsupported data"),
            401: ("INVALID_AUTH", "Invalid credentials."),
            402: ("ASR_PAYMENT_REQUIRED", "Project does not have enough credits for an ASR request."),
            403: ("INSUFFICIENT_PERMISSIONS", "Project does not have access to the requested model."),
            429: ("TOO_MANY_REQUESTS", "Too many requests. Please try again later"),
        }
        code, message = known.get(status, ("INTERNAL_SERVER_ERROR", f"private words of a {status}"))
        return {"err_code": code, "err_msg": message, "request_id": "2479c8c8"}


def pieces(text: str) -> list[str]:
    """Words, each with the space before it."""
    return re.findall(r"\s*\S+", text)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def play(self, script: Script, made: Callable[[], tuple[int, bytes]], gone: Callable[[], object]) -> None:
        if self._left_within(script.delay):
            gone()
            self.close_connection = True
            return
        if script.hang_up:
            self.close_connection = True
            return
        status, body = made()
        head = [f"HTTP/1.1 {status} Something", f"content-type: {script.content_type}", f"content-length: {len(body)}"]
        head += [f"{name}: {value}" for name, value in script.headers]
        stop = min(n for n in (script.stall_after, script.drop_after, len(body)) if n is not None)
        try:
            if script.drip:
                self.wfile.write("\r\n".join([*head, "", ""]).encode())
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    time.sleep(script.drip)
                return
            self.wfile.write("\r\n".join([*head, "", ""]).encode() + body[:stop])
        except OSError:
            gone()
            self.close_connection = True
            return
        if stop < len(body):
            if script.stall_after is not None:
                self._left_within(30)
            self.close_connection = True

    def stream(self, script: Script, count: Callable[[int], object], gone: Callable[[], object]) -> None:
        """The script's events in chunks, each as soon as it is its turn."""
        kind = script.content_type if script.content_type != Script.content_type else "text/event-stream"
        head = [f"HTTP/1.1 {script.status} Something", f"content-type: {kind}", "transfer-encoding: chunked"]
        head += [f"{name}: {value}" for name, value in script.headers]
        try:
            if self._left_within(script.delay):
                raise ConnectionError
            self.wfile.write("\r\n".join([*head, "", ""]).encode())
            for piece in script.events or ():
                if piece == CUT:
                    self.close_connection = True
                    return
                if isinstance(piece, bytes):
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                    count(len(piece))
                elif self._left_within(piece):
                    raise ConnectionError
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            gone()
            self.close_connection = True

    def _left_within(self, seconds: float) -> bool:
        """Wait; True where the other side hangs up meanwhile."""
        if not seconds:
            return False
        self.connection.settimeout(seconds)
        try:
            return not self.connection.recv(1)
        except TimeoutError:
            return False
        except OSError:
            return True
        finally:
            self.connection.settimeout(None)

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            super().handle()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its parent's name
        pass


def _parsed(handler: BaseHTTPRequestHandler, body: bytes) -> Sent:
    address = urlsplit(handler.path)
    headers = {name.lower(): value for name, value in handler.headers.items()}
    form: list[tuple[str, str]] = []
    files: dict[str, File] = {}
    kind = handler.headers
    if kind.get_content_type() == "multipart/form-data":
        for name, file_name, content_type, content in _parts(body, str(kind.get_boundary()).encode()):
            if file_name is None:
                form.append((name, content.decode()))
            else:
                files[name] = File(file_name, content_type, content)
    return Sent(address.path, parse_qsl(address.query, keep_blank_values=True), headers, body, form, files)


def _parts(body: bytes, boundary: bytes) -> Iterable[tuple[str, str | None, str, bytes]]:
    """Name, file name, content type and content of each part (RFC 7578)."""
    first, *parts, last = (b"\r\n" + body).split(b"\r\n--" + boundary)
    assert (first, last) == (b"", b"--\r\n"), "the form is not whole"
    for part in parts:
        head, _, content = part.partition(b"\r\n\r\n")
        lines = dict(line.split(": ", 1) for line in head.decode().lower().strip().split("\r\n"))
        said = dict(piece.strip().split("=", 1) for piece in head.decode().split("\r\n")[1].split(";")[1:])
        name, file_name = said["name"].strip('"'), said.get("filename")
        yield name, file_name and file_name.strip('"'), lines.get("content-type", ""), content
