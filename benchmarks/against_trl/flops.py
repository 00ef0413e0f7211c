"""Floating-point operations that a step cannot do without, counted from its tokens.

Counted are matrix products alone, two operations per multiply-add: the layers' matrices once per
distinct token, attention once per (query, key) pair that the causal mask lets through, the output
head once per hidden state that something is predicted from. A prompt shared by a group counts once.
A backward pass is twice its forward pass. Norms, softmax, sampling and the optimiser are left out,
and so is every recomputation, so no program can be faster than this count over the matmul rate.

    tree: prompt P, branches a, b       computed: P + (a - 1) + (b - 1)   a last token is a target
                                        head:     1 + (a - 1) + (b - 1)   the prompt's end once
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from against_trl.plan import Dims, Load, Work

BACKWARD = 2


@dataclass(frozen=True, slots=True)
class Tree:
    """A prompt and the lengths of what follows it. A plain document is a branch without prompt."""

    prompt: int
    branches: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Distinct tokens that must be computed.

        Example:
            >>> Tree(5, (3, 4)).tokens
            10
        """
        return self.prompt + sum(b - 1 for b in self.branches)

    @property
    def predictions(self) -> int:
        """Hidden states that must go through the head.

        Example:
            >>> Tree(5, (3, 4)).predictions, Tree(0, (4,)).predictions
            (6, 3)
        """
        return (1 if self.prompt and self.branches else 0) + sum(b - 1 for b in self.branches)

    @property
    def attended(self) -> int:
        """(query, key) pairs: a token reads its prompt, its branch before it, and itself.

        Example:
            >>> Tree(2, (3,)).attended  # 1 + 2 in the prompt, then 3 and 4
            10
        """
        causal = [n * (n + 1) // 2 for n in (self.prompt, *(b - 1 for b in self.branches))]
        return sum(causal) + sum(self.prompt * (b - 1) for b in self.branches)


def forward(dims: Dims, trees: Sequence[Tree]) -> int:
    """Operations of one forward pass over the trees, head included."""
    per_pair = 4 * dims.layers * dims.heads * dims.head_size  # scores, and the weighted values
    return sum(
        2 * dims.body * tree.tokens
        + per_pair * tree.attended
        + 2 * dims.hidden * dims.vocab * tree.predictions
        for tree in trees
    )


def step(work: Work, dims: Dims, trees: Sequence[Tree]) -> int:
    """Operations of one optimiser step of a kind of work on a student of these dimensions.

    Generation computes what one forward pass over the finished texts computes, token by token.
    DPO adds a forward pass of the reference, distillation one of a teacher of the same size.
    """
    once = forward(dims, trees)
    train = (1 + BACKWARD) * once
    extra = {"sft": 0, "dpo": once, "grpo": once, "opd": 2 * once, "opd_distinct": 2 * once}
    return train + extra[work]


def trees_of(work: Work, folder: Path, load: Load) -> list[Tree]:
    """The trees of all material in a folder: every document, pair or prompt as long as it is."""
    if work == "sft":
        # The end token that both sides add to a document is its last.
        return [Tree(0, (_words(row["text"]) + 1,)) for row in _rows(folder / "documents.jsonl")]
    if work == "dpo":
        return [
            Tree(_words(row["prompt"]), tuple(_words(row[s]) + 1 for s in ("chosen", "rejected")))
            for row in _rows(folder / "pairs.jsonl")
        ]
    branches = (load.completion_tokens,) * load.group_size
    return [Tree(_words(row["prompt"]), branches) for row in _rows(folder / "prompts.jsonl")[:-1]]


def units(work: Work, trees: Sequence[Tree], load: Load) -> float:
    """What these trees are worth: tokens for SFT, pairs for DPO, steps for the others."""
    if work == "sft":
        return sum(sum(tree.branches) for tree in trees)
    return len(trees) / (1 if work == "dpo" else load.groups)


def _words(text: str) -> int:
    return len(text.split())


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def generated(load: Load) -> list[Tree]:
    """The trees of a step on rollouts, every prompt at its mean length."""
    tree = Tree(load.prompt_tokens, (load.completion_tokens,) * load.group_size)
    return [tree] * load.groups
