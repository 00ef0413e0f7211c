"""Members of a group that differ: who wrote what, what the policy read, and what is trained."""

import numpy as np
import pytest
from material import gradients, largest_gap, with_column
from staging import check_resume, make_world

from posttrain.core.errors import ConfigError, LegalityError, TaskError
from posttrain.core.provenance import Kind
from posttrain.core.task import Message, Role, Task
from posttrain.core.trajectory import Column, End
from posttrain.numerics.batch import pack
from posttrain.parts.composition import Composition
from posttrain.parts.credit.advantages import GroupAdvantage
from posttrain.parts.credit.shaping import KLPenalty
from posttrain.parts.guided.presets import GuidedGrpo, Luffy, PrefixRft, Uft
from posttrain.parts.legality import admit, check_composition, column_readers
from posttrain.parts.logprobs import ReferenceLogprobs
from posttrain.parts.policy.losses import ClippedPolicyGradient
from posttrain.parts.rewards.verify import Verify
from posttrain.parts.sources.members import Guided, Hinted, Rival
from posttrain.parts.sources.rollouts import Rollouts
from posttrain.parts.supervised.likelihood import CrossEntropy
from posttrain.protocols import Request
from posttrain.testing import FakeTaskSet, check_source, fake_tools, tiny_model
from posttrain.training.objective import StageObjective

TASKS = FakeTaskSet(answer="abcd")
BY_KEY = {t.key: t for t in TASKS.train}


@pytest.fixture
def world(tmp_path, engine, tiny_folder):
    return make_world(tmp_path, engine, tiny_folder)


def rollouts(members, *, size=4):
    return Rollouts(tasks=("letters",), group_size=size, max_new_tokens=5, members=members)


def tools_of(learner, tasks=TASKS, **policies):
    return fake_tools(learner.policy, policies=policies, tasksets={"letters": tasks})


def source(learner, members, *, size=4, **policies):
    return rollouts(members, size=size).open(tools_of(learner, **policies), seed=7)


def answer_tokens(learner, group):
    return learner.policy.renderer.answer(BY_KEY[group.task], "abcd").tolist()


# --- beginnings ------------------------------------------------------------------------------


def test_an_answer_is_what_a_demonstration_would_train_on(learner):
    renderer = learner.policy.renderer
    plain, chat = "1+1=", (Message(role=Role.USER, content="1+1="),)
    for prompt in (plain, chat):
        tokens = renderer.answer(Task(taskset="x", prompt=prompt), "abc")
        assert renderer.text(tokens) == "abc"
        assert tokens[-1] in renderer.end_tokens
        assert len(tokens) == 4


@pytest.mark.parametrize("learn", [False, True])
def test_a_guided_member_goes_on_from_what_was_given(learner, learn):
    spec = rollouts(Guided(start=0.6, end=0.6, learn=learn))  # 3 of the 5 tokens
    drawn = check_source(spec, tools_of(learner), seed=7)
    for group in drawn.draw(3, step=0):
        given = answer_tokens(learner, group)[:3]
        question = learner.policy.renderer.prompt(BY_KEY[group.task]).tokens.tolist()
        for member in group.members:
            t = member.trajectory
            assert t.tokens[: len(question) + 3].tolist() == question + given
            assert t.prompt_length == len(question) + (0 if learn else 3)
            assert t.answer_start == len(question)
            assert t.authors == ({Kind.LEARNER, Kind.EXTERNAL} if learn else {Kind.LEARNER})
            assert [s.producer.kind for s in t.spans[-2:]] == [Kind.EXTERNAL, Kind.LEARNER]
            (again,) = learner.policy.generate(
                [
                    Request(
                        prompt=np.array(question + given, np.int32),
                        sampling=t.spans[-1].sampling,
                        max_new_tokens=5,
                    )
                ]
            )
            assert t.tokens[len(question) + 3 :].tolist() == again.tokens.tolist()
            known = member.columns[Column.BEHAVIOUR_LOGPROB]
            unknown = [True] * 3 + [False] * len(again.tokens)
            assert np.isnan(known[len(question) :]).tolist() == unknown
            (scored,) = learner.policy.logprobs([t])
            own = slice(len(question) + 3, None)
            np.testing.assert_allclose(scored[own], known[own], atol=1e-4)


def test_the_verifier_reads_what_was_given_too(learner):
    """A scorer of how answers begin finds every guided one right."""

    class Beginnings:
        name, train, held_out, success = TASKS.name, TASKS.train, TASKS.held_out, 1.0

        def score(self, tasks, completions):
            return [float(c.startswith(t.answer)) for t, c in zip(tasks, completions, strict=True)]

    drawn = source(learner, Guided(start=0.99, end=0.99), size=16).draw(4, step=0)
    judged = Verify().score(drawn, tools_of(learner, Beginnings()))
    rewards = [float(m.columns[Column.REWARD]) for g in judged for m in g.members]
    texts = [
        learner.policy.renderer.text(m.trajectory.tokens[m.trajectory.answer_start :])
        for g in judged
        for m in g.members
    ]
    assert all(text.startswith("abcd") for text in texts)
    assert rewards == [1.0] * 64
    assert len(set(texts)) > 1


