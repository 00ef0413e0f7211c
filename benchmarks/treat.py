"""Does diagnosing pay? `treat` against fixed methods of the same budget, on situations of the lab.

    python benchmarks/treat.py --seeds 0 --out out/treat          # a first look
    python benchmarks/treat.py --seeds 0 1 2 3 4 --write      # and put it into docs/lab-log.md

    situation (a model, task sets, what there is to work with) ──arm──▶ model ──judge──▶ pass@1

Every arm of a situation has the same supplies and the same budget of tokens: sampled, plus gone
through a training step (`posttrain.diagnosis.spending`). What `treat` spends on looking counts.
All are judged alike at the end, with samples that no arm has seen; this is not counted. An arm
that lacks what its method needs does what a user would do instead (see ARMS).

Results are kept in benchmarks/results/treat.jsonl, and what has one is not run again: the command
can be repeated, and stopped, until the table is complete. An interrupted run goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from lab_log import write
from results_file import RESULTS, ResultsFile
from tour_seeds import over_seeds

from posttrain import api
from posttrain.core.learner import Optimizer
from posttrain.diagnosis.prescribe import Supplies
from posttrain.diagnosis.spending import spent
from posttrain.lab.corpus import demonstrations, preference_pairs, taskset, write_rows
from posttrain.lab.settings import SETTINGS
from posttrain.lab.tour import ANSWER, BASE
from posttrain.measure.spec import Measure
from posttrain.parts.composition import Method, method
from posttrain.parts.distillation.presets import Opd, Opsd
from posttrain.parts.policy.presets import Grpo
from posttrain.parts.preference.presets import OnlineDpo
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.supervised.presets import Sft
from posttrain.parts.supervised.rejection import Raft
from posttrain.recipe import Budget, Recipe, Stage
from posttrain.run.folder import RunFolder

LOOK = Measure(samples=64, max_new_tokens=ANSWER, seed=7)
JUDGE = Measure(samples=64, max_new_tokens=ANSWER, seed=1_000_003)
NOT_COUNTED = Measure(samples=2, max_new_tokens=ANSWER, seed=7)
CLEAN = Dataset(path="demos.jsonl", name="lab-demos", licence="CC0-1.0")
PAIRS = Dataset(path="pairs.jsonl", name="lab-pairs", licence="CC0-1.0")


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What one run ended with. ``rounds`` is what `treat` did."""

    situation: str
    arm: str
    seed: int
    rates: dict[str, float]  # pass@1 by task set
    tokens: int = 0
    seconds: float = 0.0
    rounds: list[str] = []

    @property
    def key(self) -> tuple[str, str, int]:
        return self.situation, self.arm, self.seed

    @property
    def mean(self) -> float:
        """pass@1 over the task sets."""
        return float(np.mean(list(self.rates.values())))


@dataclass(frozen=True)
class Situation:
    """A model and what there is to treat it with. ``demos`` and ``pairs`` are for one task set."""

    name: str
    words: str
    model: Callable[[Path], Path]  # from the folder of prepared models
    tasks: tuple[str, ...]
    budget: int
    demos: str | None = None
    before: bool = False  # the base is at hand as the earlier policy

    def recipe(self, prepared: Path, *, seed: int, measure: Measure) -> Recipe:
        """Everything but stages."""
        return Recipe(
            name=self.name,
            model=str(self.model(prepared).resolve()),
            seed=seed,
            threads=1,
            tasks={n: SETTINGS[n].tasks for n in self.tasks},
            measure=measure,
        )


# --- the models that situations begin with ---------------------------------------------------


def base(_: Path) -> Path:
    """The lab's base model."""
    return BASE


def taught(prepared: Path) -> Path:
    """The base after 320 steps on `reverse` alone: it knows that, and lost much of the rest."""
    rows = (d.row for d in demonstrations(SETTINGS["reverse"], seed=99, count=3000))
    return _trained(prepared / "taught", BASE, rows, steps=320, lr=1e-3)


def unbegun(prepared: Path) -> Path:
    """The taught model, trained to begin with the wrong letter and to go on rightly: it could
    finish what somebody begins, and never begins it."""
    start = taught(prepared)
    words = list({t.key: t for t in taskset(SETTINGS["reverse"]).train}.values())[:2000]
    rows = [
        {
            "messages": [
                {"role": "user", "content": task.text},
                {"role": "assistant", "content": f"{task.answer}"[-1] + f"{task.answer}"[1:]},
            ]
        }
        for task in words
        if f"{task.answer}"[0] != f"{task.answer}"[-1]
    ]
    known = [demonstrations(SETTINGS[n], seed=98, count=600) for n in ("sums", "calculate")]
    keep = [d.row for documents in known for d in documents]
    return _trained(prepared / "unbegun", start, [*rows, *keep], steps=60, lr=5e-4)


