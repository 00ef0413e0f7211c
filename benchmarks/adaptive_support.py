"""What adaptive labels cost, and how often they are wrong, by simulation.

python benchmarks/adaptive_support.py            # print the section (about two minutes)
python benchmarks/adaptive_support.py --write    # and put it into docs/lab-log.md
"""

from __future__ import annotations

import argparse
import math

import numpy as np
from lab_log import write

from posttrain.diagnosis.adaptive import AdaptiveDesign, Tally, boundaries, next_draws
from posttrain.measure.support import Label, cutoffs

EPSILON, LONGEST, PATHS = 0.05, 3000, 4000
RATES = (0.0, 0.01, 0.03, 0.05, 0.08, 0.2, 0.5)


def error_rows(rng: np.random.Generator) -> list[str]:
    """Labels when every sample is looked at, by the prompt's true rate."""
    design = AdaptiveDesign(epsilon=EPSILON, budget=1)
    outs, ins = (np.array(b) for b in boundaries(LONGEST, design=design))
    fixed = [cutoffs(n, epsilon=EPSILON, confidence=0.95) for n in range(1, LONGEST + 1)]
    naive_outs, naive_ins = np.array(fixed).T
    rows = []
    for rate in RATES:
        counts = np.cumsum(rng.random((PATHS, LONGEST)) < rate, axis=1)
        cells = []
        for low, high in ((outs, ins), (naive_outs, naive_ins)):
            out, into = _first(counts <= low), _first(counts >= high)
            labelled_out, labelled_in = out < into, into < out
            cells.append((labelled_in.mean(), labelled_out.mean(), np.minimum(out, into)))
        (inside, outside, when), (naive_in, naive_out, _) = cells
        spent = np.minimum(when + 1, LONGEST)
        rows.append(
            f"| {rate:g} | {inside:.1%} | {outside:.1%} | {naive_in:.1%} | {naive_out:.1%} | "
            f"{np.median(spent):.0f} |"
        )
    return rows


def _first(decided: np.ndarray) -> np.ndarray:
    """[PATHS] index of the first True, LONGEST when there is none."""
    return np.where(decided.any(axis=1), decided.argmax(axis=1), LONGEST)


def budget_rows(rng: np.random.Generator, *, prompts: int = 64, trials: int = 20) -> list[str]:
    """Labels that a budget buys: adaptive, and the same number for every prompt."""
    rows = []
    for name, a, b in (("mostly hard", 0.15, 1.5), ("mixed", 0.3, 0.6), ("two peaks", 0.05, 0.05)):
        for each in (32, 64, 128):
            adaptive, even, wrong, made = [], [], 0, 0
            for _ in range(trials):
                rates = rng.beta(a, b, prompts)
                design = AdaptiveDesign(epsilon=EPSILON, budget=each * prompts)
                tally = Tally.empty(prompts)
                while plan := next_draws(tally, design=design):
                    hits = {i: int(rng.binomial(n, rates[i])) for i, n in plan.items()}
                    tally = tally.add(plan, hits, design=design)
                adaptive.append(np.mean([mine is not Label.UNDETERMINED for mine in tally.labels]))
                made += sum(mine is not Label.UNDETERMINED for mine in tally.labels)
                wrong += sum(
                    (mine is Label.IN and p < EPSILON) or (mine is Label.OUT and p > EPSILON)
                    for mine, p in zip(tally.labels, rates, strict=True)
                )
                most, fewest = cutoffs(each, epsilon=EPSILON, confidence=0.95)
                counts = rng.binomial(each, rates)
                even.append(np.mean((counts <= most) | (counts >= fewest)))
            rows.append(
                f"| {name} | {each} | {np.mean(adaptive):.1%} | {np.mean(even):.1%} | "
                f"{wrong / made:.2%} |"
            )
    return rows


def section() -> str:
    """The lab log's section, in Markdown."""
    rng = np.random.default_rng(0)
    never = math.ceil(math.log(0.05) / math.log(1 - EPSILON))
    return f"""## Adaptive support, simulated

Labels at ε = {EPSILON}, confidence 0.95, that stay valid when sampling stops because of them (`diagnosis/adaptive.py`). Made by `python benchmarks/adaptive_support.py --write`, {PATHS} paths of {LONGEST} samples. *Peeking*: exact binomial bounds for a fixed n, looked at after every sample. IN is wrong below ε and OUT above it; at ε itself both count as wrong. Allowed: 5 % each.

| true rate | IN | OUT | peeking IN | peeking OUT | samples to a label, median |
|---|---|---|---|---|---|
{chr(10).join(error_rows(rng))}

A prompt that never succeeds is OUT after 62 samples; a fixed design needs {never}. Right at ε most paths end without a label, as they should.

The same budget spent evenly (n for each of 64 prompts, fixed-n labels) and adaptively, rates drawn from a Beta, 20 trials:

| rates | n | labelled, adaptive | labelled, even | wrong, of adaptive labels |
|---|---|---|---|---|
{chr(10).join(budget_rows(rng))}
"""  # noqa: E501 (a paragraph of the log is one line)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the section into the lab log")
    arguments = parser.parse_args()
    text = section()
    print(text)
    if arguments.write:
        write(text)


if __name__ == "__main__":
    main()
