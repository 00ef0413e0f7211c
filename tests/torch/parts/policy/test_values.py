"""A learned value: where it is read, its loss, and that a critic leaves the policy alone."""

import numpy as np
import pytest
import torch
from material import on_policy, random_groups, trajectory, with_column
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from posttrain.core.errors import LegalityError, ModelError, RunError
from posttrain.core.learner import Lora, Optimizer
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column
from posttrain.engines.local.scalar import FILE
from posttrain.numerics.batch import pack
from posttrain.parts.policy.losses import ClippedPolicyGradient
from posttrain.parts.policy.value import ValueLoss
from posttrain.parts.supervised.likelihood import CrossEntropy
from posttrain.protocols import ScalarStart
from posttrain.testing import tiny_model
from posttrain.testing.contracts import check_term
from posttrain.training.objective import StageObjective

FIT = StageObjective((ValueLoss(clip=None),))
BOTH = StageObjective((ClippedPolicyGradient(), ValueLoss(clip=0.2, weight=0.5)))


@pytest.fixture(scope="module")
def headed(tmp_path_factory):
    """A tiny model with a random scalar head, as a folder."""
    folder = tiny_model(tmp_path_factory.mktemp("headed") / "m", seed=5)
    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(2))
    save_file({"weight": weight}, folder / FILE)
    return folder


def make(engine, folder, *, trunk="separate", start=None, lora=None, lr=1e-2, critic_lr=None):
    start = ScalarStart(trunk=trunk, model=str(start or folder), lr=critic_lr)
    optimizer = Optimizer(lr=lr, weight_decay=0.1)
    return engine.learner(str(folder), name="t", optimizer=optimizer, lora=lora, scalar=start)


def material(policy, seed=0):
    """Answers with advantages, values before the update and returns."""
    rng = np.random.default_rng(seed)
    groups = on_policy(random_groups(seed=seed), policy)
    for column in (Column.ADVANTAGE, Column.OLD_VALUE, Column.RETURN):
        groups = with_column(groups, column, lambda t: rng.normal(size=len(t)).astype(np.float32))
    return groups


def packed(learner, objective, seed=0, max_tokens=40):
    return pack(material(learner.policy, seed), needs=objective.needs, max_tokens=max_tokens)


def weights(policy_or_model):
    return {n: p.detach().clone() for n, p in policy_or_model.causal.named_parameters()}


# --- where it is read ------------------------------------------------------------------------


def test_values_stand_before_tokens_and_scores_after(headed, engine):
    """Against the model library alone: its hidden states, times the head's row."""
    policy = engine.policy(str(headed))
    stock = AutoModelForCausalLM.from_pretrained(headed, dtype=torch.float32).eval()
    row = load_file(headed / FILE)["weight"][0]
    prompt = [7, 8, 9, 10]
    asked = [trajectory(prompt, [30, 31, 32]), trajectory(prompt, [33]), trajectory([], [9, 8, 7])]
    pairs = zip(asked, policy.values(asked), policy.scores(asked), strict=True)
    for t, before, after in pairs:
        ids = torch.tensor([t.tokens.tolist()])
        with torch.no_grad():
            out = stock(input_ids=ids, output_hidden_states=True).hidden_states[-1][0] @ row
        trained = [i for i in np.flatnonzero(t.trainable) if i > 0]
        np.testing.assert_allclose(after[trained], out[trained].numpy(), atol=1e-5)
        np.testing.assert_allclose(
            before[trained], out[[i - 1 for i in trained]].numpy(), atol=1e-5
        )
        rest = np.setdiff1d(np.arange(len(t)), trained)
        assert np.isnan(before[rest]).all()
        assert np.isnan(after[rest]).all()


def test_last_tokens_are_computed_only_when_asked_for():
    groups = random_groups(num_groups=2, size=3)
    usual = pack(groups, needs=frozenset(), max_tokens=10_000)
    whole = pack(groups, needs=frozenset(), max_tokens=10_000, whole=True)
    assert whole[0].num_tokens == usual[0].num_tokens + 6
    lasts = [int(np.flatnonzero(b.sequence_N == s)[-1]) for b in usual for s in range(6)]
    assert (usual[0].after_N[lasts] == -1).all()
    for batch in whole:
        assert torch.equal(batch.tokens_T[batch.after_N], batch.target_N)


