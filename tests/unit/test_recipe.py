"""Recipes: strict, the same from YAML and Python, identified by content."""

import pytest
import yaml

from posttrain import (
    Budget,
    Dataset,
    Gate,
    Grpo,
    JsonlTasks,
    Lora,
    Measure,
    Opd,
    Optimizer,
    PosttrainError,
    ReasoningGym,
    Recipe,
    Rollouts,
    SamplingSpec,
    Sft,
    Stage,
    load_recipe,
)
from posttrain.core.config import checked, convert, differences, digest, plain
from posttrain.core.errors import ConfigError, DataError, LegalityError
from posttrain.core.provenance import Kind
from posttrain.parts.composition import Compose, Composition
from posttrain.parts.credit.advantages import GroupAdvantage
from posttrain.parts.distillation.divergences import TeacherReverseKL
from posttrain.parts.distillation.teachers import TeacherDistribution
from posttrain.parts.legality import admit, check_composition
from posttrain.parts.logprobs import ReferenceLogprobs
from posttrain.parts.policy.losses import ClippedPolicyGradient
from posttrain.parts.policy.regularisers import ReferenceKL
from posttrain.parts.preference.pairs import Dpo
from posttrain.parts.rewards.verify import Verify
from posttrain.parts.supervised.likelihood import CrossEntropy
from posttrain.run.plan import make_plan
from posttrain.testing import as_group, example_trajectory

YAML = """
name: small
model: base-model
tasks:
  sums: {type: reasoning_gym, dataset: chain_sum, held_out: 8}
measure: {samples: 16}
stages:
  - name: teach
    method: {name: sft, data: {type: dataset, path: demos.jsonl}}
    budget: {epochs: 2}
  - name: sharpen
    method: {name: grpo, tasks: [sums], group_size: 4}
    budget: {steps: 3}
    optimizer: {lr: 1.0e-4}
    gates: [{task: sums, at_least: 0.5}]
"""


def python_recipe() -> Recipe:
    return Recipe(
        name="small",
        model="base-model",
        tasks={"sums": ReasoningGym(dataset="chain_sum", held_out=8)},
        measure=Measure(samples=16),
        stages=(
            Stage(
                name="teach", method=Sft(data=Dataset(path="demos.jsonl")), budget=Budget(epochs=2)
            ),
            Stage(
                name="sharpen",
                method=Grpo(tasks=("sums",), group_size=4),
                budget=Budget(steps=3),
                optimizer=Optimizer(lr=1e-4),
                gates=(Gate(task="sums", at_least=0.5),),
            ),
        ),
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "recipe.yaml").write_text(YAML)
    (tmp_path / "demos.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n')
    return tmp_path


def test_yaml_and_python_are_the_same_tree(folder):
    loaded = load_recipe(folder / "recipe.yaml")
    assert loaded == checked(python_recipe())
    assert digest(loaded) == digest(python_recipe())


def test_a_resolved_recipe_reads_back(folder):
    resolved = yaml.safe_dump(plain(python_recipe()))
    again = convert(yaml.safe_load(resolved), Recipe, origin="resolved")
    assert digest(again) == digest(python_recipe())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs: 2", "epoks: 2", "did you mean 'epochs'"),
        ("name: sft", "name: sftt", "did you mean 'sft'"),
        ("group_size: 4", "groupsize: 4", "did you mean 'group_size'"),
        ("type: reasoning_gym", "type: reasoning_gim", "did you mean 'reasoning_gym'"),
        ("samples: 16", "sample: 16", "did you mean 'samples'"),
        ("dataset: chain_sum,", "data_set: chain_sum,", "did you mean 'dataset'"),
        ("at_least: 0.5", "atleast: 0.5", "did you mean 'at_least'"),
        ("epochs: 2", "epochs: two", "Expected `float | null`"),
        ("{epochs: 2}", "{}", "expected: exactly one"),
        ("group_size: 4", "group_size: 1", "a group of one has no baseline"),
        ("lr: 1.0e-4", "lr: -1", "lr is -1"),
        ("{task: sums, at_least", "{task: sum, at_least", "did you mean 'sums'"),
        ("name: sharpen", "name: teach", "one name per stage"),
        ("name: sharpen", "name: base", "none of"),
        ("model: base-model", "model: base-model\nremote_code: other", "exactly the model's name"),
    ],
)
def test_a_wrong_option_is_named_with_the_nearest(folder, old, new, message):
    path = folder / "recipe.yaml"
    assert old in YAML
    path.write_text(YAML.replace(old, new))
    with pytest.raises(ConfigError, match=message.replace("|", r"\|")):
        load_recipe(path)


