"""Subtitles that any player's parser reads back, and OpenAI's verbose JSON."""

from __future__ import annotations

import html
import io
import json
from itertools import pairwise

import pytest
import srt
import webvtt
from hypothesis import given, settings
from hypothesis import strategies as st

from voxgate.formats import json_body, plain_body, verbose
from voxgate.formats.cues import Cue, cues
from voxgate.model import ResponseFormat, Segment, Transcript, Word

TIMES = st.one_of(
    st.floats(-10, 100),
    st.floats(0, 10_000).map(lambda s: round(s, 3)),
    st.sampled_from([0.0, -0.0, 59.9996, 0.0004, 0.0005, 3599.9999, 359_999.9999, 360_000.0, 5e6, 1e9, -1e300, 1e-300]),
)
TEXTS = st.one_of(
    st.text(max_size=30),
    st.lists(
        st.sampled_from(
            [
                "\n",
                "\r\n",
                "\r",
                "\n\n",
                "-->",
                "--",
                ">",
                "<",
                "&",
                "&amp;",
                "<b>",
                "1",
                "2",
                "\0",
                "\x0b",
                "\x0c",
                "\x1c",
                "\x85",
                "\u2028",
                "\u2029",
                "\ufeff",
                "\x01",
                "\x7f",
                "00:00:01,000 --> 00:00:02,000",
                "WEBVTT",
                "NOTE",
                " ",
                "hello",
                "né",
                "漢字",
                "🎉",
                "\ud800",
                "NOTE a",
                "STYLE",
                "\u200b",
                "\t",
            ]
        ),
        max_size=6,
    ).map("".join),
    st.integers(0, 999).map(str),
)
TRANSCRIPTS = st.builds(
    Transcript,
    text=TEXTS,
    duration=st.floats(0, 1e6),
    segments=st.none() | st.lists(st.builds(Segment, start=TIMES, end=TIMES, text=TEXTS), max_size=6).map(tuple),
)
SRT, VTT, TEXT = ResponseFormat.SRT, ResponseFormat.VTT, ResponseFormat.TEXT


def rendered(transcript: Transcript, kind: ResponseFormat) -> str:
    body = plain_body(transcript, kind)
    assert body is not None
    return body.content.decode()


