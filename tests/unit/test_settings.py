"""The environment, read once."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from voxgate import wiring
from voxgate.engines.batch_pool import BatchPool
from voxgate.engines.batch_worker import Options
from voxgate.engines.whisper import Guards
from voxgate.errors import InvalidSettings
from voxgate.settings import Settings

GIVEN: dict[str, tuple[str, object]] = {
    "catalog": ("/etc/catalog.toml", "/etc/catalog.toml"),
    "whisper_model": ("large-v3", "large-v3"),
    "whisper_device": ("cuda", "cuda"),
    "whisper_compute_type": ("int8", "int8"),
    "whisper_beam": ("1", 1),
    "whisper_batch": ("16", 16),
    "whisper_memory": ("10.5", 10.5),
    "whisper_speech_threshold": ("0.3", 0.3),
    "whisper_steady_threshold": ("0", 0.0),
    "whisper_no_speech_threshold": ("0.9", 0.9),
    "whisper_logprob_threshold": ("-0.5", -0.5),
    "whisper_compression_threshold": ("3", 3.0),
    "inference_url": ("http://inference:8080", "http://inference:8080"),
    "provider_timeout": ("12.5", 12.5),
    "provider_connect_timeout": ("0.5", 0.5),
    "provider_first_byte_timeout": ("30", 30.0),
    "request_timeout": ("60", 60.0),
    "max_audio_seconds": ("1400", 1400.0),
    "engine_workers": ("3", 3),
    "engine_queue": ("0", 0),
    "live_workers": ("3", 3),
    "requests_per_minute": ("60", 60),
    "audio_seconds_per_minute": ("3600", 3600),
    "concurrent_requests": ("8", 8),
    "key_requests_per_minute": ("6", 6),
    "key_audio_seconds_per_minute": ("360", 360),
    "key_concurrent_requests": ("2", 2),
    "table": ("voxgate", "voxgate"),
    "staging_bucket": ("voxgate-staging", "voxgate-staging"),
    "staging_key": ("arn:aws:kms:eu-central-1:1:key/k", "arn:aws:kms:eu-central-1:1:key/k"),
    "environment": ("prod", "prod"),
    "uploads_at_once": ("5", 5),
    "slowest_upload": ("1", 1),
    "region": ("eu-west-1", "eu-west-1"),
    "profile": ("ops", "ops"),
    "embedded": ("0", 0),
    "drain_seconds": ("110", 110),
    "data_dir": ("/var/lib/voxgate", Path("/var/lib/voxgate")),
    "spool_dir": ("/var/tmp", Path("/var/tmp")),
}
NUMBERS = [field.name for field in fields(Settings) if field.type in ("float", "int")]
NEGATIVE = "whisper_logprob_threshold"  # the one number that is below 0


def test_this_table_has_every_setting() -> None:
    assert set(GIVEN) == {field.name for field in fields(Settings)}


@pytest.mark.parametrize("name", GIVEN)
def test_each_setting_is_read_from_its_variable(name: str) -> None:
    text, value = GIVEN[name]
    settings = Settings.from_environment({f"VOXGATE_{name.upper()}": text})
    assert getattr(settings, name) == value
    assert type(getattr(settings, name)) is type(getattr(Settings(), name))
    others = set(GIVEN) - {name}
    assert all(getattr(settings, other) == getattr(Settings(), other) for other in others)


@pytest.mark.parametrize("text", ["", "  "])
@pytest.mark.parametrize("name", GIVEN)
def test_an_empty_variable_is_an_absent_one(name: str, text: str) -> None:
    assert Settings.from_environment({f"VOXGATE_{name.upper()}": text}) == Settings()


def test_other_variables_are_not_ours() -> None:
    assert Settings.from_environment({"CATALOG": "x", "voxgate_catalog": "x", "VOXGATE_OTHER": "x"}) == Settings()


def test_the_processes_own_environment_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOXGATE_ENGINE_QUEUE", "7")
    assert Settings.from_environment().engine_queue == 7


@pytest.mark.parametrize("name", [name for name in NUMBERS if name != NEGATIVE])
def test_a_number_below_zero_is_refused_by_its_variables_name(name: str) -> None:
    variable = f"VOXGATE_{name.upper()}"
    with pytest.raises(InvalidSettings, match=f"{variable} must be a number of at least 0, not '-1'"):
        Settings.from_environment({variable: "-1"})


def test_a_log_probability_is_below_zero() -> None:
    for text in ("-1", "-0.25", "0"):
        given = Settings.from_environment({f"VOXGATE_{NEGATIVE.upper()}": text})
        assert given.whisper_logprob_threshold == float(text)


@pytest.mark.parametrize("text", ["many", "nan", "inf", "1,5", "0x10"])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_bad_number_is_refused_by_its_variables_name(name: str, text: str) -> None:
    variable = f"VOXGATE_{name.upper()}"
    with pytest.raises(InvalidSettings, match=variable) as caught:
        Settings.from_environment({variable: text})
    assert repr(text) in str(caught.value)


# Which models that is, and the engine for them.


@pytest.mark.parametrize(
    ("text", "models"),
    [
        ("", {}),
        ("large-v3", {"large-v3": "large-v3"}),
        ("owner/small", {"small": "owner/small"}),
        ("/models/tiny/", {"tiny": "/models/tiny/"}),
        ("s3://weights/whisper/turbo", {"turbo": "s3://weights/whisper/turbo"}),
        ("whisper-1=large-v3-turbo", {"whisper-1": "large-v3-turbo"}),
        ("b=owner/b, a=/models/a,small,", {"b": "owner/b", "a": "/models/a", "small": "small"}),
    ],
)
def test_a_model_or_several_have_names(text: str, models: dict[str, str]) -> None:
    settings = Settings(whisper_model=text)
    assert wiring.whisper_models(settings) == models
    assert list(wiring.whisper_models(settings)) == list(models)
    assert wiring.model_names(settings) == (list(models) or ["pocketsphinx-en-us"])


def test_the_engine_gets_what_was_set() -> None:
    settings = Settings(
        whisper_model="a=/a,b=/b",
        whisper_device="cpu",
        whisper_compute_type="int8",
        whisper_beam=2,
        whisper_batch=16,
        whisper_memory=1.5,
        whisper_speech_threshold=0.1,
        whisper_steady_threshold=0.5,
        whisper_no_speech_threshold=0.2,
        whisper_logprob_threshold=-0.3,
        whisper_compression_threshold=0.4,
        engine_workers=3,
        data_dir=Path("/data"),
    )
    pool = wiring.build_pool(settings)
    assert isinstance(pool, BatchPool)
    engine, options = pool._arguments
    assert engine == "whisper"
    assert Options(**json.loads(options)) == Options(
        models={"a": "/a", "b": "/b"},
        directory="/data/models",
        device="cpu",
        compute_type="int8",
        beam_size=2,
        batch_size=16,
        threads=3,
        budget=1_500_000_000,
        guards=asdict(Guards(speech=0.1, steady=0.5, no_speech=0.2, logprob=-0.3, compression=0.4)),
    )


@pytest.mark.parametrize("value", [",", "a=/x,a=/y", "/x/tiny,/y/tiny/", "=/x", "a="])
def test_models_without_a_name_or_two_of_one_name_are_refused(value: str) -> None:
    with pytest.raises(InvalidSettings, match="VOXGATE_WHISPER_MODEL"):
        wiring.whisper_models(Settings(whisper_model=value))


def test_the_thresholds_are_the_engines_own_unless_they_are_set() -> None:
    settings = Settings()
    assert Guards() == Guards(
        speech=settings.whisper_speech_threshold,
        steady=settings.whisper_steady_threshold,
        no_speech=settings.whisper_no_speech_threshold,
        logprob=settings.whisper_logprob_threshold,
        compression=settings.whisper_compression_threshold,
    )
