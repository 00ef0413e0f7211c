"""Numbers as people and models write them: the value of each, and what has none."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.tasks.numerals import is_number, last_number, read_last, read_whole, written
from posttrain.tasks.rewards import exact, number

NNBSP, THIN, NBSP, ZWSP = "\N{NARROW NO-BREAK SPACE}", "\N{THIN SPACE}", "\N{NO-BREAK SPACE}", "​"
MINUS, EN_DASH = "\N{MINUS SIGN}", "\N{EN DASH}"

VALUES = {
    # separators: groups of three, the last of two kinds is the decimal sign
    "1,234": "1234",
    "1,234,567 apples": "1234567",
    "12,34,567": "1234567",
    "1'234'567": "1234567",
    "1_000_000": "1000000",
    "1 000 000": "1000000",
    f"1{NNBSP}000{NNBSP}000": "1000000",
    f"1{THIN}000{THIN}000": "1000000",
    f"1{NBSP}000": "1000",
    f"1{ZWSP}000": "1000",
    "1,234.5": "1234.5",
    "1.234,5": "1234.5",
    "1.234.567,5": "1234567.5",
    "1 234,5": "1234.5",
    "1 234 567,89 €": "1234567.89",
    "1.234": "1.234",
    "1,5": "1.5",
    "10,20": "10.2",
    "1,2345": "1.2345",
    "0,123": "0.123",
    ".5": "0.5",
    "12.0": "12",
    # several numbers: the last one
    "1, 2, 3": "3",
    "from 5 to 50": "50",
    "10-3": "3",
    "2*3=6": "6",
    "The answer is 42.": "42",
    "Step 1: 7\n\nAnswer: 7\n": "7",
    # signs
    "x = -3": "-3",
    f"minus {MINUS}4.25!": "-4.25",
    f"x={MINUS}5": "-5",
    f"{EN_DASH}5 degrees": "-5",
    "= - 3": "-3",
    "+5": "5",
    "答案是-42。": "-42",
    # units, percent, currency: they change nothing
    "42%": "42",
    "42 m^2": "42",
    "42 cm²": "42",
    "42 cm2": "42",
    "3.5kg": "3.5",
    r"90^\circ": "90",
    "$1,234.50": "1234.5",
    "-$5": "-5",
    "$-5$": "-5",
    "US$5": "5",
    "USD5": "5",
    "costs $5.": "5",
    "5^{th}": "5",
    # fractions
    "3/4": "3/4",
    "4 / 2": "2",
    "2 1/2": "5/2",
    "½": "1/2",
    "-½": "-1/2",
    "-2½": "-5/2",
    "2½": "5/2",
    r"\frac12": "1/2",
    r"\frac{1}{2}": "1/2",
    r"-\dfrac{1}{2}": "-1/2",
    r"-2\frac12": "-5/2",
    r"\frac{1,000}{3}": "1000/3",
    # powers and scales
    "2e3": "2000",
    "2^10": "1024",
    "10^{-3}": "1/1000",
    "2**3": "8",
    r"5 \times 10^3": "5000",
    "2×10⁻³": "0.002",
    "$1.5 million": "1500000",
    "1e999": str(10**999),
    # LaTeX and Markdown
    r"\boxed{42}": "42",
    r"\boxed{1{,}234}": "1234",
    r"$1\,234$": "1234",
    r"1,\!234": "1234",
    r"\boxed{x = 5}": "5",
    r"\boxed{42\text{ cm}^2}": "42",
    r"\boxed{7}, and 8 is wrong": "7",
    r"\text{42 apples in 3 bags}: \boxed{42}": "42",
    r"\left(7\right)": "7",
    r"100\%": "100",
    r"12 \text{ apples}": "12",
    "**42**": "42",
    "_42_": "42",
    "#### 42": "42",
    "<answer>42</answer>": "42",
    # digits of other scripts
    "４２": "42",
    "٤٢": "42",
    "١٢٫٥": "12.5",
}
NONE = {
    "": "no number",
    "none": "no number",
    "H2O": "no number",
    "x_1": "no number",
    "x_{12}": "no number",
    "1,000,00": "neither one number",
    "1.2.3": "neither one number",
    "12.05.2024": "neither one number",
    "05/12/2024": "a date",
    "3:45": "a time or a ratio",
    "0x1F": "no decimal number",
    "2024-05-12": "a date",
    "+/- 5": "no plain number",
    r"0.\overline{3}": "no plain number",
    r"\binom{5}{2}": "no plain number",
    "1/0": "division by zero",
    "2^x": "no plain number",
    "10^10^10": "no plain number",
    r"2\pi": "no plain number",
    r"\sqrt{2}": "no plain number",
    r"\frac{\sqrt{3}}{2}": "no plain number",
    r"\frac{\pi}{2}": "no plain number",
    "±5": "no plain number",
    "5 ± 2": "no plain number",
    r"12 \boxed{\text{no}}": "the box holds no number",
    r"\boxed{(3, 4)}": "2 numbers in one box",
    "9" * 5000: "longer than 1,000 digits",
    "1e1001": "beyond 10 to the 1,000",
    "1e999999999": "beyond 10 to the 1,000",
    "9^999999999": "longer than 1,000 digits",
    "99^{-9999}": "longer than 1,000 digits",
}


@pytest.mark.parametrize("text", VALUES)
def test_a_number_has_the_value_that_people_give_it(text):
    assert last_number(text) == Fraction(VALUES[text])
    assert number(["q"], [f"So it is {text}"], answer=[VALUES[text]]) == [1.0]


@pytest.mark.parametrize("text", NONE, ids=lambda text: text[:20])
def test_what_has_no_single_value_has_none_and_a_reason(text):
    assert read_last(text).value is None
    assert NONE[text] in read_last(text).reason
    assert len(read_last(text).reason) < 200
    parts = ["0", "1", "2", "3", "4", "5", "9", "00", "45", "2024"]
    assert number(["q"] * len(parts), [text] * len(parts), answer=parts) == [0.0] * len(parts)


@pytest.mark.parametrize(
    "text", ["42", " -1,200.5 ", "$42$", "42%", r"\frac12", r"\boxed{3}", "7."]
)
def test_a_reference_may_carry_what_does_not_change_it(text):
    assert is_number(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("two", "no number in it"),
        ("4 apples", "more than a number: '4 apples'"),
        ("1 or 2", "2 numbers: '1 or 2'"),
        ("10-3", "2 numbers"),
        ("nan", "no number in it"),
        ("Infinity", "no number in it"),
        ("3:45", "a time or a ratio"),
    ],
)
def test_a_reference_that_is_no_number_is_told_why(text, reason):
    assert reason in read_whole(text).reason


@settings(deadline=None)
@given(st.integers(-(10**12), 10**12))
def test_every_integer_is_read_back_however_it_is_grouped(n):
    for text in (str(n), f"{n:,}", f"{n:_}", f" {n} ", f"{n:,}".replace(",", THIN), f"{n}.0"):
        assert last_number(f"answer: {text}") == n
        assert is_number(text)


@settings(deadline=None)
@given(st.decimals(-(10**9), 10**9, places=3))
def test_every_decimal_is_read_back_with_either_sign(d):
    for text in (f"{d:,}", f"{d:,}".translate(str.maketrans(",.", ".,"))):
        if abs(d) >= 1000 or "." in text:
            assert last_number(text) == Fraction(d)


@settings(deadline=None)
@given(st.fractions(-1000, 1000, max_denominator=999))
def test_written_form_is_read_back(value):
    assert last_number(written(value)) == value


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="0123456789.,'_ +-*/^{}()$%\\efracboxdsqt~:xπ½²√\u2009", max_size=60))
def test_any_text_is_read_without_an_error(text):
    assert (read_last(text).value is None) == bool(read_last(text).reason)
    read_whole(text)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_unicode_is_read_without_an_error(text):
    read_last(text)
    read_whole(text)


LONG = ["1" * 200_000, "1 " * 20_000, "1," * 50_000, "\\frac{" * 30_000, "{" * 200_000]
LONG += ["^2" * 50_000, "\\boxed{" * 20_000, "-" * 200_000, "1 000" * 20_000, "1/" * 100_000]
LONG += ["$" * 200_000, "½" * 10_000]


@pytest.mark.parametrize("text", LONG, ids=lambda text: text[:7])
def test_long_texts_take_time_in_proportion(text):
    started = time.process_time()
    read_last(text)
    assert time.process_time() - started < 5


def test_an_answer_that_is_no_number_is_never_right():
    assert number(["q"] * 2, ["none", "3"], answer=["none", "three"]) == [0.0, 0.0]


def test_exact_compares_text():
    assert exact(["q"] * 3, [" 12 ", "12.0", "twelve"], answer=["12"] * 3) == [1.0, 0.0, 0.0]
