"""Which deployments may serve a request, and in what order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from voxgate import languages
from voxgate.catalog import Deployment, Model
from voxgate.errors import InvalidInput, ModelNotFound
from voxgate.model import Capabilities, Feature, Preference, TranscriptionRequest
from voxgate.routing.health import Health

# Bytes that a second takes at the smallest that speech is converted to (Opus at 24 kbit/s, in Ogg).
SMALLEST = 3_500


@dataclass(frozen=True, slots=True)
class Asked:
    """A request and its audio, as far as the choice goes: seconds and bytes."""

    request: TranscriptionRequest
    duration: float
    size: int


def choose(
    model: Model, asked: Asked, capabilities: Mapping[str, Capabilities], health: Health
) -> tuple[Deployment, ...]:
    """The deployments that can serve the request, the first to be tried first.

    `capabilities` are by deployment, of those whose engine says them itself. Raises `ModelNotFound` where
    the request's filters leave none, with what excluded which; `InvalidInput` where a single reason of
    language, feature or length excludes all.
    """
    reasons = {d: _excluded(d, asked, _of(d, capabilities)) for d in model.deployments}
    left = [deployment for deployment, reason in reasons.items() if reason is None]
    if left:
        ordered = _ordered(left, asked, health)
        # A provider that is named is meant: nothing is tried in its place.
        return ordered[:1] if asked.request.routing.provider else ordered
    found = [reason for reason in reasons.values() if reason]
    if all(reason.param for reason in found) and len({reason.param for reason in found}) == 1:
        what = "; ".join(dict.fromkeys(reason.text for reason in found))
        raise InvalidInput(f"The model '{model.id}' cannot serve this: {what}.", param=found[0].param)
    each = "; ".join(f"{d.provider.name}: {reason.text}" for d, reason in reasons.items() if reason)
    raise ModelNotFound(f"No provider of the model '{model.id}' can serve this request ({each}).", param="model")


@dataclass(frozen=True, slots=True)
class _Reason:
    """`param` is the field that asks for what cannot be had; None where it is a filter."""

    text: str
    param: str | None = None


def _of(deployment: Deployment, capabilities: Mapping[str, Capabilities]) -> Capabilities:
    own = capabilities.get(deployment.id)
    if own is not None and deployment.features is None:
        return own
    return Capabilities(languages=deployment.languages, features=deployment.features or frozenset())


def _excluded(deployment: Deployment, asked: Asked, can: Capabilities) -> _Reason | None:
    request, provider, filters = asked.request, deployment.provider, asked.request.routing
    if filters.provider is not None and provider.name != filters.provider:
        return _Reason("not the provider_id")
    if filters.allowed_providers is not None and provider.name not in filters.allowed_providers:
        return _Reason("not in allowed_providers")
    if filters.eu_native and not provider.eu_native:
        return _Reason("not eu_native")
    if not filters.allow_quantization and deployment.quantized:
        return _Reason("quantized")
    if request.language is not None and can.languages is not None and request.language not in can.languages:
        spoken = ", ".join(sorted(can.languages))
        return _Reason(f"it does not speak {languages.name(request.language)}, only {spoken}", "language")
    for feature, param in request.required.items():
        if feature not in can.features:
            return _Reason(f"it does not offer {feature}", param)
    if request.translate and Feature.TRANSLATION not in can.features:
        return _Reason("it does not translate", "model")
    if deployment.max_seconds is not None and asked.duration > deployment.max_seconds:
        return _Reason(
            f"audio duration {asked.duration:.1f} seconds is longer than {deployment.max_seconds:g} seconds", "file"
        )
    smallest = min(asked.size, asked.duration * SMALLEST)
    if deployment.max_bytes is not None and smallest > deployment.max_bytes:
        return _Reason(f"the audio is more than {deployment.max_bytes} bytes however small it is made", "file")
    return None


def _ordered(deployments: list[Deployment], asked: Asked, health: Health) -> tuple[Deployment, ...]:
    """By preference, the catalogue's order between equals; those that are out of order come last.

    `cost` is what this request costs, `speed` the seconds that one of audio takes, as measured or else as the
    catalogue says. `balanced` adds both up, each as a multiple of the best one's.
    """
    speeds = {d: health.speed(d.id) or d.speed for d in deployments}
    quickest = min((speed for speed in speeds.values() if speed), default=1.0)
    costs = {d: d.price * d.billable(asked.duration) for d in deployments}
    cheapest = min((cost for cost in costs.values() if cost), default=1)
    preference = asked.request.routing.preference

    def rank(deployment: Deployment) -> float:
        slowness = (speeds[deployment] or quickest) / quickest  # the unknown is tried, and then known
        dearness = costs[deployment] / cheapest
        return {Preference.COST: dearness, Preference.SPEED: slowness}.get(preference, dearness + slowness)

    return tuple(sorted(deployments, key=lambda d: (not health.available(d.id), rank(d))))
