"""Losses that train judges, and judges that went through disk."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from material import random_groups, trajectory, with_column

from posttrain.core.errors import DataError, LegalityError, ModelError
from posttrain.core.learner import Optimizer
from posttrain.core.provenance import Kind
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column
from posttrain.numerics.batch import pack
from posttrain.parts.composition import Composition
from posttrain.parts.credit.advantages import GroupAdvantage
from posttrain.parts.policy.losses import PolicyGradient
from posttrain.parts.registry import tag_of
from posttrain.parts.rewards.judges import RewardModel
from posttrain.parts.rewards.process import ProcessReward
from posttrain.parts.rewards.reward_models import BradleyTerry, OutcomeBCE, StepBCE, last_scores
from posttrain.parts.rewards.steps import Steps
from posttrain.parts.sources.dataset import Dataset, DatasetRows
from posttrain.parts.sources.rollouts import Rollouts
from posttrain.protocols import ScalarStart
from posttrain.run.build import StageBuilder, check_same_tokens
from posttrain.testing import FakeTaskSet, as_group, fake_tools, tiny_model
from posttrain.testing.contracts import check_term
from posttrain.training.objective import StageObjective


def paired(seed=0, margins=False):
    groups = random_groups(num_groups=4, size=2, seed=seed, kind=Kind.EXTERNAL)
    signs = iter([1.0, -1.0, -1.0, 1.0] * 2)
    groups = with_column(groups, Column.PREFERENCE, lambda t: np.array(next(signs)))
    if not margins:
        return groups
    sizes = iter(np.repeat([0.0, 1 / 3, 2 / 3, 1.0], 2))
    return with_column(groups, Column.MARGIN, lambda t: np.array(next(sizes)))


def labelled_steps(seed=0):
    """Labels from 0 to 1 at some tokens of every answer."""
    rng = np.random.default_rng(seed)
    groups = random_groups(seed=seed, kind=Kind.EXTERNAL)

    def labels(t):
        column = np.full(len(t), -1.0)
        trained = np.flatnonzero(t.trainable)
        ends = rng.choice(trained, size=max(1, len(trained) // 2), replace=False)
        column[ends] = rng.choice([0.0, 0.25, 1.0], len(ends))
        return column

    return with_column(groups, Column.STEP_LABEL, labels)


def packed(groups, term, max_tokens=10_000):
    return pack(groups, needs=StageObjective((term,)).needs, max_tokens=max_tokens, whole=True)


def scores_of(batch, seed=0):
    values = np.random.default_rng(seed).normal(size=len(batch.target_N))
    return torch.tensor(values, requires_grad=True)


def at_ends(scores, batch):
    """[S] in float64: the last value of every sequence, by a loop."""
    values, sequence = scores.detach().numpy(), batch.sequence_N.numpy()
    return np.array([values[np.flatnonzero(sequence == s)[-1]] for s in range(batch.num_sequences)])


def logistic(x):
    return np.log1p(np.exp(-x))


# --- values and gradients --------------------------------------------------------------------


def test_scores_are_read_after_the_last_token():
    (batch,) = packed(paired(seed=3), BradleyTerry())
    scores = scores_of(batch)
    got = last_scores({Stat.SCORE: scores}, batch).detach().numpy()
    np.testing.assert_array_equal(got, at_ends(scores, batch))


@pytest.mark.parametrize("centring", [0.0, 0.01])
@pytest.mark.parametrize("margin", [0.0, 0.5, "column"])
def test_bradley_terry_by_hand(margin, centring):
    term = BradleyTerry(margin=margin, centring=centring)
    (batch,) = packed(paired(margins=margin == "column"), term)
    scores = scores_of(batch)
    ends, pairs = at_ends(scores, batch), batch.pairs_P2.numpy()
    m = np.array([0.0, 1 / 3, 2 / 3, 1.0]) if margin == "column" else margin
    won, lost = ends[pairs[:, 0]], ends[pairs[:, 1]]
    expected = logistic(won - lost - m) + centring * (won + lost) ** 2
    values = term.values({Stat.SCORE: scores}, batch)
    np.testing.assert_allclose(values.loss.detach().numpy(), expected, rtol=1e-6)
    np.testing.assert_array_equal(values.shown["accuracy"].numpy(), won > lost)

    values.loss.sum().backward()
    step, slope = 1e-6, np.zeros(len(scores))
    sequence = batch.sequence_N.numpy()
    for s in range(batch.num_sequences):
        moved = []
        for sign in (1, -1):
            e = ends.copy()
            e[s] += sign * step
            a, b = e[pairs[:, 0]], e[pairs[:, 1]]
            moved.append((logistic(a - b - m) + centring * (a + b) ** 2).sum())
        slope[np.flatnonzero(sequence == s)[-1]] = (moved[0] - moved[1]) / (2 * step)
    np.testing.assert_allclose(scores.grad.numpy(), slope, atol=1e-6)


def test_without_margin_it_is_the_logistic_loss_and_centring_pulls_to_zero():
    (batch,) = packed(paired(), BradleyTerry())
    score = {Stat.SCORE: torch.zeros(len(batch.target_N))}
    plain = BradleyTerry(centring=0.0).values(score, batch)
    assert plain.loss.numpy() == pytest.approx(np.log(2))
    high = {Stat.SCORE: torch.full((len(batch.target_N),), 3.0)}
    same = BradleyTerry(centring=0.0).values(high, batch)
    assert same.loss.numpy() == pytest.approx(np.log(2)), "equal scores: only centring sees a shift"
    centred = BradleyTerry(centring=0.01).values(high, batch)
    assert centred.loss.numpy() == pytest.approx(np.log(2) + 0.01 * 36)


def bce(score, target):
    return target * logistic(score) + (1 - target) * logistic(-score)


@pytest.mark.parametrize("at", ["last", "every"])
@pytest.mark.parametrize("target", ["label", "reward"])
def test_outcome_loss_by_hand(at, target):
    rng = np.random.default_rng(0)
    column = Column.LABEL if target == "label" else Column.REWARD
    said = iter(rng.choice([1.0, -1.0], 12) if target == "label" else rng.choice([0, 0.25, 1], 12))
    groups = with_column(random_groups(seed=1), column, lambda t: np.array(next(said)))
    term = OutcomeBCE(at=at, target=target)
    (batch,) = packed(groups, term)
    scores, sequence = scores_of(batch), batch.sequence_N.numpy()
    truth = batch.columns[column].double().numpy()
    truth = ((truth + 1) / 2 if target == "label" else truth)[sequence]
    read = at_ends(scores, batch)[sequence] if at == "last" else scores.detach().numpy()
    values = term.values({Stat.SCORE: scores}, batch)
    np.testing.assert_allclose(values.loss.detach().numpy(), bce(read, truth), rtol=1e-6)
    values.loss.sum().backward()
    slope = 1 / (1 + np.exp(-read)) - truth  # closed form: σ(s) − y
    if at == "last":  # every token carries its sequence's loss, which only the last score moves
        last = np.append(sequence[1:] != sequence[:-1], True)
        slope = np.where(last, slope * np.bincount(sequence)[sequence], 0)
    np.testing.assert_allclose(scores.grad.numpy(), slope, rtol=1e-6)


def test_step_loss_reads_step_ends_only():
    term = StepBCE()
    (batch,) = packed(labelled_steps(), term)
    head = torch.zeros(len(batch.target_N), 2)
    scores = scores_of(batch)
    objective = StageObjective((term,))
    counts = objective.counts([batch])
    label = batch.columns[Column.STEP_LABEL].double().numpy()
    ends = label >= 0
    assert counts == (int(ends.sum()),)
    loss, metrics = objective.loss(
        head, lambda h: h, batch, counts=counts, vocab_size=2, scalars={Stat.SCORE: scores}
    )
    expected = bce(scores.detach().numpy()[ends], label[ends])
    assert float(loss.detach()) == pytest.approx(expected.mean(), rel=1e-6)
    loss.backward()
    slope = np.where(ends, 1 / (1 + np.exp(-scores.detach().numpy())) - label, 0) / ends.sum()
    np.testing.assert_allclose(scores.grad.numpy(), slope, rtol=1e-5, atol=1e-12)
    right = (scores.detach().numpy()[ends] > 0) == (label[ends] > 0.5)
    assert metrics["step_bce/accuracy"] == pytest.approx(right.mean(), rel=1e-6)


def test_labels_between_are_met_between():
    """Soft labels: the loss is least where σ(s) is the label."""
    grid = torch.linspace(-4, 4, 801, dtype=torch.float64)
    batch = type("B", (), {"columns": {Column.STEP_LABEL: torch.full_like(grid, 0.25)}})()
    best = grid[StepBCE().values({Stat.SCORE: grid}, batch).loss.argmin()]
    assert float(torch.sigmoid(best)) == pytest.approx(0.25, abs=2e-3)


@pytest.mark.parametrize(
    "term",
    [
        BradleyTerry(),
        BradleyTerry(margin="column", centring=0.1),
        OutcomeBCE(),
        OutcomeBCE(at="every", aggregate="token_mean"),
        OutcomeBCE(target="reward"),
        StepBCE(),
        StepBCE(aggregate="sequence_mean"),
    ],
)
def test_contract(term):
    check_term(term)


# --- learners --------------------------------------------------------------------------------


def make(engine, folder, lr=3e-3):
    start = ScalarStart(trunk="shared", model=str(folder))
    return engine.learner(
        str(folder), name="rm", optimizer=Optimizer(lr=lr), lora=None, scalar=start
    )


@pytest.mark.parametrize(
    ("term", "groups"),
    [(BradleyTerry(), paired), (StepBCE(), labelled_steps)],
)
def test_splitting_a_step_changes_nothing(engine, tiny_folder, term, groups):
    objective, moved = StageObjective((term,)), []
    for max_tokens in (10_000, 12):
        learner = make(engine, tiny_folder)
        for _ in range(2):  # the head starts at zero: the trunk moves from the second step on
            batches = packed(groups(), term, max_tokens)
            report = learner.step(batches, objective, lr_scale=1.0)
        score = learner.policy.scores([trajectory([7, 8], [9, 10])])[0][-1]
        moved.append((report.loss, report.grad_norm, score))
    assert moved[1] == pytest.approx(moved[0], rel=2e-3)


def test_a_trained_judge_goes_through_disk_and_ranks(engine, tiny_folder, tmp_path):
    """It learns a rule of preferences, is exported, and is asked as a signal and in another run."""
    rng = np.random.default_rng(0)

    def pairs(num):
        out = []
        for _ in range(num):
            prompt = rng.integers(6, 40, 3)
            good, bad = rng.integers(6, 23, 4), rng.integers(23, 40, 4)  # low ids are preferred
            group = as_group(
                trajectory(prompt, good, kind=Kind.EXTERNAL),
                trajectory(prompt, bad, kind=Kind.EXTERNAL),
            )
            signs = iter([1.0, -1.0])
            out += with_column([group], Column.PREFERENCE, lambda t, s=signs: np.array(next(s)))
        return out

    term = BradleyTerry()
    learner, objective = make(engine, tiny_folder), StageObjective((term,))
    for _ in range(25):
        report = learner.step(packed(pairs(16), term), objective, lr_scale=1.0)
    assert report.metrics["bradley_terry/accuracy"] > 0.9
    learner.export(tmp_path)
    judge = engine.policy(str(tmp_path))
    unseen = pairs(32)
    scored = RewardModel(model="m").score(unseen, fake_tools(policies={"m": judge}))
    ranked = [[float(m.columns[Column.REWARD]) for m in g.members] for g in scored]
    assert np.mean([a > b for a, b in ranked]) > 0.9
    live = learner.policy.scores([m.trajectory for g in unseen for m in g.members])
    frozen = judge.scores([m.trajectory for g in unseen for m in g.members])
    for a, b in zip(live, frozen, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def build(signal, learner, judge):
    """A stage around a learner, whose signal asks ``judge``."""
    composition = Composition(
        source=Rollouts(tasks=("letters",)),
        signals=(signal, GroupAdvantage()),
        terms=(PolicyGradient(),),
    )
    planned = SimpleNamespace(composition=composition, init="base", spec=SimpleNamespace(name="s"))
    tasksets = {"letters": FakeTaskSet()}
    builder = StageBuilder(root=Path(), seed=0, tasksets=tasksets, policy=lambda _: judge)
    return builder.parts(planned, learner)


JUDGES = [RewardModel(model="m"), ProcessReward(model="m")]


def test_a_stock_judge_with_another_tokenizer_is_refused(engine, learner, tmp_path):
    folder = tiny_model(tmp_path / "o")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"z": ', '"Z": '))
    other = engine.policy(str(folder))
    with pytest.raises(ModelError, match="different vocabularies"):
        check_same_tokens(other, learner.policy)
    for signal in JUDGES:
        with pytest.raises(ModelError, match="different vocabularies"):
            build(signal, learner, other)


@pytest.mark.parametrize("signal", JUDGES, ids=tag_of)
def test_a_judge_without_a_head_is_refused_when_the_stage_is_built(
    engine, tiny_folder, learner, signal
):
    with pytest.raises(LegalityError, match="no scalar head"):
        build(signal, learner, engine.policy(str(tiny_folder)))
    build(signal, learner, make(engine, tiny_folder).policy)


# --- labelled steps from a file --------------------------------------------------------------


def source(folder, rows, renderer, **options):
    (folder / "s.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    spec = Dataset(path="s.jsonl", steps=Steps(), **options)
    return DatasetRows(spec, root=folder, renderer=renderer, context=128, seed=0)


def test_steps_from_a_file_are_where_the_signal_finds_them(engine, tiny_folder, tmp_path):
    policy = engine.policy(str(tiny_folder))
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i} + 1 ="}],
            "completions": ["a = 1", "b = 2", "c"],
            "labels": [True, 0.5, False],
        }
        for i in range(3)
    ]
    (group, *_) = source(tmp_path, rows, policy.renderer).draw(3, step=0)
    (member,) = group.members
    column = member.columns[Column.STEP_LABEL]
    ends = np.flatnonzero(column >= 0)
    assert column[ends].tolist() == [1.0, 0.5, 0.0]
    learner = make(engine, tiny_folder)
    tools = fake_tools(policy, policies={"m": learner.policy})
    (scored,) = ProcessReward(model="m").score([group], tools)
    rewards = scored.members[0].columns[Column.STEP_REWARD]
    assert np.flatnonzero(np.isfinite(rewards)).tolist() == ends.tolist()
    assert rewards[ends].tolist() == [0.5] * 3, "a head at zero knows nothing"


def test_broken_rows_name_their_place(engine, tiny_folder, tmp_path):
    renderer = engine.policy(str(tiny_folder)).renderer
    row = {"prompt": "1 =", "completions": ["a", "b"], "labels": [1]}
    with pytest.raises(DataError, match="row 1: 1 labels of 2 steps"):
        source(tmp_path, [row], renderer)
    with pytest.raises(DataError, match="demonstrations"):
        source(tmp_path, [{"prompt": "a", "completion": "b"}], renderer)


def test_margins_from_a_file(engine, tiny_folder, tmp_path):
    renderer = engine.policy(str(tiny_folder)).renderer
    row = {"prompt": "1 =", "chosen": "2", "rejected": "3", "by": 0.5}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    spec = Dataset(path="p.jsonl", preference=True, margin="by")
    options = {"root": tmp_path, "renderer": renderer, "context": 128, "seed": 0}
    (group,) = DatasetRows(spec, **options).draw(1, step=0)
    assert [float(m.columns[Column.MARGIN]) for m in group.members] == [0.5, 0.5]
    (tmp_path / "p.jsonl").write_text(json.dumps({**row, "by": -1}) + "\n")
    with pytest.raises(DataError, match="margin by=-1"):
        DatasetRows(spec, **options)
