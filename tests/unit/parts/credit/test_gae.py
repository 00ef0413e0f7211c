"""Generalised advantage estimation, against its definition; and where it is legal."""

import numpy as np
import pytest

from posttrain.core.config import convert, plain
from posttrain.core.errors import ConfigError, LegalityError
from posttrain.core.learner import ScalarHead
from posttrain.core.provenance import Kind, Producer, Role, Sampling, Span
from posttrain.core.trajectory import Column, Group, Trajectory
from posttrain.parts.composition import Compose, Composition
from posttrain.parts.credit.advantages import GroupAdvantage
from posttrain.parts.credit.gae import Gae, gae
from posttrain.parts.legality import check_composition, readouts
from posttrain.parts.policy.losses import ClippedPolicyGradient
from posttrain.parts.policy.ppo import Ppo, ValuePretraining, Vapo
from posttrain.parts.policy.value import ValueLoss
from posttrain.parts.rewards.verify import Verify
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.sources.rollouts import Rollouts
from posttrain.parts.supervised.likelihood import CrossEntropy
from posttrain.testing import FakePolicy, as_group, check_signal, example_trajectory, fake_tools
from posttrain.training.draw_metrics import value_metrics

LIVE = Rollouts(tasks=("sums",))


def by_definition(rewards, values, gamma, lam):
    """The double sum, term by term."""
    num = len(rewards)
    later = [*values[1:], 0.0]
    delta = [rewards[t] + gamma * later[t] - values[t] for t in range(num)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, num)) for t in range(num)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (1.0, 0.0)])
def test_the_recursion_is_the_double_sum(gamma, lam):
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=7), rng.normal(size=7)
    np.testing.assert_allclose(
        gae(rewards, values, gamma=gamma, lam=lam),
        by_definition(rewards, values, gamma, lam),
        atol=1e-12,
    )


def test_its_ends_are_monte_carlo_and_the_td_error():
    rng = np.random.default_rng(1)
    rewards, values, gamma = rng.normal(size=6), rng.normal(size=6), 0.9
    to_go = [sum(gamma ** (k - t) * rewards[k] for k in range(t, 6)) for t in range(6)]
    np.testing.assert_allclose(gae(rewards, values, gamma=gamma, lam=1.0), to_go - values)
    error = rewards + gamma * np.append(values[1:], 0.0) - values
    np.testing.assert_allclose(gae(rewards, values, gamma=gamma, lam=0.0), error)


def test_without_values_and_discount_every_token_gets_the_reward():
    rewards = np.array([0.0, 0.0, 0.0, 0.7])
    assert gae(rewards, np.zeros(4), gamma=1.0, lam=1.0).tolist() == [0.7] * 4


def critic(value):
    """Tools whose learner has this value head."""
    return fake_tools(FakePolicy({"a": 1.0}, version=0, judgement=value))


def rewarded(*rewards, answers=None):
    answers = answers or [(4, 5, 6), (7, 8)][: len(rewards)]
    group = as_group(*(example_trajectory(answer=a, kind=Kind.LEARNER) for a in answers))
    members = zip(group.members, rewards, strict=True)
    scored = (m.with_columns({Column.REWARD: np.array(r)}) for m, r in members)
    return Group(task=group.task, members=tuple(scored))