def _trained(out: Path, model: Path, rows: object, *, steps: int, lr: float) -> Path:
    """One SFT stage, made once."""
    if not (out / "ready").is_file():
        out.mkdir(parents=True, exist_ok=True)
        write_rows(out / "rows.jsonl", rows)  # type: ignore[arg-type]
        stage = Stage(
            name="prepare",
            method=Sft(data=Dataset(path="rows.jsonl", name="lab-rows", licence="CC0-1.0")),
            budget=Budget(steps=steps),
            groups_per_step=64,
            optimizer=Optimizer(lr=lr, warmup_steps=10, schedule="linear"),
        )
        recipe = Recipe(name=out.name, model=str(model.resolve()), stages=(stage,), threads=1)
        api.run(recipe, out=out / "run", root=out)
        (out / "ready").touch()
    (made,) = RunFolder(out / "run").models("prepare")
    return made


SITUATIONS = {
    s.name: s
    for s in (
        Situation(
            "support",
            "the base cannot reverse words; 3,000 demonstrations; sums must stay",
            base,
            ("reverse", "sums", "calculate"),
            300_000,
            demos="reverse",
        ),
        Situation(
            "choice",
            "products and chains are in reach, and habits are preferred; nothing but the verifier",
            base,
            ("products", "chains"),
            150_000,
        ),
        Situation(
            "entry",
            "reversing was learnt, but answers start wrong; 3,000 demonstrations; sums must stay",
            unbegun,
            ("reverse", "sums", "calculate"),
            150_000,
            demos="reverse",
        ),
        Situation(
            "retention",
            "reversing was learnt, sums were lost; the base is at hand, and the demonstrations",
            taught,
            ("sums", "calculate", "reverse"),
            150_000,
            demos="reverse",
            before=True,
        ),
        Situation(
            "saturation",
            "everything that is asked is known; nothing should be done",
            base,
            ("sums", "calculate"),
            100_000,
        ),
    )
}


# --- the arms --------------------------------------------------------------------------------


def sft(situation: Situation) -> Method:
    """On the demonstrations; without any, on own answers that the verifier accepts."""
    if situation.demos:
        return Sft(data=CLEAN)
    return Raft(tasks=situation.tasks, at_least=1.0, max_new_tokens=ANSWER)


def dpo(situation: Situation) -> Method:
    """On pairs of right answer and habit; without any, on pairs of own answers, judged."""
    if situation.demos:
        return method("dpo", data=PAIRS)
    return OnlineDpo(tasks=situation.tasks, max_new_tokens=ANSWER)


def grpo(situation: Situation) -> Method:
    """On every task set, in groups of sixteen."""
    return Grpo(tasks=situation.tasks, group_size=16, max_new_tokens=ANSWER, aggregate="token_mean")


def opd(situation: Situation) -> Method:
    """From the earlier policy; without one, from the policy that is shown the answer."""
    if situation.before:
        teachers = {"*": f"path:{BASE.resolve()}"}
        return Opd(tasks=situation.tasks, teachers=teachers, max_new_tokens=ANSWER)
    return Opsd(tasks=situation.tasks, max_new_tokens=ANSWER)


Rates = Mapping[str, tuple[int, float]]  # groups per step, learning rate
SETTINGS_OF: Rates = {
    "sft": (64, 1e-3),
    "raft": (64, 1e-3),
    "dpo": (32, 2e-4),
    "online_dpo": (32, 2e-4),
    "grpo": (32, 2e-4),
    "opd": (80, 1e-3),
    "opsd": (64, 3e-4),
}
"""As in the tour and the catalogue, where they were found to work."""

ARMS: Mapping[str, tuple[Callable[[Situation], Method], ...]] = {
    "SFT": (sft,),
    "DPO": (dpo,),
    "GRPO": (grpo,),
    "OPD": (opd,),
    "SFT then GRPO": (sft, grpo),
}
TREAT, UNTOUCHED = "treat", "untouched"
Scores = Mapping[int, float]  # by seed
FAIR = (2, 3, 4)
"""Seeds that nobody had looked at when the treatments were chosen."""

CARE = (
    "Read with care. The treatments of `choice` and `entry` were chosen after a look at seed 0, "
    "that of `choice` also at seed 1, so only the later seeds are fair to them. Where a policy's "
    "answers grow while it trains, an arm overspends, since its length is set by a short trial. "
    "OPD has a teacher in `retention` only; elsewhere the policy itself teaches, shown the right "
    "answer, which this base cannot read: it learns to ramble."
)


