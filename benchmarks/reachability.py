"""Check reachability against brute force on the lab, and its bounds on weights that we choose.

    python benchmarks/reachability.py            # print the section
    python benchmarks/reachability.py --write    # and put it into docs/lab-log.md

The lab's base is made ever surer of its habit (its logits times 1, 2 and 3), so that right answers
to `products` and `chains` sink from one in ten to one in ten thousand. A short GRPO stage from the
unchanged base is the later policy. What it writes says how probable success is under each judged
base; many samples of the judged base itself say what is true.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from lab_log import write

from posttrain.api import run
from posttrain.core.learner import Optimizer
from posttrain.core.task import Task, TaskSet
from posttrain.diagnosis.drawing import draw_answers
from posttrain.diagnosis.importance import ImportanceSample, odds_words
from posttrain.diagnosis.reachability import TaskReach, reachability
from posttrain.engines.local.engine import LocalEngine, LocalPolicy
from posttrain.lab.corpus import taskset
from posttrain.lab.settings import CHAINS, PRODUCTS, REVERSE
from posttrain.lab.tour import ANSWER, BASE, write_tour
from posttrain.measure.support import clopper_pearson
from posttrain.parts.policy.presets import Grpo
from posttrain.recipe import Budget, Recipe, Stage, load_recipe
from posttrain.run.folder import RunFolder

HEADING = "## Reachability, against the truth"
PROMPTS, SAMPLES, OWN = 12, 256, 256
BRUTE = {1.0: 4096, 2.0: 16384, 3.0: 65536}
"""Samples per prompt of the judged base, by how much its logits are multiplied."""
LN10 = math.log(10)


# --- on the lab ------------------------------------------------------------------------------


def judged(factor: float) -> LocalPolicy:
    """The lab's base with its logits multiplied: its output head is linear in the last norm."""
    policy = LocalEngine(device=torch.device("cpu")).policy(str(BASE))
    with torch.no_grad():
        policy.model.causal.get_decoder().norm.weight.mul_(factor)
    return policy


def later(out: Path, *, seed: int) -> LocalPolicy:
    """A policy that a short GRPO stage made from the base. A finished run is not repeated."""
    recipe = Recipe(
        name="reachability",
        model=str(BASE),
        seed=seed,
        threads=1,
        tasks={s.name: s.tasks for s in (PRODUCTS, CHAINS)},
        stages=(
            Stage(
                name="rewarded",
                method=Grpo(
                    tasks=("products", "chains"),
                    group_size=16,
                    max_new_tokens=ANSWER,
                    aggregate="token_mean",
                ),
                budget=Budget(steps=20),
                groups_per_step=32,
                optimizer=Optimizer(lr=2e-4),
            ),
        ),
    )
    run(recipe, out=out, root=Path())
    return exported(out, "rewarded")


def exported(out: Path, stage: str) -> LocalPolicy:
    """The model of a finished stage."""
    (folder,) = RunFolder(out).models(stage)
    return LocalEngine(device=torch.device("cpu")).policy(str(folder))


def solved(
    policy: LocalPolicy, tasks: TaskSet, asked: list[Task], n: int, *, seed: int
) -> list[int]:
    """Successes of ``n`` samples per prompt, drawn in portions."""
    counts = np.zeros(len(asked), np.int64)
    for first in range(0, n, 4096):
        groups = draw_answers(
            policy, tasks, asked, samples=min(4096, n - first), first=[first] * len(asked),
            max_new_tokens=ANSWER, seed=seed,
        )  # fmt: skip
        counts += [sum(a.success for a in group) for group in groups]
    return counts.tolist()


def lab_rows(policy: LocalPolicy, *, seed: int) -> list[str]:
    """One row per task and judged base."""
    rows = []
    for setting in (PRODUCTS, CHAINS):
        tasks = taskset(setting)
        asked = list(tasks.held_out[:PROMPTS])
        for factor, brute in BRUTE.items():
            base = judged(factor)
            own = solved(base, tasks, asked, OWN, seed=seed + 1)
            truth = solved(base, tasks, asked, brute, seed=seed + 2)
            counts = {t.key: (c, OWN) for t, c in zip(asked, own, strict=True)}
            found = reachability(
                base, policy, tasks, samples=SAMPLES, max_new_tokens=ANSWER, seed=seed,
                tasks=asked, base_counts=counts,
            )  # fmt: skip
            rows.append(lab_row(f"{setting.name} × {factor:g}", found, truth, brute))
    return rows


