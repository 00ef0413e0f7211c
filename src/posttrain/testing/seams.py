"""A contract per seam: what a source, signal, task set, policy or learner must keep."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from posttrain.core.provenance import Role, Sampling, Span
from posttrain.core.task import Task, TaskSet
from posttrain.core.trajectory import Group, Trajectory
from posttrain.parts.base import Signal, Source, bound
from posttrain.parts.tools import Tools
from posttrain.protocols import (
    Completion,
    Learner,
    Objective,
    Policy,
    Prompt,
    Request,
    StepReport,
    Stream,
    provided,
)
from posttrain.testing.fakes import fake_tools


def check_source(
    source: Source, tools: Tools | None = None, *, num_groups: int = 3, seed: int = 0
) -> Stream:
    """A source draws what it says, and the same whenever it is asked for the same step.

    A stream that records state draws the same after its state was saved, and loaded by another
    stream of the source.

    Args:
        source: the part.
        tools: what it may use; by default those of :func:`fake_tools`.
        num_groups: of a draw.
        seed: of the source.

    Returns:
        The opened source, for further tests.

    Raises:
        AssertionError: the broken promise in words.
    """
    stream, other, resumed = (source.open(tools or fake_tools(), seed=seed) for _ in range(3))
    first, again = stream.draw(num_groups, step=0), other.draw(num_groups, step=0)
    assert len(first) == num_groups, f"draw({num_groups}) gave {len(first)} groups"
    assert _ids(first) == _ids(again), "drawing the same step twice gave other trajectories"
    if stream.state is None:
        assert _ids(stream.draw(num_groups, step=0)) == _ids(first), (
            "drawing the same step twice gave other trajectories"
        )
    stream.publish(1)
    _carry_over(stream, resumed)
    later = stream.draw(num_groups, step=1)
    assert _ids(later) == _ids(resumed.draw(num_groups, step=1)), "its state was not resumed"
    assert _ids(first) != _ids(later), "two steps gave the same trajectories"
    authors = {a for g in first for m in g.members for a in m.trajectory.authors}
    assert authors <= source.writes, f"tokens by {sorted(authors - source.writes)}, unannounced"
    for group in first:
        missing = source.provides - provided(group)
        assert not missing, f"a group lacks {sorted(missing)}, which the source provides"
        assert all(m.trajectory.trainable.any() for m in group.members), "nothing to train on"
    return stream


def _carry_over(stream: Stream, resumed: Stream) -> None:
    """What a checkpoint does with the state of a stream."""
    if stream.state is None or resumed.state is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        stream.state.save(Path(folder))
        resumed.state.load(Path(folder))


def check_signal(
    signal: Signal, groups: Sequence[Group], tools: Tools | None = None
) -> Sequence[Group]:
    """A signal adds its columns, keeps order and trajectories, and removes nothing.

    Args:
        signal: the part.
        groups: with the columns that it needs.
        tools: what it may use; by default those of :func:`fake_tools`.

    Returns:
        The scored groups, for further tests.

    Raises:
        AssertionError: the broken promise in words.
    """
    for group in groups:
        lacking = signal.needs - provided(group)
        assert not lacking, f"the groups lack {sorted(lacking)}, which the signal needs"
    scored = bound(signal, tools or fake_tools())(groups)
    assert len(scored) == len(groups), f"{len(groups)} groups in, {len(scored)} out"
    for before, after in zip(groups, scored, strict=True):
        assert after.task == before.task, "the order of groups changed"
        for old, new in zip(before.members, after.members, strict=True):
            assert new.trajectory is old.trajectory, "a signal must not copy or change the record"
            assert old.columns.keys() <= new.columns.keys(), "a column disappeared"
            for column in old.columns.keys() - signal.provides:
                same = np.array_equal(old.columns[column], new.columns[column], equal_nan=True)
                assert same, f"it changed {column}, which it does not provide"
        missing = signal.provides - provided(after)
        assert not missing, f"columns {sorted(missing)} were promised and not written"
    for before, again in zip(scored, bound(signal, tools or fake_tools())(groups), strict=True):
        for one, other in zip(before.members, again.members, strict=True):
            for column in signal.provides & one.columns.keys():
                same = np.array_equal(one.columns[column], other.columns[column], equal_nan=True)
                assert same, f"the same groups got another {column} the second time"
    return scored


def check_taskset(tasks: TaskSet) -> None:
    """A task set is deterministic, disjoint between its halves, and judges every completion."""
    keys = [t.key for t in tasks.held_out]
    assert len(set(keys)) == len(keys), "a held-out prompt stands twice"
    assert not set(keys) & {t.key for t in tasks.train}, "a held-out prompt is trained on"
    assert [t.key for t in tasks.held_out] == keys, "the tasks change between two looks"
    some, texts = list(tasks.held_out[:2]), ["", "nonsense"]
    assert some, "no held-out task"
    scores = tasks.score(some, texts[: len(some)])
    assert list(scores) == list(tasks.score(some, texts[: len(some)])), "a score is not repeatable"
    assert len(scores) == len(some), "one score per completion is promised"
    assert all(np.isfinite(scores)), "scores must be finite"


def check_policy(policy: Policy, tasks: Sequence[Task]) -> None:
    """Completions depend on their own request only, and log-probs are the policy's own."""
    prompts = [policy.renderer.prompt(t) for t in tasks]
    requests = [
        Request(prompt=p.tokens, sampling=Sampling(seed=i), max_new_tokens=6)
        for i, p in enumerate([*prompts, *prompts])
    ]
    together = policy.generate(requests)
    for request, expected in zip(requests, together, strict=True):
        (alone,) = policy.generate([request])
        assert alone.tokens.tolist() == expected.tokens.tolist(), "batch-mates changed a completion"
        gap = np.abs(alone.logprobs - expected.logprobs).max()
        assert gap < 1e-5, f"batch-mates changed log-probs by {gap}"
    trajectories = [
        _completed(policy, prompt, completion)
        for prompt, completion in zip([*prompts, *prompts], together, strict=True)
    ]
    for trajectory, values in zip(trajectories, policy.logprobs(trajectories), strict=True):
        gap = np.nanmax(np.abs(values - trajectory.behaviour_logprobs))
        assert gap < 1e-4, f"scored and sampled log-probs differ by {gap}"
        assert (np.isfinite(values) == trajectory.trainable).all(), "NaN exactly where untrainable"