def test_a_score_of_what_was_not_computed_is_refused(headed, engine):
    learner = make(engine, headed, trunk="shared")
    (batch, *_) = pack(random_groups(), needs=frozenset(), max_tokens=10_000)
    scalar = learner._scalar
    with pytest.raises(LegalityError, match="whole"):
        scalar.stats(scalar.trunk.packed(batch), batch, frozenset({Stat.SCORE}))


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_stock_classifiers_are_scalar_heads(tmp_path, engine, labels, kind):
    """One label is the number itself; of two the head is the log-odds of the second."""
    auto = AutoModelForSequenceClassification if kind == "sequence" else (
        AutoModelForTokenClassification
    )  # fmt: skip
    base = tiny_model(tmp_path / "base", tied=False)
    torch.manual_seed(0)
    stock = auto.from_pretrained(base, num_labels=labels).eval()
    with torch.no_grad():
        for p in stock.score.parameters():
            p.normal_()
    stock.save_pretrained(tmp_path / "rm")
    engine.policy(str(base)).model.tokenizer.save_pretrained(tmp_path / "rm")
    policy = engine.policy(str(tmp_path / "rm"))
    t = trajectory([7, 8, 9], [30, 31, 32])
    with torch.no_grad():
        logits = stock(input_ids=torch.tensor([t.tokens.tolist()])).logits.reshape(-1, labels)
    expected = logits[-1, -1] - (logits[-1, 0] if labels == 2 else 0)
    assert policy.scores([t])[0][-1] == pytest.approx(float(expected), abs=1e-4)
    with pytest.raises(ModelError, match="classifier"):
        policy.logprobs([t])


def test_a_classifier_of_many_labels_is_refused(tmp_path, engine):
    base = tiny_model(tmp_path / "base")
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).save_pretrained(base)
    with pytest.raises(ModelError, match="3 labels"):
        engine.policy(str(base))


def test_a_model_without_a_head_says_so(engine, tiny_folder):
    policy = engine.policy(str(tiny_folder))
    for ask in (policy.values, policy.scores):
        with pytest.raises(LegalityError, match="no scalar head"):
            ask([])


# --- the loss --------------------------------------------------------------------------------


def by_hand(value, target, old, clip):
    """float64, from the formula."""
    value, target, old = (np.asarray(x, np.float64) for x in (value, target, old))
    held = np.clip(value, old - clip, old + clip)
    return 0.5 * np.maximum((value - target) ** 2, (held - target) ** 2)


def test_value_loss_by_hand(learner):
    rng = np.random.default_rng(3)
    (batch,) = packed(learner, BOTH, max_tokens=10_000)
    value = torch.tensor(rng.normal(size=len(batch.target_N)))
    columns = {c: batch.columns[c].double() for c in (Column.RETURN, Column.OLD_VALUE)}
    expected = by_hand(value, columns[Column.RETURN], columns[Column.OLD_VALUE], 0.2)
    got = ValueLoss(clip=0.2).values({Stat.VALUE: value}, batch)
    np.testing.assert_allclose(got.loss.numpy(), expected, rtol=1e-5)
    plain = ValueLoss(clip=None).values({Stat.VALUE: value}, batch)
    np.testing.assert_allclose(
        plain.loss.numpy(), 0.5 * (value - columns[Column.RETURN]).numpy() ** 2, rtol=1e-5
    )
    assert (got.loss >= plain.loss - 1e-9).all(), "clipping is pessimistic"
    assert 0 < float(got.shown["clipped"].mean()) < 1


