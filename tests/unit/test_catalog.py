"""The catalogue: what it says, and that every mistake in it is named by file, key and reason."""

from __future__ import annotations

import logging
import traceback
from dataclasses import fields
from pathlib import Path

import pytest

from conftest import ROOT
from voxgate.audio import sniff
from voxgate.audio.convert import TARGETS
from voxgate.catalog import Catalog, Deployment, load
from voxgate.errors import InvalidCatalog, ModelNotFound
from voxgate.model import Feature

GOOD = """
[providers.self]
kind = "inference"
base_url = "env:URL"
regions = ["eu", "us"]
eu_native = true

[providers.far]
kind = "inference"
base_url = "http://far:8080"

[models."whisper-large-v3"]
aliases = ["large", "lmp"]
language_style = "code"
deployments = [
  { provider = "self", upstream_model = "large-v3", price_per_minute = "0.0030", quantized = true },
  { provider = "far", upstream_model = "big", price_per_minute = "0.0019" },
]

[models.whisper-1]
deployments = [{ provider = "far", upstream_model = "one", price_per_minute = "0" }]
"""

# Every key there is, each with another value than its default.
RICH = """
[providers.paid]
kind = "openai"
base_url = "https://paid.example/v1"
api_key = "env:PAID_KEY"
flavor = "mistral"

[providers.stored]
kind = "deepgram"
base_url = "https://stored.example"
api_key = "secret:voxgate/stored"

[providers.near]
kind = "inference"
base_url = "http://near:8080"
staged = true

[providers.here]
kind = "inference"

[models.rich]
aliases = ["r"]
deployments = [
  { provider = "paid", upstream_model = "p", price_per_minute = "0.006", upstream_price_per_minute = "0.0045", hit_price_per_minute = "0.0001", minimum_seconds = "9.5", quantized = true, words = true, segments = false, response_format = "json", max_bytes = 26214400, max_seconds = 1400, containers = ["flac", "ogg"], languages = ["German", "en-US"], speed = 0.05 },
  { provider = "stored", upstream_model = "s", price_per_minute = "0.0043" },
  { provider = "near", upstream_model = "n", price_per_minute = "0.00001" },
  { provider = "here", upstream_model = "h", price_per_minute = "0" },
]

[models.paid-only]
aliases = ["po"]
deployments = [{ provider = "paid", upstream_model = "q", price_per_minute = "1" }]
"""  # noqa: E501


def read(directory: Path, text: str, **environ: str) -> Catalog:
    file = directory / "catalog.toml"
    file.write_text(text, encoding="utf-8")
    return load(str(file), environ)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    catalog = read(tmp_path, GOOD, URL="http://gpu:8080")
    assert list(catalog.models) == ["whisper-large-v3", "whisper-1"]
    assert [p.name for p in catalog.providers] == ["self", "far"]
    near, far = catalog.providers
    assert (near.api_key, near.flavor, near.staged) == ("", "", False)
    assert (near.kind, near.base_url, near.regions, near.eu_native) == (
        "inference",
        "http://gpu:8080",
        ("eu", "us"),
        True,
    )
    assert (far.base_url, far.regions, far.eu_native) == ("http://far:8080", (), False)
    model = catalog.find("whisper-large-v3")
    assert (model.id, model.aliases, model.language_style) == ("whisper-large-v3", ("large", "lmp"), "code")
    assert [(d.provider.name, d.upstream_model, d.price, d.quantized) for d in model.deployments] == [
        ("self", "large-v3", 3000, True),
        ("far", "big", 1900, False),
    ]
    assert catalog.find("whisper-1").language_style == "name"


def offers(catalog: Catalog) -> dict[str, Deployment]:
    """Of the model `rich`, by provider."""
    return {deployment.provider.name: deployment for deployment in catalog.find("rich").deployments}


def test_every_key_of_a_provider_is_read(tmp_path: Path) -> None:
    catalog = read(tmp_path, RICH, PAID_KEY="k")
    entries = [(p.name, p.kind, p.base_url, p.api_key, p.flavor, p.staged) for p in catalog.providers]
    assert entries == [
        ("paid", "openai", "https://paid.example/v1", "env:PAID_KEY", "mistral", False),
        ("stored", "deepgram", "https://stored.example", "secret:voxgate/stored", "", False),
        ("near", "inference", "http://near:8080", "", "", True),
        ("here", "inference", "", "", "", False),
    ]


def test_every_key_of_a_deployment_is_read(tmp_path: Path) -> None:
    catalog = read(tmp_path, RICH, PAID_KEY="k")
    assert offers(catalog)["paid"] == Deployment(
        provider=catalog.providers[0],
        upstream_model="p",
        price=6000,
        hit_price=100,
        upstream_price=4500,
        minimum=95,
        quantized=True,
        features=frozenset({Feature.WORDS, Feature.PROMPT, Feature.TEMPERATURE, Feature.LANGUAGE}),
        languages=frozenset({"de", "en"}),
        response_format="json",
        max_bytes=26_214_400,
        max_seconds=1400.0,
        containers=frozenset({"flac", "ogg"}),
        speed=0.05,
    )
    assert {field.name for field in fields(Deployment)} == {
        "provider", "upstream_model", "price", "hit_price", "upstream_price", "minimum", "quantized", "features",
        "languages",
        "response_format", "max_bytes", "max_seconds", "containers", "speed",
    }, "a key that is not tried above"  # fmt: skip


def test_a_deployment_without_limits_has_none(tmp_path: Path) -> None:
    plain = offers(read(tmp_path, RICH))["stored"]
    assert (plain.minimum, plain.quantized, plain.response_format) == (0, False, "verbose_json")
    assert (plain.languages, plain.max_bytes, plain.max_seconds, plain.containers, plain.speed) == (None,) * 5


