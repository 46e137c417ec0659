"""Models, their deployments and the providers that run them: TOML to typed, checked values."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, DecimalException
from pathlib import Path
from typing import Any, Literal, TypeVar

from voxgate.errors import InvalidCatalog, ModelNotFound

LanguageStyle = Literal["name", "code"]
_T = TypeVar("_T")
_KINDS = ("inference",)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderEntry:
    """`base_url` is resolved already; empty means the engine of this process."""

    name: str
    kind: str
    base_url: str = ""
    regions: tuple[str, ...] = ()
    eu_native: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One provider's offer of a model. `price` is in micro-dollars a minute of audio, `minimum` the
    tenths of a second that a request is billed at least."""

    provider: ProviderEntry
    upstream_model: str
    price: int
    minimum: int = 0
    quantized: bool = False

    def billable(self, duration: float) -> int:
        """Tenths of a second."""
        return max(started_tenths(duration), self.minimum)

    def cost(self, duration: float) -> int:
        """Micro-dollars, rounded up to a whole one."""
        return -(-self.price * self.billable(duration) // 600)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    id: str
    deployments: tuple[Deployment, ...]
    aliases: tuple[str, ...] = ()
    language_style: LanguageStyle = "name"


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
                return Model(id=model.id, deployments=chosen, language_style=model.language_style)
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
        names: set[str] = set()
        for model in models:
            for name in (model.id, *model.aliases):
                if name in names:
                    raise self._wrong(f"models.{model.id}", f"the name '{name}' is taken by another model")
                names.add(name)
        if not models:
            raise self._wrong("models", "there is none")
        return Catalog(models)

    def _provider(self, key: str, name: str, entry: Any) -> ProviderEntry:
        entry = self._table(key, entry)
        provider = ProviderEntry(
            name=name,
            kind=self._take(key, entry, "kind", str),
            base_url=self._secret(key, self._take(key, entry, "base_url", str, "")),
            regions=tuple(self._strings(key, entry, "regions")),
            eu_native=self._take(key, entry, "eu_native", bool, False),
        )
        if provider.kind not in _KINDS:
            raise self._wrong(f"{key}.kind", f"'{provider.kind}' is none of {', '.join(_KINDS)}")
        self._nothing_left(key, entry)
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
        provider = self._take(key, entry, "provider", str)
        if provider not in providers:
            raise self._wrong(f"{key}.provider", f"there is no provider '{provider}'")
        deployment = Deployment(
            provider=providers[provider],
            upstream_model=self._take(key, entry, "upstream_model", str),
            price=self._price(f"{key}.price_per_minute", self._take(key, entry, "price_per_minute", str)),
            minimum=self._tenths(f"{key}.minimum_seconds", self._take(key, entry, "minimum_seconds", str, "0")),
            quantized=self._take(key, entry, "quantized", bool, False),
        )
        self._nothing_left(key, entry)
        return deployment

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

    def _secret(self, key: str, text: str) -> str:
        return self._environ.get(text[4:], "") if text.startswith("env:") else text

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
