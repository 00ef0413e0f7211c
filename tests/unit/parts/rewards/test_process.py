"""Steps, learnt judges and labels by roll-outs, on fakes whose every number is known."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from posttrain.chat.renderer import ChatRenderer
from posttrain.core.errors import ConfigError, DataError, LegalityError, TaskError
from posttrain.core.learner import ScalarHead
from posttrain.core.provenance import Kind
from posttrain.core.task import Task
from posttrain.core.trajectory import Column, Group
from posttrain.lab.tour import BASE
from posttrain.parts.base import bound
from posttrain.parts.composition import Composition, method
from posttrain.parts.credit.advantages import GroupAdvantage
from posttrain.parts.credit.gae import Gae
from posttrain.parts.legality import check_composition
from posttrain.parts.policy.losses import PolicyGradient
from posttrain.parts.policy.ppo import Ppo
from posttrain.parts.policy.presets import Dapo, Grpo
from posttrain.parts.policy.value import ValueLoss
from posttrain.parts.preference.presets import OnlineDpo
from posttrain.parts.preference.self_play import Xpo
from posttrain.parts.rewards.judges import RewardModel, sigmoid
from posttrain.parts.rewards.presets import MathShepherd, Orm, OrmOnRollouts, Prm
from posttrain.parts.rewards.process import ProcessReward, StepLabels, aggregated
from posttrain.parts.rewards.reward_models import BradleyTerry, OutcomeBCE, StepBCE
from posttrain.parts.rewards.steps import NO_STEP, Steps, step_ends
from posttrain.parts.rewards.verify import Verify
from posttrain.parts.sources.dataset import Dataset
from posttrain.parts.sources.formats import joined, step_labels
from posttrain.parts.sources.rollouts import Rollouts
from posttrain.parts.supervised.likelihood import CrossEntropy
from posttrain.recipe import Budget, Recipe, Stage
from posttrain.run.plan import make_plan
from posttrain.tasks.jsonl import JsonlTasks
from posttrain.testing import (
    CharRenderer,
    FakePolicy,
    TablePolicy,
    as_group,
    check_signal,
    example_trajectory,
    fake_tools,
    tiny_tokenizer,
)

RENDER = CharRenderer()


def said(text, *, end=True, prompt="?", kind=Kind.LEARNER):
    answer = [*map(ord, text), *([0] if end else [])]
    return example_trajectory(prompt=[*map(ord, prompt)], answer=answer, kind=kind)


def pieces(text, steps=Steps(), **options):  # noqa: B008  # frozen
    """The steps as text, from where they end."""
    t = said(text, **options)
    ends = step_ends(RENDER, t, steps)
    starts = [t.prompt_length, *(e + 1 for e in ends[:-1])]
    return [RENDER.text(t.tokens[s : e + 1]) for s, e in zip(starts, ends, strict=True)]


# --- where steps end -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one", ["one"]),
        ("one\ntwo", ["one\n", "two"]),
        ("one\n\n\ntwo\nthree", ["one\n", "\n\ntwo\n", "three"]),
        ("one\ntwo\n", ["one\n", "two\n"]),
        ("\n\none", ["\n\none"]),
        ("one\n \n", ["one\n \n"]),
    ],
)
def test_steps_of_a_text(text, expected):
    assert pieces(text) == expected
    assert pieces(text, end=False) == expected


def test_the_last_step_ends_with_the_end_of_turn_token():
    t = said("a\nb")
    assert step_ends(RENDER, t, Steps()).tolist() == [2, 4]
    assert t.tokens[4] == 0


def test_a_long_delimiter_and_an_empty_answer():
    assert pieces("one;;two;three", Steps(delimiter=";;")) == ["one;;", "two;three"]
    assert pieces("") == [""]
    nothing = example_trajectory(prompt=(1, 2), answer=(3,), kind=Kind.ENVIRONMENT)
    assert len(step_ends(RENDER, nothing, Steps())) == 0
    with pytest.raises(ConfigError, match="delimiter"):
        Steps(delimiter="")


def test_a_special_token_ends_steps_and_is_no_text_of_one():
    tokenizer = tiny_tokenizer()
    renderer = ChatRenderer(tokenizer)
    mark = tokenizer.convert_tokens_to_ids("<|system|>")
    a, b = (tokenizer.convert_tokens_to_ids(c) for c in "ab")
    t = example_trajectory(prompt=(a,), answer=(a, mark, mark, b, mark, a, 1), kind=Kind.LEARNER)
    ends = step_ends(renderer, t, Steps(delimiter="<|system|>", special=True))
    assert ends.tolist() == [2, 5, 7]
    # The text of a completion has special tokens in it, so this finds them as well.
    assert step_ends(renderer, t, Steps(delimiter="<|system|>")).tolist() == [2, 5, 7]


def test_only_trained_tokens_end_steps():
    from posttrain.core.provenance import Producer, Role, Sampling, Span
    from posttrain.core.trajectory import Trajectory

    live, tool = Producer(kind=Kind.LEARNER, name="l"), Producer(kind=Kind.ENVIRONMENT, name="e")
    mine = {"role": Role.ASSISTANT, "producer": live, "versions": (0, 0), "sampling": Sampling()}
    tokens = np.array([*map(ord, "?a\nb\nc")], np.int32)
    spans = (
        Span(length=1, role=Role.USER, producer=tool),
        Span(length=2, **mine),
        Span(length=2, role=Role.USER, producer=tool),
        Span(length=1, **mine),
    )
    t = Trajectory(task="t/0", tokens=tokens, prompt_length=1, spans=spans)
    assert step_ends(RENDER, t, Steps()).tolist() == [2, 5]


# --- judges ----------------------------------------------------------------------------------


def judge(judgement):
    return FakePolicy({"a": 1.0}, name="rm", judgement=judgement)


LENGTH = judge(len)  # the score is the number of characters read, prompt included


def rewards(groups):
    return [float(m.columns[Column.REWARD]) for g in groups for m in g.members]


def judged_by(signal, model):
    """A signal at work whose model ``m`` is this."""
    return bound(signal, fake_tools(policies={"m": model}))


def test_a_reward_model_judges_the_whole_answer():
    groups = [as_group(said("abc"), said("a"))]
    assert rewards(judged_by(RewardModel(model="m"), LENGTH)(groups)) == [4, 2]
    half = RewardModel(model="m", weight=-0.5)
    assert rewards(judged_by(half, LENGTH)(groups)) == [-2, -1]
    squashed = RewardModel(model="m", squash="sigmoid")
    got = rewards(judged_by(squashed, LENGTH)(groups))
    assert got == pytest.approx([1 / (1 + np.exp(-4)), 1 / (1 + np.exp(-2))])


def test_judges_in_turn_add_up():
    first = judged_by(RewardModel(model="m"), LENGTH)
    second = judged_by(RewardModel(model="m", weight=10, add=True), judge(lambda t: 1.0))
    assert rewards(second(first([as_group(said("abc"))]))) == [14]
    with pytest.raises(LegalityError, match="no reward to add to"):
        second([as_group(said("abc"))])


@pytest.mark.parametrize("signal", [RewardModel(model="m"), ProcessReward(model="m")])
def test_a_judge_without_a_head_is_refused_at_once(signal):
    with pytest.raises(LegalityError, match="no scalar head"):
        judged_by(signal, FakePolicy({"a": 1.0}))


P = {"?a\n": 0.8, "?a\nb\n": 0.5, "?a\nb\nc": 0.9}  # of the steps of a⏎b⏎c


def steps_judge():
    return judge(lambda text: float(np.log(P[text] / (1 - P[text]))) if text in P else 99.0)


def process(**options):
    score = judged_by(ProcessReward(model="m", **options), steps_judge())
    (group,) = score([as_group(said("a\nb\nc"))])
    return group.members[0].columns


@pytest.mark.parametrize(("use", "expected"), [("min", 0.5), ("product", 0.36), ("last", 0.9)])
def test_step_rewards_become_one_reward(use, expected):
    columns = process(use=use)
    assert float(columns[Column.REWARD]) == pytest.approx(expected)
    at = np.flatnonzero(np.isfinite(columns[Column.STEP_REWARD]))
    assert at.tolist() == [2, 4, 6]  # the end of turn is the last step's last token
    assert columns[Column.STEP_REWARD][at] == pytest.approx([0.8, 0.5, 0.9])
    assert Column.TOKEN_REWARD not in columns
    assert float(process(use=use, weight=-2)[Column.REWARD]) == pytest.approx(-2 * expected)


def test_aggregation_of_one_step_is_the_step():
    for use in ("min", "product", "last"):
        assert aggregated(np.array([0.3]), use=use) == 0.3


def test_dense_rewards_stand_at_step_ends():
    dense = process(use="dense", weight=0.5)[Column.TOKEN_REWARD]
    assert dense == pytest.approx([0, 0, 0.4, 0, 0.25, 0, 0.45])
    progress = process(use="progress")[Column.TOKEN_REWARD]
    assert progress == pytest.approx([0, 0, 0.8, 0, -0.3, 0, 0.4])
    assert progress.sum() == pytest.approx(0.9), "progress telescopes to the last step"
    assert Column.REWARD not in process(use="dense")


def test_dense_rewards_join_those_that_are_there():
    group = as_group(said("a\nb\nc"))
    earned = np.full(7, 1.0)
    group = Group(
        task=group.task,
        members=tuple(m.with_columns({Column.TOKEN_REWARD: earned}) for m in group.members),
    )
    (scored,) = judged_by(ProcessReward(model="m", use="dense"), steps_judge())([group])
    assert scored.members[0].columns[Column.TOKEN_REWARD][2] == pytest.approx(1.8)


@pytest.mark.parametrize("use", ["min", "dense"])
def test_contracts(use):
    groups = [as_group(said("a\nb"), said("c")), as_group(said("d"))]
    tools = fake_tools(policies={"m": LENGTH})
    check_signal(ProcessReward(model="m", use=use), groups, tools)
    check_signal(RewardModel(model="m"), groups, tools)


def test_sigmoid_does_not_overflow():
    assert (sigmoid(-1e4), sigmoid(1e4)) == (0.0, 1.0)
    assert sigmoid(0.3) == pytest.approx(1 / (1 + np.exp(-0.3)))


# --- labels by roll-outs ---------------------------------------------------------------------


class Letters:
    """Right when the text ends with ``b`` and holds no ``x``. Half right counts as failed."""

    name, success = "example", 1.0
    train = (Task(taskset="example", prompt="?", answer="b"),)
    held_out = ()

    def score(self, tasks, completions):
        return [1.0 if c.endswith("b") and "x" not in c else 0.5 for c in completions]


def drawn(text):
    return as_group(replace(said(text), task=Letters.train[0].key))


def careless(text):
    """After a line b with probability 1/4, else x; then the end."""
    return (0.25, 0.75, 0.0) if text[-1] == "\n" else (0.0, 0.0, 1.0)


def completed_by(policy):
    """Tools of a stage whose continuations this policy writes."""
    return fake_tools(policies={"input": policy}, tasksets={"example": Letters()}, seed=3)


def labelled(text, *, policy=None, **options):
    signal = StepLabels(**{"samples": 64, "max_new_tokens": 3, **options})
    tools = completed_by(policy or TablePolicy("bx", careless))
    (group,) = signal.score([drawn(text)], tools)
    return group.members[0].columns[Column.STEP_LABEL]


def test_soft_labels_are_shares_of_continuations_that_succeed():
    labels = labelled("a\nx\nb", samples=400, labels="soft")
    assert labels[[2, 4, 6]].tolist()[1:] == [0.0, 0.0], "nothing mends an x"
    assert labels[2] == pytest.approx(0.25, abs=0.08)
    assert labels[[0, 1, 3, 5]].tolist() == [NO_STEP] * 4
    assert labelled("a\nb", samples=4)[-1] == 1.0, "the last label is the answer's own"


def test_hard_estimation_is_the_default():
    assert labelled("a\nx\nb", samples=400)[[2, 4, 6]].tolist() == [1.0, 0.0, 0.0]
    signal, *_ = MathShepherd(tasks=("t",)).compose().signals
    assert signal == StepLabels(labels="hard", max_new_tokens=256)


def test_hard_labels_ask_whether_any_did():
    assert labelled("a\nx\nb", labels="hard")[[2, 4, 6]].tolist() == [1.0, 0.0, 0.0]


def test_labels_are_a_function_of_seed_and_text():
    assert labelled("a\nb").tolist() == labelled("a\nb").tolist()
    assert labelled("a\nb", samples=7)[2] in [k / 7 for k in range(8)]


def test_every_continuation_has_its_own_seed():
    asked = []

    table = TablePolicy("b", lambda t: (0.0, 1.0))

    class Listener:
        version, producer, renderer = None, table.producer, RENDER

        def generate(self, requests):
            asked.extend(requests)
            return table.generate(requests)

    labelled("a\nb\nb", policy=Listener(), samples=3)
    assert len(asked) == 6
    assert len({r.sampling.seed for r in asked}) == 6
    assert [RENDER.text(r.prompt) for r in asked] == ["?a\n"] * 3 + ["?a\nb\n"] * 3


def test_a_foreign_task_is_refused():
    tools = completed_by(TablePolicy("b", lambda t: (0.0, 1.0)))
    with pytest.raises(TaskError, match="no task set"):
        StepLabels().score([as_group(said("a\nb"))], tools)


def test_label_contract():
    tools = completed_by(TablePolicy("b", lambda t: (0.0, 1.0)))
    check_signal(StepLabels(samples=2), [drawn("a\nb"), drawn("c")], tools)


# --- labelled steps in a file ----------------------------------------------------------------


def test_rows_of_steps():
    row = {"prompt": "?", "completions": ["a", "b", "c"], "labels": [True, 0.25, False]}
    text = joined(row, Steps())
    assert text == "a\nb\nc"
    columns = step_labels(row, said(text), steps=Steps(), renderer=RENDER)
    assert columns[Column.STEP_LABEL].tolist() == [-1, -1, 1, -1, 0.25, -1, 0.0]
    chat = {**row, "prompt": [{"role": "user", "content": "?"}]}
    assert joined(chat, Steps(delimiter=" ")) == [{"role": "assistant", "content": "a b c"}]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"completions": "ab", "labels": [1]}, "list of texts"),
        ({"completions": ["a", " "], "labels": [1, 1]}, "none empty"),
        ({"completions": ["a"], "labels": [2]}, "from 0 to 1"),
        ({"completions": ["a"], "labels": "yes"}, "from 0 to 1"),
        ({"completions": ["a", "b"], "labels": [1]}, "1 labels of 2"),
        ({"completions": ["a\nb"], "labels": [1]}, "1 steps, of which 2"),
    ],
)
def test_rows_that_cannot_be_used(row, words):
    row = {"prompt": "?", **row}

    def read():
        step_labels(row, said(joined(row, Steps())), steps=Steps(), renderer=RENDER)

    with pytest.raises(DataError, match=words):
        read()


# --- legality --------------------------------------------------------------------------------

LIVE, HEAD = Rollouts(tasks=("sums",)), ScalarHead(trunk="shared")
ROWS = Dataset(path="x.jsonl", preference=True)


@pytest.mark.parametrize(
    ("composition", "words"),
    [
        (Composition(source=ROWS, terms=(BradleyTerry(),)), "no scalar head"),
        (
            Composition(source=ROWS, terms=(BradleyTerry(margin="column"),), scalar_head=HEAD),
            "margin",
        ),
        (Composition(source=LIVE, terms=(StepBCE(),), scalar_head=HEAD), "step_labels"),
        (
            Composition(
                source=Dataset(path="x.jsonl"),
                signals=(StepLabels(),),
                terms=(StepBCE(),),
                scalar_head=HEAD,
            ),
            "have no task",
        ),
        (
            Composition(
                source=LIVE,
                signals=(RewardModel(model="m", add=True), GroupAdvantage()),
                terms=(PolicyGradient(),),
            ),
            "reward_model needs reward",
        ),
        (
            Composition(
                source=LIVE,
                signals=(ProcessReward(model="m", use="dense"), GroupAdvantage()),
                terms=(PolicyGradient(),),
            ),
            "group_advantage needs reward",
        ),
    ],
)
def test_what_cannot_work_is_refused_when_planned(composition, words):
    with pytest.raises(LegalityError, match=words):
        check_composition(composition, stage="s")


def test_dense_process_rewards_feed_a_critic():
    check_composition(
        Composition(
            source=LIVE,
            signals=(Verify(), ProcessReward(model="m", use="dense"), Gae()),
            terms=(PolicyGradient(), ValueLoss()),
            scalar_head=ScalarHead(),
        ),
        stage="s",
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BradleyTerry(margin=-1.0), "0 or more"),
        (lambda: BradleyTerry(centring=-1.0), "0 or more"),
        (lambda: OutcomeBCE(aggregate="token_mean"), "sequence_mean"),
        (lambda: RewardModel(model="m", weight=0.0), "other than 0"),
        (lambda: ProcessReward(model="m", use="dense", add=True), "add up by themselves"),
        (lambda: StepLabels(samples=0), "1 or more"),
        (lambda: Dataset(path="x", margin="m", unpaired=True), "margins on pairs"),
        (lambda: Dataset(path="x", steps=Steps(), preference=True), "labels of steps"),
        (lambda: ScalarHead(start="learner"), "stands still"),
        (lambda: Dapo(tasks=("t",), rewards=(RewardModel(model="m"),)).compose(), "max_draws: 1"),
    ],
)
def test_options_that_mean_nothing(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_margins_that_nobody_reads_are_refused():
    pairs = Dataset(path="x.jsonl", margin="m", preference=True)
    with pytest.raises(LegalityError, match="no term reads margins"):
        check_composition(Composition(source=pairs, terms=(CrossEntropy(),)), stage="s")


def test_methods_spelt_out():
    data = Dataset(path="x.jsonl")
    pairs = Dataset(path="x.jsonl", margin="m")
    assert method("bradley_terry", data=data).compose() == Composition(
        source=Dataset(path="x.jsonl", preference=True),
        terms=(BradleyTerry(margin=0.0, centring=0.01),),
        scalar_head=HEAD,
    )
    assert method("bradley_terry", data=pairs).compose().terms == (BradleyTerry(margin="column"),)
    assert Orm(data=data).compose().terms == (OutcomeBCE(at="last", target="label"),)
    own = OrmOnRollouts(tasks=("t",)).compose()
    assert (own.source.policy, own.signals) == ("input", (Verify(),))
    assert Prm(data=data).compose().source.steps == Steps()
    shepherd = MathShepherd(tasks=("t",), samples=4).compose()
    assert shepherd.signals == (StepLabels(samples=4, max_new_tokens=256),)
    for made in (
        own,
        shepherd,
        Prm(data=data).compose(),
        method("bradley_terry", data=pairs).compose(),
    ):
        check_composition(made, stage="s")


@pytest.mark.parametrize("method", [Grpo, OnlineDpo, Xpo])
def test_any_method_may_ask_another_judge(method):
    asked = (Verify(), RewardModel(model="rm", weight=0.1, add=True))
    composition = method(tasks=("t",), rewards=asked).compose()
    assert composition.signals[:2] == asked
    check_composition(composition, stage="s")


# --- plans -----------------------------------------------------------------------------------


def recipe(root, *stages, model="base"):
    (root / "t.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' * 3)
    (root / "p.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    tasks = {"t": JsonlTasks(path="t.jsonl", held_out=1)}
    return Recipe(name="r", model=model, tasks=tasks, stages=tuple(stages))


def stage(name, method, **options):
    return Stage(name=name, method=method, budget=Budget(steps=1), **options)


RM = method("bradley_terry", data=Dataset(path="p.jsonl"))


def asking(model):
    return Grpo(tasks=("t",), rewards=(RewardModel(model=model),))


def test_a_plan_knows_who_can_judge(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    model_folder(base, "Qwen3ForCausalLM")
    good = [stage("rm", RM), stage("rl", asking("rm"), init="base")]
    plan = make_plan(recipe(tmp_path, *good), root=tmp_path, base="b")
    assert plan.stage("rl").references == {"learner", "rm"}
    assert plan.stage("rm").identity in plan.stage("rl").inputs["references"].values()

    for stages in (
        [stage("rl", asking("base"))],
        [stage("rl", asking("path:base"))],
        [stage("rl", asking("input"))],
        [stage("sft", Grpo(tasks=("t",))), stage("rl", asking("sft"))],
        [stage("ppo", Ppo(tasks=("t",))), stage("rl", asking("ppo"))],  # its critic is no judge
    ):
        with pytest.raises(LegalityError, match="no scalar head of its own"):
            make_plan(recipe(tmp_path, *stages), root=tmp_path, base="b")
    with pytest.raises(ConfigError, match="refers to policy 'learner'"):
        make_plan(recipe(tmp_path, stage("rl", asking("learner"))), root=tmp_path, base="b")


def model_folder(folder, architecture):
    """The lab's base, under another name of its class."""
    shutil.copytree(BASE, folder, dirs_exist_ok=True)
    config = json.loads((BASE / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))


@pytest.mark.parametrize("sign", ["file", "classifier"])
def test_a_folder_with_a_head_may_judge(tmp_path, sign):
    folder = tmp_path / "rm"
    folder.mkdir()
    kind = "Qwen3ForSequenceClassification" if sign == "classifier" else "Qwen3ForCausalLM"
    model_folder(folder, kind)
    if sign == "file":
        (folder / "scalar_head.safetensors").write_bytes(b"")
    make_plan(recipe(tmp_path, stage("rl", asking("path:rm"))), root=tmp_path, base="b")


def test_a_critic_is_planned_like_a_reference(tmp_path):
    stages = [stage("rm", RM), stage("ppo", Ppo(tasks=("t",), critic_start="rm"), init="base")]
    plan = make_plan(recipe(tmp_path, *stages), root=tmp_path, base="b")
    assert "rm" in plan.stage("ppo").references
    bad = recipe(tmp_path, stage("ppo", Ppo(tasks=("t",), critic_start="nobody")))
    with pytest.raises(ConfigError, match="refers to policy 'nobody'"):
        make_plan(bad, root=tmp_path, base="b")