def test_options_that_nothing_would_use_are_errors():
    with pytest.raises(ConfigError):
        Budget(steps=3, epochs=1)
    with pytest.raises(ConfigError):
        Gate(task="sums", at_least=0.1, at_most_lost=0.1)


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(ConfigError, match="no file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not YAML"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(ConfigError, match="a mapping"):
        load_recipe(tmp_path / "list.yaml")


def test_epsilon_below_what_samples_can_show_is_refused():
    assert Measure(samples=64).threshold == pytest.approx(1 - 0.05 ** (1 / 64))
    with pytest.raises(ConfigError, match="no failure count could show less"):
        Measure(samples=64, epsilon=0.01)


def test_python_options_are_checked_like_yaml():
    assert digest(Optimizer(lr=1)) == digest(Optimizer(lr=1.0))
    with pytest.raises(ConfigError, match=r"Expected `object \| null`, got `int`"):
        Stage(name="s", method=Sft(data=Dataset(path="x")), budget=Budget(steps=1), lora=3)


def test_differences_lists_paths():
    old, new = {"a": {"b": [1, 2]}, "c": 1}, {"a": {"b": [1, 3]}}
    assert differences(old, new) == ["a.b[1]: 2 -> 3", "c: 1 -> (absent)"]


# --- identity --------------------------------------------------------------------------------


def identities(recipe, root, base="weights"):
    return [s.identity for s in make_plan(recipe, root=root, base=base).stages]


def changed(recipe, **stage):
    first, *rest = recipe.stages
    return replace(recipe, stages=(replace(first, **stage), *rest))


def replace(struct, **fields):
    return type(struct)(**{**{f: getattr(struct, f) for f in struct.__struct_fields__}, **fields})


def test_identity_follows_what_the_weights_depend_on(folder):
    recipe = python_recipe()
    teach, sharpen = identities(recipe, folder)
    assert identities(recipe, folder) == [teach, sharpen]
    for other in (
        changed(recipe, optimizer=Optimizer(lr=1.0)),
        changed(recipe, groups_per_step=7),
        replace(recipe, seed=1),
    ):
        assert not {teach, sharpen} & set(identities(other, folder)), "a parent's change goes down"
    assert teach != identities(recipe, folder, base="other weights")[0]
    (folder / "demos.jsonl").write_text('{"prompt": "1+1=", "completion": "3"}\n')
    assert teach != identities(recipe, folder)[0]


def test_identity_ignores_what_the_weights_do_not_depend_on(folder, tmp_path_factory):
    recipe = python_recipe()
    expected = identities(recipe, folder)
    assert identities(changed(recipe, checkpoint_every=3, intends="expansion"), folder) == expected
    assert identities(replace(recipe, name="other"), folder) == expected
    moved = tmp_path_factory.mktemp("moved")
    (moved / "elsewhere.jsonl").write_bytes((folder / "demos.jsonl").read_bytes())
    method = Sft(data=Dataset(path="elsewhere.jsonl"))
    assert identities(changed(recipe, method=method), moved) == expected


def test_plans_refuse_what_cannot_be_resolved(folder):
    recipe = python_recipe()
    with pytest.raises(DataError, match="no file"):
        make_plan(recipe, root=folder / "nowhere", base="x")
    with pytest.raises(ConfigError, match="did you mean 'base'"):
        identities(changed(recipe, init="bse"), folder)
    with pytest.raises(ConfigError, match="'sum'"):
        identities(changed(recipe, method=Grpo(tasks=("sum",)), budget=Budget(steps=1)), folder)
    with pytest.raises(ConfigError, match="rollouts have no end"):
        identities(changed(recipe, method=Grpo(tasks=("sums",))), folder)
    opd = Opd(tasks=("sums",), teachers={"products": "base"})
    with pytest.raises(ConfigError, match="one route per task set"):
        identities(changed(recipe, method=opd, budget=Budget(steps=1)), folder)


# --- legality --------------------------------------------------------------------------------

LIVE = Rollouts(tasks=("sums",))
FROZEN = Rollouts(tasks=("sums",), policy="base")
DATA = Dataset(path="x")
CREDIT = (Verify(), GroupAdvantage())


@pytest.mark.parametrize(
    ("composition", "message"),
    [
        (Composition(source=DATA, terms=()), "no objective term"),
        (Composition(source=DATA, terms=(ClippedPolicyGradient(),)), "needs advantage"),
        (
            Composition(source=DATA, signals=CREDIT, terms=(ClippedPolicyGradient(),)),
            "needs behaviour_logprob",
        ),
        (
            Composition(source=FROZEN, signals=CREDIT, terms=(ClippedPolicyGradient(),)),
            "the source writes teacher",
        ),
        (Composition(source=LIVE, signals=(GroupAdvantage(),), terms=(CrossEntropy(),)), "reward"),
        (
            Composition(source=LIVE, terms=(Dpo(),), signals=(ReferenceLogprobs(),)),
            "needs preference",
        ),
        (Composition(source=LIVE, terms=(TeacherReverseKL(),)), "teacher_distribution"),
        (
            Composition(
                source=Rollouts(tasks=("sums",), sampling=SamplingSpec(top_p=0.9)),
                signals=CREDIT,
                terms=(ClippedPolicyGradient(),),
            ),
            "truncated",
        ),
        (
            Composition(
                source=LIVE, signals=CREDIT, terms=(ClippedPolicyGradient(where=(Kind.HUMAN,)),)
            ),
            "not the gradient that it claims to be",
        ),
        (
            Composition(
                source=Rollouts(tasks=("sums",), sampling=SamplingSpec(temperature=0.7)),
                signals=(ReferenceLogprobs(),),
                terms=(ReferenceKL(),),
            ),
            "at another temperature its gradient is not that of the KL",
        ),
        (
            Composition(source=DATA, terms=(CrossEntropy(where=(Kind.LEARNER,)),)),
            "the source writes external",
        ),
    ],
)
def test_illegal_compositions_are_refused_with_the_reason(composition, message):
    with pytest.raises(LegalityError, match=message):
        check_composition(composition, stage="s")


@pytest.mark.parametrize(
    "composition",
    [
        Composition(source=DATA, terms=(CrossEntropy(),)),
        Composition(source=FROZEN, terms=(CrossEntropy(),)),
        Composition(source=LIVE, signals=CREDIT, terms=(ClippedPolicyGradient(),)),
        Composition(
            source=Rollouts(tasks=("sums",), sampling=SamplingSpec(temperature=0.7)),
            signals=CREDIT,
            terms=(ClippedPolicyGradient(), CrossEntropy(weight=0.1)),
        ),
        Composition(
            source=Rollouts(tasks=("sums",), sampling=SamplingSpec(top_p=0.9)),
            signals=(TeacherDistribution(routes={"*": "base"}),),
            terms=(TeacherReverseKL(),),
        ),
    ],
)
def test_legal_compositions_pass(composition):
    check_composition(composition, stage="s")
    spelt = Compose(source=composition.source, signals=composition.signals, terms=composition.terms)
    assert spelt.compose() == composition


def test_records_are_checked_again_when_consumed():
    live = as_group(example_trajectory(kind=Kind.LEARNER))
    external = as_group(example_trajectory(kind=Kind.EXTERNAL))
    terms = (ClippedPolicyGradient(),)
    admitted = admit([live], terms, version=0, max_age=0)
    assert admitted.kept == (live,)
    with pytest.raises(LegalityError, match="tokens by external"):
        admit([external], terms, version=0, max_age=0)
    old = admit([live, live], terms, version=3, max_age=2)
    assert (len(old.kept), len(old.stale), old.age) == (0, 2, 3)
    assert admit([live], terms, version=2, max_age=2).kept == (live,)


def test_a_data_set_has_no_age():
    external = as_group(example_trajectory())
    assert admit([external], (CrossEntropy(),), version=99, max_age=0).kept == (external,)


def test_jsonl_tasks_are_identified_by_content(folder):
    (folder / "tasks.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    recipe = replace(python_recipe(), tasks={"sums": JsonlTasks(path="tasks.jsonl")})
    before = identities(recipe, folder)
    (folder / "tasks.jsonl").write_text('{"prompt": "1+1=", "answer": "3"}\n')
    after = identities(recipe, folder)
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_exponents_without_a_dot_are_numbers(folder):
    """YAML 1.1 alone would read 1e-5 as text."""
    path = folder / "recipe.yaml"
    path.write_text(YAML.replace("lr: 1.0e-4", "lr: 1e-6"))
    assert load_recipe(path).stages[1].optimizer.lr == 1e-6


@pytest.mark.parametrize(
    "make",
    [
        lambda: Optimizer(lr=float("nan")),
        lambda: Optimizer(betas=(1.5, 2)),
        lambda: Lora(rank=0),
        lambda: Measure(max_new_tokens=0),
        lambda: SamplingSpec(top_p=0),
        lambda: Stage(
            name="s", method=Sft(data=Dataset(path="x")), budget=Budget(steps=1), max_age=-1
        ),
    ],
)
def test_values_that_would_crash_later_are_refused_now(make):
    with pytest.raises(PosttrainError, match="expected"):
        make()


@pytest.mark.parametrize(
    ("source", "fix"),
    [
        ({"type": "dataset", "path": "a", "preferenc": True}, "did you mean 'preference'?"),
        ({"type": "rollouts", "tasks": ["t"], "member": {}}, "did you mean 'members'?"),
        ({"type": "rollouts", "tasks": ["t"], "autor": "human"}, "known: group_size, "),
    ],
)
def test_a_hint_names_options_of_the_part_that_was_written(source, fix):
    """``author`` is an option of another source."""
    method = {"name": "compose", "source": source, "terms": [{"type": "cross_entropy"}]}
    written = {
        "name": "r",
        "model": "m",
        "stages": [{"name": "s", "method": method, "budget": {"steps": 1}}],
    }
    with pytest.raises(ConfigError) as caught:
        convert(written, Recipe, origin="r.yaml")
    assert caught.value.fix.startswith(fix)
