"""Chat templates, run as the untrusted code that they are.

A template comes with a model folder and decides what the model reads. It runs in Jinja's sandbox,
as transformers runs it, with three more limits:

    work     every loop, call and text counts against a budget that grows with the messages
    clock    ``strftime_now`` always gives the same day, so that a run does not depend on its date
    chance   ``random`` and ``lipsum`` are refused

For ``{% generation %}`` blocks it reports which characters they wrote.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any, final

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from posttrain.core.errors import DataError, ModelError
from posttrain.core.guard import reading
from posttrain.core.task import Message

Stretch = tuple[int, int]  # [start, end) in characters

DATE = datetime(2024, 7, 26)
"""What the clock of a template shows: the day that Llama's templates fall back to."""

MAX_TEMPLATE = 2_000_000  # characters
BASE_WORK, WORK_PER_CHARACTER = 500_000, 100
MAX_SECONDS = 20.0
MAX_NUMBER = 1_000_000  # in an argument of a call: widths, counts
MAX_PRODUCT = 20_000_000  # characters that one call may make
_BEGIN, _END = "\ufdd2", "\ufdd3"  # noncharacters: no text that is exchanged holds them
_LONG_NUMBER = re.compile(r"[0-9]{5,}")
_GROWING = frozenset(
    {"replace", "join", "expandtabs", "translate", "format", "format_map", "center", "indent"}
    | {"ljust", "rjust", "zfill"}
)
"""Methods and filters that make a text much longer than their own."""


class Refusal(DataError):
    """The template itself refuses the messages (``raise_exception``)."""


@final
class ChatTemplate:
    """A compiled template.

    Args:
        text: the template.
        variables: the tokenizer's special tokens by name, such as ``bos_token``.

    Raises:
        ModelError: it is no template, or far too long.

    Example:
        >>> from posttrain.core.provenance import Role
        >>> shout = ChatTemplate("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
        >>> shout.render([Message(Role.USER, "hi")])
        ('HI', [])
    """

    def __init__(self, text: str, *, variables: Mapping[str, object] | None = None) -> None:
        if len(text) > MAX_TEMPLATE:
            raise ModelError(
                f"a chat template of {len(text):,} characters",
                expected=f"at most {MAX_TEMPLATE:,}",
            )
        self._source, self._variables = text, dict(variables or {})
        self._environment = _Environment()
        with reading(
            "the chat template",
            kind="a Jinja template that transformers can run",
            error=ModelError,
            fix="copy the chat template of the original model again",
        ):
            self._compiled = self._environment.from_string(text)

    @property
    def source(self) -> str:
        """Its text."""
        return self._source

    @property
    def reads_clock(self) -> bool:
        """True when it has asked for the date in some rendering so far."""
        return self._environment.clock_read

    def render(
        self, messages: Sequence[Message], *, generation: bool = False
    ) -> tuple[str, list[Stretch]]:
        """The text, and the stretches that ``{% generation %}`` blocks wrote.

        Raises:
            DataError: the template refuses the turns, fails on them, or does not end.
        """
        turns = [{"role": str(m.role), "content": m.content} for m in messages]
        size = sum(len(m.content) + 20 for m in messages)
        self._environment.begin(BASE_WORK + WORK_PER_CHARACTER * size)
        try:
            with reading("it", kind="a template that ends in a text"):
                text = self._compiled.render(
                    messages=turns,
                    tools=None,
                    documents=None,
                    add_generation_prompt=generation,
                    **self._variables,
                )
        except Refusal as error:
            raise Refusal(
                f"the chat template refuses the turns {_roles(messages)}: {error.found}"
            ) from error
        except DataError as error:
            raise DataError(
                f"the chat template fails on the turns {_roles(messages)}: {error.found}",
                expected=error.expected,
                fix=error.fix,
            ) from error
        return _without_marks(text)


def _roles(messages: Sequence[Message]) -> list[str]:
    roles = [str(m.role) for m in messages]
    return roles if len(roles) <= 8 else [*roles[:4], "…", *roles[-3:]]


def _without_marks(text: str) -> tuple[str, list[Stretch]]:
    """The text without the marks around generation blocks, and the places of the blocks."""
    if _BEGIN not in text and _END not in text:
        return text, []
    parts: list[str] = []
    blocks: list[Stretch] = []
    at, start = 0, None
    for part in re.split(f"([{_BEGIN}{_END}])", text):
        if part == _BEGIN:
            start = at
        elif part == _END:
            if start is not None and at > start:
                blocks.append((start, at))
            start = None
        else:
            parts.append(part)
            at += len(part)
    return "".join(parts), blocks


# --- the sandbox -----------------------------------------------------------------------------


class _Generation(Extension):
    """``{% generation %} … {% endgeneration %}``: puts marks around what the block writes."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's form)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{_BEGIN}{caller()}{_END}"


class _Counted(NodeTransformer):
    """Makes loops, macros, joined texts and slices report to the environment."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._ticking(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._ticking(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._ticking(node)

    def _ticking(self, node: Any) -> nodes.Node:
        written = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_asked("spend", [nodes.Const(1 + written)]), lineno=1))
        return node  # type: ignore[no-any-return]

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _asked("joined", node.nodes, line=node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        given = [nodes.Const(None) if b is None else b for b in bounds]
        return _asked("sliced", [node.node, *given], line=node.lineno)


def _asked(method: str, arguments: list[Any], line: int = 1) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None, lineno=line)


