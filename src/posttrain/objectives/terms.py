"""Every term's code, by specification: ours, and that of installed packages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch

from posttrain import extensions
from posttrain.core.config import Config
from posttrain.core.errors import ConfigError, nearest
from posttrain.core.statistics import Stat
from posttrain.numerics.batch import PackedBatch
from posttrain.objectives import (
    distillation,
    external,
    offline,
    policy,
    preference,
    reward_models,
    supervised,
    value_terms,
)
from posttrain.objectives.values import Stats, TermCode, Values


@final
class Terms(dict[type[Config], TermCode]):
    """Our terms by specification. A term of an installed package is looked up when it is asked
    for, because an extension may import this module."""

    def __missing__(self, spec: type[Config]) -> TermCode:
        self[spec] = code = _extension(spec)
        return code


def _extension(spec: type[Config]) -> TermCode:
    """The code that a package brings for its term, in the form of our own.

    Raises:
        ConfigError: no installed package has the term, or it reads an unknown statistic.
    """
    found = extensions.term_extension(spec)
    name = spec.__struct_config__.tag
    if found is None:
        raise ConfigError(
            f"no code for term {name!r} ({spec.__name__})",
            expected="a term of posttrain, or of an installed package",
            fix="name it in the package's entry points under posttrain.terms, and install it",
        )
    if unknown := sorted(found.reads - set(Stat)):
        raise ConfigError(
            f"term {name!r} of package {extensions.package_of(spec)} reads {unknown[0]!r}",
            expected="statistics of posttrain.numerics.head.Stat",
            fix=nearest(unknown[0], Stat),
        )

    def values(term: Config, stats: Stats, batch: PackedBatch) -> Values:
        out = found.values(term, stats, batch)
        return out if isinstance(out, Values) else Values(torch.as_tensor(out))

    return TermCode(frozenset(Stat(r) for r in found.reads), values)


TERMS: Mapping[type[Config], TermCode] = Terms(
    {
        **supervised.TERMS,
        **offline.TERMS,
        **preference.TERMS,
        **policy.TERMS,
        **external.TERMS,
        **distillation.TERMS,
        **value_terms.TERMS,
        **reward_models.TERMS,
    }
)
