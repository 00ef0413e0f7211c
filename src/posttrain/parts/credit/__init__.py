"""Credit: which answer and which token gets how much of a reward."""
