"""Losses on pairs, against the formulas of their papers written out in float64 NumPy."""

import math

import numpy as np
import pytest
import torch
from material import gradients, largest_gap, random_groups, trajectory, with_column

from posttrain.core.errors import ConfigError
from posttrain.core.provenance import Kind
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column, Group, Scored
from posttrain.numerics.batch import pack
from posttrain.parts.base import Limit
from posttrain.parts.preference.pairs import (
    Apo,
    Discopop,
    Dpo,
    Exo,
    FDpo,
    Hinge,
    Ipo,
    LdDpo,
    LnDpo,
    Nca,
    RobustDpo,
    Sppo,
    Wpo,
)
from posttrain.parts.preference.reference_free import ContrastiveLogistic, OddsRatio, Simpo
from posttrain.parts.supervised.likelihood import CrossEntropy
from posttrain.parts.tensors import capped_exp
from posttrain.training.objective import StageObjective

NEEDS = frozenset({Column.REFERENCE_LOGPROB, Column.PREFERENCE})


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


class Pair:
    """One pair as plain numbers: log-probs and reference log-probs per token, float64."""

    def __init__(self, chosen, rejected, ref_chosen, ref_rejected):
        self.w, self.l, self.rw, self.rl = (
            np.array(x, np.float64) for x in (chosen, rejected, ref_chosen, ref_rejected)
        )

    @property
    def rho(self):
        return (self.w - self.rw).sum(), (self.l - self.rl).sum()

    @property
    def gap(self):
        return self.rho[0] - self.rho[1]

    @property
    def mean_rho(self):
        return (self.w - self.rw).mean(), (self.l - self.rl).mean()

    def swapped(self):
        return Pair(self.l, self.w, self.rl, self.rw)

    def batch(self):
        """Packed, the rejected answer first: the order of members must not matter."""
        prompt, rows = [1, 2], [(self.l, self.rl, -1.0), (self.w, self.rw, 1.0)]
        members = tuple(
            Scored(
                trajectory=trajectory(prompt, [5 + i] * len(logp), kind=Kind.EXTERNAL),
                columns={
                    Column.REFERENCE_LOGPROB: np.array([np.nan] * 2 + ref.tolist(), np.float64),
                    Column.PREFERENCE: np.array(sign),
                },
            )
            for i, (logp, ref, sign) in enumerate(rows)
        )
        (batch,) = pack([Group(task="test/0", members=members)], needs=NEEDS, max_tokens=99)
        exact = torch.tensor(np.concatenate([self.rl, self.rw]))
        batch.columns[Column.REFERENCE_LOGPROB] = exact  # packing keeps float32
        return batch

    @property
    def logp(self):
        return torch.tensor(np.concatenate([self.l, self.w]), requires_grad=True)


PAIR = Pair([-1.0, -0.4, -2.2], [-0.3, -1.7], [-1.5, -0.7, -2.0], [-0.2, -0.9])
LONG = Pair([-1.0, -0.4], [-0.3, -1.7, -3.0, -0.1], [-1.5, -0.7], [-0.2, -0.9, -1.0, -1.1])
EVEN = Pair([-1.0, -0.4], [-0.3, -1.7], [-1.5, -0.7], [-0.2, -0.9])
COLLISION = torch.tensor([-0.5, -1.0, -0.2, -0.8, -0.3], dtype=torch.float64)


def loss(term, pair, *, logp=None, collision=None):
    logp = pair.logp if logp is None else logp
    stats = {Stat.LOGPROB: logp, Stat.LOG_COLLISION: collision}
    out = term.values(stats, pair.batch())
    assert out.loss.shape == (1,)
    return out.loss[0]


def number(term, pair, **stats):
    return float(loss(term, pair, **stats).detach())


