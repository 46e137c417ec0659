"""Which deployments may serve a request, in what order, and what is said when none may."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import pytest

from conftest import ROOT
from fakes.clock import Clock
from voxgate.catalog import Deployment, Model, ProviderEntry, load
from voxgate.errors import InvalidInput, ModelNotFound
from voxgate.model import Capabilities, Feature, Preference, Routing, TranscriptionRequest
from voxgate.routing import SMALLEST, Asked, choose
from voxgate.routing.health import Health

COST, SPEED, BALANCED = Preference.COST, Preference.SPEED, Preference.BALANCED


def offer(
    provider: str,
    *,
    eu: bool = False,
    quantized: bool = False,
    price: int = 1,
    speed: float | None = None,
    features: frozenset[Feature] | None = None,
    languages: frozenset[str] | None = None,
    max_seconds: float | None = None,
    max_bytes: int | None = None,
) -> Deployment:
    return Deployment(
        provider=ProviderEntry(name=provider, kind="inference", eu_native=eu),
        upstream_model="m",
        price=price,
        quantized=quantized,
        speed=speed,
        features=features,
        languages=languages,
        max_seconds=max_seconds,
        max_bytes=max_bytes,
    )


A, B, C = offer("a", eu=True, quantized=True), offer("b"), offer("c", eu=True)
MODEL = Model(id="m", deployments=(A, B, C))
ANYTHING = Capabilities(features=frozenset(Feature))
ALL = {"a": ANYTHING, "b": ANYTHING, "c": ANYTHING}


def said(model: Model, capabilities: Mapping[str, Capabilities]) -> dict[str, Capabilities]:
    """By deployment, what those providers' engines can."""
    return {d.id: capabilities[d.provider.name] for d in model.deployments if d.provider.name in capabilities}


def broken(health: Health, deployment: Deployment) -> None:
    """Let its breaker open."""
    for _ in range(5):
        health.failed(deployment.id, health.begin(deployment.id))
    assert not health.available(deployment.id)


def measured(health: Health, deployment: Deployment, speed: float) -> None:
    """Let it have taken so many seconds for one of audio."""
    health.succeeded(deployment.id, health.begin(deployment.id), latency=speed * 10, duration=10)


def chosen(
    request: TranscriptionRequest | None = None,
    capabilities: Mapping[str, Capabilities] = ALL,
    routing: Routing | None = None,
    *,
    model: Model = MODEL,
    duration: float = 10.0,
    size: int = 100_000,
    health: Health | None = None,
) -> str:
    request = request or TranscriptionRequest(model="m")
    request = replace(request, routing=routing or request.routing)
    found = choose(model, Asked(request, duration, size), said(model, capabilities), health or Health())
    return "".join(d.provider.name for d in found)


def refused(*args: object, **kwargs: object) -> str:
    """The message of the 404."""
    with pytest.raises(ModelNotFound) as caught:
        chosen(*args, **kwargs)  # type: ignore[arg-type]
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
    return caught.value.message


# --- filters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("routing", "names"),
    [
        (Routing(), "abc"),
        (Routing(provider="b"), "b"),
        (Routing(allowed_providers=frozenset({"c", "a"})), "ac"),
        (Routing(allowed_providers=frozenset({"c", "nobody"})), "c"),
        (Routing(eu_native=True), "ac"),
        (Routing(allow_quantization=False), "bc"),
        (Routing(eu_native=True, allow_quantization=False), "c"),
        (Routing(provider="a", eu_native=True), "a"),
    ],
)
def test_filters_leave_the_catalogues_order(routing: Routing, names: str) -> None:
    assert chosen(routing=routing) == names


@pytest.mark.parametrize(
    ("routing", "which"),
    [
        (Routing(provider="nobody"), "a: not the provider_id; b: not the provider_id; c: not the provider_id"),
        (
            Routing(allowed_providers=frozenset()),
            "a: not in allowed_providers; b: not in allowed_providers; c: not in allowed_providers",
        ),
        (Routing(provider="b", eu_native=True), "a: not the provider_id; b: not eu_native; c: not the provider_id"),
        (
            Routing(provider="a", allow_quantization=False),
            "a: quantized; b: not the provider_id; c: not the provider_id",
        ),
        (
            Routing(allowed_providers=frozenset("ab"), eu_native=True, allow_quantization=False),
            "a: quantized; b: not eu_native; c: not in allowed_providers",
        ),
    ],
)
def test_filters_that_nobody_passes_are_a_404_that_says_which_excluded_whom(routing: Routing, which: str) -> None:
    assert refused(routing=routing) == f"No provider of the model 'm' can serve this request ({which})."


