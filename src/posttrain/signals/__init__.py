"""Signals: opinions about trajectories, written as columns beside them."""
