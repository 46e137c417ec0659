"""Models, their deployments and the providers that run them: TOML to typed, checked values."""

from __future__ import annotations

import logging
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal, DecimalException
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from voxgate import languages
from voxgate.errors import InvalidCatalog, ModelNotFound
from voxgate.model import Feature

logger = logging.getLogger(__name__)

LanguageStyle = Literal["name", "code"]
_T = TypeVar("_T")
_KINDS = ("inference", "openai", "deepgram")
_FLAVORS = ("", "mistral")
_FORMATS = ("verbose_json", "json", "diarized_json")
_CONTAINERS = ("wav", "flac", "mp3", "aac", "mp4", "ogg", "webm", "mpeg")
# What a deployment has unless its entry says otherwise, by its provider's kind.
_USUAL = {
    "inference": frozenset(Feature)
    - {Feature.LOGPROBS, Feature.DIARIZATION, Feature.CHUNKING, Feature.LANGUAGES, Feature.STREAMING},
    "openai": frozenset({Feature.SEGMENTS, Feature.PROMPT, Feature.TEMPERATURE, Feature.LANGUAGE}),
    "deepgram": frozenset({Feature.SEGMENTS, Feature.WORDS, Feature.LANGUAGE}),
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

    def without(self, providers: set[str]) -> Model | None:
        """The model less those providers' deployments; None where nothing is left."""
        left = tuple(d for d in self.deployments if d.provider.name not in providers)
        return replace(self, deployments=left) if left else None


def _is_address(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:
        return False


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
        if rest in self._by_name:
            model = self._by_name[rest]
            chosen = tuple(d for d in model.deployments if d.provider.name == provider)
            if chosen:
                return replace(model, deployments=chosen)
        raise ModelNotFound(f"The model '{name[:200]}' does not exist; GET /v1/models lists them.", param="model")


def load(name: str, environ: Mapping[str, str]) -> Catalog:
    """Read a catalogue: a file, or one that ships with the package by its name without `.toml`.
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
    return _Reader(str(path), environ).catalog(document)


class _Reader:
    """Takes each value out of the document by its key, so that what is left over is a mistake."""

    def __init__(self, file: str, environ: Mapping[str, str]) -> None:
        self._file = file
        self._environ = environ

    def catalog(self, document: dict[str, Any]) -> Catalog:
        tables = self._take("", document, "providers", dict), self._take("", document, "models", dict)
        self._nothing_left("", document)
        providers = {name: self._provider(f"providers.{name}", name, entry) for name, entry in tables[0].items()}
        models = [self._model(f"models.{name}", name, entry, providers) for name, entry in tables[1].items()]
        without = {name for name, provider in providers.items() if self._lacks_key(provider)}
        names: set[str] = set()
        for model in models:
            for name in (model.id, *model.aliases):
                if name in names:
                    raise self._wrong(f"models.{model.id}", f"the name '{name}' is taken by another model")
                names.add(name)
        if not models:
            raise self._wrong("models", "there is none")
        usable = [left for model in models if (left := model.without(without))]
        if not usable:
            raise self._wrong("models", f"none can be served: there is no API key for {', '.join(sorted(without))}")
        return Catalog(usable)

    def _lacks_key(self, provider: ProviderEntry) -> bool:
        if not provider.api_key.startswith("env:") or self._environ.get(provider.api_key[4:], "").strip():
            return False
        logger.warning("the provider '%s' is left out: %s is not set", provider.name, provider.api_key[4:])
        return True

    def _provider(self, key: str, name: str, entry: Any) -> ProviderEntry:
        entry = self._table(key, entry)
        provider = ProviderEntry(
            name=name,
            kind=self._take(key, entry, "kind", str),
            base_url=self._resolved(self._take(key, entry, "base_url", str, "")),
            api_key=self._reference(f"{key}.api_key", self._take(key, entry, "api_key", str, "")),
            flavor=self._one_of(f"{key}.flavor", self._take(key, entry, "flavor", str, ""), _FLAVORS),
            staged=self._take(key, entry, "staged", bool, False),
            regions=tuple(self._strings(key, entry, "regions")),
            eu_native=self._take(key, entry, "eu_native", bool, False),
        )
        self._one_of(f"{key}.kind", provider.kind, _KINDS)
        self._nothing_left(key, entry)
        if provider.flavor and provider.kind != "openai":
            raise self._wrong(f"{key}.flavor", f"'{provider.flavor}' is for the kind 'openai' alone")
        if provider.base_url and not _is_address(provider.base_url):
            raise self._wrong(f"{key}.base_url", "is no http or https address")
        if not provider.base_url and provider.kind != "inference":
            raise self._wrong(f"{key}.base_url", "is missing: only the kind 'inference' can be this process's engine")
        return provider

    def _model(self, key: str, name: str, entry: Any, providers: Mapping[str, ProviderEntry]) -> Model:
        entry = self._table(key, entry)
        style = self._take(key, entry, "language_style", str, "name")
        if style not in ("name", "code"):
            raise self._wrong(f"{key}.language_style", f"'{style}' is neither 'name' nor 'code'")
        offers = self._take(key, entry, "deployments", list)
        if not offers:
            raise self._wrong(f"{key}.deployments", "is empty")
        model = Model(
            id=name,
            aliases=tuple(self._strings(key, entry, "aliases")),
            language_style="code" if style == "code" else "name",
            deployments=tuple(
                self._deployment(f"{key}.deployments[{index}]", offer, providers) for index, offer in enumerate(offers)
            ),
        )
        self._nothing_left(key, entry)
        return model

    def _deployment(self, key: str, entry: Any, providers: Mapping[str, ProviderEntry]) -> Deployment:
        entry = self._table(key, entry)
        name = self._take(key, entry, "provider", str)
        if name not in providers:
            raise self._wrong(f"{key}.provider", f"there is no provider '{name}'")
        provider = providers[name]
        price = self._price(f"{key}.price_per_minute", self._take(key, entry, "price_per_minute", str))
        hit = entry.get("hit_price_per_minute")
        containers = self._strings(key, entry, "containers")
        for container in containers:
            self._one_of(f"{key}.containers", container, _CONTAINERS)
        spoken = self._strings(key, entry, "languages")
        deployment = Deployment(
            provider=provider,
            upstream_model=self._take(key, entry, "upstream_model", str),
            price=price,
            hit_price=-(-price // 10)
            if hit is None
            else self._price(f"{key}.hit_price_per_minute", self._take(key, entry, "hit_price_per_minute", str)),
            minimum=self._tenths(f"{key}.minimum_seconds", self._take(key, entry, "minimum_seconds", str, "0")),
            quantized=self._take(key, entry, "quantized", bool, False),
            features=self._features(key, entry, provider),
            languages=frozenset(self._language(f"{key}.languages", text) for text in spoken) or None,
            response_format=self._one_of(
                f"{key}.response_format", self._take(key, entry, "response_format", str, "verbose_json"), _FORMATS
            ),
            max_bytes=self._count(key, entry, "max_bytes"),
            max_seconds=self._count(key, entry, "max_seconds"),
            containers=frozenset(containers) or None,
            speed=self._speed(key, entry),
        )
        self._nothing_left(key, entry)
        return deployment

    def _features(self, key: str, entry: dict[str, Any], provider: ProviderEntry) -> frozenset[Feature] | None:
        usual = _USUAL[provider.kind]
        said = {feature: self._take(key, entry, feature.value, bool, feature in usual) for feature in Feature}
        if not provider.base_url:
            return None  # the engine knows best
        return frozenset(feature for feature, has in said.items() if has)

    def _count(self, key: str, entry: dict[str, Any], name: str) -> int | None:
        if name not in entry:
            return None
        value = self._take(key, entry, name, int)
        if isinstance(value, bool):
            raise self._wrong(f"{key}.{name}", "is not a int")
        if value < 1:
            raise self._wrong(f"{key}.{name}", "is no whole number of at least 1")
        return value

    def _speed(self, key: str, entry: dict[str, Any]) -> float | None:
        if "speed" not in entry:
            return None
        value = self._take(key, entry, "speed", float)
        if not 0 < value < float("inf"):
            raise self._wrong(f"{key}.speed", "is no number of seconds above 0")
        return value

    def _language(self, key: str, text: str) -> str:
        code = languages.parse(text)
        if code is None:
            raise self._wrong(key, f"'{text}' is no language")
        return code

    def _one_of(self, key: str, value: str, known: tuple[str, ...]) -> str:
        if value not in known:
            raise self._wrong(key, f"'{value}' is none of {', '.join(filter(None, known))}")
        return value

    def _price(self, key: str, text: str) -> int:
        return self._scaled(key, text, 1_000_000, "amount of whole micro-dollars")

    def _tenths(self, key: str, text: str) -> int:
        return self._scaled(key, text, 10, "number of seconds in whole tenths")

    def _scaled(self, key: str, text: str, scale: int, what: str) -> int:
        try:
            value = Decimal(text) * scale
        except DecimalException as error:
            raise self._wrong(key, f"'{text}' is no {what}") from error
        if not value.is_finite() or value < 0 or value != int(value):
            raise self._wrong(key, f"'{text}' is no {what}")
        return int(value)

    def _resolved(self, text: str) -> str:
        return self._environ.get(text[4:], "") if text.startswith("env:") else text

    def _reference(self, key: str, text: str) -> str:
        kind, _, name = text.partition(":")
        if text and (kind not in ("env", "secret") or not name):
            # The value is not repeated: it may be the key.
            raise self._wrong(key, "must be 'env:NAME' or 'secret:ID': keys are not kept in this file")
        return text

    def _table(self, key: str, entry: Any) -> dict[str, Any]:
        if not isinstance(entry, dict):
            raise self._wrong(key, "is not a table")
        return dict(entry)

    def _strings(self, key: str, entry: dict[str, Any], name: str) -> list[str]:
        values = self._take(key, entry, name, list, [])
        if not all(isinstance(value, str) for value in values):
            raise self._wrong(f"{key}.{name}", "is not a list of strings")
        return values

    def _take(self, key: str, entry: dict[str, Any], name: str, kind: type[_T], default: _T | None = None) -> _T:
        full = f"{key}.{name}".lstrip(".")
        if name not in entry:
            if default is None:
                raise self._wrong(full, "is missing")
            return default
        value = entry.pop(name)
        if not isinstance(value, kind):
            raise self._wrong(full, f"is not a {kind.__name__}")
        return value

    def _nothing_left(self, key: str, entry: dict[str, Any]) -> None:
        for name in entry:
            raise self._wrong(f"{key}.{name}".lstrip("."), "is not a known key")

    def _wrong(self, key: str, what: str) -> InvalidCatalog:
        return InvalidCatalog(f"{self._file}: {key}: {what}.")
