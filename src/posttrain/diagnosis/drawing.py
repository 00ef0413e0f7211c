"""Answers sampled and scored for a probe, and the checks before any work starts.

tasks ──check_prompts──▶ prompts ──seeds──▶ requests ──generate──▶ completions ──score──▶ Answers

The seed of an answer depends on the probe's seed, the prompt and the answer's number only: drawing
more later, or in another order, gives the same answers.

Shape legend: ``T`` tokens of a trajectory, ``F`` tokens given, ``A`` tokens of an answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from posttrain.core.errors import ConfigError, ModelError, TaskError
from posttrain.core.provenance import IntArray, Kind, Producer, Role, Span
from posttrain.core.sampling import SamplingSpec
from posttrain.core.task import Task, TaskSet
from posttrain.core.trajectory import End, Trajectory
from posttrain.protocols import Completion, Policy, Prompt, Request

Floats = npt.NDArray[np.float64]
NOTHING = np.zeros(0, np.int32)
_AUTHOR = Producer(kind=Kind.EXTERNAL, name="probe")
"""The producer of an answer does not affect its log-probs under a policy."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """One scored answer. ``given`` is its prefix that the policy did not generate."""

    task: Task
    prompt: Prompt
    given: IntArray  # [F]
    completion: Completion
    score: float
    success: bool

    @property
    def tokens(self) -> IntArray:
        """[A] given and generated tokens, the end of the turn included."""
        return np.concatenate([self.given, self.completion.tokens]).astype(np.int32)

    @property
    def logprob(self) -> float:
        """Log-prob of the generated tokens under the sampling distribution, in nats."""
        return float(self.completion.logprobs.astype(np.float64).sum())

    @property
    def trajectory(self) -> Trajectory:
        """The answer as a trajectory to score: all tokens after the prompt are trainable."""
        return as_trajectory(self.prompt, self.tokens, task=self.task.key, end=self.completion.end)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Demonstration:
    """A right answer to a task, in the policy's tokens, end of turn included."""

    task: Task
    tokens: IntArray  # [A]

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1 or not len(self.tokens):
            raise ConfigError(
                f"a demonstration of {self.task.key} with tokens of shape {self.tokens.shape}",
                expected="at least one token",
            )


def demonstrations_from(answers: Sequence[Sequence[Answer]]) -> tuple[Demonstration, ...]:
    """The distinct successes among answers that were not truncated."""
    found: dict[tuple[str, bytes], Demonstration] = {}
    for answer in (a for group in answers for a in group):
        if answer.success and answer.completion.end is End.COMPLETED:
            place = (answer.task.key, answer.tokens.tobytes())
            found.setdefault(place, Demonstration(task=answer.task, tokens=answer.tokens))
    return tuple(found.values())


def demonstration_from(task: Task, trajectory: Trajectory) -> Demonstration:
    """The trained part of a data set's trajectory as a demonstration of ``task``.

    Raises:
        ConfigError: the trained tokens are not one run at the end, or there are none.
    """
    trained = np.flatnonzero(trajectory.trainable)
    if not len(trained) or len(trained) != trained[-1] - trained[0] + 1:
        raise ConfigError(
            f"a trajectory of {task.key} with {len(trained)} trained tokens in several runs",
            expected="one answer, which ends the conversation",
        )
    return Demonstration(task=task, tokens=trajectory.tokens[trained])


def draw_answers(
    policy: Policy,
    taskset: TaskSet,
    tasks: Sequence[Task],
    *,
    samples: int | Sequence[int],
    max_new_tokens: int,
    seed: int,
    sampling: SamplingSpec = SamplingSpec(),
    first: Sequence[int] | None = None,
    given: Sequence[IntArray] | None = None,
) -> list[tuple[Answer, ...]]:
    """Draw and score answers, one tuple per task.

    Args:
        policy: the policy to sample.
        taskset: the scorer.
        tasks: the prompts; a task may occur several times with other ``given`` tokens.
        samples: answers per task, one number or one per task.
        max_new_tokens: budget of an answer, ``given`` included.
        seed: of the draws.
        sampling: decoding.
        first: number of the first answer of each task; answers before it were drawn earlier.
        given: per task, the prefix of the answer that the policy continues.

    Raises:
        TaskError: a prompt leaves no room in the policy's context; nothing was drawn.
    """
    counts = [samples] * len(tasks) if isinstance(samples, int) else list(samples)
    starts = [0] * len(tasks) if first is None else list(first)
    heads = [NOTHING] * len(tasks) if given is None else list(given)
    prompts = check_prompts(policy, tasks, given=heads)
    requests = []
    for i, task in enumerate(tasks):
        words = np.concatenate([prompts[i].tokens, heads[i]]).astype(np.int32)
        for number in answer_seeds(seed, task, counts[i], first=starts[i], given=heads[i]):
            asked = sampling.with_seed(number)
            room = max(max_new_tokens - len(heads[i]), 1)
            requests.append(Request(prompt=words, sampling=asked, max_new_tokens=room))
    completions = policy.generate(requests) if requests else []
    owners = [i for i, count in enumerate(counts) for _ in range(count)]
    texts = [
        policy.renderer.text(np.concatenate([heads[i], c.tokens]).astype(np.int32))
        for i, c in zip(owners, completions, strict=True)
    ]
    scores = taskset.score([tasks[i] for i in owners], texts) if texts else []
    # As in a measurement: a score and its threshold are compared in float32.
    passed = np.asarray(scores, np.float32) >= np.float32(taskset.success)
    answers: list[list[Answer]] = [[] for _ in tasks]
    for i, completion, score, success in zip(owners, completions, scores, passed, strict=True):
        answers[i].append(
            Answer(
                task=tasks[i],
                prompt=prompts[i],
                given=heads[i],
                completion=completion,
                score=float(score),
                success=bool(success),
            )
        )
    return [tuple(group) for group in answers]


