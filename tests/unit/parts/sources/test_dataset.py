"""The data-set source: formats, order, what is trained, and every file that must be refused."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from posttrain.chat.renderer import ChatRenderer
from posttrain.core.errors import ConfigError, DataError, ModelError
from posttrain.core.provenance import Kind, Producer, Role
from posttrain.core.rows import read_jsonl
from posttrain.core.trajectory import Column
from posttrain.parts.sources.dataset import Dataset, DatasetRows

MARKED = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>{% endgeneration %}"
    "{% else %}{{ m.content }}<end>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def renderer(template=MARKED):
    """One token per byte; <end> is one token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    fast.chat_template = template
    return ChatRenderer(fast)


RENDERER = renderer()


def user(content):
    return {"role": "user", "content": content}


def bot(content):
    return {"role": "assistant", "content": content}


def source(tmp_path, rows, *, with_renderer=RENDERER, context=1000, seed=0, **options):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "d.jsonl").write_text("\n".join(lines), encoding="utf-8")
    spec = Dataset(**{"path": "d.jsonl", **options})
    return DatasetRows(spec, root=tmp_path, renderer=with_renderer, context=context, seed=seed)


def refused(tmp_path, rows, **options):
    with pytest.raises(DataError) as error:
        source(tmp_path, rows, **options)
    return str(error.value)


RAW = [{"prompt": f"{i}+1=", "completion": f"{i + 1}"} for i in range(5)]
PAIR = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
CHAT = {"messages": [user("hi"), bot("yo"), user("bye"), bot("ciao")]}


# --- formats ---------------------------------------------------------------------------------


def test_raw_completions(tmp_path):
    s = source(tmp_path, RAW)
    assert s.format == "completion"
    assert s.num_groups == 5
    assert s.num_tokens == 5 * (4 + 1 + 1)  # "i+1=", the digit, the end
    assert s.num_trainable == 5 * 2
    assert s.preview(2) == "2+1=⟦3<end>⟧"


@pytest.mark.parametrize(("mask", "template"), [("template", MARKED), ("prefix", UNMARKED)])
def test_messages(tmp_path, mask, template):
    s = source(tmp_path, [CHAT], assistant_mask=mask, with_renderer=renderer(template))
    assert s.format == "messages"
    assert s.preview() == (
        "[user]hi<end>\n[assistant]⟦yo<end>⟧\n[user]bye<end>\n[assistant]⟦ciao<end>⟧\n"
    )


def test_conversational_completion_trains_the_completion_alone(tmp_path):
    row = {"prompt": CHAT["messages"][:3], "completion": CHAT["messages"][3:]}
    assert source(tmp_path, [row]).preview() == (
        "[user]hi<end>\n[assistant]yo<end>\n[user]bye<end>\n[assistant]⟦ciao<end>⟧\n"
    )


def test_raw_pairs_carry_preferences_and_share_their_prompt(tmp_path):
    s = source(tmp_path, [PAIR], preference=True)
    [group] = s.draw(1, step=0)
    chosen, rejected = group.members
    assert (chosen.scalar(Column.PREFERENCE), rejected.scalar(Column.PREFERENCE)) == (1.0, -1.0)
    assert s.preview() == "1+1=⟦2<end>⟧\n1+1=⟦3<end>⟧"
    assert chosen.trajectory.prompt_length == rejected.trajectory.prompt_length == 4
    assert s.num_tokens == 12


HELLO = user("hi")
PAIR_SHOWN = "[user]hi<end>\n[assistant]⟦yo<end>⟧\n\n[user]hi<end>\n[assistant]⟦yuck<end>⟧\n"


@pytest.mark.parametrize("mask", ["template", "prefix"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [HELLO], "chosen": [bot("yo")], "rejected": [bot("yuck")]},
        {"chosen": [HELLO, bot("yo")], "rejected": [HELLO, bot("yuck")]},
        {"prompt": "hi", "chosen": [HELLO, bot("yo")], "rejected": [HELLO, bot("yuck")]},
    ],
)
def test_three_ways_to_write_a_conversational_pair(tmp_path, row, mask):
    s = source(tmp_path, [row], preference=True, assistant_mask=mask)
    assert s.preview() == PAIR_SHOWN
    chosen, rejected = (m.trajectory for m in s.draw(1, step=0)[0].members)
    # "yo" and "yuck" start alike; the shared prompt ends before them all the same.
    assert chosen.prompt_length == rejected.prompt_length == len("[user]hi") + 2 + 11