def as_utf8(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


@settings(max_examples=500)
@given(TRANSCRIPTS)
def test_cues_are_in_order_apart_and_never_empty(transcript: Transcript) -> None:
    found = list(cues(transcript))
    for cue in found:
        assert 0 <= cue.start < cue.end
        assert cue.text.strip()
        assert len(cue.text.splitlines()) == 1
    for one, other in pairwise(found):
        assert one.end <= other.start


@given(TRANSCRIPTS)
def test_no_words_are_lost_on_the_way_into_cues(transcript: Transcript) -> None:
    texts = [transcript.text] if transcript.segments is None else [segment.text for segment in transcript.segments]
    said = [word for text in texts for word in text.replace("\0", "").split()]
    assert [word for cue in cues(transcript) for word in cue.text.split()] == said


@settings(max_examples=500)
@given(TRANSCRIPTS)
def test_srt_is_read_back_to_the_millisecond(transcript: Transcript) -> None:
    found = list(srt.parse(rendered(transcript, SRT)))
    assert [subtitle.index for subtitle in found] == list(range(1, len(found) + 1))
    assert [
        Cue(round(s.start.total_seconds() * 1000), round(s.end.total_seconds() * 1000), s.content) for s in found
    ] == [Cue(c.start, c.end, as_utf8(c.text.replace("-->", "→"))) for c in cues(transcript)]


@settings(max_examples=500)
@given(TRANSCRIPTS)
def test_vtt_is_read_back_to_the_millisecond(transcript: Transcript) -> None:
    text = rendered(transcript, VTT)
    found = webvtt.from_buffer(io.StringIO(text))
    assert [
        Cue(
            c.start_in_seconds * 1000 + int(c.start[-3:]),
            c.end_in_seconds * 1000 + int(c.end[-3:]),
            html.unescape(c.raw_text),
        )
        for c in found.captions
    ] == [Cue(c.start, c.end, as_utf8(c.text)) for c in cues(transcript)]


@given(TRANSCRIPTS)
def test_vtt_follows_the_specifications_line_grammar(transcript: Transcript) -> None:
    text = rendered(transcript, VTT)
    assert text.startswith("WEBVTT\n")
    assert "\0" not in text
    header, *blocks = text.split("\n\n")
    assert header.strip() == "WEBVTT"
    for block in filter(str.strip, blocks):
        timing, payload = block.rstrip("\n").split("\n")
        assert timing.count(" --> ") == 1
        assert payload
        assert "<" not in payload
        assert ">" not in payload


CLOCKS = [
    (0.0, "00:00:00,000"),
    (2.5, "00:00:02,500"),
    (0.0004, "00:00:00,000"),
    (0.0006, "00:00:00,001"),
    (59.9994, "00:00:59,999"),
    (59.9996, "00:01:00,000"),
    (3599.9996, "01:00:00,000"),
    (86_400.0, "24:00:00,000"),
    (359_999.999, "99:59:59,999"),
    (360_000.0, "100:00:00,000"),
    (3_600_000.001, "1000:00:00,001"),
]


@pytest.mark.parametrize(("seconds", "clock"), CLOCKS)
def test_times_are_written_as_players_read_them(seconds: float, clock: str) -> None:
    transcript = Transcript("x", seconds + 1, segments=(Segment(seconds, seconds + 1, "x"),))
    assert rendered(transcript, SRT).splitlines()[1].startswith(f"{clock} --> ")
    assert rendered(transcript, VTT).splitlines()[2].startswith(f"{clock.replace(',', '.')} --> ")


HELLO = Transcript(
    "hello  there", 2.5, segments=(Segment(0.0, 1.0, " hello "), Segment(1.0, 2.5, "a < b & c --> d\n2"))
)


def test_srt_looks_like_this() -> None:
    assert rendered(HELLO, SRT) == (
        "1\n00:00:00,000 --> 00:00:01,000\nhello\n\n2\n00:00:01,000 --> 00:00:02,500\na < b & c → d 2\n"
    )


def test_vtt_looks_like_this() -> None:
    assert rendered(HELLO, VTT) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.000\nhello\n\n00:00:01.000 --> 00:00:02.500\na &lt; b &amp; c --&gt; d 2\n"
    )


@pytest.mark.parametrize(
    ("segments", "times"),
    [
        ([(0.0, 2.0), (1.0, 3.0)], [(0, 2000), (2000, 3000)]),
        ([(0.0, 5.0), (1.0, 3.0)], [(0, 5000), (5000, 5001)]),
        ([(2.0, 1.0)], [(2000, 2001)]),
        ([(-5.0, -1.0), (-1.0, 1.0)], [(0, 1), (1, 1000)]),
        ([(1.0, 1.0), (1.0, 1.0)], [(1000, 1001), (1001, 1002)]),
    ],
    ids=["overlapping", "nested", "reversed", "negative", "of no length"],
)
def test_odd_times_are_straightened(segments: list[tuple[float, float]], times: list[tuple[int, int]]) -> None:
    transcript = Transcript("", 5.0, segments=tuple(Segment(start, end, "x") for start, end in segments))
    assert [(cue.start, cue.end) for cue in cues(transcript)] == times


def test_without_segments_the_whole_text_is_one_cue() -> None:
    assert list(cues(Transcript("all of it", 7.25))) == [Cue(0, 7250, "all of it")]


@pytest.mark.parametrize("transcript", [Transcript("", 3.0), Transcript("", 3.0, segments=()), Transcript(" \n", 3.0)])
def test_silence_has_no_cues(transcript: Transcript) -> None:
    assert rendered(transcript, SRT) == ""
    assert rendered(transcript, VTT) == "WEBVTT\n"
    assert len(webvtt.from_buffer(io.StringIO("WEBVTT\n"))) == 0


