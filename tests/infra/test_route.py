"""Which origin an upload goes to, by the real edge function."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import edge_function as edge
from voxgate.wiring import all_dialects

HERE = Path(__file__).parent
CUT, LARGEST = edge.CUT, edge.LARGEST
API, INGRESS = "the API", "the ingress"
OPENAI = "/v1/audio/transcriptions"


@dataclass(frozen=True)
class Case:
    """`goes` and `alone`: where a request goes with an ingress and without; a number is a refusal's status."""

    name: str
    goes: str | int
    alone: str | int
    headers: dict[str, Any] = field(default_factory=dict)
    method: str = "POST"
    path: str = OPENAI


def length(value: object) -> dict[str, Any]:
    return {"content-length": value if isinstance(value, list) else str(value)}


CASES = [
    Case("no length", INGRESS, 411),
    Case("empty", API, API, length(0)),
    Case("small", API, API, length(1000)),
    Case("leading zeros", API, API, length("0001000")),
    Case("exactly the cut", API, API, length(CUT)),
    Case("one more than the cut", INGRESS, 413, length(CUT + 1)),
    Case("exactly the largest", INGRESS, 413, length(LARGEST)),
    Case("one more than the largest", 413, 413, length(LARGEST + 1)),
    Case("huge", 413, 413, length("9" * 30)),
    Case("longer than a number can be", 413, 413, length("9" * 400)),
    Case("negative", INGRESS, 411, length(-1)),
    Case("with a sign", INGRESS, 411, length("+5")),
    Case("with an exponent", INGRESS, 411, length("1e3")),
    Case("hexadecimal", INGRESS, 411, length("0x10")),
    Case("a fraction", INGRESS, 411, length("5.0")),
    Case("other digits", INGRESS, 411, length("\u0665")),
    Case("blank", INGRESS, 411, length("")),
    Case("words", INGRESS, 411, length("many")),
    Case("lines that agree", API, API, length(["5", "5"])),
    Case("lines that differ", INGRESS, 411, length(["5", "9999999999"])),
    Case("a list that agrees", API, API, length("5, 5")),
    Case("a list that differs", INGRESS, 411, length("5, 6")),
    Case("a list with an empty member", INGRESS, 411, length("5,")),
    Case("lines that agree on too much", 413, 413, length([str(LARGEST + 1)] * 2)),
    Case("a name in upper case", API, API, {"CONTENT-LENGTH": "5"}),
    Case("large, its name in mixed case", INGRESS, 413, {"Content-Length": str(CUT + 1)}),
    Case("names that differ in case alone", INGRESS, 411, {"Content-Length": "5", "content-length": "6"}),
    Case("chunked", INGRESS, 411, {"transfer-encoding": "chunked"}),
    Case("chunked with a length", INGRESS, 411, {"Transfer-Encoding": "chunked"} | length(5)),
    Case("a preflight", API, API, {"access-control-request-method": "POST"}, method="OPTIONS"),
    Case("GET", API, API, method="GET"),
    Case("HEAD", API, API, length(LARGEST + 1), method="HEAD"),
    Case("PUT", API, API, length(LARGEST + 1), method="PUT"),
    Case("a JSON route", API, API, length(LARGEST + 1), path="/v1/models"),
    Case("a path that only begins alike", API, API, path=f"{OPENAI}/more"),
    Case("a property of every object", API, API, path="constructor"),
    Case("the root", API, API, path="/"),
    Case("a trailing slash", INGRESS, 413, length(CUT + 1), path=f"{OPENAI}/"),
    Case("a trailing slash, small", API, API, length(5), path=f"{OPENAI}/"),
    *(Case(dialect.path, INGRESS, 413, length(CUT + 1), path=dialect.path) for dialect in all_dialects()),
]


def went(outcome: edge.Outcome) -> str | int:
    if outcome.status is not None:
        assert outcome.origin is None
        return outcome.status
    return API if outcome.origin is None else {"the-ingress": INGRESS}[outcome.origin]


def through(function: str, *cases: Case) -> list[edge.Outcome]:
    return edge.run([edge.event(case.path, method=case.method, headers=case.headers) for case in cases], function)


@pytest.fixture(scope="module")
def with_ingress() -> dict[str, edge.Outcome]:
    outcomes = through(edge.code(ingress="the-ingress"), *CASES)
    return {case.name: outcome for case, outcome in zip(CASES, outcomes, strict=True)}


