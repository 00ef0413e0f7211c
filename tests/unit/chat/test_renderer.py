"""The renderer: who wrote which token, what is trained, and what is refused."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from posttrain.chat.messages import messages_from
from posttrain.chat.renderer import ChatRenderer
from posttrain.chat.tokenizer import token_texts
from posttrain.core.errors import DataError, ModelError
from posttrain.core.provenance import Kind, Producer, Role
from posttrain.core.rows import read_jsonl
from posttrain.core.task import Message, Task
from posttrain.lab.tour import BASE

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content | trim }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
BOOK = Producer(kind=Kind.HUMAN, name="book", digest="d")
Q, A, Q2, A2 = (
    Message(Role.USER, "1+1"),
    Message(Role.ASSISTANT, "two"),
    Message(Role.USER, "2+2"),
    Message(Role.ASSISTANT, "four"),
)


def tokenizer(template=MARKED, *, merges=(), wrap=False, eos="<|im_end|>"):
    """One token per byte (and per merge), so that lengths can be counted by hand."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*letters, *(a + b for a, b in merges)])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    if wrap:
        ids = [(t, core.token_to_id(t)) for t in ("<s>", "</s>")]
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=ids
        )
    specials = ["<|im_start|>", "<|im_end|>"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, additional_special_tokens=specials
    )
    fast.chat_template = template
    return fast


def layout(trajectory_or_prompt):
    return [(s.length, s.role, s.producer.kind) for s in trajectory_or_prompt.spans]


def trained_text(renderer, trajectory):
    shown = renderer.show(trajectory)
    return [part.split("⟧")[0] for part in shown.split("⟦")[1:]]


# --- prompts ---------------------------------------------------------------------------------


def test_prompt_spans_tile_the_rendered_conversation():
    renderer = ChatRenderer(tokenizer())
    prompt = renderer.prompt(Task(taskset="sums", prompt=(Q,)))
    # <|im_start|> user \n = 1 + 4 + 1; "1+1" = 3; <|im_end|> \n <|im_start|> assistant \n = 13
    assert layout(prompt) == [
        (6, Role.USER, Kind.TEMPLATE),
        (3, Role.USER, Kind.ENVIRONMENT),
        (13, Role.ASSISTANT, Kind.TEMPLATE),
    ]
    assert prompt.spans[1].producer == Producer(kind=Kind.ENVIRONMENT, name="sums")
    assert prompt.spans[0].producer == renderer.template
    assert renderer.template.digest == hashlib.sha256(MARKED.encode()).hexdigest()
    assert renderer.template.name == "chat-template"
    assert len(prompt.tokens) == 22
    assert prompt.tokens.dtype == np.int32


@pytest.mark.parametrize("content", ["user", "assistant", "s", "\n", " 1+1 \n", "é ü 漢"])
def test_content_that_looks_like_the_template_is_found_where_it_stands(content):
    renderer = ChatRenderer(tokenizer())
    prompt = renderer.prompt(Task(taskset="t", prompt=(Message(Role.USER, content),)))
    num_bytes = len(content.strip().encode())  # the template trims user turns
    expected = [(6, Role.USER, Kind.TEMPLATE), (num_bytes, Role.USER, Kind.ENVIRONMENT)]
    if not num_bytes:
        expected = [(6, Role.USER, Kind.TEMPLATE)]
    assert layout(prompt)[:-1] == expected


def test_token_that_straddles_template_and_content_is_the_authors():
    renderer = ChatRenderer(tokenizer(MARKED.replace(" | trim", ""), merges=[("Ċ", "Ċ")]))
    prompt = renderer.prompt(Task(taskset="t", prompt=(Message(Role.USER, "\nx"),)))
    # <|im_start|> u s e r | \n\n x | ...: the merged line break holds a character of the message.
    assert layout(prompt)[:2] == [
        (5, Role.USER, Kind.TEMPLATE),
        (2, Role.USER, Kind.ENVIRONMENT),
    ]


