"""Probes: measure a policy, and say how sure the measurement is."""
