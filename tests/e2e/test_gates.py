"""Gates decide on bounds and stop a run; groups without variance teach nothing and are counted."""

import json

import pytest
from safetensors.numpy import load_file
from world import grpo, listing, metrics, recipe, rows, sft, stage_folder, write_recipe

from posttrain.measure.measurement import Measurement
from posttrain.measure.passk import pass_interval


def with_gates(*gates):
    return recipe(sft(gates=list(gates)), sft("after", budget={"steps": 1}))


def gate(**options):
    return {"task": "say", **options}


def test_a_gate_that_passes(world, posttrain):
    path = write_recipe(world, with_gates(gate(at_least=0.0), gate(at_most_lost=1.0)))
    code, _, errors = posttrain("run", path, "--out", world / "out")
    assert code == 0, errors
    assert errors.count("✓ gate") == 2
    decided = [b for kind, b in rows(world / "out") if kind == "gate"]
    assert [b["passed"] for b in decided] == [True, True]


def test_a_gate_that_stops_and_stops_again(world, posttrain):
    path = write_recipe(world, with_gates(gate(at_least=1.0)))
    code, _, errors = posttrain("run", path, "--out", world / "out")
    assert code == 3
    assert "stopped by a gate: pass@1 on say: at least 1;" in errors
    assert "so stop" in errors
    assert not list((world / "out" / "stages").glob("after-*")), "a later stage ran"
    (decided,) = [b for kind, b in rows(world / "out") if kind == "gate"]
    assert decided["stage"] == "sft"
    assert not decided["passed"]

    before = listing(world / "out")
    code, _, errors = posttrain("run", path, "--out", world / "out")
    assert code == 3
    assert "so stop" in errors
    after = listing(world / "out")
    assert before["ledger.jsonl"] == after["ledger.jsonl"]


def test_a_gate_that_warns(world, posttrain):
    path = write_recipe(world, with_gates(gate(at_least=1.0, otherwise="warn")))
    code, _, errors = posttrain("run", path, "--out", world / "out")
    assert code == 0, errors
    assert "✗ gate" in errors
    assert "so warn" in errors
    assert list((world / "out" / "stages").glob("after-*/done.json"))


def test_gates_on_readings_are_decided_recorded_and_replayed(world, posttrain):
    asked = [
        gate(metric="in_share", at_least=0.0, otherwise="warn"),
        gate(metric="retention", at_least=0.0, since="input", otherwise="warn"),
        gate(metric="needed_group", at_most=1.0, otherwise="warn"),
    ]
    path = write_recipe(world, with_gates(*asked))
    code, _, errors = posttrain("run", path, "--out", world / "out")
    assert code == 0, errors
    decided = [b for kind, b in rows(world / "out") if kind == "gate"]
    assert [b["gate"]["metric"] for b in decided] == ["in_share", "retention", "needed_group"]
    assert [b["passed"] for b in decided] == [True, True, False]
    before = listing(world / "out")
    assert posttrain("run", path, "--out", world / "out")[0] == 0
    assert listing(world / "out")["ledger.jsonl"] == before["ledger.jsonl"]


@pytest.mark.parametrize(("above", "code"), [(-0.001, 0), (0.001, 3)])
def test_the_lower_bound_decides_and_not_the_middle(shared, tmp_path, posttrain, above, code):
    """The same weights, asked for a little less and a little more than their lower bound."""
    path = write_recipe(shared, recipe(sft()), "bound.yaml")
    assert posttrain("run", path, "--out", tmp_path / "out")[0] == 0
    text = (tmp_path / "out" / "measurements" / "sft.json").read_text()
    interval = pass_interval(Measurement.from_json(text).task("say"), 1, confidence=0.95)
    assert interval.low + 0.01 < interval.value, "the middle would decide otherwise"
    asked = recipe(sft(gates=[gate(at_least=interval.low + above)]))
    path = write_recipe(shared, asked, "bound.yaml")
    assert posttrain("run", path, "--out", tmp_path / "out")[0] == code


def test_a_gate_that_cannot_be_decided_is_found_before_training(world, posttrain):
    path = write_recipe(world, with_gates(gate(metric="pass@8", at_least=0.1)))
    code, _, errors = posttrain("run", path, "--out", world / "out")
    assert code == 2
    assert "stage sft: gate on pass@8, and every prompt is measured with 4 samples" in errors
    assert not (world / "out" / "stages").exists()


@pytest.mark.parametrize(("reward", "which"), [(0.0, "all_wrong"), (1.0, "all_right")])
def test_flat_groups_move_nothing_and_are_counted(world, posttrain, reward, which):
    text = f"def score(prompts, completions, **_):\n    return [{reward}] * len(completions)\n"
    (world / "reward.py").write_text(text)
    path = write_recipe(world, recipe(grpo(method={"kl_weight": 0.0})))
    code, _, errors = posttrain("run", path, "--out", world / "out")
    assert code == 0, errors
    assert "no signal 100%" in errors
    folder = stage_folder(world / "out", "grpo")
    lines = metrics(folder)
    assert len(lines) == 4
    for line in lines:
        shares = {k: line[k] for k in ("zero_variance", "all_wrong", "all_right")}
        assert shares == {"zero_variance": 1, "all_wrong": 0, "all_right": 0, which: 1}
        assert (line["loss"], line["grad_norm"]) == (0.0, 0.0)
        assert json.loads(json.dumps(line, allow_nan=False))["reward"] == reward
    before = load_file(world / "model" / "model.safetensors")
    after = load_file(folder / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].tobytes() == after[name].tobytes(), name