def test_message_that_the_template_rewrites_counts_as_template():
    rewriting = MARKED.replace("m.content | trim", "m.content | upper")
    prompt = ChatRenderer(tokenizer(rewriting)).prompt(
        Task(taskset="t", prompt=(Message(Role.USER, "abc"), Message(Role.USER, "7")))
    )
    kinds = [(s.length, s.producer.kind) for s in prompt.spans]
    assert (1, Kind.ENVIRONMENT) in kinds  # "7" is found as it stands
    assert sum(n for n, kind in kinds if kind is Kind.ENVIRONMENT) == 1


def test_template_that_reorders_messages_still_places_them():
    system_last = (
        "{% for m in messages if m.role != 'system' %}[{{ m.content }}]{% endfor %}"
        "{% for m in messages if m.role == 'system' %}({{ m.content }}){% endfor %}"
    )
    turns = (Message(Role.SYSTEM, "be"), Message(Role.USER, "hi!"))
    prompt = ChatRenderer(tokenizer(system_last)).prompt(Task(taskset="t", prompt=turns))
    assert [(s.length, s.role) for s in prompt.spans if s.producer.kind is Kind.ENVIRONMENT] == [
        (3, Role.USER),
        (2, Role.SYSTEM),
    ]


@pytest.mark.parametrize(("wrap", "start"), [(False, []), (True, ["<s>"])])
def test_plain_prompt_has_a_start_token_only_if_the_tokenizer_adds_one(wrap, start):
    coder = tokenizer(None, wrap=wrap)
    prompt = ChatRenderer(coder).prompt(Task(taskset="t", prompt="ab"))
    assert coder.convert_ids_to_tokens(prompt.tokens.tolist()) == [*start, "a", "b"]
    expected = [(1, Role.USER, Kind.TEMPLATE)] * wrap + [(2, Role.USER, Kind.ENVIRONMENT)]
    assert layout(prompt) == expected


def test_start_token_is_the_templates_business_in_a_conversation():
    coder = tokenizer("<s>" + MARKED, wrap=True)
    prompt = ChatRenderer(coder).prompt(Task(taskset="t", prompt=(Q,)))
    tokens = coder.convert_ids_to_tokens(prompt.tokens.tolist())
    assert (tokens.count("<s>"), tokens.count("</s>")) == (1, 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=4))
def test_spans_always_tile_and_adjacent_spans_differ(contents):
    turns = tuple(
        Message(Role.USER if i % 2 == 0 else Role.ASSISTANT, c) for i, c in enumerate(contents)
    )
    prompt = RENDERER.prompt(Task(taskset="t", prompt=turns))
    assert sum(s.length for s in prompt.spans) == len(prompt.tokens)
    authors = [(s.role, s.producer) for s in prompt.spans]
    assert all(a != b for a, b in itertools.pairwise(authors))


RENDERER = ChatRenderer(tokenizer())


# --- whole conversations ---------------------------------------------------------------------


@pytest.mark.parametrize(("template", "mask"), [(MARKED, "template"), (UNMARKED, "prefix")])
def test_every_answer_and_its_end_token_are_trained_and_nothing_else(template, mask):
    renderer = ChatRenderer(tokenizer(template))
    t = renderer.conversation((Q, A, Q2, A2), producer=BOOK, task="b/1", assistant_mask=mask)
    assert trained_text(renderer, t) == ["two<|im_end|>", "four<|im_end|>"]
    assert t.prompt_length == 22 == int(t.trainable.argmax())
    assert renderer.end_tokens & set(t.tokens[t.trainable].tolist())
    assert t.task == "b/1"
    user = [s for s in t.spans if s.role is Role.USER and s.producer == BOOK]
    assert [s.length for s in user] == [3, 3]  # questions are the data's, too


def test_both_masks_give_the_same_trajectory_id():
    marked = ChatRenderer(tokenizer())
    ids = {
        marked.conversation((Q, A), producer=BOOK, task="b/1", assistant_mask=mask).id
        for mask in ("template", "prefix", "template")
    }
    assert len(ids) == 1


