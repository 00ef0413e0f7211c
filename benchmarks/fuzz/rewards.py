"""Hostile rewards: asked as a run asks them; refused in words, or answered with finite numbers.

A case is a file with a function, made of four draws: how it is defined, what it does that a reward
should not, when it does it, and what it returns.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fuzz.frame import Trial
from posttrain.tasks.jsonl import JsonlTasks, JsonlTaskSet
from posttrain.tasks.trial import try_rewards

SECONDS = 0.5
"""Time limit of a reward per completion: what hangs is stopped soon."""

DEEDS = (
    *(
        "sys.exit(0)",
        "sys.exit('x')",
        "sys.exit(None)",
        "os._exit(0)",
        "os.execv('/bin/true', ['t'])",
    ),
    *("raise SystemExit", "raise KeyboardInterrupt", "raise GeneratorExit", "raise StopIteration"),
    *("raise MemoryError", "raise BaseException('b')", "raise asyncio.CancelledError", "1 / 0"),
    *("raise ExceptionGroup('g', [ValueError(1)] * 3)", "raise Mute", "raise Loud", "raise Rude"),
    *("raise UnicodeDecodeError('u', b'x', 0, 1, 'y')", "raise SyntaxError('s')", "assert False"),
    *("raise SyntaxError('s', ('f', 'line', 2, 'x'))", "raise OSError(28, 'No space left')"),
    *("raise TaskError('mine')", "raise PosttrainError('p')", "raise ValueError('v' * 100000)"),
    *(
        "deep(0)",
        "eval('(' * 500)",
        "json.loads('[' * 100000)",
        "int('9' * 10000)",
        "str(10**10000)",
    ),
    *(
        "while True: pass",
        "time.sleep(100)",
        "threading.Lock().acquire(); L.acquire(); L.acquire()",
    ),
    *("swallow()", "os.chdir('/')", "os.environ.clear()", "os.environ['X'] = '\\udcff'"),
    *("sys.path.clear()", "sys.path.insert(0, '/')", "sys.stdout.close()", "sys.stdout = None"),
    *("sys.stderr = io.StringIO()", "print('x' * 10000)", "print('\\ud800')", "os.umask(0o777)"),
    *(
        "signal.alarm(1)",
        "signal.signal(signal.SIGINT, signal.SIG_IGN)",
        "sys.setrecursionlimit(60)",
    ),
    *(
        "signal.setitimer(signal.ITIMER_REAL, 0.01)",
        "signal.signal(signal.SIGUSR1, signal.SIG_IGN)",
    ),
    *("random.seed(0)", "np.random.seed(0)", "np.seterr(all='raise')", "gc.disable()"),
    *("warnings.warn('w')", "warnings.simplefilter('error')", "logging.disable(50)"),
    *("threading.Thread(target=swallow, daemon=True).start()", "os.fork()", "sys.settrace(None)"),
    *("os.fork() or os._exit(0)", "prompts.clear()", "completions.clear()", "columns.clear()"),
    *("completions.append('x')", "[c.clear() for c in columns.values()]", "del prompts[:]"),
    *(
        "prompts[0].append(1)",
        "globals().clear()",
        "builtins_len()",
        "sys.modules.pop('json', None)",
    ),
    *("import nosuch", "from nosuch import x", "import beside", "import broken", "import leaves"),
    *("importlib.import_module('hidden')", "sys.path.append('elsewhere'); import faraway"),
    *("open('nowhere').read()", "open(__file__).read()", "subprocess.run(['false'], check=True)"),
    *("multiprocessing.get_context('fork').Pool(1).map(len, completions)", "input()", "pass"),
    *("asyncio.run(asyncio.sleep(0))", "threading.main_thread().join(0.01)", "sys.exc_info()"),
    *(
        "signal.raise_signal(signal.SIGALRM)",
        "signal.raise_signal(signal.SIGUSR1)",
        "exit()",
        "quit()",
    ),
    *("os.close(os.open(os.devnull, 0))", "atexit.register(print)", "__import__('this')", "help()"),
)
RETURNS = (
    *("[1.0] * n", "[len(c) for c in completions]", "[True] * n", "(0.5,) * n", "np.ones(n)"),
    *(
        "np.zeros((n, 1))",
        "np.ones(n, np.float16)",
        "np.ones(n, object)",
        "np.array(1.0)",
        "[np.int8(1)] * n",
    ),
    *("[np.float64('nan')] * n", "[float('nan')] * n", "[float('inf')] * n", "[-1e308 * 10] * n"),
    *(
        "[10**400] * n",
        "[-(10**5000)] * n",
        "[1e-320] * n",
        "[Fraction(1, 3)] * n",
        "[Decimal(1)] * n",
    ),
    *("[1j] * n", "['1'] * n", "[b'1'] * n", "[None] * n", "[[1.0]] * n", "[{}] * n", "[...] * n"),
    *("None", "1.0", "'1' * n", "b'1' * n", "{}", "{i: 1.0 for i in range(n)}", "set(range(n))"),
    *("range(n)", "(1.0 for _ in range(n))", "iter([1.0] * n)", "map(float, [1] * n)", "object()"),
    *("[]", "[1.0] * (n + 1)", "[1.0] * (n - 1)", "[1.0]", "[[]] * n", "later()", "[later()] * n"),
    *(
        "Liar([1.0] * n)",
        "Endless([1.0] * n)",
        "Thrower([1.0] * n)",
        "[Odd(1)] * n",
        "[Sly(1.0)] * n",
    ),
    *("[Shy()] * n", "Shy()", "NotImplemented", "Ellipsis", "f", "type", "[f] * n", "completions"),
    *(
        "prompts",
        "columns",
        "sys",
        "memoryview(b'1' * n)",
        "bytearray(n)",
        "array.array('d', [1] * n)",
    ),
    *(
        "np.ma.masked_all(n)",
        "np.array(['1'] * n)",
        "np.array([None] * n)",
        "collections.deque([1.0] * n)",
    ),
    *("[random.random() for _ in range(n)]", "[time.time()] * n", "[id(completions)] * n"),
)
WHENS = (
    "",
    "",
    "if calls == 1: ",
    "if calls == 2: ",
    "if calls > 2: ",
    "if n > 2: ",
    "if n == 1: ",
)
FORMS = (
    "def f(prompts, completions, **columns):\n{body}",
    "def f(prompts, completions, **columns):\n{body}",
    "def f(prompts, completions, **columns):\n{body}",
    "def f(prompts, completions, answer=None, **columns):\n    answer = answer\n{body}",
    "def f(completions, prompts, **columns):\n{body}",
    "def f(*, prompts, completions, **columns):\n{body}",
    "def f(prompts, completions):\n    columns = {{}}\n{body}",
    "def f(prompts):\n    completions, columns = prompts, {{}}\n{body}",
    "async def f(prompts, completions, **columns):\n{body}",
    "def f(prompts, completions, **columns):\n    yield 1.0\n{body}",
    "def g(prompts, completions, **columns):\n{body}\nf = functools.partial(g)",
    "class f:\n    def __new__(cls, prompts, completions, **columns):\n        return g(prompts, "
    "completions, **columns)\ndef g(prompts, completions, **columns):\n{body}",
    "class G:\n    def __call__(self, prompts, completions, **columns):\n        return g(prompts, "
    "completions, **columns)\ndef g(prompts, completions, **columns):\n{body}\nf = G()",
    "def g(prompts, completions, **columns):\n{body}\nglobals()['f'] = g",
    "def g(prompts, completions, **columns):\n{body}\nf = contextlib.suppress()(g) if 0 else g",
    "f = 3\ndef g(prompts, completions, **columns):\n{body}",
    "def h(prompts, completions, **columns):\n{body}",
)
PRELUDE = """
import array, asyncio, atexit, builtins, collections, contextlib, functools, gc, importlib, io, json
import logging, multiprocessing, os, random, signal, subprocess, sys, threading, time, warnings
from decimal import Decimal
from fractions import Fraction
import numpy as np
from posttrain.core.errors import PosttrainError, TaskError
L = threading.Lock()
calls = 0
class Mute(Exception):
    def __str__(self): raise ValueError
