"""Policies built to have exactly one bottleneck, diagnosed from finitely many samples.

    python benchmarks/diagnosis_cases.py --seeds 0 1 2 --write

Each case is a policy whose probability of every next character is written down, 32 prompts and,
where it matters, an earlier policy or a scaffold. The real probes sample it and the shipped rules
judge what they saw. The share that is named rightly leaves out what stays undetermined, which is
counted apart.

    a right answer:  a ─s₀─▶ ab ─s₁─▶ abc ─s₂─▶ abcd ─s₃─▶ end      success: s₀ s₁ s₂ s₃
                     └─1−s₀─▶ one of the wrong answers
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from lab_log import write

from posttrain.core.task import Task, TaskSet
from posttrain.diagnosis.card import Bottleneck, TaskDiagnosis
from posttrain.diagnosis.conditions import diagnose_task
from posttrain.diagnosis.drawing import Demonstration
from posttrain.diagnosis.examine import Examination
from posttrain.diagnosis.prescribe import Supplies
from posttrain.diagnosis.rules import load_rules
from posttrain.measure.spec import Measure
from posttrain.protocols import Policy
from posttrain.testing import TablePolicy

LETTERS = "abcdefgh"
LENGTH = 4
PROMPTS = 32
SAMPLES = 64
BUDGET = 8000
HELP = "HELP {question}"

Steps = tuple[float, ...]  # probability of going on rightly at each of LENGTH places
Rng = np.random.Generator


@dataclass(frozen=True)
class Case:
    """One policy with its truth. ``steps`` has an entry per prompt."""

    name: str
    truth: Bottleneck
    steps: Sequence[Steps]
    wrong: int = 1  # how many different wrong answers a prompt has
    helped: Sequence[Steps] | None = None  # with the scaffold
    before: Sequence[Steps] | None = None  # of an earlier policy
    teacher: Sequence[Steps] | None = None
    longest: int = LENGTH + 1
    noise: float = 0.0  # how often the scorer gets it wrong, at random
    seed: int = 0


# --- the world of a case ---------------------------------------------------------------------


def answer(prompt: int) -> str:
    """The right answer, a different one for every prompt.

    Example:
        >>> answer(0), answer(1), answer(9)
        ('abcd', 'bcde', 'bced')
    """
    first = [LETTERS[(prompt + i) % len(LETTERS)] for i in range(LENGTH)]
    if (prompt // len(LETTERS)) % 2:
        first[2], first[3] = first[3], first[2]
    if prompt // len(LETTERS) >= 2:
        first[1], first[3] = first[3], first[1]
    return "".join(first)


def table(
    steps: Sequence[Steps],
    *,
    wrong: int,
    helped: Sequence[Steps] | None = None,
    lost: float = 0.0,
) -> TablePolicy:
    """A policy that goes on rightly with the given probabilities, else gives a wrong answer.

    Off the right way it ends, but for a share ``lost`` of the time, when it goes on at random.
    """

    def row(text: str) -> list[float]:
        told = text.startswith("HELP ")
        question, _, so_far = text.removeprefix("HELP ").partition("=")
        number = int(question)
        right = answer(number)
        chances = (helped or steps)[number] if told else steps[number]
        out = [0.0] * (len(LETTERS) + 1)
        place = len(so_far)
        if so_far == right:
            out[-1] = 1.0
        elif right.startswith(so_far):
            out[LETTERS.index(right[place])] = chances[place]
            # Every wrong turn is a single letter, told apart by which.
            others = [c for c in LETTERS if c != right[place]][:wrong]
            for letter in others:
                out[LETTERS.index(letter)] += (1 - chances[place]) / len(others)
        else:
            out = [lost / len(LETTERS)] * len(LETTERS) + [1 - lost]
        if lost:  # a teacher and its pupil never rule anything out altogether
            out = [0.999 * p + 0.001 / len(out) for p in out]
        return out

    return TablePolicy(LETTERS, row)


@dataclass
class CaseTasks:
    """Prompts 0= to 31=, judged by equality; with ``noise`` the verdict is flipped at random."""

    noise: float
    rng: Rng
    name: str = "case"
    success: float = 1.0
    train: Sequence[Task] = ()
    held_out: Sequence[Task] = field(
        default_factory=lambda: [
            Task(taskset="case", prompt=f"{i}=", answer=answer(i)) for i in range(PROMPTS)
        ]
    )

    def score(self, tasks: Sequence[Task], completions: Sequence[str]) -> list[float]:
        """1 for the right answer."""
        right = np.array([t.answer == c for t, c in zip(tasks, completions, strict=True)])
        flipped = self.rng.random(len(right)) < self.noise
        return [float(r) for r in right ^ flipped]


def written(policy: Policy, taskset: TaskSet) -> list[Demonstration]:
    """The right answers in characters."""
    return [
        Demonstration(task=t, tokens=np.array([*map(ord, str(t.answer)), 0], np.int32))
        for t in taskset.held_out
    ]


def diagnosed(case: Case) -> TaskDiagnosis:
    """Sample a case through the real probes, and judge it by the shipped rules."""
    spec = Measure(samples=SAMPLES, max_new_tokens=case.longest, seed=case.seed)
    look = Examination(
        policy=table(
            case.steps, wrong=case.wrong, helped=case.helped, lost=0.9 if case.teacher else 0.0
        ),
        before=table(case.before, wrong=case.wrong) if case.before else None,
        teachers={"case": table(case.teacher, wrong=3, lost=0.1)} if case.teacher else {},
        tasksets=[CaseTasks(case.noise, np.random.default_rng(case.seed))],
        spec=spec,
        protocol="case",
        supplies=Supplies(scaffold=HELP if case.helped else None),
        budget=BUDGET,
        references=written,
    )
    (evidence,) = look.evidence()
    return diagnose_task(evidence, load_rules())


# --- the cases -------------------------------------------------------------------------------


def at_once(rates: Sequence[float]) -> list[Steps]:
    """Success is decided at the first letter."""
    return [(float(p), *(1.0,) * (LENGTH - 1)) for p in rates]


def spread_over(rates: Sequence[float]) -> list[Steps]:
    """Every letter is equally hard."""
    return [(float(p) ** (1 / LENGTH),) * LENGTH for p in rates]


def some(rng: Rng, low: float, high: float, num: int = PROMPTS) -> list[float]:
    """Rates between two limits."""
    return list(rng.uniform(low, high, num))


def split(rng: Rng, share: float, high: tuple[float, float], low: tuple[float, float]) -> list:
    """The first prompts from one range, the others from another."""
    first = round(share * PROMPTS)
    return some(rng, *high, first) + some(rng, *low, PROMPTS - first)


def support(rng: Rng) -> list[Case]:
    """Right answers are out of reach, and beginnings do not help."""
    never = [(s, s, s, s) for s in some(rng, 0.0, 0.05)]
    last_only = [(0.001, 0.05, 0.05, s) for s in some(rng, 0.9, 1.0)]
    partly = [(0.98,) * 4] * 18 + [(0.0, 0.1, 0.1, 0.1)] * 14
    mostly = [(0.98,) * 4] * 21 + [(0.0, 0.0, 0.1, 0.5)] * 11
    return [
        Case("never", Bottleneck.SUPPORT, never, wrong=1),
        Case("never, many guesses", Bottleneck.SUPPORT, never, wrong=7),
        Case("only the last step", Bottleneck.SUPPORT, last_only, wrong=3),
        Case("half of the prompts", Bottleneck.SUPPORT, partly, wrong=7),
        Case("a third of the prompts", Bottleneck.SUPPORT, mostly, wrong=7),
    ]


def entry(rng: Rng) -> list[Case]:
    """Right answers are finished when begun."""
    first = [(s, 0.97, 0.97, 0.97) for s in some(rng, 0.0, 0.002)]
    two = [(0.01, 0.01, s, 0.98) for s in some(rng, 0.85, 1.0)]
    rough = [(0.0005, 0.8, 0.85, s) for s in some(rng, 0.8, 0.95)]
    partly = [(0.99,) * 4] * 17 + [(0.0, 0.95, 0.95, 0.95)] * 15
    return [
        Case("the first letter", Bottleneck.ENTRY, first),
        Case("the first letter, many guesses", Bottleneck.ENTRY, first, wrong=6),
        Case("the first half", Bottleneck.ENTRY, two),
        Case("a rough way on", Bottleneck.ENTRY, rough, wrong=2),
        Case("half of the prompts", Bottleneck.ENTRY, partly, wrong=7),
    ]


def signal(rng: Rng) -> list[Case]:
    """Right answers are in reach, and rare."""
    uneven = split(rng, 0.5, (0.026, 0.032), (0.018, 0.022))
    return [
        Case("rare habit", Bottleneck.SIGNAL, at_once(some(rng, 0.022, 0.03))),
        Case("rare, many guesses", Bottleneck.SIGNAL, at_once(some(rng, 0.02, 0.03)), wrong=7),
        Case("rare at every step", Bottleneck.SIGNAL, spread_over(some(rng, 0.02, 0.03)), wrong=3),
        Case("rare, uneven", Bottleneck.SIGNAL, at_once(uneven)),
        Case("rare, few guesses", Bottleneck.SIGNAL, at_once(some(rng, 0.024, 0.028)), wrong=2),
    ]


def choice(rng: Rng) -> list[Case]:
    """Right answers are in reach, and others are preferred."""
    return [
        Case("habit", Bottleneck.CHOICE, at_once(some(rng, 0.08, 0.15))),
        Case("toss-up", Bottleneck.CHOICE, at_once(some(rng, 0.4, 0.6))),
        Case("many guesses", Bottleneck.CHOICE, at_once(some(rng, 0.1, 0.3)), wrong=7),
        Case("hard at every step", Bottleneck.CHOICE, spread_over(some(rng, 0.2, 0.5)), wrong=4),
        Case("some easy", Bottleneck.CHOICE, at_once(split(rng, 0.4, (0.9, 1.0), (0.1, 0.2)))),
        Case(
            "in reach before, too",
            Bottleneck.CHOICE,
            at_once(some(rng, 0.3, 0.5)),
            before=at_once(some(rng, 0.1, 0.2)),
        ),
    ]


def saturation(rng: Rng) -> list[Case]:
    """Nothing is left to gain."""
    return [
        Case("always", Bottleneck.SATURATION, at_once([1.0] * PROMPTS)),
        Case("nearly always", Bottleneck.SATURATION, at_once(some(rng, 0.95, 1.0))),
        Case("mostly", Bottleneck.SATURATION, at_once(some(rng, 0.93, 0.98)), wrong=5),
        Case("slips", Bottleneck.SATURATION, spread_over(some(rng, 0.94, 1.0)), wrong=7),
        Case(
            "now as before",
            Bottleneck.SATURATION,
            at_once(some(rng, 0.96, 1.0)),
            before=at_once(some(rng, 0.96, 1.0)),
        ),
    ]


def diversity(rng: Rng) -> list[Case]:
    """One answer every time; or reach was lost while the mean held."""
    cases = []
    for share in (0.4, 0.5, 0.6):
        rates = split(rng, share, (1.0, 1.0), (0.0, 0.0))
        cases.append(
            Case(f"one answer each, {share:.0%} right", Bottleneck.DIVERSITY, at_once(rates))
        )
    for share in (0.75, 0.8):
        cases.append(
            Case(
                f"narrowed to {share:.0%} of the prompts",
                Bottleneck.DIVERSITY,
                at_once(split(rng, share, (0.97, 1.0), (0.0, 0.0))),
                before=at_once(split(rng, share, (0.93, 0.97), (0.18, 0.2))),
                wrong=3,
            )
        )
    return cases


def learner_state(rng: Rng) -> list[Case]:
    """Right on right paths; a slip is never made good, and what follows is noise."""
    teacher = [(0.98,) * LENGTH] * PROMPTS
    ranges = [("small slips", 0.9, 0.93, 3), ("slips", 0.87, 0.9, 3), ("wide slips", 0.86, 0.92, 7)]
    ranges += [("one way to slip", 0.85, 0.9, 1), ("uneven slips", 0.82, 0.95, 4)]
    return [
        Case(
            name,
            Bottleneck.LEARNER_STATE,
            [(s,) * LENGTH for s in some(rng, low, high)],
            teacher=teacher,
            wrong=wrong,
            longest=24,
        )
        for name, low, high, wrong in ranges
    ]


def retention(rng: Rng) -> list[Case]:
    """It was there before."""
    pairs = [
        ("half lost", (0.9, 1.0), (0.4, 0.5)),
        ("most lost", (0.9, 1.0), (0.1, 0.2)),
        ("all lost", (0.6, 0.8), (0.0, 0.0)),
        ("a quarter lost", (0.95, 1.0), (0.65, 0.75)),
        ("weakened", (0.5, 0.6), (0.2, 0.3)),
    ]
    return [
        Case(
            name,
            Bottleneck.RETENTION,
            at_once(some(rng, *now)),
            before=at_once(some(rng, *was)),
            wrong=2,
        )
        for name, was, now in pairs
    ]


def amortisation(rng: Rng) -> list[Case]:
    """It works with a scaffold."""
    pairs = [
        ("from little", (0.1, 0.2), (0.8, 0.95)),
        ("from nothing", (0.0, 0.0), (0.9, 1.0)),
        ("from half", (0.4, 0.5), (0.8, 1.0)),
        ("a third more", (0.3, 0.4), (0.65, 0.75)),
        ("to certainty", (0.6, 0.7), (1.0, 1.0)),
    ]
    return [
        Case(
            name,
            Bottleneck.AMORTISATION,
            at_once(some(rng, *bare)),
            helped=at_once(some(rng, *told)),
            wrong=3,
        )
        for name, bare, told in pairs
    ]


def measurement(rng: Rng) -> list[Case]:
    """The numbers cannot be trusted."""
    truth = Bottleneck.MEASUREMENT
    return [
        Case("cut off after two letters", truth, at_once(some(rng, 0.9, 1.0)), longest=2),
        Case("cut off after four", truth, at_once(some(rng, 0.6, 0.8)), longest=4),
        Case("a scorer that tosses coins", truth, at_once(some(rng, 0.4, 0.6)), noise=0.5),
        Case("a scorer that errs at times", truth, at_once(some(rng, 0.5, 0.9)), noise=0.1),
        Case("errs, where nothing is solved", truth, at_once([0.0] * PROMPTS), noise=0.1),
    ]


BUILDERS: Mapping[Bottleneck, Callable[[Rng], list[Case]]] = {
    Bottleneck.MEASUREMENT: measurement,
    Bottleneck.RETENTION: retention,
    Bottleneck.AMORTISATION: amortisation,
    Bottleneck.LEARNER_STATE: learner_state,
    Bottleneck.DIVERSITY: diversity,
    Bottleneck.SUPPORT: support,
    Bottleneck.ENTRY: entry,
    Bottleneck.SIGNAL: signal,
    Bottleneck.CHOICE: choice,
    Bottleneck.SATURATION: saturation,
}


def cases(seed: int) -> list[Case]:
    """Every case, its rates and samples drawn anew for each seed."""
    made = []
    for place, build in enumerate(BUILDERS.values()):
        for number, case in enumerate(build(np.random.default_rng([seed, place]))):
            own = int(np.random.default_rng([seed, place, number]).integers(1 << 31))
            made.append(Case(**{**case.__dict__, "seed": own}))
    return made


# --- the table -------------------------------------------------------------------------------


def page(results: Sequence[tuple[Case, TaskDiagnosis]], *, seeds: int) -> str:
    """A section for the lab log."""
    decided = [(c, d) for c, d in results if d.bottleneck is not Bottleneck.UNDETERMINED]
    right = [c for c, d in decided if d.bottleneck is c.truth]
    lines = [
        "## Is the right bottleneck named?",
        "",
        f"{len(results) // seeds} policies with one bottleneck each, {seeds} seeds, "
        f"{PROMPTS} prompts × {SAMPLES} samples through the real probes and the shipped rules: "
        f"**{len(right)} of {len(decided)} decided cases named rightly "
        f"({len(right) / max(len(decided), 1):.1%})**; {len(results) - len(decided)} of "
        f"{len(results)} stayed undetermined.",
        "",
        "| truth | cases | right | undetermined | named wrongly as |",
        "|---|---|---|---|---|",
    ]
    for truth in BUILDERS:
        mine = [d.bottleneck for c, d in results if c.truth is truth]
        wrong = Counter(b for b in mine if b not in (truth, Bottleneck.UNDETERMINED))
        names = ", ".join(f"{b} ({n})" for b, n in wrong.items()) or "–"
        undecided = sum(b is Bottleneck.UNDETERMINED for b in mine)
        lines.append(f"| {truth} | {len(mine)} | {mine.count(truth)} | {undecided} | {names} |")
    given = " ".join(map(str, range(seeds)))
    return "\n".join([*lines, "", f"`python benchmarks/diagnosis_cases.py --seeds {given}`", ""])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--write", action="store_true", help="put the section into the lab log")
    options = parser.parse_args()
    results = []
    for seed in options.seeds:
        for case in cases(seed):
            found = diagnosed(case)
            results.append((case, found))
            if found.bottleneck is not case.truth:
                said = f"{found.bottleneck} (leaning {found.leaning})"
                print(f"seed {seed}, {case.truth}: {case.name}: {said}", file=sys.stderr)
                print(f"    {found.headline}", file=sys.stderr)
    text = page(results, seeds=len(options.seeds))
    if options.write:
        write(text)
    print(text)


if __name__ == "__main__":
    main()
