"""Rewards: verifiers, reward models of answers and steps, and their training."""
