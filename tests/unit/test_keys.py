"""API keys: random, recognizable, and proof against a slip of the finger."""

from __future__ import annotations

import hashlib
import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxgate.accounts import keys

KEY = keys.generate()
ALPHABET = string.digits + string.ascii_letters


def test_a_new_key_is_well_formed() -> None:
    for _ in range(200):
        key = keys.generate()
        assert keys.well_formed(key)
        assert key.startswith("vg_")
        assert len(key) == 39
        assert set(key[3:]) <= set(ALPHABET)


def test_no_two_keys_are_alike() -> None:
    assert len({keys.generate() for _ in range(1000)}) == 1000


def test_every_single_wrong_character_is_noticed() -> None:
    for position in range(len(KEY)):
        for character in string.printable + "é\0":
            if character != KEY[position]:
                assert not keys.well_formed(KEY[:position] + character + KEY[position + 1 :])


def test_every_swap_of_neighbours_is_noticed() -> None:
    for position in range(3, len(KEY) - 1):
        swapped = KEY[:position] + KEY[position + 1] + KEY[position] + KEY[position + 2 :]
        assert keys.well_formed(swapped) is (swapped == KEY)


@given(st.integers(0, 38), st.text(max_size=3), st.integers(0, 3))
def test_anything_put_in_or_left_out_is_noticed(position: int, put: str, left: int) -> None:
    typed = KEY[:position] + put + KEY[position + left :]
    assert keys.well_formed(typed) is (typed == KEY)


@given(st.text(max_size=60))
def test_any_text_is_judged_without_an_error(text: str) -> None:
    assert keys.well_formed(text) is False
    assert keys.well_formed("vg_" + text) is False


@pytest.mark.parametrize(
    "text",
    ["", "vg_", "sk-" + KEY[3:], KEY.upper(), KEY + "\n", " " + KEY, "VG_" + KEY[3:]],
    ids=["empty", "prefix", "another prefix", "upper case", "line end", "space", "upper prefix"],
)
def test_what_only_resembles_a_key_is_none(text: str) -> None:
    assert not keys.well_formed(text)


def test_random_keys_of_the_right_shape_are_almost_never_well_formed() -> None:
    r = random.Random(1)
    guesses = ("vg_" + "".join(r.choices(ALPHABET, k=36)) for _ in range(5000))
    assert not any(keys.well_formed(guess) for guess in guesses)


def test_the_digest_is_sha256() -> None:
    assert keys.digest(KEY) == hashlib.sha256(KEY.encode()).digest()


def test_a_new_token_is_well_formed_as_one_and_not_as_a_key() -> None:
    for _ in range(200):
        token = keys.generate(keys.TOKEN)
        assert keys.well_formed(token, keys.TOKEN)
        assert not keys.well_formed(token)
        assert (token[:3], len(token)) == ("vt_", 39)
        assert set(token[3:]) <= set(ALPHABET)


def test_a_key_is_no_token_and_neither_becomes_the_other_by_its_prefix() -> None:
    token = keys.generate(keys.TOKEN)
    assert not keys.well_formed(KEY, keys.TOKEN)
    assert not keys.well_formed(keys.TOKEN + KEY[3:], keys.TOKEN)
    assert not keys.well_formed(keys.KEY + token[3:])


def test_every_single_wrong_character_of_a_token_is_noticed() -> None:
    token = keys.generate(keys.TOKEN)
    for position in range(len(token)):
        for character in string.printable + "é\0":
            if character != token[position]:
                assert not keys.well_formed(token[:position] + character + token[position + 1 :], keys.TOKEN)


def test_keys_that_were_given_out_before_there_were_tokens_are_good_still() -> None:
    assert keys.well_formed("vg_0123456789012345678901234567893FocKh")
