"""From a diagnosis to a runnable recipe, with the reason for every choice.

TaskDiagnosis ──focus──▶ tasks with one bottleneck ──treatment──▶ $words filled in ──▶ Recipe
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import msgspec

from posttrain.core import config
from posttrain.core.documents import write_yaml
from posttrain.core.errors import ConfigError, nearest
from posttrain.diagnosis.card import Bottleneck, Choice, Prescription, TaskDiagnosis
from posttrain.diagnosis.rules import Need, Rule, RuleBook, Treatment
from posttrain.parts.composition import Method
from posttrain.parts.registry import tag_of
from posttrain.recipe import Recipe, Stage

ROLLOUTS = 512
"""Answers per step of an on-policy stage."""

MOST_LOST = 0.1
"""Largest loss of pass@1 on another task that its gate allows."""

SMALLEST_GROUP, LARGEST_GROUP = 8, 64

REFERENCE_WEIGHTS, IMITATE_LR, GUIDED_LR, POLICY_LR = 640_000, 1e-3, 3e-4, 2e-4
"""Learning rates that were tested on a model of 640,000 weights. For another size they are divided
by the square root of the ratio of sizes, which gives 3e-5 and 6e-6 at 0.6 B and 1e-5 and 2e-6 at
7 B: a rule of thumb of ours, in the range that papers report."""

PHASES: Mapping[Bottleneck, int] = MappingProxyType(
    {
        Bottleneck.MEASUREMENT: 0,
        Bottleneck.SUPPORT: 1,
        Bottleneck.ENTRY: 1,
        Bottleneck.SIGNAL: 2,
        Bottleneck.DIVERSITY: 2,
        Bottleneck.LEARNER_STATE: 2,
        Bottleneck.CHOICE: 2,
        Bottleneck.AMORTISATION: 3,
        Bottleneck.RETENTION: 3,
        Bottleneck.SATURATION: 4,
        Bottleneck.UNDETERMINED: 5,
    }
)
"""Order of bottlenecks on different tasks: support, then reshaping, then consolidation
(arXiv 2604.07941, section 6.2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Supplies:
    """Available resources by task set; ``*`` stands for every task set.

    Paths are absolute. ``teachers`` and ``before`` are folders or hub ids. ``best`` names, by task
    set, the policy of the same run with the best pass@1; it is a reference of a recipe.
    """

    demos: Mapping[str, str] = field(default_factory=dict)
    teachers: Mapping[str, str] = field(default_factory=dict)
    before: str | None = None
    best: Mapping[str, str] = field(default_factory=dict)
    scaffold: str | None = None
    later: tuple[str, ...] = ()  # task sets that only have to stay trainable

    def demos_for(self, task: str) -> str | None:
        """The file of demonstrations of a task set."""
        return self.demos.get(task, self.demos.get("*"))

    def teacher_for(self, task: str) -> str | None:
        """The teacher of a task set."""
        return self.teachers.get(task, self.teachers.get("*"))


NOTHING = Supplies()
"""No resources besides the model and its task sets."""


def prescribe(
    tasks: Sequence[TaskDiagnosis],
    *,
    book: RuleBook,
    ground: Recipe,
    supplies: Supplies,
    num_weights: int | None = None,
    name: str = "next",
    dose: float = 1.0,
    tried: frozenset[tuple[str, str]] = frozenset(),
) -> tuple[Prescription, ...]:
    """A stage for every kind of bottleneck found, in the order to run them.

    Only the first should be run before diagnosing again. Tasks with nothing to treat are left out.

    Args:
        tasks: the diagnoses.
        book: rules and treatments.
        ground: model, task sets and measuring; its stages are ignored. Paths must be absolute.
        supplies: available resources.
        num_weights: size of the model, for the learning rate; None takes that of a 7 B model.
        name: of the recipe.
        dose: scales the number of steps.
        tried: pairs (task, treatment) to skip.

    Raises:
        ConfigError: a treatment that is not a valid stage.
    """
    tools = _Tools(tasks, book, ground, supplies, num_weights, name, dose, tried)
    waiting = [t for t in _in_order(tasks) if t.task not in supplies.later]
    made: list[Prescription] = []
    while waiting:
        chosen = waiting[0]
        rule = _rule(chosen, book)
        together = [t for t in waiting if t is chosen or _alike(t, chosen, tools)]
        waiting = [t for t in waiting if t not in together]
        if rule is not None and rule.bottleneck is not Bottleneck.SATURATION:
            made += _treat(together, rule, tools)
    return tuple(made)


@dataclass(frozen=True, slots=True)
class _Tools:
    tasks: Sequence[TaskDiagnosis]
    book: RuleBook
    ground: Recipe
    supplies: Supplies
    num_weights: int | None
    name: str
    dose: float
    tried: frozenset[tuple[str, str]]


def _in_order(tasks: Sequence[TaskDiagnosis]) -> list[TaskDiagnosis]:
    """By phase, and within a phase by pass@1, lowest first."""

    def failing(task: TaskDiagnosis) -> float:
        first = task.evidence.get("pass@1")
        return 1.0 if first is None else 1 - first.value

    return sorted(tasks, key=lambda t: (PHASES[t.acted_on], -failing(t)))


def _rule(task: TaskDiagnosis, book: RuleBook) -> Rule | None:
    """The rule to treat: the first finding of that bottleneck, or the likely open one."""
    named = [f.rule for f in task.findings if f.bottleneck is task.acted_on]
    named += [o.rule for o in task.open if o.likely and o.bottleneck is task.acted_on]
    return book.rule(named[0]) if named else None


def _alike(task: TaskDiagnosis, chosen: TaskDiagnosis, tools: _Tools) -> bool:
    """True when one stage can treat both: the same rule, demonstrations and teacher."""
    supplies = tools.supplies
    return (
        _rule(task, tools.book) is _rule(chosen, tools.book)
        and supplies.demos_for(task.task) == supplies.demos_for(chosen.task)
        and supplies.teacher_for(task.task) == supplies.teacher_for(chosen.task)
    )


def _treat(together: Sequence[TaskDiagnosis], rule: Rule, tools: _Tools) -> list[Prescription]:
    """The first treatment of the rule whose needs are met and that was not tried."""
    names = [t.task for t in together]
    others = [t.task for t in tools.tasks if t.task not in names and _can_do_some(t)]
    has = _met(together[0], tools.supplies, others)
    tried = False
    for name in rule.treat:
        treatment = tools.book.treatments[name]
        if all(need in has for need in treatment.needs):
            if any((task, name) in tools.tried for task in names):
                tried = True
                continue
            return [_written(name, treatment, together, others=others, tools=tools)]
    obtain = rule.obtain if not tried else f"what was tried did not help: {rule.obtain}"
    return [
        Prescription(
            tasks=tuple(names),
            bottleneck=rule.bottleneck,
            treatment=None,
            title="nothing here can help yet",
            obtain=obtain,
            provisional=together[0].leaning is not None,
        )
    ]


def _can_do_some(task: TaskDiagnosis) -> bool:
    """True when the lower bound of pass@1 is at least 0.1, so there is something to retain."""
    first = task.evidence.get("pass@1")
    return first is not None and first.low >= 0.1


def _met(chosen: TaskDiagnosis, supplies: Supplies, others: Sequence[str]) -> frozenset[Need]:
    task = chosen.task
    there: dict[Need, bool] = {
        "demos": supplies.demos_for(task) is not None,
        "teacher": supplies.teacher_for(task) is not None,
        "before": supplies.before is not None or task in supplies.best,
        "scaffold": supplies.scaffold is not None,
        # A continuation reading exists, so the task set has reference answers.
        "answers": chosen.evidence.get("continue@0.5") is not None,
        "others": bool(others),
    }
    return frozenset(need for need, met in there.items() if met)


# --- filling in a treatment ------------------------------------------------------------------


def _written(
    name: str,
    treatment: Treatment,
    together: Sequence[TaskDiagnosis],
    *,
    others: Sequence[str],
    tools: _Tools,
) -> Prescription:
    """The prescription: the treatment with every $word filled in."""
    tasks = [t.task for t in together]
    group = group_size(together)
    stage = fill(treatment.stage, words_for(together, others=others, group=group, tools=tools))
    body = dict(stage)
    body["name"], body["intends"] = name, treatment.intends
    body["budget"] = _dosed(body.get("budget"), tools.dose)
    gates = [{"task": task, **treatment.gate} for task in tasks]
    keep = [t for t in others if t not in tasks] + [
        t for t in tools.supplies.later if t not in tasks and t not in others
    ]
    body["gates"] = gates + [
        {
            "task": task,
            "metric": "pass@32" if task in tools.supplies.later else "pass@1",
            "at_most_lost": MOST_LOST,
            "since": "input",
            "otherwise": "warn",
        }
        for task in keep
    ]
    checked = config.convert(body, Stage, origin=f"treatment {name}")
    ground = tools.ground
    measure = msgspec.structs.replace(ground.measure, samples=max(ground.measure.samples, 64))
    recipe = msgspec.structs.replace(ground, name=tools.name, measure=measure, stages=(checked,))
    first = together[0]
    made = Prescription(
        tasks=tuple(tasks),
        bottleneck=first.acted_on,
        treatment=name,
        title=treatment.title,
        choices=_choices(treatment, checked, together, group=group),
        gate="; ".join(f"{g.metric} on {g.task}: {g.words}" for g in checked.gates),
        provisional=first.leaning is not None,
    )
    return replace(made, recipe=_as_yaml(recipe, made))


def _as_yaml(recipe: Recipe, made: Prescription) -> str:
    """The recipe as a readable file: the reasons, then every option that is not the default."""
    shown = "likely, not shown" if made.provisional else "shown"
    held = made.bottleneck.replace("_", " ")
    lines = [f"{', '.join(made.tasks)}: held back by {held} ({shown})", f"next: {made.title}", ""]
    lines += [f"{c.what}: {c.why}" for c in made.choices]
    lines += ["", f"it worked if: {made.gate}"]
    notes = [
        row
        for text in lines
        for row in (textwrap.wrap(text, 94, subsequent_indent="  ") if text else [""])
    ]
    body = write_yaml(config.brief(recipe))
    return "".join(f"# {row}".rstrip() + "\n" for row in notes) + f"\n{body}"


def fill(template: Mapping[str, object], words: Mapping[str, object]) -> dict[str, object]:
    """The template with every text ``$word`` replaced by its value; lists are joined into lists.

    Raises:
        ConfigError: a word that does not exist, or has no value here.

    Example:
        >>> fill({"tasks": ["$task", "$others"], "lr": "$lr"},
        ...      {"task": "sums", "others": ["chains", "words"], "lr": 0.1})
        {'tasks': ['sums', 'chains', 'words'], 'lr': 0.1}
    """

    def value(entry: object) -> object:
        if isinstance(entry, str) and entry.startswith("$"):
            word = entry[1:]
            if words.get(word) is None:
                raise ConfigError(f"no value for ${word} in a treatment", fix=nearest(word, words))
            return words[word]
        if isinstance(entry, dict):
            return {k: value(v) for k, v in entry.items()}
        if isinstance(entry, list):
            flat: list[object] = []
            for item in entry:
                found = value(item)
                joined = isinstance(found, list) and isinstance(item, str)
                flat += found if joined and isinstance(found, list) else [found]
            return flat
        return entry

    return {key: value(entry) for key, entry in template.items()}


def words_for(
    together: Sequence[TaskDiagnosis], *, others: Sequence[str], group: int, tools: _Tools
) -> dict[str, object]:
    """Every ``$word`` that a treatment may use, with its value."""
    task, supplies = together[0].task, tools.supplies
    tasks = [t.task for t in together]
    demos, teacher = supplies.demos_for(task), supplies.teacher_for(task)
    lost = [t.task for t in tools.tasks if t.acted_on is Bottleneck.RETENTION]
    outside = f"path:{supplies.before}" if supplies.before else None
    known = {t: supplies.best.get(t, outside) for t in [*tasks, *lost]}
    recalled = {t: ref for t, ref in known.items() if ref is not None}
    return {
        "task": task,
        "tasks": tasks,
        "others": list(others),
        "demos": {"type": "dataset", "path": demos} if demos else None,
        "teacher": f"path:{teacher}" if teacher else None,
        "before": known[task],
        "routes": {**recalled, "*": "input"} if recalled else None,
        "scaffold": supplies.scaffold,
        "success": max(tools.ground.tasks[t].success for t in tasks),
        "group": group,
        "groups": max(ROLLOUTS // group, 4),
        "answer_tokens": tools.ground.measure.max_new_tokens,
        "lr": learning_rate(IMITATE_LR, tools.num_weights),
        "lr_guided": learning_rate(GUIDED_LR, tools.num_weights),
        "lr_policy": learning_rate(POLICY_LR, tools.num_weights),
    }


def learning_rate(reference: float, num_weights: int | None) -> float:
    """The rate tested on the reference size, scaled to another size; two digits.

    Example:
        >>> learning_rate(1e-3, 640_000), learning_rate(1e-3, 600_000_000)
        (0.001, 3.3e-05)
    """
    size = 7_000_000_000 if num_weights is None else num_weights
    return float(f"{reference * math.sqrt(REFERENCE_WEIGHTS / size):.1e}")


def group_size(together: Sequence[TaskDiagnosis]) -> int:
    """The power of two from 8 to 64 that makes most groups informative on these tasks."""
    needed = [r.value for t in together if (r := t.evidence.get("needed_group")) is not None]
    most = max(needed, default=float(SMALLEST_GROUP))
    if not most < LARGEST_GROUP:
        return LARGEST_GROUP
    return max(SMALLEST_GROUP, int(2 ** math.ceil(math.log2(max(most, 1.0)))))


def _dosed(budget: object, dose: float) -> dict[str, object]:
    if not isinstance(budget, dict) or not isinstance(budget.get("steps"), int):
        raise ConfigError(f"a treatment with budget {budget!r}", expected="a budget in steps")
    return {"steps": max(1, round(budget["steps"] * dose))}


# --- reasons ---------------------------------------------------------------------------------


def _choices(
    treatment: Treatment, stage: Stage, together: Sequence[TaskDiagnosis], *, group: int
) -> tuple[Choice, ...]:
    method = stage.method
    composed = method.spelt_out
    terms = " + ".join(tag_of(t) for t in method.compose().terms)
    by_comparison = "group size" in treatment.because
    settings = {
        "provenance": _authors(method) if composed else str(method.provenance),
        "interface": "tokens" if composed else str(method.interface),
        "objective": terms if composed else str(method.formula),
        "prompts": "; ".join(_informative(t) if by_comparison else t.task for t in together),
        "group size": str(group),
        "kl budget": "see the gates",
    }
    return tuple(
        Choice(what=what, setting=settings[what], why=why)
        for what, why in treatment.because.items()
    )


def _authors(method: Method) -> str:
    """The producers of the tokens that a composed method trains on."""
    leaves = method.compose().source.leaves
    rows = ("rows of the demonstrations" if leaf.files else "its own answers" for leaf in leaves)
    return " and ".join(dict.fromkeys(rows))


def _informative(task: TaskDiagnosis) -> str:
    """Share of groups that hold a success and a failure, by group size.

    Example: ``products: groups that differ: of 4 in 27%, of 8 in 46%, of 16 in 68%``
    """
    seen = [
        f"of {r.name.partition('@')[2]} in {r.value:.0%}"
        for r in task.evidence.readings
        if r.name.startswith("informative@")
    ]
    return f"{task.task}: groups that differ: {', '.join(seen)}" if seen else task.task
