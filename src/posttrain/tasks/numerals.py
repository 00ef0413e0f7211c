r"""Numbers as people and models write them, read exactly.

text ──plain──▶ one notation: ASCII digits, -, ^, / ──terms──▶ Numeral per number ──▶ the last

``plain`` undoes what only concerns the look: LaTeX spacing and fonts, digits of other scripts,
superscripts, dashes. ``_terms`` then finds the numbers. What stands where a number stands and has
no single value (``1,000,00``, ``3:45``, ``2\pi``) is a reading without a value and with a reason:
it is never read as a part of itself.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 1000
"""Most digits of a number, and the largest power of ten: arithmetic stays in microseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Numeral:
    """What a text says as a number: a value, or the reason why there is none."""

    value: Fraction | None = None
    reason: str = ""
    start: int = 0  # in the text as `plain` gives it
    end: int = 0


def last_number(text: str) -> Fraction | None:
    r"""The number that a text ends on, exactly; None when there is none, or none that is clear.

    What stands in the last ``\boxed{}`` is the answer where there is one.

    Example:
        >>> last_number("from 1,000 to -2.50"), last_number("so 3/4"), last_number("none")
        (Fraction(-5, 2), Fraction(3, 4), None)
    """
    return read_last(text).value


def read_last(text: str) -> Numeral:
    r"""As :func:`last_number`, with the reason when there is no value.

    Example:
        >>> read_last("at 3:45").reason
        "'3:45' is a time or a ratio"
    """
    boxed = _last_box(text)
    if boxed is not None:
        found = list(_terms(plain(boxed)))
        if len(found) > 1:
            return Numeral(reason=f"{len(found)} numbers in one box")
        return found[0] if found else Numeral(reason="the box holds no number")
    last = Numeral(reason="no number in it")
    for last in _terms(plain(text)):  # noqa: B007
        pass
    return last


def read_whole(text: str) -> Numeral:
    """A text that is one number and nothing else; a currency, a percent sign and a full stop may
    stand beside it.

    Example:
        >>> read_whole(" -1,200.5 ").value, read_whole("4 apples").reason
        (Fraction(-2401, 2), "more than a number: '4 apples'")
    """
    boxed = _last_box(text)
    written = plain(text if boxed is None else boxed)
    found = list(_terms(written))
    if len(found) == 1 and found[0].value is not None:
        around = written[: found[0].start] + written[found[0].end :]
        if around.strip(_BESIDE):
            return Numeral(reason=f"more than a number: {_short(text)}")
    if len(found) > 1:
        return Numeral(reason=f"{len(found)} numbers: {_short(text)}")
    return found[0] if found else Numeral(reason="no number in it")


def is_number(text: str) -> bool:
    """True when the text is one number and nothing else.

    Example:
        >>> is_number(" -1,200.5 "), is_number("4 apples")
        (True, False)
    """
    return read_whole(text).value is not None


def written(value: Fraction) -> str:
    """A number in one form, whatever form it was read in.

    Example:
        >>> written(Fraction(1234)), written(Fraction(-5, 2)), written(Fraction(1, 3))
        ('1234', '-2.5', '1/3')
    """
    if value.denominator == 1:
        return str(value.numerator)
    twos, fives, rest = 0, 0, value.denominator
    while rest % 2 == 0:
        twos, rest = twos + 1, rest // 2
    while rest % 5 == 0:
        fives, rest = fives + 1, rest // 5
    if rest > 1:
        return f"{value.numerator}/{value.denominator}"
    places = max(twos, fives)
    digits = f"{abs(value.numerator) * 10**places // value.denominator:0{places + 1}d}"
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


# --- one notation ----------------------------------------------------------------------------

_MARK = "\ue000"  # in the place of an expression that is no number, such as a root
_GAP = "\N{THIN SPACE}"
_SPACES = " \N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{FIGURE SPACE}\N{PUNCTUATION SPACE}"
_SPACES += "\N{THIN SPACE}\N{SIX-PER-EM SPACE}\N{MEDIUM MATHEMATICAL SPACE}"
_CURRENCY = "$\N{CENT SIGN}\N{POUND SIGN}\N{YEN SIGN}\N{EURO SIGN}\N{INDIAN RUPEE SIGN}"
_CURRENCY += "\N{WON SIGN}\N{RUBLE SIGN}\N{NEW SHEQEL SIGN}\N{DONG SIGN}"
_BESIDE = _SPACES + _CURRENCY + "\t\n\r%\N{PER MILLE SIGN}\N{DEGREE SIGN}.*{}"

