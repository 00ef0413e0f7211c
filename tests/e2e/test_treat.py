"""`posttrain treat` on the lab: it learns, counts what it spends, and goes on where it was."""

import json
from pathlib import Path

import msgspec
import pyarrow.parquet as pq
import pytest
import yaml
from world import listing, unnamed

from posttrain import api
from posttrain.core import config
from posttrain.core.errors import Interrupted, RunLocked
from posttrain.diagnosis.card import Diagnosis
from posttrain.diagnosis.prescribe import Supplies
from posttrain.lab.settings import PRODUCTS, REVERSE
from posttrain.lab.tour import ANSWER, BASE
from posttrain.measure.measurement import Measurement
from posttrain.measure.spec import Measure
from posttrain.recipe import Recipe
from posttrain.run.folder import RunFolder

BUDGET = 60_000
GROUND = Recipe(
    name="treated",
    model=str(BASE),
    tasks={"products": PRODUCTS.tasks},
    measure=Measure(samples=64, max_new_tokens=ANSWER, seed=7),
    threads=1,
)


def chart(out: Path) -> dict:
    return json.loads((out / "treat.json").read_text())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("treat")
    return api.treat(GROUND, out=out, budget=BUDGET)


def test_it_finds_the_choice_and_improves_it(done):
    first = done.rounds[0]
    assert (first.bottleneck, first.treatment) == ("choice", "reinforce")
    assert first.helped
    assert first.kept
    rate = [float(m.task("products").successes.mean()) for m in (done.before, done.after)]
    assert rate[1] > rate[0] + 0.2
    assert (done.model / "config.json").is_file()
    assert done.policy == first.stage.name or done.policy in {r.stage.name for r in done.rounds}


def test_it_counts_every_token_and_keeps_to_its_budget(done):
    """The account, read off the files independently."""
    looking = sum(
        int(Measurement.from_json(p.read_text()).task("products").lengths.sum())
        for p in (done.out / "measurements").glob("*.json")
    )
    looking += sum(
        Diagnosis.from_json(p.read_text()).cost.sampled_tokens
        for p in (done.out / "diagnoses").glob("*.json")
    )
    sampled = sum(
        sum(pq.read_table(p)["completion_tokens"].to_pylist())
        for p in (done.out / "stages").glob("*/shards/*.uses.parquet")
    )
    lines = [
        json.loads(line)
        for p in (done.out / "stages").glob("*/metrics.jsonl")
        for line in p.read_text().splitlines()
    ]
    assert (done.spent.looking, done.spent.sampled) == (looking, sampled)
    assert done.spent.trained == sum(line["tokens"] for line in lines)
    assert 0.5 * BUDGET < done.spent.total <= 1.1 * BUDGET  # lengths are estimated beforehand


def test_every_decision_is_in_the_ledger_once(done):
    rows = [json.loads(r) for r in (done.out / "ledger.jsonl").read_text().splitlines()]
    decisions = [r["body"] for r in rows if r["kind"] == "stage"]
    assert [d["event"] for d in decisions] == [
        *("kept" if r.kept else "rolled back" for r in done.rounds),
        "treatment ended",
    ]
    again = api.treat(GROUND, out=done.out, budget=BUDGET)
    assert again.rounds == done.rounds
    after = (done.out / "ledger.jsonl").read_text().splitlines()
    assert len(after) == len(rows), "a finished treatment is not treated again"


def test_every_file_of_a_treatment_has_its_name(done):
    assert {"treat.json", "diagnoses/0.json"} <= set(listing(done.out))
    assert unnamed(done.out) == set()


def test_nobody_else_writes_into_a_treatment(tmp_path):
    def observe(event: object) -> None:
        with pytest.raises(RunLocked), RunFolder(tmp_path).lock():
            pass
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.treat(GROUND, out=tmp_path, budget=BUDGET, observe=observe)


def test_an_interrupted_treatment_ends_like_one_that_was_not(done, tmp_path):
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == 6  # in the middle of the first stage

    with pytest.raises(Interrupted):
        api.treat(GROUND, out=tmp_path, budget=BUDGET, stop=stop)
    assert chart(tmp_path)["rounds"][0]["kept"] is None
    again = api.treat(GROUND, out=tmp_path, budget=BUDGET)
    assert again.rounds == done.rounds
    assert again.spent == done.spent
    assert again.after.digest == done.after.digest


def test_with_nothing_that_helps_it_says_what_is_needed(tmp_path):
    ground = msgspec.structs.replace(GROUND, tasks={"reverse": REVERSE.tasks})
    done = api.treat(ground, out=tmp_path, budget=BUDGET, supplies=Supplies())
    assert done.rounds == ()
    assert done.policy == "base"
    assert "Nothing on-policy can help" in done.ended


def test_the_command_shows_the_course_and_writes_the_report(tmp_path, posttrain):
    """The budget covers the diagnosis only: the base is measured, and no stage starts."""
    content = {
        "tasks": {"products": config.plain(PRODUCTS.tasks)},
        "measure": {"max_new_tokens": ANSWER},
        "threads": 1,
    }
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(content))
    arguments = ["--tasks", tmp_path / "tasks.yaml", "--out", tmp_path / "out", "--budget", 9000]
    code, shown, errors = posttrain("treat", BASE, *arguments)
    assert code == 0, errors
    assert "ended: the budget" in " ".join(shown.split())
    assert "result: base" in shown
    assert (tmp_path / "out/report.html").is_file()
    code, _, errors = posttrain("treat", BASE, *arguments[:-1], 0)
    assert code == 2
    assert "budget" in errors