def test_value_loss_gradient_by_finite_differences(learner):
    (batch,) = packed(learner, BOTH, max_tokens=10_000)
    rng = np.random.default_rng(4)
    value = torch.tensor(rng.normal(size=len(batch.target_N)), requires_grad=True)
    ValueLoss(clip=0.2).values({Stat.VALUE: value}, batch).loss.sum().backward()
    target, old = (batch.columns[c].double().numpy() for c in (Column.RETURN, Column.OLD_VALUE))
    at, step = value.detach().numpy(), 1e-6
    slope = (by_hand(at + step, target, old, 0.2) - by_hand(at - step, target, old, 0.2)) / (
        2 * step
    )
    np.testing.assert_allclose(value.grad.numpy(), slope, atol=1e-5)


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean", "sequence_sum"])
def test_contract(clip, aggregate):
    check_term(ValueLoss(clip=clip, aggregate=aggregate))


# --- the learner -----------------------------------------------------------------------------


@pytest.mark.parametrize("trunk", ["separate", "shared"])
def test_splitting_a_step_changes_nothing(headed, engine, trunk):
    moved = []
    for max_tokens in (10_000, 12):
        learner = make(engine, headed, trunk=trunk)
        batches = packed(learner, BOTH, max_tokens=max_tokens)
        report = learner.step(batches, BOTH, lr_scale=1.0)
        moved.append((report.loss, report.grad_norm, learner.policy.values([batch_text()])[0][-1]))
    assert moved[1] == pytest.approx(moved[0], rel=1e-3)


def batch_text():
    return trajectory([7, 8, 9], [30, 31, 32])


def test_fitting_a_critic_leaves_the_policy_alone(headed, engine):
    learner = make(engine, headed)
    before, said = weights(learner.policy.model), learner.policy.values([batch_text()])[0][-1]
    losses = []
    for _ in range(5):
        report = learner.step(packed(learner, FIT), FIT, lr_scale=1.0)
        losses.append(report.loss)
    after = weights(learner.policy.model)
    assert all(torch.equal(w, after[n]) for n, w in before.items())
    assert losses[-1] < losses[0]
    assert learner.policy.values([batch_text()])[0][-1] != said
    assert report.metrics["critic/grad_norm"] > 0
    assert report.grad_norm == 0


def test_a_shared_critic_moves_the_policy(headed, engine):
    learner = make(engine, headed, trunk="shared")
    before = weights(learner.policy.model)
    learner.step(packed(learner, FIT), FIT, lr_scale=1.0)
    after = weights(learner.policy.model)
    assert not all(torch.equal(w, after[n]) for n, w in before.items())


def test_the_policy_steps_as_it_would_without_a_critic(headed, engine):
    """A separate critic has a gradient norm, a rate and an optimiser state of its own."""
    alone = engine.learner(
        str(headed), name="t", optimizer=Optimizer(lr=1e-2, weight_decay=0.1), lora=None
    )
    beside = make(engine, headed, critic_lr=1.0)
    policy_only = StageObjective((ClippedPolicyGradient(),))
    for seed in range(2):
        batches = packed(alone, BOTH, seed)
        alone.step(batches, policy_only, lr_scale=0.5)
        beside.step(packed(beside, BOTH, seed), BOTH, lr_scale=0.5)
    expected = weights(alone.policy.model)
    assert all(torch.equal(w, expected[n]) for n, w in weights(beside.policy.model).items())


def test_the_critic_has_its_own_rate(headed, engine):
    still = make(engine, headed, critic_lr=0.0)
    before = weights(still._critic)
    still.step(packed(still, BOTH), BOTH, lr_scale=1.0)
    after = weights(still._critic)
    assert all(torch.equal(w, after[n]) for n, w in before.items())


