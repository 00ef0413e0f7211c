"""Engines: how a policy is computed, sampled and trained. One file per engine."""
