"""The command line.

Heavy libraries are imported inside the commands that need them, so ``--help`` is instant.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from posttrain.errors import ConfigError, PosttrainError, nearest

if TYPE_CHECKING:
    from posttrain.pipeline import Outcome
    from posttrain.probes.measurement import Measurement
    from posttrain.recipe import Recipe

OUT = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


class Commands(click.Group):
    """Names the nearest command when one is misspelt, and keeps the order of definition."""

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        found = super().get_command(ctx, name)
        if found is None:
            ctx.fail(f"no command {name!r}: {nearest(name, self.commands)}")
        return found

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="posttrain")
def cli() -> None:
    """LLM post-training as structured intervention on model behaviour.

    Start with `posttrain tour`: a small language model is measured, expanded, reshaped and
    consolidated on this machine's CPU, and a report says what each stage really did.
    """


@cli.command()
@click.option("--out", type=OUT, default=Path("out/tour"), show_default=True, help="Run folder.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the whole tour.")
def tour(out: Path, seed: int) -> None:
    """The embedded lab: expand, reshape, prefer, consolidate, in minutes on a CPU."""
    from posttrain.lab.tour import write_tour

    _go(write_tour(out, seed=seed), out)


@cli.command()
@click.argument("recipe", type=FILE)
@click.option("--out", type=OUT, help="Run folder.  [default: out/<recipe name>]")
def run(recipe: Path, out: Path | None) -> None:
    """Run a recipe, or go on with it. A finished recipe is not run again."""
    _go(recipe, out)


def _go(recipe_path: Path, out: Path | None) -> None:
    from posttrain.console import Console
    from posttrain.recipe import load_recipe

    recipe = load_recipe(recipe_path)
    out = out or Path("out") / recipe.name
    console = Console()
    console.headline(recipe.name, out)
    # Imported after the first line is on the screen: torch takes seconds.
    from posttrain.api import run as run_recipe

    with console, _interrupts(console.note) as stop:
        outcome = run_recipe(
            recipe, out=out, root=recipe_path.parent, observe=console.observe, stop=stop
        )
    _finish(outcome, console.summary)


def _finish(outcome: Outcome, say: Callable[[Outcome, Path], None]) -> None:
    from posttrain.report.load import write_report

    say(outcome, write_report(outcome.out))
    if outcome.stopped_by:
        sys.exit(3)


@cli.command()
@click.argument("recipe", type=FILE)
def plan(recipe: Path) -> None:
    """Print the resolved recipe, its legality, memory, tokens and steps. Touches nothing."""
    from posttrain.preview import preview
    from posttrain.recipe import load_recipe

    click.echo(preview(load_recipe(recipe), root=recipe.parent))


@cli.command()
@click.argument("model")
@click.option("--tasks", type=FILE, required=True, help="A recipe, or any YAML with `tasks`.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the measurement here (JSON).")
@click.option("--samples", type=int, help="Samples per prompt.")
def probe(model: str, tasks: Path, out: Path | None, samples: int | None) -> None:
    """Measure a model on task sets: pass@k with intervals, support, length, entropy."""
    from posttrain.api import measure
    from posttrain.console import Console
    from posttrain.tables import measurement_table

    recipe = _measuring(tasks, model, samples)
    with Console() as console:
        result = measure(recipe, root=tasks.parent, observe=console.observe)
    if out:
        from posttrain.files import write_atomic

        write_atomic(out, result.to_json())
    click.echo(measurement_table(result, recipe.measure))


def _measuring(path: Path, model: str, samples: int | None) -> Recipe:
    """A recipe without stages that measures ``model`` on the tasks of a YAML file."""
    from posttrain.config import convert, read_yaml
    from posttrain.recipe import Recipe

    content = dict(read_yaml(path))
    if not content.get("tasks"):
        raise ConfigError(f"{path} has no tasks", expected="a mapping under `tasks`")
    measure = dict(content.get("measure") or {})
    if samples is not None:
        measure["samples"] = samples
    kept = {k: content[k] for k in ("dtype", "device", "threads", "seed") if k in content}
    chosen = {
        "name": "probe",
        "model": str(Path(model).resolve()) if Path(model).exists() else model,
        "tasks": content["tasks"],
        "measure": measure,
        **kept,
    }
    return convert(chosen, Recipe, origin=str(path))


@cli.command()
@click.argument("before")
@click.argument("after", required=False)
def compare(before: str, after: str | None) -> None:
    """What changed between two policies: expanded, sharpened, kept, weakened, lost.

    BEFORE and AFTER are measurement files, or RUN:POLICY such as out/tour:base. A run folder
    alone compares its base with its last policy.
    """
    from posttrain.probes.attribution import compare as attribute
    from posttrain.tables import comparison_table

    if after is None:
        names = _policies(Path(before))
        before, after = f"{before}:{names[0]}", f"{before}:{names[-1]}"
    first, epsilon = _measurement(before)
    second, _ = _measurement(after)
    click.echo(comparison_table(attribute(first, second, epsilon=epsilon)))


def _policies(out: Path) -> list[str]:
    """Names of the measured policies of a run, in order."""
    from posttrain.recipe import load_recipe

    if not (out / "recipe.json").is_file():
        raise ConfigError(f"{out} is not a run folder", expected="recipe.json in it")
    recipe = load_recipe(out / "recipe.json")
    names = ["base", *(s.name for s in recipe.stages)]
    done = [n for n in names if (out / "measurements" / f"{n}.json").is_file()]
    if len(done) < 2:
        raise ConfigError(f"{out} has measured {done or 'nothing'}", expected="two policies")
    return done


def _measurement(text: str) -> tuple[Measurement, float | None]:
    """A measurement from a file or RUN:POLICY, and the run's support threshold if known."""
    from posttrain.probes.measurement import Measurement
    from posttrain.recipe import load_recipe

    path, epsilon = Path(text), None
    if not path.is_file():
        folder, _, policy = text.rpartition(":")
        path = Path(folder) / "measurements" / f"{policy}.json"
        if not path.is_file():
            known = [p.stem for p in (Path(folder) / "measurements").glob("*.json")]
            raise ConfigError(
                f"no measurement {text}",
                expected="a measurement file, or RUN:POLICY",
                fix=nearest(policy, known),
            )
        epsilon = load_recipe(Path(folder) / "recipe.json").measure.threshold
    return Measurement.from_json(path.read_text(encoding="utf-8")), epsilon


