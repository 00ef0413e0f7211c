"""The map of methods is read off the code, complete, current, and its recipes are legal."""

from __future__ import annotations

import json
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar, get_args

import pytest
import yaml

from posttrain import catalogue
from posttrain.catalogue import example, words
from posttrain.catalogue.example import legal_example
from posttrain.cli.tables import method_page, methods_table
from posttrain.core.config import convert
from posttrain.core.errors import ConfigError
from posttrain.parts import registry
from posttrain.parts.base import Aggregate, PolicyRef
from posttrain.parts.composition import Composition, Method
from posttrain.parts.distillation.divergences import TeacherReverseKL
from posttrain.parts.logprobs import ReferenceLogprobs
from posttrain.parts.registry import known, tag_of
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.supervised.likelihood import CrossEntropy
from posttrain.recipe import Recipe
from posttrain.run.plan import make_plan
from posttrain.testing import check_method

DOCS = Path(__file__).parents[2] / "docs"
FENCE = re.compile(r"^```yaml recipe\n(.*?)^```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^### (.+)$", re.MULTILINE)
VALUES = {"label": True, "reward": 0.5, "weight": 1.0}
METHODS = known("method")


def every_page() -> str:
    return "\n".join(catalogue.pages().values())


# --- the pages -------------------------------------------------------------------------------


def test_the_pages_are_current():
    pages = catalogue.pages()
    written = {str(path.relative_to(DOCS)) for path in (DOCS / "methods").glob("*.md")}
    assert {"methods.md", *written} == set(pages), "make docs"
    stale = [name for name, text in pages.items() if (DOCS / name).read_text("utf-8") != text]
    assert not stale, "make docs"


def test_every_family_has_a_page_that_the_map_leads_to():
    pages = catalogue.pages()
    families = {
        catalogue.family_of(k) for r in ("term", "signal", "source") for k in known(r).values()
    }
    assert set(pages) == {"methods.md", *(f"methods/{f}.md" for f in families)}
    for family in families:
        assert f"({f'methods/{family}.md'})" in pages["methods.md"]
        assert pages[f"methods/{family}.md"].startswith(f"# {catalogue.family_title(family)}\n")


def test_the_pages_have_everything():
    pages = catalogue.pages()
    text = every_page()
    headings = HEADING.findall(text)
    assert len(headings) == len(set(headings))
    for name, kind in METHODS.items():
        own = pages[f"methods/{catalogue.family_of(kind)}.md"]
        assert name in HEADING.findall(own), "on the page of its family"
        formula = kind.formula.replace("`", "")
        assert f"* **minimises** `{formula}`" in own
        assert f"`{formula}`".replace("|", "\\|") in pages["methods.md"], "in the table"
    for role in ("source", "signal", "term"):
        for tag in known(role):
            assert f"{role} {tag}" in headings


def test_every_link_leads_to_a_heading():
    pages = catalogue.pages()
    anchors = {
        name: {h.replace(" ", "-") for h in HEADING.findall(text)} for name, text in pages.items()
    }
    for name, text in pages.items():
        for path, anchor in re.findall(r"\]\(([\w./]*)#([\w-]+)\)", text):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
            assert anchor in anchors[target if path else name], (name, path, anchor)


def planned(text: str, folder: Path):
    """The recipe planned, with stubs of the data that it names."""
    recipe = convert(yaml.safe_load(text), Recipe, origin="example")
    (stage,) = recipe.stages
    for data in example.datasets_of(stage.method.compose()):
        row = {name: VALUES.get(name, f"some {name}") for name in data.row_columns}
        (folder / data.path).write_text(json.dumps(row) + "\n")
    return make_plan(recipe, root=folder, base="b")