def test_a_whole_demonstration_is_a_member(learner):
    whole = Guided(start=1, end=1, count=1, learn=True)
    for group in source(learner, whole).draw(2, step=5):
        *own, given = [m.trajectory for m in group.members]
        assert all(t.authors == {Kind.LEARNER} for t in own)
        assert given.authors == {Kind.EXTERNAL}
        assert given.tokens[given.prompt_length :].tolist() == answer_tokens(learner, group)
        assert given.end is End.COMPLETED


def test_lengths_by_their_formulas():
    n = 10
    fixed = Guided(start=0.5, end=0.1, draws=3)
    assert [fixed.num_given(n, draw=d, seed=0) for d in range(4)] == [5, 3, 1, 1]
    assert Guided(start=0.3, end=0.3).num_given(n, draw=0, seed=0) == 3, "not 2 by rounding"
    whole = Guided(start=1.0, end=0.9, learn=False)
    assert whole.num_given(n, draw=0, seed=0) == 9, "the last token is left to the policy"
    binomial = Guided(start=0.4, end=0.4, length="binomial", learn=True)
    lengths = [binomial.num_given(n, draw=0, seed=s) for s in range(4000)]
    assert set(lengths) <= {0, 2, 4, 6, 8, 10}
    assert np.mean(lengths) == pytest.approx(0.4 * n, abs=0.1)
    assert np.var(lengths) == pytest.approx((n / 5) ** 2 * 5 * 0.4 * 0.6, rel=0.1)
    uniform = Guided(start=0.95, end=0.0, draws=2, length="uniform", learn=True)
    lengths = [uniform.num_given(n, draw=1, seed=s) for s in range(4000)]
    counts = np.bincount(lengths, minlength=10) / 4000
    np.testing.assert_allclose(counts, [1 / 9.5] * 9 + [0.5 / 9.5], atol=0.02)
    assert {uniform.num_given(n, draw=0, seed=s) for s in range(50)} == {9}


def test_groups_differ_and_steps_repeat(learner):
    drawn = source(learner, Guided(start=0.5, end=0.5, length="binomial", learn=True))
    lengths = [
        g.members[0].trajectory.spans[-2].length
        for g in drawn.draw(12, step=0)
        if g.members[0].trajectory.spans[-2].producer.kind is Kind.EXTERNAL
    ]
    assert len(set(lengths)) > 1
    ids = [[m.trajectory.id for g in drawn.draw(4, step=2) for m in g.members] for _ in range(2)]
    assert ids[0] == ids[1]


def test_nothing_given_is_an_ordinary_rollout(learner):
    guided = source(learner, Guided(start=0.5, end=0.0, draws=2)).draw(3, step=1)
    plain = source(learner, None).draw(3, step=1)
    for a, b in zip(guided, plain, strict=True):
        assert [m.trajectory.id for m in a.members] == [m.trajectory.id for m in b.members]


def test_the_gradient_is_that_of_the_continuation_alone(learner):
    """Guided GRPO against the same numbers with the beginning as part of the question."""
    drawn = source(learner, Guided(start=0.6, end=0.6)).draw(4, step=0)
    drawn = Verify().score(drawn, tools_of(learner))
    rewards = iter(np.arange(16) % 3)
    drawn = with_column(drawn, Column.REWARD, lambda t: np.array(float(next(rewards))))
    groups = GroupAdvantage().score(drawn, tools_of(learner))
    terms = (ClippedPolicyGradient(aggregate="sequence_mean"),)
    kept = admit(groups, terms, version=0, max_age=0).kept
    objective = StageObjective(terms)
    whole = pack(kept, needs=column_readers(terms), max_tokens=9999)
    value, grads = gradients(learner, whole, objective)
    split, parts = gradients(
        learner, pack(kept, needs=column_readers(terms), max_tokens=9), objective
    )
    assert split == pytest.approx(value, abs=1e-6)
    assert largest_gap(grads, parts) < 1e-5
    given = sum(s.length for g in kept for m in g.members for s in m.trajectory.spans[-2:-1])
    trained = sum(len(b.target_N) for b in whole)
    own = [len(m.trajectory) - m.trajectory.prompt_length for g in kept for m in g.members]
    assert trained == sum(own)
    assert given == 3 * 16


# --- rivals and hints ------------------------------------------------------------------------


def test_a_rival_writes_the_last_member(learner, engine, tmp_path):
    other = engine.policy(str(tiny_model(tmp_path / "m", seed=5)))
    drawn = source(learner, Rival(policy="base"), base=other)
    for group in drawn.draw(3, step=0):
        kinds = [m.trajectory.authors for m in group.members]
        assert kinds == [{Kind.LEARNER}] * 3 + [{Kind.TEACHER}]
        rival = group.members[-1]
        (scored,) = other.logprobs([rival.trajectory])
        own = slice(rival.trajectory.prompt_length, None)
        np.testing.assert_allclose(
            scored[own], rival.columns[Column.BEHAVIOUR_LOGPROB][own], atol=1e-4
        )


