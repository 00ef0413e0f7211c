"""What a draw asks the sampler for, and that its record is what the sampler wrote."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from posttrain.parts.sources.rollouts import Rollouts
from posttrain.testing import FakeTaskSet, fake_tools

TASKS = FakeTaskSet(answer="abcd")


def stream(policy, *, seed=7, size=4):
    spec = Rollouts(tasks=("letters",), group_size=size, max_new_tokens=5)
    return spec.open(fake_tools(policy, tasksets={"letters": TASKS}), seed=seed)


def answers(groups):
    return [m.trajectory.tokens.tolist() for g in groups for m in g.members]


def test_a_draw_is_its_step_and_no_other(learner):
    once, again = stream(learner.policy), stream(learner.policy)
    assert answers(once.draw(3, step=1)) == answers(again.draw(3, step=1))
    num = len(TASKS.train)
    first, later = (once.draw(num, step=step) for step in (0, 1))
    seeds = [
        {span.sampling.seed for g in draw for m in g.members for span in m.trajectory.spans[1:]}
        for draw in (first, later)
    ]
    assert len(seeds[0]) == len(seeds[1]) == num * 4, "every completion has a seed of its own"
    assert not seeds[0] & seeds[1]


def test_members_of_a_group_answer_its_prompt(learner):
    by_key = {t.key: t for t in TASKS.train}
    for group in stream(learner.policy).draw(4, step=0):
        asked = learner.policy.renderer.prompt(by_key[group.task]).tokens.tolist()
        assert len(group.members) == 4
        for member in group.members:
            got = member.trajectory
            assert got.task == group.task
            assert got.tokens[: got.prompt_length].tolist() == asked


def test_an_epoch_holds_every_prompt_once_and_in_another_order(learner):
    drawn, num = stream(learner.policy, size=2), len(TASKS.train)
    assert num > 4
    orders = [
        [g.task for step in range(epoch * num, (epoch + 1) * num) for g in drawn.draw(1, step=step)]
        for epoch in range(2)
    ]
    file = [t.key for t in TASKS.train]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(file)
    assert orders[0] != orders[1]
    assert file not in orders


@dataclass
class Rewriting:
    """A policy whose completions are tokens that no text encodes to."""

    policy: object
    tokens: list[int]

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def generate(self, requests):
        tokens = np.array(self.tokens, np.int32)
        logprobs = np.full(len(tokens), -1.0, np.float32)
        return [
            replace(c, tokens=tokens, logprobs=logprobs) for c in self.policy.generate(requests)
        ]


def test_the_record_holds_the_samplers_tokens(learner):
    (end,) = learner.policy.renderer.end_tokens
    written = [12, end, 13, end]  # an end token in the middle has no text
    drawn = stream(Rewriting(learner.policy, written)).draw(2, step=0)
    for group in drawn:
        for member in group.members:
            got = member.trajectory
            assert got.tokens[got.prompt_length :].tolist() == written
            assert got.behaviour_logprobs[got.prompt_length :] == pytest.approx(-1.0)
