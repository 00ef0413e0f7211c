"""A made-up but coherent run to draw: 4 stages, 5 policies, 4 task sets of 32 prompts."""

from __future__ import annotations

import math
import random
from itertools import pairwise

from posttrain.core.clock import GROUPS
from posttrain.core.provenance import Kind, Role
from posttrain.report.view import (
    Account,
    Change,
    Comparison,
    CurvePoint,
    Effect,
    Estimate,
    GateView,
    Outcome,
    Piece,
    PolicyTask,
    PolicyView,
    PromptSupport,
    Regime,
    RetentionView,
    RunView,
    Sample,
    Seal,
    Series,
    StageView,
    Support,
    SupportMap,
    TaskEffect,
    TimePart,
    Token,
    TokenCount,
    Totals,
)

POLICIES = ("lab-base", "expand", "reshape", "prefer", "consolidate")
TASKS = ("sums", "products", "chains", "reverse")
NUM_PROMPTS, NUM_SAMPLES = 32, 64
KS = (1, 2, 4, 8, 16, 32, 64)
MEANS = {  # success rate of each policy, averaged over prompts
    "sums": (0.93, 0.90, 0.95, 0.95, 0.95),
    "products": (0.34, 0.31, 0.72, 0.74, 0.73),
    "chains": (0.22, 0.17, 0.12, 0.10, 0.11),
    "reverse": (0.0, 0.42, 0.70, 0.71, 0.81),
}


def wilson(hits: float, n: int) -> Estimate:
    """A share with its 95 % Wilson interval."""
    p, z = hits / n, 1.96
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(value=p, low=max(0.0, centre - half), high=min(1.0, centre + half))


def rates(task: str, dice: random.Random) -> list[list[float]]:
    """[policy][prompt] success rates: one easiness per prompt, moved by each policy."""
    easiness = [dice.gauss(0, 1.5) for _ in range(NUM_PROMPTS)]
    table = []
    for mean in MEANS[task]:
        offset = math.log(max(mean, 1e-6) / (1 - mean))
        row = [1 / (1 + math.exp(-(offset + 0.9 * e + dice.gauss(0, 0.4)))) for e in easiness]
        table.append([0.0] * NUM_PROMPTS if mean == 0 else row)
    if task == "chains":  # some prompts are really lost
        for row in table[2:]:
            for i in range(7):
                row[sorted(range(NUM_PROMPTS), key=lambda j: table[0][j])[i]] = 0.0
    return table


def support(rate: float) -> Support:
    if rate >= 0.06:
        return Support.IN
    return Support.OUT if rate < 0.015 else Support.UNDETERMINED


def measured(task: str, row: list[float]) -> PolicyTask:
    points = []
    for k in KS:
        values = [1 - (1 - p) ** k for p in row]
        mean = sum(values) / len(values)
        sd = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
        half = 1.96 * sd / math.sqrt(len(values))
        points.append(
            CurvePoint(
                k=k,
                rate=Estimate(
                    value=mean, low=max(mean - half, 0.0), high=min(mean + half + 0.005, 1.0)
                ),
            )
        )
    return PolicyTask(
        task=task,
        num_prompts=NUM_PROMPTS,
        num_samples=NUM_SAMPLES,
        pass_at_1=points[0].rate,
        curve=tuple(points),
    )


def change(task: str, before: list[float], after: list[float]) -> Change:
    """Shares of prompts by what happened to them."""
    count = dict.fromkeys(("reachable", "sharpened", "kept", "weakened", "lost", "open"), 0)
    for p, q in zip(before, after, strict=True):
        was, now = support(p), support(q)
        if Support.UNDETERMINED in (was, now):
            count["open"] += 1
        elif was is Support.OUT:
            count["reachable" if now is Support.IN else "open"] += 1
        elif now is Support.OUT:
            count["lost"] += 1
        else:
            count["sharpened" if q > p + 0.12 else "weakened" if q < p - 0.12 else "kept"] += 1
    parts = {k: wilson(v, NUM_PROMPTS) for k, v in count.items()}
    was_in = [i for i, p in enumerate(before) if support(p) is Support.IN]
    still = sum(support(after[i]) is Support.IN for i in was_in)
    return Change(
        task=task,
        reachable=parts["reachable"],
        sharpened=parts["sharpened"],
        kept=parts["kept"],
        weakened=parts["weakened"],
        lost=parts["lost"],
        undetermined=parts["open"],
        retention=wilson(still, len(was_in)) if was_in else Estimate(value=None),
        before=measured(task, before).pass_at_1,
        after=measured(task, after).pass_at_1,
    )


def wave(name: str, start: float, end: float, dice: random.Random, *, steps: int = 120) -> Series:
    """A noisy approach from start to end."""
    points = []
    for step in range(1, steps + 1, 2):
        level = end + (start - end) * math.exp(-3.2 * step / steps)
        points.append((step, level + dice.gauss(0, 0.035 * abs(start - end) + 1e-4)))
    return Series(name=name, points=tuple(points))


