"""The catalogue: what it says, and that every mistake in it is named by file, key and reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from voxgate.catalog import Catalog, load
from voxgate.errors import InvalidCatalog, ModelNotFound

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


def read(directory: Path, text: str, **environ: str) -> Catalog:
    file = directory / "catalog.toml"
    file.write_text(text, encoding="utf-8")
    return load(str(file), environ)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    catalog = read(tmp_path, GOOD, URL="http://gpu:8080")
    assert list(catalog.models) == ["whisper-large-v3", "whisper-1"]
    assert [p.name for p in catalog.providers] == ["self", "far"]
    near, far = catalog.providers
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
    ('kind = "inference"\nbase_url = "env', 'kind = 1\nbase_url = "env', "providers.self.kind", "is not a str"),
    (
        'kind = "inference"\nbase_url = "env',
        'kind = "magic"\nbase_url = "env',
        "providers.self.kind",
        "'magic' is none of",
    ),
    ('"env:URL"', "8080", "providers.self.base_url", "is not a str"),
    ('["eu", "us"]', '"eu"', "providers.self.regions", "is not a list"),
    ('["eu", "us"]', "[1]", "providers.self.regions", "is not a list of strings"),
    ("eu_native = true", 'eu_native = "yes"', "providers.self.eu_native", "is not a bool"),
    ("eu_native = true", "eu_natve = true", "providers.self.eu_natve", "is not a known key"),
    ('["large", "lmp"]', '"large"', "models.whisper-large-v3.aliases", "is not a list"),
    ('["large", "lmp"]', '["large", 1]', "models.whisper-large-v3.aliases", "is not a list of strings"),
    ('["large", "lmp"]', '["whisper-1"]', "models.whisper-1", "the name 'whisper-1' is taken"),
    ('["large", "lmp"]', '["x", "x"]', "models.whisper-large-v3", "the name 'x' is taken"),
    ('"code"', '"long"', "models.whisper-large-v3.language_style", "'long' is neither 'name' nor 'code'"),
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
        "is not a list",
    ),
    ('[{ provider = "far"', '[{ provider = "fra"', f"{FAR}.provider", "there is no provider 'fra'"),
    ('[{ provider = "far", ', "[{ ", f"{FAR}.provider", "is missing"),
    ('upstream_model = "one", ', "", f"{FAR}.upstream_model", "is missing"),
    ('upstream_model = "one"', "upstream_model = 1", f"{FAR}.upstream_model", "is not a str"),
    (', price_per_minute = "0"', "", f"{FAR}.price_per_minute", "is missing"),
    ('"0"', "0", f"{FAR}.price_per_minute", "is not a str"),
    ('"0"', "0.006", f"{FAR}.price_per_minute", "is not a str"),
    ('"0"', '"cheap"', f"{FAR}.price_per_minute", "'cheap' is no amount of whole micro-dollars"),
    ('"0"', '""', f"{FAR}.price_per_minute", "'' is no amount of whole micro-dollars"),
    ('"0"', '"-1"', f"{FAR}.price_per_minute", "'-1' is no amount of whole micro-dollars"),
    ('"0"', '"0.0000001"', f"{FAR}.price_per_minute", "whole micro-dollars"),
    ('"0"', '"NaN"', f"{FAR}.price_per_minute", "whole micro-dollars"),
    ('"0"', '"inf"', f"{FAR}.price_per_minute", "whole micro-dollars"),
    ('"0"', '"1e999999"', f"{FAR}.price_per_minute", "no amount of whole micro-dollars"),
    ('"0" }', '"0", words = true }', f"{FAR}.words", "is not a known key"),
    ("[providers.self]", "[provider.self]", "provider", "is not a known key"),
    ("[models.whisper-1]", "[model.whisper-1]", "model", "is not a known key"),
    ("\n[providers.self]", "\nversion = 1\n[providers.self]", "version", "is not a known key"),
]


@pytest.mark.parametrize(
    ("good", "bad", "key", "reason"), MISTAKES, ids=[f"{key}: {reason}" for _, _, key, reason in MISTAKES]
)
def test_a_mistake_is_named_by_file_key_and_reason(tmp_path: Path, good: str, bad: str, key: str, reason: str) -> None:
    assert GOOD.count(good) == 1
    with pytest.raises(InvalidCatalog) as caught:
        read(tmp_path, GOOD.replace(good, bad))
    assert str(caught.value).startswith(f"{tmp_path / 'catalog.toml'}: {key}: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("", "providers: is missing"),
        ("[providers]\n", "models: is missing"),
        ("[providers]\n[models]\n", "models: there is none"),
        ("providers = 1\nmodels = 2\n", "providers: is not a dict"),
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
def test_the_shipped_catalogue_serves_the_well_known_names_here(shipped: str, name: str) -> None:
    catalog = load(shipped, {})
    assert [entry.name for entry in catalog.providers] == ["embedded"]
    assert catalog.find(name).deployments[0].provider.base_url == ""
    assert catalog.find(f"embedded/{name}").id == catalog.find(name).id


def test_the_shipped_catalogue_can_be_served_by_another_machine() -> None:
    assert load("", {"VOXGATE_INFERENCE_URL": "http://gpu"}).providers[0].base_url == "http://gpu"
