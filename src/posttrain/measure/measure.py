"""Measuring a policy: the same held-out prompts, samples, seeds and decoding for every policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from posttrain.core.errors import DataError
from posttrain.core.events import Measuring, Note, Observer
from posttrain.core.protocols import Completion, Policy, Prompt, Request
from posttrain.core.provenance import Kind, Role, Span
from posttrain.core.sampling import SamplingSpec
from posttrain.core.task import ReadsAnswers, TaskSet
from posttrain.core.trajectory import End, Trajectory
from posttrain.measure.measurement import Measurement, TaskMeasurement
from posttrain.measure.texts import answer_numbers, normalised, repeated_share, self_bleu
from posttrain.recipe import Measure

KL_SAMPLES = 16
"""Samples per prompt whose log-probs under the base are computed: enough for a mean."""
RECHECKED = 4
"""Samples per prompt that are scored twice. With 32 prompts a scorer that changes its mind on
one answer in 40 is found with probability 96 %."""


def measure(
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

    Some answers are scored twice: a scorer that does not give the same score again is reported.

    Args:
        name: what the policy is called in the run.
        policy: whom to measure.
        tasksets: on what.
        spec: samples, decoding, seed.
        protocol: digest that says which measurements are comparable.
        observe: told before every task set.
        base: if given, KL(policy ‖ base) is estimated on the policy's samples.
        stop: asked before every task set.
        parts: the protocol part by part, see :class:`Measurement`; the template is added here.

    Raises:
        KeyboardInterrupt: ``stop`` said so; nothing is kept of this measurement.
    """
    tasks: list[TaskMeasurement] = []
    for done, taskset in enumerate(tasksets):
        observe(Measuring(policy=name, done=done, total=len(tasksets)))
        if stop():
            raise KeyboardInterrupt
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


def verifier_words(task: TaskMeasurement) -> str | None:
    """A sentence when the scorer gave an answer two different scores, else None."""
    if task.recheck is None or not task.recheck.any():
        return None
    return (
        f"{task.taskset}: the verifier is not deterministic: of {task.recheck.size} answers that "
        f"were scored twice, {int(task.recheck.sum())} got another score; success rates "
        "include its chance"
    )


def _template(policy: Policy, tasksets: Sequence[TaskSet]) -> str:
    """Digests of the chat templates that wrote into the prompts, the same for any tokenizer."""
    written = {
        span.producer.digest
        for taskset in tasksets
        for task in taskset.held_out[:1]
        for span in policy.renderer.prompt(task).spans
        if span.producer.kind is Kind.TEMPLATE and span.producer.digest
    }
    return ", ".join(sorted(written)) or "none"


def _measure_task(
    policy: Policy, taskset: TaskSet, *, spec: Measure, base: Policy | None
) -> TaskMeasurement:
    tasks, n = list(taskset.held_out), spec.samples
    if not tasks:
        raise DataError(
            f"{taskset.name}: no held-out prompts",
            expected="prompts that only probes use",
            fix="raise held_out of the task set, or leave it out of measure.tasks",
        )
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
    twice = [i for i in range(len(texts)) if i % n < RECHECKED]
    again = taskset.score([asked[i] for i in twice], [texts[i] for i in twice])
    rows = [texts[i * n : (i + 1) * n] for i in range(len(tasks))]
    final = taskset.final_answer if isinstance(taskset, ReadsAnswers) else normalised
    answers = np.stack([answer_numbers([final(t) for t in row]) for row in rows])
    return TaskMeasurement(
        taskset=taskset.name,
        prompts=tuple(t.key for t in tasks),
        scores=scores.reshape(shape),
        success=taskset.success,
        lengths=np.array([len(c.tokens) for c in completions], np.int32).reshape(shape),
        truncated=np.array([c.end is not End.COMPLETED for c in completions]).reshape(shape),
        nll=np.array([-c.logprobs.mean() for c in completions], np.float32).reshape(shape),
        # Samples of a tempered or truncated policy say nothing unbiased about the policy's KL.
        kl_base=_kl(policy, base, prompts, completions, n)
        if base and spec.sampling == SamplingSpec()
        else None,
        distinct=answers.max(axis=1) + 1,
        answers=answers,
        self_bleu=np.array([self_bleu(row) for row in rows], np.float32),
        repetition=np.array([repeated_share(c.tokens) for c in completions], np.float32).reshape(
            shape
        ),
        recheck=(np.array(again, np.float32) != scores[twice]).reshape(len(tasks), -1),
    )


def _kl(
    policy: Policy,
    base: Policy,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    n: int,
) -> np.ndarray:
    """[P, min(n, KL_SAMPLES)] sums of log π − log π_base: unbiased for the KL, sample by sample."""
    used = min(n, KL_SAMPLES)
    chosen = [i * n + j for i in range(len(prompts)) for j in range(used)]
    trajectories = [_trajectory(policy, prompts[i // n], completions[i]) for i in chosen]
    own, other = policy.logprobs(trajectories), base.logprobs(trajectories)
    sums = [float(np.nansum(a - b)) for a, b in zip(own, other, strict=True)]
    return np.array(sums, np.float32).reshape(len(prompts), used)


def _trajectory(policy: Policy, prompt: Prompt, completion: Completion) -> Trajectory:
    span = Span(length=len(completion.tokens), role=Role.ASSISTANT, producer=policy.producer)
    return Trajectory(
        task="probe/0",
        tokens=np.concatenate([prompt.tokens, completion.tokens]).astype(np.int32),
        prompt_length=len(prompt.tokens),
        spans=(*prompt.spans, span),
        end=completion.end,
    )