@pytest.mark.parametrize("trunk", ["separate", "shared"])
@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_save_and_load_go_on_bit_for_bit(headed, engine, tmp_path, trunk, lora):
    straight = make(engine, headed, trunk=trunk, lora=lora)
    for seed in range(2):
        straight.step(packed(straight, BOTH, seed), BOTH, lr_scale=1.0)
    straight.save(tmp_path)
    resumed = make(engine, headed, trunk=trunk, lora=lora)
    resumed.load(tmp_path)
    for seed in range(2, 4):
        for learner in (straight, resumed):
            learner.step(packed(learner, BOTH, seed), BOTH, lr_scale=1.0)
    expected = straight._masters.state()
    assert all(torch.equal(w, expected[n]) for n, w in resumed._masters.state().items())
    assert any(n.startswith("critic.") for n in expected) == (trunk == "separate")
    asked = [batch_text()]
    assert resumed.policy.values(asked)[0][-1] == straight.policy.values(asked)[0][-1]


def test_a_checkpoint_with_a_critic_is_not_one_without(headed, engine, tmp_path):
    make(engine, headed).save(tmp_path)
    with pytest.raises(RunError, match="another learner: 49 weights"):
        make(engine, headed, trunk="shared").load(tmp_path)


@pytest.mark.parametrize("trunk", ["separate", "shared"])
@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_an_export_starts_the_next_critic(headed, engine, tmp_path, trunk, lora):
    learner = make(engine, headed, trunk=trunk, lora=lora)
    for seed in range(2):
        learner.step(packed(learner, BOTH, seed), BOTH, lr_scale=1.0)
    out = tmp_path / "out"
    out.mkdir()
    learner.export(out)
    asked = [batch_text(), *(m.trajectory for g in random_groups(seed=4) for m in g.members)]
    said = learner.policy.values(asked)
    again = make(engine, out, trunk=trunk).policy
    for a, b in zip(again.values(asked), said, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    for a, b in zip(again.logprobs(asked), learner.policy.logprobs(asked), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    # As a frozen policy the folder has the head of its own trunk, and of no other.
    frozen = engine.policy(str(out))
    if trunk == "shared":
        np.testing.assert_allclose(frozen.values(asked)[0], said[0], atol=1e-4)
        stock = AutoModelForSequenceClassification.from_pretrained(out, num_labels=1)
        stock.score.load_state_dict(load_file(out / FILE))
    else:
        with pytest.raises(LegalityError, match="no scalar head"):
            frozen.values(asked)
        stock = AutoModelForSequenceClassification.from_pretrained(out / "critic", num_labels=1)
        stock.score.load_state_dict(load_file(out / "critic" / FILE))
    with torch.no_grad():
        ids = torch.tensor([asked[0].tokens.tolist()])
        logit = float(stock.eval()(input_ids=ids[:, :-1]).logits[0, -1])
    assert logit == pytest.approx(float(said[0][-1]), abs=1e-4)


def test_a_new_head_says_zero(engine, tiny_folder):
    learner = make(engine, tiny_folder)
    (values,) = learner.policy.values([batch_text()])
    assert values[np.isfinite(values)].tolist() == [0.0] * 3


def test_a_critic_of_another_vocabulary_is_refused(engine, tiny_folder, tmp_path):
    other = tiny_model(tmp_path / "o")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"z": ', '"Z": '))
    with pytest.raises(ModelError, match="different vocabularies"):
        make(engine, tiny_folder, start=other)


def test_a_head_of_another_width_is_refused(headed, engine, tmp_path):
    other = tiny_model(tmp_path / "o")
    save_file({"weight": torch.zeros(1, 16)}, other / FILE)
    with pytest.raises(ModelError, match="shape"):
        engine.policy(str(other))


def test_a_learner_without_a_head_cannot_fit_one(learner):
    with pytest.raises(LegalityError, match="scalar_head"):
        learner.step(packed(learner, FIT), FIT, lr_scale=1.0)


def test_logits_are_not_computed_for_values_alone(headed, engine, monkeypatch):
    learner = make(engine, headed)
    batches = packed(learner, FIT)
    calls = []
    monkeypatch.setattr(
        type(learner.policy.model), "predicting", lambda self, batch: calls.append(batch)
    )
    learner.step(batches, FIT, lr_scale=1.0)
    assert calls == []
    assert not FIT.reads_logits
    assert BOTH.reads_logits
    assert StageObjective((CrossEntropy(),)).scalars == frozenset()
