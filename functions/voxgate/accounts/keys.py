"""API keys: `vg_`, 30 random characters, and 6 of a checksum over them; tokens are the same with `vt_`.

The prefix lets secret scanners find a key that leaked; the checksum tells a mistyped key before
any look-up. 30 characters of base 62 are 178 random bits, so a plain hash is enough at rest.
"""

from __future__ import annotations

import hashlib
import secrets
import string
import zlib

_ALPHABET = string.digits + string.ascii_letters
KEY, TOKEN = "vg_", "vt_"
_RANDOM = 30
_CHECKSUM = 6


def generate(prefix: str = KEY) -> str:
    body = prefix + "".join(secrets.choice(_ALPHABET) for _ in range(_RANDOM))
    return body + _checksum(body)


def well_formed(key: str, prefix: str = KEY) -> bool:
    body, checksum = key[:-_CHECKSUM], key[-_CHECKSUM:]
    return (
        key.startswith(prefix) and len(body) == len(prefix) + _RANDOM and key.isascii() and key.isprintable()
    ) and secrets.compare_digest(_checksum(body), checksum)


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _checksum(body: str) -> str:
    value, base = zlib.crc32(body.encode()), len(_ALPHABET)
    return "".join(_ALPHABET[value // base**place % base] for place in reversed(range(_CHECKSUM)))