def test_a_named_provider_is_not_fallen_back_from() -> None:
    other = replace(B, upstream_model="other")
    model = Model(id="m", deployments=(A, B, other, C))
    asked = Asked(TranscriptionRequest(model="m", routing=Routing(provider="b")), 1.0, 1)
    found = choose(model, asked, said(model, ALL), Health())
    assert found == (B,)


def test_a_named_provider_is_asked_even_when_it_is_out_of_order() -> None:
    health = Health()
    broken(health, B)
    assert chosen(routing=Routing(provider="b"), health=health) == "b"


@pytest.mark.parametrize("preference", list(Preference))
def test_a_named_provider_is_asked_whatever_is_preferred(preference: Preference) -> None:
    model = Model(id="m", deployments=(offer("a", price=9, speed=9.0), offer("b", speed=0.1)))
    assert chosen(routing=Routing(provider="a", preference=preference), model=model) == "a"


# --- language ----------------------------------------------------------------------------------

SPEAKING = {
    "a": Capabilities(languages=frozenset({"en"})),
    "b": Capabilities(languages=frozenset({"en", "de"})),
    "c": Capabilities(),
}
DECLARED = Model(
    id="m",
    deployments=(
        offer("a", features=frozenset(), languages=frozenset({"en"})),
        offer("b", features=frozenset(), languages=frozenset({"en", "de"})),
        offer("c", features=frozenset()),
    ),
)
LANGUAGES = [(None, "abc"), ("en", "abc"), ("de", "bc"), ("fr", "c")]


@pytest.mark.parametrize(("language", "names"), LANGUAGES)
def test_only_who_speaks_the_language_serves_it(language: str | None, names: str) -> None:
    assert chosen(TranscriptionRequest(model="m", language=language), SPEAKING) == names


@pytest.mark.parametrize(("language", "names"), LANGUAGES)
def test_a_language_is_declared_by_the_catalogue_where_no_engine_says(language: str | None, names: str) -> None:
    assert chosen(TranscriptionRequest(model="m", language=language), {}, model=DECLARED) == names


def test_a_language_that_nobody_speaks_is_refused_with_those_spoken() -> None:
    model = Model(id="m", deployments=(A, B))
    with pytest.raises(
        InvalidInput, match=r"'m' cannot serve this: .*french, only en; .*french, only de, en\."
    ) as caught:
        chosen(TranscriptionRequest(model="m", language="fr"), SPEAKING, model=model)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_input", "language")


def test_a_language_that_none_of_those_allowed_speaks_is_a_404_that_says_so() -> None:
    request = TranscriptionRequest(model="m", language="fr", routing=Routing(allowed_providers=frozenset("ab")))
    message = refused(request, SPEAKING)
    assert (
        "a: it does not speak french, only en; b: it does not speak french, only de, en; c: not in allowed" in message
    )


# --- features ----------------------------------------------------------------------------------

ABLE = {
    "a": Capabilities(features=frozenset({Feature.WORDS})),
    "b": Capabilities(features=frozenset({Feature.WORDS, Feature.LOGPROBS})),
    "c": Capabilities(features=frozenset({Feature.KEYWORDS})),
}
ABLE_BY_CATALOGUE = Model(id="m", deployments=tuple(offer(name, features=can.features) for name, can in ABLE.items()))
FEATURES: list[tuple[dict[Feature, str], str]] = [
    ({}, "abc"),
    ({Feature.WORDS: "x"}, "ab"),
    ({Feature.WORDS: "x", Feature.LOGPROBS: "include[]"}, "b"),
    ({Feature.KEYWORDS: "keywords"}, "c"),
]


@pytest.mark.parametrize(("required", "names"), FEATURES)
def test_only_who_has_every_required_feature_serves(required: dict[Feature, str], names: str) -> None:
    assert chosen(TranscriptionRequest(model="m", required=required), ABLE) == names


@pytest.mark.parametrize(("required", "names"), FEATURES)
def test_a_feature_is_declared_by_the_catalogue_where_no_engine_says(required: dict[Feature, str], names: str) -> None:
    assert chosen(TranscriptionRequest(model="m", required=required), {}, model=ABLE_BY_CATALOGUE) == names


def test_what_the_catalogue_declares_counts_more_than_what_an_engine_of_that_name_says() -> None:
    request = TranscriptionRequest(model="m", required={Feature.KEYWORDS: "keywords"})
    assert chosen(request, ALL, model=ABLE_BY_CATALOGUE) == "c"


