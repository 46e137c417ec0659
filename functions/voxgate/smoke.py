"""`voxgate smoke`: whether a deployment does what its customers need, asked from outside as they ask."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

SPEECH = Path(__file__).with_name("smoke.opus")  # two seconds, by a synthetic voice
_PATH = "/v1/audio/transcriptions"


@dataclass(frozen=True, slots=True)
class Step:
    """`problem` is empty where it went well; `milliseconds` is how long the answer took."""

    name: str
    milliseconds: float
    problem: str


def smoke(base_url: str, api_key: str, *, model: str) -> Iterator[Step]:
    """Each step as it is done. What a transcription costs is the only trace that it leaves."""
    root = base_url.rstrip("/").removesuffix("/v1")
    with httpx.Client(base_url=root, headers={"authorization": f"Bearer {api_key}"}, timeout=120) as client:
        key = str(uuid.uuid4())
        first: list[bytes] = []

        def transcribe(headers: dict[str, str] | None = None, **form: str) -> httpx.Response:
            files = {"file": ("smoke.opus", SPEECH.read_bytes())}
            return client.post(_PATH, data={"model": model} | form, files=files, headers=headers)

        def heard() -> str:
            response = transcribe({"idempotency-key": key}, response_format="verbose_json")
            if problem := _unlike(response, 200):
                return problem
            first.append(response.content)
            body = response.json()
            billed = "x-voxgate-cost" in response.headers
            return "" if body.get("text") and body.get("duration") and billed else "no text, no duration or no cost"

        def again() -> str:
            response = transcribe({"idempotency-key": key}, response_format="verbose_json")
            same = response.content in first and response.headers.get("idempotency-replayed") == "true"
            return "" if same else f"the same request again is not answered alike ({response.status_code})"

        steps: dict[str, Callable[[], str]] = {
            "it answers": lambda: _unlike(client.get("/health"), 200),
            "a wrong key is refused": lambda: _unlike(
                client.get("/v1/models", headers={"authorization": "Bearer wrong"}), 401, "unauthenticated"
            ),
            "the key is known, and the model": lambda: _unlike(client.get(f"/v1/models/{model}"), 200),
            "speech is heard, and billed": heard,
            "the same again costs nothing": again,
            "subtitles are made": lambda: (
                "" if " --> " in transcribe(response_format="srt").text else "there are no times in the SRT"
            ),
            "what is no audio is refused": lambda: _unlike(
                client.post(_PATH, data={"model": model}, files={"file": ("a.mp3", b"no audio")}), 400, "invalid_input"
            ),
            "an unknown model is refused": lambda: _unlike(transcribe(model="no-such-model"), 404, "model_not_found"),
            "an unknown path is refused": lambda: _unlike(client.get("/no/such/path"), 404, "not_found"),
            "the balance is told": lambda: _unlike(client.get("/v1/balance"), 200),
        }
        for name, step in steps.items():
            begun = time.perf_counter()
            try:
                problem = step()
            except (httpx.HTTPError, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
            yield Step(name, (time.perf_counter() - begun) * 1000, problem)


def _unlike(response: httpx.Response, status: int, code: str = "") -> str:
    """What is other than it should be: the status, and of a refusal the code in the envelope."""
    if response.status_code != status:
        return f"{response.status_code} instead of {status}: {response.text[:200]}"
    if code and response.json().get("error", {}).get("code") != code:
        return f"{response.text[:200]} without the code '{code}'"
    return ""
