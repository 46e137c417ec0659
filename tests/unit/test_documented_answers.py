"""Each provider's answers as its documentation shows them, and our fakes held against them.

`tests/data/answers/README.md` names where each example is from.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import DATA
from fakes.upstreams import KEY, DeepgramUpstream, File, MistralUpstream, OpenAIUpstream, Sent, Upstream
from voxgate.audio.sniff import CONTAINERS
from voxgate.catalog import Deployment, ProviderEntry
from voxgate.errors import FailureClass, ProviderError
from voxgate.model import Feature, Logprob, Segment, Tokens, Transcript, TranscriptionRequest, Word
from voxgate.providers import Call
from voxgate.providers.deepgram import DeepgramAdapter
from voxgate.providers.http import Adapter, WireAnswer
from voxgate.providers.openai import MistralAdapter, OpenAIAdapter
from voxgate.receive import Upload

DURATION = 12.5
OPENAI, MISTRAL, DEEPGRAM = OpenAIAdapter(), MistralAdapter(), DeepgramAdapter()
PLAIN = TranscriptionRequest(model="m")
DIARIZED = TranscriptionRequest(model="m", required={Feature.DIARIZATION: "diarize"})


def example(name: str) -> Any:
    return json.loads((DATA / "answers" / f"{name}.json").read_text())


def parsed(
    adapter: Adapter,
    body: Any,
    request: TranscriptionRequest = PLAIN,
    *,
    status: int = 200,
    retry_after: int | None = None,
) -> Transcript:
    entry = ProviderEntry(name="up", kind="openai", base_url="http://localhost")
    deployment = Deployment(provider=entry, upstream_model="up-1", price=1, features=frozenset(Feature))
    call = Call(
        request=request,
        deployment=deployment,
        audio=Upload(Path()),
        container=CONTAINERS["wav"],
        duration=DURATION,
    )
    return adapter.parse_response(WireAnswer(status, json.dumps(body).encode(), retry_after), call)


# --- What was heard ---------------------------------------------------------------------------

BEACH = (
    "The beach was a popular spot on a hot summer day. People were swimming in the ocean, building"
    " sandcastles, and playing beach volleyball."
)
WILDEST = (
    "Imagine the wildest idea that you've ever had, and you're curious about how it might scale to something"
    " that's a 100, a 1,000 times bigger. This is a place where you can get to do that."
)
CALLING = (
    "Agent: Thanks for calling OpenAI support.\nA: Hi, I'm trying to enable diarization.\n"
    "Agent: Happy to walk you through the steps."
)
OCTAVE = "My name is Octave and I am working at OVHcloud"
MARIE = "Hello Marie, your recent experiments are fascinating."
ALBERT = "Indeed, Albert. It's exciting to explore radioactivity together."
FAREWELL = (
    "This week, I traveled to Chicago to deliver my final farewell address to the nation, following in the"
    " tradition of presidents before"
)
OATH = (
    " as well as a beginning, signifying renewal as well as change. For I have sworn before you and Almighty God"
    " the same solemn oath our forebears prescribed nearly a century and three quarters ago."
)


def whisper(
    start: float,
    end: float,
    text: str,
    tokens: tuple[int, ...],
    *,
    avg_logprob: float,
    compression_ratio: float | None = None,
    no_speech_prob: float | None = None,
    seek: int = 0,
) -> Segment:
    return Segment(start, end, text, None, seek, tokens, 0.0, avg_logprob, compression_ratio, no_speech_prob)


HEARD: dict[str, tuple[Adapter, TranscriptionRequest, Transcript]] = {
    "openai-json": (OPENAI, PLAIN, Transcript(WILDEST, DURATION, tokens=Tokens(14, 45, 0, 14))),
    "openai-json-logprobs": (
        OPENAI,
        PLAIN,
        Transcript(
            "Hey, my knee is hurting and I want to see the doctor tomorrow ideally.",
            DURATION,
            logprobs=(
                Logprob("Hey", -1.0415299, (72, 101, 121)),
                Logprob(",", -9.805982e-5, (44,)),
                Logprob(" my", -0.00229799, (32, 109, 121)),
                Logprob(" knee", -4.7159858e-5, (32, 107, 110, 101, 101)),
            ),
            tokens=Tokens(14, 45, 0, 14),
        ),
    ),
    "openai-verbose-words": (
        OPENAI,
        PLAIN,
        Transcript(
            BEACH,
            DURATION,
            language="en",
            words=(Word("The", 0.0, 0.23999999463558197), Word("volleyball", 7.400000095367432, 7.900000095367432)),
        ),
    ),
    "openai-verbose-segments": (
        OPENAI,
        PLAIN,
        Transcript(
            BEACH,
            DURATION,
            language="en",
            segments=(
                whisper(
                    0.0,
                    3.319999933242798,
                    " The beach was a popular spot on a hot summer day.",
                    (50364, 440, 7534, 390, 257, 3743, 4008, 322, 257, 2368, 4266, 786, 13, 50530),
                    avg_logprob=-0.2860786020755768,
                    compression_ratio=1.2363636493682861,
                    no_speech_prob=0.00985979475080967,
                ),
            ),
        ),
    ),
    "openai-diarized": (
        OPENAI,
        DIARIZED,
        Transcript(
            CALLING,
            DURATION,
            segments=(
                Segment(0.0, 4.7, "Thanks for calling OpenAI support.", speaker="agent"),
                Segment(4.7, 11.8, "Hi, I'm trying to enable diarization.", speaker="A"),
                Segment(12.1, 18.5, "Happy to walk you through the steps.", speaker="agent"),
            ),
        ),
    ),
    "groq-verbose": (
        OPENAI,
        PLAIN,
        Transcript(
            "Hello world!",
            DURATION,
            language="en",
            segments=(
                whisper(
                    0.0,
                    2.48,
                    "Hello world!",
                    (50365, 2425, 490, 264),
                    avg_logprob=-0.29010406,
                    compression_ratio=0.7777778,
                    no_speech_prob=0.032802984,
                ),
            ),
        ),
    ),
    "ovh-json": (OPENAI, PLAIN, Transcript(OCTAVE + ".", DURATION)),
    "ovh-verbose": (
        OPENAI,
        PLAIN,
        Transcript(
            OCTAVE,
            DURATION,
            language="en",
            segments=(
                whisper(
                    0.0,
                    3.48,
                    OCTAVE,
                    (50365, 2588, 275),
                    avg_logprob=-0.38066408,
                    compression_ratio=0.9,
                    no_speech_prob=0.0,
                ),
            ),
        ),
    ),
    "ovh-diarized": (
        OPENAI,
        DIARIZED,
        Transcript(
            f"{MARIE} {ALBERT}",
            DURATION,
            language="en",
            segments=(
                Segment(0.0, 1.06, "Hello Marie", speaker="0"),
                Segment(1.16, 3.24, "your recent experiments are fascinating.", speaker="0"),
                Segment(4.74, 6.76, "Indeed, Albert", speaker="1"),
                Segment(6.98, 8.1, "It's exciting to explore radioactivity together.", speaker="1"),
            ),
        ),
    ),
    "mistral-basic": (
        MISTRAL,
        PLAIN,
        Transcript(FAREWELL, DURATION, language="en", tokens=Tokens(4, 635)),
    ),
    "mistral-segments": (
        MISTRAL,
        PLAIN,
        Transcript(
            FAREWELL,
            DURATION,
            segments=(
                Segment(
                    0.8,
                    6.2,
                    "This week, I traveled to Chicago to deliver my final farewell address to the nation, following",
                ),
                Segment(6.2, 9.0, "in the tradition of presidents before me."),
            ),
            tokens=Tokens(4, 1316),
        ),
    ),
    "mistral-diarized": (
        MISTRAL,
        DIARIZED,
        Transcript(
            f" {FAREWELL}",
            DURATION,
            segments=(
                Segment(0.8, 8.1, f" {FAREWELL} me.", speaker="speaker_1"),
                Segment(8.9, 10.9, " It was an opportunity to say thank you.", speaker="speaker_1"),
            ),
            tokens=Tokens(7, 931),
        ),
    ),
    # A name is sent as one word, and heard as one: the customer's has its space.
    "mistral-context-bias": (
        MISTRAL,
        TranscriptionRequest(model="m", keywords=("farewell address",)),
        Transcript(f"{FAREWELL} me.", DURATION, tokens=Tokens(70, 646)),
    ),
    "deepgram-listen": (
        DEEPGRAM,
        PLAIN,
        Transcript(
            "We, the people of The United States, in order to form a more perfect union, establish justice, ensure"
            " domestic tranquility, provide for the common defense, promote the general welfare, and secure the"
            " blessings of liberty to ourselves and our posterity to ordain and establish this constitution for"
            " The United States Of America.",
            DURATION,
            words=(
                Word("We,", 0.32, 0.79999995, 0.8624499),
                Word("the", 0.79999995, 0.96, 0.9988005),
                Word("people", 0.96, 1.1999999, 0.9702857),
            ),
        ),
    ),
    "vllm-verbose": (
        OPENAI,
        PLAIN,
        Transcript(
            OATH,
            DURATION,
            language="en",
            segments=(
                whisper(
                    0.0,
                    7.2,
                    " as well as a beginning, signifying renewal as well as change.",
                    (382, 731, 382, 257, 2863),
                    avg_logprob=-0.1057461668860924,
                ),
            ),
        ),
    ),
}


@pytest.mark.parametrize("name", HEARD)
def test_an_answer_is_heard_as_it_is_documented(name: str) -> None:
    adapter, request, transcript = HEARD[name]
    assert parsed(adapter, example(name), request) == transcript


def test_gpt_transcribe_names_the_languages_that_it_heard() -> None:
    assert parsed(OPENAI, example("openai-json") | example("openai-languages")).language == "en"
    assert parsed(OPENAI, example("openai-json") | {"languages": []}).language is None


def test_groqs_own_segment_keeps_all_that_it_says() -> None:
    heard = parsed(OPENAI, example("groq-verbose") | {"segments": [example("groq-segment")]})
    assert heard.segments == (
        whisper(
            43.92,
            50.16,
            " document that the functional specification that you started to read through that isn't just the",
            (51061, 4166, 300, 264, 11745, 31256),
            seek=3000,
            avg_logprob=-0.097569615,
            compression_ratio=1.6637554,
            no_speech_prob=0.012814695,
        ),
    )


def test_ovhs_words_alone_are_no_segments() -> None:
    heard = parsed(OPENAI, example("ovh-verbose") | example("ovh-words"))
    assert heard.words == (Word("France", 1.76, 2.44), Word("is", 2.44, 3.12))
    assert heard.segments is None


def whole_of_deepgram() -> Any:
    """A recorded answer with those parts that the documentation shows by themselves."""
    answer = example("deepgram-listen")
    channel = answer["results"]["channels"][0] | example("deepgram-language")
    channel["alternatives"][0] |= example("deepgram-diarized-words")
    answer["results"] |= {"channels": [channel]} | example("deepgram-utterances")
    return answer


def test_deepgrams_utterances_are_segments_with_their_words() -> None:
    heard = parsed(DEEPGRAM, whole_of_deepgram(), DIARIZED)
    assert heard.language == "es"
    assert heard.words == (Word("hello", 15.259043, 15.338787, 0.9721591),)
    assert heard.segments == (
        Segment(
            0.41915998,
            5.43012,
            "four score and seven years ago our fathers brought forth on this continent a new nation",
            words=(Word("four", 0.41915998, 0.85827994, 0.57893836),),
        ),
    )


# --- What went wrong --------------------------------------------------------------------------

CALLER, CREDENTIAL, QUOTA = FailureClass.CALLER_FAULT, FailureClass.CREDENTIAL, FailureClass.QUOTA
RATE, TRANSIENT, UNSUPPORTED = FailureClass.RATE_LIMIT, FailureClass.TRANSIENT, FailureClass.UNSUPPORTED

FAILED: dict[str, tuple[Adapter, int, FailureClass, str | None, str]] = {
    "openai-400-format": (OPENAI, 400, CALLER, None, "Invalid file format."),
    # Another provider may take the format: OpenAI's own whisper-1 did.
    "openai-400-unsupported": (OPENAI, 400, UNSUPPORTED, "messages", "This model does not support the format"),
    "openai-401": (OPENAI, 401, CREDENTIAL, None, "Incorrect API key provided"),
    "openai-429-quota": (OPENAI, 429, QUOTA, None, "You exceeded your current quota"),
    "openai-429-rate": (OPENAI, 429, RATE, None, "Rate limit reached"),
    "groq-400": (OPENAI, 400, CALLER, None, "prompt length must be 896 characters or fewer"),
    "groq-401": (OPENAI, 401, CREDENTIAL, None, "Invalid API Key"),
    "groq-413": (OPENAI, 413, UNSUPPORTED, None, "Request Entity Too Large"),
    "groq-429": (OPENAI, 429, RATE, None, "Rate limit reached"),
    "scaleway-400": (OPENAI, 400, CALLER, None, "After the optional system message"),
    "mistral-400-model": (MISTRAL, 400, UNSUPPORTED, None, "Invalid model: voxtral-small-latest"),
    "mistral-error": (MISTRAL, 400, UNSUPPORTED, "model", "A human-readable description of the error."),
    "mistral-401": (MISTRAL, 401, CREDENTIAL, None, "Unauthorized"),
    "mistral-422": (MISTRAL, 422, CALLER, "name", "Extra inputs are not permitted"),
    "mistral-429": (MISTRAL, 429, RATE, None, "Rate limit exceeded"),
    "deepgram-400-audio": (DEEPGRAM, 400, CALLER, "file", "Bad Request: failed to process audio"),
    # The query is at fault, not the file.
    "deepgram-400-json": (DEEPGRAM, 400, CALLER, None, "Invalid JSON submitted."),
    "deepgram-400-query": (DEEPGRAM, 400, CALLER, None, "Keywords are not supported for Nova-3."),
    "deepgram-401": (DEEPGRAM, 401, CREDENTIAL, None, "Invalid credentials."),
    "deepgram-402": (DEEPGRAM, 402, QUOTA, None, "Project does not have enough credits"),
    "deepgram-403": (DEEPGRAM, 403, CREDENTIAL, None, "Project does not have access to the requested model."),
    "deepgram-422": (DEEPGRAM, 422, TRANSIENT, None, "Unable to read the entire client request."),
    "deepgram-429": (DEEPGRAM, 429, RATE, None, "Too many requests. Please try again later"),
    "vllm-400": (OPENAI, 400, CALLER, None, "[{'type': 'missing', 'loc': ('body', 'file')"),
    "speaches-403": (OPENAI, 403, CREDENTIAL, None, "Invalid API key."),
    "speaches-415": (OPENAI, 415, UNSUPPORTED, None, "Failed to decode audio."),
}


@pytest.mark.parametrize("name", FAILED)
def test_a_failure_means_what_is_documented(name: str) -> None:
    adapter, status, failure, param, message = FAILED[name]
    with pytest.raises(ProviderError) as caught:
        parsed(adapter, example(name), status=status, retry_after=7)
    error = caught.value
    assert (error.failure, error.status, error.param, error.retry_after) == (failure, status, param, 7)
    assert error.message.startswith(message)


# --- The fakes --------------------------------------------------------------------------------

Shape = dict[str, set[str]]


def shape(*values: Any) -> Shape:
    """The types of all that is in there, by where it is: `segments[].start` is a number."""
    found: Shape = defaultdict(set)
    for value in values:
        for path, kind in _walk(value, ""):
            found[path].add(kind)
    return dict(found)


def _walk(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        yield path, "object"
        for key, inner in value.items():
            yield from _walk(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        yield path, "array"
        for inner in value:
            yield from _walk(inner, f"{path}[]")
    else:
        kinds: dict[type, str] = {bool: "boolean", int: "number", float: "number", str: "string", type(None): "null"}
        yield path, kinds[type(value)]


def beyond(fake: Any, documented: Shape) -> list[str]:
    """Where a fake says what the documentation does not."""
    return [
        f"{path or 'the whole'} is {', '.join(sorted(kinds))}"
        for path, kinds in shape(fake).items()
        if not kinds <= documented.get(path, set())
    ]


def examples(*names: str) -> Shape:
    return shape(*map(example, names))


# What a schema has and no example shows. https://github.com/deepgram/deepgram-api-specs (openapi.yml)
# for Deepgram, https://github.com/mistralai/platform-docs-public (openapi-public-doc.yaml) for Mistral.
_DEEPGRAM_SCHEMA: Shape = {
    "results.channels[].alternatives[].words[].punctuated_word": {"string"},
    "results.utterances[].speaker": {"number"},
    "results.utterances[].words[].punctuated_word": {"string"},
    "results.utterances[].words[].speaker": {"number"},
    "results.utterances[].words[].speaker_confidence": {"number"},
}


def sent(
    *, form: Iterable[tuple[str, str]] = (), query: Iterable[tuple[str, str]] = (), scheme: str = "Bearer"
) -> Sent:
    file = {"file": File("audio.wav", "audio/wav", b"x")} if form else {}
    return Sent("", list(query), {"authorization": f"{scheme} {KEY}"}, b"", list(form), file)


def asks(*fields: tuple[str, str]) -> Sent:
    return sent(form=[("model", "m"), *fields])


VERBOSE = ("response_format", "verbose_json")
SEGMENTS, WORDS = ("timestamp_granularities[]", "segment"), ("timestamp_granularities[]", "word")

ANSWERS = {
    "openai json": (OpenAIUpstream, asks(), examples("openai-json")),
    "openai logprobs": (OpenAIUpstream, asks(("include[]", "logprobs")), examples("openai-json-logprobs")),
    "openai verbose_json": (
        OpenAIUpstream,
        asks(VERBOSE, SEGMENTS, WORDS),
        examples("openai-verbose-segments", "openai-verbose-words"),
    ),
    "openai diarized_json": (
        OpenAIUpstream,
        asks(("response_format", "diarized_json")),
        examples("openai-diarized"),
    ),
    "mistral": (MistralUpstream, asks(), examples("mistral-basic", "mistral-context-bias")),
    "mistral segments": (
        MistralUpstream,
        asks(("timestamp_granularities", "segment")),
        examples("mistral-basic", "mistral-segments"),
    ),
    "mistral speakers": (
        MistralUpstream,
        asks(("timestamp_granularities", "segment"), ("diarize", "true")),
        examples("mistral-basic", "mistral-diarized"),
    ),
    "deepgram": (
        DeepgramUpstream,
        sent(query=[("detect_language", "true"), ("utterances", "true"), ("diarize", "true")], scheme="Token"),
        shape(whole_of_deepgram()) | _DEEPGRAM_SCHEMA,
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_fake_answers_nothing_that_is_not_documented(name: str) -> None:
    fake, asked, documented = ANSWERS[name]
    with fake() as upstream:
        status, body = upstream.answer(asked)
    assert status == 200
    assert beyond(body, documented) == []


ERRORS: dict[type[Upstream], dict[int, tuple[str, ...]]] = {
    OpenAIUpstream: {
        400: ("openai-400-format", "openai-400-unsupported"),
        401: ("openai-401",),
        429: ("openai-429-rate", "openai-429-quota"),
    },
    MistralUpstream: {
        400: ("mistral-400-model", "mistral-error"),
        401: ("mistral-401",),
        429: ("mistral-429",),
    },
    DeepgramUpstream: {
        400: ("deepgram-400-audio",),
        401: ("deepgram-401",),
        402: ("deepgram-402",),
        403: ("deepgram-403",),
        422: ("deepgram-422",),
        429: ("deepgram-429",),
    },
}


@pytest.mark.parametrize(
    ("fake", "status"), [(fake, status) for fake, known in ERRORS.items() for status in known], ids=str
)
def test_a_fake_fails_as_its_provider_does(fake: type[Upstream], status: int) -> None:
    with fake() as upstream:
        body = upstream.failure(status)
    documented = examples(*ERRORS[fake][status])
    assert beyond(body, documented) == []
    assert {path for path in documented if path not in shape(body)} <= {"raw_status_code"}


def test_every_example_is_held_against_something_and_has_its_source() -> None:
    names = {path.stem for path in (DATA / "answers").glob("*.json")}
    parts = {"openai-languages", "groq-segment", "ovh-words"}
    parts |= {"deepgram-utterances", "deepgram-diarized-words", "deepgram-language"}
    assert names == HEARD.keys() | FAILED.keys() | parts
    sources = (DATA / "answers" / "README.md").read_text()
    assert [name for name in sorted(names) if f"`{name}`" not in sources] == []