_DASHES = "\N{MINUS SIGN}\N{EN DASH}\N{FIGURE DASH}\N{HYPHEN}\N{NON-BREAKING HYPHEN}"
_DASHES += "\N{SMALL HYPHEN-MINUS}\N{FULLWIDTH HYPHEN-MINUS}\N{SUPERSCRIPT MINUS}"
_LOOKS = {ord(c): "-" for c in _DASHES} | {
    ord("\N{FULLWIDTH PLUS SIGN}"): "+",
    ord("\N{FULLWIDTH FULL STOP}"): ".",
    ord("\N{FULLWIDTH COMMA}"): ",",
    ord("\N{FULLWIDTH PERCENT SIGN}"): "%",
    ord("\N{FULLWIDTH SOLIDUS}"): "/",
    ord("\N{FULLWIDTH COLON}"): ":",
    ord("\N{FULLWIDTH DOLLAR SIGN}"): "$",
    ord("\N{ARABIC DECIMAL SEPARATOR}"): ".",
    ord("\N{ARABIC THOUSANDS SEPARATOR}"): ",",
    ord("\N{FRACTION SLASH}"): "/",
    ord("\N{DIVISION SLASH}"): "/",
    ord("\N{RIGHT SINGLE QUOTATION MARK}"): "'",
    ord("\N{MULTIPLICATION SIGN}"): "*",
    ord("\N{MIDDLE DOT}"): "*",
    ord("\N{DOT OPERATOR}"): "*",
    ord("\N{SQUARE ROOT}"): _MARK,
    ord("\N{GREEK SMALL LETTER PI}"): _MARK,
    ord("\N{INFINITY}"): _MARK,
}
_COMMANDS = {
    **dict.fromkeys(("\\,", "\\:", "\\;", "\\ ", "\\thinspace", "~"), _GAP),
    **dict.fromkeys(("\\!", "\\left", "\\right", "\\displaystyle", "\\negthinspace"), ""),
    **dict.fromkeys(("\\(", "\\)", "\\[", "\\]", "\\\\", "\\quad", "\\qquad"), "\n"),
    **{f"\\{sign}": sign for sign in "%$#&_{}"},
    **dict.fromkeys(("\\times", "\\cdot"), "*"),
    **dict.fromkeys(("\\dfrac", "\\tfrac", "\\cfrac"), "\\frac"),
    **dict.fromkeys(("\\pi", "\\infty"), _MARK),
    **dict.fromkeys(("\\pm", "\\mp"), "\N{PLUS-MINUS SIGN}"),
    "\\circ": "\N{DEGREE SIGN}",
    "\\div": "/",
    "{,}": ",",
    "{.}": ".",
    "^\\circ": "\N{DEGREE SIGN}",
    "^{\\circ}": "\N{DEGREE SIGN}",
}
_COMMAND = re.compile(r"\^\{?\\circ(?![A-Za-z])\}?|\{[,.]\}|\\[A-Za-z]+|\\.|~", re.DOTALL)
_FONT = re.compile(r"\\(?:text[a-z]*|math[a-z]+|mbox|operatorname|bf|rm)\s*\{([^{}]*)\}")
_TERM = re.compile(
    r"\\(?:sqrt\s*(?:\[[^\[\]]*\])?|overline|[dt]?binom\s*\{[^{}]*\})\s*(?:\{[^{}]*\}|[0-9A-Za-z])"
)
_ARGUMENT = r"\s*(?:\{([^{}]*)\}|([0-9A-Za-z]))"
_FRACTION = re.compile(r"\\frac" + _ARGUMENT + _ARGUMENT)
_RAISED = re.compile(r"<sup>\s*([-+]?[0-9]+)\s*</sup>")
_SUPERSCRIPT = re.compile(
    "[\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT PLUS SIGN}\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+"
)
_PLUS_MINUS = re.compile(r"(?:\N{PLUS-MINUS SIGN}|\+/-)\s*")
_JOINT = "\ue001"  # before a fraction that was one character: a space if it is part of 2½
_AFTER_DIGIT = re.compile(f"(?<=[0-9]){_JOINT}")
_NESTING = 6  # braces within braces that are followed


