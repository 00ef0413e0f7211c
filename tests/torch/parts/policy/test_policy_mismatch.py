"""Sampler against trainer; signals that ask the learner; steps that lose members."""

import json
import math

import numpy as np
import pytest
import torch
from material import gradients, largest_gap, on_policy, random_groups, with_column
from test_policy_losses import ADVANTAGES, BEHAVIOUR, LENGTHS, RATIOS, by_sequence, material, spread

from posttrain.core.errors import ConfigError
from posttrain.core.provenance import Sampling
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column, Discard
from posttrain.numerics.batch import pack
from posttrain.parts.composition import method
from posttrain.parts.credit.greedy import GreedyBaseline
from posttrain.parts.legality import admit
from posttrain.parts.logprobs import TrainerLogprobs
from posttrain.parts.policy.losses import Cispo, ClippedPolicyGradient, Gspo, PolicyGradient
from posttrain.parts.policy.ratio import Mismatch, mismatch_weight
from posttrain.parts.registry import known
from posttrain.parts.rewards.verify import Verify
from posttrain.parts.sources.rollouts import Rollouts
from posttrain.protocols import Request
from posttrain.testing import FakeTaskSet, check_method, check_signal, check_term, fake_tools
from posttrain.training.objective import StageObjective
from posttrain.training.stage import group_metrics

GAPS = [0.0, 0.5, -0.2, 1.2, -1.5, 0.3, 0.1, 0.0, -0.4, 0.2]  # log w


def batch():
    return material(
        {
            Column.BEHAVIOUR_LOGPROB: BEHAVIOUR,
            Column.TRAINER_LOGPROB: BEHAVIOUR + np.array(GAPS),
            Column.ADVANTAGE: spread(ADVANTAGES),
        }
    )


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_weights_by_hand(level):
    if level == "token":
        w = [math.exp(g) for g in GAPS]
    else:
        reduce = sum if level == "sequence" else np.mean
        w = [math.exp(reduce(part)) for part in by_sequence(GAPS) for _ in part]
    for outside, want in {
        "truncate": [min(x, 1.2) for x in w],
        "mask": [x if 0.8 <= x <= 1.2 else 0.0 for x in w],
        "reject": [1.0 if 0.8 <= x <= 1.2 else 0.0 for x in w],
    }.items():
        low = None if outside == "truncate" else 0.8
        spec = Mismatch(level=level, outside=outside, low=low, high=1.2)
        np.testing.assert_allclose(mismatch_weight(spec, batch()), want)
        assert len(set(want)) > 1


def test_a_long_sequence_may_overflow_without_nan():
    far = material(
        {
            Column.BEHAVIOUR_LOGPROB: np.full(10, -800.0),
            Column.TRAINER_LOGPROB: np.zeros(10),
            Column.ADVANTAGE: spread(ADVANTAGES),
        }
    )
    for outside, low, want in (("mask", 0.5, 0.0), ("reject", 0.5, 0.0), ("truncate", None, 2.0)):
        spec = Mismatch(level="sequence", outside=outside, low=low)
        assert (mismatch_weight(spec, far) == want).all()


@pytest.mark.parametrize("term", [PolicyGradient, ClippedPolicyGradient, Cispo])
def test_the_correction_multiplies_a_loss_whose_ratio_is_to_the_trainer(term):
    """The weight carries no gradient, and does not replace the ratio."""
    spec = Mismatch(high=1.5)
    logp = torch.tensor(BEHAVIOUR + np.log(RATIOS), requires_grad=True)
    stats = {Stat.SAMPLED_LOGPROB: logp}
    out = term(mismatch=spec).values(stats, batch())
    to_trainer = material(
        {Column.BEHAVIOUR_LOGPROB: BEHAVIOUR + GAPS, Column.ADVANTAGE: spread(ADVANTAGES)}
    )
    plain = term().values(stats, to_trainer)
    weights = torch.tensor([min(math.exp(g), 1.5) for g in GAPS], dtype=torch.float64)
    np.testing.assert_allclose(out.loss.detach(), (weights * plain.loss).detach())
    (got,) = torch.autograd.grad(out.loss.sum(), logp, retain_graph=True)
    (want,) = torch.autograd.grad((weights * plain.loss).sum(), logp)
    np.testing.assert_allclose(got, want)
    np.testing.assert_allclose(out.shown["correction"], weights)


def test_a_loss_per_sequence_takes_a_weight_per_sequence():
    with pytest.raises(ConfigError, match="per token on a loss per sequence"):
        Gspo(mismatch=Mismatch())
    spec = Mismatch(level="geometric", outside="reject", low=0.9, high=1.1)
    term = Gspo(mismatch=spec)
    stats = {Stat.SAMPLED_LOGPROB: torch.tensor(BEHAVIOUR)}
    kept = term.values(stats, batch()).loss != 0
    inside = [0.9 <= math.exp(np.mean(part)) <= 1.1 for part in by_sequence(GAPS)]
    assert kept.tolist() == spread(inside)
    assert any(inside)
    assert not all(inside)
    assert len(inside) == len(LENGTHS)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Mismatch(outside="mask"),
        lambda: Mismatch(low=0.5),
        lambda: Mismatch(outside="reject", low=2.0, high=1.0),
        lambda: Mismatch(high=0.0),
    ],
)
def test_bounds_that_cannot_work_are_refused(make):
    with pytest.raises(ConfigError, match=r"(?i)mismatch"):
        make()


