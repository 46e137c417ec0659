"""The same audio asked for again with the same parameters, for those who want that: no second transcription.

An entry is its account's alone. Its key is made of everything that can make a difference to what is heard;
how the answer is to be written is not part of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from voxgate.errors import InvalidInput
from voxgate.model import ResponseFormat, Transcript, TranscriptionRequest
from voxgate.staging import Staging, result_key

logger = logging.getLogger(__name__)

_HEADER = "x-voxgate-cache"
_TTL_HEADER = "x-voxgate-cache-ttl"
_DEFAULT_TTL = 86_400
LONGEST_TTL = 2 * 86_400  # what is staged is removed after that
_MOST_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Entry:
    """What was heard, by which deployment; good until `expires`, in unix seconds."""

    deployment: str
    transcript: Transcript
    expires: float


_ENTRY = TypeAdapter(Entry)


def ttl(headers: Mapping[str, str], usual: int | None) -> int | None:
    """For how many seconds to keep what is heard; None where the request wants no cache. `usual` is its
    account's own choice. Raises `InvalidInput`."""
    mode = headers.get(_HEADER, "read-write" if usual else "off").strip().lower()
    if mode not in ("off", "read-write"):
        raise InvalidInput(f"'{_HEADER}' is 'read-write' or 'off'.", param=_HEADER)
    if mode == "off":
        return None
    text = headers.get(_TTL_HEADER, str(usual or _DEFAULT_TTL)).strip()
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= LONGEST_TTL):
        raise InvalidInput(f"'{_TTL_HEADER}' is a number of seconds, 1 to {LONGEST_TTL}.", param=_TTL_HEADER)
    return int(text)


def entry_id(request: TranscriptionRequest, audio: bytes) -> str:
    """`audio` is the digest of the file's bytes."""
    plain = dataclasses.replace(request, response_format=ResponseFormat.JSON, stream=False, ignored=())
    asked = json.dumps(dataclasses.asdict(plain), sort_keys=True, default=sorted)
    return hashlib.sha256(asked.encode() + b"\0" + audio).hexdigest()


class Cache:
    def __init__(self, staging: Staging, *, clock: Callable[[], float] = time.time) -> None:
        self._staging = staging
        self._clock = clock

    async def get(self, account_id: str, entry: str) -> Entry | None:
        try:
            stored = await self._staging.get(_key(account_id, entry), limit=_MOST_BYTES)
            found = _ENTRY.validate_json(stored)
        except (KeyError, ValidationError):  # an entry of an older version is none
            return None
        except Exception:  # whatever the store has: it costs nobody an answer
            logger.exception("the cache cannot be read")
            return None
        return found if found.expires > self._clock() else None

    async def put(self, account_id: str, entry: str, deployment: str, transcript: Transcript, *, ttl: int) -> None:
        try:
            content = _ENTRY.dump_json(Entry(deployment, transcript, self._clock() + ttl))
            await self._staging.put(_key(account_id, entry), content, content_type="application/json")
        except Exception:  # likewise
            logger.exception("the cache cannot be written")


def _key(account_id: str, entry: str) -> str:
    return result_key(account_id, f"cache-{entry}")