TRIAL = 4  # steps from which an arm's cost per step is read


def fixed(situation: Situation, arm: str, prepared: Path, *, folder: Path, seed: int) -> Recipe:
    """The arm's stages, as long as its share of the budget allows: a short trial tells its cost."""
    ground = situation.recipe(prepared, seed=seed, measure=NOT_COUNTED)
    makers = ARMS[arm]
    stages: list[Stage] = []
    for number, make in enumerate(makers, start=1):
        method = make(situation)
        groups, lr = SETTINGS_OF[str(method.__struct_config__.tag)]
        stage = Stage(
            name=f"{number}-{method.__struct_config__.tag}",
            method=method,
            budget=Budget(steps=TRIAL),
            groups_per_step=groups,
            optimizer=Optimizer(lr=lr, warmup_steps=5, schedule="linear"),
        )
        trial = folder / f"trial-{number}"
        short = msgspec.structs.replace(ground, stages=(stage,))
        api.run(short, out=trial, root=folder / "inputs")
        steps = int(situation.budget / len(makers) * TRIAL / spent(RunFolder(trial)).total)
        stages.append(msgspec.structs.replace(stage, budget=Budget(steps=max(1, steps))))
    return msgspec.structs.replace(ground, stages=tuple(stages))


def run_one(situation: Situation, arm: str, seed: int, out: Path) -> Result:
    """One run to its end."""
    folder = out / situation.name / arm.replace(" ", "-") / str(seed)
    if arm == UNTOUCHED:
        rates = judged(situation, situation.model(out / "prepared"))
        return Result(situation=situation.name, arm=arm, seed=seed, rates=rates)
    prepared, inputs = out / "prepared", folder / "inputs"
    inputs.mkdir(parents=True, exist_ok=True)
    if situation.demos:
        setting = SETTINGS[situation.demos]
        rows = (d.row for d in demonstrations(setting, seed=seed, count=3000))
        write_rows(inputs / CLEAN.path, rows)
        write_rows(inputs / PAIRS.path, preference_pairs(setting, seed=seed, count=3000))
    began = time.process_time()
    rounds: list[str] = []
    if arm == TREAT:
        ground = situation.recipe(prepared, seed=seed, measure=LOOK)
        demos = {situation.demos: str((inputs / CLEAN.path).resolve())} if situation.demos else {}
        supplies = Supplies(demos=demos, before=str(BASE.resolve()) if situation.before else None)
        done = api.treat(
            ground, out=folder / "run", budget=situation.budget, root=inputs, supplies=supplies
        )
        model, total = done.model, done.spent.total
        rounds = [f"{r.treatment}({r.stage.budget.steps}): {r.words}" for r in done.rounds]
        rounds.append(done.ended)
    else:
        recipe = fixed(situation, arm, prepared, folder=folder, seed=seed)
        ended = api.run(recipe, out=folder / "run", root=inputs)
        finished = RunFolder(folder / "run")
        (model,) = finished.models(ended.final)
        total = spent(finished).total
    return Result(
        situation=situation.name,
        arm=arm,
        seed=seed,
        rates=judged(situation, model),
        tokens=total,
        seconds=round(time.process_time() - began, 1),
        rounds=rounds,
    )


def judged(situation: Situation, model: Path) -> dict[str, float]:
    """pass@1 by task set, on samples of a seed that nobody trained or decided with."""
    recipe = Recipe(
        name="judge",
        model=str(model.resolve()),
        threads=1,
        tasks={n: SETTINGS[n].tasks for n in situation.tasks},
        measure=JUDGE,
    )
    found = api.measure(recipe)
    return {t.taskset: float(t.successes.mean()) for t in found.tasks}


# --- the table -------------------------------------------------------------------------------


