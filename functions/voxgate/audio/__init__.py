"""What the bytes are: their container (`sniff`), how long they last (`probe`), their samples (`decode`)."""

from __future__ import annotations


class UnusableAudio(ValueError):
    """The recording cannot be transcribed. The message says why in words for the customer."""


class NoAudio(UnusableAudio):
    """There is a track, and nothing in it."""
