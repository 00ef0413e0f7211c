"""Fresh pairs from rewards, the named methods, and what a run of them leaves behind."""

import numpy as np
import pytest
from material import gradients, largest_gap, random_groups, with_column

from posttrain.core.errors import ConfigError, LegalityError
from posttrain.core.learner import Optimizer
from posttrain.core.provenance import Kind
from posttrain.core.trajectory import Column, Discard, Group
from posttrain.numerics.batch import pack
from posttrain.parts.base import Limit, Term
from posttrain.parts.composition import Composition, method
from posttrain.parts.legality import admit, check_composition
from posttrain.parts.logprobs import ReferenceLogprobs
from posttrain.parts.preference.pairs import Dpo, Hinge, Ipo
from posttrain.parts.preference.ranking import RankPairs
from posttrain.parts.preference.reference_free import OddsRatio, Simpo
from posttrain.parts.registry import known, tag_of
from posttrain.parts.rewards.verify import Verify
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.sources.rollouts import Rollouts
from posttrain.parts.supervised.likelihood import CrossEntropy
from posttrain.testing import FakeTaskSet, check_signal, fake_tools
from posttrain.training.objective import StageObjective


def rewarded(*rows, seed=0):
    """One group per row of rewards."""
    groups = [
        random_groups(num_groups=1, size=len(row), seed=seed + i)[0] for i, row in enumerate(rows)
    ]
    left = iter([r for row in rows for r in row])
    return with_column(groups, Column.REWARD, lambda t: np.array(float(next(left))))


def column(group, name):
    return [m.scalar(name) for m in group.members]


def test_best_against_worst():
    draw = rewarded([0.2, 0.9, 0.9, 0.1, 0.1], [1, 0], [0.5, 0.5, 0.5], [3.0])
    ranked = check_signal(RankPairs(), draw)
    assert [column(g, Column.PREFERENCE) for g in ranked] == [
        [0, 1, 0, -1, 0],  # of equal members the first
        [1, -1],
        [0, 0, 0],
        [0],
    ]
    unranked, equal = Discard.UNRANKED.code, Discard.EQUAL_REWARDS.code
    assert [column(g, Column.DISCARD) for g in ranked] == [
        [unranked, 0, unranked, 0, unranked],
        [0, 0],
        [equal] * 3,
        [equal],
    ]


def test_discarded_members_take_no_part_and_keep_their_reason():
    (group,) = rewarded([0.0, 1.0, 0.5, 0.7])
    cut = iter([0, Discard.CUT_OFF.code, 0, 0])
    (group,) = with_column([group], Column.DISCARD, lambda t: np.array(float(next(cut))))
    (ranked,) = RankPairs().score([group], fake_tools())
    assert column(ranked, Column.PREFERENCE) == [-1, 0, 0, 1]
    assert column(ranked, Column.DISCARD) == [0, Discard.CUT_OFF.code, Discard.UNRANKED.code, 0]


def test_what_makes_no_pair_is_counted_and_costs_nothing(learner):
    draw = RankPairs().score(rewarded([0, 1, 0, 0], [1, 1, 1, 1]), fake_tools())
    term = Simpo()
    admitted = admit(draw, (term,), version=0, max_age=0)
    assert [len(g.members) for g in admitted.kept] == [2]
    assert sum(len(g.members) for g in admitted.discarded[Discard.UNRANKED]) == 2
    assert sum(len(g.members) for g in admitted.discarded[Discard.EQUAL_REWARDS]) == 4
    (batch,) = pack(admitted.kept, needs=term.needs, max_tokens=9999)
    assert batch.pairs_P2.shape == (1, 2)
    assert batch.num_sequences == 2


