"""Known faults of the field, planted: which are refused, which raise an alarm, which stay silent?

faults, inputs, environment, mutants ── the list, as data, kept before anything that detects
"""
