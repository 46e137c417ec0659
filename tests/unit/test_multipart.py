"""Forms off the wire: what every client writes, in any split, and what is refused."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import chain, pairwise

import httpx
import pytest
import requests
from hypothesis import example, given, settings
from hypothesis import strategies as st

from voxgate.errors import InvalidInput, TooLarge
from voxgate.multipart import Event, Field, FileStart, FormParser, Limits

TYPE = "multipart/form-data; boundary=b"
Part = Field | tuple[FileStart, bytes]


def part(disposition: bytes, content: bytes = b"x", *headers: bytes) -> bytes:
    lines = (b"--b", b"Content-Disposition: form-data; " + disposition, *headers, b"", content, b"")
    return b"\r\n".join(lines)


def body(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--b--\r\n"


def events(
    content: bytes, cuts: Sequence[int] = (), kind: str | None = TYPE, limits: Limits | None = None
) -> list[Event]:
    parser = FormParser(kind, limits)
    found: list[Event] = []
    for start, end in pairwise([0, *cuts, len(content)]):
        found += parser.feed(content[start:end])
    parser.close()
    return found


def parts(
    content: bytes, cuts: Sequence[int] = (), kind: str | None = TYPE, limits: Limits | None = None
) -> list[Part]:
    """The form with each file's pieces put together: what no split may change."""
    found: list[Part] = []
    for event in events(content, cuts, kind, limits):
        if isinstance(event, bytes):
            file = found.pop()
            assert isinstance(file, tuple), "a piece of no file"
            found.append((file[0], file[1] + event))
        else:
            found.append((event, b"") if isinstance(event, FileStart) else event)
    return found


def outcome(content: bytes, cuts: Sequence[int], limits: Limits) -> object:
    try:
        return parts(content, cuts, TYPE, limits)
    except InvalidInput as error:
        return type(error), error.param


# --- any split ---------------------------------------------------------------------------------

DISPOSITIONS = (
    b'name="model"',
    b'name="file"; filename="a.wav"',
    b'name="file"; filename=""',
    b"name=file; filename*=utf-8''a%20b.wav",
    b'filename="a.wav"',
    b"name=f\xc3\xa4; filename=\xe4",
    b"",
)
HEADERS = (
    b"Content-Type: audio/wav",
    b"Content-Type: text/plain",
    b"Content-Length: 3",
    b"X-Long: " + b"y" * 60,
    b"X: folded\r\n line",
    b"X: bare\nline feed",
    b"X: bare\rcarriage return",
    b"no colon",
    b"Content-Disposition: attachment",
)
CONTENTS = st.one_of(
    st.binary(max_size=12),
    st.lists(
        st.sampled_from([b"\r", b"\n", b"\r\n", b"-", b"--", b"--b", b"b", b"\r\n--", b"\xff", b"x"]), max_size=8
    ).map(b"".join),
)
PARTS = st.builds(
    lambda disposition, content, headers: part(disposition, content, *headers),
    st.sampled_from(DISPOSITIONS),
    CONTENTS,
    st.lists(st.sampled_from(HEADERS), max_size=2),
)
BODIES = st.builds(
    lambda preamble, inner, end: preamble + b"".join(inner) + end,
    st.sampled_from([b"", b"\r\n", b"preamble\r\n", b"a long preamble\r\n\r\n", b"no line", b"\n", b"x" * 90]),
    st.lists(PARTS, max_size=4),
    st.sampled_from([b"--b--", b"--b--\r\n", b"--b--\r\nepilogue --b\r\n", b"--b", b"--bX", b"--b\n", b""]),
)
SMALL = Limits(file=20, field=20, fields=30, parts=3, header=64, headers=3)
ROOMY = Limits()


