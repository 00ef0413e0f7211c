"""Numerics of the losses: packed batches, the output head, divergences."""
