"""Answers judged one by one: losses, baselines, the data format, and what is refused."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from material import gradients, largest_gap, random_groups, trajectory, with_column

from posttrain.chat.renderer import ChatRenderer
from posttrain.core.errors import ConfigError, DataError, LegalityError
from posttrain.core.provenance import Kind
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column, Group, Scored
from posttrain.numerics.batch import pack
from posttrain.parts.composition import Compose, Composition
from posttrain.parts.legality import check_composition
from posttrain.parts.logprobs import ReferenceLogprobs
from posttrain.parts.preference.pairs import Dpo
from posttrain.parts.preference.ranking import LogRatioCentre, MismatchedKL, mismatched
from posttrain.parts.preference.unpaired import Bco, Kto
from posttrain.parts.sources.dataset import Dataset, DatasetRows
from posttrain.testing import (
    FakePolicy,
    check_signal,
    check_source,
    fake_tools,
    tiny_model,
    tiny_tokenizer,
)
from posttrain.training.objective import StageObjective

TINY = ChatRenderer(tiny_tokenizer())


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# --- the losses ------------------------------------------------------------------------------

RHO = np.array([0.7, -1.2, 2.5, -0.3])
LABELS = np.array([1.0, 1.0, -1.0, -1.0])


def labelled_batch(term, *, baseline):
    """Four answers of two tokens; every reference log-prob is −1."""
    members = tuple(
        Scored(
            trajectory=trajectory([1, 2], [5 + i, 6], kind=Kind.EXTERNAL),
            columns={
                Column.REFERENCE_LOGPROB: np.array([np.nan, np.nan, -1, -1], np.float32),
                Column.LABEL: np.array(label),
                Column.MISMATCHED_KL: np.array(baseline),
                Column.LOG_RATIO_CENTRE: np.array(baseline),
            },
        )
        for i, label in enumerate(LABELS)
    )
    (batch,) = pack([Group(task="test/0", members=members)], needs=term.needs, max_tokens=99)
    return batch


def run(term, *, baseline=0.0, rho=RHO):
    halves = np.repeat(rho / 2 - 1, 2)
    logp = torch.tensor(halves, requires_grad=True)
    batch = labelled_batch(term, baseline=baseline)
    values = term.values({Stat.LOGPROB: logp}, batch)
    values.loss.sum().backward()
    return values.loss.detach().numpy(), logp.grad.numpy()[::2]  # one slope per answer


@pytest.mark.parametrize("baseline", [-0.4, 0.0, 0.9])
def test_kto_by_hand(baseline):
    """The zero point is never below 0, and shifts every answer alike."""
    term = Kto(beta=0.5, desirable_weight=1.3, undesirable_weight=0.7)
    losses, slopes = run(term, baseline=baseline)
    zero = max(0.0, baseline)
    good, bad = RHO[:2] - zero, zero - RHO[2:]
    expected = [*(1.3 * (1 - sigmoid(0.5 * good))), *(0.7 * (1 - sigmoid(0.5 * bad)))]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    s = sigmoid(0.5 * (RHO - zero))
    weights = np.array([-1.3, -1.3, 0.7, 0.7])
    np.testing.assert_allclose(slopes, weights * 0.5 * s * (1 - s), rtol=1e-6)


def test_kto_saturates_on_both_sides():
    """Unlike a logistic loss it gives up on hopeless answers, and on won ones."""
    far = np.array([40.0, -40.0, 40.0, -40.0])
    losses, slopes = run(Kto(beta=1.0), rho=far)
    np.testing.assert_allclose(losses, [0, 1, 1, 0], atol=1e-9)
    np.testing.assert_allclose(slopes, 0, atol=1e-9)


def test_kto_mirrors_when_labels_and_log_ratios_are_turned_round():
    losses, slopes = run(Kto(beta=0.5))
    mirrored, back = run(Kto(beta=0.5), rho=-RHO[[2, 3, 0, 1]])
    np.testing.assert_allclose(losses[[2, 3, 0, 1]], mirrored, rtol=1e-6)
    np.testing.assert_allclose(slopes[[2, 3, 0, 1]], -back, rtol=1e-6)


@pytest.mark.parametrize("centre", [-0.4, 0.0, 0.9])
def test_bco_by_hand(centre):
    losses, slopes = run(Bco(beta=0.5), baseline=centre)
    logit = 0.5 * (RHO - centre)
    np.testing.assert_allclose(losses, np.log1p(np.exp(-LABELS * logit)), rtol=1e-6)
    np.testing.assert_allclose(slopes, -LABELS * 0.5 * sigmoid(-LABELS * logit), rtol=1e-6)


def labelled(num_groups=6, seed=0):
    rng = np.random.default_rng(seed)
    groups = random_groups(num_groups=num_groups, size=1, seed=seed, kind=Kind.EXTERNAL)
    groups = with_column(
        groups, Column.REFERENCE_LOGPROB, lambda t: rng.normal(-2, 0.3, len(t)).astype(np.float32)
    )
    signs = iter([1.0, -1.0] * num_groups)
    groups = with_column(groups, Column.LABEL, lambda t: np.array(next(signs)))
    groups = with_column(groups, Column.MISMATCHED_KL, lambda t: np.array(0.3))
    return with_column(groups, Column.LOG_RATIO_CENTRE, lambda t: np.array(-0.2))


@pytest.mark.parametrize("term", [Kto(), Bco(beta=0.3)])
def test_splitting_a_step_into_micro_batches_changes_nothing(learner, term):
    objective, groups = StageObjective((term,)), labelled()
    whole = pack(groups, needs=objective.needs, max_tokens=9999)
    split = pack(groups, needs=objective.needs, max_tokens=12)
    assert len(whole) == 1 < len(split)
    assert objective.counts(split) == (6,), "every answer counts once, whatever its length"
    value, grads = gradients(learner, whole, objective)
    value_split, grads_split = gradients(learner, split, objective)
    assert value_split == pytest.approx(value, rel=1e-6)
    assert largest_gap(grads, grads_split) < 1e-5


def test_where_keeps_answers_of_one_author(learner):
    own = random_groups(num_groups=2, size=1, seed=3, kind=Kind.HUMAN)
    columns = labelled(1)[0].members[0].columns
    own = [
        Group(
            task=g.task,
            members=tuple(
                m.with_columns(
                    {
                        **columns,
                        Column.REFERENCE_LOGPROB: np.zeros(len(m.trajectory), np.float32),
                    }
                )
                for m in g.members
            ),
        )
        for g in own
    ]
    objective = StageObjective((Kto(where=(Kind.EXTERNAL,)),))
    mixed = pack([*labelled(3), *own], needs=objective.needs, max_tokens=9999)
    alone = pack(labelled(3), needs=objective.needs, max_tokens=9999)
    assert objective.counts(mixed) == (3,)
    value, grads = gradients(learner, mixed, objective)
    value_alone, grads_alone = gradients(learner, alone, objective)
    assert value == pytest.approx(value_alone, rel=1e-6)
    assert largest_gap(grads, grads_alone) < 1e-5


@pytest.mark.parametrize(
    "build",
    [
        lambda: Kto(beta=0),
        lambda: Kto(desirable_weight=0),
        lambda: Kto(undesirable_weight=-1),
        lambda: Bco(beta=math.inf),
    ],
)
def test_values_without_a_meaning_are_refused(build):
    with pytest.raises(ConfigError, match=r"above 0|finite"):
        build()


# --- the baselines ---------------------------------------------------------------------------


def group(*answers, prompt=(1, 2), kind=Kind.EXTERNAL):
    members = (Scored(trajectory=trajectory(prompt, a, kind=kind)) for a in answers)
    return Group(task="test/0", members=tuple(members))


def test_answers_are_moved_to_another_prompt():
    """The next answer with another prompt, also where several answers share one."""
    draw = [group([5], [6, 7], prompt=(1, 2)), group([8], prompt=(3,)), group([9], prompt=(1, 2))]
    given = [m.trajectory for g in draw for m in g.members]
    crossed = mismatched(given, context=99)
    assert [t.tokens.tolist() for t in crossed] == [[1, 2, 8], [1, 2, 8], [3, 9], [1, 2, 8]]
    assert [t.prompt_length for t in crossed] == [2, 2, 1, 2]
    assert all(t.trainable.tolist() == [False] * t.prompt_length + [True] for t in crossed)
    for before, after in zip(given, crossed, strict=True):
        head = before.prompt_length
        assert before.tokens[:head].tolist() == after.tokens[:head].tolist()
        assert not any(np.array_equal(after.tokens, t.tokens) for t in given)


def test_moved_answers_are_cut_at_the_context_and_claim_no_version():
    long = group([5, 6, 7, 8], prompt=(3,), kind=Kind.LEARNER)
    short = group([9], prompt=(1, 2, 4), kind=Kind.LEARNER)
    crossed = mismatched([m.trajectory for g in (short, long) for m in g.members], context=5)
    assert [t.tokens.tolist() for t in crossed] == [[1, 2, 4, 5, 6], [3, 9]]
    assert not any(s.is_live for t in crossed for s in t.spans)


def test_a_draw_with_one_prompt_is_refused():
    policy = FakePolicy({"a": 1.0})
    for draw in ([group([5])], [group([5]), group([6])]):
        with pytest.raises(LegalityError, match="at least two prompts"):
            MismatchedKL(policy="base").score(draw, fake_tools(policy, policies={"base": policy}))


def letters(*texts, prompt):
    tokens = [[*map(ord, text), 0] for text in texts]
    return group(*tokens, prompt=tuple(map(ord, prompt)))


def test_mismatched_kl_is_the_mean_log_ratio_of_the_moved_answers():
    live, frozen = FakePolicy({"a": 0.5, "b": 0.5}, version=3), FakePolicy({"a": 0.2, "b": 0.8})
    draw = [letters("a", prompt="x"), letters("aab", prompt="y"), letters("b", prompt="z")]
    tools = fake_tools(live, policies={"input": frozen})
    scored = check_signal(MismatchedKL(), draw, tools)
    a, b = math.log(0.5 / 0.2), math.log(0.5 / 0.8)
    expected = ((2 * a + b) + b + a) / 3  # x gets aab, y gets b, z gets a
    for g in scored:
        assert float(g.members[0].columns[Column.MISMATCHED_KL]) == pytest.approx(expected)


def test_the_centre_lies_between_good_and_bad_whatever_their_numbers():
    live, frozen = FakePolicy({"a": 0.5, "b": 0.5}, version=3), FakePolicy({"a": 0.2, "b": 0.8})
    draw = [letters("a", "b", prompt="x"), letters("a", prompt="y"), letters("aa", prompt="z")]
    labels = iter([1.0, -1.0, 1.0, 1.0])
    draw = with_column(draw, Column.LABEL, lambda t: np.array(next(labels)))
    tools = fake_tools(live, policies={"input": frozen})
    draw = list(ReferenceLogprobs().score(draw, tools))
    scored = check_signal(LogRatioCentre(), draw, tools)
    a, b = math.log(0.5 / 0.2), math.log(0.5 / 0.8)
    expected = ((a + a + 2 * a) / 3 + b) / 2
    (value,) = {float(m.columns[Column.LOG_RATIO_CENTRE]) for g in scored for m in g.members}
    assert value == pytest.approx(expected)
    alone = LogRatioCentre().score(draw[1:], tools)
    assert float(alone[0].members[0].columns[Column.LOG_RATIO_CENTRE]) == pytest.approx(1.5 * a)


def test_equal_policies_have_a_zero_point_of_zero(learner, engine, tiny_folder):
    frozen = engine.policy(str(tiny_folder))
    draw = random_groups(num_groups=4, size=1, kind=Kind.EXTERNAL)
    tools = fake_tools(learner.policy, policies={"input": frozen})
    (value, *_) = MismatchedKL().score(draw, tools)
    assert float(value.members[0].columns[Column.MISMATCHED_KL]) == 0


def test_the_zero_point_is_scored_with_the_weights_of_the_moment(learner, engine, tmp_path):
    """It equals the log-ratio of the moved texts, one by one."""
    other = engine.policy(str(tiny_model(tmp_path / "other", seed=9)))
    draw = random_groups(num_groups=4, size=2, kind=Kind.EXTERNAL)
    moved = mismatched([m.trajectory for g in draw for m in g.members], context=128)
    expected = np.mean(
        [
            np.nansum(learner.policy.logprobs([t])[0]) - np.nansum(other.logprobs([t])[0])
            for t in moved
        ]
    )
    scored = MismatchedKL().score(draw, fake_tools(learner.policy, policies={"input": other}))
    got = float(scored[-1].members[0].columns[Column.MISMATCHED_KL])
    assert got == pytest.approx(float(expected), rel=1e-5)
    assert abs(got) > 0.1, "two models that differ"


# --- the data format -------------------------------------------------------------------------


def source(tmp_path, rows, **options):
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    spec = Dataset(**{"path": "d.jsonl", **options})
    return DatasetRows(spec, root=tmp_path, renderer=TINY, context=99, seed=0)


def refused(tmp_path, rows, **options):
    with pytest.raises(DataError) as error:
        source(tmp_path, rows, **options)
    return str(error.value)


GOOD = {"prompt": "1+1=", "completion": "2", "label": True}
BAD = {"prompt": "1+1=", "completion": "3", "label": False}
TURNS = {
    "prompt": [{"role": "user", "content": "hi"}],
    "completion": [{"role": "assistant", "content": "yo"}],
    "label": True,
}
PAIR = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}


def signs(s, num_groups):
    groups = s.draw(num_groups, step=0)
    return sorted(m.scalar(Column.LABEL) for g in groups for m in g.members)


def test_labelled_answers(tmp_path):
    s = source(tmp_path, [GOOD, BAD, TURNS], unpaired=True)
    tools = fake_tools(FakePolicy({"a": 1.0}, version=0, renderer=TINY), root=tmp_path)
    check_source(Dataset(path="d.jsonl", unpaired=True), tools, num_groups=1)
    assert (s.format, s.num_groups) == ("unpaired", 3)
    assert signs(s, 3) == [-1.0, 1.0, 1.0]
    members = [m for g in s.draw(3, step=0) for m in g.members]
    assert all(Column.PREFERENCE not in m.columns for m in members)


def test_pairs_serve_as_labelled_answers(tmp_path):
    s = source(tmp_path, [PAIR], unpaired=True)
    [pair] = s.draw(1, step=0)
    assert [m.scalar(Column.LABEL) for m in pair.members] == [1.0, -1.0]
    assert all(Column.PREFERENCE not in m.columns for m in pair.members)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "label": 1}, "a label 1 of type int"),
        ({**GOOD, "label": "true"}, "a label 'true' of type str"),
        ({**GOOD, "label": None}, "a label None of type nothing"),
        ({**GOOD, "completion": " "}, "an empty completion"),
        ({"prompt": "x", "completion": "y"}, "no label"),
    ],
)
def test_bad_rows(tmp_path, row, message):
    found = refused(tmp_path, [BAD, row], unpaired=True, format="unpaired")
    assert "d.jsonl, row 2" in found
    assert message in found


def test_a_file_with_one_kind_of_label_is_refused(tmp_path):
    assert "every row has the label true" in refused(tmp_path, [GOOD, GOOD], unpaired=True)
    assert "every row has the label false" in refused(tmp_path, [BAD], unpaired=True)


def test_bad_examples_are_not_imitated_by_oversight(tmp_path):
    found = refused(tmp_path, [GOOD, BAD])
    assert "a label that is true or false" in found
    assert "format: completion" in found
    assert source(tmp_path, [GOOD, BAD], format="completion").format == "completion"
    topic = {**GOOD, "label": "arithmetic"}
    assert source(tmp_path, [topic]).format == "completion", "a label of another meaning"


def test_stage_and_file_must_agree(tmp_path):
    plain = {"prompt": "x", "completion": "y"}
    assert "are demonstrations" in refused(tmp_path, [plain], unpaired=True)
    assert "are labelled answers" in refused(tmp_path, [GOOD, BAD], preference=True)
    assert "are labelled answers" in refused(tmp_path, [GOOD, BAD], format="unpaired")
    both = {**GOOD, **PAIR}
    assert "more than one format" in refused(tmp_path, [both], unpaired=True)
    with pytest.raises(ConfigError, match="one of them"):
        Dataset(path="x", preference=True, unpaired=True)


# --- legality --------------------------------------------------------------------------------

LABELS_FILE, PAIRS_FILE = Dataset(path="x", unpaired=True), Dataset(path="x", preference=True)
REFERENCE, ZERO = ReferenceLogprobs(), MismatchedKL()


@pytest.mark.parametrize(
    ("source", "signals", "term", "message"),
    [
        (LABELS_FILE, (REFERENCE,), Kto(), "needs mismatched_kl"),
        (LABELS_FILE, (ZERO,), Kto(), "needs reference_logprob"),
        (PAIRS_FILE, (REFERENCE, ZERO), Kto(), "needs label"),
        (LABELS_FILE, (REFERENCE,), Dpo(), "needs preference"),
        (LABELS_FILE, (REFERENCE,), Bco(), "needs log_ratio_centre"),
        (LABELS_FILE, (LogRatioCentre(), REFERENCE), Bco(), "reference_logprob"),
        (LABELS_FILE, (REFERENCE, MismatchedKL(policy="base")), Kto(), "one reference"),
    ],
)
def test_compositions_that_cannot_work_are_refused(source, signals, term, message):
    with pytest.raises(LegalityError, match=message):
        check_composition(Composition(source=source, signals=signals, terms=(term,)), stage="s")


def test_the_plan_knows_the_policy_behind_the_zero_point(tmp_path):
    from posttrain.recipe import Budget, Recipe, Stage
    from posttrain.run.plan import make_plan

    (tmp_path / "x.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(BAD))
    method = Compose(
        source=Dataset(path="x.jsonl", unpaired=True),
        signals=(ReferenceLogprobs(), MismatchedKL(policy="nobody")),
        terms=(Kto(),),
    )
    stage = Stage(name="s", method=method, budget=Budget(steps=1))
    with pytest.raises(ConfigError, match="nobody"):
        make_plan(Recipe(name="r", model="m", stages=(stage,)), root=tmp_path, base="b")


def test_a_missing_label_is_not_a_bad_one():
    term = Kto()
    bare = labelled(1)[0].members[0]
    columns = {c: v for c, v in bare.columns.items() if c is not Column.LABEL}
    with pytest.raises(LegalityError, match="has no label"):
        pack(
            [Group(task="t", members=(replace(bare, columns=columns),))],
            needs=term.needs,
            max_tokens=99,
        )