@pytest.mark.parametrize("mask", ["template", "prefix"])
def test_num_prompt_leaves_earlier_answers_untrained_but_authored(mask):
    renderer = ChatRenderer(tokenizer())
    t = renderer.conversation(
        (Q, A, Q2, A2), producer=BOOK, task="b/1", assistant_mask=mask, num_prompt=3
    )
    assert trained_text(renderer, t) == ["four<|im_end|>"]
    head = renderer.prompt(Task(taskset="b", prompt=(Q, A, Q2)))
    assert t.prompt_length == len(head.tokens)
    assert t.tokens[: t.prompt_length].tolist() == head.tokens.tolist()
    early = [s for s in t.spans if s.role is Role.ASSISTANT and s.producer == BOOK]
    assert [s.length for s in early] == [3, 5]  # "two" in the prompt; "four" + end trained


def test_answer_outside_the_generation_block_is_context():
    picky = MARKED.replace(
        "{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' and loop.index < 3 %}"
    )
    renderer = ChatRenderer(tokenizer(picky))
    t = renderer.conversation((Q, A, Q2, A2), producer=BOOK, task="b/1")
    assert trained_text(renderer, t) == ["two<|im_end|>"]
    later = [s.producer.kind for s in t.spans if s.role is Role.ASSISTANT]
    assert Kind.ENVIRONMENT in later  # "four" is context here, and says whose
    assert {s.producer.name for s in t.spans} == {"book", "chat-template"}


def test_template_without_generation_block_is_refused_with_both_ways_out():
    renderer = ChatRenderer(tokenizer(UNMARKED))
    with pytest.raises(DataError) as error:
        renderer.conversation((Q, A), producer=BOOK, task="b/1")
    assert "{% generation %}" in str(error.value)
    assert "assistant_mask: prefix" in str(error.value)


