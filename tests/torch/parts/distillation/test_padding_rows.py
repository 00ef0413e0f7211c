"""A teacher whose head has other padding rows than the learner's: the two are compared over the
ids that both have."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from material import random_groups
from test_teacher_states import COMPARED, V, situation

from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column
from posttrain.numerics import fused
from posttrain.numerics.head import token_stats
from posttrain.numerics.logits import LinearHead
from posttrain.parts.columns import trajectories_of
from posttrain.protocols import over_shared_rows
from posttrain.run.build import check_same_tokens
from posttrain.testing import tiny_model

FEW, MANY = 2, 9


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """Folders of models with few and with many padding rows."""
    top = tmp_path_factory.mktemp("padded")
    return {n: tiny_model(top / str(n), seed=n, padding=n) for n in (FEW, MANY)}


@pytest.mark.parametrize("keep", [0, fused.KEEP_ELEMENTS])
@pytest.mark.parametrize("wanted", COMPARED, ids=str)
def test_a_narrow_teacher_is_compared_given_its_ids(wanted, keep, monkeypatch):
    """Value and gradient: those of a policy whose head has the teacher's rows only."""
    monkeypatch.setattr(fused, "KEEP_ELEMENTS", keep)
    narrow = V - 5
    states, dense, heads, leaves, known = situation()
    linear, other = heads
    cut = (
        LinearHead(linear.weight_VX[:narrow], linear.bias_V[:narrow], linear.scale),
        lambda hidden_NX: other(hidden_NX)[:, :narrow],
    )
    logp = dense.columns[Column.TEACHER_LOGPROBS][:, :narrow].log_softmax(-1)
    dense = replace(dense, columns={**dense.columns, Column.TEACHER_LOGPROBS: logp})
    _, weight, bias = leaves
    stats = frozenset({wanted, Stat.LOGPROB})
    found = []
    for batch, teachers in ((states, cut), (dense, ())):
        for own in (LinearHead(weight, bias), lambda h: h @ weight.T + bias):
            found.append(values_and_gradients(batch, own, leaves, stats, known, wanted, teachers))
    short = LinearHead(weight[:narrow], bias[:narrow])
    batch = replace(dense, target_N=dense.target_N.clamp(max=narrow - 1))
    value, grads = values_and_gradients(batch, short, leaves, {wanted}, known, wanted, ())
    for other_value, other_grads in found:
        torch.testing.assert_close(other_value, value, atol=1e-5, rtol=1e-4)
        for one, two in zip(other_grads, grads, strict=True):
            torch.testing.assert_close(one, two, atol=2e-4, rtol=1e-4)
    assert not bool(found[0][1][1][narrow:].any())


def values_and_gradients(batch, head, leaves, stats, known, wanted, teachers):
    out = token_stats(
        leaves[0], head, batch, wanted=frozenset(stats), vocab_size=V, teachers=teachers
    )[wanted]
    grads = torch.autograd.grad(out[known].square().sum(), leaves)
    return out[known].detach(), grads


@pytest.mark.parametrize(("own", "other"), [(FEW, MANY), (MANY, FEW)])
def test_siblings_share_their_tokens(engine, padded, own, other):
    policy, teacher = (engine.policy(str(padded[n])) for n in (own, other))
    check_same_tokens(teacher, policy)
    assert policy.rows - teacher.rows == own - other
    mine, theirs = over_shared_rows([policy, teacher])
    assert mine.rows == theirs.rows == min(policy.rows, teacher.rows)
    trajectories = trajectories_of(random_groups(vocab=40))
    whole, cut = (p.distributions(trajectories, top_k=None) for p in (teacher, theirs))
    for (_, full_TV), (_, part_TV) in zip(whole, cut, strict=True):
        expected = torch.tensor(full_TV)[:, : theirs.rows].log_softmax(-1).numpy()
        np.testing.assert_allclose(part_TV, expected, atol=2e-6)
    hidden = theirs.hidden
    assert len(hidden.head.weight_VX) == theirs.rows
    ids, _ = theirs.distributions(trajectories, top_k=7)[0]
    assert ids.max() < theirs.rows


def test_a_policy_with_no_more_rows_is_itself(engine, padded):
    policy = engine.policy(str(padded[FEW]))
    assert policy.over(policy.rows) is policy
    assert policy.over(policy.rows + 1) is policy
