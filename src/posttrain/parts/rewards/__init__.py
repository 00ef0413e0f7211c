"""Rewards: verifiers, learnt judges of answers and steps, and how judges are trained."""
