"""Rewards of answers and steps: verifiers, reward models, and their training."""