@settings(max_examples=600)
@given(BODIES, st.data(), st.sampled_from([SMALL, ROOMY]))
def test_no_split_of_a_body_changes_what_it_says(content: bytes, data: st.DataObject, limits: Limits) -> None:
    if limits is SMALL and b"Content-Length" in content:
        limits = ROOMY  # two limits broken at once may be told in either order
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=6)))
    whole = outcome(content, (), limits)
    assert outcome(content, cuts, limits) == whole
    assert outcome(content, range(1, len(content)), limits) == whole


@given(st.binary(max_size=200))
@example(b"--b")
@example(b"--b--")
def test_arbitrary_bytes_are_parsed_or_refused_alike_in_any_split(content: bytes) -> None:
    assert outcome(content, range(1, len(content)), ROOMY) == outcome(content, (), ROOMY)


@given(st.lists(st.tuples(st.text(max_size=8), st.text(max_size=20)), max_size=5), st.binary(max_size=300))
def test_what_a_client_encodes_comes_out_unchanged(fields: list[tuple[str, str]], audio: bytes) -> None:
    fields = [(name.translate({0: None, 34: None, 10: None, 13: None, 92: None, 37: None}), v) for name, v in fields]
    sent = [part(b'name="' + name.encode() + b'"', value.encode()) for name, value in fields]
    content = body(*sent, part(b'name="file"; filename="a"', audio))
    if b"\r\n--b" in audio or any("\r\n--b" in value for _, value in fields):
        return
    assert parts(content) == [*(Field(n, v) for n, v in fields), (FileStart("file"), audio)]


# --- what clients send -------------------------------------------------------------------------

AUDIO = bytes(range(256)) * 4 + b"\r\n--\r\n"


def by_requests() -> tuple[str, bytes]:
    sent = requests.Request(
        "POST",
        "http://x/",
        data=[("model", "whisper-1"), ("timestamp_granularities[]", "word"), ("timestamp_granularities[]", "segment")],
        files={"file": ("grüße.wav", AUDIO, "audio/wav")},
    ).prepare()
    assert isinstance(sent.body, bytes)
    return sent.headers["Content-Type"], sent.body


def by_httpx() -> tuple[str, bytes]:
    sent = httpx.Request(
        "POST",
        "http://x/",
        data={"model": "whisper-1", "timestamp_granularities[]": ["word", "segment"]},
        files={"file": ("grüße.wav", AUDIO, "audio/wav")},
    )
    return sent.headers["Content-Type"], sent.read()


def by_hand(boundary: str, header: str, disposition: str, *headers: str) -> tuple[str, bytes]:
    lines: list[bytes] = []
    for name, value in (("model", "whisper-1"), *(("timestamp_granularities[]", g) for g in ("word", "segment"))):
        lines += [
            f"--{boundary}".encode(),
            f'Content-Disposition: form-data; name="{name}"'.encode(),
            b"",
            value.encode(),
        ]
    lines += [f"--{boundary}".encode(), disposition.encode(), *(h.encode() for h in headers), b"", AUDIO]
    return header, b"\r\n".join([*lines, f"--{boundary}--".encode(), b""])


def by_curl() -> tuple[str, bytes]:
    mark = "------------------------d74496d66958873e"
    disposition = 'Content-Disposition: form-data; name="file"; filename="grüße.wav"'
    return by_hand(mark, f"multipart/form-data; boundary={mark}", disposition, "Content-Type: audio/wav")


def by_axios() -> tuple[str, bytes]:
    mark = "--------------------------502830391462746212386453"
    disposition = 'Content-Disposition: form-data; name="file"; filename="grüße.wav"'
    return by_hand(mark, f"multipart/form-data; boundary={mark}", disposition, "Content-Type: audio/wav")


def by_a_browser() -> tuple[str, bytes]:
    mark = "----WebKitFormBoundary7MA4YWxkTrZu0gW"
    disposition = 'Content-Disposition: form-data; name="file"; filename="grüße.wav"'
    return by_hand(mark, f"multipart/form-data; boundary={mark}", disposition, "Content-Type: audio/wav")


