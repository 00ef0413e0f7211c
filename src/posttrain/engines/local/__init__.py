"""Policies and learners on this machine, from stock transformers models."""
