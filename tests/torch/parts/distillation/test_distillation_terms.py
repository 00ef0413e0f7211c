"""Divergences from a teacher: values, limits, bounds, gradients, and what is refused."""

import math

import numpy as np
import pytest
import torch
from material import gradients, random_groups, trajectory, with_column
from msgspec.structs import replace

from posttrain.core.errors import ConfigError, LegalityError
from posttrain.core.statistics import Divergence, DivergenceKind
from posttrain.core.trajectory import Column, Group, Scored
from posttrain.numerics.batch import pack
from posttrain.numerics.divergence import divergence
from posttrain.numerics.head import token_stats
from posttrain.parts.distillation.divergences import (
    EntropyAwareKL,
    TeacherForwardKL,
    TeacherJensenShannon,
    TeacherReverseKL,
    TeacherSkewKL,
    TeacherSkewReverseKL,
    TeacherSortedL1,
    TeacherTotalVariation,
)
from posttrain.parts.distillation.presets import Gkd, Kd, Opd
from posttrain.parts.distillation.teachers import TeacherDistribution
from posttrain.parts.legality import check_composition
from posttrain.parts.registry import tag_of
from posttrain.parts.sources.dataset import Dataset
from posttrain.testing import fake_tools
from posttrain.training.objective import StageObjective

DENSE = [
    TeacherForwardKL(),
    TeacherReverseKL(),
    TeacherJensenShannon(),
    TeacherJensenShannon(beta=0.1),
    TeacherJensenShannon(beta=0.0),
    TeacherJensenShannon(beta=1.0),
    TeacherSkewKL(),
    TeacherSkewReverseKL(alpha=0.3),
    TeacherTotalVariation(),
]
SMOOTH = [t for t in DENSE if not isinstance(t, TeacherTotalVariation)]


def name(term):
    return f"{tag_of(term)}-{getattr(term, 'beta', '')}"


def by_hand(term, p, q):
    """The paper's formula in float64: p the teacher, q the policy."""

    def kl(a, b):
        return float((a * np.log(a / b)).sum())

    match term:
        case TeacherForwardKL():
            return kl(p, q)
        case TeacherReverseKL():
            return kl(q, p)
        case TeacherJensenShannon(beta=0.0):
            return kl(p, q)
        case TeacherJensenShannon(beta=1.0):
            return kl(q, p)
        case TeacherJensenShannon(beta=beta):
            m = beta * p + (1 - beta) * q
            return beta * kl(p, m) + (1 - beta) * kl(q, m)
        case TeacherSkewKL(alpha=alpha):
            return kl(p, alpha * p + (1 - alpha) * q)
        case TeacherSkewReverseKL(alpha=alpha):
            return kl(q, (1 - alpha) * p + alpha * q)
    return 0.5 * float(np.abs(p - q).sum())


def random_pair(seed, size=7, rows=1):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(size, 0.7), rows) + 1e-4, rng.dirichlet(np.ones(size), rows) + 1e-4


def normalised(*arrays):
    return [a / a.sum(-1, keepdims=True) for a in arrays]


def ask(term, q, p, *, ids=None):
    """The divergence of policy q from teacher p through the head's function, in float64."""
    logq, logp = (torch.tensor(x).log() for x in (q, p))
    if ids is None:
        return divergence(term.divergence, logq, torch.empty(len(q), 0, dtype=torch.long), logp)
    ids = torch.tensor(ids)
    return divergence(term.divergence, logq, ids, logp.gather(-1, ids))


