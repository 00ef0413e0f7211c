"""The command line.

Heavy libraries are imported inside the commands that need them, so ``--help`` is instant.

Exit codes are those of :mod:`posttrain.cli.ends`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from posttrain.cli.diagnosis import diagnose, treat
from posttrain.cli.ends import CODES, GOES_ON, INTERRUPTED, STOPPED_BY_GATE, end, unread
from posttrain.cli.targets import OUT_FILE, OUT_FOLDER, out_folder
from posttrain.cli.trust import is_trusted, trusting
from posttrain.core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from posttrain.measure.measurement import Measurement
    from posttrain.measure.spec import Measure
    from posttrain.run.pipeline import Outcome

RUN = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


class Commands(click.Group):
    """Suggests the nearest command for an unknown one; lists commands in order of definition."""

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        found = super().get_command(ctx, name)
        if found is None:
            ctx.fail(f"no command {name!r}; {nearest(name, self.commands)}")
        return found

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # click would end the process as if the command had failed
            raise click.exceptions.Exit(unread()) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=CODES)
@click.version_option(package_name="posttrain")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
def cli() -> None:
    """LLM post-training as structured intervention on model behaviour.

    Start with `posttrain tour`: a small language model is measured, expanded, reshaped and
    consolidated on this machine's CPU, and a report says what each stage really did.
    """


@cli.command()
@click.option(
    "--out", type=OUT_FOLDER, default=Path("out/tour"), show_default=True, help="Run folder."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the whole tour.")
def tour(out: Path, seed: int) -> None:
    """The embedded lab: expand, reshape, prefer, consolidate, in minutes on a CPU."""
    from posttrain.lab.tour import write_tour

    _go(write_tour(out, seed=seed), out)


@cli.command()
@click.argument("recipe", type=FILE)
@click.option("--out", type=OUT_FOLDER, help="Run folder.  [default: out/<recipe name>]")
@click.option(
    "--accept",
    multiple=True,
    metavar="NAME",
    help="Go on although this changed under a started stage: reward, data, versions, files, …",
)
@click.option(
    "--restart",
    multiple=True,
    metavar="STAGE",
    help="Set this stage's work aside, with what builds on it, and start it again.",
)
@trusting
def run(recipe: Path, out: Path | None, accept: tuple[str, ...], restart: tuple[str, ...]) -> None:
    """Run a recipe, or go on with it. A finished recipe is not run again."""
    _go(recipe, out, accept=accept, restart=restart)


def _go(
    recipe_path: Path, out: Path | None, *, accept: Sequence[str] = (), restart: Sequence[str] = ()
) -> None:
    from posttrain.cli.console import Console, interrupts
    from posttrain.recipe import load_recipe

    recipe = load_recipe(recipe_path)
    out = out or out_folder(Path("out") / recipe.name)
    console = Console()
    console.headline(recipe.name, out)
    # Imported after the first line is on the screen: torch takes seconds.
    from posttrain.api import run as run_recipe

    try:
        with console, interrupts(console.note) as stop:
            outcome = run_recipe(
                recipe,
                out=out,
                root=recipe_path.parent,
                observe=console.observe,
                stop=stop,
                accept=accept,
                restart=restart,
                trust_code=is_trusted(),
            )
    except KeyboardInterrupt:
        click.echo(GOES_ON, err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    _finish(outcome, console.summary)


def _finish(outcome: Outcome, say: Callable[[Outcome, Path], None]) -> None:
    from posttrain.cli.pages import write_run_report

    say(outcome, write_run_report(outcome.out))
    if outcome.stopped_by:
        raise click.exceptions.Exit(STOPPED_BY_GATE)


@cli.command()
@click.argument("recipe", type=FILE)
@click.option("--check", "checks", is_flag=True, help="Load and try what the run relies on.")
@trusting
def plan(recipe: Path, checks: bool) -> None:
    """Print the resolved recipe, its legality, memory, tokens and steps. Touches nothing.

    With --check, the models, rows and rewards are loaded and tried as well; `run` always does
    this first.
    """
    from posttrain.recipe import load_recipe
    from posttrain.run.preview import preview

    content = load_recipe(recipe)
    click.echo(preview(content, root=recipe.parent, trust_code=is_trusted()))
    if checks:
        from posttrain.api import check
        from posttrain.cli.console import Console

        click.echo("")
        with Console() as console:
            checked = check(
                content, root=recipe.parent, observe=console.observe, trust_code=is_trusted()
            )
        click.echo(f"checked: {len(checked.proofs)} proofs, nothing was trained or written")


@cli.command()
@click.argument("model")
@click.option("--tasks", type=FILE, required=True, help="A recipe, or any YAML with `tasks`.")
@click.option("--out", type=OUT_FILE, help="Write the measurement here (JSON).")
@click.option("--samples", type=click.IntRange(min=2), help="Samples per prompt.")
@click.option("--details", is_flag=True, help="Every reading, with a sentence each.")
@trusting
def probe(model: str, tasks: Path, out: Path | None, samples: int | None, details: bool) -> None:
    """Measure a model on task sets: success, support, signal, variety, form; with intervals."""
    from posttrain.api import measure
    from posttrain.cli.console import Console
    from posttrain.cli.tables import measurement_table, readings_table
    from posttrain.recipe import measuring_recipe

    recipe = measuring_recipe(tasks, model=model, samples=samples)
    with Console() as console:
        result = measure(
            recipe, root=tasks.parent, observe=console.observe, trust_code=is_trusted()
        )
    if out:
        from posttrain.core.files import write_atomic

        write_atomic(out, result.to_json())
    click.echo((readings_table if details else measurement_table)(result, recipe.measure))


cli.add_command(diagnose)
cli.add_command(treat)


@cli.command()
@click.argument("before")
@click.argument("after", required=False)
@click.option(
    "--tasks",
    "tasks",
    help="Task sets to compare, with commas between; for two models a recipe.  [default: all]",
)
@click.option("--samples", type=click.IntRange(min=2), help="Samples per prompt, of two models.")
@trusting
def compare(before: str, after: str | None, tasks: str | None, samples: int | None) -> None:
    """What changed between two policies: expanded, sharpened, kept, weakened, lost.

    BEFORE and AFTER are measurement files, or RUN:POLICY such as out/tour:base. A run folder
    alone compares its base with its last policy. With `--tasks recipe.yaml` they are models, which
    are measured first: then KL, and how probable new successes were before, are shown as well.
    """
    from posttrain.measure.measurement import require_comparable
    from posttrain.measure.readings import require_prompts

    if tasks is not None and Path(tasks).is_file():
        click.echo(_between(before, after, Path(tasks), samples))
        return
    if samples is not None:
        raise ConfigError("--samples without models to measure", fix="add --tasks recipe.yaml")
    run = Path(before) if after is None and tasks is None else None
    if after is None:
        policies = _policies(Path(before))
        before, after = f"{before}:{policies[0]}", f"{before}:{policies[-1]}"
    (first, spec), (second, _) = _measurement(before), _measurement(after)
    if tasks is not None:
        chosen = [name.strip() for name in tasks.split(",")]
        first, second = first.only(chosen), second.only(chosen)
    require_comparable(first, second)
    require_prompts(first)
    blocks = [_comparison(first, second, spec)]
    if run is not None:
        from posttrain.cli.tables import retention_table
        from posttrain.run.history import read_history

        kept = read_history(run).retained()
        blocks += [retention_table(kept)] if kept else []
    click.echo("\n\n".join(blocks))


def _comparison(first: Measurement, second: Measurement, spec: Measure) -> str:
    """The tables that need only the samples of two policies."""
    from posttrain.cli.tables import change_table, comparison_table, support_table
    from posttrain.measure.attribution import attribute_changes

    change = attribute_changes(first, second, epsilon=spec.threshold, confidence=spec.confidence)
    support = support_table(first, second, spec)
    rest = change_table(first, second, confidence=spec.confidence)
    return f"{comparison_table(change)}\n\n{support}\n\n{rest}"


def _between(before: str, after: str | None, tasks: Path, samples: int | None) -> str:
    """Two models, measured now."""
    from posttrain.api import compare as compare_models
    from posttrain.cli.console import Console
    from posttrain.cli.tables import reach_words, readings_words
    from posttrain.recipe import measuring_recipe

    if after is None:
        raise ConfigError(
            f"one model to compare: {before}", expected="two, BEFORE and AFTER, with --tasks FILE"
        )
    sides = [_model_of(name) for name in (before, after)]
    recipe = measuring_recipe(tasks, model=sides[0], samples=samples)
    with Console() as console:
        found = compare_models(
            recipe, *sides, root=tasks.parent, observe=console.observe, trust_code=is_trusted()
        )
    blocks = [_comparison(found.before, found.after, recipe.measure)]
    for task in recipe.measured_tasks:
        distances = [r for r in found.readings if r.task == task]
        blocks += [readings_words(f"{task}: distance", distances)] if distances else []
    blocks += [reach_words(found.reach)] if found.reach else []
    blocks += [f"missing: {words}" for words in found.missing]
    return "\n\n".join(blocks)


def _model_of(name: str) -> str:
    """The folder of a model or of RUN:POLICY; otherwise a hub id.

    Raises:
        ConfigError: neither of them.
    """
    from posttrain.run.folder import RunFolder
    from posttrain.run.plan import is_hub_id, model_path

    out, colon, policy = name.rpartition(":")
    folder = RunFolder(Path(out))
    if Path(name).is_dir():
        return str(Path(name).resolve())
    if colon and folder.is_run:
        if policy == "base":
            return model_path(folder.recipe().model, folder.path)
        if made := folder.models(policy):
            return str(made[-1].resolve())
        known = ["base", *(s.name for s in folder.recipe().stages)]
        raise ConfigError(f"{out} has no model of {policy!r}", fix=nearest(policy, known))
    if not is_hub_id(name):
        raise ConfigError(
            f"no model {name}",
            expected="a model folder, RUN:POLICY or a hub id, when --tasks names a recipe",
            fix="check the path",
        )
    return name


def _policies(out: Path) -> list[str]:
    """Names of the measured policies of a run, in order."""
    from posttrain.run.folder import RunFolder

    folder = RunFolder(out)
    names, measured = ["base", *(s.name for s in folder.recipe().stages)], folder.measured()
    done = [n for n in names if n in measured]
    if len(done) < 2:
        raise ConfigError(
            f"{out} has measured {', '.join(done) or 'no policy'} so far",
            expected="two policies to compare",
            fix="let the run go on until its first stage is measured",
        )
    return done


def _measurement(text: str) -> tuple[Measurement, Measure]:
    """A measurement from a file or RUN:POLICY, and the options to analyse it with.

    For a file these are the defaults of :class:`Measure` for its number of samples.
    """
    from posttrain.measure.spec import Measure
    from posttrain.run.folder import RunFolder, read_measurement

    path = Path(text)
    if path.is_file():
        found = read_measurement(path)
        return found, Measure(samples=found.tasks[0].num_samples) if found.tasks else Measure()
    out, colon, policy = text.rpartition(":")
    if not colon:
        raise ConfigError(
            f"no measurement {text}",
            expected="a file that `posttrain probe --out` wrote, or RUN:POLICY, such as "
            "out/tour:base",
            fix=_how_to_name(path),
        )
    folder = RunFolder(Path(out))
    spec = folder.recipe().measure
    return folder.measurement(policy), spec


def _how_to_name(path: Path) -> str:
    """The fix for a path that is no measurement."""
    if (path / "config.json").is_file():
        return "models are measured first: add --tasks recipe.yaml, which holds the task sets"
    return f"name a policy: {path}:base" if path.is_dir() else "check the path"


@cli.command()
@click.argument("run_folder", metavar="RUN", type=RUN)
def report(run_folder: Path) -> None:
    """Write RUN/report.html again: one self-contained page."""
    from posttrain.run.folder import RunFolder

    RunFolder(run_folder).recipe(checked=False)
    from posttrain.cli.pages import write_run_report
    from posttrain.run.history import read_history

    click.echo(write_run_report(run_folder))
    for alarm in read_history(run_folder, lenient=True).alarms:
        click.echo(f"  ! {alarm}", err=True)


@cli.command()
@click.argument("name", required=False)
def methods(name: str | None) -> None:
    """The map of methods, or one of them explained."""
    from posttrain.cli.tables import method_page, methods_table

    click.echo(method_page(name) if name else methods_table())


@cli.group(cls=Commands)
def ledger() -> None:
    """The hash-chained record of a run."""


@ledger.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--head", help="A head that is known from elsewhere.")
@click.option("--recipe", type=FILE, help="Compare what the recipe names with what was used, too.")
def verify(path: Path, head: str | None, recipe: Path | None) -> None:
    """Check a run: its hash chain, and every file against it. PATH is a run folder or a ledger.

    With --recipe, the data, task sets, reward code and models that the recipe names now are
    compared with those of the run.
    """
    from posttrain.run.audit import audit
    from posttrain.run.folder import RunFolder
    from posttrain.run.ledger import verify as verify_ledger
    from posttrain.run.recorded import changed

    folder = RunFolder(path)
    if path.is_dir() and not folder.is_run and not folder.ledger_file.is_file():
        name = folder.ledger_file.name
        raise ConfigError(f"no ledger in {path}", expected=f"a run folder, or its {name}")
    file = folder.ledger_file if path.is_dir() else path
    result = verify_ledger(file, head=head)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(result.kinds.items()))
    click.echo(f"{file}: the chain holds over {result.num_records} records ({kinds})")
    click.echo(f"head {result.head}")
    if result.torn_bytes:
        click.echo(f"an unfinished last line of {result.torn_bytes} bytes is no record")
    if not path.is_dir():
        return
    faults = audit(folder)
    for fault in faults:
        click.echo(str(fault))
    if faults:
        raise changed(path, faults)
    click.echo(f"{len(folder.recorded().entries)} files are what it records")
    if recipe is not None:
        from posttrain.core.errors import FileChanged
        from posttrain.recipe import load_recipe
        from posttrain.run.resume import outside_changes

        if differs := outside_changes(load_recipe(recipe), folder, root=recipe.parent):
            raise FileChanged(
                f"{recipe} names what the run did not use: " + "; ".join(differs),
                expected="the recipe, data, code and models of the run",
                fix="put them back, or keep in mind that the run is not theirs",
            )
        click.echo(f"what {recipe} names is what the run used")


def main() -> None:
    """Entry point: every error becomes a message and an exit code."""
    debug = "--debug" in sys.argv
    sys.exit(end(lambda: cli(standalone_mode=False, prog_name="posttrain"), debug=debug))


if __name__ == "__main__":
    main()
