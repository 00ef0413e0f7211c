"""Names of what probes with rollouts or log-probs of their own tell: `diagnose` and `compare`.

They are declared here rather than beside the probe, so that a card can be read without the probes.
"""

from __future__ import annotations

from posttrain.measure.registry import Better, Topic, declare

_STARTS = {0.25: "a quarter of a", 0.5: "half a", 0.75: "three quarters of a"}


def _start(share: float) -> str:
    return f"success from {_STARTS.get(share, f'{share:.0%} of a')} right answer"


declare(
    "continue@f",
    topic=Topic.STATES,
    meaning="success when a share f of a correct answer is given",
    unit="probability",
    better=Better.HIGHER,
    source="2604.07941",
    phrase=_start,
)
declare(
    "teacher_forced_accuracy",
    topic=Topic.STATES,
    meaning="next tokens foreseen along a correct answer",
    unit="share",
    better=Better.HIGHER,
    source="2204.01171",
    phrase="the share of next tokens foreseen on right paths",
)
declare(
    "own_rollout_accuracy",
    topic=Topic.STATES,
    meaning="next tokens foreseen along own rollouts",
    unit="share",
    better=Better.HIGHER,
    source="2204.01171",
)
declare(
    "exposure_excess",
    topic=Topic.STATES,
    meaning="error on own prefixes over error on correct prefixes, minus 1",
    unit="ratio",
    better=Better.LOWER,
    source="2204.01171",
    phrase="the excess error on its own paths",
)
declare(
    "recovery",
    topic=Topic.STATES,
    meaning="answers that leave the demonstrations and still succeed",
    unit="share",
    better=Better.HIGHER,
    source="definition",
)
declare(
    "answer_room",
    topic=Topic.FORM,
    meaning="prompts whose known right answer takes at most half of the token budget",
    unit="share",
    better=Better.HIGHER,
    source="count",
    phrase="the share of known right answers that take at most half of the budget",
)
declare(
    "amortisation_gap",
    topic=Topic.SUCCESS,
    meaning="score with the scaffold minus score of the bare policy",
    unit="probability",
    better=Better.LOWER,
    source="2604.07941",
    phrase="the gain from the scaffold",
)
declare(
    "amortised_share",
    topic=Topic.SUCCESS,
    meaning="gain of the bare policy as a share of the gain with the scaffold",
    unit="share",
    better=Better.HIGHER,
    source="2604.07941",
)
declare(
    "reach_log10",
    topic=Topic.SUPPORT,
    meaning="log10 of the policy's success probability, estimated from another's successes",
    unit="log10",
    better=Better.HIGHER,
    source="importance sampling",
)
declare(
    "kl_forward",
    topic=Topic.DISTANCE,
    meaning="KL(base, policy) on the base's samples, per answer",
    unit="nats",
    better=Better.NEITHER,
    source="2509.04259",
)
declare(
    "kl_prior",
    topic=Topic.DISTANCE,
    meaning="KL from the base on earlier tasks, per answer",
    unit="nats",
    better=Better.LOWER,
    source="2607.04364",
    phrase="KL on earlier tasks",
)
declare(
    "base_perplexity",
    topic=Topic.DISTANCE,
    meaning="perplexity of the policy's successes under the base",
    unit="1 or more",
    better=Better.NEITHER,
    source="2504.13837",
)
