"""The text of ``posttrain plan``: the resolved recipe. Writes nothing.

Data files are read and checked with the tokenizer, so that invalid rows are found before the run.
Weights are not loaded: the model folder is checked as far as its files declare it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import cast

from msgspec import structs

from posttrain.chat.renderer import ChatRenderer
from posttrain.chat.tokenizer import Tokenizer
from posttrain.core import config
from posttrain.core.documents import write_yaml
from posttrain.core.errors import ModelError
from posttrain.core.task import TaskSet
from posttrain.core.trajectory import Column
from posttrain.models.files import model_digest
from posttrain.models.folder import ModelFolder, read_folder
from posttrain.models.readers import ModelShape, read_ends, read_shape, read_tokenizer
from posttrain.models.routers import balance_words
from posttrain.parts.base import PlanFacts, Signal, Source
from posttrain.parts.legality import compared_in_the_loss
from posttrain.parts.registry import tag_of
from posttrain.parts.shelf import Reader
from posttrain.protocols import DataFile
from posttrain.recipe import Recipe
from posttrain.run.adaptable import check_adapters
from posttrain.run.material import PromptLengths, notes_of, overlaps, sampled_by
from posttrain.run.plan import Plan, PlannedStage, all_plans, is_hub_id, model_path
from posttrain.run.stage_folder import stage_folder_name
from posttrain.run.trust import code_of_recipe

BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Volume:
    """Steps of a stage, and the maximum number of tokens that it processes."""

    steps: int
    prompts: int  # tokens
    completions: int  # tokens, at most
    rows: int | None = None
    exact: bool = False


def preview(recipe: Recipe, *, root: Path, trust_code: bool = False) -> str:
    """The plan of a recipe, as text.

    Args:
        recipe: the configuration.
        root: folder that its paths are relative to.
        trust_code: allow the code of a model. Without, a model with code of its own is not read.

    Raises:
        PosttrainError: an error that would stop the run: options, legality, data, model folder.
    """
    path = Path(model_path(recipe.model, root)).expanduser()
    folder = read_folder(path) if path.is_dir() else None
    if folder is None and not is_hub_id(recipe.model):
        raise ModelError(
            f"no model folder {root / recipe.model}",
            expected="a folder with config.json and weights, or a hub id like org/name",
            fix="check the path; it is relative to the recipe's folder",
        )
    code = recipe.remote_code is not None
    needed = list(code_of_recipe(recipe, root=root))
    base = model_digest(path) if folder else recipe.model
    plan, *others = all_plans(recipe, root=root, base=base)
    for path_through in (plan, *others):
        check_adapters(path_through.stages, base=path)
    unread = code and not trust_code  # a plan is what one reads before code runs
    shape = read_shape(folder, remote_code=code) if folder and not unread else None
    facts = facts_of(plan, folder) if folder and not unread else None
    lines = [
        f"recipe    {recipe.name}  (identity {config.digest(recipe)[:16]})",
        f"model     {recipe.model}" + ("" if folder else "  (not on this disk: would be fetched)"),
        f"measured  {', '.join(recipe.measured_tasks) or 'nothing: the recipe has no task sets'}; "
        f"{recipe.measure.samples} samples per prompt, support threshold "
        f"{recipe.measure.threshold:.4f}",
    ]
    lines += [f"code      {code.words}" for code in needed]
    if unread:
        lines.append("not read  model and task sets, since the model has code: add --trust-code")
    if shape:
        lines.append(
            f"weights   {shape.num_weights:,} in {recipe.dtype}, context {shape.context}, "
            f"vocabulary {shape.vocab_size:,}"
        )
    if folder and (balance := balance_words(folder.text_config)):
        lines.append(f"routers   {balance}")
    if facts:
        lines += [f"material  {note}" for note in _material(plan, facts)]
    for number, planned in enumerate(plan.stages, start=1):
        lines += ["", *_stage_lines(number, planned, plan, shape, facts)]
    lines += _detours(plan, others)
    resolved = write_yaml(config.plain(recipe))
    return "\n".join([*lines, "", "resolved recipe:", "", resolved.rstrip()])


def _stage_lines(
    number: int,
    planned: PlannedStage,
    plan: Plan,
    shape: ModelShape | None,
    facts: PlanFacts | None,
) -> list[str]:
    spec, composition = planned.spec, planned.composition
    folder_name = stage_folder_name(spec.name, planned.identity)
    signals = " → ".join(tag_of(s) for s in composition.signals)
    terms = " + ".join(f"{t.weight:g} {tag_of(t)}" for t in composition.terms)
    lines = [
        f"{number}. {spec.name}  {tag_of(spec.method)}  ({folder_name})",
        f"   provenance  {planned.provenance}",
        f"   starts from {planned.init}",
        f"   signals     {signals or 'none'}",
        f"   objective   {terms}",
        "   legality    ok: every column and author that the objective needs is provided",
    ]
    amount = volume(planned, facts) if facts else None
    if amount and facts:
        lines += _data_lines(planned, facts)
        most = "" if amount.exact else "at most "
        lines.append(
            f"   steps       {amount.steps}  ({spec.groups_per_step} groups each"
            + (f", {amount.rows} rows" if amount.rows is not None else "")
            + ")"
        )
        lines.append(
            f"   tokens      {most}{amount.completions:,} of answers, "
            f"{amount.prompts:,} of prompts (each counted once per group)"
        )
    if shape:
        lines.append("   memory      " + _memory(planned, plan.recipe, shape))
    for gate in spec.gates:
        act = f"branch to {gate.to}" if gate.to else gate.otherwise.replace("_", " ")
        lines.append(f"   gate        {gate.metric} on {gate.task}: {gate.words}, else {act}")
    if spec.then:
        lines.append(f"   then        {spec.then}")
    return lines


def _detours(plan: Plan, others: Sequence[Plan]) -> list[str]:
    """The other paths through the gates, all of them legal."""
    if not others:
        return []
    ways = [" → ".join(f"{s.spec.name} (from {s.init})" for s in o.stages) for o in others]
    return ["", "if gates decide otherwise:", *(f"   {way}" for way in ways)]


def _memory(planned: PlannedStage, recipe: Recipe, shape: ModelShape) -> str:
    """Weights, gradients and optimiser state; activations depend on the micro-batch."""
    width = BYTES[recipe.dtype]
    weights = shape.num_weights * width
    if planned.spec.lora:
        return (
            f"{_size(weights)} of frozen weights, plus adapters of rank "
            f"{planned.spec.lora.rank} with gradients and AdamW state"
        )
    parts = f"{_size(weights)} weights + {_size(weights)} gradients + {_size(2 * weights)} AdamW"
    # A critic is a copy of the model that it starts from; that model is not kept in memory.
    composition = structs.replace(planned.composition, scalar_head=None)
    graders = replace(planned, composition=composition).references - {"learner"}
    extra = f" + {_size(len(graders) * weights)} frozen policies" if graders else ""
    if (head := planned.composition.scalar_head) is not None and head.trunk == "separate":
        extra += f" + {_size(4 * weights)} critic"
    tokens = planned.spec.micro_batch_tokens or 2**25
    logits = min(tokens * shape.vocab_size, 2**25) * 4
    held = "".join(
        f"; teacher {_teacher_memory(signal, planned, shape)} per step"
        for signal in planned.composition.signals
        if Column.TEACHER_LOGPROBS in signal.provides
    )
    return f"{parts}{extra}; logits up to {_size(logits)}{held}"


def _teacher_memory(signal: Signal, planned: PlannedStage, shape: ModelShape) -> str:
    """Size of a draw's teacher columns: distributions, or hidden states in their place."""
    # A row of a data set is limited by the context only.
    longest = max(
        shape.context if s.longest is None else s.group_size * s.longest
        for s in planned.composition.source.leaves
    )
    rows = planned.spec.groups_per_step * longest
    if set(signal.references()) <= set(compared_in_the_loss(planned.composition)):
        # Teachers are assumed to have the learner's hidden size.
        return f"hidden states up to {_size(rows * shape.hidden_size * 4)}"
    return f"distributions up to {_size(rows * (signal.num_entries or shape.vocab_size) * 4)}"


