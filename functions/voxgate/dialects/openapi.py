"""The OpenAPI 3.1 document of all contracts, out of the same forms that check the requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from voxgate import __version__, errors
from voxgate.dialects import Dialect
from voxgate.dialects.live import TokenForm

Schema = dict[str, Any]

_OF_A_KEY = (errors.Unauthenticated, errors.Forbidden, errors.RateLimited)
_OF_AN_UPLOAD = (
    *_OF_A_KEY,
    errors.InvalidInput,
    errors.InsufficientQuota,
    errors.ModelNotFound,
    errors.RequestTimeout,
    errors.IdempotencyConflict,
    errors.TooLarge,
    errors.ProviderUnavailable,
    errors.Overloaded,
)


def _type(kind: str) -> Schema:
    """`kind` is a JSON type, or several with bars between them."""
    return {"type": kind.split("|") if "|" in kind else kind}


def _object(required: str, **properties: str | Schema) -> Schema:
    """`required` has names with spaces between them; a property of no more than a type is given as that."""
    schemas = {name: _type(of) if isinstance(of, str) else of for name, of in properties.items()}
    return {"type": "object", "required": required.split(), "properties": schemas}


def _list_of(name: str, kind: str = "array") -> Schema:
    return _type(kind) | {"items": {"$ref": f"#/components/schemas/{name}"}}


_COMPONENTS = {
    "Error": _object(
        "error",
        error=_object("message type param code", message="string", type="string", param="string|null", code="string"),
    ),
    "Segment": _object(
        "id start end text",
        id="integer|string",
        type={"const": "transcript.text.segment"},
        speaker="string|null",
        seek="integer|null",
        start="number",
        end="number",
        text="string",
        tokens=_type("array") | {"items": _type("integer")},
        **dict.fromkeys(("temperature", "avg_logprob", "compression_ratio", "no_speech_prob"), "number|null"),
    ),
    "Word": _object("word start end", word="string", start="number", end="number", confidence="number|null"),
    "Model": _object(
        "id object created owned_by", id="string", object={"const": "model"}, created="integer", owned_by="string"
    ),
}
_USAGE = _object(
    "type",
    type={"enum": ["duration", "tokens"]},
    seconds="number",
    **dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), "integer"),
    input_token_details=_type("object"),
) | {"description": "In seconds, or in tokens where the provider counts those."}
# What a contract's body may have, and which of it each contract's has.
_SHOWN: dict[str, str | Schema] = {
    "id": "string",
    "object": {"const": "audio.transcription"},
    "created": "integer",
    "task": {"const": "transcribe"},
    "provider": "string",
    "model": "string",
    "text": "string",
    "language": "string|null",
    "duration": "number",
    "confidence": "number|null",
    "segments": _list_of("Segment", "array|null"),
    "words": _list_of("Word", "array|null"),
    "logprobs": _type("array|null") | {"items": _type("object") | {"required": ["token", "logprob"]}},
    "usage": _USAGE,
    "extra_fields": "object",
}
_BODIES = {
    "openai": "text task language duration segments words logprobs usage",
    "translations": "text task language duration segments usage",
    "stats": "text duration language confidence words model",
    "router": "id object created provider model text language segments duration words",
    "litellm": "text task language duration segments words logprobs usage extra_fields",
}
_LIMITS = {
    f"x-ratelimit-{what}-{of}": {"schema": _type("string")}
    for of in ("requests", "audio-seconds")
    for what in ("limit", "remaining", "reset")
}
_BILLED = _LIMITS | {
    f"x-voxgate-{name}": {"schema": _type("string"), "description": description}
    for name, description in (
        ("cost", "Dollars that this request cost."),
        ("balance", "Dollars that are left."),
        ("attempts", "How many attempts that took."),
        ("provider", "Who served it."),
    )
}
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[ -~]+$"},
    "description": "The same key with the same request returns the first answer for a day, and costs nothing.",
}
_AUDIO = {
    "type": "string",
    "format": "binary",
    "description": "The audio: flac, mp3, mp4, mpeg, mpga, m4a, ogg, opus, wav or webm, at most 26214400 bytes.",
}


def document(dialects: Sequence[Dialect]) -> Schema:
    schemas: Schema = dict(_COMPONENTS)
    paths = {dialect.path: {"post": _operation(dialect, schemas)} for dialect in dialects}
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


def _operation(dialect: Dialect, schemas: Schema) -> Schema:
    """One contract's, whose form goes into `schemas`."""
    form = dialect.form.__name__
    schema = dialect.form.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(schema.pop("$defs", {}))
    fields = schema["properties"]
    if not dialect.nullable:
        fields = {name: _without_null(field) for name, field in fields.items()}
    schemas[form] = schema | {
        "properties": {dialect.audio_field: _AUDIO, **fields},
        "required": [dialect.audio_field, *schema["required"]],
        "additionalProperties": True,  # named in x-voxgate-ignored-params, or passed on
    }
    shown = {name: _SHOWN[name] for name in _BODIES[dialect.name].split()}
    if dialect.name == "translations":
        shown["task"] = {"const": "translate"}
    content = {"application/json": {"schema": _object("text", **shown)}}
    if "response_format" in fields:
        content |= {kind: {"schema": _type("string")} for kind in ("text/plain", "application/x-subrip", "text/vtt")}
    return {
        "operationId": dialect.name,
        "security": [{"bearer": []}] + ([{dialect.key_header: []}] if dialect.key_header else []),
        "parameters": [_IDEMPOTENCY_KEY],
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": {"$ref": f"#/components/schemas/{form}"}}},
        },
        "responses": {"200": {"description": "The transcript.", "content": content, "headers": _BILLED}}
        | _errors(_OF_AN_UPLOAD),
    }


