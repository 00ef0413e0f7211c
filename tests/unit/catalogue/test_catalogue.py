"""Pages of methods are read off the code, complete, current, and their recipes are legal."""

from __future__ import annotations

import importlib
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
from posttrain.catalogue.entries import COMMON
from posttrain.catalogue.example import legal_example
from posttrain.catalogue.pages import INDEX, stale
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

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
METHODS = known("method")
ROLES = ("method", "source", "signal", "term")
FENCE = re.compile(r"^```yaml recipe\n(.*?)^```", re.MULTILINE | re.DOTALL)
VALUES = {"label": True, "reward": 0.5, "weight": 1.0}


@pytest.fixture(scope="module")
def pages():
    return catalogue.pages()


@pytest.fixture
def registered(monkeypatch):
    """Registers a class for as long as a test runs."""

    def register(kind):
        role, tag = kind.role, kind.__struct_config__.tag
        found = registry._parts  # the registry refuses what comes after the first recipe
        monkeypatch.setattr(registry, "_parts", found | {role: found[role] | {tag: kind}})

    return register


def as_ours(monkeypatch):
    """Pages show what we ship: let a class of this file be taken for that."""
    entries = importlib.import_module("posttrain.catalogue.entries")  # a function hides its name
    monkeypatch.setattr(entries, "package_of", lambda kind: None)


# --- the pages -------------------------------------------------------------------------------


def test_the_pages_are_current(pages):
    written = {INDEX: DOCS / INDEX} | {n: DOCS / n for n in pages}
    current = {n: p.read_text("utf-8") for n, p in written.items() if p.exists()}
    assert current == pages, "pages of methods are stale: python -m posttrain.catalogue docs"
    assert stale(DOCS) == []


def test_stale_pages_are_those_of_no_family(tmp_path):
    (tmp_path / "methods").mkdir()
    for name in ("gone.md", "policy.md"):
        (tmp_path / "methods" / name).touch()
    assert [p.name for p in stale(tmp_path)] == ["gone.md"]


def headings_of(page):
    return re.findall(r"^### (.+)$", page, re.MULTILINE)


def test_every_method_is_in_the_map_and_on_the_page_of_its_family(pages):
    for name, kind in METHODS.items():
        family = catalogue.family_of(kind)
        page = pages[f"methods/{family}.md"]
        assert name in headings_of(page)
        formula = kind.formula.replace("`", "")
        assert f"* **minimises** `{formula}`" in page
        row = f"| [{name}](methods/{family}.md#{name}) | "
        (line,) = [ln for ln in pages[INDEX].splitlines() if ln.startswith(row)]
        assert f"`{formula}`".replace("|", "\\|") in line


def test_every_part_is_on_the_page_of_its_family(pages):
    for role in ("source", "signal", "term"):
        for tag, kind in known(role).items():
            page = pages[f"methods/{catalogue.family_of(kind)}.md"]
            assert f"{role} {tag}" in headings_of(page)


def test_every_link_leads_to_a_heading(pages):
    anchors = {}
    for name, page in pages.items():
        headings = headings_of(page)
        assert len(headings) == len(set(headings))
        anchors[name] = {h.replace(" ", "-") for h in headings}
    followed = 0
    for name, page in pages.items():
        for target, anchor in re.findall(r"\]\(([\w./]*)#([\w-]+)\)", page):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
            assert anchor in anchors[path if target else name], (name, target, anchor)
            followed += 1
    assert followed > len(METHODS)


def test_every_family_has_a_title_of_its_own():
    families = {catalogue.family_of(kind) for role in ROLES for kind in known(role).values()}
    assert COMMON in families
    titles = {catalogue.family_title(f) for f in families}
    assert "" not in titles
    assert len(titles) == len(families)


def planned(text: str, folder: Path):
    """The recipe planned, with stubs of the data that it names."""
    recipe = convert(yaml.safe_load(text), Recipe, origin="example")
    (stage,) = recipe.stages
    for data in example.datasets_of(stage.method.compose()):
        row = {name: VALUES.get(name, f"some {name}") for name in data.row_columns}
        (folder / data.path).write_text(json.dumps(row) + "\n")
    return make_plan(recipe, root=folder, base="b")


