"""Every term of every named method keeps the contract of terms, and the contract can fail."""

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from posttrain.catalogue import known_methods
from posttrain.catalogue.example import legal_example
from posttrain.core.errors import LegalityError
from posttrain.core.statistics import Stat
from posttrain.core.trajectory import Column
from posttrain.parts.base import Limit, Term, Values
from posttrain.parts.policy.regularisers import AdaptiveEntropyBonus, ReferenceKL
from posttrain.parts.registry import known, tag_of
from posttrain.parts.supervised.likelihood import CrossEntropy
from posttrain.testing import check_term


def terms_in_use() -> dict[str, Term]:
    found: dict[str, Term] = {}
    for name, kind in known_methods(packages=False).items():
        for term in legal_example(name, kind)[1].compose().terms:
            if term not in found.values():
                found[f"{name}-{tag_of(term)}"] = term
    return found


TERMS_IN_USE = {**terms_in_use(), "option-reference_kl": ReferenceKL()}
for name, term in TERMS_IN_USE.items():
    if isinstance(term, AdaptiveEntropyBonus):  # its coefficient starts at 0, and so does its loss
        TERMS_IN_USE[name] = replace(term, initial=term.cap)
"""And what only an option of a named method brings in."""


def test_no_term_is_left_out():
    """Micro-batches, packing, authors and columns: the contract holds them for every term."""
    assert {type(term) for term in TERMS_IN_USE.values()} == set(known("term").values())


@pytest.mark.parametrize("name", TERMS_IN_USE)
def test_terms_of_named_methods_keep_the_contract(name):
    check_term(TERMS_IN_USE[name])


def probe(compute):
    """A term for this file alone, whose code each test gives."""

    class Probe(Term):
        """Not registered: no recipe can name it."""

        def values(self, stats, batch):
            return compute(stats, batch)

    return Probe()


def test_a_good_term_passes():
    check_term(probe(lambda s, b: Values(-s[Stat.LOGPROB])))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (lambda s, b: Values(-s[Stat.ENTROPY]), "statistics in `reads`"),
        (lambda s, b: Values(-b.columns[Column.ADVANTAGE]), "columns belong in `needs`"),
        (lambda s, b: Values(s[Stat.LOGPROB] / 0), "the loss is"),
        (lambda s, b: Values(-s[Stat.LOGPROB].detach()), "no gradient reaches"),
        (lambda s, b: Values(torch.rand_like(s[Stat.LOGPROB]) * s[Stat.LOGPROB]), "two losses"),
        (lambda s, b: Values(s[Stat.LOGPROB] * s[Stat.LOGPROB].mean()), "micro-batches"),
        (lambda s, b: Values(s[Stat.LOGPROB] / len(b.target_N)), "micro-batches"),
        (lambda s, b: Values((s[Stat.LOGPROB] - 1e9).exp().sqrt()), "gradient is not finite"),
    ],
)
def test_a_broken_term_is_found_out(values, words):
    with pytest.raises(AssertionError, match=words):
        check_term(probe(values))


def test_a_term_sees_no_other_authors(monkeypatch):
    """The objective takes their tokens out; the contract notices when it does not."""

    def nosy(stats, batch):
        foreign = (batch.kind_N != batch.kind_N[0]).any()
        return Values(stats[Stat.LOGPROB] * (2.0 if foreign else 1.0))

    check_term(probe(nosy))
    leaky = "posttrain.training.objective.as_read"
    monkeypatch.setattr(leaky, lambda term, batch, stats: (batch, stats))
    with pytest.raises(AssertionError, match="with where="):
        check_term(probe(nosy))


def test_a_promised_zero_gradient():
    still = probe(lambda s, b: Values(s[Stat.LOGPROB].detach()))
    check_term(still, gradient="zero")
    moving = probe(lambda s, b: Values(s[Stat.LOGPROB]))
    with pytest.raises(AssertionError, match="no gradient was promised"):
        check_term(moving, gradient="zero")


def constant(value):
    return lambda trajectory: np.full(len(trajectory), value, np.float32)


def test_columns_can_be_given():
    check_term(ReferenceKL(), columns={Column.REFERENCE_LOGPROB: constant(-1.0)})
    with pytest.raises(LegalityError, match="not finite"):
        check_term(ReferenceKL(), columns={Column.REFERENCE_LOGPROB: constant(np.nan)})


def test_limits_keep_the_contract():
    check_term(CrossEntropy(limit=Limit(entropy_share=0.4)))