def test_online_pairs_teach_what_the_same_pairs_in_a_file_teach(learner):
    """Provenance decides the regime, not the loss: same pairs, same gradient."""
    objective = StageObjective((Simpo(),))
    (ranked,) = RankPairs().score(rewarded([0, 1, 0.5]), fake_tools())
    kept = admit([ranked], objective.terms, version=0, max_age=0).kept
    live = pack(kept, needs=objective.needs, max_tokens=9999)
    signs = {0: -1.0, 1: 1.0}
    pair = Group(
        task="file/0",
        members=tuple(
            ranked.members[i].with_columns({Column.PREFERENCE: np.array(s)})
            for i, s in signs.items()
        ),
    )
    value, grads = gradients(learner, live, objective)
    from_file = pack([pair], needs=objective.needs, max_tokens=9999)
    value_file, grads_file = gradients(learner, from_file, objective)
    assert value == pytest.approx(value_file, rel=1e-6)
    assert largest_gap(grads, grads_file) < 1e-6


def test_a_draw_without_a_pair_changes_no_weight_gradient(learner):
    objective = StageObjective((Simpo(),))
    equal = with_column(
        rewarded([1, 1]), Column.PREFERENCE, lambda t: np.array(0.0)
    )  # as if nothing had been discarded
    value, grads = gradients(
        learner, pack(equal, needs=objective.needs, max_tokens=9999), objective
    )
    assert value == 0
    assert all(float(g.abs().max()) == 0 for g in grads.values())


def test_a_step_of_online_dpo_raises_the_best_and_lowers_the_worst(engine, tiny_folder):
    """Rollouts, verifier, ranking, reference, step: the whole chain on a real model."""

    learner = engine.learner(str(tiny_folder), name="t", optimizer=Optimizer(lr=1e-3), lora=None)
    tasks = {"letters": FakeTaskSet()}
    spec = method("online_dpo", tasks=("letters",), group_size=6, max_new_tokens=3).compose()
    frozen = engine.policy(str(tiny_folder))
    tools = fake_tools(learner.policy, policies={"input": frozen}, tasksets=tasks)
    draw = spec.source.open(tools, seed=0).draw(8, step=0)
    # a reward that a random model varies in: the first token's id
    draw = with_column(draw, Column.REWARD, lambda t: np.array(float(t.tokens[t.prompt_length])))
    draw = RankPairs().score(draw, fake_tools())
    draw = ReferenceLogprobs().score(draw, tools)
    objective = StageObjective(spec.terms)
    kept = admit(draw, spec.terms, version=0, max_age=0).kept
    assert len(kept) >= 6
    batches = pack(kept, needs=objective.needs, max_tokens=999)
    first = learner.step(batches, objective, lr_scale=1.0)
    assert first.loss == pytest.approx(np.log(2), abs=1e-5), "the reference is the start"
    second = learner.step(batches, objective, lr_scale=1.0)
    assert second.metrics["dpo/margin"] > 0
    assert second.metrics["dpo/chosen"] > 0
    assert second.metrics["dpo/rejected"] < 0


def test_the_verifier_decides_who_is_chosen(learner):
    tasks = {"letters": FakeTaskSet(answer="a")}
    spec = Rollouts(tasks=("letters",), group_size=8, max_new_tokens=2)
    tools = fake_tools(learner.policy, tasksets=tasks)
    judged = Verify().score(spec.open(tools, seed=1).draw(16, step=0), tools)
    for group in RankPairs().score(judged, fake_tools()):
        for member in group.members:
            sign = member.scalar(Column.PREFERENCE)
            assert sign in (-1, 0, 1)
            if sign:
                assert member.scalar(Column.REWARD) == (1 if sign > 0 else 0)


# --- methods ---------------------------------------------------------------------------------

DATA = Dataset(path="x.jsonl")
PAIR_FILE = Dataset(path="x.jsonl", preference=True)
NLL = CrossEntropy(aggregate="sequence_mean", limit=Limit(preference="chosen"))


def of_family(role):
    """The parts of the preference family, by name."""
    home = "posttrain.parts.preference."
    return {n: kind for n, kind in known(role).items() if kind.__module__.startswith(home)}


def build(name, **options):
    online = "tasks" in known("method")[name].__struct_fields__
    return method(name, **({"tasks": ("sums",)} if online else {"data": DATA}), **options)


