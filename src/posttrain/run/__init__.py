"""Runs of a recipe: plan, execute, resume, record."""
