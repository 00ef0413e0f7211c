"""Teachers as signals: privileged contexts, sampled log-ratios, deltas, foreign tokenizers."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from material import gradients, trajectory, with_column

from posttrain.core.errors import ConfigError, LegalityError, ModelError, TaskError
from posttrain.core.provenance import Role
from posttrain.core.sampling import SamplingSpec
from posttrain.core.statistics import Stat
from posttrain.core.task import Message, Task, with_context
from posttrain.core.trajectory import Column, End, Group, Scored
from posttrain.numerics.batch import pack
from posttrain.parts.base import bound
from posttrain.parts.composition import Composition
from posttrain.parts.distillation.divergences import TeacherReverseKL
from posttrain.parts.distillation.foreign import (
    ForeignTeacher,
    SpanAdvantage,
    boundaries,
    common_spans,
)
from posttrain.parts.distillation.policy_presets import (
    GOpd,
    IwOpd,
    Minillm,
    Opd2,
    OpdSampled,
    SpanOpd,
)
from posttrain.parts.distillation.presets import ContextDistillation, Kd, Opsd, Sdft
from posttrain.parts.distillation.teacher_credit import (
    DeltaAdvantage,
    TeacherAdvantage,
    credited,
    delta_advantages,
    early_weights,
)
from posttrain.parts.distillation.teachers import TeacherDistribution, TeacherLogprobs
from posttrain.parts.legality import check_composition
from posttrain.parts.policy.losses import PolicyGradient
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.sources.rollouts import Rollouts
from posttrain.run.build import check_same_tokens
from posttrain.testing import FakeTaskSet, as_group, check_signal, fake_tools, tiny_model
from posttrain.training.objective import StageObjective

TASKS = FakeTaskSet()
BY_KEY = {t.key: t for t in TASKS.train}
CONTEXT = "{question} it is {answer}."


@pytest.fixture(scope="module")
def teacher(engine, tmp_path_factory):
    return engine.policy(str(tiny_model(tmp_path_factory.mktemp("teacher") / "m", seed=7)))


def tools_of(learner, *, tasks=TASKS, **policies):
    return fake_tools(learner.policy, policies=policies, tasksets={"letters": tasks})


def drawn(learner, *, size=2, groups=3):
    source = Rollouts(tasks=("letters",), group_size=size, max_new_tokens=6)
    return source.open(tools_of(learner), seed=0).draw(groups, step=0)


def members(groups):
    return [m for g in groups for m in g.members]


# --- a teacher that reads more ---------------------------------------------------------------


@pytest.mark.parametrize("top_k", [None, 4])
def test_a_context_moves_the_same_tokens_behind_another_prompt(learner, teacher, top_k):
    """Position by position, against distributions asked for by hand."""
    signal = TeacherDistribution(routes={"*": "t"}, top_k=top_k, context=CONTEXT)
    scored = check_signal(signal, drawn(learner), tools_of(learner, t=teacher))
    for member in members(scored):
        record = member.trajectory
        task = BY_KEY[record.task]
        prompt = teacher.renderer.prompt(Task(taskset="x", prompt=f"{task.text} it is a.")).tokens
        answer = record.tokens[record.prompt_length :]
        by_hand = trajectory(prompt.tolist(), answer.tolist())
        ((ids, values),) = teacher.distributions([by_hand], top_k=top_k)
        got = member.columns[Column.TEACHER_LOGPROBS]
        np.testing.assert_allclose(got[record.prompt_length :], values[len(prompt) :], atol=1e-5)
        assert np.isnan(got[: record.prompt_length]).all()
        np.testing.assert_array_equal(
            member.columns[Column.TEACHER_IDS][record.prompt_length :], ids[len(prompt) :]
        )


@pytest.mark.parametrize("kind", [TeacherLogprobs, TeacherDistribution])
def test_a_context_that_writes_the_same_prompt_gives_the_same_columns(learner, teacher, kind):
    """The question moved from the task into the template: the way through the context is exact."""
    (group,) = drawn(learner, groups=1)
    empty = Task(taskset="letters", prompt="", answer="a")
    plain = kind(routes={"*": "t"})
    moved = kind(routes={"*": "t"}, context="{question}" + BY_KEY[group.task].text)
    direct = plain.score([group], tools_of(learner, t=teacher))
    tools = tools_of(learner, tasks=task_set(empty), t=teacher)
    by_context = moved.score([of_task(group, empty)], tools)
    for one, other in zip(members(direct), members(by_context), strict=True):
        for column in plain.provides:
            np.testing.assert_array_equal(one.columns[column], other.columns[column])


def task_set(*tasks):
    return SimpleNamespace(name="letters", train=tasks, held_out=(), success=1.0)


def of_task(group, task):
    """The same trajectories, as if they answered another task."""
    renamed = (replace(m, trajectory=replace(m.trajectory, task=task.key)) for m in group.members)
    return Group(task=task.key, members=tuple(renamed))


def test_the_last_turn_of_a_conversation_is_filled_in():
    system = Message(role=Role.SYSTEM, content="Be brief.")
    asked = Message(role=Role.USER, content="1+1=")
    task = Task(taskset="sums", prompt=(system, asked), answer="2")
    prompt = with_context(task, "{question} ({answer})").prompt
    assert prompt == (system, Message(role=Role.USER, content="1+1= (2)"))


def test_the_learner_teaches_itself_when_it_reads_the_answer(learner):
    """The gradient is that of the KL to its own frozen distribution, and not zero."""
    signal = TeacherDistribution(routes={"*": "learner"}, context=CONTEXT)
    groups = signal.score(drawn(learner), tools_of(learner))
    objective = StageObjective((TeacherReverseKL(),))
    batches = pack(groups, needs=objective.needs, max_tokens=10_000)
    loss, grads = gradients(learner, batches, objective)
    assert loss > 1e-3
    assert max(float(g.abs().max()) for g in grads.values()) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routes": {}}, "at least one route"),
        ({"routes": {"*": "learner"}}, "nothing more to read"),
        ({"routes": {"*": "base"}, "context": "no field"}, "template with {question}"),
        ({"routes": {"*": "base"}, "context": "{question} {solution}"}, "template with {question}"),
        ({"routes": {"*": "base"}, "context": "{question}"}, "more than the question"),
        ({"routes": {"*": "base"}, "context": "{question} {"}, "for a brace"),
        ({"routes": {"*": "base"}, "top_k": 0}, "1 or more"),
    ],
)
def test_teachers_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TeacherDistribution(**options)


def test_an_answer_that_no_task_has_is_missed_before_anything_runs(learner, teacher):
    signal = TeacherLogprobs(routes={"*": "t"}, context=CONTEXT)
    bare = Task(taskset="letters", prompt="0")
    with pytest.raises(TaskError, match="no answer"):
        bound(signal, tools_of(learner, tasks=task_set(bare), t=teacher))


def test_rows_of_a_data_set_have_no_task_to_write_a_context_from():
    plain = Kd(data=Dataset(path="d.jsonl"), teachers={"*": "base"}).compose()
    signal = TeacherDistribution(routes={"*": "base"}, context=CONTEXT)
    with pytest.raises(LegalityError, match="have no task"):
        check_composition(
            Composition(source=plain.source, signals=(signal,), terms=plain.terms), stage="s"
        )


def test_a_context_too_long_for_the_teacher_is_named(learner, teacher):
    signal = TeacherLogprobs(routes={"*": "t"}, context="{question}" + "a" * 500)
    with pytest.raises(TaskError, match="at most its context"):
        signal.score(drawn(learner), tools_of(learner, t=teacher))


# --- tokens must mean the same ---------------------------------------------------------------


def renamed(folder, *, change):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return str(folder)


def swapped(content):
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    return content


def cut_elsewhere(content):
    content["pre_tokenizer"]["pattern"] = {"Regex": "[\\s\\S]{2}|[\\s\\S]"}
    return content


def test_judges_with_other_tokens_are_refused(learner, engine, teacher, tmp_path):
    check_same_tokens(teacher, learner.policy)
    other = renamed(tiny_model(tmp_path / "a"), change=swapped)
    with pytest.raises(ModelError, match="different vocabularies; they give a probe text other"):
        check_same_tokens(engine.policy(other), learner.policy)
    same_words = renamed(tiny_model(tmp_path / "b"), change=cut_elsewhere)
    with pytest.raises(ModelError, match="share a vocabulary and cut a probe text differently"):
        check_same_tokens(engine.policy(same_words), learner.policy)


# --- distillation as a policy gradient -------------------------------------------------------


def test_credit_by_hand():
    gains = np.array([1.0, -2.0, 4.0])
    np.testing.assert_allclose(credited(gains, credit="to_go"), [3, 2, 4])
    np.testing.assert_allclose(credited(gains, credit="future_mean"), [1, 4, 0])
    weights = early_weights(gains, strength=0.5)
    np.testing.assert_allclose(weights, [1.5, 1 + 0.5 * (1 - 1 / 7), 1 + 0.5 * (1 - 3 / 7)])
    np.testing.assert_array_equal(early_weights(np.zeros(2), strength=0.5), [1, 1])


def credited_group(columns):
    """One trajectory of two prompt tokens and as many written ones as the columns are long."""
    length = len(next(iter(columns.values())))
    record = trajectory([1, 2], list(range(3, 3 + length)))
    full = {c: np.array([np.nan, np.nan, *v], np.float32) for c, v in columns.items()}
    return [Group(task="t/0", members=(Scored(trajectory=record).with_columns(full),))]


def test_extrapolation_by_hand():
    columns = {
        Column.TEACHER_LOGPROB: [-1.0, -3.0],
        Column.BEHAVIOUR_LOGPROB: [-2.0, -2.0],
        Column.REFERENCE_LOGPROB: [-2.5, -1.0],
    }
    for factor, expected in ((1.0, [1.0, -1.0]), (2.0, [2.5, -3.0])):
        signal = TeacherAdvantage(extrapolation=factor)
        (group,) = signal.score(credited_group(columns), fake_tools())
        got = group.members[0].columns[Column.ADVANTAGE]
        np.testing.assert_allclose(got[2:], expected, rtol=1e-6)
        assert np.isnan(got[:2]).all()
    assert Column.REFERENCE_LOGPROB not in TeacherAdvantage().needs


def enumerated(depth, logits, teacher):
    """All sequences over 3 tokens of a tabular policy: [(tokens, log π, log π_T)], where the
    next token's distribution depends on the token before (row 3: the start)."""
    policy, other = logits.log_softmax(-1), teacher.log_softmax(-1)
    out = []
    for code in range(3**depth):
        tokens = [code // 3**i % 3 for i in range(depth)]
        states = [3, *tokens[:-1]]
        own = torch.stack([policy[s, t] for s, t in zip(states, tokens, strict=True)])
        their = torch.stack([other[s, t] for s, t in zip(states, tokens, strict=True)])
        out.append((tokens, own, their))
    return out


@pytest.mark.parametrize(("credit", "whole"), [("token", False), ("to_go", True)])
def test_the_expected_policy_gradient_is_that_of_the_reverse_kl(credit, whole):
    """Summed exactly over every sequence: per token with prefixes held fixed, or over whole
    sequences with the credit of what follows."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, dtype=torch.float64, generator=generator).requires_grad_()
    teacher = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    expected_loss = torch.zeros((), dtype=torch.float64)
    exact = torch.zeros((), dtype=torch.float64)
    kl_S = (logits.softmax(-1) * (logits.log_softmax(-1) - teacher.log_softmax(-1))).sum(-1)
    for tokens, own, their in enumerated(3, logits, teacher):
        groups = credited_group(
            {
                Column.TEACHER_LOGPROB: their.tolist(),
                Column.BEHAVIOUR_LOGPROB: own.tolist(),
            }
        )
        scored = TeacherAdvantage(credit=credit).score(groups, fake_tools())
        term = PolicyGradient()
        (batch,) = pack(scored, needs=frozenset(term.needs), max_tokens=99)
        stats = {Stat.SAMPLED_LOGPROB: own, Stat.LOGPROB: own, Stat.ENTROPY: torch.zeros(3)}
        loss_N = term.values(stats, batch).loss
        probability = own.sum().exp()
        expected_loss = expected_loss + probability.detach() * loss_N.sum()
        states = [3, *tokens[:-1]]
        exact = exact + (
            probability * (own - their).sum()
            if whole
            else probability.detach() * kl_S[states].sum()
        )
    (got,) = torch.autograd.grad(expected_loss, logits, retain_graph=True)
    (want,) = torch.autograd.grad(exact, logits)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert float(want.abs().max()) > 0.01


def test_sampled_opd_on_real_models(learner, teacher):
    """The advantages of fresh rollouts: teacher minus policy, both asked for directly."""
    tools = tools_of(learner, t=teacher)
    groups = TeacherLogprobs(routes={"*": "t"}).score(drawn(learner), tools)
    scored = members(TeacherAdvantage().score(groups, tools))
    records = [m.trajectory for m in scored]
    asked = zip(teacher.logprobs(records), learner.policy.logprobs(records), strict=True)
    for member, (their, own) in zip(scored, asked, strict=True):
        np.testing.assert_allclose(member.columns[Column.ADVANTAGE], their - own, atol=2e-4)


# --- what tuning added -----------------------------------------------------------------------


def test_delta_advantages_by_hand():
    rng = np.random.default_rng(0)
    own, teacher, base = (np.log(rng.dirichlet(np.ones(4), 6)) for _ in range(3))
    written = rng.integers(0, 4, 6).astype(np.int32)
    got = delta_advantages(own, teacher, base, written)
    agreed = 0
    for t in range(6):
        delta, plain = teacher[t] - base[t], teacher[t] - own[t]
        a = delta[written[t]] - np.exp(own[t]) @ delta
        b = plain[written[t]] - np.exp(own[t]) @ plain
        agreed += a * b > 0
        assert got[t] == pytest.approx(a if a * b > 0 else 0.0)
    assert 0 < agreed < 6


def test_a_teacher_that_was_not_tuned_teaches_nothing(learner, teacher):
    signal = DeltaAdvantage(teacher="t", base="b")
    tools = tools_of(learner, t=teacher, b=teacher)
    for member in members(signal.score(drawn(learner), tools)):
        trained = member.trajectory.trainable
        assert (member.columns[Column.ADVANTAGE][trained] == 0).all()
        assert np.isnan(member.columns[Column.ADVANTAGE][~trained]).all()
    with pytest.raises(ConfigError, match="two different"):
        DeltaAdvantage(teacher="t", base="t")


# --- another tokenizer -----------------------------------------------------------------------


def merged_pairs(content):
    """A tokenizer that reads two letters at a time where it can."""
    vocab = content["model"]["vocab"]
    for pair in ("ab", "cd", "ba"):
        vocab[pair] = len(vocab)
    content["pre_tokenizer"]["pattern"] = {"Regex": "ab|cd|ba|[\\s\\S]"}
    return content


@pytest.fixture(scope="module")
def stranger(engine, tmp_path_factory):
    folder = tiny_model(tmp_path_factory.mktemp("stranger") / "m", seed=3)
    return engine.policy(renamed(folder, change=merged_pairs))


def test_foreign_teachers_are_compared_where_both_read_the_same_text(learner, stranger):
    """Learner: a|b|c|d|e|end, teacher: ab|cd|e|end. Both stand at 0, 2, 4 and 5 characters."""
    task = next(iter(BY_KEY.values()))
    encode = learner.policy.renderer.prompt
    answer = [*encode(Task(taskset="x", prompt="abcde")).tokens.tolist(), 1]
    prompt = encode(task).tokens.tolist()
    groups = [as_group(replace(trajectory(prompt, answer), task=task.key))]
    signal = ForeignTeacher(teacher="s", top_k=5)
    (group,) = check_signal(signal, groups, tools_of(learner, s=stranger))
    columns = group.members[0].columns
    cut = len(prompt)
    assert columns[Column.TEACHER_ALIGNED][cut:].tolist() == [1, 0, 1, 0, 1, 1]

    pieces = stranger.renderer.prompt(Task(taskset="x", prompt="abcde")).tokens.tolist()
    assert len(pieces) == 3
    asked = stranger.renderer.prompt(task).tokens.tolist()
    by_hand = trajectory(asked, [*pieces, 1])
    ((_, values),) = stranger.distributions([by_hand], top_k=5)
    rows = columns[Column.TEACHER_SORTED][cut:]
    np.testing.assert_allclose(rows[[0, 2, 4, 5]], values[len(asked) :], rtol=1e-5)


def written(learner, text, *, own, ended=True):
    """A rollout of a text, in the learner's tokens, with the log-probs it was sampled with."""
    task = next(iter(BY_KEY.values()))
    encode = learner.policy.renderer.prompt
    answer = encode(Task(taskset="x", prompt=text)).tokens.tolist() + [1] * ended
    prompt = encode(task).tokens.tolist()
    end = End.COMPLETED if ended else End.LENGTH
    group = as_group(replace(trajectory(prompt, answer), task=task.key, end=end))
    logprobs = np.array([np.nan] * len(prompt) + own, np.float32)
    groups = with_column([group], Column.BEHAVIOUR_LOGPROB, lambda _: logprobs)
    return groups, len(prompt), task


def credit_of_spans(learner, teacher, groups):
    signal = SpanAdvantage(teacher="s")
    (group,) = check_signal(signal, groups, tools_of(learner, s=teacher))
    return group.members[0].columns[Column.ADVANTAGE]


@pytest.mark.parametrize("ended", [True, False])
def test_spans_of_two_tokenizers_are_compared_by_hand(learner, stranger, ended):
    """Learner: a|b|c|d|e|end, teacher: ab|cd|e|end. Spans: ab, cd, e, and the end if any."""
    own = [-1.0, -0.5, -2.0, -0.25, -3.0, -0.125][: 6 if ended else 5]
    groups, cut, task = written(learner, "abcde", own=own, ended=ended)
    got = credit_of_spans(learner, stranger, groups)
    asked = stranger.renderer.prompt(task).tokens.tolist()
    answer = stranger.renderer.answer(task, "abcde").tolist()
    assert len(answer) == 4
    (said,) = stranger.logprobs([trajectory(asked, answer)])
    ab, cd, e, end = said[len(asked) :]
    expected = [ab + 1.5, ab + 1.5, cd + 2.25, cd + 2.25, e + 3.0, end + 0.125][: len(own)]
    np.testing.assert_allclose(got[cut:], expected, rtol=1e-4)
    assert np.isnan(got[:cut]).all()


def test_an_answer_cut_off_inside_of_a_span_has_no_credit_there(learner, stranger):
    """Learner: a|b|c, teacher: ab|c. Then learner: a|b|a|b where the teacher says ab|ab."""
    groups, cut, _ = written(learner, "abc", own=[-1.0] * 3, ended=False)
    assert (credit_of_spans(learner, stranger, groups)[cut:] != 0).all()
    whole = common_spans([0, 1, 2, 3], [0, 2, 4, 4], ended=False)
    assert whole == [(slice(0, 2), slice(0, 1))], "the third token ends inside of the teacher's"


def test_a_token_without_text_belongs_to_what_follows():
    assert common_spans([0, 0, 1, 2], [0, 1, 2, 2], ended=False) == [
        (slice(0, 2), slice(0, 1)),
        (slice(2, 3), slice(1, 2)),
    ]
    assert common_spans([0, None, 1, 1], [0, 1, 1], ended=True) == [
        (slice(0, 2), slice(0, 1)),
        (slice(2, 3), slice(1, 2)),
    ]


def test_with_one_tokenizer_every_span_is_a_token(learner, teacher):
    """Then span_opd is opd_sampled."""
    groups = drawn(learner, size=3)
    tools = tools_of(learner, t=teacher)
    spans = SpanAdvantage(teacher="t").score(groups, tools)
    asked = TeacherLogprobs(routes={"*": "t"}).score(groups, tools)
    plain = TeacherAdvantage().score(asked, tools)
    compared = 0
    for got, want in zip(members(spans), members(plain), strict=True):
        cut = got.trajectory.prompt_length
        text = learner.policy.renderer.text(got.trajectory.tokens[cut:])
        again = teacher.renderer.answer(BY_KEY[got.trajectory.task], text)
        done = got.trajectory.end is End.COMPLETED
        if again[: None if done else -1].tolist() == got.trajectory.tokens[cut:].tolist():
            compared += 1
            np.testing.assert_allclose(
                got.columns[Column.ADVANTAGE], want.columns[Column.ADVANTAGE], atol=1e-4
            )
    assert compared > 0


def test_the_expected_gradient_of_one_span_is_that_of_the_reverse_kl_between_spans():
    """Two tokens of the learner are one of the teacher: summed exactly over all nine spans."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 3, dtype=torch.float64, generator=generator).requires_grad_()
    other = torch.randn(9, dtype=torch.float64, generator=generator).log_softmax(-1)
    expected, exact = (torch.zeros((), dtype=torch.float64) for _ in range(2))
    for code, (_, own, _) in enumerated_spans(logits):
        gain = float(other[code] - own.detach().sum())
        groups = credited_group(
            {Column.ADVANTAGE: [gain, gain], Column.BEHAVIOUR_LOGPROB: own.tolist()}
        )
        term = PolicyGradient()
        (batch,) = pack(groups, needs=frozenset(term.needs), max_tokens=99)
        loss_N = term.values({Stat.SAMPLED_LOGPROB: own}, batch).loss
        probability = own.sum().exp()
        expected = expected + probability.detach() * loss_N.sum()
        exact = exact + probability * (own.sum() - other[code])
    (got,) = torch.autograd.grad(expected, logits, retain_graph=True)
    (want,) = torch.autograd.grad(exact, logits)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert float(want.abs().max()) > 0.01


def enumerated_spans(logits):
    return enumerate(enumerated(2, logits, logits.detach()))


def test_boundaries_leave_out_the_middle_of_a_character():
    class Halves:
        """Token 1 and 2 together are é; alone they are half of it."""

        def text(self, tokens):
            return "".join({0: "a"}.get(int(t), "") for t in tokens) + (
                "é" if {1, 2} <= set(tokens.tolist()) else "\ufffd" if 1 in tokens.tolist() else ""
            )

    assert boundaries(Halves(), np.array([0, 1, 2], np.int32)) == [0, 1, None, 2]


# --- named methods ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        Opsd(tasks=("letters",)),
        Sdft(tasks=("letters",)),
        ContextDistillation(tasks=("letters",), context="Be brief. {question}"),
        OpdSampled(tasks=("letters",), teachers={"*": "base"}),
        IwOpd(tasks=("letters",), teachers={"*": "base"}),
        GOpd(tasks=("letters",), teachers={"*": "base"}),
        Opd2(tasks=("letters",), teacher="tuned", teacher_base="base"),
        Minillm(tasks=("letters",), teachers={"*": "base"}),
        SpanOpd(tasks=("letters",), teacher="base"),
    ],
    ids=lambda m: type(m).__name__,
)
def test_named_methods_are_legal(method):
    check_composition(method.compose(), stage="s")


def test_sampled_distillation_compares_one_and_the_temperature():
    warm = {"tasks": ("letters",), "sampling": SamplingSpec(temperature=0.7)}
    for method in (OpdSampled(teachers={"*": "base"}, **warm), SpanOpd(teacher="base", **warm)):
        with pytest.raises(LegalityError, match=r"temperature 0\.7"):
            check_composition(method.compose(), stage="s")


def test_methods_that_would_be_another_one_are_refused():
    with pytest.raises(ConfigError, match="opd_sampled"):
        GOpd(tasks=("letters",), teachers={"*": "base"}, extrapolation=1.0)
    with pytest.raises(ConfigError, match="opd_sampled"):
        IwOpd(tasks=("letters",), teachers={"*": "base"}, early=0.0)


def test_a_missing_teacher_log_prob_is_named():
    with pytest.raises(LegalityError, match="teacher_advantage needs teacher_logprob"):
        check_composition(
            Composition(
                source=Rollouts(tasks=("letters",)),
                signals=(TeacherAdvantage(),),
                terms=(PolicyGradient(),),
            ),
            stage="s",
        )
