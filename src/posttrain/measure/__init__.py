"""Measuring a policy, with the uncertainty of the measurement."""
