"""Demonstrations beside or inside the learner's own rollouts."""