def test_groups_with_variance_do_move(shared, tmp_path, posttrain):
    """What the test above relies on."""
    path = write_recipe(shared, recipe(grpo(method={"kl_weight": 0.0})), "moves.yaml")
    assert posttrain("run", path, "--out", tmp_path / "out")[0] == 0
    folder = stage_folder(tmp_path / "out", "grpo")
    assert any(line["zero_variance"] < 1 for line in metrics(folder))
    before = load_file(shared / "model" / "model.safetensors")
    after = load_file(folder / "model" / "model.safetensors")
    assert any(before[n].tobytes() != after[n].tobytes() for n in before)


# --- gates that lead elsewhere -----------------------------------------------------------------


def stages_run(out):
    return sorted(p.name.rpartition("-")[0] for p in (out / "stages").iterdir())


def start_of(out, name):
    return json.loads((stage_folder(out, name) / "stage.json").read_text())["init"]


def forked(*, at_least):
    """After `sft`, `easy` when the gate passes and `hard` when it does not; `last` after both."""
    fork = gate(at_least=at_least, otherwise="branch", to="hard")
    one = {"budget": {"steps": 1}}
    return recipe(
        sft(gates=[fork]), sft("easy", then="last", **one), sft("hard", **one), sft("last", **one)
    )


@pytest.mark.parametrize(("at_least", "way"), [(0.0, "easy"), (1.0, "hard")])
def test_a_branch_is_taken_again_when_the_run_goes_on(world, posttrain, at_least, way):
    path, out = write_recipe(world, forked(at_least=at_least)), world / "out"
    assert posttrain("run", path, "--out", out)[0] == 0
    assert stages_run(out) == sorted(["sft", way, "last"])
    assert start_of(out, "last") == way
    before = listing(out)
    code, _, errors = posttrain("run", path, "--out", out)
    assert code == 0, errors
    after = listing(out)
    same = [n for n in before if n not in ("lock", "recipe.json", "report.html")]
    assert {n: before[n] for n in same} == {n: after[n] for n in same}


def test_the_plan_shows_every_way(world, posttrain):
    code, text, errors = posttrain("plan", write_recipe(world, forked(at_least=0.5)))
    assert code == 0, errors
    assert "at least 0.5, else branch to hard" in text
    assert "sft (from base) → hard (from sft) → last (from hard)" in text


def test_a_way_that_cannot_work_is_found_before_training(world, posttrain):
    """`last` compares with `easy`, which the other way leaves out."""
    content = forked(at_least=0.5)
    content["stages"][-1]["gates"] = [gate(at_most_lost=0.1, since="easy")]
    code, _, errors = posttrain("run", write_recipe(world, content), "--out", world / "out")
    assert code == 2
    assert "gate since 'easy', which is not measured before it" in errors
    assert not (world / "out" / "stages").exists()


def test_what_did_harm_is_left_aside(world, posttrain):
    """The next stage starts from what the harmful one started from, and so does the result."""
    back = gate(at_least_gained=1.0, since="input", otherwise="roll_back")
    stages = [sft(), sft("harm", gates=[back]), sft("after", gates=[back], budget={"steps": 1})]
    path, out = write_recipe(world, recipe(*stages)), world / "out"
    code, _, errors = posttrain("run", path, "--out", out)
    assert code == 0, errors
    assert errors.count("so roll back") == 2
    assert start_of(out, "harm") == start_of(out, "after") == "sft"
    page = (out / "report.html").read_text()
    assert "rolled back" in page
    before = listing(out)["ledger.jsonl"]
    assert posttrain("run", path, "--out", out)[0] == 0
    assert listing(out)["ledger.jsonl"] == before


def test_a_stage_can_be_the_last(world, posttrain):
    path = write_recipe(world, recipe(sft(then="end"), sft("never")))
    assert posttrain("run", path, "--out", world / "out")[0] == 0
    assert stages_run(world / "out") == ["sft"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"then": "sft"}, "a later stage: after, end"),
        ({"gates": [gate(at_least=0.1, otherwise="branch", to="aftr")]}, "after"),
        ({"gates": [gate(at_most_lost=0.1, since="after")]}, "since 'after'"),
        ({"gates": [gate(metric="zero_varance@2", at_most=0.1)]}, "zero_variance"),
        ({"gates": [gate(metric="best@5", at_most=0.1)]}, "measured with 4 samples"),
    ],
)
def test_ways_that_make_no_sense(world, posttrain, change, word):
    path = write_recipe(world, recipe(sft(**change), sft("after")))
    code, _, errors = posttrain("run", path, "--out", world / "out")
    assert code == 2
    assert word in errors
