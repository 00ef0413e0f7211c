"""Groups with known columns, for tests of packing and objectives."""

from __future__ import annotations

import numpy as np

from posttrain.core.provenance import Kind, Producer, Role, Sampling, Span
from posttrain.core.trajectory import Column, Group, Scored, Trajectory


def trajectory(prompt, answer, *, kind=Kind.LEARNER, logprobs=None, temperature=1.0):
    live = kind is Kind.LEARNER
    spans = []
    if len(prompt):
        asker = Producer(kind=Kind.ENVIRONMENT, name="test")
        spans.append(Span(length=len(prompt), role=Role.USER, producer=asker))
    spans.append(
        Span(
            length=len(answer),
            role=Role.ASSISTANT,
            producer=Producer(kind=kind, name="test"),
            versions=(0, 0) if live else None,
            sampling=Sampling(temperature=temperature) if live else None,
            logprobs=logprobs,
        )
    )
    return Trajectory(
        task="test/0",
        tokens=np.array([*prompt, *answer], np.int32),
        prompt_length=len(prompt),
        spans=tuple(spans),
    )


def random_groups(*, num_groups=3, size=4, seed=0, kind=Kind.LEARNER, vocab=40):
    """Groups with shared prompts of several lengths and answers of several lengths."""
    rng = np.random.default_rng(seed)
    groups = []
    for _ in range(num_groups):
        prompt = rng.integers(6, vocab, rng.integers(2, 9))
        members = tuple(
            Scored(
                trajectory=trajectory(prompt, rng.integers(6, vocab, rng.integers(1, 7)), kind=kind)
            )
            for _ in range(size)
        )
        groups.append(Group(task="test/0", members=members))
    return groups


def with_column(groups, column, make):
    """Groups with ``make(trajectory)`` as a column on every member."""
    return [
        Group(
            task=g.task,
            members=tuple(m.with_columns({column: make(m.trajectory)}) for m in g.members),
        )
        for g in groups
    ]


def on_policy(groups, policy):
    """Behaviour log-probs of ``policy`` itself, so that every ratio is 1."""
    values = iter(policy.logprobs([m.trajectory for g in groups for m in g.members]))
    return with_column(groups, Column.BEHAVIOUR_LOGPROB, lambda t: next(values))


def gradients(learner, batches, objective):
    """Loss and gradients by weight name, without taking a step."""
    model = learner.policy.model
    model.causal.zero_grad(set_to_none=True)
    counts = objective.counts(batches)
    total = 0.0
    for batch in batches:
        loss, _ = objective.loss(
            model.predicting(batch), model.head, batch, counts=counts, vocab_size=model.vocab_size
        )
        loss.backward()
        total += float(loss.detach())
    grads = {n: p.grad.clone() for n, p in model.causal.named_parameters() if p.grad is not None}
    return total, grads


def largest_gap(a, b):
    """Largest difference, relative to the largest gradient."""
    largest = max(float(g.abs().max()) for g in a.values())
    return max(float((a[n] - b[n]).abs().max()) for n in a) / largest