def check_learner(learner: Learner, batches: Sequence[object], objective: Objective) -> None:
    """A step raises the version by one and reports finite numbers; lr 0 leaves the policy."""
    version = learner.policy.version
    report: StepReport = learner.step(batches, objective, lr_scale=0.0)  # type: ignore[arg-type]
    assert version is not None, "a learner's policy must be live"
    assert learner.policy.version == version + 1, "a step must raise the version by one"
    assert np.isfinite([report.loss, report.grad_norm]).all(), "loss and gradient must be finite"
    repeated = learner.step(batches, objective, lr_scale=0.0)  # type: ignore[arg-type]
    assert repeated.loss == report.loss, "a step at learning rate 0 changed the policy"


def _ids(groups: Sequence[Group]) -> list[str]:
    return [m.trajectory.id for g in groups for m in g.members]


def _completed(policy: Policy, prompt: Prompt, completion: Completion) -> Trajectory:
    version = policy.version
    span = Span(
        length=len(completion.tokens),
        role=Role.ASSISTANT,
        producer=policy.producer,
        versions=None if version is None else (version, version),
        sampling=Sampling(),
        logprobs=completion.logprobs,
    )
    return Trajectory(
        task="contract/0",
        tokens=np.concatenate([prompt.tokens, completion.tokens]).astype(np.int32),
        prompt_length=len(prompt.tokens),
        spans=(*prompt.spans, span),
        end=completion.end,
    )