def test_a_hint_is_read_and_not_recorded(learner):
    drawn = source(learner, Hinted(context="{answer}! {question}", count=2))
    renderer = learner.policy.renderer
    for group in drawn.draw(3, step=0):
        task = BY_KEY[group.task]
        hinted = renderer.prompt(Task(taskset="x", prompt=f"abcd! {task.text}")).tokens
        for index, member in enumerate(group.members):
            t = member.trajectory
            assert t.tokens[: t.prompt_length].tolist() == renderer.prompt(task).tokens.tolist()
            read = hinted if index >= 2 else renderer.prompt(task).tokens
            (again,) = learner.policy.generate(
                [Request(prompt=read, sampling=t.spans[-1].sampling, max_new_tokens=5)]
            )
            assert t.tokens[t.prompt_length :].tolist() == again.tokens.tolist()
            unknown = np.isnan(member.columns[Column.BEHAVIOUR_LOGPROB][t.prompt_length :])
            assert unknown.all() == (index >= 2)


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Guided(start=0.2, end=0.5), "0 <= end <= start"),
        (lambda: Guided(author=Kind.LEARNER), "author=learner"),
        (lambda: Guided(start=1, end=1), "whole demonstrations throughout"),
        (lambda: Guided(start=1, end=1, count=1), "whole demonstrations throughout"),
        (lambda: Rival(policy="learner"), "its own rival"),
        (lambda: Hinted(context="{question}"), "{question} and {answer}"),
        (lambda: Hinted(context="{"), "write {{"),
        (lambda: Rollouts(tasks=("t",), members=Rival(count=8)), "from 1 to 7"),
        (lambda: Rollouts(tasks=("t",), members=Guided(count=0)), "1 or more"),
        (lambda: Rollouts(tasks=("t",), policy="input", members=Rival()), "another author"),
        (
            lambda: Rollouts(
                tasks=("t",), policy="input", members=Guided(author=Kind.TEACHER, learn=True)
            ),
            "another author",
        ),
    ],
)
def test_members_without_a_meaning(make, words):
    with pytest.raises(ConfigError) as caught:
        make()
    assert words in str(caught.value)


def test_a_task_without_a_demonstration_is_found_before_anything_is_drawn(learner):
    with pytest.raises(TaskError, match="no text under 'solution'"):
        source(learner, Guided(column="solution"))


JUDGED = (Verify(), GroupAdvantage())


def composed(members, *terms, signals=JUDGED):
    return Composition(source=Rollouts(tasks=("t",), members=members), signals=signals, terms=terms)


def test_what_a_term_may_read_of_members():
    grpo = ClippedPolicyGradient()
    learnt = Guided(learn=True)
    check_composition(composed(Guided(), grpo), stage="s")
    check_composition(composed(learnt, grpo, CrossEntropy(where=(Kind.EXTERNAL,))), stage="s")
    with pytest.raises(LegalityError, match="no term reads tokens written by external"):
        check_composition(composed(learnt, grpo), stage="s")
    with pytest.raises(LegalityError, match="needs behaviour_logprob"):
        check_composition(composed(Hinted(context="{answer} {question}"), grpo), stage="s")
    penalty = (Verify(), ReferenceLogprobs(), KLPenalty(), GroupAdvantage())
    nll = CrossEntropy(where=(Kind.EXTERNAL,))
    with pytest.raises(LegalityError, match="kl_penalty needs behaviour_logprob"):
        check_composition(composed(learnt, grpo, nll, signals=penalty), stage="s")


# --- methods ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        GuidedGrpo(tasks=("rows",), draws=4, max_new_tokens=4),
        Uft(tasks=("rows",), draws=4, max_new_tokens=4),
        PrefixRft(tasks=("rows",), draws=4, max_new_tokens=4, group_size=4),
        Luffy(tasks=("rows",), max_new_tokens=4, group_size=4),
    ],
    ids=lambda m: type(m).__name__,
)
def test_guided_methods_resume_exactly(world, method):
    _, metrics = check_resume(world, method, steps=4, updates_per_draw=2)
    assert max(m["grad_norm"] for m in metrics) > 1e-4
    assert all(np.isfinite([m["loss"], m["grad_norm"]]).all() for m in metrics)


def test_luffy_divides_both_sums_by_the_same_constant(world):
    """With equal advantages and probabilities a given token weighs what an own one does."""
    own, given, _ = Luffy(tasks=("t",), group_size=8, max_new_tokens=50).compose().terms
    # Σ_own / (7 per group) · 7/(8·50) and Σ_given / (1 per group) · 1/(8·50)
    assert own.weight / 7 == pytest.approx(given.weight / 1)
    assert given.where == (Kind.EXTERNAL,)
    assert own.aggregate == given.aggregate == "sequence_sum"