def lab_row(name: str, found: TaskReach, truth: list[int], brute: int) -> str:
    """Estimates against brute force, for prompts with at least 5 brute-force successes."""
    ratios, contradicted, compared = [], 0, 0
    rates = [c / brute for c in truth]
    for one, hits in zip(found.prompts, truth, strict=True):
        low, high = clopper_pearson(hits, brute, confidence=0.999)
        below = one.low > math.log10(high)
        above = low > 0 and one.high < math.log10(low)
        contradicted += below or above
        if hits >= 5 and one.trusted:
            compared += 1
            ratios.append(10**one.log10 / (hits / brute))
    spread = (
        f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "none"
    )
    zero = sum(p.base_successes == 0 for p in found.prompts)
    return (
        f"| {name} | {min(rates):.1e} to {max(rates):.1e} | {zero} | {found.num_trusted} | "
        f"{compared} | {spread} | {contradicted} |"
    )


def reverse_row(out: Path, *, seed: int) -> str:
    """What the base could do on the task that it was never shown."""
    path = write_tour(out, seed=seed)
    tour = load_recipe(path)
    first = tour.stages[0]
    only = Recipe(
        name="expand", model=tour.model, seed=seed, threads=1,
        tasks={"reverse": REVERSE.tasks}, stages=(first,),
    )  # fmt: skip
    run(only, out=out / "run", root=path.parent)
    base, tasks = judged(1.0), taskset(REVERSE)
    asked = list(tasks.held_out)
    counts = {t.key: (c, OWN) for t, c in zip(asked, solved(base, tasks, asked, OWN, seed=1),
              strict=True)}  # fmt: skip
    found = reachability(
        base, exported(out / "run", "expand"), tasks, samples=SAMPLES, max_new_tokens=ANSWER,
        seed=seed, tasks=asked, base_counts=counts,
    )  # fmt: skip
    return (
        f"`reverse`, after SFT: the base solved {sum(c for c, _ in counts.values())} of "
        f"{OWN * len(asked)}. On the middle prompt it succeeds {odds_words(found.log10)} "
        f"[10^{found.low:.1f}, 10^{found.high:.1f}]; {found.num_trusted} of {len(asked)} "
        "estimates are trusted."
    )


# --- on weights that we choose ---------------------------------------------------------------


def population(size: int, spread: float, *, p: float = 1e-12) -> tuple[np.ndarray, np.ndarray]:
    """log π₀ and log π₁ of ``size`` successes with this spread of log-weights; Σ π₁ is 0.6."""
    rng = np.random.default_rng(0)
    second = rng.normal(0, 1.5, size)
    second += math.log(0.6) - np.logaddexp.reduce(second)
    first = second + rng.normal(0, spread, size)
    return first + math.log(p) - np.logaddexp.reduce(first), second


def simulated(name: str, first: np.ndarray, second: np.ndarray, *, n: int, trials: int) -> str:
    """One row: is the estimate unbiased, do the bounds hold, what does trust mean?"""
    rng = np.random.default_rng(1)
    truth = float(np.logaddexp.reduce(first)) / LN10
    share = np.exp(second)
    values, plain, gap = list[float](), list[float](), list[float]()
    wrong = usual = trusted = good = 0
    for _ in range(trials):
        counts = rng.multinomial(n, np.append(share, 1 - share.sum()))[:-1]
        seen = np.flatnonzero(counts)
        one = ImportanceSample(
            log_base=first[seen], log_later=second[seen], times=counts[seen], num_samples=n
        )
        low = one.low(0.025)
        values.append(10 ** (one.log10 - truth))
        plain.append(10 ** (one.weighted - truth))
        wrong += low > truth + 1e-9
        weights = np.zeros(n)
        ratio = np.repeat(first[seen] - second[seen], counts[seen]) - truth * LN10
        weights[: len(ratio)] = np.exp(ratio)
        half = 1.96 * weights.std(ddof=1) / math.sqrt(n)
        usual += not weights.mean() - half <= 1 <= weights.mean() + half
        trusted += one.doubt is None
        good += one.doubt is None and abs(one.log10 - truth) < math.log10(2)
        gap.append(truth - low)
    return (
        f"| {name} | {n} | {np.mean(values):.2f} ± {1.96 * np.std(values) / math.sqrt(trials):.2f} "
        f"| {_rmse(values):.2f} / {_rmse(plain):.2f} | {wrong / trials:.1%} | {np.median(gap):.1f} "
        f"| {usual / trials:.0%} | {trusted / trials:.0%} | "
        f"{f'{good / trusted:.0%}' if trusted else '–'} |"
    )