def _without_null(field: Schema) -> Schema:
    """An optional field of a form is left out; only a nullable one may be sent as `null`."""
    kinds = [kind for kind in field.get("anyOf", ()) if kind != {"type": "null"}]
    if not kinds:
        return field
    rest = {key: value for key, value in field.items() if key not in ("anyOf", "default")}
    return rest | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds})


def _others() -> Schema:
    amounts = ("balance", "held", "free")
    balance = _object(
        f"account currency {' '.join(amounts)}",
        **dict.fromkeys(("account", "currency", *amounts), "string"),
        **{f"{name}_microdollars": "integer" for name in (*amounts, "spent_this_month")},
    )
    used = _type("object") | {"required": ["requests", "errors", "seconds", "cost"]}
    data = _type("array") | {"items": used}
    usage = _object("object data total has_more next", data=data, has_more="boolean", next="string|null")
    token = _object(
        "token expires_in expires_at",
        token={"type": "string", "description": "Opens live sockets, in a key's place."},
        expires_in="integer",
        expires_at={"type": "integer", "description": "Unix seconds."},
    )
    asked = {"requestBody": {"content": {"application/json": {"schema": TokenForm.model_json_schema()}}}}
    models = {"type": "object", "properties": {"data": _list_of("Model")}}
    model = {"$ref": "#/components/schemas/Model"}
    name = {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    days = {"type": "string", "format": "date"}
    query = {
        "since": days,
        "until": days,
        "key": _type("string"),
        "model": _type("string"),
        "group_by": {"type": "string", "enum": ["day", "key", "model", "day,key", "day,model", "day,key,model"]},
        "limit": {"type": "integer", "minimum": 1, "maximum": 1000},
        "after": {"type": "string", "description": "The `next` of the page before."},
    }
    parameters = [{"name": field, "in": "query", "schema": schema} for field, schema in query.items()]
    return {
        "/v1/models": {"get": _keyed("listModels", models)},
        "/v1/models/{id}": {"get": _keyed("getModel", model, errors.ModelNotFound) | {"parameters": [name]}},
        "/v1/balance": {"get": _keyed("balance", balance)},
        "/v1/usage": {"get": _keyed("usage", usage, errors.InvalidInput) | {"parameters": parameters}},
        "/v1/stt/tokens": {"post": _keyed("createToken", token, errors.InvalidInput) | asked},
        "/health": {"get": _open("health", {"type": "object", "required": ["status"]})},
        "/openapi.json": {"get": _open("describe", {"type": "object"})},
    }


def _open(name: str, schema: Schema) -> Schema:
    """An operation that anyone may ask for."""
    success = {"description": "OK", "content": {"application/json": {"schema": schema}}}
    return {"operationId": name, "responses": {"200": success}}


def _keyed(name: str, schema: Schema, *more: type[errors.VoxgateError]) -> Schema:
    """One that takes a key, and may fail for `more` than that."""
    operation = _open(name, schema) | {"security": [{"bearer": []}]}
    operation["responses"]["200"]["headers"] = _LIMITS
    operation["responses"] |= _errors((*_OF_A_KEY, *more))
    return operation


def _errors(kinds: Sequence[type[errors.VoxgateError]]) -> Schema:
    """What each says of itself in its docstring."""
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {str(kind.status): {"description": kind.__doc__, "content": content} for kind in kinds}
