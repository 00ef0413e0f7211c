"""A recipe as a run: planned, executed, resumed and recorded."""