@cli.command()
@click.argument("run_folder", metavar="RUN", type=OUT)
def report(run_folder: Path) -> None:
    """Write RUN/report.html again: one self-contained page."""
    from posttrain.report.load import write_report

    click.echo(write_report(run_folder))


@cli.command()
@click.argument("name", required=False)
def methods(name: str | None) -> None:
    """The map of methods, or one of them explained."""
    from posttrain.tables import method_page, methods_table

    click.echo(method_page(name) if name else methods_table())


@cli.group()
def ledger() -> None:
    """The hash-chained record of a run."""


@ledger.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--head", help="The head that somebody else knows.")
def verify(path: Path, head: str | None) -> None:
    """Check a run's hash chain. PATH is a run folder or a ledger file."""
    from posttrain.ledger import verify as verify_ledger

    file = path / "ledger.jsonl" if path.is_dir() else path
    result = verify_ledger(file, head=head)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(result.kinds.items()))
    click.echo(f"{file}: the chain holds over {result.num_records} records ({kinds})")
    click.echo(f"head {result.head}")


@contextmanager
def _interrupts(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a question the loop asks; the second one stops at once."""
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        say("stopping after this step; Ctrl-C again stops at once (the last checkpoint is safe)")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def main() -> None:
    """Entry point: errors of the tree become messages, not tracebacks."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except PosttrainError as error:
        click.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped. The same command goes on from the last checkpoint.", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
