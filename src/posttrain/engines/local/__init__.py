"""Policies and learners in this process, from stock transformers models."""