def _data_lines(planned: PlannedStage, facts: PlanFacts) -> list[str]:
    """What was found in the data files of a stage."""
    lines = []
    for file in _files(planned, facts):
        lines += [f"   {proof.subject:<11} {file.name}: {proof.words}" for proof in file.proofs]
        lines += [f"   {'':<11} {file.name}: {note}" for note in file.notes]
    return lines


def _files(planned: PlannedStage, facts: PlanFacts) -> Iterator[DataFile]:
    for leaf in planned.composition.source.leaves:
        rows = leaf.rows(facts.reader)
        yield from rows.files if rows is not None else ()


def _material(plan: Plan, facts: PlanFacts) -> Iterator[str]:
    """What the task sets and the data files say about each other, in words.

    Raises:
        TaskError: a prompt leaves no room for its answer.
    """
    reader, recipe = facts.reader, plan.recipe
    tasksets = {name: facts.taskset(name) for name in recipe.tasks}
    lengths = PromptLengths()
    for planned in plan.stages:
        sampled = sampled_by(planned, recipe, tasksets)
        lengths.check_fit(sampled, renderer=reader.renderer, context=reader.context)
    yield from notes_of(tasksets)
    yield from overlaps(
        tasksets,
        measured=recipe.measured_tasks,
        drawn=sorted({n for s in plan.stages for n in s.composition.source.draws_from}),
        files=[file for planned in plan.stages for file in _files(planned, facts)],
    )


