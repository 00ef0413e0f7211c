"""Task sets: the split, the scorers, and every way in which a user can get them wrong."""

from __future__ import annotations

import json
import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.core.errors import ConfigError, DataError, TaskError
from posttrain.core.provenance import Role
from posttrain.core.task import Message, ReadsAnswers, Task
from posttrain.tasks.jsonl import JsonlTasks
from posttrain.tasks.reasoning_gym import ReasoningGym
from posttrain.tasks.rewards import find_reward

PRIMES = ReasoningGym(
    dataset="prime_factorization",
    config={"min_value": 2, "max_value": 11},  # ten distinct questions
    train=30,
    held_out=4,
)


def gym(tmp_path, *, chat=True, **changes):
    fields = {f: getattr(PRIMES, f) for f in PRIMES.__struct_fields__}
    return ReasoningGym(**{**fields, **changes}).build("primes", root=tmp_path, chat=chat)


def jsonl(tmp_path, rows, *, chat=True, **changes):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    spec = JsonlTasks(**{"path": "t.jsonl", "held_out": 1, **changes})
    return spec.build("sums", root=tmp_path, chat=chat)


def with_reward(tmp_path, body, rows=None, **changes):
    (tmp_path / "r.py").write_text(body, encoding="utf-8")
    rows = rows or [{"prompt": p, "answer": "2"} for p in "abc"]
    return jsonl(tmp_path, rows, reward="r.py:f", **changes)


# --- reasoning-gym ---------------------------------------------------------------------------


def test_gym_split_is_disjoint_distinct_and_of_the_size_asked_for(tmp_path):
    tasks = gym(tmp_path)
    held_out = [t.text for t in tasks.held_out]
    train = [t.text for t in tasks.train]
    assert (len(held_out), len(set(held_out)), len(train)) == (4, 4, 30)
    assert not set(held_out) & set(train)
    assert len(set(train)) <= 6 < len(train)  # ten questions, four held out: train repeats
    assert all(t.key.startswith("primes/") for t in (*tasks.train, *tasks.held_out))


def test_gym_is_deterministic_and_its_seed_matters(tmp_path):
    wide = {"config": {"max_value": 100000}}
    first, again, other = (gym(tmp_path, seed=s, **wide) for s in (0, 0, 100000))
    assert [t.key for t in first.train] == [t.key for t in again.train]
    assert [t.key for t in first.train] != [t.key for t in other.train]
    assert first.digest == again.digest != other.digest


def test_more_training_tasks_leave_the_held_out_ones_alone(tmp_path):
    small, large = gym(tmp_path, train=3), gym(tmp_path, train=60)
    assert small.held_out == large.held_out
    assert small.train == large.train[:3]


@pytest.mark.parametrize("chat", [True, False])
def test_gym_prompt_is_a_user_turn_or_plain_text(tmp_path, chat):
    task = gym(tmp_path, chat=chat).held_out[0]
    assert "prime factorization" in task.text
    assert task.prompt == ((Message(Role.USER, task.text),) if chat else task.text)
    assert task.columns["difficulty"] == {"value": (2, 11)}


def test_gym_scores_are_the_librarys_and_unreadable_answers_are_wrong(tmp_path):
    tasks = gym(tmp_path)
    task = next(t for t in tasks.train if " × " in t.answer)
    # The library gives 0.5 for the right product, 0.01 for another number, and raises on text.
    product = str(math.prod(int(f) for f in task.answer.split(" × ")))
    completions = [task.answer, product, "13", "it is two", ""]
    assert tasks.score([task] * 5, completions) == [1.0, 0.5, 0.01, 0.0, 0.01]
    assert tasks.success == 1.0


def test_gym_too_few_distinct_questions(tmp_path):
    with pytest.raises(TaskError, match=r"gave 10 distinct questions .* 10 held out, 0 items left"):
        gym(tmp_path, held_out=10, train=5)
    with pytest.raises(TaskError, match=r"gave 10 distinct questions"):
        gym(tmp_path, held_out=11, train=5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "prime_factorisation"}, "did you mean 'prime_factorization'"),
        ({"config": {"max_valu": 9}}, "did you mean 'max_value'"),
        ({"config": {"max_value": 1}}, "AssertionError: max_value must be >= min_value"),
        ({"config": {"max_value": "many"}}, "refuses the config of prime_factorization: TypeError"),
        ({"config": {"size": 10}}, "set train, held_out and seed"),
        ({"train": 0}, "train is 0"),
        ({"held_out": -1}, "held_out is -1"),
    ],
)
def test_gym_bad_specifications(tmp_path, changes, message):
    with pytest.raises((TaskError, ConfigError), match=message):
        gym(tmp_path, **changes)


