"""Chat templates as untrusted code: they end, they are repeatable, and every fault is in words."""

import contextlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from template_families import FAMILIES, tokenizer

from posttrain.chat.renderer import ChatRenderer
from posttrain.chat.template import ChatTemplate
from posttrain.core.errors import DataError, ModelError, PosttrainError
from posttrain.core.provenance import Role
from posttrain.core.task import Message

HELLO = (Message(Role.USER, "hello"), Message(Role.ASSISTANT, "a b c"))
BIG = "{% set s = namespace(x='ab') %}{% for i in range(60) %}{% set s.x = s.x ~ s.x %}{% endfor %}"
HOSTILE = {
    "division": "{{ 1 / 0 }}",
    "recursion": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "two calls each": "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}"
    "{% endmacro %}{{ a(60) }}",
    "long range": "{% for i in range(10**9) %}{% endfor %}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "ranges as lists": "{% for i in range(99999) %}{{ range(99999) | list | length }}{% endfor %}",
    "doubled texts": BIG,
    "doubled sums": BIG.replace(" ~ ", " + "),
    "doubled joins": BIG.replace("s.x ~ s.x", "[s.x, s.x] | join"),
    "product": "{{ 'x' * 10**9 }}",
    "product of lists": "{{ [1] * 10**9 }}",
    "power": "{{ 10**10**10 }}",
    "tower": "{{ 9**64**64 }}",
    "wide": "{{ 'x' | center(10**9) }}",
    "wide method": "{{ 'x'.ljust(10**9) }}",
    "wide format": "{{ '%999999999d' % 1 }}",
    "wide format filter": "{{ '%999999999d' | format(1) }}",
    "wide format method": "{{ '{:>999999999}'.format(1) }}",
    "wide json": "{{ [1] | tojson(indent=10**9) }}",
    "wide date": "{{ strftime_now('%1000000000d') }}",
    "replaced": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "replaced by a filter": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "tabs": "{{ ('\\t' * 99999).expandtabs(99999) }}",
    "much text in a macro": "{% macro a() %}{% for i in range(99999) %}{{ 'x' * 99999 }}"
    "{% endfor %}{% endmacro %}{{ a() }}",
    "slices": "{% set x = 'a' * 99999 %}{% for i in range(99999) %}{% set y = x[1:] %}{% endfor %}",
    "chance": "{{ [1, 2] | random }}",
    "chance words": "{{ lipsum() }}",
    "undefined": "{{ nothing.at.all }}",
    "not callable": "{{ messages() }}",
    "internals": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "wrong type": "{{ messages + 1 }}",
    "index": "{{ messages[99].content.x }}",
    "private names": "{{ namespace(_x=1) }}",
    "number": "{{ 2**60 * 2**60 }}",
}
BROKEN = {
    "open": "{% for m in messages %}",
    "unknown tag": "{% nonsense %}",
    "unknown filter": "{{ 1 | nonsense }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "too many loops": "{% for i in [1] %}" * 40 + "{% endfor %}" * 40,
    "include": "{% include 'x' %}{% extends 3 %}",
    "huge": "x" * 2_000_001,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused_in_words_and_in_time(name):
    start = time.monotonic()
    with pytest.raises(DataError) as error:
        ChatTemplate(HOSTILE[name]).render(HELLO)
    assert time.monotonic() - start < 20
    assert "the chat template fails on the turns ['user', 'assistant']: " in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_template_is_a_model_error(name):
    with pytest.raises(PosttrainError) as error:
        ChatTemplate(BROKEN[name]).render(HELLO)
    assert "chat template" in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", ["division", "doubled texts"])
def test_a_hostile_template_is_found_when_the_renderer_is_made(name):
    coder = tokenizer("chatml").__class__(
        tokenizer_object=tokenizer("chatml").backend_tokenizer, eos_token="<|im_end|>"
    )
    coder.chat_template = HOSTILE[name]
    with pytest.raises(ModelError, match="the chat template fails"):
        ChatRenderer(coder)
    coder.chat_template = {"tool_use": "a", "rag": "b"}
    with pytest.raises(ModelError, match="named rag, tool_use, and none of them is the default"):
        ChatRenderer(coder)


def test_the_clock_stands():
    text, _ = ChatTemplate("{{ strftime_now('%d %b %Y') }}").render(HELLO)
    assert text == "26 Jul 2024"


@pytest.mark.parametrize("family", FAMILIES)
def test_work_is_bounded_by_the_messages_and_long_conversations_pass(family):
    coder = tokenizer(family)
    template = ChatTemplate(coder.chat_template, variables=coder.special_tokens_map)
    turns = tuple(Message((Role.USER, Role.ASSISTANT)[i % 2], "word " * 40) for i in range(400))
    text, _ = template.render(turns)
    assert text.count("word") == 400 * 40
    long = (Message(Role.USER, "a"), Message(Role.ASSISTANT, "word " * 200_000))
    assert template.render(long)[0].count("word") == 200_000


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "llama3"])
def test_the_text_is_that_of_transformers(family):
    coder = tokenizer(family)
    template = ChatTemplate(coder.chat_template, variables=coder.special_tokens_map)
    contents = ["  a\n", "<think>\nb\n</think>\n\nc", "d{{ 1 }}", "é\n\n"]
    turns = [Message((Role.USER, Role.ASSISTANT)[i % 2], c) for i, c in enumerate(contents)]
    plain = [{"role": str(m.role), "content": m.content} for m in turns]
    for number in (1, 2, 3, 4):
        for generation in (False, True):
            ours, _ = template.render(turns[:number], generation=generation)
            theirs = coder.apply_chat_template(
                plain[:number], tokenize=False, add_generation_prompt=generation
            )
            assert ours == theirs


def test_generation_blocks_are_reported_where_they_are():
    template = ChatTemplate(
        "{% for m in messages %}[{% if m.role == 'assistant' %}{% generation %}{{ m.content }}!"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}]{% endfor %}"
    )
    text, blocks = template.render((*HELLO, *HELLO))
    assert text == "[hello][a b c!][hello][a b c!]"
    assert [text[a:b] for a, b in blocks] == ["a b c!", "a b c!"]


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from("{}%-|()[]'\"~+*/ .,:0159abmsxforinendsetmessages\n"), max_size=60))
def test_any_text_is_a_template_or_an_error_of_the_tree(text):
    with contextlib.suppress(PosttrainError):
        ChatTemplate(text).render(HELLO)
