"""Definitions of the terms of a report, as shown on the page."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """A term of the page and what it means."""

    term: str
    words: str


HOW_TO_READ: tuple[Definition, ...] = (
    Definition(
        term="Role",
        words="What a stage did to behaviour, measured per task set and never taken from the "
        "method's name. A recipe may state what a stage intends; the page shows both.",
    ),
    Definition(
        term="Expansion",
        words="Correct answers that the policy before practically never gave are now given.",
    ),
    Definition(
        term="Reshaping",
        words="Answers that were already within reach are now chosen more often.",
    ),
    Definition(
        term="Consolidation",
        words="Behaviour that an earlier policy had is kept, or brought back after it was lost, "
        "without another material change (0.05 of pass@1 or more).",
    ),
    Definition(
        term="Attrition",
        words="Behaviour within reach before is weaker or no longer within reach.",
    ),
    Definition(
        term="Support: in, out, undetermined",
        words="A prompt is in the support of a policy when the lower bound of its success rate "
        "reaches a threshold, out when the upper bound stays below it, and undetermined "
        "otherwise. No success in n samples does not mean never: at 95 % it means a rate below "
        "about 3/n.",
    ),
    Definition(
        term="The five parts of a change",
        words="A change of pass@1, split so that kept + gains = after and kept + losses = before. "
        "Newly reachable: gained on prompts that were out before and are in after. Sharpened: "
        "gained on prompts that were in before. Weakened: went away where the prompt is still in. "
        "Lost: went away where it is now out. What the labels cannot decide is undetermined. One "
        "part of the samples decides where a prompt belongs and another measures the amount, so "
        "chance alone gives every part but kept an average of zero.",
    ),
    Definition(
        term="Retention",
        words="Kept divided by pass@1 before: the share of the earlier successes that survived.",
    ),
    Definition(
        term="pass@k",
        words="The chance that at least one of k sampled answers is correct, averaged over "
        "prompts. pass@1 is ordinary accuracy; large k shows what is within reach at all.",
    ),
    Definition(
        term="Intervals",
        words="[low, high] around a number, at 95 % unless the run says otherwise. A difference "
        "whose interval holds zero is not a finding.",
    ),
    Definition(
        term="On-policy, off-policy",
        words="On-policy tokens were sampled by the model being trained, as it was at that "
        "moment. Everybody else's are off-policy, an earlier version of the same model included.",
    ),
)
"""The definitions every page carries."""
