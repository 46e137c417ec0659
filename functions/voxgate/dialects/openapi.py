"""The OpenAPI 3.1 document of all contracts, out of the same forms that check the requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from voxgate import __version__
from voxgate.dialects import Dialect
from voxgate.dialects.live import TokenForm
from voxgate.errors import (
    Forbidden,
    IdempotencyConflict,
    InsufficientQuota,
    InvalidInput,
    ModelNotFound,
    Overloaded,
    ProviderUnavailable,
    RateLimited,
    RequestTimeout,
    TooLarge,
    Unauthenticated,
    VoxgateError,
)

_ERRORS: tuple[tuple[type[VoxgateError], str], ...] = (
    (InvalidInput, "A field is missing or has a bad value, or the audio cannot be used; `param` names the field."),
    (Unauthenticated, "The API key is missing, malformed, unknown, revoked or expired."),
    (
        InsufficientQuota,
        "Out of credit, or a monthly budget is spent; the message says what is left and what it takes.",
    ),
    (Forbidden, "The account is suspended, or the key has not the scope or may not use the model."),
    (ModelNotFound, "No such model, or none of its providers passes the request's filters."),
    (RequestTimeout, "The upload stalled for a minute."),
    (IdempotencyConflict, "The Idempotency-Key is another request's, or this one's that is still running."),
    (TooLarge, "The audio is larger than 25 MB."),
    (RateLimited, "A rate or concurrency limit; `Retry-After` and `retry-after-ms` say when to come back."),
    (ProviderUnavailable, "Every provider for the model failed."),
    (Overloaded, "The queue is full; `Retry-After` says when to come back."),
)
_ENVELOPE = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_NULLABLE_NUMBER = {"type": ["number", "null"]}
_NULLABLE_TEXT = {"type": ["string", "null"]}
_SEGMENT = {
    "type": "object",
    "required": ["id", "start", "end", "text"],
    "properties": {
        "id": {"type": ["integer", "string"]},
        "type": {"const": "transcript.text.segment"},
        "speaker": _NULLABLE_TEXT,
        "seek": {"type": ["integer", "null"]},
        "start": {"type": "number"},
        "end": {"type": "number"},
        "text": {"type": "string"},
        "tokens": {"type": "array", "items": {"type": "integer"}},
        "temperature": _NULLABLE_NUMBER,
        "avg_logprob": _NULLABLE_NUMBER,
        "compression_ratio": _NULLABLE_NUMBER,
        "no_speech_prob": _NULLABLE_NUMBER,
    },
}
_WORD = {
    "type": "object",
    "required": ["word", "start", "end"],
    "properties": {
        "word": {"type": "string"},
        "start": {"type": "number"},
        "end": {"type": "number"},
        "confidence": _NULLABLE_NUMBER,
    },
}
_USAGE = {
    "type": "object",
    "description": "In seconds, or in tokens where the provider counts those.",
    "required": ["type"],
    "properties": {
        "type": {"enum": ["duration", "tokens"]},
        "seconds": {"type": "number"},
        **{name: {"type": "integer"} for name in ("input_tokens", "output_tokens", "total_tokens")},
        "input_token_details": {"type": "object"},
    },
}
_SEGMENTS = {"type": ["array", "null"], "items": {"$ref": "#/components/schemas/Segment"}}
_WORDS = {"type": ["array", "null"], "items": {"$ref": "#/components/schemas/Word"}}
_LOGPROBS = {"type": ["array", "null"], "items": {"type": "object", "required": ["token", "logprob"]}}


def _body(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": ["text"], "properties": {"text": {"type": "string"}, **properties}}


_BODIES = {
    "openai": _body(
        task={"const": "transcribe"},
        language=_NULLABLE_TEXT,
        duration={"type": "number"},
        segments=_SEGMENTS,
        words=_WORDS,
        logprobs=_LOGPROBS,
        usage=_USAGE,
    ),
    "translations": _body(
        task={"const": "translate"},
        language=_NULLABLE_TEXT,
        duration={"type": "number"},
        segments=_SEGMENTS,
        usage=_USAGE,
    ),
    "stats": _body(
        duration={"type": "number"},
        language=_NULLABLE_TEXT,
        confidence=_NULLABLE_NUMBER,
        words=_WORDS,
        model={"type": "string"},
    ),
    "router": _body(
        id={"type": "string"},
        object={"const": "audio.transcription"},
        created={"type": "integer"},
        provider={"type": "string"},
        model={"type": "string"},
        language=_NULLABLE_TEXT,
        segments=_SEGMENTS,
        duration={"type": "number"},
        words=_WORDS,
    ),
    "litellm": _body(
        task={"const": "transcribe"},
        language=_NULLABLE_TEXT,
        duration={"type": "number"},
        segments=_SEGMENTS,
        words=_WORDS,
        logprobs=_LOGPROBS,
        usage=_USAGE,
        extra_fields={"type": "object"},
    ),
}
_MODEL = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
    },
}


_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[ -~]+$"},
    "description": "The same key with the same request returns the first answer for a day, and costs nothing.",
}
_LIMITS = {
    f"x-ratelimit-{what}-{of}": {"schema": {"type": "string"}}
    for of in ("requests", "audio-seconds")
    for what in ("limit", "remaining", "reset")
}
_BILLED = _LIMITS | {
    "x-voxgate-cost": {"schema": {"type": "string"}, "description": "Dollars that this request cost."},
    "x-voxgate-balance": {"schema": {"type": "string"}, "description": "Dollars that are left."},
    "x-voxgate-attempts": {"schema": {"type": "string"}, "description": "How many attempts that took."},
    "x-voxgate-provider": {"schema": {"type": "string"}, "description": "Who served it."},
}
_MONEY = {
    "type": "object",
    "required": ["account", "currency", "balance", "held", "free"],
    "properties": {
        **{name: {"type": "string"} for name in ("account", "currency", "balance", "held", "free")},
        **{f"{name}_microdollars": {"type": "integer"} for name in ("balance", "held", "free", "spent_this_month")},
    },
}
_USED = {
    "type": "object",
    "required": ["object", "data", "total", "has_more", "next"],
    "properties": {
        "data": {"type": "array", "items": {"type": "object", "required": ["requests", "errors", "seconds", "cost"]}},
        "has_more": {"type": "boolean"},
        "next": {"type": ["string", "null"]},
    },
}


def document(dialects: Sequence[Dialect]) -> dict[str, Any]:
    schemas: dict[str, Any] = {"Error": _ENVELOPE, "Segment": _SEGMENT, "Word": _WORD, "Model": _MODEL}
    paths: dict[str, Any] = {dialect.path: {"post": _operation(dialect, schemas)} for dialect in dialects}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Voxgate", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": paths | _others(),
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _operation(dialect: Dialect, schemas: dict[str, Any]) -> dict[str, Any]:
    schema = dialect.form.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(schema.pop("$defs", {}))
    schemas[dialect.form.__name__] = schema
    audio = {
        "type": "string",
        "format": "binary",
        "description": "The audio: flac, mp3, mp4, mpeg, mpga, m4a, ogg, opus, wav or webm, at most 26214400 bytes.",
    }
    if not dialect.nullable:
        schema["properties"] = {name: _without_null(field) for name, field in schema["properties"].items()}
    schema["properties"] = {dialect.audio_field: audio, **schema["properties"]}
    schema["required"] = [dialect.audio_field, *schema["required"]]
    schema["additionalProperties"] = True  # named in x-voxgate-ignored-params, or passed on
    plain = {kind: {"schema": {"type": "string"}} for kind in ("text/plain", "application/x-subrip", "text/vtt")}
    success = {
        "description": "The transcript.",
        "content": {"application/json": {"schema": _BODIES[dialect.name]}}
        | (plain if "response_format" in schema["properties"] else {}),
    }
    return {
        "operationId": dialect.name,
        "security": [{"bearer": []}] + ([{dialect.key_header: []}] if dialect.key_header else []),
        "parameters": [_IDEMPOTENCY_KEY],
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": {"$ref": f"#/components/schemas/{dialect.form.__name__}"}}},
        },
        "responses": {"200": success | {"headers": _BILLED}} | _errors(*(kind for kind, _ in _ERRORS)),
    }


def _errors(*kinds: type[VoxgateError]) -> dict[str, Any]:
    return {str(kind.status): _error(text) for kind, text in _ERRORS if kind in kinds}


def _without_null(field: dict[str, Any]) -> dict[str, Any]:
    """An optional field of a form is left out; only a nullable one may be sent as `null`."""
    kinds = [kind for kind in field.get("anyOf", ()) if kind != {"type": "null"}]
    if not kinds:
        return field
    rest = {key: value for key, value in field.items() if key not in ("anyOf", "default")}
    return rest | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds})


_TOKEN = {
    "type": "object",
    "required": ["token", "expires_in", "expires_at"],
    "properties": {
        "token": {"type": "string", "description": "Opens live sockets, in a key's place."},
        "expires_in": {"type": "integer"},
        "expires_at": {"type": "integer", "description": "Unix seconds."},
    },
}
_ASKED = {"requestBody": {"content": {"application/json": {"schema": TokenForm.model_json_schema()}}}}


def _others() -> dict[str, Any]:
    models = {
        "type": "object",
        "properties": {"data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}}},
    }
    model = {"$ref": "#/components/schemas/Model"}
    name = {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    days = {"type": "string", "format": "date"}
    query = {
        "since": days,
        "until": days,
        "key": {"type": "string"},
        "model": {"type": "string"},
        "group_by": {"type": "string", "enum": ["day", "key", "model", "day,key", "day,model", "day,key,model"]},
        "limit": {"type": "integer", "minimum": 1, "maximum": 1000},
        "after": {"type": "string", "description": "The `next` of the page before."},
    }
    parameters = [{"name": field, "in": "query", "schema": schema} for field, schema in query.items()]
    return {
        "/v1/models": {"get": _get("listModels", models, Unauthenticated, Forbidden, RateLimited)},
        "/v1/models/{id}": {
            "get": _get("getModel", model, Unauthenticated, Forbidden, ModelNotFound, RateLimited)
            | {"parameters": [name]},
        },
        "/v1/balance": {"get": _get("balance", _MONEY, Unauthenticated, Forbidden, RateLimited)},
        "/v1/usage": {
            "get": _get("usage", _USED, InvalidInput, Unauthenticated, Forbidden, RateLimited)
            | {"parameters": parameters},
        },
        "/v1/stt/tokens": {
            "post": _get("createToken", _TOKEN, InvalidInput, Unauthenticated, Forbidden, RateLimited) | _ASKED
        },
        "/health": {"get": _get("health", {"type": "object", "required": ["status"]})},
        "/openapi.json": {"get": _get("describe", {"type": "object"})},
    }


def _get(name: str, schema: dict[str, Any], *errors: type[VoxgateError]) -> dict[str, Any]:
    """An operation that reads; with errors it is one that needs a key."""
    success = {"description": "OK", "content": {"application/json": {"schema": schema}}}
    operation: dict[str, Any] = {
        "operationId": name,
        "responses": {"200": success | ({"headers": _LIMITS} if errors else {})},
    }
    operation["responses"] |= _errors(*errors)
    return operation | ({"security": [{"bearer": []}]} if errors else {})


def _error(description: str) -> dict[str, Any]:
    return {
        "description": description,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
