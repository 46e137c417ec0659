"""Every contract's form, field by field, and its bodies."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator  # type: ignore[import-untyped, unused-ignore]

from voxgate.dialects import Dialect
from voxgate.dialects.litellm import LiteLLMDialect
from voxgate.dialects.openai import InferenceDialect, OpenAIDialect
from voxgate.dialects.openapi import document
from voxgate.dialects.router import RouterDialect
from voxgate.dialects.stats import StatsDialect
from voxgate.errors import InvalidInput
from voxgate.model import (
    Feature,
    Granularity,
    Logprob,
    Outcome,
    Preference,
    ResponseFormat,
    Routing,
    Segment,
    Tokens,
    Transcript,
    TranscriptionRequest,
    Word,
)
from voxgate.multipart import Field

OPENAI, STATS, ROUTER, LITELLM = OpenAIDialect(), StatsDialect(), RouterDialect(), LiteLLMDialect()
ALL: list[Dialect] = [OPENAI, STATS, ROUTER, LITELLM]
RICH: list[Dialect] = [OPENAI, ROUTER, LITELLM]  # those with OpenAI's own fields
WORD, SEGMENT = Granularity.WORD, Granularity.SEGMENT
Sent = tuple[str, str]


def name(value: object) -> str | None:
    return getattr(value, "name", None) if not isinstance(value, (Feature, ResponseFormat)) else None


def parse(
    dialect: Dialect, *sent: Sent, model: str | None = "whisper-1", files: tuple[str, ...] = ()
) -> TranscriptionRequest:
    field = "model_id" if dialect is STATS else "model"
    given = [Field(field, model)] if model is not None else []
    return dialect.parse((*given, *(Field(n, v) for n, v in sent)), files)


def refused(dialect: Dialect, *sent: Sent, model: str | None = "whisper-1") -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        parse(dialect, *sent, model=model)
    assert (caught.value.status, caught.value.code) == (400, "invalid_input")
    json.dumps(caught.value.envelope(), ensure_ascii=False).encode()
    return caught.value


each = pytest.mark.parametrize("dialect", ALL, ids=name)
each_rich = pytest.mark.parametrize("dialect", RICH, ids=name)


# --- the model ---------------------------------------------------------------------------------


@each
def test_the_model_alone_is_a_whole_form(dialect: Dialect) -> None:
    request = parse(dialect)
    assert request.model == "whisper-1"
    assert request.language is None
    assert request.prompt is None
    assert request.temperature in (None, 0.0)
    assert request.response_format is ResponseFormat.JSON
    assert request.routing == Routing()
    assert request.required == {}
    assert request.extra == {}
    assert request.ignored == ()


@each
def test_a_missing_model_is_named(dialect: Dialect) -> None:
    field = "model_id" if dialect is STATS else "model"
    error = refused(dialect, model=None)
    assert (error.message, error.param) == (f"Missing required field '{field}'.", field)


@each
def test_an_empty_model_is_named(dialect: Dialect) -> None:
    field = "model_id" if dialect is STATS else "model"
    error = refused(dialect, model="")
    assert (error.message, error.param) == (f"The field '{field}' is empty.", field)


def test_a_model_called_null_is_a_name_like_any_other() -> None:
    assert parse(ROUTER, model="null").model == "null"


@each
def test_a_field_sent_twice_is_refused(dialect: Dialect) -> None:
    error = refused(dialect, ("language", "en"), ("language", "en"))
    assert (error.message, error.param) == ("The field 'language' was sent twice.", "language")


# --- languages ---------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("text", ["en", "EN", "eng", "en-US", "en_GB", "English", "english", " en "])
def test_a_language_is_understood_however_it_is_written(dialect: Dialect, text: str) -> None:
    assert parse(dialect, ("language", text)).language == "en"


@each
@pytest.mark.parametrize("text", ["xx", "klingon", "auto", "e", "12", "en;de"])
def test_a_language_that_is_none_is_refused(dialect: Dialect, text: str) -> None:
    error = refused(dialect, ("language", text))
    assert error.param == "language"
    assert f"'{text}' is not a language" in error.message


@each
def test_an_empty_language_is_an_absent_one(dialect: Dialect) -> None:
    assert parse(dialect, ("language", "")).language is None


# --- temperature, format, prompt ---------------------------------------------------------------


@each_rich
@pytest.mark.parametrize(("text", "value"), [("0", 0.0), ("1", 1.0), ("0.5", 0.5), ("1e-1", 0.1), ("", 0.0)])
def test_a_temperature_is_from_zero_to_one(dialect: Dialect, text: str, value: float) -> None:
    assert parse(dialect, ("temperature", text)).temperature == value


@each_rich
@pytest.mark.parametrize("text", ["-0.1", "1.1", "nan", "NaN", "inf", "-inf", "Infinity", "hot", "0,5", "0x1", "[0]"])
def test_another_temperature_is_refused(dialect: Dialect, text: str) -> None:
    assert refused(dialect, ("temperature", text)).param == "temperature"


@each_rich
@pytest.mark.parametrize("wanted", list(ResponseFormat))
def test_every_response_format_is_known(dialect: Dialect, wanted: ResponseFormat) -> None:
    assert parse(dialect, ("response_format", wanted.value)).response_format is wanted


@each_rich
def test_a_diarized_answer_is_never_served_by_who_tells_no_speakers(dialect: Dialect) -> None:
    request = parse(dialect, ("response_format", "diarized_json"))
    assert request.required == {Feature.DIARIZATION: "response_format"}


@each_rich
@pytest.mark.parametrize("text", ["xml", "JSON", "verbose-json", "json,text", "["])
def test_an_unknown_response_format_is_refused_with_the_known_ones(dialect: Dialect, text: str) -> None:
    error = refused(dialect, ("response_format", text))
    assert error.param == "response_format"
    assert "'verbose_json'" in error.message


@each_rich
def test_a_prompt_is_passed_on_as_it_is(dialect: Dialect) -> None:
    assert parse(dialect, ("prompt", " Ärzte,\n[new] ")).prompt == " Ärzte,\n[new] "
    assert parse(dialect, ("prompt", "")).prompt is None


@each_rich
def test_a_prompt_has_an_end(dialect: Dialect) -> None:
    assert refused(dialect, ("prompt", "x" * 64_001)).param == "prompt"


# --- granularities -----------------------------------------------------------------------------

GRANULARITIES: list[tuple[list[Sent], set[Granularity]]] = [
    ([], {SEGMENT}),
    ([("timestamp_granularities[]", "word")], {WORD}),
    ([("timestamp_granularities[]", "segment")], {SEGMENT}),
    ([("timestamp_granularities", "word")], {WORD}),
    ([("timestamp_granularities[]", "word"), ("timestamp_granularities[]", "segment")], {WORD, SEGMENT}),
    ([("timestamp_granularities[]", "segment"), ("timestamp_granularities[]", "word")], {WORD, SEGMENT}),
    ([("timestamp_granularities", "word"), ("timestamp_granularities", "segment")], {WORD, SEGMENT}),
    ([("timestamp_granularities", "word"), ("timestamp_granularities[]", "segment")], {WORD, SEGMENT}),
    ([("timestamp_granularities[]", "word"), ("timestamp_granularities[]", "word")], {WORD}),
    ([("timestamp_granularities[0]", "word"), ("timestamp_granularities[1]", "segment")], {WORD, SEGMENT}),
    ([("timestamp_granularities", '["word", "segment"]')], {WORD, SEGMENT}),
    ([("timestamp_granularities", '["word"]')], {WORD}),
    ([("timestamp_granularities[]", ' ["word"] ')], {WORD}),
    ([("timestamp_granularities", "[]")], {SEGMENT}),
    ([("timestamp_granularities[]", "")], {SEGMENT}),
]


@each_rich
@pytest.mark.parametrize(("sent", "wanted"), GRANULARITIES)
def test_granularities_come_in_every_spelling(dialect: Dialect, sent: list[Sent], wanted: set[Granularity]) -> None:
    request = parse(dialect, ("response_format", "verbose_json"), *sent)
    assert request.granularities == wanted
    assert request.words is (WORD in wanted)
    assert request.ignored == ()
    assert request.extra == {}


@each_rich
def test_words_that_are_asked_for_are_needed(dialect: Dialect) -> None:
    request = parse(dialect, ("response_format", "verbose_json"), ("timestamp_granularities[]", "word"))
    assert request.required.get(Feature.WORDS, "").startswith("timestamp_granularities")


@each_rich
@pytest.mark.parametrize("text", ["sentence", "Word", "word,segment", '["word", "line"]', "["])
def test_another_granularity_is_refused(dialect: Dialect, text: str) -> None:
    error = refused(dialect, ("response_format", "verbose_json"), ("timestamp_granularities[]", text))
    assert error.param is not None
    assert error.param.startswith("timestamp_granularities")


@pytest.mark.parametrize("dialect", [OPENAI, ROUTER], ids=name)
@pytest.mark.parametrize("kind", [f for f in ResponseFormat if f is not ResponseFormat.VERBOSE_JSON])
@pytest.mark.parametrize("granularity", ["word", "segment"])
def test_granularities_need_verbose_json(dialect: Dialect, kind: ResponseFormat, granularity: str) -> None:
    error = refused(dialect, ("response_format", kind.value), ("timestamp_granularities[]", granularity))
    assert error.param == "timestamp_granularities"
    assert "verbose_json" in error.message


def test_litellms_published_example_asks_for_words_with_json() -> None:
    assert parse(LITELLM, ("response_format", "json"), ("timestamp_granularities", "word")).words


def test_the_stats_contract_always_has_words() -> None:
    assert parse(STATS).words


# --- arrays ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["[", "[1]", "[null]", '["a", 1]', '[["a"]]', "[{}]", '["a"', '["\\ud800"]', "[" * 100_000]
)
@pytest.mark.parametrize(
    ("dialect", "field"),
    [
        (OPENAI, "keywords"),
        (OPENAI, "languages[]"),
        (OPENAI, "include[]"),
        (ROUTER, "allowed_providers"),
        (LITELLM, "fallbacks"),
    ],
    ids=name,
)
def test_an_array_of_anything_but_strings_is_refused(dialect: Dialect, field: str, text: str) -> None:
    assert refused(dialect, (field, text)).param == field


@pytest.mark.parametrize(
    "sent",
    [
        [("{}", "ovh"), ("{}", "scaleway")],
        [("{}[]", "ovh"), ("{}[]", "scaleway")],
        [("{}[0]", "ovh"), ("{}[1]", "scaleway")],
        [("{}", '["ovh","scaleway"]')],
        [("{}[]", '["ovh"]'), ("{}", "scaleway")],
    ],
    ids=["repeated", "brackets", "indexes", "JSON", "mixed"],
)
def test_lists_of_names_come_in_every_spelling(sent: list[Sent]) -> None:
    def named(field: str) -> list[Sent]:
        return [(key.format(field), value) for key, value in sent]

    assert parse(LITELLM, *named("fallbacks")).routing.fallbacks == ("ovh", "scaleway")
    assert parse(ROUTER, *named("allowed_providers")).routing.allowed_providers == frozenset({"ovh", "scaleway"})
    assert parse(OPENAI, *named("keywords")).keywords == ("ovh", "scaleway")


# --- booleans ----------------------------------------------------------------------------------

TRUE, FALSE = ["true", "True", "TRUE", "1"], ["false", "False", "FALSE", "0", ""]


@pytest.mark.parametrize(("text", "value"), [(t, True) for t in TRUE] + [(t, False) for t in FALSE if t])
def test_booleans_come_in_every_spelling(text: str, value: bool) -> None:
    routing = parse(ROUTER, ("eu_native", text), ("allow_quantization", text)).routing
    assert (routing.eu_native, routing.allow_quantization) == (value, value)


def test_an_empty_boolean_is_its_default() -> None:
    routing = parse(ROUTER, ("eu_native", ""), ("allow_quantization", "")).routing
    assert (routing.eu_native, routing.allow_quantization) == (False, True)


@pytest.mark.parametrize("text", ["maybe", "2", "-1", "truee", "[true]", "1.5"])
@pytest.mark.parametrize("field", ["eu_native", "allow_quantization", "stream"])
def test_another_boolean_is_refused(field: str, text: str) -> None:
    assert refused(ROUTER, (field, text)).param == field


@each
@pytest.mark.parametrize("text", TRUE)
def test_streaming_is_never_passed_over(dialect: Dialect, text: str) -> None:
    if dialect.name in ("openai", "litellm"):
        assert parse(dialect, ("stream", text)).stream
    else:
        assert refused(dialect, ("stream", text)).param == "stream"


@pytest.mark.parametrize("shape", ["srt", "vtt", "verbose_json"])
def test_what_has_no_events_is_not_streamed(shape: str) -> None:
    assert refused(OPENAI, ("stream", "true"), ("response_format", shape)).param == "stream"


@each
@pytest.mark.parametrize("text", FALSE)
def test_no_streaming_may_be_asked_for(dialect: Dialect, text: str) -> None:
    request = parse(dialect, ("stream", text))
    assert "stream" not in request.ignored
    assert request.extra == {}


@each
def test_streaming_by_another_word_is_refused(dialect: Dialect) -> None:
    assert refused(dialect, ("stream", "maybe")).param == "stream"


# --- what a contract does not know -------------------------------------------------------------


@pytest.mark.parametrize("dialect", [OPENAI, STATS, LITELLM], ids=name)
def test_unknown_fields_and_files_are_named_as_ignored(dialect: Dialect) -> None:
    request = parse(dialect, ("user", "u"), ("metadata[a]", "1"), ("user", "v"), files=("cover",))
    assert request.ignored == ("user", "metadata[a]", "cover")
    assert request.extra == {}


def test_the_router_passes_unknown_fields_on_in_order() -> None:
    request = parse(ROUTER, ("user", "u"), ("diarize", "true"), ("user", "v"), files=("cover",))
    assert request.extra == {"user": ("u", "v"), "diarize": ("true",)}
    assert request.ignored == ("cover",)


@pytest.mark.parametrize("field", ["prompt", "temperature", "response_format", "timestamp_granularities[]", "provider"])
def test_the_stats_contract_has_no_field_of_openais(field: str) -> None:
    assert parse(STATS, (field, "x")).ignored == (field,)


@each
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["model", "language", "stream", "a[", "[]", "", "include[]", "x"]), st.text(max_size=8)
        ),
        max_size=4,
    )
)
def test_any_form_is_understood_or_refused(dialect: Dialect, sent: list[Sent]) -> None:
    try:
        named = bool(dialect.parse(tuple(Field(n, v) for n, v in sent), ()).model)
    except InvalidInput as error:
        named = bool(error.param)
    assert named


# --- routing -----------------------------------------------------------------------------------


def test_the_stats_contract_names_a_provider() -> None:
    assert parse(STATS, ("provider_id", "embedded")).routing.provider == "embedded"
    assert parse(STATS, ("provider_id", "")).routing.provider is None


@pytest.mark.parametrize("preference", list(Preference))
def test_the_router_knows_its_preferences(preference: Preference) -> None:
    assert parse(ROUTER, ("preference", preference.value)).routing.preference is preference


def test_another_preference_is_refused() -> None:
    assert refused(ROUTER, ("preference", "quality")).param == "preference"


@pytest.mark.parametrize("text", ["null", ""])
def test_the_routers_nullable_fields_may_be_null(text: str) -> None:
    fields = ["language", "prompt", "response_format", "temperature", "allowed_providers", "allowed_providers[]"]
    assert parse(ROUTER, *((field, text) for field in fields)) == parse(ROUTER)


@pytest.mark.parametrize("dialect", [OPENAI, STATS, LITELLM], ids=name)
def test_null_is_a_text_like_any_other_elsewhere(dialect: Dialect) -> None:
    assert refused(dialect, ("language", "null")).param == "language"


# --- OpenAI's newer parameters -----------------------------------------------------------------

REQUIRED: list[tuple[list[Sent], dict[Feature, str]]] = [
    ([("include[]", "logprobs")], {Feature.LOGPROBS: "include[]"}),
    ([("include", "logprobs")], {Feature.LOGPROBS: "include[]"}),
    ([("keywords[]", "Voxgate")], {Feature.KEYWORDS: "keywords"}),
    ([("languages[]", "en"), ("languages[]", "de")], {Feature.LANGUAGES: "languages"}),
    ([("languages[]", "en")], {}),
    ([("response_format", "diarized_json")], {Feature.DIARIZATION: "response_format"}),
    ([("known_speaker_names[]", "Ann")], {Feature.DIARIZATION: "known_speaker_names[]"}),
    ([("known_speaker_names", "Ann")], {Feature.DIARIZATION: "known_speaker_names[]"}),
    (
        [("known_speaker_references[]", "data:audio/wav;base64,AA==")],
        {Feature.DIARIZATION: "known_speaker_references[]"},
    ),
    ([("chunking_strategy", "auto")], {}),
    ([("chunking_strategy", '{"type": "server_vad"}')], {Feature.CHUNKING: "chunking_strategy"}),
    ([("chunking_strategy[type]", "server_vad")], {Feature.CHUNKING: "chunking_strategy"}),
    (
        [("chunking_strategy[type]", "server_vad"), ("chunking_strategy[threshold]", "0.5")],
        {Feature.CHUNKING: "chunking_strategy"},
    ),
    (
        [("include[]", "logprobs"), ("keywords[]", "a")],
        {Feature.LOGPROBS: "include[]", Feature.KEYWORDS: "keywords"},
    ),
]


@pytest.mark.parametrize(("sent", "required"), REQUIRED)
def test_a_newer_parameter_requires_its_feature(sent: list[Sent], required: dict[Feature, str]) -> None:
    request = parse(OPENAI, *sent)
    assert request.required == required
    assert request.ignored == ()


def test_one_of_openais_languages_is_a_language() -> None:
    assert parse(OPENAI, ("languages[]", "German")).language == "de"
    assert parse(OPENAI, ("languages[]", "de"), ("language", "en")).language == "en"
    assert parse(OPENAI, ("languages[]", "de"), ("languages[]", "en")).language is None


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        ([("include[]", "everything")], "include"),
        ([("languages[]", "klingon")], "languages"),
        ([("chunking_strategy", "often")], "chunking_strategy"),
        ([("chunking_strategy", "[1]")], "chunking_strategy"),
        ([("chunking_strategy", "{")], "chunking_strategy"),
        ([("chunking_strategy", "[" * 60_000)], "chunking_strategy"),
        ([("known_speaker_names[]", "x")] * 5, "known_speaker_names"),
        ([("known_speaker_references[]", "x")] * 5, "known_speaker_references"),
    ],
)
def test_a_bad_value_of_a_newer_parameter_is_refused(sent: list[Sent], param: str) -> None:
    assert refused(OPENAI, *sent).param == param


# --- bodies ------------------------------------------------------------------------------------

SPEECH = Transcript(
    text="hello world",
    duration=2.50049,
    language="en",
    segments=(
        Segment(0.0, 1.2, " hello", seek=0, tokens=(1, 2), temperature=0.0, avg_logprob=-0.2, compression_ratio=1.1),
        Segment(1.2, 2.5, " world"),
    ),
    words=(Word("hello", 0.0, 1.2, 0.91234), Word("world", 1.2, 2.5)),
)
FULL = Outcome(
    id="req_1",
    created=1_700_000_000,
    request=TranscriptionRequest(model="whisper-1", granularities=frozenset(Granularity)),
    transcript=SPEECH,
    provider="embedded",
    upstream_model="default",
    language_style="name",
    latency=0.12345,
)
SPARSE = replace(FULL, transcript=Transcript(text="", duration=0.1))
LOGPROBS = (Logprob("hello", -0.1, (104, 101)), Logprob(" world", -0.25))
# What a provider that counts tokens gives; and one that tells speakers apart.
COUNTED = replace(
    FULL,
    request=replace(FULL.request, required={Feature.LOGPROBS: "include[]"}),
    transcript=replace(SPEECH, logprobs=LOGPROBS, tokens=Tokens(14, 45, text=0, audio=14)),
)
SPEAKERS = replace(
    FULL,
    request=replace(FULL.request, required={Feature.DIARIZATION: "response_format"}),
    transcript=replace(
        SPEECH, segments=(Segment(0.0, 1.2, " hello", speaker="A"), Segment(1.2, 2.50049, " world", speaker="B"))
    ),
)
TOKENS = {
    "type": "tokens",
    "input_tokens": 14,
    "input_token_details": {"text_tokens": 0, "audio_tokens": 14},
    "output_tokens": 45,
    "total_tokens": 59,
}
SHOWN_LOGPROBS = [
    {"token": "hello", "logprob": -0.1, "bytes": [104, 101]},
    {"token": " world", "logprob": -0.25, "bytes": None},
]
SEGMENT_KEYS = {
    "id", "seek", "start", "end", "text", "tokens", "temperature", "avg_logprob", "compression_ratio", "no_speech_prob",
}  # fmt: skip
DOCUMENT = document(ALL)


def rendered(dialect: Dialect, outcome: Outcome, kind: ResponseFormat, *granularities: Granularity) -> dict[str, Any]:
    request = replace(outcome.request, response_format=kind)
    if granularities:
        request = replace(request, granularities=frozenset(granularities))
    body = dialect.render(replace(outcome, request=request))
    assert body.content_type == "application/json"
    shown = json.loads(body.content)
    assert isinstance(shown, dict)
    return shown


@each
@pytest.mark.parametrize("kind", [ResponseFormat.JSON, ResponseFormat.VERBOSE_JSON])
@pytest.mark.parametrize("outcome", [FULL, SPARSE, COUNTED], ids=["full", "sparse", "counted"])
@pytest.mark.parametrize("granularities", [(WORD,), (SEGMENT,), (WORD, SEGMENT)], ids=["word", "segment", "both"])
def test_a_body_is_what_the_description_says(
    dialect: Dialect, kind: ResponseFormat, outcome: Outcome, granularities: tuple[Granularity, ...]
) -> None:
    content = DOCUMENT["paths"][dialect.path]["post"]["responses"]["200"]["content"]["application/json"]
    schema = content["schema"] | {"components": DOCUMENT["components"]}
    shown = rendered(dialect, outcome, kind, *granularities)
    Draft202012Validator(schema).validate(shown)
    assert set(shown) <= set(content["schema"]["properties"]), "an undescribed field"


@each_rich
def test_a_diarized_body_is_what_the_description_says(dialect: Dialect) -> None:
    content = DOCUMENT["paths"][dialect.path]["post"]["responses"]["200"]["content"]["application/json"]
    schema = content["schema"] | {"components": DOCUMENT["components"]}
    shown = rendered(dialect, SPEAKERS, ResponseFormat.DIARIZED_JSON)
    Draft202012Validator(schema).validate(shown)
    assert set(shown) <= set(content["schema"]["properties"]), "an undescribed field"


def test_openais_json_is_the_text() -> None:
    assert rendered(OPENAI, FULL, ResponseFormat.JSON) == {
        "text": "hello world",
        "usage": {"type": "duration", "seconds": 2.5},
    }


@pytest.mark.parametrize("kind", [ResponseFormat.JSON, ResponseFormat.VERBOSE_JSON, ResponseFormat.DIARIZED_JSON])
def test_openais_usage_is_in_tokens_where_the_provider_counted_them(kind: ResponseFormat) -> None:
    assert rendered(OPENAI, COUNTED, kind)["usage"] == TOKENS
    assert rendered(OPENAI, FULL, kind)["usage"] == {"type": "duration", "seconds": 2.5}


@each_rich
def test_tokens_whose_details_are_not_given_have_none_made_up(dialect: Dialect) -> None:
    counted = replace(FULL, transcript=replace(SPEECH, tokens=Tokens(14, 45)))
    usage = rendered(dialect, counted, ResponseFormat.JSON).get("usage", TOKENS)
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (14, 45, 59)
    if dialect is not ROUTER:
        assert usage["input_token_details"] == {"text_tokens": None, "audio_tokens": None}


def test_openais_json_has_logprobs_where_they_were_asked_for() -> None:
    assert rendered(OPENAI, COUNTED, ResponseFormat.JSON) == {
        "text": "hello world",
        "logprobs": SHOWN_LOGPROBS,
        "usage": TOKENS,
    }
    asked = replace(FULL, request=COUNTED.request)
    assert rendered(OPENAI, asked, ResponseFormat.JSON)["logprobs"] is None
    unasked = replace(COUNTED, request=FULL.request)
    assert "logprobs" not in rendered(OPENAI, unasked, ResponseFormat.JSON)


def test_openais_diarized_json_has_who_said_what() -> None:
    assert rendered(OPENAI, SPEAKERS, ResponseFormat.DIARIZED_JSON) == {
        "task": "transcribe",
        "duration": 2.5,
        "text": "hello world",
        "segments": [
            {"type": "transcript.text.segment", "id": "seg_0", "start": 0.0, "end": 1.2, "speaker": "A",
             "text": " hello"},
            {"type": "transcript.text.segment", "id": "seg_1", "start": 1.2, "end": 2.5, "speaker": "B",
             "text": " world"},
        ],
        "usage": {"type": "duration", "seconds": 2.5},
    }  # fmt: skip


@each_rich
def test_a_diarized_answer_says_who_spoke_in_every_contract(dialect: Dialect) -> None:
    shown = rendered(dialect, SPEAKERS, ResponseFormat.DIARIZED_JSON)
    assert [segment.get("speaker") for segment in shown["segments"]] == ["A", "B"]


def test_a_translation_says_that_it_is_one() -> None:
    translated = replace(FULL, request=replace(FULL.request, translate=True))
    assert rendered(OPENAI, translated, ResponseFormat.VERBOSE_JSON)["task"] == "translate"


def test_openais_verbose_json_has_segments_and_words_as_asked_for() -> None:
    common = {"task", "language", "duration", "text", "usage"}
    segments = rendered(OPENAI, FULL, ResponseFormat.VERBOSE_JSON, SEGMENT)
    assert set(segments) == common | {"segments"}
    assert set(rendered(OPENAI, FULL, ResponseFormat.VERBOSE_JSON, WORD)) == common | {"words"}
    both = rendered(OPENAI, FULL, ResponseFormat.VERBOSE_JSON, WORD, SEGMENT)
    assert set(both) == common | {"segments", "words"}
    assert (both["task"], both["language"], both["duration"]) == ("transcribe", "english", 2.5)
    assert [set(s) for s in both["segments"]] == [SEGMENT_KEYS] * 2
    assert both["words"] == [
        {"word": "hello", "start": 0.0, "end": 1.2},
        {"word": "world", "start": 1.2, "end": 2.5},
    ]


def test_a_model_may_print_languages_as_codes() -> None:
    shown = rendered(OPENAI, replace(FULL, language_style="code"), ResponseFormat.VERBOSE_JSON)
    assert shown["language"] == "en"


def test_between_our_own_services_words_have_a_confidence() -> None:
    shown = rendered(InferenceDialect(), FULL, ResponseFormat.VERBOSE_JSON)
    assert [word["confidence"] for word in shown["words"]] == [0.9123, None]


def test_the_stats_body() -> None:
    assert rendered(STATS, FULL, ResponseFormat.JSON) == {
        "text": "hello world",
        "duration": 2.5,
        "language": "en",
        "confidence": 0.9123,
        "words": [
            {"word": "hello", "start": 0.0, "end": 1.2, "confidence": 0.9123},
            {"word": "world", "start": 1.2, "end": 2.5, "confidence": None},
        ],
        "model": "whisper-1",
    }
    sparse = rendered(STATS, SPARSE, ResponseFormat.JSON)
    assert sparse == {
        "text": "", "duration": 0.1, "language": None, "confidence": None, "words": None, "model": "whisper-1",
    }  # fmt: skip


def test_the_routers_body() -> None:
    shown = rendered(ROUTER, FULL, ResponseFormat.JSON)
    assert set(shown) == {"id", "object", "created", "provider", "model", "text", "language", "segments"}
    assert shown["object"] == "audio.transcription"
    assert (shown["id"], shown["created"], shown["provider"]) == ("req_1", 1_700_000_000, "embedded")
    assert (shown["model"], shown["language"]) == ("whisper-1", "en")
    assert [set(s) for s in shown["segments"]] == [SEGMENT_KEYS] * 2
    assert rendered(ROUTER, SPARSE, ResponseFormat.JSON)["segments"] is None
    verbose = rendered(ROUTER, FULL, ResponseFormat.VERBOSE_JSON, WORD)
    assert set(verbose) == {*shown, "duration", "words"}
    assert set(rendered(ROUTER, FULL, ResponseFormat.VERBOSE_JSON, SEGMENT)) == {*shown, "duration"}


EXTRA_FIELDS = {
    "request_type", "provider", "model_requested", "model_deployment", "latency", "chunk_index", "raw_request",
    "raw_response", "cache_debug",
}  # fmt: skip


@pytest.mark.parametrize("kind", [ResponseFormat.JSON, ResponseFormat.VERBOSE_JSON])
def test_litellms_body(kind: ResponseFormat) -> None:
    shown = rendered(LITELLM, FULL, kind)
    assert set(shown) <= {
        "text", "task", "language", "duration", "segments", "words", "logprobs", "usage", "extra_fields",
    }  # fmt: skip
    assert (shown["text"], shown["task"], shown["language"], shown["duration"]) == (
        "hello world",
        "transcribe",
        "en",
        2.5,
    )
    assert len(shown["words"]) == len(shown["segments"]) == 2
    assert shown["logprobs"] is None
    assert shown["usage"] == {"type": "duration", "seconds": 2.5}
    assert set(shown["extra_fields"]) <= EXTRA_FIELDS
    assert shown["extra_fields"] == {
        "request_type": "transcription",
        "provider": "embedded",
        "model_requested": "whisper-1",
        "model_deployment": "default",
        "latency": 123,
        "chunk_index": 0,
        "cache_debug": None,
    }


def test_litellms_body_says_what_was_asked_for_and_what_served() -> None:
    served = replace(
        FULL,
        request=replace(FULL.request, model="groq/large"),
        provider="groq",
        upstream_model="whisper-large-v3",
        latency=1.9996,
    )
    shown = rendered(LITELLM, served, ResponseFormat.JSON)["extra_fields"]
    assert (shown["provider"], shown["model_requested"], shown["model_deployment"], shown["latency"]) == (
        "groq",
        "groq/large",
        "whisper-large-v3",
        2000,
    )


def test_litellms_usage_has_tokens_where_they_were_counted_and_seconds_always() -> None:
    shown = rendered(LITELLM, COUNTED, ResponseFormat.JSON)
    assert shown["usage"] == TOKENS | {"seconds": 2.5}
    assert shown["logprobs"] == SHOWN_LOGPROBS


def test_litellm_says_what_the_audio_was_made_into() -> None:
    made = replace(FULL, converted="flac")
    assert rendered(LITELLM, made, ResponseFormat.JSON)["extra_fields"]["converted_to"] == "flac"


def test_litellm_says_when_an_answer_came_out_of_the_cache() -> None:
    hit = replace(FULL, hit="entry-1")
    assert rendered(LITELLM, hit, ResponseFormat.JSON)["extra_fields"]["cache_debug"] == {
        "cache_hit": True,
        "cache_id": "entry-1",
        "hit_type": "direct",
        "provider_used": "embedded",
        "model_used": "default",
    }


def test_litellm_shows_only_the_granularities_asked_for() -> None:
    assert rendered(LITELLM, FULL, ResponseFormat.JSON, WORD)["segments"] is None
    assert rendered(LITELLM, FULL, ResponseFormat.JSON, SEGMENT)["words"] is None


@each_rich
@pytest.mark.parametrize(
    ("kind", "content_type", "start"),
    [
        (ResponseFormat.TEXT, "text/plain", "hello world\n"),
        (ResponseFormat.SRT, "application/x-subrip", "1\n00:00:00,000 --> 00:00:01,200\nhello\n"),
        (ResponseFormat.VTT, "text/vtt", "WEBVTT\n\n00:00:00.000 --> 00:00:01.200\nhello\n"),
    ],
)
def test_plain_formats_are_bodies_of_their_own(
    dialect: Dialect, kind: ResponseFormat, content_type: str, start: str
) -> None:
    body = dialect.render(replace(FULL, request=replace(FULL.request, response_format=kind)))
    assert body.content_type.startswith(content_type)
    assert body.content.decode().startswith(start)


# --- the description ---------------------------------------------------------------------------


@each
def test_the_description_has_every_field_of_the_form(dialect: Dialect) -> None:
    schema = DOCUMENT["components"]["schemas"][dialect.form.__name__]
    assert set(schema["properties"]) == {dialect.audio_field, *dialect.form.model_fields}
    assert schema["required"][0] == dialect.audio_field
    assert schema["properties"][dialect.audio_field]["format"] == "binary"


@each
def test_paths_and_audio_fields_are_the_contracts(dialect: Dialect) -> None:
    paths = {
        "openai": "/v1/audio/transcriptions",
        "stats": "/v1/stt/transcribe",
        "router": "/audio/transcriptions",
        "litellm": "/litellm/v1/audio/transcriptions",
    }
    assert dialect.path == paths[dialect.name]
    assert dialect.audio_field == ("audio" if dialect is STATS else "file")


@each
def test_the_description_has_the_headers_that_say_who_served_and_at_which_attempt(dialect: Dialect) -> None:
    headers = DOCUMENT["paths"][dialect.path]["post"]["responses"]["200"]["headers"]
    assert {"x-voxgate-provider", "x-voxgate-attempts"} <= set(headers)