def by_dotnet() -> tuple[str, bytes]:
    mark = "0a3e6b5c-6f0e-4b0a-9d0e-1f2d3c4b5a69"
    disposition = (
        "Content-Disposition: form-data; name=file; filename=\"=?utf-8?B?Z3I=?=\"; filename*=utf-8''gr%C3%BC%C3%9Fe.wav"
    )
    return by_hand(mark, f'multipart/form-data; boundary="{mark}"', disposition, "Content-Type: audio/wav")


def by_old_urllib3() -> tuple[str, bytes]:
    mark = "5d5bb7f2c5e1f6f1"
    disposition = "content-disposition: form-data; name=\"file\"; filename*=utf-8''gr%C3%BC%C3%9Fe.wav"
    return by_hand(mark, f"Multipart/Form-Data; Boundary={mark}", disposition, "content-type: audio/wav")


@pytest.mark.parametrize(
    "client",
    [by_requests, by_httpx, by_curl, by_axios, by_a_browser, by_dotnet, by_old_urllib3],
    ids=lambda c: c.__name__,
)
def test_the_form_is_read_as_sent(client: object) -> None:
    assert callable(client)
    kind, content = client()
    found = parts(content, kind=kind)
    assert [p for p in found if isinstance(p, Field)] == [
        Field("model", "whisper-1"),
        Field("timestamp_granularities[]", "word"),
        Field("timestamp_granularities[]", "segment"),
    ]
    assert [p for p in found if not isinstance(p, Field)] == [(FileStart("file"), AUDIO)]


@pytest.mark.parametrize(
    "kind",
    [
        'multipart/form-data; boundary="b"',
        "multipart/form-data; Boundary=b",
        "multipart/form-data; BOUNDARY=b",
        "multipart/form-data;boundary=b",
        "MULTIPART/FORM-DATA; boundary=b; charset=utf-8",
        "multipart/form-data; charset=utf-8; boundary=b",
    ],
)
def test_the_boundary_is_found_however_it_is_written(kind: str) -> None:
    assert parts(body(part(b"name=f")), kind=kind) == [Field("f", "x")]


def test_a_quoted_boundary_may_hold_any_character_of_the_rfc() -> None:
    mark = "a'()+_,-./:=? b"
    content = body(part(b"name=f")).replace(b"--b", f"--{mark}".encode())
    assert parts(content, kind=f'multipart/form-data; boundary="{mark}"') == [Field("f", "x")]


def test_a_boundary_of_seventy_characters_is_taken() -> None:
    mark = "b" * 70
    content = body(part(b"name=f")).replace(b"--b", f"--{mark}".encode())
    assert parts(content, kind=f"multipart/form-data; boundary={mark}") == [Field("f", "x")]


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        (b'name="file"; filename="a b;c.wav"', "file"),
        (b"name=file; filename=a.wav", "file"),
        (b'name="file"; filename="gr\xc3\xbc\xc3\x9fe.wav"', "file"),
        (b'name="file"; filename="gr\xfc\xdfe.wav"', "file"),
        (b'name="f\xc3\xa4"; filename="a"', "fä"),
        (b'name="f\xe4"; filename="a"', "fä"),
        (b"name=file; filename*=UTF-8''gr%C3%BC%C3%9Fe.wav", "file"),
        (b"name=file; filename*=iso-8859-1'de'gr%FC%DFe.wav", "file"),
        (b"name=file; filename=\"a.wav\"; filename*=UTF-8''b.wav", "file"),
        (b"name=file; filename*=UTF-8''b.wav; filename=\"a.wav\"", "file"),
        (b"name=file; FileName*=UTF-8''b.wav", "file"),
        (b"name=file; filename*=undefined''b%FF.wav", "file"),
        (b"name=file; filename*=UTF-8''%C3.wav", "file"),
        (b"name=file; filename=\"x; filename*=utf-8''y\"", "file"),
        (b'name="file"; filename="a%22b.wav"', "file"),
        (b'name="file"; filename="a\\"b.wav"', "file"),
        (b'name="file"; filename=""', "file"),
    ],
)
def test_names_come_in_every_encoding(disposition: bytes, name: str) -> None:
    assert parts(body(part(disposition))) == [(FileStart(name), b"x")]


