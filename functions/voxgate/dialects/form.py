"""Form fields to typed values: what all contracts share of reading a form.

A contract's form is a pydantic model; its fields check what a client sent and, in
`dialects.openapi`, describe it. Lists may come as repeated fields, as `name[]`, as `name[0]`, or
as one JSON array, since each is what some client sends.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from typing import Annotated, Any, Self, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from voxgate import languages
from voxgate.errors import InvalidInput
from voxgate.model import TranscriptionRequest
from voxgate.multipart import Field

_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell half a character, UTF-8 cannot
_MOST_VALUES = 128
_INDEXED = re.compile(r"^(.+?)\[(\d*)\]$")


def _language(text: object) -> object:
    if not isinstance(text, str):
        return text
    code = languages.parse(text)
    if code is None:
        raise ValueError(f"'{text[:40]}' is not a language; send an ISO 639-1 code such as 'en'")
    return code


Language = Annotated[str, BeforeValidator(_language)]


class FormModel(BaseModel):
    """The fields of one contract's form, besides the audio itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), defer_build=True)

    @classmethod
    def read(cls, fields: tuple[Field, ...], *, null: bool = False) -> tuple[Self, dict[str, tuple[str, ...]]]:
        """The form and the fields it does not know, by name. An empty optional field is an absent
        one, and so is the text `null` where the contract calls its fields nullable."""
        values: dict[str, Any] = {}
        extra: dict[str, tuple[str, ...]] = {}
        for field in fields:
            sent, value, name = field.name, field.value, _known(cls, field.name)
            if name is None:
                extra[sent] = (*extra.get(sent, ()), value)
            elif _is_list(cls, name):
                values.setdefault(name, []).extend(_items(sent, value, null=null))
                if len(values[name]) > _MOST_VALUES:
                    raise InvalidInput(f"The field '{sent}' has more than {_MOST_VALUES} values.", param=sent)
            elif name in values:
                raise InvalidInput(f"The field '{sent}' was sent twice.", param=sent)
            else:
                values[name] = value
        given = {
            name: value
            for name, value in values.items()
            if cls.model_fields[name].is_required() or not _absent(value, null=null)
        }
        return cls.of(given), extra

    @classmethod
    def of(cls, body: object) -> Self:
        """The same of values, or of a JSON body."""
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            raise _refusal(error) from error


class RequestForm(FormModel):
    @abstractmethod
    def request(self) -> TranscriptionRequest:
        """What these fields ask for. Raises `InvalidInput` for what cannot be had."""


def _known(form: type[FormModel], sent: str) -> str | None:
    """The form's name of it."""
    if sent in form.model_fields:
        return sent
    indexed = _INDEXED.match(sent)
    return indexed[1] if indexed and _is_list(form, indexed[1]) else None


def _is_list(form: type[FormModel], name: str) -> bool:
    return name in form.model_fields and _holds_list(form.model_fields[name].annotation)


def _holds_list(annotation: object) -> bool:
    """Also inside of `| None` and `Annotated`."""
    return get_origin(annotation) is list or any(_holds_list(a) for a in get_args(annotation))


def _items(sent: str, value: str, *, null: bool) -> list[str]:
    text = value.strip()
    if _absent(text, null=null):
        return []
    if not text.startswith("["):
        return [value]
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"The field '{sent}' looks like a JSON array and is none: {error}.", param=sent) from error
    if not isinstance(items, list) or not all(isinstance(i, str) and not _SURROGATE.search(i) for i in items):
        raise InvalidInput(f"The field '{sent}' must be an array of strings.", param=sent)
    return items


def _absent(value: object, *, null: bool) -> bool:
    return value == "" or value == [] or (null and value == "null")


def _refusal(error: ValidationError) -> InvalidInput:
    first = error.errors(include_url=False, include_context=False)[0]
    param = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "missing":
        return InvalidInput(f"Missing required field '{param}'.", param=param)
    if first["type"] == "string_too_short":
        return InvalidInput(f"The field '{param}' is empty.", param=param)
    if first["type"] == "model_type":
        return InvalidInput("The body must be a JSON object.")
    reason = first["msg"].removeprefix("Value error, ").replace("Input should be", "it should be", 1)
    return InvalidInput(f"Invalid value for '{param}': {reason}.", param=param)
