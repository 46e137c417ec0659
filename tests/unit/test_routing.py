"""Which deployments may serve a request, and what is said when none may."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from voxgate.catalog import Deployment, Model, ProviderEntry
from voxgate.errors import InvalidInput, ModelNotFound
from voxgate.model import Capabilities, Feature, Routing, TranscriptionRequest
from voxgate.routing import choose


def offer(provider: str, *, eu: bool = False, quantized: bool = False) -> Deployment:
    entry = ProviderEntry(name=provider, kind="inference", eu_native=eu)
    return Deployment(provider=entry, upstream_model="m", price=1, quantized=quantized)


A, B, C = offer("a", eu=True, quantized=True), offer("b"), offer("c", eu=True)
MODEL = Model(id="m", deployments=(A, B, C))
ANYTHING = Capabilities(features=frozenset(Feature))
ALL = {"a": ANYTHING, "b": ANYTHING, "c": ANYTHING}


def chosen(
    request: TranscriptionRequest | None = None,
    capabilities: Mapping[str, Capabilities] = ALL,
    routing: Routing | None = None,
) -> str:
    request = request or TranscriptionRequest(model="m", routing=routing or Routing())
    return "".join(d.provider.name for d in choose(MODEL, request, capabilities))


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
    "routing",
    [
        Routing(provider="nobody"),
        Routing(allowed_providers=frozenset()),
        Routing(provider="b", eu_native=True),
        Routing(provider="a", allow_quantization=False),
    ],
)
def test_filters_that_nobody_passes_are_a_404_that_names_who_there_is(routing: Routing) -> None:
    with pytest.raises(ModelNotFound, match="served by: a, b, c") as caught:
        chosen(routing=routing)
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")


SPEAKING = {
    "a": Capabilities(languages=frozenset({"en"})),
    "b": Capabilities(languages=frozenset({"en", "de"})),
    "c": Capabilities(),
}


@pytest.mark.parametrize(("language", "names"), [(None, "abc"), ("en", "abc"), ("de", "bc"), ("fr", "c")])
def test_only_who_speaks_the_language_serves_it(language: str | None, names: str) -> None:
    assert chosen(TranscriptionRequest(model="m", language=language), SPEAKING) == names


def test_a_language_that_nobody_speaks_is_refused_with_those_spoken() -> None:
    request = TranscriptionRequest(model="m", language="fr", routing=Routing(allowed_providers=frozenset("ab")))
    with pytest.raises(InvalidInput, match=r"does not speak french; it speaks: de, en\.") as caught:
        chosen(request, SPEAKING)
    assert (caught.value.status, caught.value.param) == (400, "language")


ABLE = {
    "a": Capabilities(features=frozenset({Feature.WORDS})),
    "b": Capabilities(features=frozenset({Feature.WORDS, Feature.LOGPROBS})),
    "c": Capabilities(features=frozenset({Feature.KEYWORDS})),
}


@pytest.mark.parametrize(
    ("required", "names"),
    [
        ({}, "abc"),
        ({Feature.WORDS: "x"}, "ab"),
        ({Feature.WORDS: "x", Feature.LOGPROBS: "include[]"}, "b"),
        ({Feature.KEYWORDS: "keywords"}, "c"),
    ],
)
def test_only_who_has_every_required_feature_serves(required: dict[Feature, str], names: str) -> None:
    assert chosen(TranscriptionRequest(model="m", required=required), ABLE) == names


@pytest.mark.parametrize(
    ("required", "param"),
    [
        ({Feature.DIARIZATION: "response_format"}, "response_format"),
        ({Feature.LOGPROBS: "include[]", Feature.KEYWORDS: "keywords"}, "keywords"),
    ],
)
def test_a_feature_that_is_missing_is_refused_by_its_field(required: dict[Feature, str], param: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        chosen(TranscriptionRequest(model="m", required=required), ABLE)
    assert caught.value.param == param
    assert f"'{param}'" in caught.value.message
