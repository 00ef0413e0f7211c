"""Conversations: read from plain data, rendered to tokens with authors, and decoded to text.

    rows ──messages──▶ messages ──template──▶ text ──tokenizer──▶ tokens + spans
                          └────── places: compared ─┘

A rendered conversation is compared with its messages before anything relies on it.
"""