def test_a_fields_name_may_look_like_a_file_name() -> None:
    assert parts(body(part(b"name=\"f; filename*=utf-8''y\""))) == [Field("f; filename*=utf-8''y", "x")]


@pytest.mark.parametrize("kind", [b"audio/wav", b"Audio/WAV", b"video/mp4", b"application/octet-stream"])
def test_a_media_part_without_a_file_name_is_a_file(kind: bytes) -> None:
    content = body(part(b"name=file", b"\xff", b"Content-Type: " + kind))
    assert parts(content) == [(FileStart("file"), b"\xff")]


@pytest.mark.parametrize("kind", [b"text/plain", b"text/plain; charset=utf-8", b"application/json"])
def test_a_typed_part_that_is_no_media_stays_a_field(kind: bytes) -> None:
    assert parts(body(part(b"name=f", b"x", b"Content-Type: " + kind))) == [Field("f", "x")]


def test_repeated_fields_keep_their_order_among_the_others() -> None:
    sent = [("a", "1"), ("b", "2"), ("a", "3"), ("a", "1"), ("b", "4")]
    content = body(*(part(b"name=" + name.encode(), value.encode()) for name, value in sent))
    assert events(content) == [Field(name, value) for name, value in sent]


def test_what_stands_before_and_after_the_form_is_passed_over() -> None:
    content = b"This is a message in MIME format.\r\n" + body(part(b"name=f")) + b"\r\nThe end.\r\n--b\r\n"
    assert parts(content) == [Field("f", "x")]


@pytest.mark.parametrize(
    "audio",
    [
        b"a--b",
        b"a--b\r\n",
        b"a\n--b\r\n",
        b"a\r--b--",
        b"--b",
        b"\r\n-",
        b"\r\n--a",
        b"\r\n--\r\n",
        b"\r\n\r\n-b--b--\r\n",
        b"",
    ],
)
def test_audio_that_holds_the_boundary_within_a_line_stays_whole(audio: bytes) -> None:
    content = body(part(b"name=file; filename=a", audio), part(b"name=f"))
    assert parts(content) == [(FileStart("file"), audio), Field("f", "x")]


def test_a_form_without_parts_is_a_form() -> None:
    assert events(b"--b--\r\n") == []


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (None, "absent"),
        ("", "absent"),
        ("application/json", "application/json"),
        ("application/x-www-form-urlencoded", "x-www-form-urlencoded"),
        ("multipart/mixed; boundary=b", "multipart/mixed"),
        ("multipart/form-data", "boundary"),
        ("multipart/form-data; boundary=", "boundary"),
        ('multipart/form-data; boundary=""', "boundary"),
        (f"multipart/form-data; boundary={'b' * 201}", "boundary"),
        ('multipart/form-data; boundary="a\nb"', "boundary"),
    ],
)
def test_a_content_type_that_cannot_be_parsed_by_is_refused(kind: str | None, word: str) -> None:
    with pytest.raises(InvalidInput, match=word):
        FormParser(kind)


FORM = body(
    part(b"name=model", b"whisper-1"),
    part(b'name="file"; filename="a.wav"', b"RIFF\r\n--\r\n--c\0", b"Content-Type: audio/wav"),
    part(b"name=language", b"en"),
)


@pytest.mark.parametrize("pieces", ["whole", "byte by byte"])
def test_a_body_cut_off_anywhere_is_refused(pieces: str) -> None:
    whole = len(FORM) - len(b"\r\n")  # the line break after the closing boundary is optional
    for end in range(whole):
        with pytest.raises(InvalidInput) as caught:
            events(FORM[:end], range(1, end) if pieces == "byte by byte" else ())
        assert "cut off" in caught.value.message, end
    assert parts(FORM[:whole]) == parts(FORM)


