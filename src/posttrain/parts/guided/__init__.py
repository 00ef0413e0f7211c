"""Demonstrations combined with the learner's own rollouts."""