def plain(text: str) -> str:
    r"""The text in one notation: what numbers are written with, and nothing about their look.

    Example:
        >>> plain("1{,}234"), plain("\\frac12 m²"), plain("\N{FULLWIDTH DIGIT FOUR}2")
        ('1,234', '1/2 m^{2}', '42')
    """
    if not text.isascii():
        text = _SUPERSCRIPT.sub(_raised_digits, text)
        text = "".join(map(_ascii, text)) if any(map(_odd, text)) else text
        text = _AFTER_DIGIT.sub(" ", text).replace(_JOINT, "")
        text = text.translate(_LOOKS)
    if "<sup>" in text:
        text = _RAISED.sub(r"^{\1}", text)
    if "\\" not in text and "{" not in text and "~" not in text:
        return _PLUS_MINUS.sub(_MARK, text)
    text = _COMMAND.sub(lambda found: _COMMANDS.get(found[0], _circ(found[0])), text)
    for _ in range(_NESTING):
        before = text
        text = _FONT.sub(r"\1", text)
        text = _TERM.sub(_MARK, text)
        text = _FRACTION.sub(_fraction, text)
        if text == before:
            break
    return _PLUS_MINUS.sub(_MARK, text)


def _raised_digits(found: re.Match[str]) -> str:
    digits = unicodedata.normalize("NFKC", found[0]).replace("\N{MINUS SIGN}", "-")
    return f"^{{{digits}}}"


def _circ(command: str) -> str:
    return "\N{DEGREE SIGN}" if command.startswith("^") else command


def _odd(char: str) -> bool:
    return char > "\x7f" and (char.isdigit() or char.isnumeric() or _invisible(char))


def _invisible(char: str) -> bool:
    return unicodedata.category(char) == "Cf"


def _ascii(char: str) -> str:
    """A digit of another script as ASCII, ½ as a fraction."""
    if char <= "\x7f" or not _odd(char):
        return char
    if _invisible(char):
        return ""
    digit = unicodedata.decimal(char, None)
    if digit is not None:
        return str(digit)
    kind, _, rest = unicodedata.decomposition(char).partition(" ")
    letters = "".join(chr(int(code, 16)) for code in rest.split()) if rest else ""
    return f"{_JOINT}{letters}" if kind == "<fraction>" else char


def _fraction(found: re.Match[str]) -> str:
    r"""``\frac{a}{b}`` as a/b, if both are plain numbers; else an expression."""
    above, below = (found[1] or found[2] or "").strip(), (found[3] or found[4] or "").strip()
    if not (_SIMPLE.fullmatch(above) and _SIMPLE.fullmatch(below)):
        return _MARK
    before = found.string[found.start() - 1 : found.start()]
    return f"{' ' if before.isdigit() else ''}{above}/{below}"


_SIMPLE = re.compile(r"[-+]?[0-9][0-9.,]*")
_BOX = re.compile(r"(\\f?boxed\s*\{)|\\.|[{}]", re.DOTALL)


def _last_box(text: str) -> str | None:
    r"""The content of the last ``\boxed{}`` that is closed."""
    if "boxed" not in text:
        return None
    last, opened = None, list[int | None]()  # per open brace, where its box begins
    for found in _BOX.finditer(text):
        if found[1]:
            opened.append(found.end())
        elif found[0] == "{":
            opened.append(None)
        elif found[0] == "}" and opened:
            start = opened.pop()
            last = last if start is None else text[start : found.start()]
    return last


# --- terms -----------------------------------------------------------------------------------

