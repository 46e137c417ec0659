"""Everything that is set from outside, read from the environment in this one place."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from voxgate.errors import InvalidSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Times are in seconds. Each field is set by `VOXGATE_` and its name in capitals.

    `catalog` is a file, or the name of one that ships; empty means `local`.
    `whisper_model` is a model's directory, a name of `weights.toml`, an `s3://bucket/prefix` or a hub's `owner/name`,
    or several of them as `name=...,name=...`; empty means the embedded pocketsphinx. At most `whisper_memory`
    gigabytes of weights are loaded at once (0: any), and `whisper_batch` windows decoded (0: as many as are the
    fastest); the thresholds are `engines.whisper.Guards`.
    `inference_url` is another machine's `voxgate inference`; empty means this machine's engine.
    `table` is a DynamoDB table and `staging_bucket` an S3 bucket, encrypted with the KMS key `staging_key`;
    empty means files in `data_dir`. The table's `region`, and the `profile` whose credentials are used, are
    found as AWS's own tools find them where they are empty. `environment` is the deployment's name, with
    which metrics are written to the standard output; with `embedded` 0 there is no engine in this process;
    `drain_seconds` is what requests under way have left when a server is told to end.
    A server takes `uploads_at_once`, and gives up one that brings fewer than `slowest_upload` bytes a second.
    The rates and `concurrent_requests` are each account's, those of `key_` each key's, where none are
    set for it; 0 of a key's means those of its account.
    """

    catalog: str = ""
    whisper_model: str = ""
    whisper_device: str = "auto"
    whisper_compute_type: str = ""  # that of the device
    whisper_beam: int = 5
    whisper_batch: int = 0
    whisper_memory: float = 0.0
    whisper_speech_threshold: float = 0.5
    whisper_steady_threshold: float = 6.0
    whisper_no_speech_threshold: float = 0.6
    whisper_logprob_threshold: float = -1.0
    whisper_compression_threshold: float = 2.4
    inference_url: str = ""
    provider_timeout: float = 600.0
    provider_connect_timeout: float = 5.0
    provider_first_byte_timeout: float = 600.0
    request_timeout: float = 600.0
    uploads_at_once: int = 128
    slowest_upload: int = 1024
    max_audio_seconds: float = 4 * 3600.0
    engine_workers: int = 0  # 0: as many as suit the engine and the machine
    engine_queue: int = 0  # likewise
    live_workers: int = 0  # likewise
    requests_per_minute: int = 6000
    audio_seconds_per_minute: int = 360_000
    concurrent_requests: int = 256
    key_requests_per_minute: int = 0
    key_audio_seconds_per_minute: int = 0
    key_concurrent_requests: int = 0
    table: str = ""
    staging_bucket: str = ""
    staging_key: str = ""
    region: str = ""
    profile: str = ""
    environment: str = ""
    embedded: int = 1
    drain_seconds: int = 30
    data_dir: Path = Path("data")
    spool_dir: Path = Path(tempfile.gettempdir())

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Raises `InvalidSettings` naming the variable that has an unusable value."""
        given: dict[str, Any] = {}
        for field in fields(cls):
            variable = f"VOXGATE_{field.name.upper()}"
            if text := environ.get(variable, "").strip():  # empty is the same as absent
                negative = isinstance(field.default, float) and field.default < 0
                given[field.name] = _parse(variable, str(field.type), text, negative=negative)
        return cls(**given)


_PARSERS: dict[str, Callable[[str], Any]] = {"str": str, "float": float, "int": int, "Path": Path}


def _parse(variable: str, kind: str, text: str, *, negative: bool) -> Any:
    try:
        value = _PARSERS[kind](text)
    except ValueError as error:
        raise InvalidSettings(f"{variable} must be a number, not {text!r}.") from error
    if kind in ("float", "int") and not (math.isfinite(value) and (value >= 0 or negative)):
        raise InvalidSettings(f"{variable} must be a number of at least 0, not {text!r}.")
    return value


def will_be_snapshot() -> bool:
    """Whether Lambda is going to copy this process once it is initialized (SnapStart)."""
    return os.environ.get("AWS_LAMBDA_INITIALIZATION_TYPE") == "snap-start"