def test_preference_stage_picks_the_pairs_of_a_file_that_has_both(tmp_path):
    row = {**PAIR, **CHAT}
    assert source(tmp_path, [row], preference=True).format == "preference"
    assert source(tmp_path, [row]).format == "messages"


def test_parquet_gives_the_same_groups_as_jsonl(tmp_path):
    rows = [CHAT, {"messages": [user("é"), bot("ü")]}]
    lines = source(tmp_path, rows, name="d")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    spec = Dataset(path="d.parquet", name="d")
    table = DatasetRows(spec, root=tmp_path, renderer=RENDERER, context=100, seed=0)
    old, new = lines.draw(2, step=0), table.draw(2, step=0)
    assert [g.task for g in old] == [g.task for g in new]
    assert [g.members[0].trajectory.tokens.tolist() for g in old] == [
        g.members[0].trajectory.tokens.tolist() for g in new
    ]


# --- provenance ------------------------------------------------------------------------------


def test_author_digest_and_keys(tmp_path):
    s = source(tmp_path, RAW, author=Kind.HUMAN, licence="CC-BY-4.0")
    digest = hashlib.sha256((tmp_path / "d.jsonl").read_bytes()).hexdigest()
    author = Producer(kind=Kind.HUMAN, name="d", digest=digest)
    (file,) = s.files
    assert (file.digest, file.producer) == (digest, author)
    assert (file.licence, file.name) == ("CC-BY-4.0", "d")
    groups = s.draw(5, step=0)
    assert len({g.task for g in groups}) == 5
    for group in groups:
        name, _, key = group.task.partition("/")
        assert (name, len(key)) == ("d", 16)
        t = group.members[0].trajectory
        assert t.task == group.task
        assert {(span.role, span.producer) for span in t.spans} == {
            (Role.USER, author),
            (Role.ASSISTANT, author),
        }
    assert source(tmp_path, RAW, name="sums").files[0].name == "sums"


@pytest.mark.parametrize("author", [Kind.LEARNER, Kind.TEMPLATE, Kind.ENVIRONMENT])
def test_authors_that_cannot_have_written_a_file(tmp_path, author):
    with pytest.raises(ConfigError, match=f"author {author}"):
        source(tmp_path, RAW, author=author)


# --- order -----------------------------------------------------------------------------------


def tasks(groups):
    return [g.task for g in groups]


@settings(max_examples=25, deadline=None)
@given(
    num_rows=st.integers(1, 9),
    num_groups=st.integers(1, 20),
    num_steps=st.integers(1, 6),
    seed=st.integers(-3, 2**40),
)
def test_every_epoch_is_a_permutation_across_draw_borders(
    tmp_path_factory, num_rows, num_groups, num_steps, seed
):
    rows = [{"prompt": f"{i}", "completion": "x"} for i in range(num_rows)]
    s = source(tmp_path_factory.mktemp("d"), rows, seed=seed)
    drawn = [t for step in range(num_steps) for t in tasks(s.draw(num_groups, step=step))]
    assert len(drawn) == num_steps * num_groups
    for start in range(0, len(drawn), num_rows):
        epoch = Counter(drawn[start : start + num_rows])
        assert max(epoch.values()) == 1


def test_draws_are_a_function_of_seed_and_step(tmp_path):
    rows = [{"prompt": f"{i}", "completion": "x"} for i in range(50)]
    one, same, other = (source(tmp_path, rows, seed=s) for s in (1, 1, 2))
    forward = [tasks(one.draw(8, step=i)) for i in range(20)]
    backward = [tasks(same.draw(8, step=i)) for i in reversed(range(20))]
    assert forward == backward[::-1]
    assert forward[0] != tasks(other.draw(8, step=0))
    epochs = [tasks(one.draw(50, step=i)) for i in range(2)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])


# --- length ----------------------------------------------------------------------------------

LONG = [*RAW, {"prompt": "1+1=", "completion": "2" * 20}]


def test_too_long_names_row_length_and_limit(tmp_path):
    message = refused(tmp_path, LONG, context=24)
    assert "d.jsonl, row 6: 25 tokens" in message
    assert "at most 24" in message
    assert source(tmp_path, LONG, context=25).files[0].skipped == 0


