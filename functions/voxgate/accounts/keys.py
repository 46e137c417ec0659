"""API keys: `vg_`, 30 random characters, and 6 of a checksum over them.

The prefix lets secret scanners find a key that leaked; the checksum tells a mistyped key before
any look-up. 30 characters of base 62 are 178 random bits, so a plain hash is enough at rest.
"""

from __future__ import annotations

import hashlib
import secrets
import string
import zlib

_ALPHABET = string.digits + string.ascii_letters
_PREFIX = "vg_"
_RANDOM = 30
_CHECKSUM = 6


def generate() -> str:
    body = "".join(secrets.choice(_ALPHABET) for _ in range(_RANDOM))
    return _PREFIX + body + _checksum(body)


def well_formed(key: str) -> bool:
    body, checksum = key[len(_PREFIX) : -_CHECKSUM], key[-_CHECKSUM:]
    return (
        key.startswith(_PREFIX) and len(body) == _RANDOM and key.isascii() and key.isprintable()
    ) and secrets.compare_digest(_checksum(body), checksum)


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _checksum(body: str) -> str:
    value = zlib.crc32((_PREFIX + body).encode())
    digits = []
    for _ in range(_CHECKSUM):
        value, digit = divmod(value, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))
