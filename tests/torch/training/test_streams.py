"""A source may hear of new weights and record state, and a resumed stage goes on bit for bit."""

import contextlib
import json
from dataclasses import dataclass, field

import numpy as np
from material import random_groups

from posttrain.core.errors import Interrupted
from posttrain.core.learner import Optimizer
from posttrain.core.provenance import Kind
from posttrain.engines.local.engine import LocalEngine
from posttrain.parts.supervised.likelihood import CrossEntropy
from posttrain.recipe import Budget, Stage
from posttrain.run.journal import Journal
from posttrain.run.ledger import Ledger
from posttrain.run.stage_folder import StageWriter
from posttrain.testing import tiny_model
from posttrain.training.objective import StageObjective
from posttrain.training.stage import Parts, run_stage


@dataclass
class Remembering:
    """Draws depend on every draw before, and on how often the weights have moved."""

    drawn: list[int] = field(default_factory=list)
    published: list[int] = field(default_factory=list)
    files = ()
    num_groups = None

    @property
    def state(self):
        return self

    def publish(self, version):
        self.published.append(version)

    def draw(self, num_groups, *, step):
        seed = sum(self.drawn) * 7 + sum(self.published) * 3 + step
        self.drawn.append(seed % 101)
        return random_groups(num_groups=num_groups, seed=seed, kind=Kind.EXTERNAL)

    def save(self, folder):
        # A name that the checkpoint has too: every part saves in a folder of its own.
        (folder / "progress.json").write_text(json.dumps([self.drawn, self.published]))

    def load(self, folder):
        self.drawn, self.published = json.loads((folder / "progress.json").read_text())


def take(folder, model, stream, *, stop_after=None, steps=6):
    """Losses of a stage on the stream, from wherever the folder stands."""
    learner = LocalEngine(device="cpu", dtype="float32").learner(
        str(model), name="streams", optimizer=Optimizer(lr=1e-2), lora=None, seed=0
    )
    term = CrossEntropy()
    parts = Parts(
        source=stream,
        signals=(),
        terms=(term,),
        objective=StageObjective((term,)),
        learner=learner,
        stateful=(stream,),
    )
    stage = Stage(
        name="streams",
        method={"name": "sft", "data": {"path": "none.jsonl"}},
        budget=Budget(steps=steps),
        groups_per_step=2,
        checkpoint_every=1,
    )
    taken, losses = [], []

    def observe(event):
        if (loss := getattr(event, "metrics", {}).get("loss")) is not None:
            taken.append(event.step)
            losses.append(loss)

    folder.mkdir(exist_ok=True)
    journal = Journal(
        StageWriter(folder / "stage", Ledger.open(folder / "ledger.jsonl")),
        stage="streams",
        identity="0" * 64,
        facts={},
    )
    with contextlib.suppress(Interrupted):
        run_stage(
            stage,
            parts,
            steps=steps,
            journal=journal,
            observe=observe,
            stop=lambda: stop_after is not None and len(taken) >= stop_after,
        )
    return losses


def test_a_stream_that_records_state_resumes_bit_for_bit(tmp_path):
    tiny_model(tmp_path / "model")
    whole = Remembering()
    losses = take(tmp_path / "whole", tmp_path / "model", whole)
    assert len(losses) == 6
    assert min(losses) > 0, "every step has something to learn"
    first = take(tmp_path / "parts", tmp_path / "model", Remembering(), stop_after=2)
    # Another process: the stream starts empty, and loads its recorded state.
    later = Remembering()
    rest = take(tmp_path / "parts", tmp_path / "model", later)
    assert [*first, *rest] == losses
    assert later.drawn == whole.drawn


def test_a_stream_hears_of_every_update(tmp_path):
    tiny_model(tmp_path / "model")
    stream = Remembering()
    take(tmp_path / "run", tmp_path / "model", stream, steps=3)
    assert stream.published == [1, 2, 3]


def test_forgetting_would_be_seen(tmp_path):
    """The test can fail: without its state the stream draws something else."""
    tiny_model(tmp_path / "model")

    class Forgetful(Remembering):
        def load(self, folder):
            pass

    losses = take(tmp_path / "whole", tmp_path / "model", Remembering())
    first = take(tmp_path / "parts", tmp_path / "model", Forgetful(), stop_after=2)
    rest = take(tmp_path / "parts", tmp_path / "model", Forgetful())
    assert [*first, *rest] != losses
    assert not np.isnan(losses).any()
