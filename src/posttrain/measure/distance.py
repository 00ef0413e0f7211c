"""KL from the base, estimated on the samples that were taken anyway.

samples ──both policies' log-probs──▶ sums of log π − log π_base ──mean──▶ KL(π ‖ π_base)

Shape legend: ``P`` prompts, ``n`` samples per prompt, ``K`` <= n samples with log-probs of both.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from posttrain.core.provenance import Role, Span
from posttrain.core.sampling import SamplingSpec
from posttrain.core.trajectory import Trajectory
from posttrain.measure.bootstrap import Floats
from posttrain.measure.estimators import per_prompt, seen_range
from posttrain.measure.measurement import TaskMeasurement
from posttrain.measure.recording import TaskSamples, raw_column
from posttrain.measure.registry import Better, Topic
from posttrain.protocols import Completion, Policy, Prompt

KL_SAMPLES = 16
"""Samples per prompt whose log-probs under the base are computed: enough for a mean."""


@raw_column(
    "kl_base",
    dtype=np.float32,
    per="first samples",
    absent="no KL from the base was measured",
    expected="a policy other than the base, sampled at temperature 1 without truncation",
    plain_sampling=True,
)
def kl_base_column(samples: TaskSamples) -> npt.ArrayLike | None:
    """[P, K] sums over tokens of log π − log π_base: unbiased for the KL, sample by sample.

    Samples of a tempered or truncated policy say nothing unbiased about the policy's KL.
    """
    policy, base = samples.policy, samples.base
    if base is None or samples.spec.sampling != SamplingSpec():
        return None
    n, used = samples.num_samples, min(samples.num_samples, KL_SAMPLES)
    chosen = [i * n + j for i in range(len(samples.prompts)) for j in range(used)]
    trajectories = [
        _trajectory(policy, samples.prompts[i // n], samples.completions[i]) for i in chosen
    ]
    own, other = policy.logprobs(trajectories), base.logprobs(trajectories)
    sums = [float(np.nansum(a - b)) for a, b in zip(own, other, strict=True)]
    return np.array(sums).reshape(len(samples.prompts), used)


@per_prompt(
    "kl_reverse",
    topic=Topic.DISTANCE,
    meaning="KL(policy, base) on the policy's samples, per answer",
    unit="nats",
    better=Better.NEITHER,
    source="2509.04259",
    columns=(kl_base_column,),
    routine=False,
    limits=seen_range,
    sentence=lambda value, k, task: (
        f"the policy's answers are {value:.3g} nats likelier to itself than to the base"
    ),
    formerly={"kl_base": "kl_reverse"},
)
def _kl_reverse(task: TaskMeasurement) -> Floats:
    return np.asarray(task.need(kl_base_column).mean(axis=1, dtype=np.float64))


def _trajectory(policy: Policy, prompt: Prompt, completion: Completion) -> Trajectory:
    span = Span(length=len(completion.tokens), role=Role.ASSISTANT, producer=policy.producer)
    return Trajectory(
        task="probe/0",
        tokens=np.concatenate([prompt.tokens, completion.tokens]).astype(np.int32),
        prompt_length=len(prompt.tokens),
        spans=(*prompt.spans, span),
        end=completion.end,
    )