@pytest.mark.parametrize("name", METHODS)
def test_the_recipe_of_a_method_plans(name, pages, tmp_path):
    recipes = FENCE.findall(pages[f"methods/{catalogue.family_of(METHODS[name])}.md"])
    written = {yaml.safe_load(r)["stages"][0]["method"]["name"]: r for r in recipes}[name]
    plan = planned(written, tmp_path)
    assert plan.stages[0].spec.method == convert(
        yaml.safe_load(written)["stages"][0]["method"], METHODS[name], origin="page"
    )
    composition = plan.stages[0].composition
    parts = (composition.source, *composition.signals, *composition.terms)
    heads = ["scalar_head"] if composition.scalar_head else []
    tags = [p.tag for p in catalogue.entry(name).parts]
    assert tags == [*(tag_of(p) for p in parts), *heads]


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
    assert told["group_size"] == ("whole number, 1 or more", "8")
    assert told["reference"] == ("policy", "input")
    assert told["sampling"][1] == "{}", "a group of options at its own defaults"
    assert told["aggregate"][1] == "sequence_mean"


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


def test_a_new_method_appears_by_itself(registered, monkeypatch):
    registered(MadeUp)
    as_ours(monkeypatch)
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
    start = "| [made_up](methods/common.md#made_up)"
    lines = catalogue.pages()[INDEX].splitlines()
    row = next(line for line in lines if line.startswith(start))
    assert "`-log pi \\| given`" in row, "a pipe must not end a cell"
    assert "[2401.00001](https://arxiv.org/abs/2401.00001), [2401.00002](" in row
    assert "made_up" in methods_table()


def test_a_method_without_an_obvious_example_says_so(registered):
    class Odd(MadeUp):
        """Odd."""

        table: dict[str, int]

    Odd.__module__ = __name__
    registered(Odd)
    with pytest.raises(ConfigError, match="option table is required") as caught:
        catalogue.entry("odd")
    assert caught.value.expected
    assert "`example` of the class" in caught.value.fix


def test_a_method_may_have_an_example_of_its_own(registered):
    class Shown(MadeUp):
        """With a value that its type does not tell."""

        table: dict[str, int]
        example: ClassVar[dict[str, object]] = {"table": {"a": 3}}

    Shown.__module__ = __name__
    registered(Shown)
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
    places = [text.index(f"{catalogue.family_title(f)}\n") for f in families]
    assert places == sorted(places)
    for family, members in families.items():
        start = text.index(f"{catalogue.family_title(family)}\n")
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


def test_every_group_of_options_is_explained(pages):
    """What an option's type names in capitals has a section of its own."""
    text = "\n".join(pages.values())
    groups = set(re.findall(r"\| (?:list of )?([A-Z]\w+) \{", text)) - {"ScalarHead"}
    assert {"Mismatch", "Limit", "SamplingSpec"} <= groups
    assert {f"options {g}" for g in groups | {"WeightSchedule"}} <= set(headings_of(text))


def test_what_was_not_confirmed_is_listed(registered, monkeypatch):
    class Guessed(MadeUp):
        """A guess.

        Unconfirmed: the sign,
        and the scale.
        """

    Guessed.__module__ = __name__
    registered(Guessed)
    as_ours(monkeypatch)
    listed = catalogue.pages()[INDEX].partition("## What was not confirmed")[2]
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


def test_nothing_in_the_catalogue_names_a_part():
    """Neither by its tag nor by its class."""
    folder = Path(catalogue.__file__).parent
    text = "".join(p.read_text("utf-8") for p in folder.glob("*.py"))
    text = re.sub(r'""".*?"""', "", text, flags=re.DOTALL)  # examples do
    kinds = [kind for role in ROLES for kind in known(role).values()]
    assert [k for k in kinds if re.search(rf"[\"']{tag_of(k)}[\"']", text)] == []
    assert [k for k in kinds if re.search(rf"\b{k.__name__}\b", text)] == []
