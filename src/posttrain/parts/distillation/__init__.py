"""Distillation: divergences from teachers, and teacher log-probs as advantages."""