def test_what_a_deployment_offers_is_its_kinds_usual(tmp_path: Path) -> None:
    found = offers(read(tmp_path, RICH))
    assert found["stored"].features == frozenset({Feature.SEGMENTS, Feature.WORDS, Feature.LANGUAGE, Feature.LIVE})
    near = found["near"].features
    assert near is not None
    assert {Feature.WORDS, Feature.SEGMENTS, Feature.PROMPT, Feature.TEMPERATURE, Feature.LANGUAGE} <= near
    assert near.isdisjoint({Feature.LOGPROBS, Feature.DIARIZATION, Feature.CHUNKING, Feature.LANGUAGES})
    assert found["here"].features is None, "the engine itself is asked"


ADDRESS = 'base_url = "https://s.example"'
WIRES = {
    "openai": f'kind = "openai"\n{ADDRESS}',
    "mistral": f'kind = "openai"\nflavor = "mistral"\n{ADDRESS}',
    "deepgram": f'kind = "deepgram"\n{ADDRESS}',
    "inference": f'kind = "inference"\n{ADDRESS}',
}
# Of these the adapter would not ask its provider.
IMPOSSIBLE = {
    ("mistral", Feature.TRANSLATION), ("deepgram", Feature.TRANSLATION), ("mistral", Feature.LOGPROBS),
    ("deepgram", Feature.LOGPROBS), ("inference", Feature.LOGPROBS), ("deepgram", Feature.STREAMING),
    ("openai", Feature.LIVE), ("mistral", Feature.LIVE),
}  # fmt: skip


def single(wire: str, more: str = "") -> str:
    """A catalogue of one deployment, with more in its entry."""
    offer = f'{{ provider = "s", upstream_model = "u", price_per_minute = "1"{more} }}'
    return f"[providers.s]\n{wire}\n[models.m]\ndeployments = [{offer}]\n"


def refusal(directory: Path, text: str, **environ: str) -> str:
    """What is said after the file's name."""
    with pytest.raises(InvalidCatalog) as caught:
        read(directory, text, **environ)
    return str(caught.value).removeprefix(f"{directory / 'catalog.toml'}: ")


@pytest.mark.parametrize("wire", list(WIRES))
@pytest.mark.parametrize("feature", list(Feature))
def test_each_feature_can_be_declared_where_its_adapter_can_and_denied(
    tmp_path: Path, feature: Feature, wire: str
) -> None:
    usual = read(tmp_path, single(WIRES[wire])).find("m").deployments[0].features
    denied = read(tmp_path, single(WIRES[wire], f", {feature} = false")).find("m").deployments[0].features
    assert usual is not None
    assert denied == usual - {feature}
    declared = single(WIRES[wire], f", {feature} = true")
    if (wire, feature) in IMPOSSIBLE:
        said = refusal(tmp_path, declared)
        assert said.startswith(f"models.m.deployments[0].{feature}: leave it out: '{feature}' is for ")
        assert said.endswith(f" alone, not {wire}.")
    else:
        assert read(tmp_path, declared).find("m").deployments[0].features == usual | {feature}


@pytest.mark.parametrize("address", ["", 'base_url = "env:URL"'])
def test_the_engine_of_this_process_says_itself_what_it_can(tmp_path: Path, address: str) -> None:
    """The same entry serves both: what is said of it holds once it has an address."""
    text = single(f'kind = "inference"\n{address}', ", words = true, translation = false")
    assert read(tmp_path, text).find("m").deployments[0].features is None


def test_without_an_engine_here_who_has_no_address_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    catalog = load("default", {"GROQ_API_KEY": "k"}, embedded=False)
    assert {provider.name for provider in catalog.providers} == {"groq"}
    assert "'self' is left out: it has no address, and there is no engine here" in caplog.text
    assert "self" in {
        p.name for p in load("default", {"VOXGATE_INFERENCE_URL": "http://gpu"}, embedded=False).providers
    }
    with pytest.raises(InvalidCatalog, match="none can be served"):
        load("default", {}, embedded=False)


def test_what_a_provider_charges_is_known_where_it_is_said(tmp_path: Path) -> None:
    text = single(WIRES["openai"], ', upstream_price_per_minute = "0.0045"')
    deployment = read(tmp_path, text).find("m").deployments[0]
    assert (deployment.upstream_price, deployment.upstream_cost(10.04)) == (4500, 758)
    assert read(tmp_path, single(WIRES["openai"])).find("m").deployments[0].upstream_price is None


def test_what_another_machines_engine_can_is_for_the_catalogue_to_say(tmp_path: Path) -> None:
    text = single('kind = "inference"\nbase_url = "env:URL"', ', words = false, languages = ["de"]')
    deployment = read(tmp_path, text, URL="http://gpu").find("m").deployments[0]
    assert deployment.features is not None
    assert Feature.WORDS not in deployment.features
    assert deployment.languages == frozenset({"de"})


@pytest.mark.parametrize(
    "container", [sniff.WAV, sniff.FLAC, sniff.MP3, sniff.AAC, sniff.MP4, sniff.OGG, sniff.WEBM, sniff.MPEG]
)
def test_a_container_has_the_name_that_sniffing_gives_it(tmp_path: Path, container: sniff.Container) -> None:
    for made in TARGETS:
        text = RICH.replace('"flac", "ogg"', f'"{container.name}", "{made.name}"')
        assert offers(read(tmp_path, text, PAID_KEY="k"))["paid"].containers == frozenset({container.name, made.name})
    alone = RICH.replace('"flac", "ogg"', f'"{container.name}"')
    if container in TARGETS:
        assert offers(read(tmp_path, alone, PAID_KEY="k"))["paid"].containers == frozenset({container.name})
    else:
        said = f"{RICHEST}.containers: add flac or ogg: other audio is converted to them."
        assert refusal(tmp_path, alone, PAID_KEY="k") == said


