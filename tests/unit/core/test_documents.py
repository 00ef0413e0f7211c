"""YAML and JSON are read as they are written, or refused with their line."""

from __future__ import annotations

import time

import pytest

from posttrain.core.documents import parse_json, parse_yaml, read_yaml, write_yaml
from posttrain.core.errors import ConfigError, DataError

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(10 * [f'*{before}'])}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("true", True),
        ("FALSE", False),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("010", 10),
        ("0o10", 8),
        ("0x10", 16),
        ("-7", -7),
        ("1e-5", 1e-5),
        ("1.", 1.0),
        (".5", 0.5),
        ("6.02E+23", 6.02e23),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ("!!str 1", "1"),
        ("[1, a]", [1, "a"]),
    ],
)
def test_yaml_is_version_1_2(written, value):
    assert parse_yaml(f"x: {written}", origin="r") == {"x": value}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: {c: 1, c: 2}", "line 2, column 11: the key 'c' stands twice"),
        ("a: 1\n1: 2", "line 2, column 1: the key 1 is no text"),
        ("? [a]\n: 1", "no text"),
        ("a: " + "[" * 3000 + "]" * 3000, "more than 64 levels"),
        ("a: " + "9" * 6000, "a number of 6,000 digits"),
        ('a: "\\ud800"', "half of a surrogate pair"),
        ("a: &a [*a]", "recursive"),
        (BOMB, "aliases that stand for more than"),
        ("a: !!python/object/apply:os.system [x]", "tag"),
        ("a: !!int x", "tag"),
        ("a: !!binary aGk=", "tag"),
        ("a: b\n---\nc: d", "another document"),
        ("a: [1", "line 1"),
        ("\x00", "not allowed"),
        ("a: *b", "undefined alias"),
    ],
)
def test_what_is_not_read_as_written_is_refused(text, words):
    began = time.monotonic()
    with pytest.raises(ConfigError, match=words):
        parse_yaml(text, origin="r.yaml")
    assert time.monotonic() - began < 10


def test_merge_keys_and_aliases_are_read():
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a"
    assert parse_yaml(text, origin="r")["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize("text", ["no", "1e5", "010", "0o7", "1:30", "~", "", ".inf", "é", "a: b"])
def test_what_is_written_is_read_back(text):
    assert parse_yaml(write_yaml({"x": [text, 1e-5, 3]}), origin="r") == {"x": [text, 1e-5, 3]}


def test_a_file_is_a_mapping(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("\ufeffa: 1", encoding="utf-8")
    assert read_yaml(path) == {"a": 1}
    path.write_text("- 1")
    with pytest.raises(ConfigError, match="holds list"):
        read_yaml(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"a": NaN}', "NaN"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "digits"),
        ('"\\ud800"', "surrogate"),
        ('{"a": 1', "delimiter"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_json_is_strict(text, words):
    with pytest.raises(DataError, match=words) as error:
        parse_json(text, origin="rows.jsonl", row=3, error=DataError)
    assert error.value.found.startswith("rows.jsonl, row 3: ")


def test_json_pairs_of_surrogates_are_characters():
    assert parse_json('"\\ud83d\\ude00"', origin="j") == "\U0001f600"
