"""A made-up but coherent run to draw: 4 stages, 5 policies, 4 task sets of 32 prompts."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from posttrain import Dataset, Grpo, Opd, Sft, method
from posttrain.core.proofs import Proof, Subject
from posttrain.core.provenance import Kind, Producer, Role, Span
from posttrain.core.trajectory import Trajectory
from posttrain.measure.attribution import Attribution, ChangeKind, MeasuredRole, PolicyChange
from posttrain.measure.bootstrap import Interval
from posttrain.measure.gates import Gate
from posttrain.measure.passk import Curve
from posttrain.measure.profile import Profile
from posttrain.measure.reading import Reading
from posttrain.measure.retained import Retained
from posttrain.measure.spec import Measure
from posttrain.measure.support import Label
from posttrain.recipe import Budget, Recipe, Stage
from posttrain.report.view import PolicyReport, RunReport, Sample, StageReport
from posttrain.run.history import GateRecord, Metrics, StageHistory
from posttrain.run.ledger import Record, RecordKind, Verified
from posttrain.run.plan import PlannedStage
from posttrain.run.stage_folder import StageResult
from posttrain.run.store import ProducerTokens, UseRole

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
HEAD = "9f1c2b7e04aa51d3c6e8f00d7b9a4e2215c3d6f7a8b90c1d2e3f405162738495"


# --- domain values from few numbers, for tests too --------------------------------------------


def interval(value: float, low: float | None = None, high: float | None = None) -> Interval:
    """An interval over prompts; without bounds, one that says nothing."""
    return Interval(
        value=value,
        low=-math.inf if low is None else low,
        high=math.inf if high is None else high,
        num_prompts=NUM_PROMPTS,
        seed=0,
        confidence=0.95,
    )


ZERO = interval(0.0, 0.0, 0.0)


def curve_of(task: str, rates: dict[int, Interval], *, prompts: int = 4, samples: int = 8) -> Curve:
    """pass@k by k."""
    return Curve(
        task=task,
        ks=tuple(rates),
        value=tuple(i.value for i in rates.values()),
        low=tuple(i.low for i in rates.values()),
        high=tuple(i.high for i in rates.values()),
        num_prompts=prompts,
        num_samples=samples,
        confidence=0.95,
        seed=0,
    )


def profile_of(task: str, curve: Curve, labels: Sequence[Label] = ()) -> Profile:
    """A policy on a task set, its drift not measured."""
    keys = tuple(f"{task}/{i:08x}" for i in range(len(labels)))
    return Profile(
        task=task,
        prompts=keys,
        curve=curve,
        labels=tuple(labels),
        kl_base=None,
        entropy=None,
        tokens=None,
    )


def attribution(
    task: str,
    parts: dict[ChangeKind, Interval],
    *,
    before: Interval = ZERO,
    after: Interval = ZERO,
    retention: Interval | None = None,
) -> Attribution:
    """A change whose other parts are zero. What no page shows is zero as well."""
    return Attribution(
        task=task,
        before=before,
        after=after,
        change=ZERO,
        parts={p: parts.get(p, ZERO) for p in ChangeKind},
        undetermined_gain=parts.get(ChangeKind.UNDETERMINED, ZERO),
        undetermined_loss=ZERO,
        gained=ZERO,
        gone=ZERO,
        balance=ZERO,
        retention=retention,
        epsilon=0.05,
        confidence=0.95,
    )


def planned(spec: Stage, init: str) -> PlannedStage:
    return PlannedStage(
        spec=spec, composition=spec.method.compose(), init=init, inputs={}, identity="0" * 64
    )


# --- what was measured ------------------------------------------------------------------------


def wilson(hits: float, n: int) -> Interval:
    """A share with its 95 % Wilson interval."""
    p, z = hits / n, 1.96
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return interval(p, max(0.0, centre - half), min(1.0, centre + half))


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


def support(rate: float) -> Label:
    if rate >= 0.06:
        return Label.IN
    return Label.OUT if rate < 0.015 else Label.UNDETERMINED


def measured(task: str, row: list[float]) -> Profile:
    points = {}
    for k in KS:
        values = [1 - (1 - p) ** k for p in row]
        mean = sum(values) / len(values)
        sd = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
        half = 1.96 * sd / math.sqrt(len(values))
        points[k] = interval(mean, max(mean - half, 0.0), min(mean + half + 0.005, 1.0))
    curve = curve_of(task, points, prompts=NUM_PROMPTS, samples=NUM_SAMPLES)
    return profile_of(task, curve, [support(rate) for rate in row])


def change(task: str, before: list[float], after: list[float]) -> Attribution:
    """Shares of prompts by what happened to them."""
    count = dict.fromkeys(ChangeKind, 0)
    for p, q in zip(before, after, strict=True):
        was, now = support(p), support(q)
        if Label.UNDETERMINED in (was, now):
            count[ChangeKind.UNDETERMINED] += 1
        elif was is Label.OUT:
            count[ChangeKind.NEWLY_REACHABLE if now is Label.IN else ChangeKind.UNDETERMINED] += 1
        elif now is Label.OUT:
            count[ChangeKind.LOST] += 1
        else:
            rose, fell = q > p + 0.12, q < p - 0.12
            count[
                ChangeKind.SHARPENED if rose else ChangeKind.WEAKENED if fell else ChangeKind.KEPT
            ] += 1
    was_in = [i for i, p in enumerate(before) if support(p) is Label.IN]
    still = sum(support(after[i]) is Label.IN for i in was_in)
    return attribution(
        task,
        {part: wilson(n, NUM_PROMPTS) for part, n in count.items()},
        before=measured(task, before).curve.at(1),
        after=measured(task, after).curve.at(1),
        retention=wilson(still, len(was_in)) if was_in else None,
    )


# --- what the stages wrote --------------------------------------------------------------------


def wave(start: float, end: float, dice: random.Random, *, steps: int = 120) -> dict[int, float]:
    """A noisy approach from start to end, at every second step."""
    points = {}
    for step in range(1, steps + 1, 2):
        level = end + (start - end) * math.exp(-3.2 * step / steps)
        points[step] = level + dice.gauss(0, 0.035 * abs(start - end) + 1e-4)
    return points


def lines(
    steps: int, waves: dict[str, dict[int, float]], seconds: dict[str, float]
) -> tuple[Metrics, ...]:
    """One line of metrics per step; all the time is counted to the first."""
    rows: list[dict[str, float]] = [{"step": i + 1} for i in range(steps)]
    rows[0] |= {f"seconds/{name}": s for name, s in seconds.items()}
    for name, points in waves.items():
        for step, value in points.items():
            rows[step - 1][name] = value
    return tuple(rows)


def used(stage: str, kind: Kind, producer: str, trained: int, discarded: int = 0) -> tuple:
    """Tokens of one author, by what was done with them; sorted as the store sorts them."""
    both = ((UseRole.DISCARDED, discarded), (UseRole.TRAIN, trained))
    return tuple(
        ProducerTokens(
            stage=stage,
            kind=kind,
            producer=producer,
            role=role,
            num_uses=n // 8,
            num_trajectories=n // 8,
            prompt_tokens=n // 3,
            completion_tokens=n,
        )
        for role, n in both
        if n
    )


def decided(words: str, *, passed: bool = True, otherwise: str = "stop") -> GateRecord:
    gate = Gate(task="products", at_least=0.5, otherwise=otherwise)
    return GateRecord(gate=gate, passed=passed, words=words)


def span(text: str, kind: Kind, producer: str, role: Role, logprobs=None) -> Span:
    """One token, or as many as there are log-probs."""
    return Span(
        length=1 if logprobs is None else len(logprobs),
        role=role,
        producer=Producer(kind=kind, name=producer),
        versions=(1, 1) if kind is Kind.LEARNER else None,
        logprobs=None if logprobs is None else np.array(logprobs, np.float32),
    )


def sample(task: str, *parts: tuple[Span, tuple[str, ...]], reward: float | None = None) -> Sample:
    texts = tuple(text for _, words in parts for text in words)
    trajectory = Trajectory(
        task=task,
        tokens=np.arange(len(texts), dtype=np.int32),
        prompt_length=1,
        spans=tuple(s for s, _ in parts),
    )
    return Sample(trajectory=trajectory, texts=texts, reward=reward)


def one(text: str, kind: Kind, producer: str, role: Role) -> tuple[Span, tuple[str, ...]]:
    return span(text, kind, producer, role), (text,)


def samples() -> dict[str, tuple[Sample, ...]]:
    """By stage."""
    logprobs = (-0.02, -1.41, -0.01, -0.08, -3.12, -0.03, -0.2, -0.01)
    words = ("nine", " times", " seven", " is", " sixty", "-three", ".", "<end>")
    answer = span("", Kind.LEARNER, "run-7f3a", Role.ASSISTANT, logprobs), words
    return {
        "reshape": (
            sample(
                "products/97c1e4c2",
                one("<user>", Kind.TEMPLATE, "chat", Role.USER),
                one("What is 9 × 7?", Kind.ENVIRONMENT, "products", Role.USER),
                one("<assistant>", Kind.TEMPLATE, "chat", Role.ASSISTANT),
                answer,
                reward=1.0,
            ),
        ),
        "consolidate": (
            sample(
                "reverse/1b02fe91",
                one("Reverse: k l m n\n", Kind.ENVIRONMENT, "reverse", Role.USER),
                one("n m ", Kind.TEACHER, "expand@120", Role.ASSISTANT),
                one("l k", Kind.LEARNER, "run-7f3a", Role.ASSISTANT),
                reward=0.0,
            ),
        ),
        "expand": (
            sample(
                "reverse/aa317c08",
                one("Reverse: a b c d e\n", Kind.EXTERNAL, "lab-demos", Role.USER),
                one("e d c b a", Kind.EXTERNAL, "lab-demos", Role.ASSISTANT),
            ),
        ),
    }


def records(dice: random.Random) -> tuple[StageHistory, ...]:
    return (
        StageHistory(
            planned=planned(
                Stage(
                    name="expand",
                    intends="expansion",
                    method=Sft(data=Dataset(path="demos.jsonl", name="lab-demos")),
                    budget=Budget(steps=120),
                ),
                "base",
            ),
            metrics=lines(
                120,
                {"loss": wave(2.9, 0.41, dice), "grad_norm": wave(3.1, 0.6, dice)},
                {"pack": 1.2, "forward": 14.0, "backward": 29.5, "optimizer": 2.1, "idle": 0.4},
            ),
            done=StageResult(steps=120, seconds=48.2, digest="00"),
            tokens=(
                *used("expand", Kind.ENVIRONMENT, "task sets", 0, 20_497),
                *used("expand", Kind.EXTERNAL, "lab-demos", 58_112, 3_328),
            ),
            gates=(decided("reverse pass@8 at least 0.50: low bound 0.71"),),
        ),
        StageHistory(
            planned=planned(
                Stage(
                    name="reshape",
                    intends="reshaping",
                    method=Grpo(tasks=("products",)),
                    budget=Budget(steps=120),
                ),
                "expand",
            ),
            metrics=lines(
                120,
                {
                    "reward": wave(0.31, 0.74, dice),
                    "entropy": wave(1.62, 0.38, dice),
                    "low_variance_kl/kl": wave(0.0, 0.085, dice),
                    "loss": wave(0.02, -0.004, dice),
                    "grad_norm": wave(0.9, 0.35, dice),
                    "zero_variance": wave(0.12, 0.44, dice),
                    "tokens": {1: 512, 2: 0, 3: 0},
                },
                {
                    "draw": 1.1,
                    "prefill": 6.0,
                    "decode": 118.2,
                    "verify": 4.4,
                    "reference": 11.0,
                    "forward": 22.0,
                    "backward": 45.0,
                    "optimizer": 2.2,
                    "journal": 1.0,
                    "idle": 0.3,
                },
            ),
            done=StageResult(steps=120, seconds=211.9, digest="01"),
            tokens=(
                *used("reshape", Kind.ENVIRONMENT, "task sets", 0, 81_937),
                *used("reshape", Kind.LEARNER, "run-7f3a", 137_626, 108_134),
                *used("reshape", Kind.TEMPLATE, "chat", 22_346),
            ),
            gates=(
                decided("products pass@1 at least 0.50: low bound 0.62"),
                decided(
                    "chains may have lost 0.19 of pass@1, limit 0.10",
                    passed=False,
                    otherwise="warn",
                ),
            ),
        ),
        StageHistory(
            planned=planned(
                Stage(
                    name="prefer",
                    intends="reshaping",
                    method=method("dpo", data=Dataset(path="pairs.jsonl", name="lab-pairs")),
                    budget=Budget(steps=80),
                ),
                "reshape",
            ),
            metrics=lines(
                80,
                {
                    "loss": wave(0.69, 0.58, dice, steps=80),
                    "accuracy": wave(0.5, 0.81, dice, steps=80),
                },
                {},
            ),
            done=StageResult(steps=80, seconds=66.0, digest="02"),
            tokens=used("prefer", Kind.EXTERNAL, "lab-pairs", 92_160),
        ),
        StageHistory(
            planned=planned(
                Stage(
                    name="consolidate",
                    intends="consolidation",
                    method=Opd(tasks=TASKS, teachers={"products": "reshape", "*": "expand"}),
                    budget=Budget(steps=60),
                ),
                "prefer",
            ),
            metrics=lines(
                60,
                {
                    "loss": wave(0.5, 0.06, dice, steps=60),
                    "entropy": wave(0.4, 0.33, dice, steps=60),
                },
                {},
            ),
            done=StageResult(steps=60, seconds=97.4, digest="03"),
            tokens=(
                *used("consolidate", Kind.LEARNER, "run-7f3a", 122_113, 767),
                *used("consolidate", Kind.TEACHER, "expand@120", 9_216),
            ),
            gates=(decided("retention of chains below 0.50", passed=False),),
        ),
    )


def roles() -> tuple[tuple[MeasuredRole, ...], ...]:
    """By stage and task set."""
    expansion, reshaping = MeasuredRole.EXPANSION, MeasuredRole.RESHAPING
    undecided, attrition = MeasuredRole.UNDETERMINED, MeasuredRole.ATTRITION
    kept = MeasuredRole.CONSOLIDATION
    return (
        (undecided, undecided, undecided, expansion),
        (undecided, reshaping, attrition, reshaping),
        (undecided, undecided, undecided, undecided),
        (kept, kept, undecided, reshaping),
    )


# --- the whole --------------------------------------------------------------------------------


def retained() -> Retained:
    """Of a task set that its own stage was not the last to train on."""

    def reading(name: str, value: float) -> Reading:
        low, high = value - 0.1, value + 0.11
        return Reading(name, "reverse", value, low, high, NUM_PROMPTS, NUM_SAMPLES, "made up")

    return Retained(
        task="reverse",
        learned="expand",
        forward=reading("forward_transfer", 0.11),
        backward=reading("backward_transfer", -0.12),
        forgetting=reading("forgetting", 0.13),
        handoff=reading("handoff", 0.77),
    )


def run_report() -> RunReport:
    """The whole run."""
    dice = random.Random(7)
    table = {t: rates(t, dice) for t in TASKS}

    def compared(i: int, j: int) -> PolicyChange:
        tasks = tuple(change(t, table[t][i], table[t][j]) for t in TASKS)
        return PolicyChange(before=POLICIES[i], after=POLICIES[j], tasks=tasks, support=())

    seen = samples()
    stages = tuple(
        StageReport(
            record=record,
            roles=tuple(zip(TASKS, found, strict=True)),
            change=compared(i, j),
            samples=seen.get(record.name, ()),
        )
        for record, found, (i, j) in zip(records(dice), roles(), pairwise(range(5)), strict=True)
    )
    versions = {"posttrain": "0.1.0", "torch": "2.9.1", "transformers": "5.0.0"}
    return RunReport(
        recipe=Recipe(
            name="lab-tour",
            model="posttrain-lab/tiny-2M-base",
            seed=7,
            measure=Measure(samples=NUM_SAMPLES, epsilon=0.05),
        ),
        machine="2 CPU cores, 8 GB, float32",
        proofs=(
            Proof(subject=Subject.LOAD, of="base", words="146 tensors, none missing"),
            Proof(subject=Subject.EXPORT, of="expand", words="reloaded, the same log-probs"),
        ),
        began=Record(
            n=1,
            time="2026-02-11 14:02 UTC",
            kind=RecordKind.RUN,
            body={"libraries": versions},
            prev="0" * 64,
            digest="1" * 64,
        ),
        ledger=Verified(num_records=40, head=HEAD, kinds={RecordKind.RUN: 1}),
        stages=stages,
        policies=tuple(
            PolicyReport(name=name, tasks=tuple(measured(t, table[t][i]) for t in TASKS))
            for i, name in enumerate(POLICIES)
        ),
        whole=compared(0, 4),
        retained=(retained(),),
        tokens_measured=100_000,
    )