def test_too_long_rows_can_be_skipped_and_are_counted(tmp_path):
    s = source(tmp_path, LONG, context=24, too_long="skip")
    assert (s.files[0].skipped, s.num_groups, s.num_tokens) == (1, 5, 30)
    assert "all 6 rows are longer than 3" in refused(tmp_path, LONG, context=3, too_long="skip")


def test_the_longer_side_of_a_pair_decides(tmp_path):
    row = {"prompt": "p", "chosen": "x", "rejected": "y" * 9}
    assert "11 tokens" in refused(tmp_path, [row], context=10, preference=True)


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": ', "row 2: not JSON"),
        ("[1]", "row 2: list"),
        ({"prompt": "x"}, r"row 2: no completion; columns ['prompt']"),
        ({"prompt": "x", "completion": ""}, "row 2: an empty completion"),
        ({"prompt": "x", "completion": " \n"}, "row 2: an empty completion"),
        ({"prompt": "", "completion": "x"}, "row 2: nothing stands before"),
        ({"prompt": "x", "completion": 3}, "prompt of type str and completion of type int"),
        ({"prompt": "x", "completion": [bot("y")]}, "prompt of type str and completion of type"),
        ({"prompt": None, "completion": "y"}, "prompt of type nothing"),
        ({"prompt": [user("x")], "completion": []}, "row 2: completion: an empty list"),
        ({"prompt": [user("x")], "completion": [user("y")]}, "completion without an assistant"),
        ({"prompt": [user("x")], "completion": [bot(" ")]}, "an empty assistant turn"),
        ({"prompt": [user("x")], "completion": [user("y"), bot("z")]}, "one of role user"),
        ({"prompt": [bot("x")], "completion": [bot("y")]}, "ends with a turn of role assistant"),
    ],
)
def test_bad_completion_rows(tmp_path, row, message):
    found = refused(tmp_path, [RAW[0], row])
    assert message in found
    assert "d.jsonl, row 2" in found


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "an empty list"),
        ("hi", "str for messages"),
        ([user("x")], "without an assistant turn"),
        ([user("x"), bot("")], "an empty assistant turn"),
        ([user("x"), {"role": "gpt", "content": "y"}], "the role 'gpt'"),
        ([user("x"), {"from": "gpt", "value": "y"}], "the keys ['from', 'value']"),
    ],
)
def test_bad_messages_rows(tmp_path, messages, message):
    found = refused(tmp_path, [CHAT, {"messages": messages}])
    assert "d.jsonl, row 2" in found
    assert message in found


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PAIR, "rejected": "2"}, "chosen and rejected are equal"),
        ({**PAIR, "rejected": ""}, "an empty rejected"),
        ({**PAIR, "chosen": " "}, "an empty chosen"),
        ({"prompt": "p", "chosen": "x"}, "no rejected"),
        ({"chosen": "x", "rejected": "y"}, "prompt of type nothing"),
        ({**PAIR, "rejected": [bot("y")]}, "rejected of type list"),
        ({"chosen": [HELLO, bot("x")], "rejected": [HELLO, bot("x")]}, "equal, or one continues"),
        ({"chosen": [HELLO, bot("x")], "rejected": [HELLO]}, "equal, or one continues"),
        ({"chosen": [user("a"), bot("x")], "rejected": [HELLO, bot("x")]}, "share no first"),
        (
            {"prompt": "other", "chosen": [HELLO, bot("x")], "rejected": [HELLO, bot("y")]},
            "prompt is text, and not the last turn",
        ),
        (
            {"prompt": [HELLO], "chosen": [bot("x")], "rejected": [bot("x")]},
            "chosen and rejected are equal",
        ),
    ],
)
def test_bad_pairs(tmp_path, row, message):
    found = refused(tmp_path, [PAIR, row], preference=True)
    assert "d.jsonl, row 2" in found
    assert message in found


def test_unknown_columns_name_those_found_and_the_formats_known(tmp_path):
    message = refused(tmp_path, [{"instruction": "x", "output": "y"}])
    assert "['instruction', 'output']" in message
    assert "prompt + completion, messages, or" in message
    assert "prompt + chosen + rejected" in message


