"""Audio that a provider fetches by reference, and stored answers: the port of `local.py` and `s3.py`.

Audio is under `staging/<account>/<request>`, answers under `results/<account>/<name>`. The request
that stored something removes it; what a dead one leaves behind goes by its age.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import BinaryIO, Protocol

# ASCII without dot, slash and percent sign: no part can be `..`, hold a separator or need escaping.
_PART = re.compile(r"[A-Za-z0-9_-]{1,128}")
_KEY = re.compile(rf"(?:staging|results)/{_PART.pattern}/{_PART.pattern}")


def audio_key(account_id: str, request_id: str) -> str:
    """Raises `ValueError` for an id that cannot be part of a key. A client's file name never is."""
    return f"staging/{_part('account id', account_id)}/{_part('request id', request_id)}"


def result_key(account_id: str, name: str) -> str:
    """Raises `ValueError` for an id or name that cannot be part of a key."""
    return f"results/{_part('account id', account_id)}/{_part('name', name)}"


def checked(key: str) -> str:
    """The key, if `audio_key` or `result_key` can have made it. Raises `ValueError`."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is not a key of staged audio or of a result.")
    return key


def _part(what: str, text: str) -> str:
    if not _PART.fullmatch(text):
        raise ValueError(f"The {what} {text!r} is not 1 to 128 letters, digits, '_' and '-' of ASCII.")
    return text


class Staging(Protocol):
    """Safe to call from several threads, each with an event loop of its own.

    Raises `ValueError` for a key that `audio_key` and `result_key` do not make; what the disk or
    the network does wrong is raised as it is (`OSError`, botocore's errors).
    """

    async def put(self, key: str, content: BinaryIO | bytes, *, content_type: str = "application/octet-stream") -> str:
        """Store under the key, in place of what was there, and return a reference (`s3://`, `file://`).

        A reader sees the old content or all of the new. A file has to be seekable; it is read in
        pieces from its beginning, left open, and its position is anywhere afterwards. Cancelled, it
        returns only once the file is no longer read, and a `remove` after that is the last word.
        """

    async def get(self, key: str, *, limit: int) -> bytes:
        """Raises `KeyError` where there is nothing, `ValueError` where it is more than `limit` bytes."""

    async def remove(self, key: str) -> None:
        """Nothing there is fine."""

    async def sweep(self, *, audio_seconds: float = 86_400, result_seconds: float = 2 * 86_400) -> int:
        """Remove what is older, and return how many there were."""

    async def close(self) -> None: ...


class References(Protocol):
    async def fetch(self, reference: str, into: Callable[[bytes], object], *, limit: int) -> None:
        """Hand on, piece by piece, the audio that a `put` of this deployment gave that reference.

        Raises `ValueError` for a reference to anything else and for more than `limit` bytes, `KeyError`
        where nothing is there any more.
        """