@pytest.mark.parametrize(
    "content",
    [
        b"no boundary at all",
        b"x--b\r\nContent-Disposition: form-data; name=f\r\n\r\nx\r\n--b--\r\n",
        b"--b\nContent-Disposition: form-data; name=f\n\nx\n--b--\n",
        b"--bad\r\n",
        body(b"--b\r\n\r\nx\r\n"),
        body(b"--b\r\nContent-Disposition: attachment; name=f\r\n\r\nx\r\n"),
        body(b"--b\r\nContent-Type: text/plain\r\n\r\nx\r\n"),
        body(b"--b\r\nno colon\r\n\r\nx\r\n"),
        body(part(b"name=f", b"x", b"Content-Length: 2")),
        body(part(b"name=f", b"x", b"Content-Length: 0")),
        body(part(b"name=f", b"x", b"Content-Length: -1")),
        body(part(b"name=f", b"x", b"X: a\nb: c")),
        body(part(b"name=f", b"x", b"Content-Disposition: form-data; name=g")),
        body(part(b"name=f", b"x", b"content-disposition: attachment")),
        body(part(b"name=f", b"x", b"Content-Type: audio/wav", b"content-type: text/plain")),
        FORM.replace(b"--b", b"--c"),
    ],
)
def test_a_malformed_body_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidInput) as caught:
        events(content)
    assert (caught.value.status, caught.value.code) == (400, "invalid_input")


def test_junk_without_a_boundary_is_refused_before_it_is_all_read() -> None:
    parser = FormParser(TYPE)
    junk = (b"x" * 1024 for _ in range(32))
    with pytest.raises(InvalidInput, match="boundary"):
        list(chain.from_iterable(map(parser.feed, junk)))
    assert len(list(junk)) > 20


@pytest.mark.parametrize("content", [b"\xff", b"en\xe9", b"\xed\xa0\x80", b"\xc3"])
def test_a_field_that_is_not_utf8_is_named(content: bytes) -> None:
    with pytest.raises(InvalidInput, match="'language' is not UTF-8") as caught:
        events(body(part(b"name=language", content)))
    assert caught.value.param == "language"


# --- limits ------------------------------------------------------------------------------------

FILE = b"name=file; filename=a"


@pytest.mark.parametrize("cut", [1, 7, 10**6])
def test_a_file_may_be_as_long_as_its_limit_and_no_byte_more(cut: int) -> None:
    limits = Limits(file=1000)
    for size in (999, 1000):
        content = body(part(FILE, b"x" * size))
        assert parts(content, range(cut, len(content), cut), limits=limits) == [(FileStart("file"), b"x" * size)]
    content = body(part(FILE, b"x" * 1001))
    with pytest.raises(TooLarge, match=r"\(1000\) exceeded") as caught:
        events(content, range(cut, len(content), cut), limits=limits)
    assert (caught.value.status, caught.value.param) == (413, "file")


def test_a_file_over_its_limit_is_refused_before_it_ends() -> None:
    parser = FormParser(TYPE, Limits(file=1000))
    with pytest.raises(TooLarge):
        list(parser.feed(part(FILE, b"x" * 2000)))


def test_the_files_limit_holds_for_each_file_and_not_for_the_fields() -> None:
    limits = Limits(file=10, field=20)
    content = body(part(FILE, b"x" * 10), part(b"name=f", b"x" * 20), part(FILE, b"y" * 10))
    assert len(parts(content, limits=limits)) == 3