_GROUPED = rf"[0-9]{{1,3}}(?:(?P<gap>[{_SPACES}])[0-9]{{3}}(?:(?P=gap)[0-9]{{3}})*)(?![0-9])"
_SEPARATED = r"[0-9]+(?:[.,'_][0-9]+)*|\.[0-9]+"
_NUMBER = re.compile(
    rf"(?P<mark>{_MARK})|(?P<code>(?<![0-9A-Za-z])0(?:[xX][0-9a-fA-F]+|[oO][0-7]+|[bB][01]+)|"
    r"(?<![0-9])[0-9]{4}-[0-9]{2}-[0-9]{2}(?![0-9]))|"
    rf"(?P<sign>[-+][{_SPACES}]?(?=[{_CURRENCY}0-9.]))?"
    rf"(?P<money>[{_CURRENCY}][{_SPACES}]?(?P<inner>[-+])?)?"
    rf"(?P<digits>{_GROUPED}(?:[.,][0-9]+)?|{_SEPARATED})(?:[eE](?P<power>[-+]?[0-9]+))?"
)
_TIMES_TEN = re.compile(rf"[{_SPACES}]*[*x][{_SPACES}]*10(?:\^|\*\*)\{{?([-+]?[0-9]+)\}}?")
_POWER = re.compile(r"\^(?:\{\s*([^{}]*?)\s*\}|([-+]?[0-9]+|[A-Za-z]+))|\*\*([0-9]+)")
_MIXED = re.compile(rf"[{_SPACES}]([0-9]+)/([0-9]+)(?![0-9/]|[.,][0-9])")
_OVER = re.compile(rf"[{_SPACES}]?/[{_SPACES}]?({_SEPARATED})")
_CHAIN = re.compile(r"(?::[0-9]+)+")
_SCALE = re.compile(
    rf"[{_SPACES}]?(?:(hundred)|(thousand)|(million)|(billion)|(trillion))s?\b", re.IGNORECASE
)
_SCALES = (2, 3, 6, 9, 12)  # powers of ten of the words, in their order
_BEFORE_MARK = re.compile(rf"[{_SPACES}*]*{_MARK}")
_AFTER_MARK = re.compile(rf"(?:[*/({{]?(?:{_SEPARATED})|{_MARK})*")
_CODES = re.compile(
    r"(?<![A-Za-z])(?:USD|EUR|GBP|JPY|CNY|INR|CHF|CAD|AUD|NZD|HKD|SGD|KRW|BRL|SEK|NOK|DKK|Rs)$"
)
_ORDINALS = frozenset({"st", "nd", "rd", "th", "\N{DEGREE SIGN}"})
_GROUPING = re.compile(r"[0-9]{1,3}(?:([,.'_])[0-9]{3})(?:\1[0-9]{3})*")
_INDIAN = re.compile(r"[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}")


def _terms(text: str) -> Iterator[Numeral]:
    """Everything in the text that stands where a number stands, in order."""
    at = 0
    while found := _NUMBER.search(text, at):
        at = found.end()
        if found["mark"]:
            after = _AFTER_MARK.match(text, at)
            at = after.end() if after else at
            yield _unclear(text, found.start(), at, "an expression and no plain number")
        elif found["code"]:
            yield _unclear(text, found.start(), at, "a date or no decimal number")
        elif _is_part_of_a_name(text, found):
            while over := _OVER.match(text, at):
                at = over.end()
        else:
            reading = _term(text, found)
            at = reading.end
            yield reading


def _unclear(text: str, start: int, end: int, why: str) -> Numeral:
    shown = _short(text[start:end].replace(_MARK, "\N{HORIZONTAL ELLIPSIS}"))
    return Numeral(reason=f"{shown} is {why}", start=start, end=end)


def _is_part_of_a_name(text: str, found: re.Match[str]) -> bool:
    """True for the digits of x1, x_{12}, cm2 or m^2, in an alphabet that puts spaces between
    words and numbers."""
    start = found.start("digits")
    if found["money"]:
        return False
    before = text[max(0, start - 8) : start].rstrip("{")
    if before.endswith("^"):
        return True
    word = before.rstrip("_")
    if word != before:  # x_1 is a name, _1_ is emphasis
        return _is_letter(word[-1:]) or word[-1:].isdigit()
    return _is_letter(before[-1:]) and not _CODES.search(before)


def _is_letter(char: str) -> bool:
    """True for letters of the Latin, Greek and Cyrillic alphabets."""
    return char.isalpha() and (char < "\u0530" or "\u1e00" <= char < "\u2000")


def _is_sign(text: str, at: int, sign: str) -> bool:
    """Whether a minus is a sign, and not between two operands."""
    before = text[max(0, at - 4) : at]
    if len(sign) > 1:  # a space after it
        return before.rstrip()[-1:] in tuple("=(<>{[\N{ALMOST EQUAL TO}")
    last = before[-1:]
    return not (_is_letter(last) or last.isdigit() or last in tuple(f")]}}_{_MARK}"))


def _term(text: str, found: re.Match[str]) -> Numeral:
    """The number that begins here, with all that belongs to it."""
    start, end = found.start(), found.end()
    if found["sign"] and not _is_sign(text, start, found["sign"]):
        start += len(found["sign"])
        negative = False
    else:
        negative = "-" in (found["sign"] or "")
    negative ^= "-" in (found["inner"] or "")
    try:
        value = _decimal(found["digits"]) * _ten(found["power"] or "0")
        value, end = _extended(text, end, value, whole=found["digits"].isdigit())
    except _NoNumber as error:
        return _unclear(text, start, max(end, error.end), error.why)
    return Numeral(value=-value if negative else value, start=start, end=end)