class Loud(BaseException):
    def __str__(self): return "x" * 10**6
class Rude(Exception):
    def __str__(self): sys.exit(0)
    __repr__ = __str__
class Liar(list):
    def __len__(self): return 10**6
class Endless(list):
    def __iter__(self):
        while True: yield 1.0
class Thrower(list):
    def __len__(self): raise KeyboardInterrupt
class Odd(int):
    def __float__(self): return float("nan")
class Sly(float):
    def __float__(self): sys.exit(0)
class Shy:
    def __repr__(self): raise SystemExit
    __str__ = __repr__
    def __getattr__(self, name): raise MemoryError
    def __len__(self): return -1
async def later(): return 1.0
def deep(i): return deep(i + 1)
def builtins_len(): raise TypeError("len() of unsized object")
def swallow():
    for _ in range(10**9):
        try: time.sleep(0.01)
        except Exception: pass
"""
BESIDE = {
    "beside.py": "VALUE = 1\n",
    "broken.py": "def f(:\n",
    "leaves.py": "import sys\nsys.exit(0)\n",
    "hidden.py": "VALUE = 2\n",
    "elsewhere/faraway.py": "VALUE = 3\n",
}
SPOILT = (
    *(
        b"\xff\xfe def f",
        b"x = 1\0",
        b"# -*- coding: nonsense -*-\n",
        b"(" * 5000,
        b"",
        b"\n" * 10**6,
    ),
    *(b"def f(prompts, completions, **columns): return [\n", b"lambda" * 1000, b"\xef\xbb\xbf"),
    *(
        b"x = " + b"-" * 20000 + b"1\n",
        b"x = " + b"9" * 10000 + b"\n",
        "f = '\N{SNOWMAN}'\n".encode(),
    ),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One reward file."""

    number: int
    words: str
    content: bytes
    function: str = "f"


