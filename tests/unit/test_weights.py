"""A model's files: from a directory, a bucket or a hub, all of them or none."""

from __future__ import annotations

import hashlib
import http.server
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import boto3
import pytest
from boto3.exceptions import Boto3Error, RetriesExceededError
from botocore.exceptions import EndpointConnectionError
from mypy_boto3_s3 import S3Client

from conftest import ROOT
from fakes.bucket import bucket
from fakes.bucket import s3 as s3_service
from voxgate import weights
from voxgate.weights import NoWeights

BUCKET = "models"
MODEL = {
    "config.json": b"{}",
    "model.bin": b"weights" * 1000,
    "preprocessor_config.json": b"{}",
    "tokenizer.json": b'{"a": 1}',
    "vocabulary.json": b"[]",
}
SHA256 = hashlib.sha256(MODEL["model.bin"]).hexdigest()


def fill(directory: Path, *left_out: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in MODEL.items():
        if name not in left_out:
            (directory / name).write_bytes(content)
    return directory


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


# A directory.


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    model = fill(tmp_path / "tiny")
    assert weights.find(str(model), tmp_path / "elsewhere") == model
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("missing", ["config.json", "model.bin"])
def test_a_directory_without_a_model_is_refused_by_what_it_lacks(tmp_path: Path, missing: str) -> None:
    model = fill(tmp_path / "tiny", missing)
    with pytest.raises(NoWeights, match=f"tiny is no Whisper model .*: it has no {missing}"):
        weights.find(str(model), tmp_path)


def test_what_is_nothing_of_all_that_is_refused_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(NoWeights, match=r"'large-v9' is no directory, no s3://.*large-v3-turbo, large-v3, small"):
        weights.find("large-v9", tmp_path)
    with pytest.raises(NoWeights, match="'/no/such/place' is no directory"):
        weights.find("/no/such/place", tmp_path)


def test_each_pinned_model_has_its_commit_and_its_hash() -> None:
    assert list(weights.known()) == ["large-v3-turbo", "large-v3", "small"]
    for pinned in weights.known().values():
        assert pinned["repository"].count("/") == 1
        assert len(bytes.fromhex(pinned["revision"])) == 20
        assert len(bytes.fromhex(pinned["sha256"])) == 32


# What was expected.


def test_the_expected_hash_is_no_objection(tmp_path: Path) -> None:
    model = fill(tmp_path / "tiny")
    weights.check(model, SHA256)
    assert files(model) == MODEL


def test_weights_with_another_hash_are_removed(tmp_path: Path) -> None:
    model = fill(tmp_path / "tiny")
    with pytest.raises(NoWeights, match=f"model.bin has the SHA-256 {SHA256}, and not '{'0' * 64}'"):
        weights.check(model, "0" * 64)
    assert "model.bin" not in files(model)


# A bucket.


@pytest.fixture(scope="module")
def aws() -> Iterator[S3Client]:
    with s3_service() as client:
        yield client


@pytest.fixture
def s3(aws: S3Client) -> Iterator[S3Client]:
    with bucket(aws, BUCKET):
        yield aws


def put(s3: S3Client, prefix: str, *left_out: str) -> None:
    for name, content in MODEL.items():
        if name not in left_out:
            s3.put_object(Bucket=BUCKET, Key=prefix + name, Body=content)


@pytest.mark.parametrize("address", ["s3://models/whisper/tiny", "s3://models/whisper/tiny/"])
def test_a_model_is_fetched_from_a_bucket_once(s3: S3Client, tmp_path: Path, address: str) -> None:
    put(s3, "whisper/tiny/")
    for other in ("whisper/tiny/README.md", "whisper/tiny/older/model.bin", "whisper/tiny.en/config.json"):
        s3.put_object(Bucket=BUCKET, Key=other, Body=b"other")
    found = weights.find(address, tmp_path / "models")
    assert found == tmp_path / "models" / "tiny"
    assert files(found) == MODEL
    for name in MODEL:
        s3.delete_object(Bucket=BUCKET, Key=f"whisper/tiny/{name}")
    assert weights.find(address, tmp_path / "models") == found


def test_a_bucket_may_be_a_model(s3: S3Client, tmp_path: Path) -> None:
    put(s3, "")
    assert files(weights.find("s3://models", tmp_path)) == MODEL


@pytest.mark.parametrize(
    ("address", "why"),
    [
        (
            "s3://models/nothing",
            "nothing is no Whisper model .*: it has no config.json and no tokenizer.json and no model.bin",
        ),
        ("s3://no-such-bucket/tiny", "s3://no-such-bucket/tiny cannot be fetched: .*NoSuchBucket"),
    ],
)
def test_what_is_not_in_a_bucket_is_refused(s3: S3Client, tmp_path: Path, address: str, why: str) -> None:
    with pytest.raises(NoWeights, match=why):
        weights.find(address, tmp_path)


def test_without_credentials_a_bucket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # which may know some
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/none")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/none")
    with pytest.raises(NoWeights, match="s3://models/tiny cannot be fetched: Unable to locate credentials"):
        weights.find("s3://models/tiny", tmp_path)