class _Names(Namespace):
    """A namespace whose names do not start with an underscore."""

    def __init__(*args: Any, **names: Any) -> None:
        self, *rest = args
        given = dict(*rest, **names)
        if private := next((n for n in given if str(n).startswith("_")), None):
            raise _out_of_bounds(f"the name {private!r} in a namespace")
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise _out_of_bounds(f"the name {name!r} in a namespace")
        Namespace.__setitem__(self, name, value)


_PASSED = (jinja2.Environment, nodes.EvalContext, Context)
"""What Jinja passes to some filters before their value."""


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up, with a budget for work."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=self._written,
        )
        self.clock_read = False
        self._left: int | None = None  # None: not rendering
        self._until = 0.0
        self.filters = {name: self._guarded(name, f) for name, f in self.filters.items()}
        self.filters["tojson"] = self._guarded("tojson", _to_json)
        self.filters["random"] = _no_chance
        self.globals.pop("lipsum", None)
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": self._strftime_now,
            "dict": dict,
            "namespace": _Names,
        }

    def begin(self, work: int) -> None:
        """Start a rendering that may do this much work."""
        self._left, self._until = work, time.monotonic() + MAX_SECONDS

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Counted().visit(super()._parse(source, name, filename))  # type: ignore[no-any-return]

    def spend(self, work: int) -> str:
        """Take work off the budget."""
        if self._left is None:
            return ""
        self._left -= work
        if self._left < 0 or time.monotonic() > self._until:
            raise _out_of_bounds("it does not come to an end: too many loops, calls or characters")
        return ""

    def joined(self, *parts: object) -> str:
        """``a ~ b``."""
        whole = "".join(map(str, parts))
        self.spend(len(whole))
        return whole

    def sliced(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """``value[start:stop:step]``."""
        return self._paid(value[start:stop:step])

    def call(self, context: Any, called: Any, /, *args: Any, **named: Any) -> Any:
        """A call in the template."""
        name = getattr(called, "__name__", "")
        owner = getattr(called, "__self__", None)
        if name not in ("spend", "joined", "sliced", "_marked"):
            _check_size(name, owner if isinstance(owner, str) else "", (*args, *named.values()))
        self.spend(1)
        return self._paid(super().call(context, called, *args, **named))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The safe version of ``str.format``; None for anything else."""
        safe = super().wrap_str_format(value)
        if safe is not None and _LONG_NUMBER.search(value.__self__):
            raise _out_of_bounds(f"the format {value.__self__[:40]!r}")
        return safe

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator between two values."""
        if operator == "**" and (abs(left) > 10_000 or abs(right) > 64):
            raise _out_of_bounds(f"{left!r:.20} ** {right!r:.20}")
        if operator == "*":
            size = max(_size(left) * _number(right), _size(right) * _number(left))
            if size > MAX_PRODUCT:
                raise _out_of_bounds(f"a text or list of {size:,} items")
        if operator == "%" and isinstance(left, str) and _LONG_NUMBER.search(left):
            raise _out_of_bounds(f"the format {left[:40]!r}")
        out = self._paid(super().call_binop(context, operator, left, right))
        if isinstance(out, int) and abs(out) > 2**64:
            raise _out_of_bounds("a number beyond 64 bits")
        return out

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # with the marks that say what Jinja passes first
        def guarded(*args: Any, **named: Any) -> Any:
            values = [a for a in args if not isinstance(a, _PASSED)]
            first = values[0] if values and isinstance(values[0], str | list) else ""
            _check_size(name, first, (*values[1:], *named.values()))
            self.spend(1)
            return self._paid(function(*args, **named))

        return guarded

    def _paid(self, value: Any) -> Any:
        if size := _size(value):
            self.spend(size)
        return value

    def _written(self, value: Any) -> Any:
        return self._paid(value)

    def _strftime_now(self, form: str) -> str:
        self.clock_read = True
        if _LONG_NUMBER.search(form) or len(form) > 200:
            raise _out_of_bounds(f"the date format {form[:40]!r}")
        return DATE.strftime(form)


def _size(value: object) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict | range) else 0


def _number(value: object) -> int:
    return abs(value) if isinstance(value, int) else 0


def _check_size(name: str, owner: str | list[Any], arguments: Sequence[Any]) -> None:
    """Refuse calls whose result could be huge, before they are made."""
    largest = max((_number(a) for a in arguments), default=0)
    if largest > MAX_NUMBER:
        raise _out_of_bounds(f"{name} with the number {largest!r:.20}")
    if name not in _GROWING:
        return
    if name == "format" and isinstance(owner, str) and _LONG_NUMBER.search(owner):
        raise _out_of_bounds(f"the format {owner[:40]!r}")
    longest = max((max(_number(a), _size(a)) for a in arguments), default=0)
    if (len(owner) + 1) * (longest + 1) > MAX_PRODUCT:
        raise _out_of_bounds(f"{name} could make a text of {len(owner) * longest:,} characters")


def _out_of_bounds(what: str) -> DataError:
    return DataError(what, expected="what a chat template needs: loops over messages, and text")


def _raise(message: object) -> None:
    raise Refusal(" ".join(str(message).split())[:200])


def _no_chance(*_: object) -> None:
    raise _out_of_bounds("it asks for a random choice, so that no run could be repeated")


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML; this is the one that transformers gives to templates.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@lru_cache(maxsize=8)
def compiled(text: str, variables: str) -> ChatTemplate:
    """A template and its variables as JSON, compiled once for all policies that share it."""
    return ChatTemplate(text, variables=json.loads(variables))
