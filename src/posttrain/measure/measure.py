"""Measuring a policy: the same held-out prompts, samples, seeds and decoding for every policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from posttrain.core.errors import DataError, Interrupted
from posttrain.core.events import Measuring, Note, Observer
from posttrain.core.provenance import Kind
from posttrain.core.task import ReadsAnswers, TaskSet
from posttrain.core.trajectory import End
from posttrain.measure.measurement import Measurement, TaskMeasurement
from posttrain.measure.recording import TaskSamples, record_columns
from posttrain.measure.rescoring import verifier_words
from posttrain.measure.spec import Measure
from posttrain.measure.texts import normalised
from posttrain.protocols import Policy, Request


def measure_policy(
    name: str,
    policy: Policy,
    tasksets: Sequence[TaskSet],
    *,
    spec: Measure,
    protocol: str,
    observe: Observer,
    base: Policy | None = None,
    stop: Callable[[], bool] = lambda: False,
    parts: Mapping[str, str] | None = None,
) -> Measurement:
    """Sample every held-out prompt and score the answers.

    Some answers are scored twice: a scorer that gives another score is reported.

    Args:
        name: what the policy is called in the run.
        policy: the policy to measure.
        tasksets: the task sets to measure it on.
        spec: samples, decoding, seed.
        protocol: digest; measurements are comparable when theirs are equal.
        observe: called before every task set.
        base: if given, KL(policy ‖ base) is estimated on the policy's samples.
        stop: called before every task set; True interrupts.
        parts: the protocol part by part, see :class:`Measurement`; the template is added here.

    Raises:
        Interrupted: ``stop`` returned True; the measurement is discarded.
    """
    tasks: list[TaskMeasurement] = []
    for done, taskset in enumerate(tasksets):
        observe(Measuring(policy=name, done=done, total=len(tasksets)))
        if stop():
            raise Interrupted(f"while {name} was measured")
        tasks.append(_measure_task(policy, taskset, spec=spec, base=base))
        if warning := verifier_words(tasks[-1]):
            observe(Note(text=warning))
    observe(Measuring(policy=name, done=len(tasksets), total=len(tasksets)))
    return Measurement(
        policy=name,
        digest=policy.producer.digest or policy.producer.name,
        protocol=protocol,
        tasks=tuple(tasks),
        parts={**parts, "template": _template(policy, tasksets)} if parts else {},
    )


def _template(policy: Policy, tasksets: Sequence[TaskSet]) -> str:
    """Digests of the chat templates of the prompts, the same for any tokenizer."""
    written = {
        span.producer.digest
        for taskset in tasksets
        for task in taskset.held_out[:1]
        for span in policy.renderer.prompt(task).spans
        if span.producer.kind is Kind.TEMPLATE and span.producer.digest
    }
    return ", ".join(sorted(written)) or "none"


def require_prompts(taskset: TaskSet) -> None:
    """Refuse to measure on nothing.

    Raises:
        DataError: no held-out prompts.
    """
    if not taskset.held_out:
        raise DataError(
            f"{taskset.name}: no held-out prompts",
            expected="prompts that only probes use",
            fix="raise held_out of the task set, or leave it out of measure.tasks",
        )


def _measure_task(
    policy: Policy, taskset: TaskSet, *, spec: Measure, base: Policy | None
) -> TaskMeasurement:
    require_prompts(taskset)
    tasks, n = list(taskset.held_out), spec.samples
    prompts = [policy.renderer.prompt(t) for t in tasks]
    seeds = np.random.SeedSequence(spec.seed).generate_state(len(tasks) * n, np.uint64)
    requests = [
        Request(
            prompt=prompts[i // n].tokens,
            sampling=spec.sampling.with_seed(int(seed >> np.uint64(1))),
            max_new_tokens=spec.max_new_tokens,
        )
        for i, seed in enumerate(seeds)
    ]
    completions = policy.generate(requests)
    texts = [policy.renderer.text(c.tokens) for c in completions]
    asked = [tasks[i // n] for i in range(len(texts))]
    scores = np.array(taskset.score(asked, texts), np.float32)
    shape = (len(tasks), n)
    final = taskset.final_answer if isinstance(taskset, ReadsAnswers) else normalised
    samples = TaskSamples(
        policy=policy,
        base=base,
        taskset=taskset,
        spec=spec,
        tasks=tasks,
        prompts=prompts,
        completions=completions,
        texts=texts,
        answers=[final(t) for t in texts],
        scores=scores.reshape(shape),
    )
    return TaskMeasurement(
        taskset=taskset.name,
        prompts=tuple(t.key for t in tasks),
        scores=samples.scores,
        success=taskset.success,
        lengths=np.array([len(c.tokens) for c in completions], np.int32).reshape(shape),
        truncated=np.array([c.end is not End.COMPLETED for c in completions]).reshape(shape),
        nll=np.array([-c.logprobs.mean() for c in completions], np.float32).reshape(shape),
        distinct=np.array([len(set(row)) for row in samples.rows(samples.answers)], np.int32),
        raw=record_columns(samples),
    )
