"""A reward function of your own: ordinary Python, called with whole columns."""


def product(
    prompts: list[object], completions: list[str], *, answer: list[str], **columns: list[object]
) -> list[float]:
    """1 for the right product, 0.1 for some other number, 0 for anything else.

    ``answer`` is a column of the JSONL file; further columns (``level``) arrive in ``columns``.
    The small reward for being a number at all gives a group something to prefer while nobody is
    right. It is below ``success``, so measuring does not count it as solved.
    """
    scores = []
    for completion, right in zip(completions, answer, strict=True):
        text = completion.strip()
        scores.append(1.0 if text == right else 0.1 if text.isdigit() else 0.0)
    return scores