def test_gym_missing_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(TaskError, match=r"pip install 'posttrain\[tasks\]'"):
        gym(tmp_path)


@pytest.mark.parametrize("score", [math.nan, math.inf, None, "1"])
def test_gym_scorer_that_returns_no_number(tmp_path, monkeypatch, score):
    from reasoning_gym.arithmetic.prime_factorization import PrimeFactorizationDataset

    tasks = gym(tmp_path)
    monkeypatch.setattr(PrimeFactorizationDataset, "score_answer", lambda *_, **__: score)
    with pytest.raises(TaskError, match=rf"scored '2' with {score!r}"):
        tasks.score(tasks.train[:1], ["2"])


def test_gym_scorer_that_raises_on_its_own_answers_is_refused(tmp_path, monkeypatch):
    from reasoning_gym.arithmetic.prime_factorization import PrimeFactorizationDataset

    def broken(self, answer, entry):
        return entry["no such key"]

    monkeypatch.setattr(PrimeFactorizationDataset, "score_answer", broken)
    with pytest.raises(TaskError, match="raised on the library's own answer: KeyError"):
        gym(tmp_path)


# --- files -----------------------------------------------------------------------------------


def test_jsonl_holds_out_the_last_rows_after_removing_duplicates(tmp_path):
    rows = [{"prompt": p, "answer": "1"} for p in ["a", "b", "a", "c", "d", "a"]]
    tasks = jsonl(tmp_path, rows, held_out=2)
    assert [t.text for t in tasks.train] == ["a", "b"]
    assert [t.text for t in tasks.held_out] == ["c", "d"]
    assert tasks.num_duplicates == 2


def test_jsonl_same_prompt_with_another_answer_is_a_duplicate(tmp_path):
    rows = [{"prompt": p, "answer": a} for p, a in [("a", "1"), ("b", "1"), ("a", "2")]]
    tasks = jsonl(tmp_path, rows)
    assert [(t.text, t.answer) for t in (*tasks.train, *tasks.held_out)] == [("a", "1"), ("b", "1")]


def test_jsonl_same_prompt_as_text_and_as_message_is_one_prompt(tmp_path):
    message = [{"role": "user", "content": "a"}]
    rows = [{"prompt": p, "answer": "1"} for p in ["a", "b", message]]
    tasks = jsonl(tmp_path, rows)
    assert ([t.text for t in tasks.train], [t.text for t in tasks.held_out]) == (["a"], ["b"])


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=20), st.integers(0, 8))
def test_jsonl_split_never_leaks(tmp_path_factory, prompts, held_out):
    rows = [{"prompt": p, "answer": "1"} for p in prompts]
    distinct = list(dict.fromkeys(prompts))
    folder = tmp_path_factory.mktemp("t")
    if held_out >= len(distinct):
        with pytest.raises(TaskError, match=f"{len(distinct)} distinct prompts"):
            jsonl(folder, rows, held_out=held_out)
        return
    tasks = jsonl(folder, rows, held_out=held_out)
    assert [t.text for t in (*tasks.train, *tasks.held_out)] == distinct
    assert len(tasks.held_out) == held_out