def test_prefix_mask_refuses_a_template_that_rewrites_earlier_turns():
    forgetful = (
        "{% for m in messages %}{{ m.role }}:"
        "{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    renderer = ChatRenderer(tokenizer(forgetful))
    with pytest.raises(DataError, match=r"cuts text out of a message: 'two' \(message 2\)"):
        renderer.conversation((Q, A, Q2, A2), producer=BOOK, task="b/1", assistant_mask="prefix")


def test_prompt_of_a_pair_must_be_a_token_prefix():
    dropping = UNMARKED.replace(
        "{% if add_generation_prompt %}", "{% if add_generation_prompt %}<s>"
    )
    renderer = ChatRenderer(tokenizer(dropping))
    with pytest.raises(DataError, match="differently when more follow"):
        renderer.conversation(
            (Q, A), producer=BOOK, task="b/1", assistant_mask="prefix", num_prompt=1
        )


def test_template_that_refuses_its_turns_is_a_data_error():
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate"):
        ChatRenderer(tokenizer(strict)).prompt(Task(taskset="t", prompt=(Q,)))


def test_conversation_without_a_template_is_a_model_error():
    with pytest.raises(ModelError, match="no chat template"):
        ChatRenderer(tokenizer(None)).prompt(Task(taskset="t", prompt=(Q,)))


# --- plain text, and back --------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [False, True])
def test_raw_completion_trains_the_completion_and_one_end_token(wrap):
    coder = tokenizer(None, wrap=wrap)
    renderer = ChatRenderer(coder)
    t = renderer.completion("ab", " cd", producer=BOOK, task="b/1")
    assert t.prompt_length == 2 + wrap
    assert trained_text(renderer, t) == [" cd<|im_end|>"]
    assert t.tokens[-1] == coder.eos_token_id
    assert t.trainable[-1]
    written = renderer.completion("ab", " cd<|im_end|>", producer=BOOK, task="b/1")
    assert written.tokens.tolist() == t.tokens.tolist()  # never two of them


def test_raw_prompt_of_training_equals_the_prompt_that_is_sampled():
    renderer = ChatRenderer(tokenizer(None, wrap=True))
    t = renderer.completion("ab", "c", producer=BOOK, task="b/1")
    sampled = renderer.prompt(Task(taskset="b", prompt="ab")).tokens
    assert t.tokens[: t.prompt_length].tolist() == sampled.tolist()


def test_text_drops_start_padding_and_end_tokens_and_nothing_else():
    coder = tokenizer()
    coder.add_special_tokens(
        {
            "bos_token": "<s>",
            "pad_token": "<pad>",
            "additional_special_tokens": ["<|im_start|>", "<think>", "</think>", "<answer>"],
        }
    )
    coder.clean_up_tokenization_spaces = True  # some model folders ask for it: " ." to "."
    coder.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    renderer = ChatRenderer(coder, end_tokens=[coder.convert_tokens_to_ids("</s>")])
    written = "<think> a , b</think>\n .<answer>7"
    whole = f"<s>{written}<|im_end|></s><pad><pad>"
    ids = coder(whole, add_special_tokens=False)["input_ids"]
    assert {coder.convert_tokens_to_ids(t) for t in ("<think>", "<answer>")} <= set(ids)
    assert renderer.text(np.array(ids, np.int32)) == written
    assert renderer.text(np.array([], np.int32)) == ""
    turn = coder("7<|im_start|>user", add_special_tokens=False)["input_ids"]
    assert renderer.text(np.array(turn, np.int32)) == "7<|im_start|>user"


def test_end_tokens_are_those_of_tokenizer_and_generation_config():
    coder = tokenizer()
    more = coder.convert_tokens_to_ids("</s>")
    assert ChatRenderer(coder).end_tokens == {coder.eos_token_id}
    assert ChatRenderer(coder, end_tokens=[more]).end_tokens == {coder.eos_token_id, more}
    only = ChatRenderer(tokenizer(eos=None), end_tokens=[more])
    assert only.end_tokens == {more}
    assert only.completion("a", "b", producer=BOOK, task="t/1").tokens[-1] == more


def test_tokenizer_without_an_end_token_is_refused():
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        ChatRenderer(tokenizer(eos=None))


class SlowTokenizer:
    is_fast = False


def test_slow_tokenizer_is_refused():
    with pytest.raises(ModelError, match="SlowTokenizer cannot trace"):
        ChatRenderer(SlowTokenizer())


# --- reading ---------------------------------------------------------------------------------


def test_rows_keep_their_line_numbers(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes('\ufeff{"a": "x\u2028y"}\r\n\n{"a": 2}\n'.encode())
    assert read_jsonl(path) == [(1, {"a": "x\u2028y"}), (3, {"a": 2})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', r"x\.jsonl, row 2: not JSON"),
        (b"[1]\n", r"row 1: list"),
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"\xff\xfe{}", "not UTF-8"),
    ],
)
def test_malformed_files_name_file_and_row(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_jsonl(path)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="no file"):
        read_jsonl(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hi", "str for messages"),
        ([], "an empty list"),
        (["hi"], "message 1 is str"),
        ([{"role": "user"}], r"keys \['role'\]"),
        ([{"role": "user", "content": "x", "tool_calls": [1]}], "tool_calls"),
        (
            [{"role": "user", "content": "x"}, {"role": "usr", "content": "x"}],
            "did you mean 'user'",
        ),
        ([{"role": "user", "content": 3}], "content of type int"),
        ([{"role": ["user"], "content": "x"}], "message 1 has the role"),
    ],
)
def test_malformed_messages(value, message):
    with pytest.raises(DataError, match=message):
        messages_from(value)


def test_keys_without_a_value_are_no_keys():
    assert messages_from([{"role": "user", "content": "x", "tool_calls": None}]) == (
        Message(Role.USER, "x"),
    )


def test_a_folder_gives_the_texts_that_its_renderer_gives(tmp_path):
    """Special tokens by name, parts of a character as what stands for them."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(BASE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    tokenizer.save_pretrained(tmp_path)
    renderer, text_of = ChatRenderer(tokenizer), token_texts(tmp_path)
    every = range(len(tokenizer))
    assert [text_of(i) for i in every] == [renderer.token_text(i) for i in every]
    assert "<extra>" in map(text_of, every)