def page(results: Sequence[Result], seeds: Sequence[int]) -> str:
    """A section for the lab log: mean pass@1 over a situation's task sets, and over situations."""

    def scores(name: str, arm: str) -> Scores:
        return {r.seed: r.mean for r in results if (r.situation, r.arm) == (name, arm)}

    names = [n for n in SITUATIONS if any(r.situation == n for r in results)]
    lines = [
        "## Does diagnosing pay?",
        "",
        f"Mean pass@1 over a situation's task sets, mean ± 95 % Student interval over "
        f"{len(seeds)} seeds (in brackets how many, where some are still to come); every arm of a "
        "situation has the same supplies and tokens.",
        "",
        f"| arm | {' | '.join(names)} | all |",
        f"|---|{'---|' * (len(names) + 1)}",
    ]
    for arm in [UNTOUCHED, *ARMS, TREAT]:
        wanted = seeds[:1] if arm == UNTOUCHED else seeds
        lines.append(_row(arm, [scores(n, arm) for n in names], wanted))
    lines += ["", *_margins(names, scores, seeds)]
    if set(FAIR) < set(seeds):
        lines += ["", f"The same over seeds {' '.join(map(str, FAIR))} alone:", ""]
        lines += _margins(names, scores, FAIR)[2:]
    lines += ["", "Tokens spent, in thousands (budget in brackets):", ""]
    lines += [f"| arm | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for arm in [*ARMS, TREAT]:
        cells = []
        for n in names:
            used = [r.tokens for r in results if (r.situation, r.arm) == (n, arm)]
            cells.append(
                f"{np.mean(used) / 1e3:.0f} ({SITUATIONS[n].budget // 1000})" if used else "–"
            )
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines += ["", *(f"* **{n}**: {SITUATIONS[n].words}." for n in names)]
    lines += ["", CARE, "", f"What `treat` did with seed {seeds[0]}:", ""]
    for r in results:
        if r.arm == TREAT and r.seed == seeds[0]:
            lines.append(f"* **{r.situation}**: {'; '.join(r.rounds)}.")
    given = " ".join(map(str, seeds))
    lines += ["", f"`python benchmarks/treat.py --seeds {given} --only {' '.join(names)} --write`"]
    return "\n".join(lines) + "\n"


def _margins(
    names: Sequence[str], scores: Callable[[str, str], Scores], seeds: Sequence[int]
) -> list[str]:
    """What treating gains over each fixed arm, seed by seed."""
    lines = ["`treat` minus the arm, paired by seed:", ""]
    lines += [f"| arm | {' | '.join(names)} | all |", f"|---|{'---|' * (len(names) + 1)}"]
    for arm in ARMS:
        gains: list[Scores] = []
        for name in names:
            ours, theirs = scores(name, TREAT), scores(name, arm)
            gains.append({s: ours[s] - theirs[s] for s in seeds if s in ours and s in theirs})
        lines.append(_row(arm, gains, seeds))
    return lines


def _row(arm: str, columns: Sequence[Scores], seeds: Sequence[int]) -> str:
    """A cell per situation, and one of the mean over situations of seeds that all of them have."""
    whole = set(seeds).intersection(*(set(c) for c in columns))
    means = {s: float(np.mean([c[s] for c in columns])) for s in sorted(whole)}
    cells = []
    for values in (*columns, means):
        few = f" ({len(values)})" if len(values) < len(seeds) else ""
        cells.append(over_seeds(list(values.values())) + few if values else "–")
    return f"| {arm} | {' | '.join(cells)} |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="none: only the table")
    parser.add_argument("--only", nargs="*", choices=list(SITUATIONS), help="situations")
    parser.add_argument("--arms", nargs="*", choices=[*ARMS, TREAT])
    parser.add_argument("--out", type=Path, default=Path("out/treat"))
    parser.add_argument("--results", type=Path, default=RESULTS / "treat.jsonl")
    parser.add_argument("--again", action="store_true", help="also what has a result already")
    parser.add_argument("--write", action="store_true", help="put the section into the lab log")
    options = parser.parse_args()
    results = ResultsFile(options.results, Result, lambda r: r.key)
    names, arms = options.only or list(SITUATIONS), options.arms or [*ARMS, TREAT]
    for seed in options.seeds:  # a whole table early, then more seeds
        for name in names:
            before = [UNTOUCHED] if seed == options.seeds[0] else []
            for arm in [*before, *arms]:
                if (name, arm, seed) in results.rows() and not options.again:
                    continue
                result = run_one(SITUATIONS[name], arm, seed, options.out)
                results.add(result)
                rates = ", ".join(f"{t} {r:.2f}" for t, r in result.rates.items())
                said = f"{name}, {arm}, seed {seed}: {rates}; {result.tokens} tokens"
                print(f"{said}, {result.seconds} s", file=sys.stderr, flush=True)
    found = [r for r in results.rows().values() if r.situation in names]
    seeds = options.seeds or sorted({r.seed for r in found})
    found = [r for r in found if r.seed in seeds]
    text = page(sorted(found, key=lambda r: (names.index(r.situation), r.seed)), seeds)
    print(text)
    if options.write:
        write(text)


if __name__ == "__main__":
    main()
