"""The map of methods is read off the code, complete, current, and its recipes are legal."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar, get_args

import pytest
import yaml

from posttrain import catalogue, methods
from posttrain.catalogue import example, words
from posttrain.catalogue.example import legal_example, rows_of
from posttrain.cli.tables import method_page, methods_table
from posttrain.core.config import Config, convert
from posttrain.core.errors import ConfigError
from posttrain.parts.base import Aggregate, PolicyRef, Signal, Term
from posttrain.parts.composition import Composition
from posttrain.parts.distillation.divergences import TeacherReverseKL
from posttrain.parts.logprobs import ReferenceLogprobs
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.supervised.likelihood import CrossEntropy
from posttrain.recipe import Recipe
from posttrain.run.plan import make_plan
from posttrain.testing import check_method

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/methods.md"
FENCE = re.compile(r"^```yaml recipe\n(.*?)^```", re.MULTILINE | re.DOTALL)
VALUES = {"label": True, "reward": 0.5, "weight": 1.0}


# --- the page --------------------------------------------------------------------------------


def test_the_page_is_current():
    assert PAGE.read_text("utf-8") == catalogue.page(), (
        "docs/methods.md is stale: python -m posttrain.catalogue > docs/methods.md"
    )


def test_the_page_has_everything():
    text = catalogue.page()
    headings = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert len(headings) == len(set(headings))
    for name, kind in METHODS.items():
        assert name in headings
        formula = kind.formula.replace("`", "")
        assert f"* **minimises** `{formula}`" in text
        assert f"`{formula}`".replace("|", "\\|") in text, "in the table"
    for role, union in (("source", SourceSpec), ("signal", Signal), ("term", Term)):
        for spec in get_args(union):
            assert f"{role} {spec.__struct_config__.tag}" in headings
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= {h.replace(" ", "-") for h in headings}


def planned(text: str, folder: Path):
    """The recipe planned, with stubs of the data that it names."""
    recipe = convert(yaml.safe_load(text), Recipe, origin="example")
    (stage,) = recipe.stages
    for data in example.datasets_of(stage.method.compose()):
        row = {name: VALUES.get(name, f"some {name}") for name in rows_of(data)}
        (folder / data.path).write_text(json.dumps(row) + "\n")
    return make_plan(recipe, root=folder, base="b")


@pytest.mark.parametrize("name", METHODS)
def test_the_recipe_of_a_method_plans(name, tmp_path):
    on_page = {
        yaml.safe_load(t)["stages"][0]["method"]["name"]: t for t in FENCE.findall(catalogue.page())
    }
    plan = planned(on_page[name], tmp_path)
    assert plan.stages[0].spec.method == convert(
        yaml.safe_load(on_page[name])["stages"][0]["method"], METHODS[name], origin="page"
    )
    composition = plan.stages[0].composition
    parts = (composition.source, *composition.signals, *composition.terms)
    heads = ["scalar_head"] if composition.scalar_head else []
    tags = [p.tag for p in catalogue.entry(name).parts]
    assert tags == [*(p.__struct_config__.tag for p in parts), *heads]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_the_contract(name):
    check_method(legal_example(name, METHODS[name])[1])


# --- what is read off ------------------------------------------------------------------------


def test_grpo_explained():
    e = catalogue.entry("grpo")
    assert [(p.role, p.tag) for p in e.parts] == [
        ("source", "rollouts"),
        ("signal", "verify"),
        ("signal", "group_advantage"),
        ("term", "clipped_policy_gradient"),
    ]
    assert "needs advantage, behaviour_logprob" in e.parts[-1].facts
    assert e.parts[-1].facts.endswith("reads tokens of learner")
    assert e.variants == ("kl_weight: above 0 adds reference_logprobs, reference_kl",)
    assert e.asks == ("a task set, with a scorer for its answers",)
    told = {o.name: (o.kind, o.default) for o in e.options}
    assert told["tasks"] == ("list of text", "required")
    assert told["group_size"] == ("whole number", "8")
    assert told["reference"] == ("policy", "input")
    assert told["sampling"][1] == "{}", "a group of options at its own defaults"
    assert told["aggregate"][1] == "sequence_mean"


def test_pairs_ask_for_pairs():
    e = catalogue.entry("dpo")
    assert e.asks == ("a file with rows of prompt, chosen, rejected (JSONL or Parquet)",)
    assert "method: {name: dpo, data: {path: pairs.jsonl}}" in e.recipe


class MadeUp(Config, tag="made_up", tag_field="name"):
    """A method that nobody has heard of.

    With more to say.
    """

    data: Dataset
    judge: PolicyRef
    strength: float
    anchored: bool = False
    style: str = "plain"
    aggregate: Aggregate = "token_mean"

    provenance: ClassVar[str] = "off-policy"
    interface: ClassVar[str] = "token targets"
    tendency: ClassVar[str] = "nothing yet"
    formula: ClassVar[str] = "-log pi | given"
    paper: ClassVar[str] = "2401.00001, 2401.00002"

    def compose(self) -> Composition:
        """Weighted rows."""
        signals = (ReferenceLogprobs(policy=self.judge),) if self.anchored else ()
        terms = (CrossEntropy(weight=self.strength, aggregate=self.aggregate),)
        if self.data.weight is None:
            terms = (TeacherReverseKL(),)  # illegal: nothing provides the teacher's columns
        return Composition(source=self.data, signals=signals, terms=terms)


def test_a_new_method_appears_by_itself(monkeypatch):
    monkeypatch.setitem(METHODS, "made_up", MadeUp)
    e = catalogue.entry("made_up")
    assert e.summary == "A method that nobody has heard of."
    assert "data: {path: answers.jsonl, weight: weight}" in e.recipe, "what makes it legal"
    assert "judge: 'path:org/judge'" in e.recipe
    assert "strength: 0.5" in e.recipe
    assert "budget: {epochs: 1}" in e.recipe
    assert e.variants == ("anchored: true adds reference_logprobs",)
    assert e.asks == (
        "a file with rows of prompt, completion, weight (JSONL or Parquet)",
        "judge: a model with the learner's vocabulary",
    )
    text = catalogue.page()
    row = next(line for line in text.splitlines() if line.startswith("| [made_up](#made_up)"))
    assert "`-log pi \\| given`" in row, "a pipe must not end a cell"
    assert "[2401.00001](https://arxiv.org/abs/2401.00001), [2401.00002](" in row
    assert "made_up" in methods_table()


def test_a_method_without_an_obvious_example_says_so(monkeypatch):
    class Odd(MadeUp, tag="odd", tag_field="name"):
        """Odd."""

        table: dict[str, int]

    Odd.__module__ = __name__
    monkeypatch.setitem(METHODS, "odd", Odd)
    with pytest.raises(ConfigError, match="option table is required") as caught:
        catalogue.entry("odd")
    assert caught.value.expected


def test_types_in_words():
    kinds = {f.name: words._type_words(f.type) for f in words.structs.fields(MadeUp)}
    assert kinds["anchored"] == "true | false"
    assert kinds["aggregate"] == " | ".join(get_args(Aggregate))
    assert words._type_words(dict[str, float]) == "number by text"
    assert words._type_words(tuple[float, float]) == "list of 2: number, number"


# --- the terminal ----------------------------------------------------------------------------


def test_the_table_groups_by_family_and_says_tendency():
    text = methods_table()
    families = catalogue.families()
    places = [text.index(f"{title}\n") for title in families]
    assert places == sorted(places)
    for title, members in families.items():
        start = text.index(f"{title}\n")
        for name, kind in members.items():
            line = text.index(f"  {name} ", start)
            assert f"tends to {kind.tendency}" in text[line:]
            assert kind.formula in text[line:]
    assert "tendency: what a stage really did is measured" in text


@pytest.mark.parametrize("name", METHODS)
def test_the_page_of_a_method_in_a_terminal(name):
    text, kind = method_page(name), METHODS[name]
    assert text.startswith(f"{name}: ")
    assert kind.formula in text
    for option in kind.__struct_fields__:
        assert re.search(rf"^  {option} ", text, re.MULTILINE)
    recipe = yaml.safe_load(text.partition("a recipe:")[2])
    assert recipe["stages"][0]["method"]["name"] == name


def test_a_misspelt_method():
    with pytest.raises(ConfigError) as caught:
        method_page("grpoo")
    assert "did you mean 'grpo'?" in str(caught.value)


def test_a_part_and_a_group_of_options_are_explained():
    text = method_page("group_advantage")
    assert text.startswith("group_advantage: ")
    assert re.search(r"^  baseline  group_mean ", text, re.MULTILINE)
    assert method_page("mismatch").startswith("Mismatch: ")


SPOKEN_OF = {
    "cDPO": "dpo",
    "SLiC": "hinge",
    "RSO": "pairwise_hinge",
    "RPO": "irpo",
    "MOPD": "opd",
    "IcePop": "Mismatch",
    "TIS": "Mismatch",
    "LD-DPO": "pairwise_shared",
    "k3": "reference_kl",
    "dual_clip": "clipped_policy_gradient",
    "2-GRPO": "grpo",
    "OPCD": "context_distillation",
}


@pytest.mark.parametrize(("word", "speaker"), SPOKEN_OF.items())
def test_what_goes_by_another_name_is_found(word, speaker):
    assert speaker in catalogue.mentions(word)
    with pytest.raises(ConfigError, match="these speak of it") as caught:
        method_page(word)
    assert speaker in str(caught.value)


def test_every_group_of_options_is_explained():
    """What an option's type names in capitals has a section of its own."""
    text = catalogue.page()
    headings = re.findall(r"^### (.+)$", text, re.MULTILINE)
    groups = set(re.findall(r"\| (?:list of )?([A-Z]\w+) \{", text)) - {"ScalarHead"}
    assert {"Mismatch", "Limit", "SamplingSpec"} <= groups
    assert {f"options {g}" for g in groups | {"WeightSchedule"}} <= set(headings)


def test_what_was_not_confirmed_is_listed(monkeypatch):
    class Guessed(MadeUp, tag="guessed", tag_field="name"):
        """A guess.

        Unconfirmed: the sign,
        and the scale.
        """

    Guessed.__module__ = __name__
    monkeypatch.setitem(METHODS, "guessed", Guessed)
    listed = catalogue.page().partition("## What was not confirmed")[2]
    assert "* [guessed](#guessed): the sign, and the scale." in listed
    assert "* [vapo](#vapo): " in listed
    assert "(#sft)" not in listed


@pytest.mark.parametrize("arguments", [[], ["grpo"]])
def test_the_command_stays_light(arguments):
    code = (
        "import sys\nfrom posttrain.cli.main import cli\n"
        f"cli(['methods', *{arguments!r}], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'pyarrow', 'jinja2'} & set(sys.modules)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "grpo" in ran.stdout


def test_the_methods_module_is_the_only_list():
    """Nothing in the catalogue names a method."""
    folder = Path(catalogue.__file__).parent
    text = "".join(p.read_text("utf-8") for p in folder.glob("*.py"))
    named = [n for n in METHODS if re.search(rf"[\"']{n}[\"']", text)]
    assert named == []
    assert methods.METHODS is METHODS