@pytest.mark.parametrize("chat", [True, False])
def test_jsonl_text_prompt_follows_chat(tmp_path, chat):
    tasks = jsonl(tmp_path, [{"prompt": p, "answer": "1"} for p in "ab"], chat=chat)
    assert tasks.train[0].prompt == ((Message(Role.USER, "a"),) if chat else "a")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "row 2: not JSON"),
        ({"question": "x"}, r"row 2: columns \['question'\]"),
        ({"prompt": " ", "answer": "1"}, "row 2: an empty prompt"),
        ({"prompt": 3, "answer": "1"}, "row 2: int for messages as prompt"),
        ({"prompt": [], "answer": "1"}, "row 2: an empty list for messages"),
        ({"prompt": [{"role": "bot", "content": "x"}], "answer": "1"}, "row 2: .*'bot'"),
        ({"prompt": [{"role": "assistant", "content": "x"}], "answer": "1"}, "row 2: .*ends with"),
        ({"prompt": "x"}, "row 2: no answer"),
        ({"prompt": "x", "answer": None}, "row 2: no answer"),
        ({"prompt": "x", "answer": ["1"]}, "row 2: an answer of type list"),
        ({"prompt": "x", "answer": True}, "row 2: an answer of type bool"),
        ({"prompt": "x", "answer": " "}, "row 2: no answer"),
        ({"prompt": "x", "answer": 10**1000}, "row 2: a number of 1001 digits"),
        ({"prompt": "x", "answer": "1", "completions": 3}, "row 2: a column named 'completions'"),
    ],
)
def test_jsonl_bad_rows_name_file_and_row(tmp_path, row, message):
    with pytest.raises(DataError, match=rf"t\.jsonl, {message}"):
        jsonl(tmp_path, [{"prompt": "a", "answer": "1"}, row])


def test_jsonl_empty_and_missing_files(tmp_path):
    with pytest.raises(DataError, match="is empty"):
        jsonl(tmp_path, [])
    with pytest.raises(DataError, match="no file"):
        jsonl(tmp_path, [], path="u.jsonl")


def test_jsonl_conversation_for_a_model_without_template(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "x"}], "answer": "1"}]
    with pytest.raises(TaskError, match="no chat template"):
        jsonl(tmp_path, rows, chat=False)


def test_jsonl_negative_held_out(tmp_path):
    with pytest.raises(ConfigError, match="held_out is -1"):
        jsonl(tmp_path, [{"prompt": "a", "answer": "1"}], held_out=-1)


def test_jsonl_reads_the_answer_that_its_reward_judges(tmp_path):
    rows = [{"prompt": "a", "answer": "2"}]
    number = jsonl(tmp_path, rows, held_out=0, reward="number")
    assert isinstance(number, ReadsAnswers)
    texts = ["so 4 / 2 = 2.0", "it is 2.", "2", "1,000", "1e3", "no  idea\n"]
    assert [number.final_answer(t) for t in texts] == ["2", "2", "2", "1000", "1000", "no idea"]
    exact = jsonl(tmp_path, rows, held_out=0, reward="exact")
    assert exact.final_answer(" so\n2 ") == "so 2"


def test_jsonl_number_reward_needs_a_numeric_answer(tmp_path):
    with pytest.raises(DataError, match="row 1: the answer 'two'"):
        jsonl(tmp_path, [{"prompt": "a", "answer": "two"}], reward="number")


def test_jsonl_identity_follows_the_file_and_the_reward(tmp_path):
    body = "def f(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n"
    first = with_reward(tmp_path, body).digest
    assert with_reward(tmp_path, body).digest == first
    assert with_reward(tmp_path, body + "# changed\n").digest != first
    rows = [{"prompt": p, "answer": "3"} for p in "abc"]
    assert with_reward(tmp_path, body, rows).digest != first


def test_tasks_of_another_set_are_refused(tmp_path):
    foreign = Task(taskset="sums", prompt="zzz", answer="1")
    for tasks in (jsonl(tmp_path, [{"prompt": p, "answer": "1"} for p in "ab"]), gym(tmp_path)):
        with pytest.raises(TaskError, match=f"task {foreign.key} is not of task set {tasks.name}"):
            tasks.score([foreign], ["1"])
        with pytest.raises(TaskError, match="1 tasks and 2 completions"):
            tasks.score(tasks.train[:1], ["1", "2"])


# --- rewards ---------------------------------------------------------------------------------


def test_builtin_exact_and_number(tmp_path):
    rows = [{"prompt": "a", "answer": "0.50"}, {"prompt": "b", "answer": 7}]
    exact = jsonl(tmp_path, rows, held_out=0)
    a, b = exact.train
    assert exact.score([a, a, b, b], [" 0.50\n", ".5", "7", "it is 7"]) == [1.0, 0.0, 1.0, 0.0]
    number = jsonl(tmp_path, rows, held_out=0, reward="number")
    completions = ["so .5", "1/2", "it is 7.", "7 or 8", "no idea"]
    assert number.score([a, a, b, b, b], completions) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert exact.score([], []) == []


