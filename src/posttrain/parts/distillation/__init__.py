"""Distillation: divergences from teachers, teacher log-probs as advantages, and methods."""
