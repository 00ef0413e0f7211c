"""Distillation: divergences from teachers, and their log-probs as credit."""