@pytest.mark.parametrize("wire", list(WIRES))
@pytest.mark.parametrize("kind", ["json", "verbose_json", "diarized_json"])
def test_a_response_format_is_one_that_can_be_read(tmp_path: Path, kind: str, wire: str) -> None:
    text = single(WIRES[wire], f', response_format = "{kind}"')
    if kind == "diarized_json" and wire != "openai":
        said = f"models.m.deployments[0].response_format: leave it out: '{kind}' is for openai alone, not {wire}."
        assert refusal(tmp_path, text) == said
    else:
        assert read(tmp_path, text).find("m").deployments[0].response_format == kind


def test_a_speed_may_be_a_whole_number(tmp_path: Path) -> None:
    speed = offers(read(tmp_path, RICH.replace("speed = 0.05", "speed = 1"), PAID_KEY="k"))["paid"].speed
    assert (speed, type(speed)) == (1.0, float)


# --- money -------------------------------------------------------------------------------------


def test_an_answer_out_of_the_cache_costs_a_tenth_unless_the_entry_says_otherwise(tmp_path: Path) -> None:
    found = offers(read(tmp_path, RICH.replace('price_per_minute = "0.00001"', 'price_per_minute = "0.000011"')))
    assert (found["stored"].hit_price, found["near"].hit_price, found["here"].hit_price) == (430, 2, 0)
    free = RICH.replace('hit_price_per_minute = "0.0001"', 'hit_price_per_minute = "0"')
    assert offers(read(tmp_path, free, PAID_KEY="k"))["paid"].hit_price == 0


@pytest.mark.parametrize(
    ("duration", "billed", "cost", "hit"),
    [(0.0, 95, 950, 16), (1.0, 95, 950, 16), (9.5, 95, 950, 16), (9.51, 96, 960, 16), (60.0, 600, 6000, 100)],
)
def test_a_request_is_billed_by_the_tenth_and_at_least_the_minimum(
    tmp_path: Path, duration: float, billed: int, cost: int, hit: int
) -> None:
    paid = offers(read(tmp_path, RICH, PAID_KEY="k"))["paid"]
    assert (paid.billable(duration), paid.cost(duration), paid.cost(duration, hit=True)) == (billed, cost, hit)


def test_a_price_is_at_most_a_thousand_dollars_a_minute(tmp_path: Path) -> None:
    most = RICH.replace('"0.006"', '"1000"')
    assert offers(read(tmp_path, most, PAID_KEY="k"))["paid"].price == 10**9
    said = refusal(tmp_path, most.replace('"1000"', '"1000.000001"'))
    assert said == f"{RICHEST}.price_per_minute: must be less than or equal to 1000, not '1000.000001'."


def test_a_hit_costs_at_most_what_is_no_hit(tmp_path: Path) -> None:
    same = RICH.replace('hit_price_per_minute = "0.0001"', 'hit_price_per_minute = "0.006"')
    assert offers(read(tmp_path, same, PAID_KEY="k"))["paid"].hit_price == 6000
    said = refusal(tmp_path, same.replace('hit_price_per_minute = "0.006"', 'hit_price_per_minute = "0.006001"'))
    assert said == f"{RICHEST}.hit_price_per_minute: must be at most price_per_minute, 0.006, not 0.006001."


def test_a_minimum_is_at_most_a_day(tmp_path: Path) -> None:
    assert offers(read(tmp_path, RICH.replace('"9.5"', '"86400"'), PAID_KEY="k"))["paid"].minimum == 864_000
    said = refusal(tmp_path, RICH.replace('"9.5"', '"86400.1"'))
    assert said == f"{RICHEST}.minimum_seconds: must be less than or equal to 86400, not '86400.1'."


# --- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "A-1", "eu.west_2", "0"])
def test_a_providers_name_is_fit_for_a_header_and_a_path(tmp_path: Path, name: str) -> None:
    text = GOOD.replace("providers.far", f'providers."{name}"').replace('"far"', f'"{name}"')
    assert read(tmp_path, text).find(f"{name}/whisper-1").deployments[0].provider.name == name


@pytest.mark.parametrize("name", ["", "a/b", "a b", " a", "é", "a:b", "a\\n", "a\\r\\nx-evil: 1"])
def test_another_providers_name_is_refused(tmp_path: Path, name: str) -> None:
    said = refusal(tmp_path, GOOD.replace("providers.far", f'providers."{name}"').replace('"far"', f'"{name}"'))
    assert said.startswith("providers.")
    assert said.endswith(f"the name '{name}' must be of ASCII letters, digits, '.', '_' and '-'.")


NAMED = [("models.whisper-1]", 'models."{}"]'), ('"lmp"', '"{}"'), ('upstream_model = "one"', 'upstream_model = "{}"')]


@pytest.mark.parametrize("named", NAMED, ids=["model", "alias", "upstream-model"])
@pytest.mark.parametrize("name", ["", " a", "a ", " ", "é", "a\\tb", "a\\n", "a\\u007f"])
def test_a_model_without_a_printable_name_is_refused(tmp_path: Path, named: tuple[str, str], name: str) -> None:
    said = refusal(tmp_path, GOOD.replace(named[0], named[1].format(name)))
    assert said.startswith("models.")
    assert said.endswith(" must be printable ASCII with no space at its ends.")