def test_a_model_of_another_hash_is_fetched_anew_the_next_time(s3: S3Client, tmp_path: Path) -> None:
    put(s3, "tiny/")
    s3.put_object(Bucket=BUCKET, Key="tiny/model.bin", Body=b"tampered with")
    with pytest.raises(NoWeights, match="has the SHA-256"):
        weights.fetch("s3://models/tiny", tmp_path, sha256=SHA256)
    put(s3, "tiny/")
    assert files(weights.find("s3://models/tiny", tmp_path)) == MODEL


class Breaks:
    """A client whose connection breaks in the middle of the weights."""

    def __init__(self, s3: S3Client, error: Exception) -> None:
        self._s3 = s3
        self._error = error
        self.asked: list[str] = []

    def get_paginator(self, name: Literal["list_objects_v2"]) -> Any:
        return self._s3.get_paginator(name)

    def download_file(self, bucket: str, key: str, path: str, *, Callback: Callable[[int], None]) -> None:
        self.asked.append(key)
        if key.endswith("model.bin"):
            Path(path).write_bytes(MODEL["model.bin"][:100])
            raise self._error
        self._s3.download_file(bucket, key, path, Callback=Callback)


@pytest.mark.parametrize(
    "error",
    [EndpointConnectionError(endpoint_url="https://s3"), RetriesExceededError(Boto3Error("broken"))],
    ids=lambda error: type(error).__name__,
)
def test_what_was_fetched_from_a_bucket_in_part_is_not_taken_for_whole(
    s3: S3Client, tmp_path: Path, error: Exception
) -> None:
    put(s3, "tiny/")
    into = tmp_path / "tiny"
    into.mkdir()
    client = Breaks(s3, error)
    with pytest.raises(NoWeights, match="s3://models/tiny cannot be fetched"):
        weights._from_s3("s3://models/tiny", into, client)
    assert client.asked[-1] == "tiny/model.bin"
    assert len(client.asked) == len(MODEL)
    assert not (into / "model.bin").exists()
    found = weights.find("s3://models/tiny", tmp_path)
    assert {name: content for name, content in files(found).items() if not name.endswith(".part")} == MODEL


