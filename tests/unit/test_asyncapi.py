"""The AsyncAPI document of the live socket: whole in itself, and in step with `docs/live.md`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft7Validator  # type: ignore[import-untyped, unused-ignore]

from conftest import ROOT, documented

DOCUMENT = documented()
PROSE = (ROOT / "docs" / "live.md").read_text(encoding="utf-8")
STREAM = DOCUMENT["channels"]["stream"]
COMPONENTS = DOCUMENT["components"]
SENT = ("ready", "partial", "final", "done", "error", "fatal")
TAKEN = ("audio", "finalize", "keepalive", "close")


def pointers(node: Any) -> Iterator[str]:
    """Every `$ref` in a part of the document."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == "$ref":
                yield value
            else:
                yield from pointers(value)
    elif isinstance(node, list):
        for value in node:
            yield from pointers(value)


def found(pointer: str) -> Any:
    node: Any = DOCUMENT
    for name in pointer.removeprefix("#/").split("/"):
        node = node[name]
    return node


def validator(name: str) -> Draft7Validator:
    return Draft7Validator({"$ref": f"#/components/schemas/{name}", "components": COMPONENTS})


def section(title: str) -> str:
    """What stands in `docs/live.md` under a heading."""
    return PROSE.split(f"\n## {title}\n")[1].split("\n## ")[0]


# --- Whole in itself ------------------------------------------------------------------------------


def test_it_has_what_asyncapi_3_asks_for_and_nothing_that_it_does_not_know() -> None:
    """https://www.asyncapi.com/docs/reference/specification/v3.0.0"""
    assert DOCUMENT["asyncapi"] == "3.0.0"
    assert DOCUMENT.keys() <= {
        "asyncapi", "id", "info", "servers", "defaultContentType", "channels", "operations", "components",
    }  # fmt: skip
    assert {"title", "version"} <= DOCUMENT["info"].keys()
    assert COMPONENTS.keys() <= {"schemas", "messages", "securitySchemes"}
    for server in DOCUMENT["servers"].values():
        assert {"host", "protocol"} <= server.keys()
        assert server["protocol"] in ("ws", "wss")
        assert set(re.findall(r"\{(\w+)\}", server["host"])) == server["variables"].keys()
    for scheme in COMPONENTS["securitySchemes"].values():
        assert scheme["type"] in ("http", "httpApiKey")
        assert "in" not in scheme or scheme["in"] in ("header", "query")


def test_every_reference_leads_somewhere_and_everything_is_referred_to() -> None:
    there = list(pointers(DOCUMENT))
    for pointer in there:
        assert pointer.startswith("#/")
        assert isinstance(found(pointer), dict), pointer
    for kind in ("schemas", "messages", "securitySchemes"):
        named = {f"#/components/{kind}/{name}" for name in COMPONENTS[kind]}
        assert named <= set(there), kind


def test_the_operations_share_the_channels_messages_between_them() -> None:
    hear, tell = DOCUMENT["operations"]["hear"], DOCUMENT["operations"]["tell"]
    assert (hear["action"], tell["action"]) == ("receive", "send")
    messages = {"hear": TAKEN, "tell": SENT}
    for name, operation in DOCUMENT["operations"].items():
        assert operation["channel"] == {"$ref": "#/channels/stream"}
        listed = [{"$ref": f"#/channels/stream/messages/{message}"} for message in messages[name]]
        assert operation["messages"] == listed
    assert tuple(STREAM["messages"]) == TAKEN + SENT
    assert tuple(COMPONENTS["messages"]) == TAKEN + SENT


@pytest.mark.parametrize("name", COMPONENTS["schemas"])
def test_each_schema_is_one_of_draft_7(name: str) -> None:
    """AsyncAPI's own dialect is a superset of it."""
    schema = COMPONENTS["schemas"][name]
    Draft7Validator.check_schema(schema)
    assert set(schema.get("required", ())) <= schema.get("properties", {}).keys()
    if "$ref" in schema:  # its siblings would not count
        assert schema.keys() == {"$ref"}


@pytest.mark.parametrize("name", SENT)
def test_what_the_server_sends_has_these_fields_and_no_others(name: str) -> None:
    schema = COMPONENTS["schemas"][name]
    assert schema["additionalProperties"] is False
    optional = {"balance"} if name in ("done", "fatal") else set()
    assert schema["properties"].keys() == set(schema["required"]) | optional
    assert schema["properties"]["type"] == {"const": "error" if name == "fatal" else name}


@pytest.mark.parametrize("name", TAKEN[1:] + SENT)
def test_the_examples_are_what_they_say(name: str) -> None:
    message = COMPONENTS["messages"][name]
    assert message["payload"] == {"$ref": f"#/components/schemas/{name}"}
    assert message["examples"]
    for example in message["examples"]:
        assert list(validator(name).iter_errors(example["payload"])) == []
        for other in set(TAKEN[1:] + SENT) - {name}:
            assert not validator(other).is_valid(example["payload"])
        for field in COMPONENTS["schemas"][name]["required"]:
            without = {key: value for key, value in example["payload"].items() if key != field}
            assert not validator(name).is_valid(without), field
        if name in SENT:
            assert not validator(name).is_valid(example["payload"] | {"more": 1})


# --- In step with the prose -----------------------------------------------------------------------


def test_it_knows_the_parameters_of_the_prose() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", section("Connecting"), re.MULTILINE)
    query = STREAM["bindings"]["ws"]["query"]
    assert [name for name, _ in rows] == list(query["properties"])
    assert [name for name, default in rows if default == "required"] == query["required"]
    for name, default in rows:
        known = query["properties"][name].get("default")
        if known is not None:
            assert default.strip("`") == (str(known).lower() if isinstance(known, bool) else str(known))
    address = re.search(r"`GET (\S+)`", PROSE)
    assert address is not None
    assert STREAM["address"] == address[1]


def test_it_knows_the_messages_of_the_prose() -> None:
    taken = re.findall(r'^- `\{"type": "(\w+)"\}`', section("What the client sends"), re.MULTILINE)
    assert tuple(taken) == TAKEN[1:]
    sent = re.findall(r"^- `(\w+)`", section("What the server sends"), re.MULTILINE)
    assert tuple(sent) == SENT[:-1]
    for name in SENT:
        text = " ".join(section("What the server sends").split())
        for field in COMPONENTS["schemas"][name]["properties"]:
            assert f"`{field}`" in text, (name, field)
    (most,) = re.findall(r"Up to ([\d,]+) bytes each", PROSE)
    assert COMPONENTS["schemas"]["audio"]["maxLength"] == int(most.replace(",", ""))


def test_it_knows_the_errors_and_close_codes_of_the_prose() -> None:
    table = section("Errors and close codes").split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().splitlines()[2:]]
    codes = {code for row in rows for code in re.findall(r"\b[14]\d{3}\b", row[3])}
    assert codes == STREAM["x-close-codes"].keys()
    known = COMPONENTS["schemas"]["failure"]["properties"]["code"]["enum"]
    assert {row[1].strip("`") for row in rows if row[1]} == set(known)
