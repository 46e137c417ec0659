"""How fast forms are parsed: ordinary ones, and ones made to be slow.

`FormParser` beside the push parser that it is built on, and beside the standard library's
`email`, which has to have the whole form in memory.
"""

from __future__ import annotations

import email
import email.policy
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from multipart import PushMultipartParser

from voxgate.multipart import MIB, FormParser, Limits

from .report import Goal, Report

CHUNK = 64 * 1024
TRIES = 7
TARGET = 800.0  # MB/s
BOUNDARY = "----WebKitFormBoundary7MA4YWxkTrZu0gW"
FILE = 25 * MIB
EMAIL_FILE = 2 * MIB


@dataclass(frozen=True)
class Body:
    """`small` bodies cost what their parts cost, not their bytes; a rate says little of them."""

    name: str
    content: bytes
    boundary: str = BOUNDARY
    small: bool = False


def run() -> Report:
    report = Report(
        f"multipart: forms in {CHUNK // 1024} KiB pieces, the best of {TRIES}, MB/s",
        ("body", "bytes", "ms", "FormParser", "push parser", "email"),
    )
    rates: dict[str, float] = {}
    for body in bodies():
        ours, raw = _best(body, _ours), _best(body, _raw)
        rates[body.name] = _rate(body, ours)
        report.rows.append((body.name, len(body.content), ours * 1000, _rate(body, ours), _rate(body, raw), None))
    reference = Body("random audio, 2 MiB", _form(os.urandom(EMAIL_FILE)))
    times = [_best(reference, parse) for parse in (_ours, _raw, _email)]
    report.rows.append(
        (reference.name, len(reference.content), times[0] * 1000, *(_rate(reference, seconds) for seconds in times))
    )
    small = {body.name for body in bodies() if body.small}
    report.goals = [
        Goal(f"random audio, at least {TARGET:g} MB/s", rates["random audio"], rates["random audio"] >= TARGET)
    ]
    for what, names in (("every body", set(rates)), ("the large bodies", set(rates) - small)):
        slowest = min(names, key=lambda name: rates[name])
        report.goals.append(
            Goal(
                f"slowest of {what} ({slowest}), at least {TARGET / 10:g} MB/s",
                rates[slowest],
                rates[slowest] >= TARGET / 10,
            )
        )
    return report


def bodies() -> list[Body]:
    delimiter = f"\r\n--{BOUNDARY}".encode()
    limits = Limits()
    fields = limits.parts - 1
    return [
        Body("random audio", _form(os.urandom(FILE))),
        Body("zeros", _form(bytes(FILE))),
        Body("dashes", _form(_repeat(b"-"))),
        Body("CRLFs", _form(_repeat(b"\r\n"))),
        Body("CRs", _form(_repeat(b"\r"))),
        Body("LFs", _form(_repeat(b"\n"))),
        Body("CRLF--s", _form(_repeat(b"\r\n--"))),
        Body("delimiters short of a byte", _form(_repeat(delimiter[:-1]))),
        Body("delimiters short of a byte, CR", _form(_repeat(delimiter[:-1] + b"\r"))),
        # So that every piece ends in what could be the delimiter's beginning.
        Body("pieces that end in a prefix", _form(_repeat((b"x" * CHUNK + delimiter[:-1])[-CHUNK:], skip=True))),
        Body("boundary of 200 a, all a", _form(_repeat(b"a"), boundary="a" * 200), "a" * 200),
        Body("boundary of 200 -, all -", _form(_repeat(b"-"), boundary="-" * 200), "-" * 200),
        Body("fields of 32 KiB", _fields(fields, os.urandom(16 * 1024 - 128).hex().encode())),
        Body("empty fields", _fields(fields, b""), small=True),
        Body("fields of a byte", _fields(fields, b"x"), small=True),
        Body("headers up to the limits", _headers(limits, b"x"), small=True),
        Body("headers of semicolons", _headers(limits, b"; "), small=True),
        Body("headers of quotes", _headers(limits, b'"\\'), small=True),
    ]


def _form(audio: bytes, boundary: str = BOUNDARY) -> bytes:
    disposition = 'Content-Disposition: form-data; name="file"; filename="a.wav"'
    head = f"--{boundary}\r\n{disposition}\r\nContent-Type: audio/wav\r\n\r\n"
    return head.encode() + audio + f"\r\n--{boundary}--\r\n".encode()


def _repeat(pattern: bytes, *, skip: bool = False) -> bytes:
    """`pattern` up to the file's limit; `skip` what puts its ends where the pieces end."""
    content = pattern * (FILE // len(pattern))
    return content[len(_form(b"").partition(b"\r\n\r\n")[0]) + 4 :] if skip else content


def _fields(count: int, value: bytes) -> bytes:
    part = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name=".encode()
    parts = b"".join(part + b'"f%d"\r\n\r\n%b\r\n' % (number, value) for number in range(count))
    return parts + f"--{BOUNDARY}--\r\n".encode()


def _headers(limits: Limits, pattern: bytes) -> bytes:
    start = b'Content-Disposition: form-data; name="f"; x='
    long = start + pattern * ((limits.header - len(start) - 2) // len(pattern))
    others = b"".join(b"X-%d: %b\r\n" % (number, b"y" * (limits.header - 8)) for number in range(limits.headers - 1))
    part = f"--{BOUNDARY}\r\n".encode() + long + b"\r\n" + others + b"\r\nx\r\n"
    return part * (limits.parts - 1) + f"--{BOUNDARY}--\r\n".encode()


def _ours(body: Body, pieces: list[bytes]) -> int:
    parser = FormParser(f"multipart/form-data; boundary={body.boundary}")
    size = 0
    for piece in pieces:
        for event in parser.feed(piece):
            if isinstance(event, bytes):
                size += len(event)
    parser.close()
    return size


def _raw(body: Body, pieces: list[bytes]) -> int:
    size = 0
    with PushMultipartParser(body.boundary, max_header_size=Limits().header, header_charset="latin-1") as parser:
        for piece in pieces:
            for event in parser.parse(piece):
                if isinstance(event, bytes):
                    size += len(event)
    return size


def _email(body: Body, pieces: list[bytes]) -> int:
    head = f"Content-Type: multipart/form-data; boundary={body.boundary}\r\n\r\n".encode()
    message = email.message_from_bytes(head + b"".join(pieces), policy=email.policy.HTTP)
    return sum(len(part.get_payload(decode=True) or b"") for part in message.walk() if not part.is_multipart())


def _best(body: Body, parse: Callable[[Body, list[bytes]], int]) -> float:
    pieces = [body.content[start : start + CHUNK] for start in range(0, len(body.content), CHUNK)]
    times = []
    for _ in range(TRIES):
        begun = time.perf_counter()
        parse(body, pieces)
        times.append(time.perf_counter() - begun)
    return min(times)


def _rate(body: Body, seconds: float) -> float:
    return len(body.content) / seconds / 1e6