@pytest.mark.parametrize("named", NAMED, ids=["model", "alias", "upstream-model"])
@pytest.mark.parametrize("name", ["a", "org/model", "far/other", "Large v3 (turbo)", "~"])
def test_a_models_name_may_have_a_slash_and_a_space_in_it(tmp_path: Path, named: tuple[str, str], name: str) -> None:
    catalog = read(tmp_path, GOOD.replace(named[0], named[1].format(name)))
    upstream = [d.upstream_model for model in catalog.models.values() for d in model.deployments]
    assert name in [*catalog.models, *catalog.find("large").aliases, *upstream]


def test_the_same_deployment_twice_in_a_model_is_refused(tmp_path: Path) -> None:
    twice = GOOD.replace('provider = "self", upstream_model = "large-v3"', 'provider = "far", upstream_model = "big"')
    said = refusal(tmp_path, twice)
    assert said == "models.whisper-large-v3.deployments[1].upstream_model: 'far/big' is given twice."
    assert read(tmp_path, GOOD.replace('"one"', '"big"')).offers["far/big"].keys() == {"whisper-large-v3", "whisper-1"}


# --- keys --------------------------------------------------------------------------------------


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "voxgate.catalog"]


@pytest.mark.parametrize("environ", [{}, {"PAID_KEY": ""}, {"PAID_KEY": " \n"}, {"PAID": "k"}])
def test_a_provider_without_its_key_is_left_out_with_one_log_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, environ: dict[str, str]
) -> None:
    with caplog.at_level(logging.INFO):
        catalog = read(tmp_path, RICH, **environ)
    assert lines(caplog) == ["the provider 'paid' is left out: PAID_KEY is not set"]
    assert [p.name for p in catalog.providers] == ["stored", "near", "here"]
    assert [d.provider.name for d in catalog.find("r").deployments] == ["stored", "near", "here"]


@pytest.mark.parametrize("name", ["paid-only", "po", "paid/paid-only", "paid/rich"])
def test_what_only_a_provider_without_its_key_serves_is_not_there(tmp_path: Path, name: str) -> None:
    catalog = read(tmp_path, RICH)
    assert list(catalog.models) == ["rich"]
    with pytest.raises(ModelNotFound):
        catalog.find(name)
    assert read(tmp_path, RICH, PAID_KEY="k").find(name)


def test_with_its_key_a_provider_is_there_and_nothing_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        catalog = read(tmp_path, RICH, PAID_KEY="the-key-itself")
    assert list(catalog.models) == ["rich", "paid-only"]
    assert lines(caplog) == []
    assert "the-key-itself" not in repr(catalog.models), "what is read is where the key lies, not the key"


def test_a_mistake_of_a_provider_without_its_key_is_still_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidCatalog, match=r"models\.paid-only\.deployments\[0\]\.wrds"):
        read(tmp_path, RICH.replace('upstream_model = "q"', 'upstream_model = "q", wrds = true'))


def test_names_stay_taken_where_their_provider_is_left_out(tmp_path: Path) -> None:
    with pytest.raises(InvalidCatalog, match="the name 'r' is taken"):
        read(tmp_path, RICH.replace('["po"]', '["r"]'))


def test_a_catalogue_of_which_nothing_can_be_served_names_the_providers_without_keys(tmp_path: Path) -> None:
    text = """
[providers.b]
kind = "openai"
base_url = "http://b"
api_key = "env:B"
[providers.a]
kind = "openai"
base_url = "http://a"
api_key = "env:A"
[models.m]
deployments = [
  { provider = "b", upstream_model = "m", price_per_minute = "0" },
  { provider = "a", upstream_model = "m", price_per_minute = "0" },
]
"""
    with pytest.raises(InvalidCatalog) as caught:
        read(tmp_path, text)
    message = f"{tmp_path / 'catalog.toml'}: models: none can be served: there is no key or address for a, b."
    assert str(caught.value) == message
    assert [d.provider.name for d in read(tmp_path, text, A="k").find("m").deployments] == ["a"]


@pytest.mark.parametrize("text", ["sk-proj-0123456789", "env:", "secret:", "ENV:PAID_KEY", "file:/sk-proj-0123456789"])
def test_a_key_in_the_file_is_refused_and_not_repeated(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidCatalog) as caught:
        read(tmp_path, RICH.replace("env:PAID_KEY", text))
    assert str(caught.value).startswith(f"{tmp_path / 'catalog.toml'}: providers.paid.api_key: ")
    assert "'env:NAME' or 'secret:ID'" in str(caught.value)
    assert "0123456789" not in "".join(traceback.format_exception(caught.value)), "a host may log what it comes from"


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ('api_key = "env:PAID_KEY"', 'apikey = "sk-0123456789"'),
        ('api_key = "env:PAID_KEY"', 'api_key = ["sk-0123456789"]'),
        ("https://paid.example/v1", "https://user:sk-0123456789@paid.example/v1"),
        ("https://paid.example/v1", "https://paid.example/v1?key=sk-0123456789"),
        ("https://paid.example/v1", "https://paid.example:sk-0123456789/v1"),
    ],
)
def test_a_key_in_another_place_is_not_repeated(tmp_path: Path, good: str, bad: str) -> None:
    with pytest.raises(InvalidCatalog) as caught:
        read(tmp_path, RICH.replace(good, bad), PAID_KEY="k")
    assert "0123456789" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "address",
    [
        "https://user@paid.example", "https://user:password@paid.example", "https://@paid.example",
        "https://paid.example/v1?a=b", "https://paid.example/v1?", "https://paid.example#a", "https://paid.example#",
        "https://paid.example/a b", " https://paid.example", "https://paid.example ", "https://paid.example\\n",
        "https://paid\\t.example", "https://paid.example\\u0000", "https://paid.example\\u00a0",
        "https://paid.example\\\\@evil", "https://paid.example:0", "https://paid.example:65536",
        "//paid.example", "env:",
    ],
)  # fmt: skip
def test_a_base_url_is_an_address_and_nothing_else(tmp_path: Path, address: str) -> None:
    said = refusal(tmp_path, RICH.replace("https://paid.example/v1", address), PAID_KEY="k")
    what = "is no http or https address without user, query, fragment and spaces."
    assert said == f"providers.paid.base_url: {what}"


