"""Rules as data: conditions on bounds of readings, their meaning, and treatments.

rules.yaml ──read──▶ mapping ◀──merge── the user's --rules file
                        └──check──▶ RuleBook: rules in order, treatments by name
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from posttrain.core.bounds import Number
from posttrain.core.config import Config, convert
from posttrain.core.documents import read_yaml
from posttrain.core.errors import ConfigError, nearest
from posttrain.diagnosis.card import Bottleneck
from posttrain.measure.registry import find_metric

SHIPPED = Path(__file__).parent / "rules.yaml"

Need = Literal["demos", "teacher", "before", "scaffold", "answers", "others"]
"""What a treatment may need: demonstrations; a teacher; an earlier policy that was better; a
scaffold (a text around the question); task sets with reference answers; other measured task sets
with something to retain."""

Because = Literal["provenance", "interface", "objective", "prompts", "group size", "kl budget"]
"""The choices of a prescription that carry a reason."""


class Condition(Config):
    """A reading, or the difference of two, on one side of a threshold.

    ``at_least`` holds when the lower bound reaches the threshold and fails when the upper one does
    not; ``at_most`` the other way round. In between it is open. The bounds of a difference are
    conservative: low minus high, high minus low.
    """

    reading: str
    minus: str | None = None
    at_least: Number | None = None
    at_most: Number | None = None

    def __post_init__(self) -> None:
        for name in self.names:
            find_metric(name)
        if (self.at_least is None) == (self.at_most is None):
            raise ConfigError(
                f"condition on {self.reading} with at_least={self.at_least}, "
                f"at_most={self.at_most}",
                expected="exactly one of them",
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The readings it needs."""
        return (self.reading,) if self.minus is None else (self.reading, self.minus)

    @property
    def threshold(self) -> float:
        """The number on the right-hand side."""
        return float(self.at_least if self.at_least is not None else self.at_most or 0.0)


class Rule(Config):
    """Names a bottleneck when all conditions hold.

    Rules are tried by ``order``, lowest first, and the first one that holds names the bottleneck.
    A rule is skipped when one of ``unless`` holds, or when a reading of ``without`` was taken.
    ``treat`` names treatments, the preferred one first; ``obtain`` says what is needed when none
    of them is possible. ``disabled`` switches the rule off.
    """

    id: str
    order: Number
    bottleneck: Bottleneck
    when: tuple[Condition, ...]
    unless: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    words: str
    overturned_by: str
    citation: str
    treat: tuple[str, ...] = ()
    obtain: str
    disabled: bool = False

    def __post_init__(self) -> None:
        for name in self.without:
            find_metric(name)
        if not self.when or self.bottleneck is Bottleneck.UNDETERMINED:
            raise ConfigError(
                f"rule {self.id} with {len(self.when)} conditions for {self.bottleneck}",
                expected="at least one condition, and a bottleneck that can be named",
            )


class Treatment(Config):
    """One stage that a prescription may consist of.

    ``stage`` is a stage of a recipe without its name, in which ``$words`` are placeholders (see
    prescribe.py). ``because`` gives the reason for each choice. ``gate`` applies to the treated
    task; every other measured task gets a gate on its loss.
    """

    title: str
    needs: tuple[Need, ...] = ()
    intends: Literal["expansion", "reshaping", "consolidation"]
    stage: dict[str, object]
    because: dict[Because, str]
    gate: dict[str, object]
    citation: str


class RuleBook(Config):
    """All rules and treatments in use."""

    rules: tuple[Rule, ...]
    treatments: dict[str, Treatment]

    def __post_init__(self) -> None:
        ids = [r.id for r in self.rules]
        if doubled := sorted({i for i in ids if ids.count(i) > 1}):
            raise ConfigError(f"rules named twice: {doubled}", expected="one rule per id")
        for rule in self.rules:
            _known(rule.unless, ids, what=f"rule {rule.id}: unless")
            _known(rule.treat, list(self.treatments), what=f"rule {rule.id}: treat")

    @property
    def active(self) -> tuple[Rule, ...]:
        """The rules that are not switched off, in order."""
        return tuple(sorted((r for r in self.rules if not r.disabled), key=lambda r: r.order))

    def rule(self, name: str) -> Rule:
        """The rule of that id."""
        return next(r for r in self.rules if r.id == name)


def load_rules(own: Path | None = None) -> RuleBook:
    """The shipped rules, with the changes of a user's file.

    A rule of that file with the id of a shipped one overrides the fields that it sets; any other id
    is a new rule. ``disabled: true`` switches a rule off. Treatments merge in the same way by name.

    Raises:
        ConfigError: a field, reading, rule or treatment that does not exist; names the nearest.

    Example:
        >>> book = load_rules()
        >>> book.rule("not-chosen").bottleneck
        <Bottleneck.CHOICE: 'choice'>
    """
    shipped = read_yaml(SHIPPED)
    if own is None:
        return convert(shipped, RuleBook, origin=SHIPPED.name)
    changes = read_yaml(own)
    known = {"rules", "treatments"}
    _known(tuple(changes), sorted(known), what=str(own))
    rules = _merged_rules(_list(shipped, "rules"), _list(changes, "rules"), origin=str(own))
    treatments = dict(_mapping(shipped, "treatments"))
    for name, fields in _mapping(changes, "treatments").items():
        treatments[name] = {**_plain(treatments.get(name)), **_plain(fields)}
    return convert({"rules": rules, "treatments": treatments}, RuleBook, origin=str(own))


def _merged_rules(shipped: list[object], changes: list[object], *, origin: str) -> list[object]:
    by_id = {str(_plain(r).get("id")): _plain(r) for r in shipped}
    required = {f.encode_name for f in msgspec.structs.fields(Rule) if f.required}
    for position, entry in enumerate(changes):
        fields = _plain(entry)
        name = str(fields.get("id", ""))
        if not name:
            raise ConfigError(f"{origin}: rule {position + 1} has no id", fix="give it one")
        if name not in by_id and (missing := sorted(required - set(fields))):
            raise ConfigError(
                f"{origin}: rule {name!r} is not a shipped one and lacks {', '.join(missing)}",
                expected="every field of a new rule, or the id of a shipped rule to change",
                fix=nearest(name, by_id),
            )
        by_id[name] = {**by_id.get(name, {}), **fields}
    return list(by_id.values())


def _known(names: tuple[str, ...], known: list[str], *, what: str) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"{what} names {name!r}", fix=nearest(name, known))


def _list(content: Mapping[str, object], key: str) -> list[object]:
    found = content.get(key, [])
    if not isinstance(found, list):
        raise ConfigError(f"`{key}` holds {type(found).__name__}", expected="a list")
    return found


def _mapping(content: Mapping[str, object], key: str) -> Mapping[str, object]:
    return _plain(content.get(key, {}))


def _plain(value: object) -> dict[str, object]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{value!r} in a file of rules", expected="a mapping")
    return value