@pytest.mark.parametrize("term", DENSE, ids=name)
@pytest.mark.parametrize("seed", range(3))
def test_value_is_the_papers(term, seed):
    p, q = normalised(*random_pair(seed))
    assert float(ask(term, q, p)) == pytest.approx(by_hand(term, p[0], q[0]), rel=1e-9)
    assert float(ask(term, q, p)) > 0
    assert float(ask(term, p, p)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("term", DENSE, ids=name)
def test_a_top_k_merges_the_rest_and_is_a_lower_bound(term):
    for seed in range(20):
        p, q = normalised(*random_pair(seed))
        ids = np.argsort(-p[0])[:3][None].copy()
        merged = [np.append(x[0][ids[0]], 1 - x[0][ids[0]].sum()) for x in (p, q)]
        got = float(ask(term, q, p, ids=ids))
        assert got == pytest.approx(by_hand(term, *merged), rel=1e-7, abs=1e-10)
        assert got <= float(ask(term, q, p)) + 1e-12
        everything = np.argsort(-p[0])[None].copy()
        assert float(ask(term, q, p, ids=everything)) == pytest.approx(float(ask(term, q, p)))


@pytest.mark.parametrize("term", SMOOTH, ids=name)
@pytest.mark.parametrize(("top_k", "temperature"), [(None, 1.0), (None, 2.0), (3, 1.0)])
def test_gradient_by_finite_differences(term, top_k, temperature):
    wanted = replace(term, temperature=temperature).divergence
    p, _ = normalised(*random_pair(5))
    logp = torch.tensor(p).log()
    ids = logp.topk(top_k or 1).indices[:, : top_k or 0]
    teacher = logp.gather(-1, ids) if top_k else logp
    logits = torch.randn(1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def value(z):
        return divergence(wanted, z.log_softmax(-1), ids, teacher)[0]

    assert torch.autograd.gradcheck(value, logits.requires_grad_(), eps=1e-6, atol=1e-7)


def test_temperature_softens_both_sides():
    p, q = normalised(*random_pair(3))
    soft = [x ** (1 / 2.5) / (x ** (1 / 2.5)).sum() for x in (p[0], q[0])]
    got = float(ask(TeacherForwardKL(temperature=2.5), q, p))
    assert got == pytest.approx(by_hand(TeacherForwardKL(), *soft), rel=1e-9)


def test_the_kls_are_the_ends_of_jensen_shannon_after_division_by_what_vanishes():
    """JSD_β → 0 at both ends; JSD_β / β → forward KL, JSD_β / (1−β) → reverse KL. At exactly 0
    and 1 the value *is* the KL, so the scale jumps."""
    p, q = normalised(*random_pair(7))
    forward, reverse = (float(ask(t, q, p)) for t in (TeacherForwardKL(), TeacherReverseKL()))
    gaps = []
    for eps in (1e-2, 1e-3, 1e-4):
        low = float(ask(TeacherJensenShannon(beta=eps), q, p))
        high = float(ask(TeacherJensenShannon(beta=1 - eps), q, p))
        gaps.append((abs(low / eps - forward) / forward, abs(high / eps - reverse) / reverse))
        assert low < 2 * eps * forward
        assert high < 2 * eps * reverse
    assert max(gaps[-1]) < 1e-2
    assert np.all(np.array(gaps[1]) < np.array(gaps[0]))
    assert float(ask(TeacherJensenShannon(beta=0.0), q, p)) == pytest.approx(forward)
    assert float(ask(TeacherJensenShannon(beta=1.0), q, p)) == pytest.approx(reverse)


def test_skew_tends_to_the_kls_and_is_bounded_where_they_are_not():
    p, q = normalised(*random_pair(8))
    for skew, plain in (
        (TeacherSkewKL(alpha=1e-6), TeacherForwardKL()),
        (TeacherSkewReverseKL(alpha=1e-6), TeacherReverseKL()),
    ):
        assert float(ask(skew, q, p)) == pytest.approx(float(ask(plain, q, p)), rel=1e-4)
    apart = np.array([[1 - 2e-12, 1e-12, 1e-12]]), np.array([[1e-12, 1e-12, 1 - 2e-12]])
    for term in (TeacherSkewKL(alpha=0.1), TeacherSkewReverseKL(alpha=0.1)):
        assert float(ask(term, *apart)) == pytest.approx(-math.log(0.1), rel=1e-6)
    assert float(ask(TeacherForwardKL(), *apart)) > 20


def test_total_variation_bounds():
    """0 ≤ TV ≤ 1, Pinsker: TV² ≤ KL / 2, and 1 exactly for disjoint distributions."""
    for seed in range(30):
        p, q = normalised(*random_pair(seed))
        tv = float(ask(TeacherTotalVariation(), q, p))
        assert 0 <= tv <= 1
        for kl in (TeacherForwardKL(), TeacherReverseKL()):
            assert tv**2 <= float(ask(kl, q, p)) / 2 + 1e-12
    tiny = 1e-14
    apart = np.array([[1 - tiny, tiny]]), np.array([[tiny, 1 - tiny]])
    assert float(ask(TeacherTotalVariation(), *apart)) == pytest.approx(1)


@pytest.mark.parametrize("term", [*DENSE, EntropyAwareKL(threshold=0.0)], ids=name)
@pytest.mark.parametrize("top_k", [None, 5])
def test_a_teacher_equal_to_the_learner_gives_no_loss_and_no_gradient(
    learner, engine, tiny_folder, term, top_k
):
    signal = TeacherDistribution(routes={"*": "base"}, top_k=top_k)
    tools = fake_tools(learner.policy, policies={"base": engine.policy(str(tiny_folder))})
    groups = signal.score(random_groups(), tools)
    objective = StageObjective((term,))
    batches = pack(groups, needs=objective.needs, max_tokens=10_000)
    loss, grads = gradients(learner, batches, objective)
    assert abs(loss) < 2e-6
    if not isinstance(term, TeacherTotalVariation):  # at the kink of |x| rounding picks a side
        assert max(float(g.abs().max()) for g in grads.values()) < 2e-5


def test_total_variation_has_gradient_zero_at_exact_agreement():
    logits = torch.tensor([[0.3, -1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    teacher = logits.detach().log_softmax(-1)
    nothing = torch.empty(1, 0, dtype=torch.long)
    wanted = Divergence(DivergenceKind.TOTAL_VARIATION)
    divergence(wanted, logits.log_softmax(-1), nothing, teacher).sum().backward()
    assert float(logits.grad.abs().max()) == 0


def test_the_head_computes_several_divergences_in_chunks(learner, monkeypatch):
    """Chunked or not, on the model's own logits: the same numbers as by hand."""
    model = learner.policy.model
    groups = random_groups(seed=4)
    rng = np.random.default_rng(0)
    rows = rng.dirichlet(np.ones(model.vocab_size), 400)
    left = iter(rows)
    groups = with_column(groups, Column.TEACHER_IDS, lambda t: np.zeros((len(t), 0), np.int32))
    groups = with_column(
        groups,
        Column.TEACHER_LOGPROBS,
        lambda t: np.log(np.stack([next(left) for _ in range(len(t))])),
    )
    needs = frozenset({Column.TEACHER_IDS, Column.TEACHER_LOGPROBS})
    (batch,) = pack(groups, needs=needs, max_tokens=10_000)
    wanted = frozenset(t.divergence for t in DENSE)
    hidden = model.predicting(batch).detach()
    monkeypatch.setattr("posttrain.numerics.logits.CHUNK_ELEMENTS", 5 * model.vocab_size)
    got = token_stats(hidden, model.head, batch, wanted=wanted, vocab_size=model.vocab_size)
    q = model.head(hidden).double().softmax(-1).detach().numpy()
    p = batch.columns[Column.TEACHER_LOGPROBS].double().exp().numpy()
    for term in DENSE:
        expected = [by_hand(term, a, b) for a, b in zip(p, q, strict=True)]
        np.testing.assert_allclose(got[term.divergence].detach(), expected, rtol=2e-3, atol=2e-6)


def one_token(columns):
    scored = Scored(trajectory=trajectory([1, 2], [3])).with_columns(columns)
    term_columns = frozenset(columns)
    (batch,) = pack([Group(task="t/0", members=(scored,))], needs=term_columns, max_tokens=99)
    return batch


def test_entropy_aware_kl_adds_the_forward_kl_only_where_the_teacher_is_unsure():
    sure, unsure = np.array([0.97, 0.01, 0.02]), np.array([0.4, 0.3, 0.3])
    q = np.array([[0.6, 0.3, 0.1]])
    entropy = -(unsure * np.log(unsure)).sum()
    term = EntropyAwareKL(threshold=float(entropy) - 0.01)
    for p, added in ((sure, 0.0), (unsure, 1.0)):
        rows = np.log(np.stack([p, p, p])).astype(np.float32)
        batch = one_token(
            {Column.TEACHER_IDS: np.zeros((3, 0), np.int32), Column.TEACHER_LOGPROBS: rows}
        )
        stats = {
            d: divergence(
                d,
                torch.tensor(q).log(),
                torch.empty(1, 0, dtype=torch.long),
                torch.tensor(p[None]).log(),
            )
            for d in term.reads
        }
        out = term.values(stats, batch)
        expected = by_hand(TeacherReverseKL(), p, q[0]) + added * by_hand(
            TeacherForwardKL(), p, q[0]
        )
        assert float(out.loss) == pytest.approx(expected, rel=1e-6)
        assert float(out.shown["unsure"]) == added


def test_sorted_l1_forgets_which_token_it_is_and_pads_the_shorter():
    q = torch.tensor([[0.5, 0.3, 0.2, 0.0]], dtype=torch.float64).log()
    same = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).log()  # another vocabulary
    nothing = torch.empty(1, 0, dtype=torch.long)
    wanted = Divergence(DivergenceKind.SORTED_L1)
    assert float(divergence(wanted, q, nothing, same)) == pytest.approx(0, abs=1e-12)
    other = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
    # |0.5-0.9| + |0.3-0.1| + |0.2-0| + 0
    assert float(divergence(wanted, q, nothing, other)) == pytest.approx(0.8)


def test_gradients_with_corners_by_closed_form_and_differences():
    """Away from ties, where neither has a derivative: signs times the softmax's derivative."""
    p, q = np.array([0.5, 0.1, 0.4]), np.array([0.2, 0.45, 0.35])
    nothing = torch.empty(1, 0, dtype=torch.long)
    ranked = np.sort(p)[::-1][np.argsort(np.argsort(-q))]  # the teacher's of the same rank
    for shape, signs in (
        (DivergenceKind.TOTAL_VARIATION, np.sign(q - p) / 2),
        (DivergenceKind.SORTED_L1, np.sign(q - ranked)),
    ):
        logits = torch.tensor(np.log(q)[None], requires_grad=True)
        teacher, wanted = torch.tensor(np.log(p)[None]), Divergence(shape)

        def value(z, wanted=wanted, teacher=teacher):
            return divergence(wanted, z.log_softmax(-1), nothing, teacher)[0]

        (got,) = torch.autograd.grad(value(logits), logits)
        np.testing.assert_allclose(got[0], q * (signs - (signs * q).sum()), atol=1e-12)
        assert torch.autograd.gradcheck(value, logits, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("threshold", [0.0, 5.0])
def test_entropy_aware_kl_has_the_gradient_of_the_kls_it_adds(threshold):
    p, q = (x[0] for x in normalised(*random_pair(3)))
    logits = torch.tensor(np.log(q)[None], requires_grad=True)
    rows = np.log(np.stack([p, p, p])).astype(np.float32)
    batch = one_token(
        {Column.TEACHER_IDS: np.zeros((3, 0), np.int32), Column.TEACHER_LOGPROBS: rows}
    )
    term, nothing = EntropyAwareKL(threshold=threshold), torch.empty(1, 0, dtype=torch.long)
    stats = {
        d: divergence(d, logits.log_softmax(-1), nothing, torch.tensor(np.log(p)[None]))
        for d in term.reads
    }
    term.values(stats, batch).loss.sum().backward()
    ratio = np.log(q / p)
    reverse = q * (ratio - (q * ratio).sum())
    forward = q - p
    expected = reverse + (forward if threshold == 0 else 0)
    np.testing.assert_allclose(logits.grad[0], expected, atol=1e-7)


def test_sorted_l1_counts_only_where_the_texts_agree():
    rows = np.log(np.full((3, 2), 0.5, np.float32))
    for aligned in (0.0, 1.0):
        batch = one_token(
            {
                Column.TEACHER_SORTED: rows,
                Column.TEACHER_ALIGNED: np.full(3, aligned, np.float32),
            }
        )
        term = TeacherSortedL1()
        stats = {d: torch.tensor([0.7]) for d in term.reads}
        assert float(term.values(stats, batch).loss) == pytest.approx(0.7 * aligned)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TeacherJensenShannon(beta=1.1), "from 0"),
        (lambda: TeacherSkewKL(alpha=0.0), "teacher_forward_kl"),
        (lambda: TeacherSkewReverseKL(alpha=1.0), "teacher_reverse_kl"),
        (lambda: TeacherForwardKL(temperature=0.0), "above 0"),
        (lambda: EntropyAwareKL(threshold=-1.0), "0 or more"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_temperature_on_a_top_k_is_refused():
    """What a temperature does to the tokens that the teacher left out is not known."""
    fine = Kd(data=Dataset(path="d.jsonl"), teachers={"*": "base"}, temperature=2.0)
    check_composition(fine.compose(), stage="kd")
    assert fine.compose().terms[0].weight == 4.0
    bad = Kd(data=Dataset(path="d.jsonl"), teachers={"*": "base"}, temperature=2.0, top_k=5)
    with pytest.raises(LegalityError, match="full vocabulary"):
        check_composition(bad.compose(), stage="kd")


def test_named_methods_are_what_they_say():
    opd = Opd(tasks=("sums",), teachers={"*": "base"}).compose()
    gkd = Gkd(tasks=("sums",), teachers={"*": "base"}, own=1.0, beta=1.0).compose()
    assert opd.source == gkd.source
    assert opd.signals == gkd.signals
    p, q = normalised(*random_pair(1))
    assert float(ask(opd.terms[0], q, p)) == float(ask(gkd.terms[0], q, p))
    with pytest.raises(ConfigError, match="exactly when"):
        Gkd(tasks=("sums",), teachers={"*": "base"}, own=0.5)
