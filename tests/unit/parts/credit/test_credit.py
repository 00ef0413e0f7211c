"""Credit, shaping and selection, against numbers worked out without our code."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from posttrain.core.errors import ConfigError, LegalityError
from posttrain.core.provenance import Kind, Producer, Role, Span
from posttrain.core.sampling import SamplingSpec
from posttrain.core.trajectory import Column, End, Group, Scored, Trajectory
from posttrain.parts.composition import Composition, method
from posttrain.parts.credit.advantages import (
    BestOfKAdvantage,
    DecoupledAdvantage,
    GroupAdvantage,
    best_of_k,
)
from posttrain.parts.credit.selection import (
    ClipCovariance,
    DropCutOff,
    KeepInformative,
    MarkCovariance,
    covariances,
)
from posttrain.parts.credit.shaping import KLPenalty, SoftLengthPenalty
from posttrain.parts.legality import admit, check_composition
from posttrain.parts.logprobs import ReferenceLogprobs, TrainerLogprobs
from posttrain.parts.policy.losses import ClippedPolicyGradient
from posttrain.parts.rewards.verify import Verify
from posttrain.parts.sources.rollouts import Rollouts
from posttrain.testing import fake_tools
from posttrain.training.draw_metrics import mismatch_metrics

EPS = 1e-6
TOOLS = fake_tools()
ME = Producer(kind=Kind.LEARNER, name="me")
ASKER = Producer(kind=Kind.ENVIRONMENT, name="task")


def member(reward, length=1, *, prompt=2, end=End.COMPLETED, **columns):
    spans = (
        Span(length=prompt, role=Role.USER, producer=ASKER),
        Span(length=length, role=Role.ASSISTANT, producer=ME, versions=(0, 0)),
    )
    tokens = np.arange(prompt + length, dtype=np.int32)
    trajectory = Trajectory(task="t/0", tokens=tokens, prompt_length=prompt, spans=spans, end=end)
    scored = Scored(trajectory=trajectory).with_columns({Column.REWARD: np.array(reward)})
    for name, values in columns.items():
        column = Column(name)
        if column.per_token:
            values = np.array([np.nan] * prompt + list(values), np.float64)
        scored = scored.with_columns({column: np.asarray(values)})
    return scored


def group(*members):
    return Group(task="t/0", members=members)


def of_rewards(*rewards):
    return group(*(member(r) for r in rewards))


def advantages(groups, spec):
    """Per group and member, the advantage at the last token; all written tokens must agree."""
    out = []
    for g in spec.score(groups, TOOLS):
        row = []
        for m in g.members:
            values = m.columns[Column.ADVANTAGE]
            assert values.dtype == np.float32
            assert len(set(values[m.trajectory.trainable].tolist())) == 1
            row.append(float(values[-1]))
        out.append(row)
    return out


R1, R2 = [1.0, 0.0, 0.0, 1.0, 0.5], [2.0, 2.0, -1.0, 0.0, 0.0]


def test_group_mean_with_every_scale():
    groups = [of_rewards(*R1), of_rewards(*R2), of_rewards(3.0, 3.0)]
    centred = [np.array(R1) - 0.5, np.array(R2) - 0.6, np.zeros(2)]
    plain = advantages(groups, GroupAdvantage(scale="none"))
    for got, want in zip(plain, centred, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    # unbiased standard deviations by hand: sums of squares over 4
    stds = [np.sqrt((0.25 * 4) / 4), np.sqrt((2 * 1.4**2 + 1.6**2 + 2 * 0.6**2) / 4), 1.0]
    scaled = advantages(groups, GroupAdvantage())
    for got, want, std in zip(scaled, centred, stds, strict=True):
        np.testing.assert_allclose(got, want / (std + EPS), rtol=1e-6)
    every = np.array([*R1, *R2, 3.0, 3.0])
    batch_std = np.sqrt(((every - every.mean()) ** 2).sum() / 11)
    lite = advantages(groups, GroupAdvantage(scale="batch_std"))
    for got, want in zip(lite, centred, strict=True):
        np.testing.assert_allclose(got, want / (batch_std + EPS), rtol=1e-5)
    gpg = advantages(groups, GroupAdvantage(scale="informative"))
    for got, want in zip(gpg, centred, strict=True):
        np.testing.assert_allclose(got, want * 12 / 10, rtol=1e-6)  # 10 of 12 are in unequal groups


def test_leave_one_out_is_the_centred_reward_times_g_over_g_minus_one():
    spec = GroupAdvantage(baseline="leave_one_out", scale="none")
    [got] = advantages([of_rewards(*R1)], spec)
    by_hand = [r - np.mean(R1[:i] + R1[i + 1 :]) for i, r in enumerate(R1)]
    np.testing.assert_allclose(got, by_hand, rtol=1e-6)
    np.testing.assert_allclose(got, 5 / 4 * (np.array(R1) - np.mean(R1)), rtol=1e-6)


def test_length_weighted_baseline_cancels_the_length_weighted_sum():
    lengths, rewards = [1, 4, 2], [1.0, 0.0, 0.5]
    g = group(*(member(r, n) for r, n in zip(rewards, lengths, strict=True)))
    [got] = advantages([g], GroupAdvantage(baseline="length_weighted", scale="none"))
    np.testing.assert_allclose(got, np.array(rewards) - 2 / 7, rtol=1e-6)
    assert abs(np.dot(got, lengths)) < 1e-6


def test_baselines_from_outside_the_group():
    groups = [of_rewards(1.0), of_rewards(0.0), of_rewards(0.5)]
    batch = advantages(groups, GroupAdvantage(baseline="batch_mean", scale="none"))
    np.testing.assert_allclose(batch, [[0.5], [-0.5], [0.0]])
    constant = GroupAdvantage(baseline="constant", value=0.25, scale="none")
    np.testing.assert_allclose(advantages(groups, constant), [[0.75], [-0.25], [0.25]])
    greedy = [
        group(member(1.0, baseline=0.0), member(0.0, baseline=0.0)),
        group(member(0.5, baseline=1.0)),
    ]
    got = advantages(greedy, GroupAdvantage(baseline="greedy", scale="none"))
    assert got == [[1.0, 0.0], [-0.5]]


def test_whitening_is_over_trained_tokens_only():
    """Prompts of any length and content change nothing; long answers count by their tokens."""
    spec = GroupAdvantage(baseline="constant", value=0.0, scale="whiten")
    rows = [(1.0, 3), (0.0, 1), (0.5, 2)]
    for prompts in ([2, 2, 2], [1, 50, 7]):
        g = group(*(member(r, n, prompt=p) for (r, n), p in zip(rows, prompts, strict=True)))
        [got] = advantages([g], spec)
        tokens = np.array([1.0] * 3 + [0.0] + [0.5] * 2)
        std = np.sqrt(((tokens - tokens.mean()) ** 2).sum() / 5)
        np.testing.assert_allclose(
            got, (np.array([1, 0, 0.5]) - tokens.mean()) / (std + EPS), rtol=1e-6
        )
        white = np.repeat(got, [3, 1, 2])
        assert abs(white.mean()) < 1e-6
        assert white.std(ddof=1) == pytest.approx(1, abs=1e-5)


ESTIMATORS = [
    GroupAdvantage(baseline=b, scale=s)
    for b in ("group_mean", "leave_one_out", "length_weighted")
    for s in ("std", "none", "batch_std", "whiten", "informative")
] + [GroupAdvantage(baseline="batch_mean", scale=s) for s in ("none", "batch_std", "whiten")]


@pytest.mark.parametrize("spec", ESTIMATORS, ids=lambda s: f"{s.baseline}-{s.scale}")
def test_identical_rewards_give_exactly_zero(spec):
    odd = 0.1  # whose mean over three is not itself
    groups = [group(*(member(odd, n) for n in (1, 3, 2))) for _ in range(3)]
    assert np.mean([odd] * 3) != odd
    assert advantages(groups, spec) == [[0.0] * 3] * 3


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out", "length_weighted"])
def test_a_group_of_one_is_refused(baseline):
    spec = GroupAdvantage(baseline=baseline, scale="none")
    with pytest.raises(LegalityError, match="a group of 1"):
        advantages([of_rewards(1.0, 0.0), of_rewards(1.0)], spec)


def test_one_trajectory_has_no_batch_and_a_missing_reward_is_named():
    with pytest.raises(LegalityError, match="on one trajectory"):
        advantages([of_rewards(1.0)], GroupAdvantage(baseline="batch_mean", scale="none"))
    bare = Scored(trajectory=member(1.0).trajectory)
    with pytest.raises(LegalityError, match="rewards \\[None, None\\]"):
        advantages([group(bare, bare)], GroupAdvantage())


def test_token_rewards_are_part_of_the_return():
    g = group(member(1.0, 2, token_reward=[-0.25, -0.25]), member(1.0, 2, token_reward=[0.0, 0.0]))
    assert advantages([g], GroupAdvantage(scale="none")) == [[-0.25, 0.25]]


def test_returns_to_go_leave_out_what_was_earned_before():
    g = group(member(1.0, 3, token_reward=[-0.5, 0.25, -1.0]), member(0.0, 1, token_reward=[0.5]))
    spec = GroupAdvantage(baseline="constant", value=0.0, scale="none", credit="to_go")
    first, second = spec.score([g], TOOLS)[0].members
    np.testing.assert_allclose(first.columns[Column.ADVANTAGE][2:], [-0.25, 0.25, 0.0])
    np.testing.assert_allclose(second.columns[Column.ADVANTAGE][2:], [0.5])


@pytest.mark.parametrize("k", [2, 3, 4])
def test_best_of_k_by_enumeration(k):
    rewards = np.array([0.3, 1.0, 1.0, -0.5])
    for i in range(4):
        others = [j for j in range(4) if j != i]
        gains = [
            max(0.0, rewards[i] - max(rewards[list(s)]))
            for s in itertools.combinations(others, k - 1)
        ]
        assert best_of_k(rewards, k=k)[i] == pytest.approx(np.mean(gains))


def test_best_of_k_is_an_unbiased_gradient_of_the_expected_best():
    """Exact sums over every draw of G = 3 from a policy over three answers, k = 2."""
    logits, rewards, size, k = np.array([0.2, -0.3, 0.5]), np.array([0.0, 1.0, 0.4]), 3, 2
    p = np.exp(logits) / np.exp(logits).sum()

    def expected_best(logits):
        q = np.exp(logits) / np.exp(logits).sum()
        pairs = itertools.product(range(3), repeat=k)
        return sum(q[a] * q[b] * max(rewards[a], rewards[b]) for a, b in pairs)

    step = 1e-6
    exact = [
        (expected_best(logits + d) - expected_best(logits - d)) / (2 * step)
        for d in np.eye(3) * step
    ]
    got = np.zeros(3)
    for draw in itertools.product(range(3), repeat=size):
        credit = best_of_k(rewards[list(draw)], k=k)
        scores = np.eye(3)[list(draw)] - p  # gradients of log p
        got += np.prod(p[list(draw)]) * (credit @ scores) * k / size
    np.testing.assert_allclose(got, exact, atol=1e-8)


def test_best_of_the_whole_group_rewards_its_lead_only():
    [g] = BestOfKAdvantage().score([of_rewards(0.2, 0.9, 0.5)], TOOLS)
    np.testing.assert_allclose([m.columns[Column.ADVANTAGE][-1] for m in g.members], [0, 0.4, 0])
    [flat] = BestOfKAdvantage(k=2).score([of_rewards(0.3, 0.3, 0.3)], TOOLS)
    assert all((m.columns[Column.ADVANTAGE] == 0).all() for m in flat.members)
    with pytest.raises(LegalityError, match="at least 3 members"):
        BestOfKAdvantage(k=3).score([of_rewards(1.0, 0.0)], TOOLS)


def test_decoupled_rewards_are_normalised_one_by_one():
    first = group(member(1.0, token_reward=[-9.0]), member(0.0, token_reward=[-1.0]))
    second = group(member(0.5, token_reward=[0.0]), member(0.5, token_reward=[2.0]))
    spec = DecoupledAdvantage(weights=(1.0, 0.5))
    scored = spec.score([first, second], TOOLS)
    a = 1 / np.sqrt(2)  # (1 - 0.5) / std of {0, 1}, whatever the scale of a reward
    sums = np.array([a - 0.5 * a, -a + 0.5 * a, -0.5 * a, 0.5 * a])
    want = sums / np.sqrt((sums**2).sum() / 3)
    got = [m.columns[Column.ADVANTAGE][-1] for g in scored for m in g.members]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    same = group(*(member(0.1, token_reward=[0.2]) for _ in range(3)))
    [flat] = spec.score([same], TOOLS)
    assert all((m.columns[Column.ADVANTAGE] == 0).all() for m in flat.members)


def test_penalties_add_up_and_stay_off_the_prompt():
    g = group(
        member(1.0, 3, behaviour_logprob=[-1.0, -2.0, -0.5], reference_logprob=[-1.5, -1.0, -0.5]),
        member(0.0, 1, behaviour_logprob=[-1.0], reference_logprob=[-1.0]),
    )
    length = SoftLengthPenalty(max_tokens=3, cache_tokens=2)
    both = length.score(KLPenalty(beta=0.1).score([g], TOOLS), TOOLS)[0].members
    np.testing.assert_allclose(
        both[0].columns[Column.TOKEN_REWARD], [0, 0, -0.05, 0.1, -1.0], atol=1e-12
    )
    np.testing.assert_allclose(both[1].columns[Column.TOKEN_REWARD], [0, 0, 0])
    assert both[0].scalar(Column.REWARD) == 1.0  # the verifier's opinion stays what it was


def test_keep_informative_and_cut_off_give_reasons_that_admission_acts_on():
    flat, mixed = of_rewards(1.0, 1.0), group(member(1.0), member(0.0, end=End.LENGTH))
    groups = KeepInformative().score([flat, mixed], TOOLS)
    groups = DropCutOff().score(groups, TOOLS)
    terms = (ClippedPolicyGradient(),)
    admission = admit(groups, terms, version=0, max_age=0)
    assert [len(g.members) for g in admission.kept] == [1]
    assert {str(r): [len(g.members) for g in gs] for r, gs in admission.discarded.items()} == {
        "equal rewards": [2],
        "cut off": [1],
    }
    assert [len(g.members) for g in admission.fresh] == [2, 2]
    first = DropCutOff().score([group(member(1.0, end=End.LENGTH), member(1.0))], TOOLS)
    again = KeepInformative().score(first, TOOLS)  # an earlier reason stays
    assert sorted(map(str, admit(again, terms, version=0, max_age=0).discarded)) == [
        "cut off",
        "equal rewards",
    ]


def with_covariances():
    rng = np.random.default_rng(0)
    members = [
        member(0.0, 20, advantage=rng.normal(0, 2, 20), behaviour_logprob=rng.normal(-1, 2, 20))
        for _ in range(5)
    ]
    return [group(*members[:2]), group(*members[2:])]


def test_covariance_by_hand():
    g = group(
        member(0.0, 2, advantage=[1.0, 1.0], behaviour_logprob=[-1.0, -3.0]),
        member(0.0, 1, advantage=[-2.0], behaviour_logprob=[-2.0]),
    )
    np.testing.assert_allclose(covariances([g]), [1.0 * 1.0, 1.0 * -1.0, -2.0 * 0.0])


def test_covariance_signals_touch_the_tokens_they_should():
    groups, cov = with_covariances(), covariances(with_covariances())
    spec = ClipCovariance(share=0.05, low=0.5, high=3.0)
    clipped = spec.score(groups, TOOLS)
    zeroed = np.concatenate(
        [m.columns[Column.ADVANTAGE][2:] == 0 for g in clipped for m in g.members]
    )
    assert zeroed.sum() == 5  # 5 % of 100 tokens
    assert ((cov[zeroed] > 0.5) & (cov[zeroed] < 3.0)).all()
    again = spec.score(with_covariances(), TOOLS)
    repeated = np.concatenate(
        [m.columns[Column.ADVANTAGE][2:] == 0 for g in again for m in g.members]
    )
    assert (zeroed == repeated).all()
    marked = MarkCovariance(share=0.03).score(groups, TOOLS)
    marks = np.concatenate([m.columns[Column.MARK][2:] for g in marked for m in g.members])
    assert set(np.flatnonzero(marks)) == set(np.argsort(-cov)[:3])
    nothing = ClipCovariance(low=1e6, high=1e7).score(groups, TOOLS)
    kept = zip(groups, nothing, strict=True)
    for a, b in ((a, b) for g, h in kept for a, b in zip(g.members, h.members, strict=True)):
        np.testing.assert_array_equal(a.columns[Column.ADVANTAGE], b.columns[Column.ADVANTAGE])


def test_mismatch_metrics_by_hand():
    assert mismatch_metrics([of_rewards(1.0)]) == {}
    g = group(
        member(0.0, 2, trainer_logprob=np.log([0.9, 0.2]), behaviour_logprob=np.log([0.3, 0.2])),
        member(0.0, 1, trainer_logprob=np.log([0.1]), behaviour_logprob=np.log([0.5])),
    )
    w = np.array([3.0, 1.0, 0.2])
    assert mismatch_metrics([g]) == pytest.approx(
        {
            "mismatch/mean_weight": 1.4,
            "mismatch/effective_share": 1.4**2 / ((9 + 1 + 0.04) / 3),
            "mismatch/above_2": 1 / 3,
            "mismatch/below_half": 1 / 3,
            "mismatch/log_weight": float(np.log(w).mean()),
        }
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GroupAdvantage(baseline="constant"), "value=None"),
        (lambda: GroupAdvantage(value=0.5), "value=0.5"),
        (lambda: GroupAdvantage(baseline="batch_mean"), "scale=std"),
        (lambda: GroupAdvantage(baseline="greedy", scale="informative"), "scale=informative"),
        (lambda: BestOfKAdvantage(k=1), "k=1"),
        (lambda: DecoupledAdvantage(weights=(1.0, 0.0)), "weights"),
        (lambda: KLPenalty(beta=0.0), "beta is 0.0"),
        (lambda: SoftLengthPenalty(max_tokens=4, cache_tokens=5), "cache_tokens=5"),
        (lambda: ClipCovariance(low=5.0, high=1.0), "low=5.0"),
        (lambda: MarkCovariance(share=0.0), "share is 0.0"),
    ],
)
def test_options_that_cannot_work_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def composed(*signals, group_size=4, temperature=1.0):
    sampling = SamplingSpec(temperature=temperature)
    return Composition(
        source=Rollouts(tasks=("a",), group_size=group_size, sampling=sampling),
        signals=(Verify(), *signals),
        terms=(ClippedPolicyGradient(),),
    )


@pytest.mark.parametrize(
    ("signals", "size"),
    [
        ((GroupAdvantage(),), 1),
        ((GroupAdvantage(baseline="leave_one_out", scale="none"),), 1),
        ((BestOfKAdvantage(k=5),), 4),
        ((GroupAdvantage(baseline="batch_mean", scale="none"), KeepInformative()), 1),
    ],
)
def test_small_groups_are_refused_when_planned(signals, size):
    with pytest.raises(LegalityError, match=f"on groups of {size}"):
        check_composition(composed(*signals, group_size=size), stage="s")


def test_what_a_signal_reads_must_come_before_it():
    greedy = GroupAdvantage(baseline="greedy", scale="none")
    with pytest.raises(LegalityError, match="needs baseline"):
        check_composition(composed(greedy), stage="s")
    to_go = GroupAdvantage(baseline="constant", value=0.0, scale="none", credit="to_go")
    with pytest.raises(LegalityError, match="needs token_reward"):
        check_composition(composed(to_go), stage="s")
    with pytest.raises(LegalityError, match="needs reference_logprob"):
        check_composition(composed(KLPenalty(), GroupAdvantage()), stage="s")


@pytest.mark.parametrize("signal", [KLPenalty(), TrainerLogprobs()])
def test_log_probs_at_another_temperature_are_refused(signal):
    signals = (ReferenceLogprobs(), signal, GroupAdvantage())
    check_composition(composed(*signals), stage="s")
    with pytest.raises(LegalityError, match=r"temperature 0\.7"):
        check_composition(composed(*signals, temperature=0.7), stage="s")


OPTIONS = {"gdpo": {"length_cache": 2}}
NAMES = [
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "luspo",
    "gmpo",
    "cispo",
    "sapo",
    "vespo",
    "clip_cov",
    "kl_cov",
    "high_entropy",
    "reinforce",
    "rloo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "opo",
    "gpg",
    "lite_ppo",
    "gdpo",
    "pass_at_k",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_method_is_legal(name):
    composition = method(name, tasks=("a",), **OPTIONS.get(name, {})).compose()
    check_composition(composition, stage=name)
    assert composition.source.writes == {Kind.LEARNER}


def test_methods_spell_out_their_papers():
    dr = method("dr_grpo", tasks=("a",), max_new_tokens=50).compose()
    assert dr.signals == (Verify(), GroupAdvantage(scale="none"))
    assert dr.terms == (ClippedPolicyGradient(aggregate="sequence_sum", weight=0.02),)
    dapo = method("dapo", tasks=("a",), max_new_tokens=20480, max_draws=1).compose()
    assert dapo.signals == (
        Verify(),
        SoftLengthPenalty(max_tokens=20480, cache_tokens=4096),
        GroupAdvantage(),
        KeepInformative(),
    )
    assert dapo.terms == (ClippedPolicyGradient(clip_high=0.28),)
    rloo = method("rloo", tasks=("a",)).compose()
    credit = GroupAdvantage(baseline="leave_one_out", scale="none")
    assert rloo.signals == (Verify(), ReferenceLogprobs(), KLPenalty(beta=0.03), credit)