@pytest.mark.parametrize(
    "term",
    [
        ClippedPolicyGradient(mismatch=Mismatch()),
        PolicyGradient(mismatch=Mismatch(level="sequence"), aggregate="sequence_sum"),
        Cispo(mismatch=Mismatch(level="geometric")),
    ],
)
def test_corrected_terms_keep_the_contract_of_terms(term):
    check_term(term)


def test_on_one_device_there_is_nothing_to_correct(learner):
    """The local sampler is the trainer: w = 1, and the correction changes no gradient."""
    tools = fake_tools(learner.policy, tasksets={"letters": FakeTaskSet()})
    source = Rollouts(tasks=("letters",), group_size=3, max_new_tokens=7).open(tools, seed=0)
    groups = with_column(
        source.draw(4, step=0), Column.ADVANTAGE, lambda t: np.full(len(t), 0.5, np.float32)
    )
    assert TrainerLogprobs().provides == {Column.TRAINER_LOGPROB}
    groups = check_signal(TrainerLogprobs(), groups, tools)
    health = group_metrics(admit(groups, (PolicyGradient(),), version=0, max_age=0))
    assert health["mismatch/mean_weight"] == pytest.approx(1, abs=1e-5)
    assert health["mismatch/effective_share"] == pytest.approx(1, abs=1e-5)
    found = []
    for term in (PolicyGradient(), PolicyGradient(mismatch=Mismatch(level="sequence"))):
        objective = StageObjective((term,))
        batches = pack(groups, needs=objective.needs, max_tokens=999)
        found.append(gradients(learner, batches, objective)[1])
    assert largest_gap(*found) < 1e-4


def test_greedy_baseline_is_the_reward_of_the_likeliest_answer(learner):
    letters = FakeTaskSet()
    tools = fake_tools(learner.policy, tasksets={"letters": letters})
    source = Rollouts(tasks=("letters",), group_size=2, max_new_tokens=6).open(tools, seed=0)
    groups = source.draw(3, step=0)
    verify = Verify()
    judged = fake_tools(
        learner.policy,
        tasksets={"letters": letters},
        longest=6,
        judge=lambda groups: verify.score(groups, tools),
    )
    assert GreedyBaseline().provides == {Column.BASELINE}
    scored = check_signal(GreedyBaseline(), groups, judged)
    by_key = {t.key: t for t in letters.train}
    for group in scored:
        assert len(group.members) == 2  # the greedy answer is no member
        first = group.members[0].trajectory
        request = Request(
            prompt=first.tokens[: first.prompt_length],
            sampling=Sampling(temperature=0),
            max_new_tokens=6,
        )
        (answer,) = learner.policy.generate([request])
        text = learner.policy.renderer.text(answer.tokens)
        [reward] = letters.score([by_key[group.task]], [text])
        assert [m.scalar(Column.BASELINE) for m in group.members] == [reward, reward]


def test_a_step_that_loses_everything_changes_nothing(learner):
    groups = on_policy(random_groups(), learner.policy)
    groups = with_column(groups, Column.REWARD, lambda t: np.array(1.0))
    groups = with_column(groups, Column.ADVANTAGE, lambda t: np.zeros(len(t), np.float32))
    code = float(Discard.EQUAL_REWARDS.code)
    groups = with_column(groups, Column.DISCARD, lambda t: np.array(code))
    objective = StageObjective((ClippedPolicyGradient(),))
    admission = admit(groups, objective.terms, version=0, max_age=0)
    assert admission.kept == ()
    metrics = group_metrics(admission)
    assert metrics["discarded/equal rewards"] == 12
    assert (metrics["reward"], metrics["all_right"]) == (1.0, 1.0)
    json.dumps(metrics, allow_nan=False)
    before = {n: p.clone() for n, p in learner.policy.model.causal.named_parameters()}
    batches = pack(admission.kept, needs=objective.needs, max_tokens=99)
    report = learner.step(batches, objective, lr_scale=1.0)
    assert (report.loss, report.num_trained) == (0.0, 0)
    after = dict(learner.policy.model.causal.named_parameters())
    assert all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("level", ["token", "geometric"])
def test_methods_with_a_correction_ask_for_the_trainer(level):
    for name in ("grpo", "dapo", "cispo"):
        check_method(method(name, tasks=("a",), mismatch=Mismatch(level=level)))


OPTIONS = {"gdpo": {"length_cache": 2}}


HOME = "posttrain.parts.policy."
POLICY_METHODS = [t for t, m in known("method").items() if m.__module__.startswith(HOME)]


def test_the_family_is_found_by_its_folder():
    assert {"grpo", "gspo", "rloo", "adaptive_entropy", "ppo"} <= set(POLICY_METHODS)


@pytest.mark.parametrize("name", POLICY_METHODS)
def test_every_method_keeps_the_contract_of_methods(name):
    check_method(method(name, tasks=("a",), **OPTIONS.get(name, {})))