def cases(seed: int) -> Iterator[Case]:
    """Reward files without end; the same for the same seed."""
    number = 0
    while True:
        yield _case(number, random.Random(f"rewards/{seed}/{number}"))
        number += 1


def _case(number: int, rng: random.Random) -> Case:
    if rng.random() < 0.06:
        content = rng.choice(SPOILT)
        return Case(
            number, f"file {content[:20]!r}", content, rng.choice(("f", "f", "g", "__doc__"))
        )
    # One thing is odd, and sometimes two or three: else the first would hide the others.
    odd = {
        rng.choice(("form", "deed", "deed", "return", "return"))
        for _ in range(rng.choice((1, 1, 2, 3)))
    }
    form = rng.choice(FORMS) if "form" in odd else FORMS[0]
    deed = rng.choice(DEEDS) if "deed" in odd else "pass"
    returned = rng.choice(RETURNS) if "return" in odd else RETURNS[1]
    when = rng.choice(WHENS)
    if rng.random() < 0.15:  # when the file is loaded
        top, inside, place = f"{_at_top(deed)}\n", "pass", "when loaded: "
    else:
        top, inside, place = "", deed, when
    lines = [
        "global calls",
        "calls += 1; n = len(completions)",
        f"{when if inside != 'pass' else ''}{_deed(inside)}",
        f"return {returned}",
    ]
    body = "\n".join(f"    {line}" for line in lines)
    if "yield" in form:
        body = body.replace("return ", "yield ")
    content = PRELUDE + top + form.format(body=body) + "\n"
    return Case(number, f"{place}{deed} → {returned} in {form[:24]!r}", content.encode())


def _deed(deed: str) -> str:
    """A deed as one statement that may follow an ``if``."""
    return f"exec({deed!r}, globals(), locals())" if deed.startswith("while") else deed


def _at_top(deed: str) -> str:
    """A deed outside of a function, where the batch has no names yet."""
    return f"prompts, completions, columns, n = [['a']], ['b'], {{}}, 1\n{deed}"


def trials(folder: Path, *, num: int, seed: int) -> Iterator[Trial]:
    """The cases as trials, each in a folder of its own."""
    for _, case in zip(range(num), cases(seed), strict=False):
        home = folder / f"reward-{case.number}"
        home.mkdir(exist_ok=True)
        for name, content in BESIDE.items():
            (home / name).parent.mkdir(exist_ok=True)
            (home / name).write_text(content)
        (home / "r.py").write_bytes(case.content)
        rows = [{"prompt": [{"role": "user", "content": f"{c}?"}], "answer": c} for c in "abcdef"]
        (home / "t.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        command = _command(folder, home, case)
        yield Trial(case.number, case.words, _Asked(home, case), command)


def _command(folder: Path, home: Path, case: Case) -> tuple[str, ...]:
    """A recipe that trains on the reward."""
    tasks = {
        "type": "jsonl",
        "path": "t.jsonl",
        "reward": f"r.py:{case.function}",
        "held_out": 2,
        "reward_seconds": SECONDS,
    }
    method = {"name": "grpo", "tasks": ["t"], "group_size": 2, "max_new_tokens": 2}
    stage = {"name": "s", "method": method, "budget": {"steps": 1}, "groups_per_step": 2}
    tree = {
        "name": "fuzz",
        "model": str(folder / "base"),
        "threads": 1,
        "tasks": {"t": tasks},
        "measure": {"samples": 2, "max_new_tokens": 2},
        "stages": [stage],
    }
    (home / "r.yaml").write_text(json.dumps(tree))
    return ("run", f"{home.name}/r.yaml", "--out", f"{home.name}/out")


class _Asked:
    """Ask a reward as a run does: found, tried, then draws of several sizes."""

    def __init__(self, home: Path, case: Case) -> None:
        self._home, self._case = home, case

    def __call__(self) -> bool:
        spec = JsonlTasks(
            path="t.jsonl",
            reward=f"r.py:{self._case.function}",
            held_out=2,
            reward_seconds=SECONDS,
        )
        made = spec.build("t", root=self._home, chat=True)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            return self._asked(made)

    def _asked(self, made: JsonlTaskSet) -> bool:
        proofs = list(try_rewards([made]))
        for size in (4, 1, 3):
            scores = made.score(made.train[:size], ["a", "", "b 1", "\N{SNOWMAN}"][:size])
            if len(scores) != size or not all(abs(s) < float("inf") for s in scores):
                raise AssertionError(f"scores {scores!r:.80} for {size} completions")
        return len(proofs) == 1
