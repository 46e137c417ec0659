"""Write `events/`: an API Gateway event for each contract and for the main errors, with real audio.

`${VOXGATE_API_KEY}` in an event is replaced by `voxgate invoke` with the local account's key.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BOUNDARY = "voxgate-example-boundary"
KEY = "Bearer ${VOXGATE_API_KEY}"
SPEECH = ("audio.mp3", (ROOT / "tests/data/a-mp3-cbr.mp3").read_bytes())
OPENAI, STATS, ROUTER = "/v1/audio/transcriptions", "/v1/stt/transcribe", "/audio/transcriptions"
LITELLM = "/litellm/v1/audio/transcriptions"


def form(fields: dict[str, str], audio: tuple[str, bytes] | None, name: str = "file") -> bytes:
    parts = [f'Content-Disposition: form-data; name="{key}"\r\n\r\n{value}'.encode() for key, value in fields.items()]
    if audio is not None:
        header = f'Content-Disposition: form-data; name="{name}"; filename="{audio[0]}"\r\n'
        parts.append(f"{header}Content-Type: application/octet-stream\r\n\r\n".encode() + audio[1])
    return b"".join(b"--%s\r\n%s\r\n" % (BOUNDARY.encode(), part) for part in parts) + f"--{BOUNDARY}--\r\n".encode()


def event(path: str, body: bytes | None, *, method: str = "POST", key: str | None = KEY) -> dict[str, Any]:
    """A REST API (v1) proxy event, as the API Gateway documentation shows it."""
    headers = {"Accept": "*/*", "Host": "api.example.com", "User-Agent": "example"}
    if key is not None:
        headers["Authorization"] = key
    if body is not None:
        headers["Content-Type"] = f"multipart/form-data; boundary={BOUNDARY}"
    return {
        "resource": "/{proxy+}",
        "path": path,
        "httpMethod": method,
        "headers": headers,
        "multiValueHeaders": {name: [value] for name, value in headers.items()},
        "queryStringParameters": None,
        "multiValueQueryStringParameters": None,
        "pathParameters": {"proxy": path.removeprefix("/")},
        "stageVariables": None,
        "requestContext": {
            "resourcePath": "/{proxy+}",
            "httpMethod": method,
            "path": path,
            "stage": "prod",
            "requestId": "c6af9ac6-7b61-11e6-9a41-93e8deadbeef",
            "identity": {"sourceIp": "192.0.2.1", "userAgent": "example"},
        },
        "body": None if body is None else base64.b64encode(body).decode(),
        "isBase64Encoded": body is not None,
    }


def events() -> dict[str, dict[str, Any]]:
    whisper = {"model": "whisper-1"}
    not_audio = ("audio.mp3", (ROOT / "tests/data/not-pdf.pdf").read_bytes())
    as_text = event(OPENAI, form(whisper, SPEECH))
    as_text |= {"body": base64.b64decode(as_text["body"]).decode("utf-8", "replace"), "isBase64Encoded": False}
    return {
        "openai": event(OPENAI, form(whisper, SPEECH)),
        "openai-srt": event(OPENAI, form(whisper | {"response_format": "srt"}, SPEECH)),
        "openai-verbose": event(
            OPENAI,
            form(whisper | {"response_format": "verbose_json", "timestamp_granularities[]": "word"}, SPEECH),
        ),
        "llmvision": event(OPENAI, form({"model": "lmp-stt-20241013", "response_format": "verbose_json"}, SPEECH)),
        "stats": event(STATS, form({"model_id": "deepgram-nova-3"}, SPEECH, "audio")),
        "router": event(ROUTER, form({"model": "whisper-large-v3", "eu_native": "true"}, SPEECH)),
        "litellm": event(LITELLM, form(whisper | {"timestamp_granularities": "word"}, SPEECH)),
        "models": event("/v1/models", None, method="GET"),
        "model": event("/v1/models/embedded/whisper-1", None, method="GET"),
        "health": event("/health", None, method="GET", key=None),
        "error-no-key": event(OPENAI, form(whisper, SPEECH), key=None),
        "error-wrong-key": event(OPENAI, form(whisper, SPEECH), key="Bearer vg_wrong"),
        "error-not-audio": event(OPENAI, form(whisper, not_audio)),
        "error-no-file": event(OPENAI, form(whisper, None)),
        "error-unknown-model": event(OPENAI, form({"model": "whisper-9"}, SPEECH)),
        "error-cut-off": event(OPENAI, form(whisper, SPEECH)[:-200]),
        "error-binary-media-types": as_text,
        "error-wrong-path": event("/v2/transcriptions", form(whisper, SPEECH)),
        "error-wrong-method": event(OPENAI, None, method="GET"),
    }


if __name__ == "__main__":
    for name, value in events().items():
        (ROOT / "events" / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
