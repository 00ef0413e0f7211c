"""Planters of faults in rows of data and in rewards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from silent_failures.planting import planted, same_as_twin, same_rewards
from silent_failures.world import HELD_OUT, Setup, demonstration, turn

OTHERS = "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"


def _columns(setup: Setup, **columns: Any) -> None:
    setup.write("demos.jsonl", [{**row, **columns} for row in setup.rows("demos.jsonl")])


TOOLS = [{"type": "function", "function": {"name": "times", "description": "a * b"}}]


@planted("tools-dropped", names="tools")
def tools_dropped(setup: Setup) -> None:
    _columns(setup, tools=TOOLS)


@planted("images-dropped", names="image")
def images_dropped(setup: Setup) -> None:
    _columns(setup, images=["a.png"])


@planted("bad-rows-learnt", names="label")
def bad_rows(setup: Setup) -> None:
    rows = setup.rows("demos.jsonl")
    setup.write(
        "demos.jsonl",
        [
            {
                "prompt": r["messages"][:1],
                "completion": r["messages"][1:],
                "label": bool(i % 2),
            }
            for i, r in enumerate(rows)
        ],
    )


@planted("pair-of-equals", names="equal|same|identical")
def pair_of_equals(setup: Setup) -> None:
    setup.write("pairs.jsonl", [{**r, "rejected": r["chosen"]} for r in setup.rows("pairs.jsonl")])


@planted("pair-of-strangers", names="prompt|question|differ")
def pair_of_strangers(setup: Setup) -> None:
    rows = setup.rows("pairs.jsonl")
    others = [*rows[1:], rows[0]]
    setup.write(
        "pairs.jsonl",
        [
            {"chosen": a["prompt"] + a["chosen"], "rejected": b["prompt"] + b["rejected"]}
            for a, b in zip(rows, others, strict=True)
        ],
    )


@planted("duplicate-rows", names="duplicate|same row|equal rows|repeat|twice|times")
def duplicates(setup: Setup) -> None:
    rows = setup.rows("demos.jsonl")
    setup.write("demos.jsonl", [*rows, *[rows[0]] * 40])


@planted("rows-too-long", names="longer|too long|context|truncat|exceed|left out|skipped")
def too_long(setup: Setup) -> None:
    rows = setup.rows("demos.jsonl")
    for row in rows[::2]:
        row["messages"][0]["content"] += " very long" * 30
    setup.write("demos.jsonl", rows)


@planted("answers-missing", names="answer|none|null|missing")
def answers_missing(setup: Setup) -> None:
    rows = setup.rows("tasks.jsonl")
    for row in rows[::2]:
        row["answer"] = None
    setup.write("tasks.jsonl", rows)


def _reads_answer(setup: Setup, column: str) -> None:
    rows = setup.rows("tasks.jsonl")
    setup.write("tasks.jsonl", [{"prompt": r["prompt"], column: str(r["answer"])} for r in rows])
    (setup.folder / "reward.py").write_text(
        "def score(prompts, completions, **columns):\n"
        "    rights = columns.get('answer') or [None] * len(completions)\n"
        "    return [float(c.strip() == r) for c, r in zip(completions, rights)]\n"
    )


@planted(
    "answer-column-misnamed",
    twin=lambda s: _reads_answer(s, "answer"),
    names="answer|solution|equal|zero|no_signal",
)
def misnamed(setup: Setup) -> None:
    _reads_answer(setup, "solution")


def _built_in(setup: Setup, reward: str, answers: Sequence[object]) -> None:
    rows = setup.rows("tasks.jsonl")
    setup.write(
        "tasks.jsonl",
        [{**r, "answer": a} for r, a in zip(rows, answers, strict=True)],
    )
    setup.recipe["tasks"]["products"]["reward"] = reward


def _answers(setup: Setup) -> list[int]:
    return [int(r["answer"]) for r in setup.rows("tasks.jsonl")]


@planted(
    "answer-is-a-float",
    twin=lambda s: _built_in(s, "exact", _answers(s)),
    names="float|answer|no_signal",
    right=same_rewards,
)
def float_answers(setup: Setup) -> None:
    _built_in(setup, "exact", [float(a) for a in _answers(setup)])


@planted(
    "number-misread",
    twin=lambda s: _built_in(s, "number", [f"{a}000" for a in _answers(s)]),
    names="number|separator|no_signal",
    right=same_rewards,
)
def misread(setup: Setup) -> None:
    """Thousands: an answer of 12 is wrong where 12 000 is right."""
    _built_in(setup, "number", [f"{a} 000" for a in _answers(setup)])


@planted("empty-answers", names="empty|nothing")
def empty_answers(setup: Setup) -> None:
    rows = setup.rows("demos.jsonl")
    for row in rows:
        row["messages"][1]["content"] = ""
    setup.write("demos.jsonl", rows)


def _lines(setup: Setup, name: str = "demos.jsonl") -> list[str]:
    return (setup.folder / name).read_text().splitlines()


@planted("json-key-twice", names="twice|duplicate")
def key_twice(setup: Setup) -> None:
    lines = _lines(setup)
    wrong = json.dumps([turn("user", "1 * 1"), turn("assistant", "9")])
    lines[2] = lines[2][:-1] + f', "messages": {wrong}}}'
    (setup.folder / "demos.jsonl").write_text("\n".join(lines) + "\n")


@planted("json-cut-off", names="json")
def cut_off(setup: Setup) -> None:
    text = "\n".join(_lines(setup))
    (setup.folder / "demos.jsonl").write_text(text[:-40])


@planted("half-a-character", names="surrogate|utf|unicode|character")
def half_character(setup: Setup) -> None:
    lines = _lines(setup)
    lines[2] = lines[2].replace('"content": "', '"content": "\\ud83d', 2)
    (setup.folder / "demos.jsonl").write_text("\n".join(lines) + "\n")


def _two_sets(setup: Setup, weights: list[float]) -> None:
    rows = setup.rows("demos.jsonl")
    setup.write("more.jsonl", rows[16:])
    setup.write("demos.jsonl", rows[:16])
    setup.method.clear()
    setup.method.update(
        name="compose",
        source={
            "type": "mix",
            "parts": [
                {"type": "dataset", "path": "demos.jsonl"},
                {"type": "dataset", "path": "more.jsonl"},
            ],
            "shares": weights,
        },
        terms=[{"type": "cross_entropy"}],
    )


@planted("weights-of-data-all-zero", twin=lambda s: _two_sets(s, [0.5, 0.5]), names="weight|share")
def all_zero(setup: Setup) -> None:
    _two_sets(setup, [0.0, 0.0])


def _from_tasks(setup: Setup, part: slice) -> None:
    setup.write("demos.jsonl", [demonstration(t) for t in setup.rows("tasks.jsonl")[part]])


@planted(
    "held-out-in-demonstrations",
    twin=lambda s: _from_tasks(s, slice(0, 24)),
    names="held.out|measured prompt|contaminat|leak",
)
def in_demonstrations(setup: Setup) -> None:
    _from_tasks(setup, slice(-HELD_OUT - 8, None))


def _second_set(setup: Setup, rows: list[dict[str, Any]]) -> None:
    setup.write("second.jsonl", rows)
    tasks = setup.recipe["tasks"]
    tasks["second"] = {**tasks["products"], "path": "second.jsonl", "held_out": 4}
    setup.method["tasks"] = ["second"]


def _others(setup: Setup) -> list[dict[str, Any]]:
    rows = setup.rows("tasks.jsonl")[:24]
    setup.write("tasks.jsonl", setup.rows("tasks.jsonl")[24:])
    return rows


@planted(
    "held-out-in-training-tasks",
    twin=lambda s: _second_set(s, _others(s)),
    names="held.out|measured prompt|contaminat|leak",
)
def in_tasks(setup: Setup) -> None:
    _second_set(setup, setup.rows("tasks.jsonl")[-24:][::-1])


# --- rewards ---------------------------------------------------------------------------------


def _reward(body: str, *, name: str = "score"):  # type: ignore[no-untyped-def]
    def write(setup: Setup) -> None:
        head = f"def {name}(prompts, completions, answer, **columns):\n"
        text = "\n".join("    " + line for line in body.splitlines())
        (setup.folder / "reward.py").write_text(head + text + "\n")

    return write


MEANT = "import re\nreturn [float(c.strip() == str(a)) for c, a in zip(completions, answer)]"
PATTERN = (
    "import re\n"
    "found = [re.search(r'^#### (\\d+)$', c) for c in completions]\n"
    "return [float(bool(m) and m[1] == str(a)) for m, a in zip(found, answer)]"
)

planted("reward-always-zero", twin=_reward(MEANT), names="no_signal|zero|equal|same")(
    _reward(PATTERN)
)
planted("reward-always-one", twin=_reward(MEANT), names="no_signal|equal|same")(
    _reward("return [float(bool(a or c)) for c, a in zip(completions, answer)]")
)
planted(
    "reward-by-chance",
    twin=_reward("return [len(set(c)) / 9 for c in completions]"),
    names="chance|twice|random|differ|again",
)(_reward("import random\nreturn [random.random() for c in completions]"))
planted(
    "reward-nan",
    twin=_reward("return [len(set(c)) / len(c) if len(c) > 2 else 0.0 for c in completions]"),
    names="nan|finite",
)(_reward("return [len(set(c)) / len(c) if len(c) > 2 else float('nan') for c in completions]"))
planted("reward-one-short", twin=_reward(MEANT), names="scores|length|number of")(
    _reward("return [float(c == str(a)) for c, a in zip(completions, answer) if len(c) != 1]")
)
planted("reward-exits", twin=_reward(MEANT), names="exit")(_reward("import sys\nsys.exit(0)"))
planted("reward-changes-folder", twin=_reward(MEANT), names="folder|directory", right=same_as_twin)(
    _reward("import os, tempfile\nos.chdir(tempfile.gettempdir())\n" + MEANT)
)
planted("reward-import-missing", twin=_reward(MEANT), names="import|module")(
    _reward("import a_library_that_is_not_here\n" + MEANT)
)


def _long_answers(setup: Setup, room: int) -> None:
    setup.method["max_new_tokens"] = room


@planted("answers-cut", names="cut off|clipped|truncated")
def answers_cut(setup: Setup) -> None:
    _long_answers(setup, 2)


@planted("answers-cut-in-teaching", names="cut off|clipped|truncated")
def cut_in_teaching(setup: Setup) -> None:
    _long_answers(setup, 1)
