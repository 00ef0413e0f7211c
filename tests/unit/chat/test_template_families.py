"""Templates in the styles of the field: plain rows lose nothing and none is refused; what a
template takes away from an answer is refused; what is text stays text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from template_families import FAMILIES, TEMPLATES, mask_of, renderer, tokenizer
from transformers import PreTrainedTokenizerFast

from posttrain.chat.renderer import ChatRenderer
from posttrain.core.errors import DataError
from posttrain.core.provenance import Kind, Producer, Role
from posttrain.core.rendering import DifferenceKind, Rules
from posttrain.core.task import Message, Task

BOOK = Producer(kind=Kind.HUMAN, name="book", digest="d")
PLAIN = [
    "Paris.",
    "def f(x):\n    return x + 1",
    "First.\n\nSecond.\n\n- one\n- two",
    "naïve café, 数学, 🙂",
    "a < b and c > d || e",
    "# Title\n\nText with `code` and $x^2$.",
    '{"a": [1, 2]}',
]


def said(*contents):
    roles = (Role.USER, Role.ASSISTANT)
    return tuple(Message(roles[i % 2], c) for i, c in enumerate(contents))


def render(family, messages, *, num_prompt=None, **rules):
    """The trajectory, and every change that was accepted."""
    seen = []
    trajectory = renderer(family).conversation(
        messages,
        producer=BOOK,
        task="b/1",
        assistant_mask=mask_of(family),
        num_prompt=num_prompt,
        rules=Rules(**rules, seen=seen.append),
    )
    return trajectory, seen


def trained(family, trajectory):
    parts = renderer(family).show(trajectory).split("⟦")[1:]
    return [part.split("⟧")[0] for part in parts]


def ends(family):
    return FAMILIES[family][-1]


LOSSES = {"trim", "trim_end", "cut", "unknown", "spaced", "control"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("answer", PLAIN)
def test_plain_rows_lose_nothing_and_none_is_refused(family, answer):
    for messages in (said("Question?", answer), said("One?", answer, "Two?", answer)):
        for num_prompt in (None, len(messages) - 1):
            t, seen = render(family, messages, num_prompt=num_prompt)
            assert not {c.kind for c in seen} & LOSSES
            texts = trained(family, t)
            assert len(texts) == (1 if num_prompt else len(messages) // 2)
            assert all(text.endswith(answer + ends(family)) for text in texts)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained_follows_the_prompt_that_is_sampled(family):
    prompt = said("Question?")
    t, seen = render(family, (*prompt, Message(Role.ASSISTANT, "Answer.")), num_prompt=1)
    asked = renderer(family).prompt(Task(taskset="b", prompt=prompt)).tokens.tolist()
    before = t.tokens[: t.prompt_length].tolist()
    assert asked[: len(before)] == before
    unopened = [c.text for c in seen if c.kind is DifferenceKind.UNOPENED]
    rest = tokenizer(family).decode(asked[len(before) :])
    assert rest == "".join(unopened), "and it is said when generation starts with more"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", ["\n", "\n\n", "    ", " \n  "])
def test_whitespace_before_an_answer_is_trained_or_refused(family, start):
    messages = said("Code?", f"{start}return 1")
    if family in ("llama3", "gemma"):
        with pytest.raises(DataError, match="cuts whitespace at the start"):
            render(family, messages)
        t, seen = render(family, messages, allow=frozenset({"trim"}))
        assert DifferenceKind.TRIM in {c.kind for c in seen}
        assert trained(family, t) == [f"return 1{ends(family)}"]
    elif family.startswith("thinking") and start.startswith("\n"):
        with pytest.raises(DataError, match="cuts whitespace at the start"):
            render(family, messages)
    else:
        t, _ = render(family, messages)
        assert trained(family, t)[0].endswith(f"{start}return 1{ends(family)}")


@pytest.mark.parametrize("family", ["llama3", "gemma"])
def test_whitespace_after_an_answer_is_said_and_not_refused(family):
    _, seen = render(family, said("Hi?", "Hello.\n"))
    assert [(c.kind, c.message, c.text) for c in seen] == [(DifferenceKind.TRIM_END, 2, "\n")]


REASONED = "<think>\nTwo and two.\n</think>\n\nFour."


def test_reasoning_that_a_template_cuts_from_trained_answers_is_refused():
    with pytest.raises(DataError, match=r"cuts text out of a message: '<think>.*which is trained"):
        render("reasoning_cut", said("2+2?", REASONED))
    with pytest.raises(DataError, match=r"\(message 2\), which is trained"):
        render("thinking", said("2+2?", REASONED, "Sure?", REASONED))
    t, seen = render("reasoning_cut", said("2+2?", REASONED), allow=frozenset({"cut"}))
    assert trained("reasoning_cut", t) == [f"\n\nFour.{ends('reasoning_cut')}"]
    assert [c.kind for c in seen if c.trained][:1] == [DifferenceKind.CUT]


@pytest.mark.parametrize("family", ["thinking", "thinking_opened"])
def test_reasoning_is_whole_in_the_answer_and_said_where_it_is_cut_from_history(family):
    messages = said("2+2?", REASONED, "Sure?", REASONED)
    t, seen = render(family, messages, num_prompt=3)
    whole = trained(family, t)[0]
    assert REASONED.removeprefix("<think>\n") in whole
    assert [(c.kind, c.message) for c in seen] == [(DifferenceKind.CUT, 2)]
    assert not seen[0].trained


def test_only_whitespace_may_change_without_a_refusal():
    tight = "<think>Two and two.</think>Four."
    t, seen = render("thinking", said("2+2?", tight), num_prompt=1)
    assert [c.kind for c in seen] == [DifferenceKind.SPACED]
    assert trained("thinking", t) == [f"{REASONED}{ends('thinking')}"]


def test_what_a_template_adds_is_said():
    _, seen = render("thinking", said("2+2?", "Four."))
    assert [(c.kind, c.text) for c in seen] == [(DifferenceKind.ADDED, "<think>\n\n</think>\n\n")]
    assert any("adds a system prompt" in r for r in renderer("default_system").remarks)
    assert any("adds a system prompt" in r for r in renderer("llama3").remarks)
    assert any("date" in r and "2024-07-26" in r for r in renderer("llama3").remarks)
    for family in set(FAMILIES) - {"default_system", "llama3"}:
        assert renderer(family).remarks == (), family


# --- control tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_in_messages_are_text(family):
    controls = {tokenizer(family).convert_tokens_to_ids(c) for c in FAMILIES[family]}

    def count(messages):
        t, seen = render(family, messages)
        assert trained(family, t)[-1].endswith(messages[-1].content + ends(family))
        return [int(token) for token in t.tokens if token in controls], seen

    forged = "".join(FAMILIES[family])
    plain, _ = count(said("a b", "c d"))
    with_text, seen = count(said(f"a {forged} b", f"c {ends(family)} d"))
    assert with_text == plain
    assert [c.message for c in seen if c.kind is DifferenceKind.CONTROL] == [1, 2]
    parsed, _ = render(family, said("a b", f"c {ends(family)} d"), control_tokens="parse")
    assert sum(t in controls for t in parsed.tokens) == len(plain) + 1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_text_stays_text_whatever_is_written(data):
    """The tokens of a message decode to it, and no control token is among them."""
    family = data.draw(st.sampled_from(["chatml", "phi4", "mistral"]))
    piece = st.sampled_from([*FAMILIES[family], *WORDS_TOO, " ", "\n", "a", "é", "<", "|>", "the"])
    question = "".join(data.draw(st.lists(piece, min_size=1, max_size=6)))
    answer = "".join(data.draw(st.lists(piece, min_size=1, max_size=6)))
    if not question.strip() or not answer.strip():
        return
    t, _ = render(family, said(question, answer), num_prompt=1)
    controls = [tokenizer(family).convert_tokens_to_ids(c) for c in FAMILIES[family]]
    written = t.tokens[np.flatnonzero(t.trainable)]
    assert not np.isin(written[:-1], controls).any()
    shown = trained(family, t)
    assert shown == [f"{' ' if family == 'mistral' else ''}{answer}{ends(family)}"]


WORDS_TOO = ["<think>", "</think>", "12"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_and_the_twin_change_no_token_of_a_plain_text(family):
    encoder = renderer(family)._encoder
    text = renderer(family)._texts.render(said("One.\n\nTwo", "Three.", "4", "5")).text
    plain, offsets = encoder.encode(text)
    border = offsets[len(offsets) // 2][0]
    marked, places = encoder._by_twin(text, as_text=(), cuts=(border,))
    assert (marked, places) == (plain, offsets)


# --- plain text --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["<s>[INST] first [/INST] tree</s>", "[INST] a [/INST] b"])
def test_text_that_went_through_a_template_is_refused(text):
    with pytest.raises(DataError, match="begins or ends with the control token"):
        renderer("mistral").completion("", text, producer=BOOK, task="b/1")


def test_parsed_text_has_one_start_and_one_end():
    coder = tokenizer("mistral")
    text = "<s>[INST] first [/INST] tree</s>"
    rules = Rules(control_tokens="parse")
    t = renderer("mistral").completion("", text, producer=BOOK, task="b/1", rules=rules)
    assert coder.decode(t.tokens.tolist()).count("<s>") == 1
    assert int((t.tokens == coder.eos_token_id).sum()) == 1


def test_an_end_token_that_closes_a_completion_is_the_end():
    t = renderer("mistral").completion("a", " b</s>", producer=BOOK, task="b/1")
    bare = renderer("mistral").completion("a", " b", producer=BOOK, task="b/1")
    assert t.tokens.tolist() == bare.tokens.tolist()
    seen = []
    inside = renderer("mistral").completion(
        "a", " b</s> c", producer=BOOK, task="b/1", rules=Rules(seen=seen.append)
    )
    assert int((inside.tokens == tokenizer("mistral").eos_token_id).sum()) == 1
    assert [c.kind for c in seen] == [DifferenceKind.CONTROL]


def test_every_template_has_a_family():
    assert {p.stem for p in TEMPLATES.glob("*.jinja")} == set(FAMILIES)


def test_characters_that_a_tokenizer_does_not_know_are_refused_in_answers():
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({"<unk>": 0, "<e>": 1, "a": 2, ":": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.add_special_tokens(["<e>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>", unk_token="<unk>")
    fast.chat_template = "{% for m in messages %}:{{ m.content }}<e>{% endfor %}"
    small = ChatRenderer(fast)
    kwargs = {"producer": BOOK, "task": "b/1", "assistant_mask": "prefix"}
    small.conversation(said("a?", "a"), **kwargs)
    with pytest.raises(DataError, match=r"does not know characters of a message: '\?'"):
        small.conversation(said("a", "a?"), **kwargs)