def pieces() -> tuple[Piece, ...]:
    logprobs = (-0.02, -1.41, -0.01, -0.08, -3.12, -0.03, -0.2, -0.01)
    words = ("nine", " times", " seven", " is", " sixty", "-three", ".", "<end>")
    answer = tuple(Token(text=t, logprob=lp) for t, lp in zip(words, logprobs, strict=True))
    return (
        Piece(text="<user>", kind=Kind.TEMPLATE, producer="chat", role=Role.USER),
        Piece(text="What is 9 × 7?", kind=Kind.ENVIRONMENT, producer="products", role=Role.USER),
        Piece(text="<assistant>", kind=Kind.TEMPLATE, producer="chat", role=Role.ASSISTANT),
        Piece(
            text="".join(words),
            kind=Kind.LEARNER,
            producer="run-7f3a",
            role=Role.ASSISTANT,
            tokens=answer,
        ),
    )


def samples() -> tuple[Sample, ...]:
    guided = (
        Piece(text="Reverse: k l m n\n", kind=Kind.ENVIRONMENT, producer="reverse", role=Role.USER),
        Piece(text="n m ", kind=Kind.TEACHER, producer="expand@120", role=Role.ASSISTANT),
        Piece(text="l k", kind=Kind.LEARNER, producer="run-7f3a", role=Role.ASSISTANT),
    )
    shown = (
        Piece(
            text="Reverse: a b c d e\n", kind=Kind.EXTERNAL, producer="lab-demos", role=Role.USER
        ),
        Piece(text="e d c b a", kind=Kind.EXTERNAL, producer="lab-demos", role=Role.ASSISTANT),
    )
    return (
        Sample(task="products/97c1e4c2", stage="reshape", pieces=pieces(), reward=1.0),
        Sample(task="reverse/1b02fe91", stage="consolidate", pieces=guided, reward=0.0),
        Sample(task="reverse/aa317c08", stage="expand", pieces=shown),
    )


def times(**seconds: float) -> tuple[TimePart, ...]:
    group = {n: g for g, names in GROUPS.items() for n in names}
    return tuple(TimePart(group=group[n], name=n, seconds=s) for n, s in seconds.items())


