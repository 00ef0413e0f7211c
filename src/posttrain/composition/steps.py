"""What a step of an answer is."""

from __future__ import annotations

from posttrain.core.config import Config
from posttrain.core.errors import ConfigError


class Steps(Config):
    """Steps end with a delimiter, and the last one with the answer.

    ``delimiter`` is found in the decoded text, however the tokenizer cuts it; with ``special`` it
    is one special token, which decoding would drop. Blank text between two delimiters is no step.
    """

    delimiter: str = "\n"
    special: bool = False

    def __post_init__(self) -> None:
        if not self.delimiter:
            raise ConfigError("steps with an empty delimiter", expected="at least one character")