@pytest.mark.parametrize("address", ["HTTP://a", "http://127.0.0.1:8080", "https://[::1]:443/v1/", "https://a.b/@c"])
def test_a_base_url_has_a_host_a_port_and_a_path(tmp_path: Path, address: str) -> None:
    text = RICH.replace('"https://paid.example/v1"', '"env:PAID_URL"')
    assert read(tmp_path, text, PAID_KEY="k", PAID_URL=address).providers[0].base_url == address


@pytest.mark.parametrize("environ", [{}, {"PAID_URL": ""}])
def test_an_address_whose_variable_is_not_set_is_asked_for_by_its_name(tmp_path: Path, environ: dict[str, str]) -> None:
    said = refusal(tmp_path, RICH.replace("https://paid.example/v1", "env:PAID_URL"), **environ)
    assert said.startswith("providers.paid.base_url: is missing: PAID_URL is not set, and only the kind 'inference' ")


def test_an_address_that_is_none_is_told_by_its_variable(tmp_path: Path) -> None:
    text = RICH.replace("https://paid.example/v1", "env:PAID_URL")
    said = refusal(tmp_path, text, PAID_URL="https://user:0123456789@a\n")
    assert said.startswith("providers.paid.base_url: what PAID_URL holds is no http or https address")
    assert "0123456789" not in said


@pytest.mark.parametrize("wire", ["openai", "mistral", "deepgram"])
def test_only_our_own_service_is_given_references(tmp_path: Path, wire: str) -> None:
    said = refusal(tmp_path, single(f"{WIRES[wire]}\nstaged = true"))
    kind = "deepgram" if wire == "deepgram" else "openai"
    assert said == f"providers.s.staged: leave it out: it is for the kind 'inference' alone, not '{kind}'."


def test_an_address_whose_variable_is_not_set_means_this_process(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD).providers[0].base_url == ""


@pytest.mark.parametrize("name", ["large", "lmp", "whisper-large-v3"])
def test_a_model_is_found_by_each_of_its_names(tmp_path: Path, name: str) -> None:
    assert read(tmp_path, GOOD).find(name).id == "whisper-large-v3"


@pytest.mark.parametrize(("name", "upstream"), [("self/large", ["large-v3"]), ("far/whisper-large-v3", ["big"])])
def test_a_provider_before_the_model_leaves_its_deployments_alone(
    tmp_path: Path, name: str, upstream: list[str]
) -> None:
    model = read(tmp_path, GOOD).find(name)
    assert model.id == "whisper-large-v3"
    assert model.language_style == "code"
    assert [d.upstream_model for d in model.deployments] == upstream


def test_a_name_with_a_slash_of_its_own_comes_before_a_provider(tmp_path: Path) -> None:
    offer = '{ provider = "self", upstream_model = "x", price_per_minute = "1" }'
    catalog = read(tmp_path, f'{GOOD}\n[models."far/whisper-1"]\ndeployments = [{offer}]\n')
    assert catalog.find("far/whisper-1").deployments[0].upstream_model == "x"