def test_how_far_it_is_is_told(
    s3: S3Client, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_SAY_SECONDS", 0.0)
    s3.put_object(Bucket=BUCKET, Key="tiny/config.json", Body=b"{}")
    s3.put_object(Bucket=BUCKET, Key="tiny/tokenizer.json", Body=b"{}")
    s3.put_object(Bucket=BUCKET, Key="tiny/model.bin", Body=bytes(3_000_000))
    with caplog.at_level(logging.INFO, weights.__name__):
        weights.find("s3://models/tiny", tmp_path)
    said = [record.getMessage() for record in caplog.records if record.name == weights.__name__]
    assert said[0] == "fetching s3://models/tiny"
    assert said[-2] == "3 of 3 MB"
    assert said[-1].startswith("fetched s3://models/tiny in ")


# A hub, which is what a process is told when it starts.


class Hub(http.server.ThreadingHTTPServer):
    """As much of Hugging Face's as a download takes. Some files it refuses."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files = MODEL | {"README.md": b"other", "older/model.bin": b"other"}
        self.refused: set[str] = set()
        self.revisions: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        commit = "a" * 40
        if self.path.startswith("/api/models/owner/tiny/revision/"):
            self.server.revisions.append(self.path.rsplit("/", 1)[1])
            siblings = [{"rfilename": name} for name in self.server.files]
            content = json.dumps({"id": "owner/tiny", "sha": commit, "siblings": siblings}).encode()
        elif self.path.startswith("/api/models/owner/tiny/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(held), "oid": hashlib.sha256(held).hexdigest()}
                for name, held in self.server.files.items()
            ]
            content = json.dumps(tree).encode()
        elif (name := self.path.partition(f"/{commit}/")[2]) in self.server.files:
            if name in self.server.refused:
                self.send_error(403)
                return
            content = self.server.files[name]
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        serving = threading.Thread(target=hub.serve_forever, args=(0.01,))
        serving.start()
        yield hub
        hub.shutdown()
        serving.join()


_FIND = "import sys, pathlib; from voxgate import weights; print(weights.find(sys.argv[1], pathlib.Path(sys.argv[2])))"


def ask(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"HF_ENDPOINT": url, "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT / "functions")}
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "VOXGATE_"))}
    return subprocess.run(
        [sys.executable, *arguments], env=clean | environment, capture_output=True, text=True, timeout=60, check=False
    )


def command(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return ask(url, str(ROOT / "functions" / "voxgate" / "weights.py"), *arguments)


def find(url: str, model: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return ask(url, "-c", _FIND, model, str(directory))


@contextmanager
def nobody() -> Iterator[str]:
    yield "http://127.0.0.1:9"  # the port of what discards all it gets, and which nobody listens at


def test_a_model_is_fetched_from_a_hub(hub: Hub, tmp_path: Path) -> None:
    done = command(hub.url, "fetch", "owner/tiny", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "tiny") == MODEL
    assert not (tmp_path / "tiny" / "older").exists()
    assert hub.revisions == ["main"]
    assert "fetched owner/tiny in " in done.stderr
    with nobody() as url:
        again = find(url, "owner/tiny", tmp_path)
    assert again.stdout.strip() == str(tmp_path / "tiny"), again.stderr


def test_an_image_starts_with_the_model_it_was_built_with_by_the_name_that_it_was_built_by(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, volume = tmp_path / "models", tmp_path / "scratch"
    done = command(hub.url, "fetch", "owner/tiny", str(image), "v1", SHA256)
    assert done.returncode == 0, done.stderr
    assert hub.revisions == ["v1"]
    monkeypatch.chdir(image)
    with nobody() as url:
        found = find(url, "owner/tiny", volume)
        assert found.stdout.strip() == "tiny", found.stderr
        other = find(url, "others/tiny", volume)
    assert "others/tiny is no directory, and cannot be fetched" in other.stderr


def test_a_hubs_weights_of_another_hash_stop_the_build(hub: Hub, tmp_path: Path) -> None:
    done = command(hub.url, "fetch", "owner/tiny", str(tmp_path), "", hashlib.sha256(b"others").hexdigest())
    assert done.returncode == 1
    assert "has the SHA-256" in done.stderr
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize("refused", ["vocabulary.json", "config.json", "model.bin"])
def test_what_was_fetched_from_a_hub_in_part_is_not_taken_for_whole(hub: Hub, tmp_path: Path, refused: str) -> None:
    hub.refused = {refused}
    first = command(hub.url, "fetch", "owner/tiny", str(tmp_path))
    assert first.returncode == 1
    assert "weights.py: owner/tiny is no directory, and cannot be fetched from the hub" in first.stderr
    hub.refused = set()
    second = find(hub.url, "owner/tiny", tmp_path)
    assert second.returncode == 0, second.stderr
    assert files(tmp_path / "tiny") == MODEL


def test_a_hub_that_cannot_be_reached_is_said_to_be_that(tmp_path: Path) -> None:
    with nobody() as url:
        done = command(url, "fetch", "owner/tiny", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "weights.py: owner/tiny is no directory, and cannot be fetched from the hub: "
    )
    assert "Traceback" not in done.stderr


def test_a_hub_that_may_not_be_asked_is_said_to_be_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NoWeights, match=r"owner/tiny .* from the hub: HF_HUB_OFFLINE keeps it from being asked"):
        weights.fetch("owner/tiny", tmp_path)


def test_a_model_that_the_hub_does_not_have_is_refused(hub: Hub, tmp_path: Path) -> None:
    done = command(hub.url, "fetch", "owner/other", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "weights.py: owner/other is no directory, and cannot be fetched from the hub: "
    )


def test_what_can_be_no_name_on_a_hub_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoWeights, match="ow ner/tiny"):
        weights.find("ow ner/tiny", tmp_path)


# As a command.


def test_the_command_checks_a_directory(tmp_path: Path) -> None:
    model = fill(tmp_path / "tiny")
    weights.main(["check", str(model), SHA256])
    with pytest.raises(SystemExit, match=r"weights.py: .*model.bin has the SHA-256"):
        weights.main(["check", str(model), "0" * 64])
    with pytest.raises(SystemExit, match=r"weights.py: .* is no Whisper model"):
        weights.main(["check", str(model), SHA256])


@pytest.mark.parametrize("arguments", [[], ["fetch"], ["check", "a"], ["other", "a", "b"]], ids=str)
def test_the_command_says_how_it_is_used(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="fetch MODEL DIRECTORY"):
        weights.main(arguments)
