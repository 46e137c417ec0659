"""Languages as clients write them."""

from __future__ import annotations

import pytest
from faster_whisper.tokenizer import _LANGUAGE_CODES
from hypothesis import given
from hypothesis import strategies as st

from voxgate import languages
from voxgate.languages import _ALIASES, _NAMES, _TABLE


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("en", "en"),
        ("EN", "en"),
        (" en ", "en"),
        ("eng", "en"),
        ("English", "en"),
        ("en-US", "en"),
        ("en_GB", "en"),
        ("eng-US", "en"),
        ("zh-Hant-TW", "zh"),
        ("zh_Hans", "zh"),
        ("cmn", "zh"),
        ("cmn-Hans-CN", "zh"),
        ("ger", "de"),
        ("deu", "de"),
        ("iw", "he"),
        ("jw", "jv"),
        ("haw", "haw"),
        ("yue", "yue"),
        ("fil", "fil"),
        ("sr-Latn-RS", "sr"),
        ("Norwegian  Bokmål", "nb"),
        ("haitian creole", "ht"),
        ("castilian", "es"),
    ],
)
def test_every_way_of_writing_a_language_gives_its_code(text: str, code: str) -> None:
    assert languages.parse(text) == code


@pytest.mark.parametrize(
    "text", ["", " ", "xx", "xxx", "klingon", "auto", "e", "english-US", "en-", "-en", "en US", "12"]
)
def test_what_is_no_language_is_none(text: str) -> None:
    assert languages.parse(text) is None


@given(st.text(max_size=30))
def test_any_text_gives_a_known_code_or_none(text: str) -> None:
    code = languages.parse(text)
    assert code is None or code in _NAMES


def test_every_code_and_name_leads_back_to_itself() -> None:
    for code, name in _NAMES.items():
        assert languages.parse(code) == code
        assert languages.name(code) == name
        assert languages.parse(name) == code
        assert languages.parse(f"{code}-XX") == code


def test_no_row_of_the_table_hides_another() -> None:
    rows = [tuple(row.split(maxsplit=2)) for row in _TABLE.replace("\n", " ").split(";")]
    assert len({row[0] for row in rows}) == len({row[1] for row in rows}) == len({row[2] for row in rows}) == len(rows)
    for code, three, _ in rows:
        assert languages.parse(three) == code or three in _ALIASES


def test_aliases_lead_to_codes_of_the_table() -> None:
    assert set(_ALIASES.values()) <= set(_NAMES)


def test_every_language_that_whisper_speaks_is_known() -> None:
    assert [code for code in _LANGUAGE_CODES if languages.parse(code) is None] == []


@pytest.mark.parametrize(
    ("code", "name"), [("en", "english"), ("de", "german"), ("zh", "chinese"), ("nn", "nynorsk"), ("my", "myanmar")]
)
def test_names_are_those_that_openai_prints(code: str, name: str) -> None:
    assert languages.name(code) == name


def test_an_unknown_code_is_its_own_name() -> None:
    assert languages.name("xx") == "xx"