def test_text_is_the_transcript_and_a_line_break() -> None:
    assert rendered(HELLO, TEXT) == "hello  there\n"


@pytest.mark.parametrize(
    ("kind", "content_type"),
    [(TEXT, "text/plain"), (SRT, "application/x-subrip"), (VTT, "text/vtt")],
)
def test_plain_bodies_have_a_content_type_of_their_own(kind: ResponseFormat, content_type: str) -> None:
    body = plain_body(HELLO, kind)
    assert body is not None
    assert body.content_type == f"{content_type}; charset=utf-8"


@pytest.mark.parametrize("kind", [k for k in ResponseFormat if k not in (TEXT, SRT, VTT)])
def test_json_formats_are_not_plain(kind: ResponseFormat) -> None:
    assert plain_body(HELLO, kind) is None


# --- verbose JSON ------------------------------------------------------------------------------


def test_a_segment_shows_everything_the_engine_said() -> None:
    full = Segment(0.12345, 1.99999, " hi", seek=12, tokens=(1, 2), temperature=0.2, avg_logprob=-0.3)
    assert verbose.segment(3, full) == {
        "id": 3,
        "seek": 12,
        "start": 0.123,
        "end": 2.0,
        "text": " hi",
        "tokens": [1, 2],
        "temperature": 0.2,
        "avg_logprob": -0.3,
        "compression_ratio": None,
        "no_speech_prob": None,
    }


def test_segments_are_numbered_and_absent_ones_stay_absent() -> None:
    shown = verbose.segments(HELLO)
    assert shown is not None
    assert [segment["id"] for segment in shown] == [0, 1]
    assert verbose.segments(Transcript("x", 1.0)) is None
    assert verbose.segments(Transcript("", 1.0, segments=())) == []


def test_words_show_a_confidence_only_where_the_contract_has_one() -> None:
    words = (Word("hi", 0.1, 0.5, 0.98765), Word("you", 0.5, 0.9))
    transcript = Transcript("hi you", 1.0, words=words)
    plain = [{"word": "hi", "start": 0.1, "end": 0.5}, {"word": "you", "start": 0.5, "end": 0.9}]
    assert verbose.words(transcript) == plain
    assert verbose.words(transcript, confidence=True) == [
        plain[0] | {"confidence": 0.9877},
        plain[1] | {"confidence": None},
    ]
    assert verbose.words(Transcript("x", 1.0)) is None


@pytest.mark.parametrize(
    ("code", "style", "shown"),
    [("en", "name", "english"), ("en", "code", "en"), ("xx", "name", "xx"), (None, "name", None), (None, "code", None)],
)
def test_a_language_is_printed_in_its_models_style(code: str | None, style: str, shown: str | None) -> None:
    assert verbose.language(code, style) == shown


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=4))
def test_a_json_body_is_utf8_that_any_parser_reads(value: dict[str, str]) -> None:
    assert json.loads(json_body(dict(value)).content) == value


def test_half_a_character_becomes_a_question_mark_and_not_a_failure() -> None:
    assert json.loads(json_body({"text": "a\ud800b"}).content) == {"text": "a?b"}
    assert rendered(Transcript("a\ud800b", 1.0), TEXT) == "a?b\n"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_json_is_never_sent(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        json_body({"duration": value})


def test_confidence_is_weighted_by_how_long_words_last() -> None:
    words = (Word("a", 0.0, 3.0, 1.0), Word("b", 3.0, 4.0, 0.0), Word("c", 4.0, 9.0))
    assert Transcript("a b c", 9.0, words=words).confidence == pytest.approx(0.75)
    assert Transcript("x", 1.0).confidence is None
    assert Transcript("x", 1.0, words=(Word("x", 1.0, 1.0, 0.5),)).confidence is None
