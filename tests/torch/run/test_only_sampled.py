"""An engine that only generates is enough where a model is only sampled, and refused elsewhere."""

import pytest
from staging import make_world

import posttrain
from posttrain.core.errors import LegalityError
from posttrain.protocols import Author

TASKS = {"tasks": ("rows",), "max_new_tokens": 3}


class OnlySampled:
    """What a server offers: its prompts and its samples."""

    def __init__(self, policy):
        for name in (*(n for n in vars(Author) if not n.startswith("_")), "generate"):
            setattr(self, name, getattr(policy, name))


class Engine:
    """Trains here; asks a server for everything else."""

    def __init__(self, engine):
        self.learner, self._policy = engine.learner, engine.policy

    def policy(self, model):
        return OnlySampled(self._policy(model))


@pytest.fixture
def world(tmp_path, engine, tiny_folder):
    return make_world(tmp_path, Engine(engine), tiny_folder)


def test_its_samples_are_imitated(world):
    method = posttrain.method("seq_kd", teacher="base", **TASKS)
    _, metrics = world.run(method, "out", steps=2)
    assert len(metrics) == 2
    assert all(m["loss"] > 0 for m in metrics)


@pytest.mark.parametrize(
    "method",
    [
        posttrain.method("opd", teachers={"*": "base"}, **TASKS),
        posttrain.method("grpo", kl_weight=0.1, reference="base", group_size=4, **TASKS),
    ],
    ids=["a teacher's distribution", "a reference"],
)
def test_log_probs_are_not_asked_of_it(world, method):
    with pytest.raises(LegalityError) as caught:
        world.run(method, "out", steps=2)
    assert "stage s: base is asked for log-probs, and its engine only generates" in str(
        caught.value
    )
    assert caught.value.fix
