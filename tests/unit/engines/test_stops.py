"""Stop strings are found in the text, at the token that completes them."""

from hypothesis import given
from hypothesis import strategies as st

from posttrain.engines.local.stops import find_stop

PIECES = ["", "a", "b", "ab", "\n", "END", "EN", "D.", "b\nE"]


def decode(ids):
    return "".join(PIECES[i] for i in ids)


def first_by_hand(tokens, stops):
    for end in range(1, len(tokens) + 1):
        if any(s in decode(tokens[:end]) for s in stops):
            return end
    return None


def test_a_stop_string_may_span_tokens_and_end_inside_one():
    tokens = [PIECES.index(p) for p in ("a", "EN", "D.", "a")]
    assert find_stop(tokens, ("END",), decode) == 3
    assert find_stop(tokens, ("END", "aE"), decode) == 2
    assert find_stop(tokens, ("DEN",), decode) is None


def test_parts_of_a_character_complete_nothing():
    data = "naïve é".encode()
    tokens = list(data)
    find = find_stop(tokens, ("é",), lambda ids: bytes(ids).decode(errors="replace"))
    assert find == len(data)


@given(
    st.lists(st.integers(1, len(PIECES) - 1), max_size=30),
    st.lists(st.sampled_from(["ab", "END", "\nE", "b\nEND", "."]), min_size=1, max_size=2),
    st.integers(1, 9),
)
def test_looking_now_and_then_finds_what_looking_always_finds(tokens, stops, every):
    found, searched = None, 0
    while found is None and searched < len(tokens):
        now = min(searched + every, len(tokens))
        found = find_stop(tokens[:now], stops, decode, searched=searched)
        searched = now
    assert found == first_by_hand(tokens, stops)
