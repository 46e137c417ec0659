"""Which deployments may serve a request, in what order."""

from __future__ import annotations

from collections.abc import Mapping

from voxgate import languages
from voxgate.catalog import Deployment, Model
from voxgate.errors import InvalidInput, ModelNotFound
from voxgate.model import Capabilities, TranscriptionRequest


def choose(
    model: Model, request: TranscriptionRequest, capabilities: Mapping[str, Capabilities]
) -> tuple[Deployment, ...]:
    """The deployments that can serve `request`, the catalogue's first ones first.

    `capabilities` are by provider. Raises `ModelNotFound` where the request's own filters leave
    none, `InvalidInput` where what is left speaks another language or lacks a feature.
    """
    allowed = tuple(d for d in model.deployments if _passes(d, request))
    if not allowed:
        names = ", ".join(sorted({d.provider.name for d in model.deployments}))
        raise ModelNotFound(
            f"No provider of the model '{request.model}' passes the request's filters; it is served by: {names}.",
            param="model",
        )
    speaking = tuple(d for d in allowed if _speaks(capabilities[d.provider.name], request.language))
    if not speaking:
        spoken = sorted({code for d in allowed for code in capabilities[d.provider.name].languages or ()})
        raise InvalidInput(
            f"The model '{request.model}' does not speak {languages.name(request.language or '')}; "
            f"it speaks: {', '.join(spoken)}.",
            param="language",
        )
    able = speaking
    for feature, param in request.required.items():
        able = tuple(d for d in able if feature in capabilities[d.provider.name].features)
        if not able:
            raise InvalidInput(
                f"The model '{request.model}' cannot honour '{param}' here: it does not offer {feature}.", param=param
            )
    return able


def _passes(deployment: Deployment, request: TranscriptionRequest) -> bool:
    provider, filters = deployment.provider, request.routing
    return (
        (filters.provider is None or provider.name == filters.provider)
        and (filters.allowed_providers is None or provider.name in filters.allowed_providers)
        and (provider.eu_native or not filters.eu_native)
        and (filters.allow_quantization or not deployment.quantized)
    )


def _speaks(capabilities: Capabilities, language: str | None) -> bool:
    return language is None or capabilities.languages is None or language in capabilities.languages