def expected(term, p):
    """The paper's loss, from the numbers of one pair."""
    (w, r), (mw, mr), gap = p.rho, p.mean_rho, p.gap
    b = getattr(term, "beta", None)
    match term:
        case Dpo(label_smoothing=e):
            return -(1 - e) * log_sigmoid(b * gap) - e * log_sigmoid(-b * gap)
        case RobustDpo(flip_rate=e):
            return (-(1 - e) * log_sigmoid(b * gap) + e * log_sigmoid(-b * gap)) / (1 - 2 * e)
        case Ipo(tau=t):
            return (mw - mr - 1 / (2 * t)) ** 2
        case Hinge():
            return max(0, 1 - b * gap)
        case Exo(label_smoothing=e):
            q = np.array([sigmoid(b * gap), sigmoid(-b * gap)])
            return (q * np.log(q / np.array([1 - e, e]))).sum()
        case Nca():
            return -log_sigmoid(b * w) - log_sigmoid(-b * w) / 2 - log_sigmoid(-b * r) / 2
        case Sppo():
            return (w - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2
        case Apo(direction="zero"):
            return 1 - sigmoid(b * w) + sigmoid(b * r)
        case Apo(direction="down"):
            return sigmoid(b * w) + 1 - sigmoid(b * gap)
        case FDpo(divergence=kind, alpha=a):
            prime = {
                "forward_kl": lambda u: -1 / u,
                "js": lambda u: np.log(2 * u / (1 + u)),
                "alpha": lambda u: (1 - u**-a) / a,
            }[kind]
            return -log_sigmoid(b * prime(np.exp(w)) - b * prime(np.exp(r)))
        case LnDpo():
            return -log_sigmoid(b * (mw - mr))
        case LdDpo(tail=a):
            n = min(len(p.w), len(p.l))
            rw, rl = ((x - y) * np.where(np.arange(len(x)) < n, 1, a) for x, y in zipped(p))
            return -log_sigmoid(b * (rw.sum() - rl.sum()))
        case Discopop(tau=t):
            z = b * gap
            m = sigmoid(z / t)
            return -(1 - m) * log_sigmoid(z) + m * np.exp(-z)
        case OddsRatio():
            odds = [(q := np.exp(x.mean())) / (1 - q) for x in (p.w, p.l)]
            return -np.log(odds[0] / (odds[0] + odds[1]))  # sigmoid of a difference of logs
        case ContrastiveLogistic():
            return -log_sigmoid(b * (p.w.sum() - p.l.sum()))
        case Simpo(gamma=g, alpha=a):
            r = [x.mean() if a == 0 else (1 - np.exp(x.mean()) ** -a) / a for x in (p.w, p.l)]
            return -np.log(1 / (1 + np.exp(-(b * (r[0] - r[1]) - g))))
    raise AssertionError(term)


def zipped(p):
    return (p.w, p.rw), (p.l, p.rl)


ALL = [
    Dpo(beta=0.7),
    Dpo(beta=0.7, label_smoothing=0.2),
    RobustDpo(beta=0.7, flip_rate=0.2),
    Ipo(tau=0.4),
    Hinge(beta=0.3),
    Exo(beta=0.7, label_smoothing=0.05),
    Nca(beta=0.7),
    Sppo(beta=0.5),
    Apo(direction="zero", beta=0.7),
    Apo(direction="down", beta=0.7),
    FDpo(divergence="forward_kl", beta=0.7),
    FDpo(divergence="js", beta=0.7),
    FDpo(divergence="alpha", alpha=0.3, beta=0.7),
    LnDpo(beta=2.0),
    LdDpo(beta=0.7, tail=0.25),
    Discopop(beta=0.7, tau=0.3),
    OddsRatio(),
    ContrastiveLogistic(beta=0.7),
    Simpo(beta=2.0, gamma=0.5),
    Simpo(beta=2.0, gamma=0.5, alpha=0.25),
    Simpo(beta=2.0, gamma=0.5, alpha=-0.5),
]
NAMES = [f"{t.__struct_config__.tag}-{i}" for i, t in enumerate(ALL)]


@pytest.mark.parametrize("pair", [PAIR, LONG, EVEN], ids=["longer-chosen", "longer-rejected", "="])
@pytest.mark.parametrize("term", ALL, ids=NAMES)
def test_value_is_the_papers_formula(term, pair):
    assert number(term, pair) == pytest.approx(expected(term, pair), rel=1e-9)


@pytest.mark.parametrize("term", ALL, ids=NAMES)
def test_gradient_is_that_of_the_formula(term):
    """Central differences of the NumPy formula: no code of ours on that side."""
    logp = PAIR.logp
    loss(term, PAIR, logp=logp).backward()
    h = 1e-6
    flat = np.concatenate([PAIR.l, PAIR.w])
    for i in range(len(flat)):
        sides = []
        for step in (h, -h):
            moved = flat.copy()
            moved[i] += step
            sides.append(expected(term, Pair(moved[2:], moved[:2], PAIR.rw, PAIR.rl)))
        slope = (sides[0] - sides[1]) / (2 * h)
        assert float(logp.grad[i]) == pytest.approx(slope, rel=1e-5, abs=1e-8)


# --- signs and mirrors -----------------------------------------------------------------------


def slopes(term, pair):
    """d loss / d ρ of the rejected and of the chosen answer (of their first tokens)."""
    logp = pair.logp
    loss(term, pair, logp=logp).backward()
    return float(logp.grad[0]), float(logp.grad[len(pair.l)])


WELL_BEHAVED = [
    t
    for t in ALL
    if not isinstance(t, Discopop) and not (isinstance(t, Apo) and t.direction == "down")
]


@pytest.mark.parametrize("term", WELL_BEHAVED, ids=lambda t: t.__struct_config__.tag)
def test_at_the_reference_chosen_goes_up_and_rejected_down(term):
    at_reference = Pair(PAIR.rw, PAIR.rl, PAIR.rw, PAIR.rl)
    rejected, chosen = slopes(term, at_reference)
    assert chosen < 0 < rejected


def test_apo_down_lowers_both_and_the_rejected_more_than_it_lowers_the_chosen():
    at_reference = Pair(EVEN.rw, EVEN.rl, EVEN.rw, EVEN.rl)
    rejected, chosen = slopes(Apo(direction="down", beta=1.0), at_reference)
    # σ'(0) = 1/4 for each of the two sigmoids: the chosen side's two parts cancel at the start
    assert chosen == pytest.approx(0, abs=1e-12)
    assert rejected == pytest.approx(0.25)
    apart = Pair(EVEN.rw + 2, EVEN.rl - 2, EVEN.rw, EVEN.rl)
    rejected, chosen = slopes(Apo(direction="down", beta=1.0), apart)
    assert 0 < rejected < chosen, "once the pair is separated, the chosen is lowered"


def test_discopop_starts_on_the_wrong_side_of_its_hump():
    at_reference = Pair(PAIR.rw, PAIR.rl, PAIR.rw, PAIR.rl)
    rejected, chosen = slopes(Discopop(), at_reference)
    # dL/dz = −¾ + (1 − log 2) / (4 τ), times β
    slope = 0.05 * (-0.75 + (1 - math.log(2)) / (4 * 0.05))
    assert chosen == pytest.approx(slope)
    assert chosen > 0 > rejected
    rejected, chosen = slopes(Discopop(tau=0.1024), at_reference)
    assert chosen < 0 < rejected, "from here on the way up is open"
    assert slopes(Discopop(tau=0.1022), at_reference)[1] > 0


ANTISYMMETRIC = [Dpo(beta=0.7), LnDpo(beta=2.0), LdDpo(beta=0.7)]
ANTISYMMETRIC += [ContrastiveLogistic(beta=0.7), OddsRatio()]


@pytest.mark.parametrize("term", ANTISYMMETRIC, ids=lambda t: t.__struct_config__.tag)
def test_swapping_the_sides_mirrors_a_logistic_loss(term):
    """−log σ(z) and −log σ(−z): their difference is z, and exp of the negatives sum to 1."""
    ours, theirs = (number(term, p) for p in (LONG, LONG.swapped()))
    assert math.exp(-ours) + math.exp(-theirs) == pytest.approx(1)


def test_smoothing_is_a_mixture_of_the_pair_and_its_mirror():
    plain = [number(Dpo(beta=0.7), p) for p in (PAIR, PAIR.swapped())]
    smooth = number(Dpo(beta=0.7, label_smoothing=0.3), PAIR)
    assert smooth == pytest.approx(0.7 * plain[0] + 0.3 * plain[1])


def test_robust_dpo_is_unbiased_under_flips():
    """E over flips of the robust loss is DPO's loss on the clean pair."""
    term, rate = RobustDpo(beta=0.7, flip_rate=0.3), 0.3
    seen = [number(term, p) for p in (PAIR, PAIR.swapped())]
    clean = number(Dpo(beta=0.7), PAIR)
    assert (1 - rate) * seen[0] + rate * seen[1] == pytest.approx(clean)


# --- identities and limits -------------------------------------------------------------------


def test_without_noise_the_smoothed_and_robust_losses_are_dpo():
    dpo = number(Dpo(beta=0.7), PAIR)
    assert number(Dpo(beta=0.7, label_smoothing=0.0), PAIR) == dpo
    assert number(RobustDpo(beta=0.7, flip_rate=0.0), PAIR) == dpo


def test_length_normalised_dpo_is_dpo_at_equal_lengths():
    dpo = number(Dpo(beta=0.7 / 2), EVEN)
    assert number(LnDpo(beta=0.7), EVEN) == pytest.approx(dpo)
    assert number(LnDpo(beta=0.7), PAIR) != pytest.approx(number(Dpo(beta=0.7 / 2), PAIR))


def test_ld_dpo_is_dpo_at_equal_lengths_and_forgets_the_tail_at_zero():
    assert number(LdDpo(beta=0.7, tail=0.2), EVEN) == pytest.approx(number(Dpo(beta=0.7), EVEN))
    shortened = Pair(LONG.w, LONG.l[:2], LONG.rw, LONG.rl[:2])
    assert number(LdDpo(beta=0.7, tail=0.0), LONG) == pytest.approx(
        number(Dpo(beta=0.7), shortened)
    )


def test_alpha_divergences_lie_between_dpo_and_forward_kl():
    near_zero = FDpo(divergence="alpha", alpha=1e-7, beta=0.7)
    assert number(near_zero, PAIR) == pytest.approx(number(Dpo(beta=0.7), PAIR), rel=1e-6)
    near_one = FDpo(divergence="alpha", alpha=1 - 1e-9, beta=0.7)
    forward = FDpo(divergence="forward_kl", beta=0.7)
    assert number(near_one, PAIR) == pytest.approx(number(forward, PAIR), rel=1e-6)


def test_alphapo_tends_to_simpo():
    simpo = number(Simpo(beta=2.0, gamma=0.5), PAIR)
    near = number(Simpo(beta=2.0, gamma=0.5, alpha=1e-7), PAIR)
    assert near == pytest.approx(simpo, rel=1e-5)


def test_cpo_is_dpo_under_a_uniform_reference_at_equal_lengths():
    uniform = Pair(EVEN.w, EVEN.l, [-3.0, -3.0], [-3.0, -3.0])
    assert number(ContrastiveLogistic(beta=0.7), EVEN) == pytest.approx(
        number(Dpo(beta=0.7), uniform)
    )


def test_minima_are_where_the_papers_say():
    tau, beta, eps = 0.25, 0.5, 0.1

    def at(chosen, rejected=0.0):
        """A pair with one token a side and these log-ratios."""
        return Pair([chosen - 9.0], [rejected - 9.0], [-9.0], [-9.0])

    ipo, exo = Ipo(tau=tau), Exo(beta=beta, label_smoothing=eps)
    sppo, nca = Sppo(beta=beta), Nca(beta=beta)
    best = {
        ipo: at(1 / (2 * tau)),
        exo: at(math.log((1 - eps) / eps) / beta),
        sppo: at(1 / (2 * beta), -1 / (2 * beta)),
    }
    for term, pair in best.items():
        assert number(term, pair) == pytest.approx(0, abs=1e-12)
        assert slopes(term, pair) == pytest.approx((0, 0), abs=1e-9)
    assert slopes(nca, at(math.log(2) / beta))[1] == pytest.approx(0, abs=1e-12)
    hinge = Hinge(beta=beta)
    assert slopes(hinge, at(1 / beta + 0.01)) == (0, 0), "beyond the margin nothing is left"
    assert slopes(hinge, at(1 / beta - 0.01)) == (beta, -beta)


def test_capped_exp_is_exact_below_the_cap_and_straight_above_it():
    x = torch.tensor([-50.0, 0.0, 19.9, 20.0, 20.1, 1e4], dtype=torch.float64, requires_grad=True)
    y = capped_exp(x)
    np.testing.assert_allclose(y.detach()[:4], np.exp([-50.0, 0.0, 19.9, 20.0]), rtol=1e-12)
    assert float(y[5].detach()) == pytest.approx(math.exp(20) * (1 + 1e4 - 20))
    y.sum().backward()
    assert float(x.grad[5]) == pytest.approx(math.exp(20)), "an extreme pair still has a gradient"


def test_extreme_pairs_stay_finite():
    far = Pair([-500.0], [-0.001], [-0.001], [-500.0])
    for term in ALL:
        for pair in (far, far.swapped()):
            logp = pair.logp
            value = loss(term, pair, logp=logp)
            value.backward()
            assert math.isfinite(float(value.detach())), term
            assert bool(logp.grad.isfinite().all()), term


def test_orpo_survives_an_answer_that_is_certain():
    certain = Pair([0.0, 0.0], [-1.0, -2.0], [-1.0, -1.0], [-1.0, -1.0])
    logp = certain.logp
    value = loss(OddsRatio(), certain, logp=logp)
    value.backward()
    assert math.isfinite(float(value.detach()))
    assert bool(logp.grad.isfinite().all())


# --- WPO -------------------------------------------------------------------------------------


def test_wpo_weights_by_how_likely_the_policy_writes_the_pair():
    logp = PAIR.logp
    value = loss(Wpo(beta=0.7), PAIR, logp=logp, collision=COLLISION)
    surprise = logp.detach() - COLLISION
    log_weight = float(surprise[:2].mean() + surprise[2:].mean())
    assert log_weight < 0
    dpo = number(Dpo(beta=0.7), PAIR)
    assert float(value.detach()) == pytest.approx(math.exp(log_weight) * dpo)
    value.backward()
    plain = PAIR.logp
    loss(Dpo(beta=0.7), PAIR, logp=plain).backward()
    np.testing.assert_allclose(logp.grad, math.exp(log_weight) * plain.grad, rtol=1e-12)


def test_wpo_never_counts_a_pair_more_than_once():
    unlikely = COLLISION - 9  # every token is far likelier than a random agreement
    value = loss(Wpo(beta=0.7), PAIR, collision=unlikely)
    assert float(value.detach()) == number(Dpo(beta=0.7), PAIR)


def test_log_collision_is_the_chance_that_two_samples_agree(learner):
    groups = random_groups(num_groups=1, size=2)
    (batch,) = pack(groups, needs=frozenset(), max_tokens=10_000)
    from posttrain.numerics.head import token_stats

    model = learner.policy.model
    hidden = model.predicting(batch)
    stats = token_stats(
        hidden, model.head, batch, wanted=frozenset({Stat.LOG_COLLISION}), vocab_size=50
    )
    p = model.head(hidden).softmax(-1).double()
    np.testing.assert_allclose(
        stats[Stat.LOG_COLLISION].exp().detach(), (p * p).sum(-1).detach(), rtol=1e-5
    )


# --- within a step ---------------------------------------------------------------------------


def pairs(num_groups=5, seed=0):
    rng = np.random.default_rng(seed)
    groups = random_groups(num_groups=num_groups, size=2, seed=seed)
    groups = with_column(
        groups, Column.REFERENCE_LOGPROB, lambda t: rng.normal(-2, 0.3, len(t)).astype(np.float32)
    )
    signs = iter([1.0, -1.0] * num_groups)
    return with_column(groups, Column.PREFERENCE, lambda t: np.array(next(signs)))


CHOSEN = CrossEntropy(limit=Limit(preference="chosen"))


@pytest.mark.parametrize(
    "terms",
    [(t,) for t in ALL] + [(Wpo(),), (Dpo(), CHOSEN)],
    ids=lambda terms: terms[-1].__struct_config__.tag,
)
def test_splitting_a_step_into_micro_batches_changes_nothing(learner, terms):
    objective, groups = StageObjective(terms), pairs()
    whole = pack(groups, needs=objective.needs, max_tokens=9999)
    split = pack(groups, needs=objective.needs, max_tokens=20)
    assert len(whole) == 1 < len(split)
    value, grads = gradients(learner, whole, objective)
    value_split, grads_split = gradients(learner, split, objective)
    assert value_split == pytest.approx(value, rel=1e-5)
    assert largest_gap(grads, grads_split) < 2e-5


@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean"])
def test_cross_entropy_on_the_chosen_is_sft_on_the_chosen(learner, aggregate):
    groups = pairs()
    limited = CrossEntropy(aggregate=aggregate, limit=Limit(preference="chosen"))
    both = StageObjective((limited,))
    assert Column.PREFERENCE in both.needs
    value, grads = gradients(learner, pack(groups, needs=both.needs, max_tokens=25), both)
    alone = [Group(task=g.task, members=(g.members[0],)) for g in groups]
    plain = StageObjective((CrossEntropy(aggregate=aggregate),))
    value_alone, grads_alone = gradients(
        learner, pack(alone, needs=frozenset(), max_tokens=9999), plain
    )
    assert value == pytest.approx(value_alone, rel=1e-6)
    assert largest_gap(grads, grads_alone) < 1e-5


def test_a_sequence_in_several_pairs_shares_a_length_with_each():
    """One chosen answer of 3 tokens against rejected ones of 1 and 2."""
    answers = [([-1.0, -2.0, -3.0], 1.0), ([-1.5], -1.0), ([-0.5, -0.7], -1.0)]
    members = tuple(
        Scored(
            trajectory=trajectory([1], [5 + i] * len(logp), kind=Kind.EXTERNAL),
            columns={
                Column.REFERENCE_LOGPROB: np.zeros(1 + len(logp), np.float32),
                Column.PREFERENCE: np.array(sign),
            },
        )
        for i, (logp, sign) in enumerate(answers)
    )
    (batch,) = pack([Group(task="test/0", members=members)], needs=NEEDS, max_tokens=99)
    stats = {Stat.LOGPROB: torch.tensor([x for logp, _ in answers for x in logp])}
    term = LdDpo(beta=1.0, tail=0.1)
    got = term.values(stats, batch).loss
    chosen = np.array([-1.0 - 0.1 * 5.0, -3.0 - 0.1 * 3.0])
    np.testing.assert_allclose(got, -log_sigmoid(chosen - np.array([-1.5, -1.2])), rtol=1e-6)


def test_a_pair_counts_only_when_both_sides_are_of_the_wanted_author(learner):
    mixed = [
        Group(task="t", members=(a.members[0], b.members[1]))
        for a, b in zip(pairs(3), pairs(3, seed=1), strict=True)
    ]
    objective = StageObjective((Dpo(where=(Kind.EXTERNAL,)),))
    batches = pack(mixed, needs=objective.needs, max_tokens=9999)
    assert objective.counts(batches) == (0,)


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Dpo(beta=0), "beta is 0"),
        (lambda: Dpo(label_smoothing=0.5), "label_smoothing"),
        (lambda: RobustDpo(flip_rate=0.5), "flip_rate"),
        (lambda: RobustDpo(flip_rate=-0.1), "flip_rate is -0.1"),
        (lambda: Exo(label_smoothing=0), "0 < label_smoothing"),
        (lambda: Exo(label_smoothing=0.5), "label_smoothing"),
        (lambda: Ipo(tau=0), "tau is 0"),
        (lambda: Ipo(tau=math.inf), "finite"),
        (lambda: Hinge(beta=math.nan), "beta is nan"),
        (lambda: FDpo(divergence="alpha"), "alpha=None"),
        (lambda: FDpo(divergence="js", alpha=0.5), "no alpha with the others"),
        (lambda: FDpo(divergence="alpha", alpha=1.0), "above 0, below 1"),
        (lambda: LdDpo(tail=1.0), "1 is dpo"),
        (lambda: Discopop(tau=0), "tau is 0"),
        (lambda: Simpo(gamma=-1), "gamma is -1"),
    ],
)
def test_values_without_a_meaning_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