def _rmse(ratios: list[float]) -> float:
    return float(np.sqrt(np.mean((np.array(ratios) - 1) ** 2)))


def simulation(trials: int) -> list[str]:
    """Rows from harmless to hopeless."""
    rows = []
    for size, spread in ((3, 1), (30, 1), (30, 3), (3000, 0.5), (3000, 1), (3000, 2), (3000, 3)):
        first, second = population(size, spread)
        rows += [
            simulated(f"{size} answers, spread {spread}", first, second, n=n, trials=trials)
            for n in (64, 256)
        ]
    first, second = population(300, 1)
    dropped = np.append(first, math.log(1e-6)), np.append(second, -40.0)
    rows.append(simulated("a way with p = 10⁻⁶ dropped", *dropped, n=256, trials=trials))
    return rows


# --- the section -----------------------------------------------------------------------------


def section(out: Path, *, seed: int, trials: int) -> str:
    """The lab log's section, in Markdown."""
    started = time.process_time()
    lab = lab_rows(later(out / "rewarded", seed=seed), seed=seed)
    far = reverse_row(out / "reverse", seed=seed)
    weights = simulation(trials)
    minutes = (time.process_time() - started) / 60
    return f"""{HEADING}

How improbable success is under a base that never succeeds, estimated from the successes of a later policy (`diagnosis/reachability.py`). Made by `python benchmarks/reachability.py --write` (seed {seed}, {minutes:.0f} minutes of one thread).

**On the lab.** {PROMPTS} held-out prompts, {SAMPLES} samples of a policy after 20 GRPO steps, {OWN} of the base in question, whose logits are multiplied by the number given; the truth is a brute-force rate of that base. *Contradicted*: the 95 % interval lies outside the exact 99.9 % interval of brute force; of {6 * PROMPTS} intervals, up to 5 % may. The ratio is over trusted prompts with 5 brute-force successes or more, whose own noise is up to 45 %.

| task × logits | true rate, range | 0 of {OWN} | trusted | compared | estimate / truth, median (range) | contradicted |
|---|---|---|---|---|---|---|
{chr(10).join(lab)}

{far}

**On weights that we choose.** Successes with log-normal weights π₀/π₁ around a true chance of 10⁻¹², {trials} trials a row. *Too high*: the lower bound exceeded the truth (2.5 % allowed). *Gap*: how many orders of magnitude it lies below, in the median. *Usual misses*: a mean ± 1.96 standard errors of the weights, for comparison, did not hold the truth (5 % expected). *Good*: of the trusted ones, within a factor of two.

| successes | n | estimate / truth, mean | error, ours / plain weights | too high | gap | usual misses | trusted | good |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(weights)}

What fails: the last row. Ways to succeed that the later policy no longer writes are invisible to it. The estimate is confident and too low by six orders of magnitude, and no statistic of the later policy's samples can tell. The upper end of every interval therefore comes from the base's own draws alone. With few samples and heavy weights the few estimates that pass for trustworthy are the unlucky ones, so read *good* beside *trusted*.
"""  # noqa: E501 (a paragraph of the log is one line)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/reachability"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--write", action="store_true", help="put the section into the lab log")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = section(arguments.out, seed=arguments.seed, trials=arguments.trials)
    print(text)
    if arguments.write:
        write(text)


if __name__ == "__main__":
    main()