def test_stage_and_file_must_agree_on_preferences(tmp_path):
    assert "are demonstrations, and the stage learns from preferences" in refused(
        tmp_path, RAW, preference=True
    )
    assert "are preference pairs, and the stage learns from demonstrations" in refused(
        tmp_path, [PAIR]
    )
    assert "are preference pairs" in refused(tmp_path, [PAIR], format="preference")
    assert "are demonstrations" in refused(tmp_path, [CHAT], format="messages", preference=True)


@pytest.mark.parametrize("named", ["messages", "preference"])
def test_named_format_that_does_not_fit(tmp_path, named):
    message = refused(tmp_path, RAW, format=named)
    assert f"['completion', 'prompt'] with `format: {named}`" in message


def test_named_format_settles_an_ambiguous_file(tmp_path):
    row = {**RAW[0], **CHAT}
    assert "more than one format: completion, messages" in refused(tmp_path, [row])
    assert source(tmp_path, [row], format="messages").format == "messages"


def test_empty_missing_and_foreign_files(tmp_path):
    assert "is empty" in refused(tmp_path, [])
    assert "no file" in refused(tmp_path, [], path="none.jsonl")
    assert "no file" in refused(tmp_path, [], path="none.parquet")
    assert "a .jsonl or .parquet file" in refused(tmp_path, [], path="d.csv")
    (tmp_path / "bad.parquet").write_bytes(b"not parquet at all")
    assert "expected: a whole Parquet file" in refused(tmp_path, [], path="bad.parquet")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "e.parquet")
    assert "is empty" in refused(tmp_path, [], path="e.parquet")


# --- what is trained -------------------------------------------------------------------------


def test_template_without_generation_block(tmp_path):
    message = refused(tmp_path, [CHAT], with_renderer=renderer(UNMARKED))
    assert "generation" in message
    assert "assistant_mask: prefix" in message


NEVER = MARKED.replace("m.role == 'assistant'", "m.role == 'nobody'")
NO_END = MARKED.replace("<end>{% endgeneration %}", "{% endgeneration %}<end>")


def test_mask_that_is_empty_everywhere(tmp_path):
    message = refused(tmp_path, [CHAT, CHAT], with_renderer=renderer(NEVER))
    assert "no trainable token in 2 rows" in message
    assert "assistant_mask: prefix" in message
    pair = {"chosen": [HELLO, bot("yo")], "rejected": [HELLO, bot("yuck")]}
    found = refused(tmp_path, [pair], preference=True, with_renderer=renderer(NEVER))
    assert "row 1: an answer of the pair has no trainable token" in found


def test_end_token_outside_the_mask_is_refused(tmp_path):
    message = refused(tmp_path, [CHAT], with_renderer=renderer(NO_END))
    assert "no end-of-turn token" in message
    assert "never learn to stop" in message


def test_prefix_failure_names_the_row(tmp_path):
    growing = UNMARKED.replace("[{{ m.role }}]", "[{{ m.role }} of {{ messages | length }}]")
    message = refused(tmp_path, [CHAT], assistant_mask="prefix", with_renderer=renderer(growing))
    assert "d.jsonl, row 1: the template renders" in message


def test_conversations_need_a_template(tmp_path):
    with pytest.raises(ModelError, match="no chat template"):
        source(tmp_path, [CHAT], with_renderer=renderer(None))
    assert source(tmp_path, RAW, with_renderer=renderer(None)).num_groups == 5


def test_plain_documents_train_every_token_that_something_precedes(tmp_path):
    data = source(tmp_path, [{"text": "one two"}, {"text": "three"}])
    assert data.format == "text"
    for group in data.draw(2, step=0):
        trajectory = group.members[0].trajectory
        assert trajectory.prompt_length == 0
        assert trajectory.trainable.all()
        assert int(trajectory.tokens[-1]) in RENDERER.end_tokens
    with pytest.raises(DataError, match="text of type"):
        source(tmp_path, [{"text": " "}])


def test_half_a_surrogate_pair_is_named_by_row(tmp_path):
    path = tmp_path / "d.jsonl"
    good = '{"prompt": "a", "completion": "\\ud83d\\ude00"}'
    path.write_text(good + "\n")
    assert len(read_jsonl(path)) == 1
    path.write_text(good + '\n{"prompt": "a", "completion": "\\ud83d"}\n')
    with pytest.raises(DataError, match="row 2: half of a surrogate pair"):
        read_jsonl(path)