@pytest.mark.parametrize("name", METHODS)
def test_the_recipe_of_a_method_plans(name, tmp_path):
    on_page = {
        yaml.safe_load(t)["stages"][0]["method"]["name"]: t for t in FENCE.findall(every_page())
    }
    plan = planned(on_page[name], tmp_path)
    assert plan.stages[0].spec.method == convert(
        yaml.safe_load(on_page[name])["stages"][0]["method"], METHODS[name], origin="page"
    )
    composition = plan.stages[0].composition
    parts = (composition.source, *composition.signals, *composition.terms)
    heads = ["scalar_head"] if composition.scalar_head else []
    tags = [p.tag for p in catalogue.entry(name).parts]
    assert tags == [*map(tag_of, parts), *heads]


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
    found = {o.name: (o.kind, o.default) for o in e.options}
    assert found["tasks"] == ("list of text", "required")
    assert found["group_size"] == ("whole number", "8")
    assert found["reference"] == ("policy", "input")
    assert found["sampling"][1] == "{}", "a group of options at its own defaults"
    assert found["aggregate"][1] == "sequence_mean"


def test_pairs_ask_for_pairs():
    e = catalogue.entry("dpo")
    assert e.asks == ("a file with rows of prompt, chosen, rejected (JSONL or Parquet)",)
    assert "method: {name: dpo, data: {path: pairs.jsonl}}" in e.recipe


class MadeUp(Method):
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


@pytest.fixture
def register(monkeypatch):
    """Makes a method one of ours, for one test."""

    def one_of_ours(kind: type[Method]) -> None:
        known("method")  # what is registered by itself comes first
        monkeypatch.setattr(registry, "OURS", ("posttrain.", __name__))
        monkeypatch.setitem(registry._parts["method"], tag_of(kind), kind)

    return one_of_ours


def test_a_new_method_appears_by_itself(register):
    register(MadeUp)
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
    assert e.family == "common"
    start = "| [made_up](methods/common.md#made_up)"
    row = next(line for line in every_page().splitlines() if line.startswith(start))
    assert "`-log pi \\| given`" in row, "a pipe must not end a cell"
    assert "[2401.00001](https://arxiv.org/abs/2401.00001), [2401.00002](" in row
    assert "made_up" in methods_table()


class Odd(MadeUp):
    """Odd."""

    table: dict[str, int]


class Shown(Odd):
    """Odd, with an example."""

    example: ClassVar[dict[str, object]] = {"table": {"a": 3}}


def test_a_method_without_an_obvious_example_says_so(register):
    register(Odd)
    with pytest.raises(ConfigError, match="option table is required") as caught:
        catalogue.entry("odd")
    assert caught.value.expected
    assert "`example`" in caught.value.fix
    register(Shown)
    assert "table: {a: 3}" in catalogue.entry("shown").recipe


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
    titles = {family: catalogue.family_title(family) for family in families}
    places = [text.index(f"{title}\n") for title in titles.values()]
    assert places == sorted(places)
    for family, members in families.items():
        start = text.index(f"{titles[family]}\n")
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
    "RSO": "hinge",
    "RPO": "irpo",
    "MOPD": "opd",
    "IcePop": "Mismatch",
    "TIS": "Mismatch",
    "LD-DPO": "ld_dpo",
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
    text = every_page()
    headings = HEADING.findall(text)
    groups = set(re.findall(r"\| (?:list of )?([A-Z]\w+) \{", text)) - {"ScalarHead"}
    assert {"Mismatch", "Limit", "SamplingSpec"} <= groups
    assert {f"options {g}" for g in groups | {"WeightSchedule"}} <= set(headings)


class Guessed(MadeUp):
    """A guess.

    Unconfirmed: the sign,
    and the scale.
    """


def test_what_was_not_confirmed_is_listed(register):
    register(Guessed)
    listed = catalogue.pages()["methods.md"].partition("## What was not confirmed")[2]
    assert "* [guessed](methods/common.md#guessed): the sign, and the scale." in listed
    assert "* [vapo](methods/policy.md#vapo): " in listed
    assert "#sft)" not in listed


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


def test_the_catalogue_knows_no_part_by_name():
    """Nothing in it names a part of any role, by its tag or by its class."""
    folder = Path(catalogue.__file__).parent
    text = "".join(p.read_text("utf-8") for p in folder.glob("*.py"))
    kinds = [
        kind for role in ("method", "term", "signal", "source") for kind in known(role).values()
    ]
    code = re.sub(r'""".*?"""', "", text, flags=re.DOTALL)  # examples in docstrings name some
    assert [k for k in kinds if re.search(rf"[\"']{tag_of(k)}[\"']", code)] == []
    assert [k for k in kinds if re.search(rf"\b{k.__name__}\b", code)] == []