@pytest.mark.parametrize("name", of_family("method"))
def test_every_method_composes_into_something_legal(name):
    made = build(name)
    composition = made.compose()
    check_composition(composition, stage="s")
    assert tag_of(made) == name
    live = Kind.LEARNER in composition.source.writes
    assert live == (made.provenance in ("on-policy", "mixed"))
    assert all(getattr(made, n) for n in ("interface", "tendency", "formula", "paper"))


def test_every_term_has_code_and_a_method():
    used = {type(t) for name in of_family("method") for t in build(name).compose().terms}
    ours = set(of_family("term").values())
    assert all(term.values is not Term.values for term in ours)
    assert ours <= used


def test_compositions_written_out():
    assert build("ipo", tau=0.2).compose() == Composition(
        source=PAIR_FILE, signals=(ReferenceLogprobs(),), terms=(Ipo(tau=0.2),)
    )
    assert build("hinge", reference="base").compose() == Composition(
        source=PAIR_FILE, signals=(ReferenceLogprobs(policy="base"),), terms=(Hinge(),)
    )
    assert build("orpo").compose() == Composition(
        source=PAIR_FILE, terms=(NLL, OddsRatio(weight=0.1))
    )
    assert build("irpo").compose() == Composition(
        source=PAIR_FILE, signals=(ReferenceLogprobs(),), terms=(Dpo(beta=0.1), NLL)
    )
    assert build("simpo").compose() == Composition(
        source=PAIR_FILE, terms=(Simpo(beta=2.5, gamma=1.375),)
    )
    judged = (Verify(), RankPairs(), ReferenceLogprobs())
    live, frozen = (
        Rollouts(tasks=("sums",), group_size=2, policy=policy) for policy in ("learner", "input")
    )
    assert build("online_dpo").compose() == Composition(
        source=live, signals=judged, terms=(Dpo(beta=0.1),)
    )
    assert build("iterative_dpo").compose() == Composition(
        source=frozen, signals=judged, terms=(Dpo(beta=0.1), NLL)
    )


@pytest.mark.parametrize("term", [Ipo(), Hinge(), OddsRatio(), Simpo()])
def test_any_loss_on_pairs_goes_with_fresh_pairs(term):
    composition = Composition(
        source=Rollouts(tasks=("sums",)),
        signals=(Verify(), RankPairs(), ReferenceLogprobs()),
        terms=(term,),
    )
    check_composition(composition, stage="s")


@pytest.mark.parametrize(
    ("composition", "message"),
    [
        (
            Composition(source=Rollouts(tasks=("sums",)), signals=(RankPairs(),), terms=(Simpo(),)),
            "rank_pairs needs reward",
        ),
        (
            Composition(source=Rollouts(tasks=("sums",)), terms=(Simpo(),)),
            "verify and rank_pairs",
        ),
        (Composition(source=PAIR_FILE, terms=(Ipo(),)), "needs reference_logprob"),
        (Composition(source=DATA, terms=(NLL,)), "limit of cross_entropy needs preference"),
        (
            Composition(source=PAIR_FILE, terms=(Simpo(limit=Limit(preference="chosen")),)),
            "compares whole pairs",
        ),
    ],
)
def test_compositions_that_cannot_work_are_refused(composition, message):
    with pytest.raises(LegalityError, match=message):
        check_composition(composition, stage="s")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("online_dpo", {"group_size": 1}, "one answer makes no pair"),
        ("irpo", {"nll_weight": -1}, "0 or more"),
        ("robust_dpo", {"flip_rate": 0.5}, "flip_rate < 0.5"),
        ("exo", {"label_smoothing": 0}, "0 < label_smoothing"),
        ("f_dpo", {"divergence": "alpha"}, "alpha=None"),
    ],
)
def test_options_without_a_meaning_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build(name, **options).compose()


def test_alphapo_at_zero_is_simpo_and_says_so():
    with pytest.raises(ConfigError, match="0 is simpo"):
        build("alphapo", alpha=0)