def test_user_reward_gets_prompts_as_in_the_file_and_all_columns(tmp_path):
    body = (
        "import json, pathlib\n"
        "from dataclasses import dataclass\n"
        "seen = pathlib.Path(__file__).with_name('seen.json')\n"
        "@dataclass\nclass Note:\n    text: 'str'\n"
        "def f(prompts, completions, **columns):\n"
        "    seen.write_text(json.dumps([prompts, completions, columns]))\n"
        "    return [len(c) for c in completions]\n"
    )
    turns = [{"role": "user", "content": "b"}]
    rows = [{"prompt": "a", "answer": 2, "level": 1}, {"prompt": turns, "unit": "m"}]
    tasks = with_reward(tmp_path, body, rows, held_out=0)
    assert tasks.score(list(tasks.train), ["x", ""]) == [1.0, 0.0]
    prompts, completions, columns = json.loads((tmp_path / "seen.json").read_text())
    assert prompts == ["a", turns]
    assert completions == ["x", ""]
    assert columns == {"answer": ["2", None], "level": [1, None], "unit": [None, "m"]}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("1.0", "returned float: 1.0"),
        ("[1.0]", "returned 1 scores"),
        ("[10**400, 0.0]", "returned a whole number of 1,329 bits for row 1 of the batch"),
        ("(1.0 for _ in prompts)", "returned generator"),
        ("[0.0, 'good']", "returned 'good' for row 2 of the batch, prompt 'b'"),
        ("[0.0, None]", "returned None for row 2 of the batch, prompt 'b'"),
        ("[float('nan'), 0.0]", "returned nan for row 1 of the batch, prompt 'a'"),
        ("[0.0, float('-inf')]", "returned -inf for row 2 of the batch, prompt 'b'"),
        ("[len(1), 0.0]", "raised TypeError: .*on row 1 of the batch, prompt 'a'"),
        ("[1 / (p != 'b') for p in prompts]", "ZeroDivisionError: .*on row 2 of the batch"),
        ("[0.0, 0.0] if len(prompts) == 1 else {}[0]", "KeyError: 0, .*on no row alone"),
    ],
)
def test_user_reward_that_misbehaves(tmp_path, returned, message):
    body = f"def f(prompts, completions, **columns):\n    return {returned}\n"
    tasks = with_reward(tmp_path, body)
    with pytest.raises(
        TaskError, match=rf"reward r\.py:f {message}|reward r\.py:f raised {message}"
    ):
        tasks.score(list(tasks.train), ["x", "y"])


def test_user_reward_may_return_numpy_numbers_and_truth_values(tmp_path):
    body = (
        "import numpy as np\n"
        "def f(prompts, completions, **columns):\n"
        "    return np.array([c == 'x' for c in completions])\n"
    )
    tasks = with_reward(tmp_path, body)
    assert tasks.score(list(tasks.train), ["x", "y"]) == [1.0, 0.0]


def test_long_prompts_are_shortened_in_messages(tmp_path):
    body = "def f(prompts, completions, **columns):\n    return None\n"
    rows = [{"prompt": letter * 5000} for letter in "ab"]
    body = body.replace("None", "['?']")
    tasks = with_reward(tmp_path, body, rows)
    with pytest.raises(TaskError) as error:
        tasks.score(list(tasks.train), ["x"])
    assert "aaaa" in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exakt", "did you mean 'exact'"),
        ("r.py:", "no reward named"),
        (":f", "no reward named"),
        ("none.py:f", "no reward file"),
        ("r.py:score", "did you mean 'scores'"),
        ("r.py:LIMIT", "has no function 'LIMIT'"),
        ("broken.py:f", r"while it was loaded, raised ZeroDivisionError.*broken\.py:1"),
        ("syntax.py:f", r"syntax\.py:1 is not Python: SyntaxError"),
        ("notes.txt:f", "is not a Python file"),
    ],
)
def test_rewards_that_cannot_be_loaded(tmp_path, name, message):
    (tmp_path / "r.py").write_text("LIMIT = 3\ndef scores(prompts, completions): return []\n")
    (tmp_path / "broken.py").write_text("1 / 0\ndef f(): ...\n")
    (tmp_path / "syntax.py").write_text("def f(:\n")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(TaskError, match=message):
        find_reward(name, tmp_path).score(["a"], ["b"], {"answer": ["c"]})