def test_columns_of_a_draw():
    """Worked out by hand: values are a tenth of the number of characters read."""
    spec = Gae(gamma=1.0, lam=0.0, value_lam=1.0, whiten=False)
    (group,) = spec.score([rewarded(1.0, 0.5)], critic(lambda text: len(text) / 10))
    first, second = (m.columns for m in group.members)
    np.testing.assert_allclose(first[Column.OLD_VALUE][3:], [0.3, 0.4, 0.5], rtol=1e-6)
    np.testing.assert_allclose(first[Column.ADVANTAGE][3:], [0.1, 0.1, 0.5], rtol=1e-5)
    np.testing.assert_allclose(first[Column.RETURN][3:], [1.0, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(second[Column.RETURN][3:], [0.5, 0.5], rtol=1e-6)
    assert np.isnan(first[Column.OLD_VALUE][:3]).all()
    assert first[Column.ADVANTAGE][:3].tolist() == [0, 0, 0]


def test_token_rewards_are_earned_where_they_stand():
    group = rewarded(1.0)
    earned = np.array([9.0, 9.0, 9.0, -0.5, 0.25, 0.0])  # those of the prompt do not count
    group = Group(
        task=group.task,
        members=tuple(m.with_columns({Column.TOKEN_REWARD: earned}) for m in group.members),
    )
    (scored,) = Gae(lam=1.0, whiten=False).score([group], critic(lambda text: 0.0))
    np.testing.assert_allclose(
        scored.members[0].columns[Column.ADVANTAGE][3:], [0.75, 1.25, 1.0], rtol=1e-6
    )


def test_longer_answers_look_further():
    spec = Gae(lam=0.3, length_alpha=0.5, value_lam=1.0, whiten=False)
    assert [spec.lam_of(n) for n in (1, 2, 4, 40)] == [0.0, 0.0, 0.5, 0.95]
    group = rewarded(1.0, answers=[(4, 5, 6, 7)])
    (scored,) = spec.score([group], critic(lambda text: 0.1 * len(text)))
    values = 0.1 * np.arange(3, 7)
    expected = by_definition([0, 0, 0, 1.0], values, 1.0, 0.5)
    columns = scored.members[0].columns
    np.testing.assert_allclose(columns[Column.ADVANTAGE][3:], expected, rtol=1e-5)
    np.testing.assert_allclose(columns[Column.RETURN][3:], 1.0, rtol=1e-6)


def test_whitened_over_trained_tokens_of_the_draw():
    tools = critic(lambda text: len(text) / 10)
    groups = Gae().score([rewarded(1.0, 0.0), rewarded(0.5)], tools)
    flat = np.concatenate([m.columns[Column.ADVANTAGE][3:] for g in groups for m in g.members])
    assert flat.mean() == pytest.approx(0, abs=1e-6)
    assert flat.std(ddof=1) == pytest.approx(1, abs=1e-4)
    raw = Gae(whiten=False).score([rewarded(1.0, 0.0), rewarded(0.5)], tools)
    assert [m.columns[Column.RETURN].tolist()[3:] for g in raw for m in g.members] == [
        m.columns[Column.RETURN].tolist()[3:] for g in groups for m in g.members
    ], "the critic's target is not whitened"


def test_identical_rewards_and_a_flat_critic_teach_nothing():
    groups = Gae(lam=1.0).score([rewarded(1.0, 1.0)], critic(lambda text: 0.25))
    assert not any(m.columns[Column.ADVANTAGE].any() for g in groups for m in g.members)


def test_text_between_turns_has_no_value_and_passes_credit_on():
    live = Producer(kind=Kind.LEARNER, name="l")
    tool = Producer(kind=Kind.ENVIRONMENT, name="e")

    def said(length):
        return Span(length=length, role=Role.ASSISTANT, producer=live, versions=(0, 0),
                    sampling=Sampling())  # fmt: skip

    heard = Span(length=2, role=Role.USER, producer=tool)
    t = Trajectory(task="t/0", tokens=np.arange(1, 8, dtype=np.int32), prompt_length=2,
                   spans=(heard, said(1), heard, said(2)))  # fmt: skip
    group = as_group(t)
    group = Group(
        task="t/0",
        members=(group.members[0].with_columns({Column.REWARD: np.array(1.0)}),),
    )
    signal = Gae(lam=0.5, whiten=False)
    columns = signal.score([group], critic(lambda text: 0.1 * len(text)))[0].members[0].columns
    expected = by_definition([0, 0, 1.0], [0.2, 0.5, 0.6], 1.0, 0.5)
    np.testing.assert_allclose(columns[Column.ADVANTAGE][[2, 5, 6]], expected, rtol=1e-5)
    assert np.isnan(columns[Column.RETURN][[0, 1, 3, 4]]).all()


def test_contract():
    tools = critic(lambda text: len(text) / 10)
    check_signal(Gae(), [rewarded(1.0, 0.0), rewarded(0.5)], tools)
    assert Gae().score([], tools) == []


def test_no_reward_and_no_head_are_refused():
    bare = as_group(example_trajectory(kind=Kind.LEARNER))
    with pytest.raises(LegalityError, match="no reward"):
        Gae().score([bare], critic(lambda text: 0.0))
    with pytest.raises(LegalityError, match="no scalar head"):
        Gae().score([rewarded(1.0)], fake_tools(FakePolicy({"a": 1.0})))


def test_explained_variance():
    signal, tools = Gae(lam=1.0, whiten=False), critic(lambda text: len(text) / 10)
    scored = signal.score([rewarded(1.0, 0.0)], tools)
    returns, values = np.array([1, 1, 1, 0, 0.0]), np.array([0.3, 0.4, 0.5, 0.3, 0.4])
    metrics = value_metrics(scored)
    assert metrics["critic/explained_variance"] == pytest.approx(
        1 - np.var(returns - values) / np.var(returns), rel=1e-5
    )
    assert metrics["critic/value"] == pytest.approx(values.mean())
    assert metrics["critic/return"] == pytest.approx(0.6)
    assert value_metrics([rewarded(1.0)]) == {}
    flat = signal.score([rewarded(1.0, 1.0)], tools)
    assert "critic/explained_variance" not in value_metrics(flat)


# --- legality --------------------------------------------------------------------------------

PG, VALUE, HEAD = ClippedPolicyGradient(), ValueLoss(), ScalarHead()
DATA = Dataset(path="x.jsonl", reward="r")


@pytest.mark.parametrize(
    ("composition", "words"),
    [
        (Composition(source=LIVE, signals=(Verify(), Gae()), terms=(PG, VALUE)), "no scalar head"),
        (
            Composition(
                source=LIVE,
                signals=(Verify(), GroupAdvantage()),
                terms=(PG,),
                scalar_head=HEAD,
            ),
            "no term reads",
        ),
        (Composition(source=LIVE, signals=(Verify(), Gae()), terms=(PG,)), "no term trains"),
        (Composition(source=LIVE, signals=(Gae(),), terms=(PG, VALUE)), "gae needs reward"),
        (
            Composition(source=LIVE, signals=(Verify(),), terms=(VALUE,), scalar_head=HEAD),
            "needs old_value",
        ),
        (
            Composition(source=DATA, signals=(Gae(),), terms=(PG, VALUE), scalar_head=HEAD),
            "clipped_policy_gradient needs behaviour_logprob",
        ),
    ],
)
def test_what_cannot_work_is_refused_when_planned(composition, words):
    with pytest.raises(LegalityError, match=words):
        check_composition(composition, stage="s")


def test_a_critic_may_learn_from_logged_rewards():
    check_composition(
        Composition(source=DATA, signals=(Gae(),), terms=(VALUE,), scalar_head=HEAD), stage="s"
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Gae(lam=1.5), "from 0 to 1"),
        (lambda: Gae(gamma=-0.1), "from 0 to 1"),
        (lambda: Gae(length_alpha=0.0), "above 0"),
        (lambda: ValueLoss(clip=0.0), "or null"),
        (lambda: ScalarHead(trunk="shared", lr=1e-3), "separate trunk"),
        (lambda: ScalarHead(lr=-1.0), "0 or more"),
        (lambda: ValuePretraining(tasks=("t",), gamma=2.0), "from 0 to 1"),
    ],
)
def test_options_that_mean_nothing(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


# --- methods ---------------------------------------------------------------------------------


def test_methods_spelt_out():
    ppo = Ppo(tasks=("sums",), kl_beta=0.0).compose()
    assert ppo == Composition(
        source=Rollouts(tasks=("sums",), group_size=1),
        signals=(Verify(), Gae(gamma=1.0, lam=0.95)),
        terms=(ClippedPolicyGradient(), ValueLoss(clip=0.2, weight=0.1)),
        scalar_head=ScalarHead(trunk="separate", start="input"),
    )
    with_kl = Ppo(tasks=("sums",)).compose()
    tags = [str(s.__struct_config__.tag) for s in with_kl.signals]
    assert tags == ["verify", "reference_logprobs", "kl_penalty", "gae"]
    vapo = Vapo(tasks=("sums",)).compose()
    assert vapo.signals[-1] == Gae(value_lam=1.0, length_alpha=0.05)
    assert isinstance(vapo.terms[2], CrossEntropy)
    assert vapo.terms[2].limit.rewards == "positive"
    assert (vapo.terms[0].clip_low, vapo.terms[0].clip_high) == (0.2, 0.28)
    fitting = ValuePretraining(tasks=("sums",)).compose()
    assert fitting.terms == (ValueLoss(clip=None),)
    for made in (ppo, with_kl, vapo, fitting):
        check_composition(made, stage="s")


def test_compose_has_the_same_head():
    written = {
        "name": "compose",
        "source": {"type": "rollouts", "tasks": ["sums"]},
        "signals": [{"type": "verify"}, {"type": "gae", "lam": 0.9}],
        "terms": [{"type": "clipped_policy_gradient"}, {"type": "value_loss"}],
        "scalar_head": {"trunk": "shared"},
    }
    method = convert(written, Compose, origin="test")
    composition = method.compose()
    check_composition(composition, stage="s")
    assert composition.scalar_head == ScalarHead(trunk="shared")
    assert convert(plain(method), Compose, origin="again") == method


def test_readouts():
    assert readouts([PG, VALUE]) == {"value"}
    assert readouts([PG, CrossEntropy()]) == frozenset()