def test_an_engine_that_does_not_say_what_it_can_is_asked_for_nothing_special() -> None:
    assert chosen(capabilities={}) == "abc"
    with pytest.raises(InvalidInput):
        chosen(TranscriptionRequest(model="m", required={Feature.WORDS: "x"}), {})


@pytest.mark.parametrize(
    ("required", "param"),
    [
        ({Feature.DIARIZATION: "response_format"}, "response_format"),
        ({Feature.CHUNKING: "chunking_strategy"}, "chunking_strategy"),
        ({Feature.STREAMING: "stream"}, "stream"),
    ],
)
def test_a_feature_that_nobody_has_is_refused_by_its_field(required: dict[Feature, str], param: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        chosen(TranscriptionRequest(model="m", required=required), ABLE)
    assert (caught.value.status, caught.value.param) == (400, param)
    (feature,) = required
    assert caught.value.message == f"The model 'm' cannot serve this: it does not offer {feature}."


def test_two_features_that_nobody_has_together_are_a_404_that_says_what_each_lacks() -> None:
    required = {Feature.LOGPROBS: "include[]", Feature.KEYWORDS: "keywords"}
    message = refused(TranscriptionRequest(model="m", required=required), ABLE)
    assert "(a: it does not offer logprobs; b: it does not offer keywords; c: it does not offer logprobs)" in message


def test_only_who_translates_is_asked_to() -> None:
    translating = ABLE | {"b": ANYTHING}
    request = TranscriptionRequest(model="m", translate=True)
    assert chosen(request, translating) == "b"
    with pytest.raises(InvalidInput, match="it does not translate") as caught:
        chosen(request, ABLE)
    assert caught.value.param == "model"


# --- size and duration -------------------------------------------------------------------------

LIMITED = Model(
    id="m",
    deployments=(offer("a", max_seconds=60.0), offer("b", max_seconds=600.0, max_bytes=SMALLEST * 300), offer("c")),
)


@pytest.mark.parametrize(
    ("duration", "names"), [(0.1, "abc"), (60.0, "abc"), (60.1, "bc"), (300.0, "bc"), (600.0, "c"), (10_000.0, "c")]
)
def test_longer_audio_goes_to_who_takes_it(duration: float, names: str) -> None:
    assert chosen(model=LIMITED, duration=duration, size=10**9) == names


@pytest.mark.parametrize(
    ("duration", "size", "names"),
    [
        (60.0, 10**9, "abc"),  # it can be made smaller
        (500.0, SMALLEST * 300, "bc"),  # it is small enough as it came
        (500.0, SMALLEST * 300 + 1, "c"),  # it cannot be made small enough
        (300.0, 10**9, "bc"),
        (300.1, 10**9, "c"),
    ],
)
def test_a_limit_in_bytes_excludes_only_what_no_conversion_makes_fit(duration: float, size: int, names: str) -> None:
    assert chosen(model=LIMITED, duration=duration, size=size) == names


def test_audio_too_long_for_all_is_refused_by_the_file() -> None:
    with pytest.raises(InvalidInput, match=r"audio duration 600\.1 seconds is longer than 60 seconds") as caught:
        chosen(model=Model(id="m", deployments=LIMITED.deployments[:2]), duration=600.1)
    assert (caught.value.status, caught.value.param) == (400, "file")
    assert "longer than 600 seconds" in caught.value.message


def test_audio_too_large_for_all_is_refused_by_the_file() -> None:
    with pytest.raises(InvalidInput, match=rf"more than {SMALLEST * 300} bytes however small") as caught:
        chosen(model=Model(id="m", deployments=LIMITED.deployments[1:2]), duration=400.0, size=10**9)
    assert (caught.value.status, caught.value.param) == (400, "file")


# --- order -------------------------------------------------------------------------------------


def ordered(preference: Preference, *deployments: Deployment, health: Health | None = None) -> str:
    return chosen(routing=Routing(preference=preference), model=Model(id="m", deployments=deployments), health=health)


DEAR, CHEAP, FREE = offer("d", price=6000, speed=0.1), offer("c", price=3000, speed=0.4), offer("f", price=0)


def test_cost_is_by_price() -> None:
    assert ordered(COST, DEAR, CHEAP) == "cd"
    assert ordered(COST, DEAR, FREE, CHEAP) == "fcd"


def test_speed_is_by_the_catalogues_figure_before_anything_is_measured() -> None:
    assert ordered(SPEED, CHEAP, DEAR) == "dc"


def test_speed_is_by_what_was_measured_where_it_was() -> None:
    health = Health()
    measured(health, CHEAP, 0.05)
    assert ordered(SPEED, DEAR, CHEAP, health=health) == "cd"
    measured(health, DEAR, 0.01)
    assert ordered(SPEED, CHEAP, DEAR, health=health) == "dc"


def test_what_has_no_speed_yet_is_tried_and_then_known() -> None:
    health = Health()
    unknown = offer("u")
    assert ordered(SPEED, unknown, CHEAP, DEAR, health=health) == "udc"
    measured(health, unknown, 0.2)
    assert ordered(SPEED, unknown, CHEAP, DEAR, health=health) == "duc"


@pytest.mark.parametrize("preference", list(Preference))
def test_equals_stay_in_the_catalogues_order(preference: Preference) -> None:
    assert ordered(preference, offer("b"), offer("a"), offer("c")) == "bac"
    same = [offer(name, price=3000, speed=0.2) for name in "cab"]
    assert ordered(preference, *same) == "cab"


@pytest.mark.parametrize(
    ("dear", "cheap", "names"),
    [
        ((6000, 0.1), (3000, 0.4), "dc"),  # 2 + 1 to 1 + 4
        ((6000, 0.1), (1000, 0.2), "cd"),  # 6 + 1 to 1 + 2
        ((3001, 0.1), (3000, 0.1), "cd"),
        ((3000, 0.1), (3000, 0.11), "dc"),
    ],
)
def test_balanced_adds_price_and_speed_each_as_a_multiple_of_the_best(
    dear: tuple[int, float], cheap: tuple[int, float], names: str
) -> None:
    one, other = offer("d", price=dear[0], speed=dear[1]), offer("c", price=cheap[0], speed=cheap[1])
    assert ordered(BALANCED, one, other) == ordered(BALANCED, other, one) == names


def test_balanced_is_by_what_was_measured_where_it_was() -> None:
    health = Health()
    measured(health, DEAR, 0.4)
    assert ordered(BALANCED, DEAR, CHEAP) == "dc"
    assert ordered(BALANCED, DEAR, CHEAP, health=health) == "cd"


def test_balanced_is_what_is_meant_where_nothing_is_preferred() -> None:
    assert chosen(model=Model(id="m", deployments=(CHEAP, DEAR))) == "dc"


@pytest.mark.parametrize("preference", list(Preference))
def test_what_costs_nothing_or_took_no_time_can_be_ordered(preference: Preference) -> None:
    health = Health()
    measured(health, FREE, 0.0)
    assert set(ordered(preference, DEAR, FREE, health=health)) == set("df")
    assert ordered(preference, FREE, health=health) == "f"


@pytest.mark.parametrize("preference", list(Preference))
def test_what_is_out_of_order_comes_last_and_by_the_same_order(preference: Preference) -> None:
    health = Health()
    best, middle, worst = (offer(name, price=n, speed=float(n)) for n, name in enumerate("bmw", 1))
    broken(health, best)
    assert ordered(preference, worst, best, middle, health=health) == "mwb"
    broken(health, middle)
    assert ordered(preference, worst, best, middle, health=health) == "wbm"
    broken(health, worst)
    assert ordered(preference, worst, best, middle, health=health) == "bmw"


def test_a_rate_limit_puts_a_deployment_last_for_as_long_as_it_said() -> None:
    clock = Clock()
    health = Health(clock=clock)
    health.limited(A.id, health.begin(A.id), 30.0)
    assert chosen(health=health) == "bca"
    clock.now += 29.9
    assert chosen(health=health) == "bca"
    clock.now += 0.2
    assert chosen(health=health) == "abc"


def test_a_breaker_that_has_waited_lets_one_request_try_and_the_others_do_not() -> None:
    clock = Clock()
    health = Health(clock=clock)
    broken(health, A)
    assert chosen(health=health) == "bca"
    clock.now += 16
    assert chosen(health=health) == "abc"
    health.begin(A.id)
    assert chosen(health=health) == "bca"
    measured(health, A, 0.1)
    assert chosen(health=health) == "abc"


def test_choosing_changes_nothing() -> None:
    health = Health()
    broken(health, A)
    before = [health.report(d.id) for d in MODEL.deployments]
    assert chosen(health=health) == chosen(health=health)
    assert [health.report(d.id) for d in MODEL.deployments] == before


# --- the catalogues that ship ------------------------------------------------------------------

KEYS = dict.fromkeys(
    [
        "OPENAI_API_KEY",
        "GROQ_API_KEY",
        "OVH_AI_ENDPOINTS_ACCESS_TOKEN",
        "SCW_SECRET_KEY",
        "MISTRAL_API_KEY",
        "DEEPGRAM_API_KEY",
    ],
    "k",
)
SELF = {"self": Capabilities(languages=frozenset({"en"}), features=frozenset({Feature.WORDS}))}
WORDS = {Feature.WORDS: "timestamp_granularities[]"}


def by_catalogue(
    catalog: str, model: str, request: TranscriptionRequest | None = None, *, duration: float = 10.0, size: int = 1000
) -> list[str]:
    request = request or TranscriptionRequest(model=model)
    known = load(catalog, KEYS).find(model)
    found = choose(known, Asked(request, duration, size), said(known, SELF), Health())
    return [deployment.provider.name for deployment in found]


@pytest.mark.parametrize(
    ("routing", "names"),
    [
        (Routing(preference=COST), ["groq", "self", "ovh", "scaleway"]),
        (Routing(), ["groq", "self", "ovh", "scaleway"]),
        (Routing(preference=SPEED), ["self", "groq", "ovh", "scaleway"]),
        (Routing(eu_native=True), ["self", "ovh", "scaleway"]),
        (Routing(eu_native=True, allow_quantization=False), ["ovh", "scaleway"]),
        (Routing(allowed_providers=frozenset({"groq", "ovh"})), ["groq", "ovh"]),
        (Routing(provider="scaleway"), ["scaleway"]),
    ],
)
def test_the_default_catalogues_providers_are_filtered_and_ordered(routing: Routing, names: list[str]) -> None:
    request = TranscriptionRequest(model="whisper-large-v3", routing=routing)
    assert by_catalogue("default", "whisper-large-v3", request) == names


def test_the_default_catalogue_sends_what_its_own_engine_cannot_to_who_can() -> None:
    french = TranscriptionRequest(model="m", language="fr")
    assert by_catalogue("default", "whisper-large-v3", french) == ["groq", "ovh", "scaleway"]
    timed = TranscriptionRequest(model="m", required=WORDS)
    assert by_catalogue("default", "whisper-large-v3", timed) == ["groq", "self", "ovh"]
    assert by_catalogue("default", "ovh/whisper-large-v3") == ["ovh"]


def test_gpt_4o_takes_no_more_than_1400_seconds_and_gives_no_words() -> None:
    assert by_catalogue("default", "gpt-4o-transcribe", duration=1400.0) == ["openai"]
    with pytest.raises(InvalidInput, match="longer than 1400 seconds") as caught:
        by_catalogue("default", "gpt-4o-transcribe", duration=1400.1)
    assert caught.value.param == "file"
    with pytest.raises(InvalidInput, match="does not offer words") as caught:
        by_catalogue("default", "gpt-4o-transcribe", TranscriptionRequest(model="m", required=WORDS))
    assert caught.value.param == "timestamp_granularities[]"


EU = str(ROOT / "docs" / "catalog-eu.toml")


@pytest.mark.parametrize(
    ("request_", "names"),
    [
        (TranscriptionRequest(model="m"), ["ovh", "scaleway", "self"]),
        (TranscriptionRequest(model="m", routing=Routing(eu_native=True)), ["ovh", "scaleway", "self"]),
        (TranscriptionRequest(model="m", language="fr"), ["ovh", "scaleway"]),
        (TranscriptionRequest(model="m", required=WORDS), ["ovh", "self"]),
        (TranscriptionRequest(model="m", required=WORDS, language="fr"), ["ovh"]),
    ],
    ids=["anything", "eu_native", "French", "words", "French words"],
)
def test_the_eu_examples_providers_are_filtered_and_ordered(request_: TranscriptionRequest, names: list[str]) -> None:
    assert by_catalogue(EU, "whisper-1", request_) == names


def test_the_eu_example_says_what_excluded_whom() -> None:
    request = TranscriptionRequest(
        model="m", language="fr", required=WORDS, routing=Routing(allowed_providers=frozenset({"scaleway", "self"}))
    )
    which = (
        "(ovh: not in allowed_providers; scaleway: it does not offer words; self: it does not speak french, only en)"
    )
    with pytest.raises(ModelNotFound, match=re.escape(which)) as caught:
        by_catalogue(EU, "whisper-1", request)
    assert caught.value.status == 404
