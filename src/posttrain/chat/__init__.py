"""Conversations: read from plain data, rendered to tokens with authors, and decoded to text.

    rows ──messages──▶ messages ──template──▶ text ──tokenizer──▶ tokens + spans
                          └────── places: compared ─┘

A rendered conversation is compared with its messages before anything relies on it.
"""

from posttrain.chat.messages import messages_from
from posttrain.chat.renderer import AssistantMask, ChatRenderer
from posttrain.chat.tokenizer import Tokenizer, token_texts

__all__ = ["AssistantMask", "ChatRenderer", "Tokenizer", "messages_from", "token_texts"]
