"""Preferences: fixed pairs, labelled answers, and fresh pairs of rollouts."""