@pytest.mark.parametrize(
    "name",
    ["", "/", "whisper", "Whisper-1", "self/whisper-1", "nobody/whisper-1", "far/", "/whisper-1", "far/far/whisper-1"],
)
def test_another_name_is_a_404(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        read(tmp_path, GOOD).find(name)
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
    assert f"'{name}'" in caught.value.message


def test_a_long_name_is_not_repeated_whole(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound) as caught:
        read(tmp_path, GOOD).find("x" * 100_000)
    assert len(caught.value.message) < 400


FAR = "models.whisper-1.deployments[0]"
MISTAKES = [
    ('kind = "inference"\nbase_url = "env', 'base_url = "env', "providers.self.kind", "is missing"),
    (
        'kind = "inference"\nbase_url = "env',
        'kind = 1\nbase_url = "env',
        "providers.self.kind",
        "must be 'inference', 'openai' or 'deepgram', not 1",
    ),
    (
        'kind = "inference"\nbase_url = "env',
        'kind = "magic"\nbase_url = "env',
        "providers.self.kind",
        "must be 'inference', 'openai' or 'deepgram', not 'magic'",
    ),
    ('"env:URL"', "8080", "providers.self.base_url", "must be a valid string"),
    ('["eu", "us"]', '"eu"', "providers.self.regions", "must be a valid list"),
    ('["eu", "us"]', "[1]", "providers.self.regions[0]", "must be a valid string"),
    ("eu_native = true", 'eu_native = "yes"', "providers.self.eu_native", "must be a valid boolean"),
    ("eu_native = true", "eu_natve = true", "providers.self.eu_natve", "is not a known key"),
    ('["large", "lmp"]', '"large"', "models.whisper-large-v3.aliases", "must be a valid list"),
    ('["large", "lmp"]', '["large", 1]', "models.whisper-large-v3.aliases[1]", "must be a valid string"),
    (
        '["large", "lmp"]',
        '["whisper-1"]',
        "models.whisper-1",
        "the name 'whisper-1' is taken by the model 'whisper-large-v3'",
    ),
    ('["large", "lmp"]', '["x", "x"]', "models.whisper-large-v3", "the name 'x' is given twice"),
    ('"code"', '"long"', "models.whisper-large-v3.language_style", "must be 'name' or 'code', not 'long'"),
    ("language_style", "languge_style", "models.whisper-large-v3.languge_style", "is not a known key"),
    ('deployments = [{ provider = "far"', 'offers = [{ provider = "far"', "models.whisper-1.deployments", "is missing"),
    (
        'deployments = [{ provider = "far", upstream_model = "one", price_per_minute = "0" }]',
        "deployments = []",
        "models.whisper-1.deployments",
        "is empty",
    ),
    (
        'deployments = [{ provider = "far", upstream_model = "one", price_per_minute = "0" }]',
        'deployments = ["far"]',
        FAR,
        "is not a table",
    ),
    (
        'deployments = [{ provider = "far", upstream_model = "one", price_per_minute = "0" }]',
        'deployments = "far"',
        "models.whisper-1.deployments",
        "must be a valid list",
    ),
    ('[{ provider = "far"', '[{ provider = "fra"', f"{FAR}.provider", "there is no provider 'fra'"),
    ('[{ provider = "far", ', "[{ ", f"{FAR}.provider", "is missing"),
    ('upstream_model = "one", ', "", f"{FAR}.upstream_model", "is missing"),
    ('upstream_model = "one"', "upstream_model = 1", f"{FAR}.upstream_model", "must be a valid string"),
    (', price_per_minute = "0"', "", f"{FAR}.price_per_minute", "is missing"),
    ('"0"', "0", f"{FAR}.price_per_minute", "must be text: put 0 in quotes"),
    ('"0"', "0.006", f"{FAR}.price_per_minute", "must be text: put 0.006 in quotes"),
    ('"0"', '"cheap"', f"{FAR}.price_per_minute", "must be a valid decimal, not 'cheap'"),
    ('"0"', '""', f"{FAR}.price_per_minute", "must be a valid decimal, not ''"),
    ('"0"', '"-1"', f"{FAR}.price_per_minute", "must be greater than or equal to 0, not '-1'"),
    ('"0"', '"0.0000001"', f"{FAR}.price_per_minute", "must have no more than 6 decimal places, not '0.0000001'"),
    ('"0"', '"NaN"', f"{FAR}.price_per_minute", "must be a finite number, not 'NaN'"),
    ('"0"', '"inf"', f"{FAR}.price_per_minute", "must be a finite number, not 'inf'"),
    ('"0"', '"1e999999"', f"{FAR}.price_per_minute", "must be less than or equal to 1000, not '1e999999'"),
    ('"0" }', '"0", wrds = true }', f"{FAR}.wrds", "is not a known key"),
    ('"0" }', '"0", words = 1 }', f"{FAR}.words", "must be a valid boolean"),
    ("[providers.self]", "[provider.self]", "provider", "is not a known key"),
    ("[models.whisper-1]", "[model.whisper-1]", "model", "is not a known key"),
    ("\n[providers.self]", "\nversion = 1\n[providers.self]", "version", "is not a known key"),
]
PAID, RICHEST = "providers.paid", "models.rich.deployments[0]"
BYTES, SECONDS, SPEED = "max_bytes = 26214400", "max_seconds = 1400", "speed = 0.05"
RICH_MISTAKES = [
    ('"env:PAID_KEY"', "1", f"{PAID}.api_key", "must be a valid string"),
    ('"mistral"', '"whisper"', f"{PAID}.flavor", "must be '' or 'mistral', not 'whisper'"),
    ('"mistral"', "true", f"{PAID}.flavor", "must be '' or 'mistral', not True"),
    (
        'api_key = "secret:voxgate/stored"',
        'flavor = "mistral"',
        "providers.stored.flavor",
        "'mistral' is for the kind 'openai' alone, not 'deepgram'",  # there is no such adapter
    ),
    ("staged = true", 'staged = "bucket"', "providers.near.staged", "must be a valid boolean"),
    ('base_url = "https://paid.example/v1"', "", f"{PAID}.base_url", "is missing"),
    ('"https://paid.example/v1"', '"env:PAID_URL"', f"{PAID}.base_url", "is missing: PAID_URL is not set"),
    ('"https://paid.example/v1"', '"ftp://paid.example"', f"{PAID}.base_url", "is no http or https address"),
    ('"https://paid.example/v1"', '"paid.example/v1"', f"{PAID}.base_url", "is no http or https address"),
    ('"https://paid.example/v1"', '"https:///v1"', f"{PAID}.base_url", "is no http or https address"),
    ('"https://paid.example/v1"', '"https://["', f"{PAID}.base_url", "is no http or https address"),
    ('"https://paid.example/v1"', '"https://paid.example:x/v1"', f"{PAID}.base_url", "is no http or https address"),
    ('"0.0001"', '"a tenth"', f"{RICHEST}.hit_price_per_minute", "must be a valid decimal, not 'a tenth'"),
    ('"0.0001"', "0.0001", f"{RICHEST}.hit_price_per_minute", "must be text: put 0.0001 in quotes"),
    ('"0.0001"', '""', f"{RICHEST}.hit_price_per_minute", "must be a valid decimal, not ''"),
    ('"9.5"', '"9.55"', f"{RICHEST}.minimum_seconds", "must have no more than 1 decimal place, not '9.55'"),
    ('"9.5"', '"-1"', f"{RICHEST}.minimum_seconds", "must be greater than or equal to 0, not '-1'"),
    ('"9.5"', "10", f"{RICHEST}.minimum_seconds", "must be text: put 10 in quotes"),
    ("quantized = true", 'quantized = "int8"', f"{RICHEST}.quantized", "must be a valid boolean"),
    ("segments = false", 'segments = "no"', f"{RICHEST}.segments", "must be a valid boolean"),
    ('"json"', '"srt"', f"{RICHEST}.response_format", "must be 'verbose_json', 'json' or 'diarized_json', not 'srt'"),
    ('"json"', "1", f"{RICHEST}.response_format", "or 'diarized_json', not 1"),
    (BYTES, 'max_bytes = "25 MB"', f"{RICHEST}.max_bytes", "must be a valid integer"),
    (BYTES, "max_bytes = true", f"{RICHEST}.max_bytes", "must be a valid integer"),
    (BYTES, "max_bytes = -1", f"{RICHEST}.max_bytes", "must be greater than or equal to 1, not -1"),
    (SECONDS, 'max_seconds = "1400"', f"{RICHEST}.max_seconds", "must be a valid integer"),
    (SECONDS, "max_seconds = -1", f"{RICHEST}.max_seconds", "must be greater than or equal to 1, not -1"),
    ('["flac", "ogg"]', '"flac"', f"{RICHEST}.containers", "must be a valid list"),
    ('["flac", "ogg"]', "[1]", f"{RICHEST}.containers[0]", "must be 'wav', 'flac'"),
    ('"flac", "ogg"', '"flac", "opus"', f"{RICHEST}.containers[1]", "'webm' or 'mpeg', not 'opus'"),
    ('["German", "en-US"]', '"German"', f"{RICHEST}.languages", "must be a valid list"),
    ('"German"', '"Klingon"', f"{RICHEST}.languages[0]", "'Klingon' is no language"),
    (SPEED, 'speed = "fast"', f"{RICHEST}.speed", "must be a valid number"),
    (SPEED, "speed = -0.1", f"{RICHEST}.speed", "must be greater than 0, not -0.1"),
    (SPEED, "speed = nan", f"{RICHEST}.speed", "must be a finite number, not nan"),
    (SPEED, "speed = inf", f"{RICHEST}.speed", "must be a finite number, not inf"),
]
ALL_MISTAKES = [(GOOD, *mistake) for mistake in MISTAKES] + [(RICH, *mistake) for mistake in RICH_MISTAKES]


@pytest.mark.parametrize(
    ("text", "good", "bad", "key", "reason"), ALL_MISTAKES, ids=[f"{m[3]}: {m[4] or m[2]}" for m in ALL_MISTAKES]
)
def test_a_mistake_is_named_by_file_key_and_reason(
    tmp_path: Path, text: str, good: str, bad: str, key: str, reason: str
) -> None:
    assert text.count(good) == 1
    with pytest.raises(InvalidCatalog) as caught:
        read(tmp_path, text.replace(good, bad))
    assert str(caught.value).startswith(f"{tmp_path / 'catalog.toml'}: {key}: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("", "providers: is missing"),
        ("[providers]\n", "models: is missing"),
        ("[providers]\n[models]\n", "models: is empty"),
        ("providers = 1\nmodels = 2\n", "providers: is not a table"),
        ("[models]\n[providers]\nself = 1\n", "providers.self: is not a table"),
        ("[models]\nwhisper-1 = 1\n[providers]\n", "models.whisper-1: is not a table"),
        ("= nonsense", "is not TOML"),
    ],
)
def test_a_file_of_another_shape_is_refused(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(InvalidCatalog) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'catalog.toml'}: {key}")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "catalog.toml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidCatalog, match="is not TOML"):
        load(str(file), {})