@pytest.fixture(scope="module")
def without_ingress() -> dict[str, edge.Outcome]:
    outcomes = through(edge.code(ingress=""), *CASES)
    return {case.name: outcome for case, outcome in zip(CASES, outcomes, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_request_goes_where_its_body_fits(case: Case, with_ingress: dict[str, edge.Outcome]) -> None:
    assert went(with_ingress[case.name]) == case.goes


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_without_an_ingress_what_does_not_fit_is_refused(case: Case, without_ingress: dict[str, edge.Outcome]) -> None:
    assert went(without_ingress[case.name]) == case.alone


def test_a_refusal_is_our_envelope_with_the_limit_and_what_to_do(
    with_ingress: dict[str, edge.Outcome], without_ingress: dict[str, edge.Outcome]
) -> None:
    refused = {
        LARGEST: with_ingress["one more than the largest"],
        CUT: without_ingress["one more than the cut"],
        None: without_ingress["chunked"],
    }
    for limit, outcome in refused.items():
        assert outcome.answer is not None
        assert outcome.answer["headers"] == {
            "content-type": {"value": "application/json"},
            "x-request-id": {"value": edge.REQUEST_ID},
        }
        assert outcome.answer["body"]["encoding"] == "text"
        assert list(outcome.error) == ["message", "type", "param", "code"]
        assert (outcome.error["type"], outcome.error["code"]) == ("invalid_request_error", "invalid_input")
        remedy = "Content-Length header" if limit is None else "send a shorter recording"
        assert remedy in outcome.error["message"]
        assert limit is None or f"({limit})" in outcome.error["message"]
    assert (refused[LARGEST].error["param"], refused[None].error["param"]) == ("file", None)


def test_the_function_knows_every_contracts_path_and_field() -> None:
    function = edge.code(ingress="", largest=1)
    cases = [Case("", 413, 413, length(2), path=dialect.path) for dialect in all_dialects()]
    named = [outcome.error["param"] for outcome in through(function, *cases)]
    assert named == [dialect.audio_field for dialect in all_dialects()]
    listed = re.findall(r"^    '(/.*)': ", edge.SOURCE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(dialect.path for dialect in all_dialects())


def test_a_cut_of_nothing_sends_every_upload_to_the_ingress() -> None:
    outcomes = through(edge.code(ingress="the-ingress", cut=0), Case("", "", "", length(1)), Case("", "", ""))
    assert [went(outcome) for outcome in outcomes] == [INGRESS, INGRESS]


def lint(*functions: str) -> list[list[str]]:
    """What the linter says of each."""
    assert (HERE / "node_modules").is_dir(), f"The linter is not installed: run `npm ci` in {HERE}, or `make test`."
    command = [edge.node(), str(HERE / "lint_runner.mjs")]
    done = subprocess.run(command, input=json.dumps(functions), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    found: list[list[str]] = json.loads(done.stdout)
    return found


def test_the_function_is_small_and_in_its_runtimes_language() -> None:
    longest_id = "x" * 128
    function = edge.code(ingress=longest_id)
    assert "__" not in function
    assert len(function.encode()) < 10_000, "CloudFront takes 10 KB"
    assert lint(function) == [[]]


NEWER = [
    "const a = {}?.b;",
    "const a = null ?? 1;",
    "let a = 1; a ||= 2;",
    "const { a } = {};",
    "const [a] = [];",
    "const a = [...[]];",
    "const a = { ...{} };",
    "const b = 1; const a = { b };",
    "const a = (b = 1) => b;",
    "class A {}",
    "for (const a of []) { console.log(a); }",
    "function* a() {}",
    "const a = 1n;",
    "const a = /x/u;",
    "const a = async () => 1;",
    "try { handler(); } catch { handler(); }",
    "import fs from 'fs';",
    "const a = eval('1');",
    "const a = new Function('1');",
    "setTimeout(handler);",
    "fetch('https://example.com');",
    "const a = process.env;",
    "export default handler;",
]


def test_the_linter_refuses_what_the_runtime_lacks() -> None:
    plain = "function handler(event) { return event.request; }\n"
    allowed, *refused = lint(plain, *(plain + newer for newer in NEWER))
    assert allowed == []
    for newer, said in zip(NEWER, refused, strict=True):
        assert any("runtime 2.0" in message or "not defined" in message for message in said), (newer, said)
