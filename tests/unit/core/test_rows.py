"""Rows of JSONL files: taken as written, or refused by file and row."""

import contextlib
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.core.errors import DataError
from posttrain.core.rows import parse_object, read_jsonl

BAD = {
    "key twice": ('{"a": 1, "b": 2, "a": 1}', "the key 'a' stands twice"),
    "key twice inside": ('{"m": [{"role": "user", "role": "system"}]}', "the key 'role' stands"),
    "not a number": ('{"a": NaN}', "the number NaN"),
    "infinite": ('{"a": [-Infinity]}', "the number -Infinity"),
    "too large": ('{"a": 1e999}', "the number 1e999"),
    "many digits": ('{"a": ' + "9" * 5000 + "}", "a number of 5000 digits"),
    "digits beyond a float": ('{"a": 1' + "0" * 400 + "}", "a number of 401 digits"),
    "deep": ('{"a": ' + "[" * 150 + "]" * 150 + "}", "brackets more than 100 deep"),
    "very deep": ('{"a": ' + "[" * 99999 + "]" * 99999 + "}", "brackets more than 100 deep"),
    "half a pair": ('{"a": "\\ud83d"}', "half of a surrogate pair"),
    "half a pair in a key": ('{"\\udc00": 1}', "half of a surrogate pair"),
    "raw control character": ('{"a": "x\x00y"}', "not JSON: Invalid control character"),
    "list": ("[1]", "list"),
    "two objects": ('{"a": 1} {"b": 2}', "not JSON: Extra data"),
    "single quotes": ("{'a': 1}", "not JSON"),
    "cut off": ('{"a": "x', "not JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_line_that_readers_would_not_agree_on_is_named(tmp_path, name):
    line, words = BAD[name]
    path = tmp_path / "d.jsonl"
    path.write_text(f'{{"a": 1}}\n\n{line}\n{{"a": 2}}\n')
    with pytest.raises(DataError) as error:
        read_jsonl(path)
    assert error.value.found.startswith(f"{path}, row 3: ")
    assert words in error.value.found
    assert len(str(error.value)) < 600
    bad = []
    assert read_jsonl(path, bad=bad) == [(1, {"a": 1}), (4, {"a": 2})]
    assert [e.found for e in bad] == [error.value.found]


def test_ordinary_rows_are_taken_as_they_are(tmp_path):
    row = {"a": "x\u0000y \u2028 \U0001f600", "n": [1, 2.5, -3e8, 10**200, True, None], "d": {}}
    path = tmp_path / "d.jsonl"
    path.write_bytes(("\ufeff" + json.dumps(row) + "\r\n" + json.dumps(row)).encode())
    assert read_jsonl(path) == [(1, row), (2, row)]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.text(max_size=8)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4), st.booleans())
def test_what_json_writes_is_read_back(row, ascii_only):
    assert parse_object(json.dumps(row, ensure_ascii=ascii_only)) == row


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from('{}[]":,\\u0d8ane1.-+ NaInfity'), max_size=40))
def test_any_line_is_a_row_or_an_error_of_the_tree(line):
    with contextlib.suppress(DataError):
        row = parse_object(line)
        json.dumps(row, ensure_ascii=False).encode()
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float))