def volume(planned: PlannedStage, facts: PlanFacts) -> Volume:
    """Count the steps and tokens of a stage; reads data files."""
    source, spec = planned.composition.source, planned.spec
    rows = source.rows(facts.reader)
    num_rows = None if rows is None else rows.num_groups
    steps = planned.steps(num_rows)
    if num_rows is not None:
        groups = steps * spec.groups_per_step / spec.updates_per_draw
    else:
        groups = math.ceil(steps / spec.updates_per_draw) * spec.groups_per_step
    tokens = [amounts for _, amounts in leaf_tokens(planned, facts, groups=groups)]
    prompts, completions = (round(sum(side)) for side in zip(*tokens, strict=True))
    return Volume(steps, prompts, completions, rows=num_rows, exact=num_rows is not None)


def leaf_tokens(
    planned: PlannedStage, facts: PlanFacts, *, groups: float
) -> list[tuple[Source, tuple[float, float]]]:
    """(Prompt, completion) tokens of each leaf of a source in ``groups`` groups.

    Exact on average for data; an upper bound for rollouts.
    """
    source = planned.composition.source
    leaves = zip(source.leaves, source.leaf_shares, strict=True)
    return [(leaf, leaf.tokens(share * groups, facts)) for leaf, share in leaves]


def facts_of(plan: Plan, folder: ModelFolder) -> PlanFacts:
    """Facts about a model folder and the task sets, without loading weights."""
    code = plan.recipe.remote_code is not None
    renderer = _renderer(folder, remote_code=code)
    context = read_shape(folder, remote_code=code).context

    @cache
    def taskset(name: str) -> TaskSet:
        chat = renderer.has_template
        return plan.recipe.tasks[name].build(name, root=plan.root, chat=chat)

    reader = Reader(root=plan.root, renderer=renderer, context=context)
    return PlanFacts(reader=reader, taskset=taskset)


def _renderer(folder: ModelFolder, *, remote_code: bool) -> ChatRenderer:
    """The renderer that the run will use, end tokens included, without loading the model."""
    tokenizer = cast(Tokenizer, read_tokenizer(folder, remote_code=remote_code))
    return ChatRenderer(tokenizer, end_tokens=read_ends(folder, remote_code=remote_code))


def _size(num_bytes: float) -> str:
    """Bytes in human-readable form.

    Example:
        >>> _size(2_600_000), _size(900)
        ('2.6 MB', '0.9 kB')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes / 1e3:.1f} kB"
