"""A Whisper model's weights from where they are, and none that were not expected.

python weights.py fetch MODEL DIRECTORY [REVISION SHA256]
                                           to DIRECTORY/NAME: a name of weights.toml, `s3://bucket/prefix`, or
                                           `owner/name` of the Hugging Face hub; which of its revisions, and what
                                           its weights must be, are empty for any
python weights.py check DIRECTORY SHA256   a model that is there

Needs nothing of Voxgate, so that an image's weights are a layer that no change of code renews.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

KNOWN = Path(__file__).with_name("weights.toml")
WEIGHTS = "model.bin"
_FILES = ["config.json", "preprocessor_config.json", WEIGHTS, "tokenizer.json", "vocabulary.*"]
_NEEDED = ("config.json", "tokenizer.json", WEIGHTS)
_SAY_SECONDS = 10.0


class NoWeights(ValueError):
    """There are none, or others than were expected; the message says which."""


def known() -> dict[str, dict[str, str]]:
    """The models whose weights are pinned: each with its repository, revision and the SHA-256 of its weights."""
    return tomllib.loads(KNOWN.read_text(encoding="utf-8"))


def find(model: str, directory: Path) -> Path:
    """The directory of a model: one that exists, or one that is fetched into `directory` unless it is there, or in the
    working directory, where an image has those that it was built with. Raises `NoWeights`."""
    if Path(model).is_dir():
        return _whole(Path(model))
    for there in (Path(_name(model)), directory / _name(model)):
        source = _source(there)
        if source.exists() and source.read_text(encoding="utf-8") == model:  # and not another of that name
            return _whole(there)
    return fetch(model, directory)


def fetch(model: str, directory: Path, *, revision: str = "", sha256: str = "") -> Path:
    """Raises `NoWeights`. What was fetched in part, or is not what it should be, is never there by its name."""
    into = directory / _name(model)
    part = into.with_name(f".{into.name}.part")
    pinned = known().get(model)
    where = model
    if pinned:
        where, revision, sha256 = pinned["repository"], pinned["revision"], pinned["sha256"]
    begun = time.monotonic()
    logger.info("fetching %s", model)
    staged = where.startswith("s3://")
    if not staged and where.count("/") != 1:
        raise NoWeights(f"'{model}' is no directory, no s3://bucket/prefix, no owner/name, and none of {_listed()}.")
    part.mkdir(parents=True, exist_ok=True)
    try:
        if staged:
            _from_s3(where, part)
        else:
            _from_hub(where, part, revision)
    except NoWeights:
        with contextlib.suppress(OSError):  # something came, and is there for the next time
            part.rmdir()
        raise
    _whole(part, model)
    if sha256:
        check(part, sha256)
    shutil.rmtree(into, ignore_errors=True)
    part.rename(into)
    _source(into).write_text(model, encoding="utf-8")
    logger.info("fetched %s in %.0f s", model, time.monotonic() - begun)
    return into


def check(directory: Path, sha256: str) -> None:
    """Raises `NoWeights`; what is not what it should be is removed."""
    weights = directory / WEIGHTS
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        weights.unlink()
        raise NoWeights(f"{weights} has the SHA-256 {found}, and not '{sha256}'.")


def _from_hub(repository: str, into: Path, revision: str) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        snapshot_download(repository, revision=revision or None, allow_patterns=_FILES, local_dir=into)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        away = isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled)
        why = "it cannot be reached" if away else type(error).__name__
        if HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE keeps it from being asked"
        lacks = f"{repository} is no directory, and cannot be fetched from the hub: {why}."
        raise NoWeights(lacks) from error


def _from_s3(address: str, into: Path, client: Any = None) -> None:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    if client is None:
        import boto3

        client = boto3.client("s3")
    prefix = prefix.rstrip("/") + "/" if prefix else ""
    try:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter="/")
        found = {each["Key"].removeprefix(prefix): each["Size"] for page in pages for each in page.get("Contents", ())}
        wanted = {name: size for name, size in found.items() if any(Path(name).match(glob) for glob in _FILES)}
        tell = _progress(sum(wanted.values()))
        for name in sorted(wanted, key=lambda name: name == WEIGHTS):  # the weights last: with them it is whole
            part = into / f"{name}.part"
            client.download_file(bucket, prefix + name, str(part), Callback=tell)
            part.rename(into / name)
    except (Boto3Error, BotoCoreError, ClientError) as error:
        raise NoWeights(f"{address} cannot be fetched: {error}.") from error


def _progress(total: int) -> Callable[[int], None]:
    done, said = 0, time.monotonic()

    def tell(more: int) -> None:
        nonlocal done, said
        done += more
        if time.monotonic() >= said + _SAY_SECONDS:
            said = time.monotonic()
            logger.info("%.0f of %.0f MB", done / 1e6, total / 1e6)

    return tell


def _whole(directory: Path, name: str = "") -> Path:
    missing = [name for name in _NEEDED if not any(directory.glob(name))]
    if missing:
        lacks = " and no ".join(missing)
        raise NoWeights(f"{name or directory} is no Whisper model in CTranslate2's format: it has no {lacks}.")
    return directory


def _source(there: Path) -> Path:
    """Where what is there is from."""
    return there.with_name(f".{there.name}.source")


def _name(model: str) -> str:
    name = model.rstrip("/").rsplit("/", 1)[-1]
    if name in ("", ".", ".."):
        raise NoWeights(f"'{model}' has no name.")
    return name


def _listed() -> str:
    return ", ".join(known())


def main(arguments: list[str]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        match arguments:
            case ["fetch", model, directory]:
                fetch(model, Path(directory))
            case ["fetch", model, directory, revision, sha256]:
                fetch(model, Path(directory), revision=revision, sha256=sha256)
            case ["check", directory, sha256]:
                check(_whole(Path(directory)), sha256)
            case _:
                sys.exit(__doc__)
    except NoWeights as error:
        sys.exit(f"weights.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