@pytest.mark.parametrize("name", ["nowhere.toml", "nowhere", "/nowhere/catalog.toml", "../nowhere", "."])
def test_a_file_that_cannot_be_read_is_refused(name: str) -> None:
    with pytest.raises(InvalidCatalog, match=r"cannot be read"):
        load(name, {})


WELL_KNOWN = [
    "whisper-1",
    "whisper-large-v3",
    "lmp-stt-20241013",
    "deepgram-nova-3",
    "gpt-4o-transcribe",
    "gpt-transcribe",
]


@pytest.mark.parametrize("shipped", ["", "local"])
@pytest.mark.parametrize("name", WELL_KNOWN)
def test_the_local_catalogue_serves_the_well_known_names_here(shipped: str, name: str) -> None:
    catalog = load(shipped, {})
    assert [entry.name for entry in catalog.providers] == ["embedded"]
    assert catalog.find(name).deployments[0].provider.base_url == ""
    assert catalog.find(f"embedded/{name}").id == catalog.find(name).id


def test_the_local_catalogue_can_be_served_by_another_machine() -> None:
    assert load("", {"VOXGATE_INFERENCE_URL": "http://gpu"}).providers[0].base_url == "http://gpu"


# --- the catalogue for deployments ---------------------------------------------------------------

KEYS = {
    "OPENAI_API_KEY": "k1",
    "GROQ_API_KEY": "k2",
    "OVH_AI_ENDPOINTS_ACCESS_TOKEN": "k3",
    "SCW_SECRET_KEY": "k4",
    "MISTRAL_API_KEY": "k5",
    "DEEPGRAM_API_KEY": "k6",
}
# Micro-dollars a minute, by model, provider and what that calls it.
LIST_PRICES = {
    ("whisper-1", "openai", "whisper-1"): 6000,
    ("gpt-4o-transcribe", "openai", "gpt-4o-transcribe"): 6000,
    ("gpt-4o-mini-transcribe", "openai", "gpt-4o-mini-transcribe"): 3000,
    ("gpt-transcribe", "openai", "gpt-transcribe"): 4500,
    ("whisper-large-v3", "groq", "whisper-large-v3"): 1850,
    ("whisper-large-v3-turbo", "groq", "whisper-large-v3-turbo"): 670,
    ("lmp-stt-20241013", "groq", "whisper-large-v3"): 1850,
    ("deepgram-nova-3", "deepgram", "nova-3"): 4300,
    ("voxtral-mini", "mistral", "voxtral-mini-latest"): 3000,
}


