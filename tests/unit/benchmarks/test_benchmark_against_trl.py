"""The parts of the side-by-side benchmark that are arithmetic: counts, spreads, the page."""

from __future__ import annotations

import io
import json
import mmap
from itertools import pairwise

import pytest
from against_trl import flops, page, reward, spread, worker
from against_trl.flops import Tree, forward
from against_trl.plan import LOADS, SIZES, SPEED_BARS, Bar, Dims, Load, Ours, Theirs
from against_trl.results import (
    Conditions,
    Exact,
    Machine,
    Measured,
    Pairs,
    Point,
    Rate,
    Results,
    load_results,
    save_results,
)

SMALL = Dims(name="s", layers=2, hidden=3, inner=5, heads=4, kv_heads=2, head_size=7, vocab=11)


# --- operations ------------------------------------------------------------------------------


def enumerated(dims: Dims, trees: list[Tree]) -> int:
    """The same count, one token, one pair and one matrix at a time."""
    matrices = [
        (dims.hidden, dims.heads * dims.head_size),  # queries
        (dims.hidden, dims.kv_heads * dims.head_size),  # keys
        (dims.hidden, dims.kv_heads * dims.head_size),  # values
        (dims.heads * dims.head_size, dims.hidden),  # output
        (dims.hidden, dims.inner),
        (dims.hidden, dims.inner),
        (dims.inner, dims.hidden),
    ]
    total = 0
    for tree in trees:
        # A node is (branch, place); every branch's first token is predicted by the prompt's last.
        nodes = [(None, i) for i in range(tree.prompt)]
        nodes += [(b, i) for b, size in enumerate(tree.branches) for i in range(size - 1)]
        heads = {(None, tree.prompt - 1)} if tree.prompt else set()
        heads |= {n for n in nodes if n[0] is not None}
        for branch, place in nodes:
            reads = [
                n
                for n in nodes
                if (n[0] == branch and n[1] <= place) or (branch is not None and n[0] is None)
            ]
            for _ in range(dims.layers):
                total += sum(2 * rows * columns for rows, columns in matrices)
                # A score and a weighted value per key, head and dimension.
                total += len(reads) * dims.heads * dims.head_size * 2 * 2
        total += len(heads) * 2 * dims.hidden * dims.vocab
    return total


@pytest.mark.parametrize(
    "trees",
    [
        [Tree(5, (3, 4))],
        [Tree(1, (1,))],
        [Tree(0, (6,))],
        [Tree(4, (2, 2, 2)), Tree(2, (5,))],
    ],
)
def test_operations_are_those_counted_one_by_one(trees):
    assert forward(SMALL, trees) == enumerated(SMALL, trees)


def test_sharing_a_prompt_saves_exactly_its_own_cost():
    together = forward(SMALL, [Tree(9, (4, 4, 4))])
    apart = 3 * forward(SMALL, [Tree(9, (4,))])
    prompt, head = forward(SMALL, [Tree(9, ())]), 2 * SMALL.hidden * SMALL.vocab
    assert apart - together == 2 * (prompt + head)
    assert Tree(9, ()).predictions == 0  # nothing follows that could be predicted