def answer_seeds(
    seed: int, task: Task, count: int, *, first: int = 0, given: IntArray = NOTHING
) -> list[int]:
    """Seeds of the answers ``first``, ``first`` + 1, ... of a task.

    Example:
        >>> sums = Task(taskset="sums", prompt="1+1=")
        >>> answer_seeds(0, sums, 5)[3:] == answer_seeds(0, sums, 2, first=3)
        True
    """
    place = hashlib.sha256(f"{seed}|{task.key}|".encode() + given.tobytes()).digest()
    states = np.random.SeedSequence(int.from_bytes(place[:16])).generate_state(
        first + count, np.uint64
    )
    return [int(state >> np.uint64(1)) for state in states[first:]]


def check_prompts(
    policy: Policy, tasks: Sequence[Task], *, given: Sequence[IntArray] | None = None
) -> list[Prompt]:
    """Render prompts, and refuse those that leave no room for an answer, before work starts.

    Raises:
        TaskError: names the first task that does not fit.
    """
    prompts = [policy.renderer.prompt(task) for task in tasks]
    for i, (task, prompt) in enumerate(zip(tasks, prompts, strict=True)):
        length = len(prompt.tokens) + (0 if given is None else len(given[i]))
        if not 0 < length < policy.context:
            raise TaskError(
                f"the prompt of {task.key} has {length} tokens",
                expected=f"1 to {policy.context - 1}: the model's context is {policy.context}",
                fix="shorten the task's prompts, or use a model with a longer context",
            )
    return prompts


def require_same_vocabulary(one: Policy, other: Policy, tasks: Sequence[Task]) -> None:
    """Refuse to score one policy's tokens with another of a different tokenizer or template.

    Raises:
        ModelError: the vocabularies differ, or a template renders a task differently.
    """
    names = f"{one.producer.name} and {other.producer.name}"
    if one.vocabulary != other.vocabulary:
        raise ModelError(
            f"{names} have different tokens",
            expected="one tokenizer for both: log-probs of one model's tokens mean nothing to "
            "another tokenizer",
            fix="compare them by samples (pass@k, support, continuation), which needs no log-probs",
        )
    for task in tasks:
        mine, theirs = one.renderer.prompt(task).tokens, other.renderer.prompt(task).tokens
        if not np.array_equal(mine, theirs):
            raise ModelError(
                f"{names} render the prompt of {task.key} differently",
                expected="one chat template for both, so that both answer the same prompt",
                fix="give both model folders the same chat template",
            )


def require_plain(sampling: SamplingSpec, *, why: str) -> None:
    """Refuse decoding that is not the policy's own distribution.

    Raises:
        ConfigError: names the option, and ``why`` it matters.
    """
    plain = SamplingSpec()
    off = [
        f"{name}={value}"
        for name, value, default in (
            ("temperature", sampling.temperature, plain.temperature),
            ("top_k", sampling.top_k, plain.top_k),
            ("top_p", sampling.top_p, plain.top_p),
            ("min_p", sampling.min_p, plain.min_p),
        )
        if value != default
    ]
    if off:
        raise ConfigError(
            f"sampling with {', '.join(off)}",
            expected=f"temperature 1 and no truncation: {why}",
            fix="measure with the default sampling",
        )


def as_trajectory(
    prompt: Prompt, tokens: IntArray, *, task: str, end: End = End.COMPLETED
) -> Trajectory:
    """A prompt and an answer to it, all of the answer trainable."""
    span = Span(length=len(tokens), role=Role.ASSISTANT, producer=_AUTHOR)
    return Trajectory(
        task=task,
        tokens=np.concatenate([prompt.tokens, tokens]).astype(np.int32),
        prompt_length=len(prompt.tokens),
        spans=(*prompt.spans, span),
        end=end,
    )


def token_logprobs(policy: Policy, trajectories: Sequence[Trajectory]) -> list[Floats]:
    """[A] float64 log-probs of each answer's tokens, in nats, at temperature 1.

    Raises:
        ModelError: an answer is longer than the policy's context.
    """
    for trajectory in trajectories:
        if len(trajectory) > policy.context:
            raise ModelError(
                f"an answer to {trajectory.task} has {len(trajectory)} tokens with its prompt",
                expected=f"at most {policy.context}, the context of {policy.producer.name}",
                fix="lower max_new_tokens",
            )
    scored = policy.logprobs(trajectories) if trajectories else []
    return [
        values[trajectory.trainable].astype(np.float64)
        for values, trajectory in zip(scored, trajectories, strict=True)
    ]
