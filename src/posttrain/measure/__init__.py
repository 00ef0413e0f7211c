"""Measuring a policy, and saying how sure the measurement is."""