def stages(dice: random.Random) -> tuple[StageView, ...]:
    expansion, reshaping = Effect.EXPANSION, Effect.RESHAPING
    undecided, attrition, kept = Effect.UNDETERMINED, Effect.ATTRITION, Effect.CONSOLIDATION

    def effects(*found: Effect) -> tuple[TaskEffect, ...]:
        return tuple(TaskEffect(task=t, effect=e) for t, e in zip(TASKS, found, strict=True))

    def tokens(kind: Kind, name: str, n: int) -> tuple[TokenCount, ...]:
        return (
            TokenCount(kind=kind, name=name, tokens=n),
            TokenCount(kind=Kind.ENVIRONMENT, name="task sets", tokens=n // 3 + 17),
            TokenCount(kind=Kind.TEMPLATE, name="chat", tokens=n // 11 + 5),
        )

    return (
        StageView(
            name="expand",
            method="sft",
            regime=Regime.OFF,
            interface="token targets",
            provenance="demonstrations by external:lab-demos",
            intends="expansion",
            effects=effects(undecided, undecided, undecided, expansion),
            steps=120,
            seconds=48.2,
            times=times(pack=1.2, forward=14.0, backward=29.5, optimizer=2.1, idle=0.4),
            tokens=tokens(Kind.EXTERNAL, "lab-demos", 61_440),
            series=(wave("loss", 2.9, 0.41, dice), wave("grad norm", 3.1, 0.6, dice)),
            gates=(
                GateView(
                    outcome=Outcome.PASSED, words="reverse pass@8 at least 0.50: low bound 0.71"
                ),
            ),
        ),
        StageView(
            name="reshape",
            method="grpo",
            regime=Regime.ON,
            interface="verifier reward",
            provenance="learner rollouts, groups of 8",
            intends="reshaping",
            effects=effects(undecided, reshaping, attrition, reshaping),
            steps=120,
            seconds=211.9,
            times=times(
                draw=1.1,
                prefill=6.0,
                decode=118.2,
                verify=4.4,
                reference=11.0,
                forward=22.0,
                backward=45.0,
                optimizer=2.2,
                journal=1.0,
                idle=0.3,
            ),
            tokens=tokens(Kind.LEARNER, "run-7f3a", 245_760),
            series=(
                wave("reward", 0.31, 0.74, dice),
                wave("entropy", 1.62, 0.38, dice),
                wave("KL to the input policy", 0.0, 0.085, dice),
                wave("loss", 0.02, -0.004, dice),
                wave("grad norm", 0.9, 0.35, dice),
                wave("share of zero-variance groups", 0.12, 0.44, dice),
            ),
            gates=(
                GateView(
                    outcome=Outcome.PASSED, words="products pass@1 at least 0.50: low bound 0.62"
                ),
                GateView(
                    outcome=Outcome.WARNED, words="chains may have lost 0.19 of pass@1, limit 0.10"
                ),
            ),
        ),
        StageView(
            name="prefer",
            method="dpo",
            regime=Regime.OFF,
            interface="preference pairs",
            provenance="pairs by external:lab-pairs, sampled from the base model",
            intends="reshaping",
            effects=effects(undecided, undecided, undecided, undecided),
            steps=80,
            seconds=66.0,
            tokens=tokens(Kind.EXTERNAL, "lab-pairs", 92_160),
            series=(
                wave("loss", 0.69, 0.58, dice, steps=80),
                wave("reward", 0.0, 0.31, dice, steps=80),
            ),
        ),
        StageView(
            name="consolidate",
            method="opd",
            regime=Regime.ON,
            interface="teacher targets",
            provenance="learner rollouts, graded token by token",
            intends="consolidation",
            effects=effects(kept, kept, undecided, reshaping),
            teachers=("reshape", "expand"),
            steps=60,
            seconds=97.4,
            tokens=(
                TokenCount(kind=Kind.LEARNER, name="run-7f3a", tokens=122_880),
                TokenCount(kind=Kind.TEACHER, name="expand@120", tokens=9_216),
                TokenCount(kind=Kind.ENVIRONMENT, name="task sets", tokens=30_720),
            ),
            series=(
                wave("loss", 0.5, 0.06, dice, steps=60),
                wave("entropy", 0.4, 0.33, dice, steps=60),
            ),
            gates=(GateView(outcome=Outcome.STOPPED, words="retention of chains below 0.50"),),
        ),
    )


def run_view() -> RunView:
    """The whole run."""
    dice = random.Random(7)
    table = {t: rates(t, dice) for t in TASKS}
    policies = tuple(
        PolicyView(name=name, tasks=tuple(measured(t, table[t][i]) for t in TASKS))
        for i, name in enumerate(POLICIES)
    )
    steps = [
        *[(i, j, POLICIES[j]) for i, j in pairwise(range(5))],
        (0, 4, None),
    ]
    comparisons = tuple(
        Comparison(
            before=POLICIES[i],
            after=POLICIES[j],
            stage=stage,
            changes=tuple(change(t, table[t][i], table[t][j]) for t in TASKS),
        )
        for i, j, stage in steps
    )
    maps = tuple(
        SupportMap(
            task=t,
            policies=POLICIES,
            prompts=tuple(
                PromptSupport(
                    prompt=f"{t}/{i:08x}", labels=tuple(support(row[i]) for row in table[t])
                )
                for i in range(NUM_PROMPTS)
            ),
        )
        for t in TASKS
    )
    accounts = (
        Account(stage="expand", kind=Kind.EXTERNAL, trained=58_112, discarded=3_328),
        Account(stage="expand", kind=Kind.ENVIRONMENT, trained=0, discarded=20_497),
        Account(stage="reshape", kind=Kind.LEARNER, trained=137_626, discarded=108_134),
        Account(stage="reshape", kind=Kind.ENVIRONMENT, trained=0, discarded=81_937),
        Account(stage="prefer", kind=Kind.EXTERNAL, trained=92_160, discarded=0),
        Account(stage="consolidate", kind=Kind.LEARNER, trained=122_113, discarded=767),
        Account(stage="consolidate", kind=Kind.TEACHER, trained=9_216, discarded=0),
    )
    return RunView(
        name="lab-tour",
        created="2026-02-11 14:02 UTC",
        base_model="posttrain-lab/tiny-2M-base",
        machine="2 CPU cores, 8 GB, float32",
        totals=Totals(wall_seconds=423.5, tokens_generated=368_640, tokens_trained=419_227),
        ledger=Seal(
            head="9f1c2b7e04aa51d3c6e8f00d7b9a4e2215c3d6f7a8b90c1d2e3f405162738495", verified=True
        ),
        recipe_digest="3b5d9c1e7f2a4860",
        versions=(("posttrain", "0.1.0"), ("torch", "2.9.1"), ("transformers", "5.0.0")),
        seeds=(7,),
        protocol="32 held-out prompts per task set, 64 samples each at temperature 1, "
        "threshold 0.05, 95 % intervals",
        stages=stages(dice),
        policies=policies,
        comparisons=comparisons,
        support=maps,
        accounts=accounts,
        samples=samples(),
        retention=(
            RetentionView(
                task="reverse",
                learned="expand",
                forward=Estimate(value=0.11, low=0.01, high=0.21),
                backward=Estimate(value=-0.12, low=-0.22, high=-0.02),
                forgetting=Estimate(value=0.13, low=0.03, high=0.23),
                handoff=Estimate(value=0.77, low=0.66, high=0.88),
            ),
        ),
        warnings=(
            "reshape: 44 % of the groups had equal rewards at the end and taught nothing.",
            "reverse: 5 of 32 prompts stay undetermined; draw more samples to decide them.",
        ),
    )