def test_a_field_may_be_as_long_as_its_limit_and_no_byte_more() -> None:
    limits = Limits(field=10)
    assert parts(body(part(b"name=f", b"x" * 10)), limits=limits) == [Field("f", "x" * 10)]
    with pytest.raises(InvalidInput, match="too long") as caught:
        events(body(part(b"name=f", b"x" * 11)), limits=limits)
    assert (caught.value.status, caught.value.param) == (400, "f")


def test_all_fields_together_have_a_limit() -> None:
    limits = Limits(field=10, fields=25)
    sizes = [(b"name=a", 10), (b"name=b", 10), (b"name=c", 5)]
    assert len(parts(body(*(part(n, b"x" * s) for n, s in sizes)), limits=limits)) == 3
    with pytest.raises(InvalidInput) as caught:
        events(body(*(part(n, b"x" * (s + (n == b"name=c"))) for n, s in sizes)), limits=limits)
    assert caught.value.param == "c"


def test_the_number_of_parts_has_a_limit() -> None:
    limits = Limits(parts=3)
    assert len(parts(body(*[part(b"name=f")] * 3), limits=limits)) == 3
    with pytest.raises(InvalidInput, match="too many parts"):
        events(body(*[part(b"name=f")] * 4), limits=limits)


@pytest.mark.parametrize("cut", [1, 10**6])
def test_a_part_header_may_be_as_long_as_its_limit_and_no_byte_more(cut: int) -> None:
    def content(size: int) -> bytes:
        return body(part(b"name=f", b"x", b"X-Pad: " + b"y" * (size - 7)))

    limits = Limits(header=100)
    assert parts(content(100), range(cut, 400, cut), limits=limits) == [Field("f", "x")]
    with pytest.raises(InvalidInput, match="too long part headers"):
        events(content(101), range(cut, 400, cut), limits=limits)


def test_the_number_of_part_headers_has_a_limit() -> None:
    limits = Limits(headers=3)
    assert parts(body(part(b"name=f", b"x", b"A: 1", b"B: 2")), limits=limits) == [Field("f", "x")]
    with pytest.raises(InvalidInput, match="part headers"):
        events(body(part(b"name=f", b"x", b"A: 1", b"B: 2", b"C: 3")), limits=limits)


def test_a_body_within_all_limits_is_within_the_bodys_limit() -> None:
    limits = Limits(file=1000, field=100, fields=200, parts=4)
    content = body(
        part(FILE, b"x" * 1000, b"X: " + b"y" * 500), part(b"name=a", b"x" * 100), part(b"name=b", b"x" * 100)
    )
    assert parts(content, limits=limits)
    assert len(content) <= limits.body


# --- hostile input is read in linear time ------------------------------------------------------

PATTERNS = {
    "dashes": b"-",
    "line breaks": b"\r\n",
    "carriage returns": b"\r",
    "almost a delimiter": b"\r\n--" + b"b" * 60 + b"a",
    "half a delimiter": b"\r\n--" + b"b" * 30,
    "dashed lines": b"\r\n--",
    "the boundary without its line": b"--" + b"b" * 70,
}
MIB = 1024 * 1024


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
@pytest.mark.parametrize("step", [4096, MIB], ids=["4 KiB at a time", "1 MiB at a time"])
def test_hostile_audio_costs_the_same_for_each_byte_however_long(pattern: bytes, step: int) -> None:
    mark = b"b" * 70
    head = part(FILE)[:-3].replace(b"--b", b"--" + mark)

    def seconds(size: int) -> float:
        content = pattern * (size // len(pattern))
        parser = FormParser(f"multipart/form-data; boundary={mark.decode()}")
        list(parser.feed(head))
        begun = time.process_time()
        for start in range(0, len(content), step):
            for _ in parser.feed(content[start : start + step]):
                pass
        return time.process_time() - begun

    one = min(seconds(MIB) for _ in range(4))
    four = min(seconds(4 * MIB) for _ in range(4))
    # Linear is about four times `one`, some milliseconds; quadratic is sixteen times, hundreds of them.
    assert four < 7 * one + 0.02
