"""Mixes and teachers in a recipe: planned, identified by content, and run to the end."""

import json

import numpy as np
import pytest
import yaml

from posttrain import JsonlTasks, Recipe, Stage, api
from posttrain.core.config import convert, plain
from posttrain.core.errors import ConfigError
from posttrain.core.provenance import Kind
from posttrain.measure.spec import Measure
from posttrain.parts.distillation.presets import Gkd, Kd, Opsd, SeqKd
from posttrain.parts.guided.hybrid import Chord
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.sources.mix import Mix
from posttrain.recipe import Budget
from posttrain.run.ledger import read
from posttrain.run.plan import make_plan
from posttrain.run.preview import preview
from posttrain.run.store import read_uses


@pytest.fixture
def folder(tmp_path):
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(12)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    demos = [{"prompt": f"{i}+2=", "completion": str(i + 2)} for i in range(9)]
    (tmp_path / "demos.jsonl").write_text("".join(json.dumps(r) + "\n" for r in demos))
    return tmp_path


DATA = Dataset(path="demos.jsonl")
OWN = {"tasks": ("sums",), "max_new_tokens": 4}


def recipe(method, *, model="base", groups=4, steps=2):
    return Recipe(
        name="mixed",
        model=model,
        tasks={"sums": JsonlTasks(path="tasks.jsonl", held_out=4)},
        measure=Measure(samples=2, max_new_tokens=4),
        threads=1,
        stages=(
            Stage(name="s", method=method, budget=Budget(steps=steps), groups_per_step=groups),
        ),
    )


def planned(method, folder):
    return make_plan(recipe(method), root=folder, base="b" * 64).stages[0]


def test_a_mix_is_the_same_in_yaml_and_python(folder):
    made = recipe(Gkd(**OWN, data=DATA, teachers={"*": "base"}))
    again = convert(yaml.safe_load(yaml.safe_dump(plain(made))), Recipe, origin="yaml")
    assert again == made
    assert isinstance(again.stages[0].method.compose().source, Mix)


def test_a_mix_is_identified_by_the_content_of_every_part(folder):
    method = Gkd(**OWN, data=DATA, teachers={"*": "base"})
    before = planned(method, folder)
    assert before.provenance == (
        "mixed: 50% off-policy: demos.jsonl (external); 50% on-policy: the learner's own rollouts"
    )
    assert planned(method, folder).identity == before.identity
    for file in ("demos.jsonl", "tasks.jsonl"):
        path = folder / file
        text = path.read_text()
        path.write_text(text + text.splitlines()[0].replace("1", "7") + "\n")
        assert planned(method, folder).identity != before.identity
        path.write_text(text)


def test_a_mix_has_no_end(folder):
    made = recipe(Gkd(**OWN, data=DATA, teachers={"*": "base"}))
    stage = Stage(name="s", method=made.stages[0].method, budget=Budget(epochs=1))
    endless = Recipe(name="m", model="base", tasks=made.tasks, stages=(stage,))
    with pytest.raises(ConfigError, match="nor has a mix"):
        make_plan(endless, root=folder, base="b" * 64)


def test_routes_name_what_the_teacher_scores(folder):
    """A data set is routed by its name, task sets by theirs."""
    assert planned(Kd(data=DATA, teachers={"demos": "base"}), folder)
    assert planned(Gkd(**OWN, data=DATA, teachers={"demos": "base", "sums": "base"}), folder)
    with pytest.raises(ConfigError, match=r"groups of \['demos', 'sums'\]"):
        planned(Gkd(**OWN, data=DATA, teachers={"sums": "base"}), folder)
    with pytest.raises(ConfigError, match="and no other"):
        planned(Kd(data=DATA, teachers={"*": "base", "sums": "base"}), folder)


def test_only_a_teacher_that_reads_more_may_be_the_learner(folder):
    stage = planned(Opsd(**OWN, teacher="learner"), folder)
    assert stage.inputs["references"] == {"learner": "learner"}
    with pytest.raises(ConfigError, match="nothing more to read"):
        planned(Kd(data=DATA, teachers={"*": "learner"}), folder)
    with pytest.raises(ConfigError, match="refers to policy 'nobody'"):
        planned(SeqKd(**OWN, teacher="nobody"), folder)


@pytest.mark.parametrize(
    ("method", "shares"),
    [
        (Chord(data=DATA, tasks=("sums",), expert=0.25, group_size=2, max_new_tokens=4), (1, 6)),
        (Gkd(**OWN, data=DATA, teachers={"*": "base"}, top_k=3), (2, 2)),
        (Opsd(**OWN, teacher="learner"), (0, 4)),
    ],
    ids=lambda v: type(v).__name__ if not isinstance(v, tuple) else "",
)
def test_a_run_trains_on_what_the_mix_says(folder, tiny_folder, method, shares):
    made = recipe(method, model=str(tiny_folder))
    text = preview(made, root=folder)
    assert "legality    ok" in text
    api.run(made, out=folder / "out", root=folder)
    uses = [u for f in (folder / "out").rglob("*.uses.parquet") for u in read_uses(f)]
    for step in (0, 1):
        kinds = [u.kind for u in uses if u.step == step]
        assert (kinds.count(Kind.EXTERNAL), kinds.count(Kind.LEARNER)) == shares
    lines = [json.loads(x) for f in (folder / "out").rglob("metrics.jsonl") for x in f.open()]
    assert all(np.isfinite(line["loss"]) for line in lines)
    sources = [r.body for r in read(folder / "out" / "ledger.jsonl") if r.kind == "source"]
    assert ("demos" in [s["name"] for s in sources]) == (shares[0] > 0)
