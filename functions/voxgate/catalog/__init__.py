"""Models, their deployments and the providers that run them: TOML to typed, checked values."""

from __future__ import annotations

import logging
import math
import re
import tomllib
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from voxgate import languages
from voxgate.errors import InvalidCatalog, ModelNotFound
from voxgate.model import Feature

logger = logging.getLogger(__name__)

LanguageStyle = Literal["name", "code"]
# What a deployment has unless its entry says otherwise, by its provider's kind.
_USUAL = {
    "inference": frozenset(Feature) - {Feature.LOGPROBS, Feature.DIARIZATION, Feature.CHUNKING, Feature.LANGUAGES},
    "openai": frozenset({Feature.SEGMENTS, Feature.PROMPT, Feature.TEMPERATURE, Feature.LANGUAGE}),
    "deepgram": frozenset({Feature.SEGMENTS, Feature.WORDS, Feature.LANGUAGE, Feature.LIVE}),
}
# What only some have, each by its flavor or else its kind: the others' adapters have nothing for it.
_ONLY = {
    "translation": ("inference", "openai"),
    "logprobs": ("openai",),
    "streaming": ("inference", "openai", "mistral"),
    "live": ("inference", "deepgram"),
    "diarized_json": ("openai",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderEntry:
    """`base_url` is resolved already; empty means the engine of this process. `api_key` is a reference,
    `env:NAME` or `secret:ID`, never a key. `flavor` is what a kind's copy made of its wire format;
    `staged` ones are given a reference to the audio where there is a bucket."""

    name: str
    kind: str
    base_url: str = ""
    api_key: str = ""
    flavor: str = ""
    staged: bool = False
    regions: tuple[str, ...] = ()
    eu_native: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One provider's offer of a model. `price` is in micro-dollars a minute of audio, `minimum` the
    tenths of a second that a request is billed at least; `hit_price` is that of an answer out of the
    cache, and `upstream_price` what the provider charges, for the operator's own books. `features` and
    `languages` are None where the engine itself is asked. `speed` is the seconds that it takes for one
    of audio, until that is measured."""

    provider: ProviderEntry
    upstream_model: str
    price: int
    hit_price: int = 0
    upstream_price: int | None = None
    minimum: int = 0
    quantized: bool = False
    features: frozenset[Feature] | None = None
    languages: frozenset[str] | None = None
    response_format: str = "verbose_json"
    max_bytes: int | None = None
    max_seconds: float | None = None
    containers: frozenset[str] | None = None
    speed: float | None = None

    @property
    def id(self) -> str:
        return f"{self.provider.name}/{self.upstream_model}"

    def billable(self, duration: float) -> int:
        """Tenths of a second."""
        return max(started_tenths(duration), self.minimum)

    def cost(self, duration: float, *, hit: bool = False) -> int:
        """Micro-dollars, rounded up to a whole one."""
        return -(-(self.hit_price if hit else self.price) * self.billable(duration) // 600)

    def upstream_cost(self, duration: float) -> int:
        """Micro-dollars, as far as it is known."""
        return -(-(self.upstream_price or 0) * started_tenths(duration) // 600)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    id: str
    deployments: tuple[Deployment, ...]
    aliases: tuple[str, ...] = ()
    language_style: LanguageStyle = "name"

    def of(self, providers: Container[str]) -> Model | None:
        """The model with those providers' deployments alone; None where there are none."""
        left = tuple(d for d in self.deployments if d.provider.name in providers)
        return replace(self, deployments=left) if left else None


def started_tenths(duration: float) -> int:
    """Of seconds. What a float adds in its last digits is not counted."""
    return math.ceil(round(duration * 10, 4))


class Catalog:
    """What can be asked for, by any of its names."""

    def __init__(self, models: list[Model]) -> None:
        self.models = {model.id: model for model in models}
        self._by_name = {name: model for model in models for name in (model.id, *model.aliases)}

    @property
    def providers(self) -> list[ProviderEntry]:
        entries = {d.provider.name: d.provider for model in self.models.values() for d in model.deployments}
        return list(entries.values())

    @property
    def offers(self) -> dict[str, dict[str, Deployment]]:
        """Deployments by their id, each by the models that it serves, which have their own prices for it."""
        offers: dict[str, dict[str, Deployment]] = {}
        for model in self.models.values():
            for deployment in model.deployments:
                offers.setdefault(deployment.id, {})[model.id] = deployment
        return offers

    def find(self, name: str) -> Model:
        """The model of that id or alias; `provider/model` is that model with that provider's
        deployments alone. Raises `ModelNotFound`."""
        if name in self._by_name:
            return self._by_name[name]
        provider, _, rest = name.partition("/")
        model = self._by_name.get(rest)
        if model and (chosen := model.of({provider})):
            return chosen
        raise ModelNotFound(f"The model '{name[:200]}' does not exist; GET /v1/models lists them.", param="model")


def load(name: str, environ: Mapping[str, str], *, embedded: bool = True) -> Catalog:
    """Read a catalogue: a file, or one that ships with the package by its name without `.toml`. Where no
    engine is `embedded` in this process, a provider that has no address is left out.
    Raises `InvalidCatalog` with the file, the key and what is wrong."""
    path = Path(name)
    here = Path(__file__).parent
    shipped = here / f"{name or 'local'}.toml"
    if shipped.parent == here and shipped.exists():
        path = shipped
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidCatalog(f"{path}: cannot be read: {error.strerror}.") from error
    except ValueError as error:  # of TOML and of UTF-8
        raise InvalidCatalog(f"{path}: is not TOML: {error}.") from error
    try:
        return _catalog(_Document.model_validate(document), environ, embedded=embedded)
    except (ValidationError, _Mistake) as error:
        raise InvalidCatalog(f"{path}: {_said(error)}.") from error


class _Mistake(ValueError):
    """What is wrong, and the parts of its key where pydantic does not know them."""


_SAID = {"missing": "is missing", "extra_forbidden": "is not a known key", "too_short": "is empty"}
_SAID |= dict.fromkeys(("dict_type", "model_type"), "is not a table")


def _said(error: ValidationError | _Mistake) -> str:
    """Where the first mistake is, and what. A value of another type is not repeated: it may be a key."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        at = [part for part in first["loc"] if part != "[key]"]
        what = re.sub("^(Decimal i|I)nput should", "must", first["msg"].removeprefix("Value error, "))
        if not first["type"].endswith(("_type", "value_error")):
            what += f", not {first['input']!r}"
        what = _SAID.get(first["type"], what)
    else:
        what, *at = error.args
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in at)[1:] + f": {what}"


def _is(test: Callable[[Any], object], what: str) -> Callable[[Any], Any]:
    """A validator that refuses what fails the test; `{}` stands for it in the reason."""

    def read(value: Any) -> Any:
        if not test(value):
            raise _Mistake(what.format(repr(value)))
        return value

    return read


def _is_address(text: str) -> bool:
    try:
        url = urlsplit(text)
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        return False
    return usable and text.isprintable() and "@" not in url.netloc and not set(" ?#\\") & set(text)


_named = _is(re.compile("[A-Za-z0-9._-]+").fullmatch, "the name {} must be of ASCII letters, digits, '.', '_' and '-'")
_printable = _is(re.compile("[!-~]([ -~]*[!-~])?").fullmatch, "{} must be printable ASCII with no space at its ends")
_reference = _is(  # the value is not repeated: it may be the key
    re.compile("((env|secret):.+)?").fullmatch, "must be 'env:NAME' or 'secret:ID': keys are not kept in this file"
)
_quoted = BeforeValidator(_is(lambda value: isinstance(value, str), "must be text: put {} in quotes"))
_made = _is(
    lambda names: not names or {"flac", "ogg"} & set(names), "add flac or ogg: other audio is converted to them"
)
_feature = _is(set(Feature).__contains__, "is not a known key")
_spoken = _is(languages.parse, "{} is no language: give its English name or its code")

_Name = Annotated[str, AfterValidator(_printable)]
_Language = Annotated[str, AfterValidator(_spoken), AfterValidator(languages.parse)]
_Price = Annotated[Decimal, Field(strict=False, ge=0, le=1000, decimal_places=6), _quoted]
_Seconds = Annotated[Decimal, Field(strict=False, ge=0, le=86_400, decimal_places=1), _quoted]
_Count = Annotated[int, Field(ge=1)]
_Container = Literal["wav", "flac", "mp3", "aac", "mp4", "ogg", "webm", "mpeg"]


class _Table(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True, defer_build=True)


class _Provider(_Table):
    kind: Literal["inference", "openai", "deepgram"]
    base_url: str = ""
    api_key: Annotated[str, AfterValidator(_reference)] = ""
    flavor: Literal["", "mistral"] = ""
    staged: bool = False
    regions: list[str] = []
    eu_native: bool = False


class _Deployment(_Table, extra="allow"):
    """Its other keys are features."""

    __pydantic_extra__: dict[Annotated[str, AfterValidator(_feature)], bool] = Field(init=False)
    provider: str
    upstream_model: _Name
    price_per_minute: _Price
    hit_price_per_minute: _Price | None = None
    upstream_price_per_minute: _Price | None = None
    minimum_seconds: _Seconds = Decimal(0)
    quantized: bool = False
    languages: list[_Language] = []
    response_format: Literal["verbose_json", "json", "diarized_json"] = "verbose_json"
    max_bytes: _Count | None = None
    max_seconds: _Count | None = None
    containers: Annotated[list[_Container], AfterValidator(_made)] = []
    speed: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class _Model(_Table):
    aliases: list[_Name] = []
    language_style: LanguageStyle = "name"
    deployments: list[_Deployment] = Field(min_length=1)


class _Document(_Table):
    providers: dict[Annotated[str, AfterValidator(_named)], _Provider]
    models: dict[_Name, _Model] = Field(min_length=1)


def _catalog(document: _Document, environ: Mapping[str, str], *, embedded: bool) -> Catalog:
    providers = {name: _provider(name, entry, environ) for name, entry in document.providers.items()}
    models = [_model(name, entry, providers) for name, entry in document.models.items()]
    taken: dict[str, str] = {}
    for model in models:
        for name in (model.id, *model.aliases):
            if name in taken:
                how = "given twice" if taken[name] == model.id else f"taken by the model '{taken[name]}'"
                raise _Mistake(f"the name '{name}' is {how}", "models", model.id)
            taken[name] = model.id
    without = set()
    for name, provider in providers.items():
        if provider.api_key.startswith("env:") and not environ.get(provider.api_key[4:], "").strip():
            logger.warning("the provider '%s' is left out: %s is not set", name, provider.api_key[4:])
            without.add(name)
        elif not provider.base_url and not embedded:
            logger.warning("the provider '%s' is left out: it has no address, and there is no engine here", name)
            without.add(name)
    usable = [left for model in models if (left := model.of(providers.keys() - without))]
    if not usable:
        raise _Mistake(f"none can be served: there is no key or address for {', '.join(sorted(without))}", "models")
    return Catalog(usable)


def _provider(name: str, entry: _Provider, environ: Mapping[str, str]) -> ProviderEntry:
    at = ("providers", name)
    variable = entry.base_url[4:] if entry.base_url.startswith("env:") else ""
    address = environ.get(variable, "") if variable else entry.base_url
    if not address and entry.kind != "inference":
        unset = f"{variable} is not set, and " if variable else ""
        raise _Mistake(f"is missing: {unset}only the kind 'inference' can be this process's engine", *at, "base_url")
    if address and not _is_address(address):  # it is not repeated: there may be a password in it
        held = f"what {variable} holds " if variable else ""
        raise _Mistake(f"{held}is no http or https address without user, query, fragment and spaces", *at, "base_url")
    if entry.flavor and entry.kind != "openai":
        raise _Mistake(f"'{entry.flavor}' is for the kind 'openai' alone, not '{entry.kind}'", *at, "flavor")
    if entry.staged and entry.kind != "inference":
        raise _Mistake(f"leave it out: it is for the kind 'inference' alone, not '{entry.kind}'", *at, "staged")
    resolved = {"base_url": address, "regions": tuple(entry.regions)}
    return ProviderEntry(name=name, **entry.model_dump() | resolved)


def _model(name: str, entry: _Model, providers: Mapping[str, ProviderEntry]) -> Model:
    offers: dict[str, Deployment] = {}
    for index, offer in enumerate(entry.deployments):
        at = ("models", name, "deployments", index)
        if offer.provider not in providers:
            raise _Mistake(f"there is no provider '{offer.provider}'", *at, "provider")
        deployment = _deployment(offer, providers[offer.provider], at)
        if deployment.id in offers:
            raise _Mistake(f"'{deployment.id}' is given twice", *at, "upstream_model")
        offers[deployment.id] = deployment
    aliases, style = tuple(entry.aliases), entry.language_style
    return Model(id=name, deployments=tuple(offers.values()), aliases=aliases, language_style=style)


def _deployment(entry: _Deployment, provider: ProviderEntry, at: tuple[str | int, ...]) -> Deployment:
    said: dict[str, bool] = entry.model_extra or {}
    wire = provider.flavor or provider.kind
    for key, thing in (("response_format", entry.response_format), *((key, key) for key, has in said.items() if has)):
        if wire not in _ONLY.get(thing, (wire,)):
            raise _Mistake(f"leave it out: '{thing}' is for {', '.join(_ONLY[thing])} alone, not {wire}", *at, key)
    price, hit, upstream = entry.price_per_minute, entry.hit_price_per_minute, entry.upstream_price_per_minute
    if hit is not None and hit > price:
        raise _Mistake(f"must be at most price_per_minute, {price}, not {hit}", *at, "hit_price_per_minute")
    charged = int(price * 1_000_000)
    usual = _USUAL[provider.kind]
    return Deployment(
        provider=provider,
        upstream_model=entry.upstream_model,
        price=charged,
        hit_price=-(-charged // 10) if hit is None else int(hit * 1_000_000),
        upstream_price=None if upstream is None else int(upstream * 1_000_000),
        minimum=int(entry.minimum_seconds * 10),
        quantized=entry.quantized,
        features=frozenset(f for f in Feature if said.get(f, f in usual)) if provider.base_url else None,
        languages=frozenset(entry.languages) or None,
        response_format=entry.response_format,
        max_bytes=entry.max_bytes,
        max_seconds=entry.max_seconds,
        containers=frozenset(entry.containers) or None,
        speed=entry.speed,
    )
