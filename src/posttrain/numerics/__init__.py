"""What losses are computed with: packed batches, the output head, divergences."""
