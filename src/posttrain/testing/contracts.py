"""The contracts of terms and methods, for :mod:`posttrain.testing`.

A term is evaluated on made-up answers of two authors, with random columns, through a random output
head: no model is needed, and nothing of the term but what every term promises is known here.

Shape legend: ``T`` tokens of a trajectory, ``N`` trained tokens, ``X`` hidden size, ``V``
vocabulary, ``K`` top-k entries.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from msgspec import structs

from posttrain.core.config import checked, convert, plain
from posttrain.core.errors import ConfigError
from posttrain.core.provenance import Kind, Producer, Role, Sampling, Span
from posttrain.core.trajectory import Array, Column, Group, Scored, Trajectory
from posttrain.parts.base import ANYONE, Term
from posttrain.parts.composition import Composition, Method
from posttrain.parts.legality import check_composition
from posttrain.parts.registry import tag_of
from posttrain.recipe import Stage

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.core.statistics import Wanted

HIDDEN, VOCABULARY, TOP_K = 8, 12, 3
Fill = Callable[[Trajectory], Array]
DASHES = frozenset({"-", "–"})


def check_term(
    term: Term,
    *,
    gradient: Literal["flows", "zero"] = "flows",
    columns: Mapping[Column, Fill] | None = None,
    seed: int = 0,
) -> None:
    """A term computes with what it declares, on the tokens it may read, however a step is split.

    * the columns it ``needs`` and the statistics it reads suffice;
    * its loss is finite, and the same when it is asked again;
    * its gradient is finite, and flows to the policy, or is exactly zero where that is promised;
    * splitting a step into micro-batches changes neither;
    * tokens of authors outside ``where`` change nothing and get no gradient;
    * its YAML is the same term again.

    Args:
        term: an instance, of our own or of an installed package.
        gradient: what the term promises.
        columns: makes the values of a column for a trajectory, instead of random ones.
        seed: of the answers and of the columns.

    Raises:
        AssertionError: the broken promise in words.
    """
    again = convert(plain(term), type(term), origin="the term's own YAML")
    assert again == term, f"read back from YAML the term is {again}"
    mine = _preferred(term.readable)
    other = _preferred(ANYONE - {mine})
    own = _material(term, mine, columns or {}, seed=seed)
    foreign = _material(term, other, columns or {}, seed=seed + 1)

    whole = _evaluate(term, own, max_tokens=10_000)
    assert np.isfinite(whole.loss), f"the loss is {whole.loss}"
    assert np.isfinite(whole.gradient).all(), "the gradient is not finite"
    repeated = _evaluate(term, own, max_tokens=10_000)
    assert repeated.loss == whole.loss, "asked twice, the term gives two losses"
    largest = float(np.abs(whole.gradient).max())
    if gradient == "zero":
        assert largest == 0, f"no gradient was promised, and it reaches {largest:.3g}"
    else:
        assert largest > 0, "no gradient reaches the policy"

    split = _evaluate(term, own, max_tokens=1)
    assert split.num_batches > 1
    _same(split, whole, largest, "splitting a step into micro-batches")

    limited = structs.replace(term, where=(mine,))
    alone = _evaluate(limited, own, max_tokens=10_000)
    mixed = _evaluate(limited, [*own, *foreign], max_tokens=10_000)
    ignored = mixed.gradient[len(alone.gradient) :]
    assert len(ignored)
    assert not ignored.any(), f"with where=({mine},) tokens by {other} get a gradient"
    kept = _Evaluated(mixed.loss, mixed.gradient[: len(alone.gradient)], 1)
    _same(kept, alone, largest, f"with where=({mine},), tokens by {other}")


def check_method(method: Method) -> None:
    """A method is a legal composition, the same every time, and says of itself what is true.

    * recipes can name it, and its YAML is the same method again;
    * ``compose()`` gives the same, well-typed composition each time, and it is legal;
    * ``provenance`` agrees with who writes: on-policy is the live learner;
    * every statement of the map is there.

    Args:
        method: an instance, of our own or of an installed package.

    Raises:
        AssertionError: the broken promise in words.
        LegalityError: the composition cannot work.
    """
    name = tag_of(method)
    written = {"name": "check", "method": plain(method), "budget": {"steps": 1}}
    try:
        again = convert(written, Stage, origin=name).method
    except ConfigError as error:
        raise AssertionError(f"a recipe cannot name {name}: {error}") from error
    assert again == method, f"read back from YAML the method is {again}"
    composition = method.compose()
    assert isinstance(composition, Composition), f"compose() gave {type(composition).__name__}"
    assert method.compose() == composition, "compose() gives two different compositions"
    assert checked(composition) == composition, "compose() gave an ill-typed composition"
    check_composition(composition, stage=name)
    live = Kind.LEARNER in composition.source.writes
    provenance = method.provenance
    assert not provenance.startswith("on-policy") or composition.source.writes == {Kind.LEARNER}, (
        f"{name} says on-policy, and others than the learner write"
    )
    assert not (provenance.startswith("off-policy") and live), (
        f"{name} says off-policy; the learner writes"
    )
    about = {
        "provenance": provenance,
        "interface": method.interface,
        "tendency": method.tendency,
        "formula": method.formula,
        "paper": method.paper,
        "a docstring": type(method).__doc__ or "",
    }
    missing = [k for k, v in about.items() if not v.strip()]
    assert not missing, f"{name} says nothing under {', '.join(missing)}"
    numbered = method.paper.replace(".", "").isdigit() or method.paper in DASHES
    assert numbered or "," in method.paper or " " in method.paper, (
        f"{name}: paper {method.paper!r} is no arXiv number and no words"
    )


# --- evaluating a term -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Evaluated:
    loss: float
    gradient: Array  # [N, X] with respect to the hidden states
    num_batches: int


def _evaluate(term: Term, groups: Sequence[Group], *, max_tokens: int) -> _Evaluated:
    """Loss and gradient of a step that consists of these groups."""
    import torch

    from posttrain.numerics.batch import pack
    from posttrain.training.objective import StageObjective

    objective = StageObjective((term,))
    batches = pack(groups, needs=objective.needs, max_tokens=max_tokens)
    hidden_NX = torch.cat([_hidden(m.trajectory) for g in groups for m in g.members])
    hidden_NX.requires_grad_()
    weights_XV = torch.randn(HIDDEN, VOCABULARY, generator=torch.Generator().manual_seed(0))

    def head(hidden: Tensor) -> Tensor:
        return hidden @ weights_XV

    counts = objective.counts(batches)
    total = 0.0
    parts = torch.split(hidden_NX, [len(b.target_N) for b in batches])
    for batch, part in zip(batches, parts, strict=True):
        # Any function of the hidden states will do: before and after a token it is another one.
        asked = enumerate(sorted(objective.scalars))
        scalars: dict[Wanted, Tensor] = {s: part @ weights_XV[:, i] for i, s in asked}
        try:
            loss, _ = objective.loss(
                part, head, batch, counts=counts, vocab_size=VOCABULARY, scalars=scalars
            )
        except KeyError as error:
            raise AssertionError(
                f"the term reads {error}, which it does not declare: columns belong in `needs`, "
                "statistics in `reads`"
            ) from error
        if loss.requires_grad:
            loss.backward()
        total += float(loss.detach())
    gradient = torch.zeros_like(hidden_NX) if hidden_NX.grad is None else hidden_NX.grad
    return _Evaluated(total, gradient.numpy(), len(batches))


def _hidden(trajectory: Trajectory) -> Tensor:
    """[N, X] the same for a trajectory wherever it stands."""
    import torch

    seed = torch.Generator().manual_seed(zlib.crc32(trajectory.id.encode()))
    return torch.randn(int(trajectory.trainable.sum()), HIDDEN, generator=seed)


def _same(got: _Evaluated, expected: _Evaluated, largest: float, words: str) -> None:
    scale = max(abs(expected.loss), 1e-3)
    gap = abs(got.loss - expected.loss) / scale
    assert gap < 1e-4, f"{words} changed the loss from {expected.loss} to {got.loss}"
    moved = float(np.abs(got.gradient - expected.gradient).max(initial=0.0))
    assert moved <= 1e-4 * max(largest, 1e-9), f"{words} changed the gradient by {moved:.3g}"


# --- material --------------------------------------------------------------------------------


def _preferred(kinds: frozenset[Kind]) -> Kind:
    return Kind.LEARNER if Kind.LEARNER in kinds else min(kinds)


def _material(term: Term, kind: Kind, columns: Mapping[Column, Fill], *, seed: int) -> list[Group]:
    """Groups by one author with every column that the term declares."""
    rng = np.random.default_rng(seed)
    needs = term.needs | term.limit.needs
    signs = iter(range(10_000))
    size = 2 if term.unit == "pair" else 1 if Column.PREFERENCE in needs else 3
    groups = []
    for index in range(4):
        prompt = rng.integers(0, VOCABULARY, 2 + index)
        members = []
        for _ in range(size):
            answer = rng.integers(0, VOCABULARY, rng.integers(2, 5))
            trajectory = _trajectory(prompt, answer, kind)
            sign = next(signs)
            made = {
                c: columns[c](trajectory) if c in columns else _values(c, trajectory, rng, sign)
                for c in sorted(needs)
            }
            members.append(Scored(trajectory=trajectory).with_columns(made))
        groups.append(Group(task=f"contract/{index}", members=tuple(members)))
    return groups


def _values(column: Column, trajectory: Trajectory, rng: np.random.Generator, nth: int) -> Array:
    """Plausible values of a column: log-probs below zero, alternating labels and rewards.

    The advantage is the same at every token, which losses per sequence require.
    """
    num = len(trajectory)
    if column is Column.TEACHER_IDS:
        rows = [rng.permutation(VOCABULARY)[:TOP_K] for _ in range(num)]
        return np.array(rows, np.int32)
    if column in (Column.TEACHER_LOGPROBS, Column.TEACHER_SORTED):
        shares = np.sort(rng.dirichlet(np.ones(TOP_K + 1), num)[:, :TOP_K])[:, ::-1]
        return np.log(shares).astype(np.float32)
    if column in (Column.PREFERENCE, Column.LABEL):
        return np.array(1.0 if nth % 2 == 0 else -1.0)
    if column in (Column.REWARD, Column.DISCARD):
        return np.array(float(nth % 2 if column is Column.REWARD else 0))
    if column is Column.STEP_LABEL:
        return (np.arange(num) % 3 - 1).astype(np.float32)
    if column is Column.WEIGHT:
        return np.array(rng.uniform(0.5, 2.0))
    if column is Column.ADVANTAGE:
        return np.full(num, 1.0 if nth % 2 == 0 else -0.7, np.float32)
    if column in (Column.MARK, Column.TEACHER_ALIGNED):
        return (np.arange(num) % 2).astype(np.float32)
    shape = (num,) if column.per_token else ()
    middle, spread = (-2.0, 0.3) if column.endswith("logprob") else (0.0, 1.0)
    return np.asarray(rng.normal(middle, spread, shape), np.float32)


def _trajectory(prompt: Array, answer: Array, kind: Kind) -> Trajectory:
    live = kind is Kind.LEARNER
    return Trajectory(
        task="contract/0",
        tokens=np.concatenate([prompt, answer]).astype(np.int32),
        prompt_length=len(prompt),
        spans=tuple(_spans(len(prompt), len(answer), kind, live)),
    )


def _spans(prompt: int, answer: int, kind: Kind, live: bool) -> Iterator[Span]:
    asker = Producer(kind=Kind.ENVIRONMENT, name="contract")
    yield Span(length=prompt, role=Role.USER, producer=asker)
    yield Span(
        length=answer,
        role=Role.ASSISTANT,
        producer=Producer(kind=kind, name="contract"),
        versions=(0, 0) if live else None,
        sampling=Sampling() if live else None,
    )
