"""Examples that repeat: what hypothesis finds on one machine, it finds on every other; and models that do not wait."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from conftest import trusting_nobody

# A model of tiny shape gains nothing by threads, and these wait for each other at full speed: on a busy machine that
# makes seconds of milliseconds. It is read when CTranslate2 is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=150)
settings.load_profile("repeatable")


@pytest.fixture(scope="module", autouse=True)
def _trusting_nobody() -> Iterator[None]:
    with trusting_nobody():
        yield