def test_the_default_catalogue_has_every_model_and_every_provider() -> None:
    catalog = load("default", KEYS)
    assert set(catalog.models) == {
        "embedded", "whisper-1", "whisper-large-v3", "whisper-large-v3-turbo", "gpt-4o-transcribe",
        "gpt-4o-mini-transcribe", "gpt-transcribe", "gpt-4o-transcribe-diarize", "deepgram-nova-3", "voxtral-mini",
        "lmp-stt-20241013",
    }  # fmt: skip
    assert catalog.find("nova-3").id == "deepgram-nova-3"
    assert {p.name for p in catalog.providers} == {
        "self", "openai", "groq", "ovh", "scaleway", "mistral", "deepgram",
    }  # fmt: skip
    assert {p.name for p in catalog.providers if p.eu_native} == {"self", "ovh", "scaleway", "mistral"}
    assert {p.name for p in catalog.providers if not p.api_key} == {"self"}


@pytest.mark.parametrize(("model", "provider", "upstream"), LIST_PRICES)
def test_the_default_catalogue_has_the_list_prices(model: str, provider: str, upstream: str) -> None:
    (found,) = load("default", KEYS).find(f"{provider}/{model}").deployments
    assert (found.upstream_model, found.price) == (upstream, LIST_PRICES[model, provider, upstream])
    assert found.hit_price == -(-found.price // 10)


def test_no_other_price_of_the_default_catalogue_undercuts_a_list_price_by_mistake() -> None:
    priced = {
        (d.provider.name, d.upstream_model, d.price)
        for model in load("default", KEYS).models.values()
        for d in model.deployments
        if d.provider.name in ("openai", "groq", "deepgram", "mistral")
    }
    listed = {(provider, upstream, price) for (_, provider, upstream), price in LIST_PRICES.items()}
    assert priced - listed == {("openai", "gpt-4o-transcribe-diarize", 6000)}


def test_without_any_key_the_default_catalogue_serves_what_this_process_can(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        catalog = load("default", {})
    assert lines(caplog) == [
        f"the provider '{name}' is left out: {key} is not set"
        for name, key in zip(["openai", "groq", "ovh", "scaleway", "mistral", "deepgram"], KEYS, strict=True)
    ]
    assert [p.name for p in catalog.providers] == ["self"]
    assert catalog.find("embedded").deployments[0].provider.base_url == ""
    assert set(catalog.models) == {
        "embedded", "whisper-1", "whisper-large-v3", "whisper-large-v3-turbo", "lmp-stt-20241013",
    }  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_one_key_brings_its_provider_alone(key: str) -> None:
    assert len(load("default", {key: "k"}).providers) == 2


def test_what_the_default_catalogues_deployments_can() -> None:
    catalog = load("default", KEYS)

    def having(feature: Feature) -> set[str]:
        deployments = [d for model in catalog.models.values() for d in model.deployments]
        return {d.id for d in deployments if d.features and feature in d.features}

    whispers = {"openai/whisper-1", "groq/whisper-large-v3"}
    assert having(Feature.WORDS) == whispers | {
        "groq/whisper-large-v3-turbo", "ovh/whisper-large-v3", "ovh/whisper-large-v3-turbo", "deepgram/nova-3",
    }  # fmt: skip
    assert having(Feature.TRANSLATION) == whispers
    assert having(Feature.LOGPROBS) == {"openai/gpt-4o-transcribe", "openai/gpt-4o-mini-transcribe"}
    assert having(Feature.DIARIZATION) == {
        "openai/gpt-4o-transcribe-diarize", "deepgram/nova-3", "mistral/voxtral-mini-latest",
    }  # fmt: skip


@pytest.mark.parametrize("file", ["default", str(ROOT / "docs" / "catalog-eu.toml")])
def test_every_deployment_takes_a_file_that_audio_can_be_made_into(file: str) -> None:
    made = {container.name for container in TARGETS}
    for model in load(file, KEYS).models.values():
        for deployment in model.deployments:
            assert deployment.containers is None or deployment.containers & made


# --- the example for an operator in the EU -------------------------------------------------------

EU = str(ROOT / "docs" / "catalog-eu.toml")


@pytest.mark.parametrize("name", ["whisper-large-v3", "whisper-1", "lmp-stt-20241013"])
def test_the_eu_example_serves_the_well_known_names_by_eu_providers_alone(name: str) -> None:
    catalog = load(EU, KEYS)
    assert [(d.provider.name, d.price) for d in catalog.find(name).deployments] == [
        ("ovh", 3000), ("scaleway", 3000), ("self", 4000),
    ]  # fmt: skip
    assert all(p.eu_native and p.regions == ("eu",) for p in catalog.providers)


def test_the_eu_example_works_offline_too(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        catalog = load(EU, {})
    assert [p.name for p in catalog.providers] == ["self"]
    assert len(lines(caplog)) == 2