def test_a_step_is_so_many_forward_passes():
    trees = [Tree(5, (3, 4))]
    once = forward(SMALL, trees)
    counted = {work: flops.step(work, SMALL, trees) // once for work in LOADS}
    # 3 to train; 1 to generate, 1 for a reference, 1 for a teacher.
    assert counted == {"sft": 3, "dpo": 4, "grpo": 4, "opd": 5, "opd_distinct": 5}


def test_generated_trees_are_the_load():
    trees = flops.generated(Load(groups=2, group_size=3, prompt_tokens=10, completion_tokens=4))
    assert trees == [Tree(10, (4, 4, 4))] * 2
    assert sum(t.tokens for t in trees) == 2 * (10 + 3 * 3)


def test_material_is_counted_as_long_as_it_is(tmp_path):
    rows = {
        "documents": [{"text": "w3 w4 w5"}, {"text": "w3"}],
        "pairs": [{"prompt": "w3 w4", "chosen": " w5", "rejected": " w5 w6"}],
        "prompts": [{"prompt": "w3 w4"}, {"prompt": "w3"}, {"prompt": "kept for measuring"}],
    }
    for name, kept in rows.items():
        lines = "".join(json.dumps(r) + "\n" for r in kept)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    load = Load(groups=2, group_size=3, completion_tokens=4)
    documents = flops.trees_of("sft", tmp_path, load)
    assert documents == [Tree(0, (4,)), Tree(0, (2,))]
    assert flops.units("sft", documents, load) == 6
    # Each answer is followed by an end token.
    pairs = flops.trees_of("dpo", tmp_path, load)
    assert pairs == [Tree(2, (2, 3))]
    assert flops.units("dpo", pairs, load) == 1
    prompts = flops.trees_of("grpo", tmp_path, load)
    assert prompts == [Tree(2, (4, 4, 4)), Tree(1, (4, 4, 4))]
    assert flops.units("grpo", prompts, load) == 1


def test_sizes_are_about_what_they_are_called():
    for name, millions in {"1m": 1.3, "7m": 7, "40m": 40}.items():
        assert SIZES[name].weights / 1e6 == pytest.approx(millions, rel=0.05)


# --- spreads ---------------------------------------------------------------------------------


def test_a_spread_is_in_order_and_does_not_depend_on_it():
    found = spread.Spread.of([5.0, 1.0, 3.0, 4.0, 2.0])
    ordered = [found.low, found.lower, found.median, found.upper, found.high]
    assert ordered == [1, 2, 3, 4, 5]
    assert all(a <= b for a, b in pairwise(ordered))
    assert found == spread.Spread.of([1.0, 2.0, 3.0, 4.0, 5.0])
    with pytest.raises(ValueError, match="no values"):
        spread.Spread.of([])


def test_ratios_are_of_neighbours():
    assert spread.ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="argument 2"):
        spread.ratios([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("value", "bar", "said"),
    [
        (2.99, Bar(least=3, hope=5), "not met"),
        (3.0, Bar(least=3, hope=5), "met"),
        (5.0, Bar(least=3, hope=5), "hoped for"),
        (0.51, Bar(least=0.5, hope=0.35, most=True), "not met"),
        (0.5, Bar(least=0.5, hope=0.35, most=True), "met"),
        (0.35, Bar(least=0.5, hope=0.35, most=True), "hoped for"),
    ],
)
def test_a_bar_is_read_off_the_right_side(value, bar, said):
    assert spread.judge(value, bar) == said
    assert spread.verdict(spread.Spread.of([value] * 5), bar) == said
    assert spread.verdict(spread.Spread.of([value] * 4), bar) == "too few pairs"


# --- the page --------------------------------------------------------------------------------

QUIET = Conditions(when="2026-01-02 03:04", commit="abc", load=2.1, others=0.01)


def measured(seconds, *, peak, units=1.0, draw=1.0):
    count = len(seconds)
    return Measured(
        seconds=seconds,
        cpu=[2 * s for s in seconds],
        units=[units] * count,
        parts={
            "decode": [draw] * count,
            "verify": [0.25] * count,
            "reference": [0.5] * count,
            "generate": [3.0] * count,
        },
        imported=100 * 2**20,
        ready=110 * 2**20,
        peak=peak * 2**20,
    )


def results(**parts) -> Results:
    machine = Machine(
        processor="Abacus", cores=2, memory=2**33, threads=2, system="Linux", versions={"trl": "1"}
    )
    return Results(machine=machine, **parts)


def pair(*, ours, trl, conditions=QUIET, work="grpo", size="7m"):
    return Pairs(
        work=work,
        size=size,
        load=LOADS[work],
        settings=Theirs(rows=8),
        own=Ours(),
        operations=1.2e9,
        ours=ours,
        trl=trl,
        conditions=conditions,
    )


def row(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def five():
    """Five pairs: TRL takes 8 to 12 s where ours takes 2 s; 300 MiB against 1,000 MiB."""
    ours = measured([2.0] * 5, peak=300)
    return pair(ours=ours, trl=measured([8.0, 9.0, 10.0, 11.0, 12.0], peak=1000))


def test_speed_and_memory_are_what_was_measured(five):
    text = page.page(results(pairs={"grpo/7m": five}))
    speed = row(text, "| GRPO, steps/s | 7m")
    assert speed[2:7] == ["5", "0.5", "0.1", "5.0 [4.0, 6.0]", "5.0 [4.0, 6.0]"]
    assert speed[7:] == ["≥ 4 (6)", "met"]
    memory = row(text, "| GRPO | 7m | 300")
    assert memory[2:] == ["300", "1000", "0.30", "200", "900", "0.22", "≤ 0.5 (0.35)", "hoped for"]
    assert "not quiet" not in text


def test_the_limit_is_operations_over_rate_over_time(five):
    rate = Rate(size="7m", per_second=1e9, best_shape=0.0, conditions=QUIET)
    text = page.page(results(pairs={"grpo/7m": five}, rates={"7m": rate}))
    # 1.2 s at the limit; two in ours, ten in TRL's.
    limit = ["1.2", "1", "1.2", "60%", "12%", "8.3", "≥ 45% (65%)", "met"]
    assert row(text, "| GRPO | 7m | 1.2 ")[2:] == limit


def test_the_limit_of_sft_is_for_equally_many_tokens():
    """Steps of TRL that hold twice the tokens are not half as good."""
    ours = measured([2.0] * 5, peak=300, units=100)
    trl = measured([8.0] * 5, peak=300, units=200)
    rate = Rate(size="7m", per_second=1.2e11, best_shape=0.0, conditions=QUIET)
    entry = pair(ours=ours, trl=trl, work="sft")
    text = page.page(results(pairs={"sft/7m": entry}, rates={"7m": rate}))
    # 10 ms per token at the limit; 20 ms in ours, 40 ms in TRL's.
    assert row(text, "| SFT | 7m | 1.2e+03 ")[4:7] == ["10", "50%", "25%"]


def test_where_the_time_goes_adds_up_what_belongs_together(five):
    text = page.page(results(pairs={"grpo/7m": five}))
    where = row(text, "| GRPO | 7m | – ")
    # prefill, decode, judging (rewards and references), then what was not measured
    assert where[2:] == ["–", "1.00", "0.75", "–", "–", "–", "–", "–", "3.00", "10.00"]


def test_a_disturbed_machine_is_said_first(five):
    busy = Conditions(when="2026-01-02 03:04", commit="abc", load=9.0, others=0.4)
    entry = pair(ours=five.ours, trl=five.trl, conditions=busy)
    text = page.page(results(pairs={"grpo/7m": entry}))
    lines = [line for line in text.splitlines() if line]
    assert lines[2].startswith("> **The machine was not quiet.** In 1 of 1 entries")
    assert "40%" in lines[2]


def point(series, value, *, seconds, operations):
    return Point(
        series=series,
        value=value,
        size="7m",
        load=Load(groups=2),
        seconds=[seconds] * 3,
        cpu=[seconds] * 3,
        draw=[seconds / 4] * 3,
        operations=operations,
        conditions=QUIET,
    )


def test_growth_is_over_the_smallest_of_its_series():
    points = [
        point("prompt", 128, seconds=3.0, operations=80),
        point("prompt", 32, seconds=2.0, operations=40),
        point("group size, prompt 512, completion 32", 8, seconds=2.0, operations=10),
        point("group size, prompt 512, completion 32", 32, seconds=3.0, operations=20),
    ]
    text = page.page(results(points={f"{p.series}/{p.value}": p for p in points}))
    assert row(text, "| prompt | 128")[2:] == ["3.00", "0.75", "1.50", "2.00", "1.50"]
    assert "1.50× for the step, 1.50× for generation alone (bar ≤ 1.6 (1.3): met)" in text
    assert "operations grow 2.00×" in text


def test_a_gradient_that_differs_is_not_met():
    cases = [
        Exact(case="dpo", size="1m", loss_ours=1, loss_trl=1, loss_gap=0.0, gradient_gap=gap)
        for gap in (9e-5, 2e-4)
    ]
    for case, said in zip(cases, ("met", "not met"), strict=True):
        text = page.page(results(exact={"dpo/1m": case}))
        assert row(text, "| dpo | 1m")[-1] == said


def test_sections_without_results_are_left_out():
    text = page.page(results())
    assert "## " not in text
    assert "Abacus" in text


def test_every_speed_bar_is_the_issues():
    assert {work: (b.least, b.hope) for work, b in SPEED_BARS.items()} == {
        "sft": (3, 5),
        "dpo": (4, 6),
        "grpo": (4, 6),
        "opd": (4, 6),
    }


# --- files, reward, gate ---------------------------------------------------------------------


def test_results_go_on_only_on_the_same_machine(tmp_path, five):
    kept = results(pairs={"grpo/7m": five})
    save_results(tmp_path / "r.json", kept)
    again = load_results(tmp_path / "r.json", machine=kept.machine)
    assert again == kept
    other = Machine(
        processor="Abacus", cores=4, memory=2**33, threads=2, system="Linux", versions={"trl": "1"}
    )
    assert load_results(tmp_path / "r.json", machine=other).pairs == {}
    older = json.loads((tmp_path / "r.json").read_text())
    del older["pairs"]["grpo/7m"]["operations"]
    (tmp_path / "r.json").write_text(json.dumps(older))
    assert load_results(tmp_path / "r.json", machine=kept.machine).pairs == {}


def test_the_reward_is_the_share_of_even_words():
    assert reward.even_words(["", ""], ["w10 w11 w12", ""]) == [pytest.approx(2 / 3), 0.0]


def test_the_gate_measures_between_command_and_report():
    replies = io.StringIO()
    gate = worker.Gate(replies, io.StringIO("step\nstep\nstop\n"))
    gate.open()
    gate.step_done({"tokens": 3.0})
    with pytest.raises(worker.Stopped):
        gate.step_done({"tokens": 4.0})
    ready, first, second = map(json.loads, replies.getvalue().splitlines())
    assert ready["ready"] > 2**20
    assert [first["parts"]["tokens"], second["parts"]["tokens"]] == [3.0, 4.0]
    assert 0 <= first["seconds"] < 5


def test_the_high_water_mark_keeps_what_was_given_back():
    # mapped, not allocated: an allocator may keep what was freed, and posttrain asks it to
    block = mmap.mmap(-1, 64 * 2**20)
    block.write(b"x" * len(block))
    held = worker.resident()
    block.close()
    now, peak = worker.resident()
    slack = 2**20  # the kernel keeps these counters per processor, and adds them up roughly
    assert now < held[0] - 32 * 2**20
    assert peak > held[0] - slack