class _NoNumber(Exception):
    """What was found has no single value."""

    def __init__(self, why: str, *, end: int = 0) -> None:
        super().__init__(why)
        self.why, self.end = why, end


def _extended(text: str, end: int, value: Fraction, *, whole: bool) -> tuple[Fraction, int]:
    """The value with what follows the digits: powers, fractions, words such as million."""
    if ten := _TIMES_TEN.match(text, end):
        value, end = value * _ten(ten[1]), ten.end()
    elif power := _POWER.match(text, end):
        end = power.end()
        value = _raised(value, power[1] or power[2] or power[3] or "", end=end)
        if again := _POWER.match(text, end):
            raise _NoNumber("an expression and no plain number", end=again.end())
    elif chain := _CHAIN.match(text, end):
        raise _NoNumber("a time or a ratio", end=chain.end())
    elif mixed := _MIXED.match(text, end) if whole else None:
        above, below = int(mixed[1][:_MOST]), int(mixed[2][:_MOST])
        if 0 < above < below:
            value, end = value + Fraction(above, below), mixed.end()
    elif over := _OVER.match(text, end):
        below_value, end = _decimal(over[1]), over.end()
        if _OVER.match(text, end) or _POWER.match(text, end):
            chain = re.compile(rf"(?:/(?:{_SEPARATED})|\^\{{?[0-9]*\}}?)*").match(text, end)
            raise _NoNumber("a date or a longer term", end=chain.end() if chain else end)
        if not below_value:
            raise _NoNumber("a division by zero", end=end)
        value /= below_value
    if scale := _SCALE.match(text, end):
        words = [i for i in range(len(_SCALES)) if scale[i + 1]]
        value, end = value * 10 ** _SCALES[words[0]], scale.end()
    if mark := _BEFORE_MARK.match(text, end):
        after = _AFTER_MARK.match(text, mark.end())
        raise _NoNumber("an expression and no plain number", end=after.end() if after else 0)
    return value, end


_MOST = 9  # digits of the parts of a mixed number


def _decimal(digits: str) -> Fraction:
    """The value of digits with separators, where it is clear.

    One comma before anything but three digits is a decimal comma; before three digits it groups.
    Where both signs occur, the last one is the decimal sign.
    """
    if len(digits) > MAX_DIGITS:
        raise _NoNumber(f"longer than {MAX_DIGITS:,} digits")
    for space in _SPACES:
        digits = digits.replace(space, "")
    signs = [c for c in digits if not c.isdigit()]
    whole, point, rest = digits, "", ""
    grouped = _GROUPING.fullmatch(digits) or _INDIAN.fullmatch(digits)
    if signs and signs[-1] in ".," and signs.count(signs[-1]) == 1:
        apart = len(set(signs)) == 2
        if apart or not grouped or signs == ["."] or digits.startswith("0"):
            whole, point, rest = digits.rpartition(signs[-1])
    if whole and not whole.isdigit():
        clear = _GROUPING.fullmatch(whole) or _INDIAN.fullmatch(whole)
        if not clear or (point and point in whole):
            raise _NoNumber("neither one number nor clearly several")
    for sign in ",.'_":
        whole = whole.replace(sign, "")
    return Fraction(int((whole or "0") + rest), 10 ** len(rest))


def _ten(power: str) -> Fraction:
    """A power of ten."""
    if len(power) > 6 or abs(int(power)) > MAX_DIGITS:
        raise _NoNumber(f"beyond 10 to the {MAX_DIGITS:,}")
    return Fraction(10) ** int(power)


def _raised(base: Fraction, power: str, *, end: int) -> Fraction:
    """A whole power; ordinals (5^{th}) and degrees are no powers."""
    if power in _ORDINALS:
        return base
    if not re.fullmatch("[-+]?[0-9]+", power):
        raise _NoNumber("an expression and no plain number", end=end)
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if len(power) > 6 or size * abs(int(power)) > MAX_DIGITS * 4:
        raise _NoNumber(f"longer than {MAX_DIGITS:,} digits", end=end)
    if not base and int(power) < 0:
        raise _NoNumber("a division by zero", end=end)
    return base ** int(power)


def _short(text: str, limit: int = 40) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= limit else f"{text[: limit - 1]}\N{HORIZONTAL ELLIPSIS}")
