"""Adapters that cannot be had are refused by plan and by check, before anything is trained."""

import importlib.util
import json

import pytest
from staging import make_world

import posttrain
from posttrain.core.errors import ConfigError
from posttrain.core.learner import Lora
from posttrain.measure.spec import Measure
from posttrain.models.folder import ModelFolder
from posttrain.models.headers import TensorHeader
from posttrain.recipe import Budget, Recipe, Stage
from posttrain.run.adaptable import _reached
from posttrain.run.check import check
from posttrain.run.preview import preview

SFT = posttrain.method("sft", data={"path": "rows.jsonl"})


@pytest.fixture
def world(tmp_path, engine, tiny_folder):
    return make_world(tmp_path, engine, tiny_folder)


def recipe_of(world, lora):
    stages = tuple(
        Stage(name=name, method=SFT, budget=Budget(steps=1), groups_per_step=2, lora=adapters)
        for name, adapters in (("whole", None), ("adapted", lora))
    )
    return Recipe(name="r", model=str(world.model), stages=stages, measure=Measure())


def verdicts(world, lora):
    recipe = recipe_of(world, lora)
    return [
        lambda: preview(recipe, root=world.root),
        lambda: check(recipe, root=world.root, engine=world.engine, rehearse_from=9),
    ]


def test_without_peft(world, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a)
    )
    for verdict in verdicts(world, Lora(rank=2)):
        with pytest.raises(ConfigError, match="stage adapted asks for lora, and peft"):
            verdict()


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "model.embed_tokens"])
def test_on_an_end_that_is_tied(world, target):
    for verdict in verdicts(world, Lora(rank=2, target_modules=("q_proj", target))):
        with pytest.raises(ConfigError, match=rf"lora on {target} of .* one weight"):
            verdict()


def test_a_pattern_on_an_end_that_is_tied(world):
    for verdict in verdicts(world, Lora(rank=2, target_modules=r".*embed_tokens")):
        with pytest.raises(ConfigError, match="one weight"):
            verdict()


def test_names_of_files_and_of_models_are_both_known(tmp_path):
    """A decoder's file may lack the prefix that the model has."""
    folder = ModelFolder(
        path=tmp_path,
        config={},
        tensors={"h.0.attn.c_attn.weight": TensorHeader("F32", (4, 12), "f")},
        tokens=None,
    )
    for targets in (("transformer.h.0.attn.c_attn",), ("c_attn",), r"(transformer\.)?h\..*"):
        assert all(_reached(targets, folder).values())
    assert not any(_reached(("lm_head", "embed_out"), folder).values())


@pytest.mark.parametrize(
    "targets",
    ["a", ("a",), ("q_norm",), ("q_proj", "layers.9.q_proj"), r".*\.qproj", "("],
)
def test_on_weights_that_do_not_exist(world, targets):
    for verdict in verdicts(world, Lora(rank=2, target_modules=targets)):
        with pytest.raises(ConfigError, match=r"such as down_proj|a regular expression"):
            verdict()


PATTERNS = (r".*\.(q|v)_proj", r"model\.layers\.0\..*_proj")


def test_what_can_be_adapted_is_not_refused(world):
    for targets in ("all-linear", ("q_proj", "down_proj"), ("layers.0.mlp.up_proj",), *PATTERNS):
        for verdict in verdicts(world, Lora(rank=2, target_modules=targets)):
            verdict()


@pytest.mark.parametrize(("asked", "words"), [(True, "is added"), (False, "no balancing loss")])
def test_plan_says_what_becomes_of_a_balancing_loss(world, tmp_path, asked, words):
    config = json.loads((world.model / "config.json").read_text())
    config |= {"router_aux_loss_coef": 0.25, "output_router_logits": asked}
    copy = tmp_path / "moe"
    copy.mkdir()
    for file in world.model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "config.json").write_text(json.dumps(config))
    stage = Stage(name="s", method=SFT, budget=Budget(steps=1), groups_per_step=2)
    recipe = Recipe(name="r", model=str(copy), stages=(stage,), measure=Measure())
    (line,) = [x for x in preview(recipe, root=world.root).splitlines() if "routers " in x]
    assert words in line
    assert "0.25" in line
