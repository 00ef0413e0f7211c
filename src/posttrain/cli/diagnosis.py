"""The commands ``diagnose`` and ``treat``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from posttrain.cli.ends import GOES_ON, INTERRUPTED
from posttrain.cli.targets import OUT_FOLDER
from posttrain.cli.trust import is_trusted, trusting
from posttrain.core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from posttrain.diagnosis.prescribe import Supplies
    from posttrain.recipe import Recipe

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def _shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of both commands: the model, its task sets, and what is available to train on."""
    for option in reversed(
        [
            click.argument("model"),
            click.option(
                "--tasks", type=FILE, required=True, help="A recipe, or any YAML with `tasks`."
            ),
            click.option(
                "--demos", multiple=True, metavar="[TASK=]FILE", help="Right answers, as JSONL."
            ),
            click.option(
                "--teacher", multiple=True, metavar="[TASK=]MODEL", help="A model that is better."
            ),
            click.option("--before", metavar="MODEL", help="An earlier policy: what was lost?"),
            click.option("--scaffold", help="Text with {question} that helps at run time."),
            click.option(
                "--later-tasks",
                default="",
                metavar="A,B",
                help="Only watched: must stay trainable.",
            ),
            click.option("--rules", type=FILE, help="Your changes to the rules."),
            trusting,
        ]
    ):
        command = option(command)
    return command


@click.command()
@_shared_options
@click.option("--budget", type=click.IntRange(min=1), help="Rollouts to spend.  [default: 60000]")
@click.option("--out", type=OUT_FOLDER, default=Path("out/diagnosis"), show_default=True)
def diagnose(
    model: str,
    tasks: Path,
    demos: tuple[str, ...],
    teacher: tuple[str, ...],
    before: str | None,
    scaffold: str | None,
    later_tasks: str,
    rules: Path | None,
    budget: int | None,
    out: Path,
) -> None:
    """What holds a model back, with the evidence, and the recipe of the next stage.

    Writes OUT/diagnosis.html (the card), OUT/diagnosis.json and OUT/next.yaml.
    `posttrain run OUT/next.yaml` does what it says; with --trust-code if a reward of yours is in
    it, which then lies outside the recipe's folder.
    """
    from rich.console import Console as Terminal

    from posttrain.cli.console import Console
    from posttrain.recipe import measuring_recipe

    ground = measuring_recipe(tasks, model=model)
    supplies = _supplies(ground, demos, teacher, before, scaffold, later_tasks)
    console = Console()
    console.headline(f"diagnose {ground.name}", out)
    # Imported after the first line is on the screen: torch takes seconds.
    from posttrain.api import diagnose as run_diagnose
    from posttrain.diagnosis.diagnose import write_diagnosis
    from posttrain.diagnosis.rules import load_rules
    from posttrain.diagnosis.show import card

    book = load_rules(rules)
    with console:
        found = run_diagnose(
            ground,
            root=tasks.parent,
            supplies=supplies,
            book=book,
            budget=budget,
            observe=console.observe,
            trust_code=is_trusted(),
        )
    written = write_diagnosis(found, out)
    Terminal(highlight=False).print(card(found, written=tuple(written)))


@click.command()
@_shared_options
@click.option(
    "--budget",
    type=click.IntRange(min=1),
    required=True,
    help="Tokens to sample and train, looking included.",
)
@click.option("--out", type=OUT_FOLDER, default=Path("out/treatment"), show_default=True)
def treat(
    model: str,
    tasks: Path,
    demos: tuple[str, ...],
    teacher: tuple[str, ...],
    before: str | None,
    scaffold: str | None,
    later_tasks: str,
    rules: Path | None,
    budget: int,
    out: Path,
) -> None:
    """Diagnose, run what is prescribed, and again, until nothing helps or the budget is spent.

    OUT is a run folder: every stage, measurement and decision is in it. The same command goes on
    from where it stopped.
    """
    from rich.console import Console as Terminal

    from posttrain.cli.console import Console, interrupts
    from posttrain.cli.pages import write_cards, write_run_report
    from posttrain.recipe import measuring_recipe

    ground = measuring_recipe(tasks, model=model, name="treatment")
    supplies = _supplies(ground, demos, teacher, before, scaffold, later_tasks)
    console = Console()
    console.headline("treat", out)
    from posttrain.api import treat as run_treat
    from posttrain.diagnosis.rules import load_rules
    from posttrain.diagnosis.show import course

    book = load_rules(rules)
    try:
        with console, interrupts(console.note) as stop:
            done = run_treat(
                ground,
                out=out,
                budget=budget,
                root=tasks.parent,
                supplies=supplies,
                book=book,
                observe=console.observe,
                stop=stop,
                trust_code=is_trusted(),
            )
    except KeyboardInterrupt:
        click.echo(GOES_ON, err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    Terminal(highlight=False).print(course(done))
    for page in write_cards(out):
        click.echo(f"diagnosis: {page.resolve()}")
    click.echo(f"report: {write_run_report(out).resolve()}")


def _supplies(
    ground: Recipe,
    demos: Iterable[str],
    teachers: Iterable[str],
    before: str | None,
    scaffold: str | None,
    later: str,
) -> Supplies:
    from posttrain.diagnosis.prescribe import Supplies

    watched = tuple(name.strip() for name in later.split(",") if name.strip())
    for name in watched:
        if name not in ground.tasks:
            raise ConfigError(f"--later-tasks names {name!r}", fix=nearest(name, ground.tasks))
    if scaffold is not None and "{question}" not in scaffold:
        raise ConfigError(
            f"--scaffold {scaffold!r} has no place for the question",
            expected="a text with {question}, such as 'Think step by step. {question}'",
        )
    files = _by_task(demos, ground, option="--demos")
    for file in files.values():
        if not Path(file).is_file():
            raise ConfigError(f"--demos {file}: no such file", fix="check the path")
    return Supplies(
        demos={task: str(Path(file).resolve()) for task, file in files.items()},
        teachers={t: _model(m) for t, m in _by_task(teachers, ground, option="--teacher").items()},
        before=None if before is None else _model(before),
        scaffold=scaffold,
        later=watched,
    )


def _by_task(entries: Iterable[str], ground: Recipe, *, option: str) -> dict[str, str]:
    """``TASK=VALUE`` by task, or ``VALUE`` for all of them."""
    found: dict[str, str] = {}
    for entry in entries:
        task, equals, value = entry.partition("=")
        if not equals or Path(entry).exists():
            task, value = "*", entry
        elif task not in ground.tasks:
            raise ConfigError(
                f"{option} {entry}: no task set {task!r}", fix=nearest(task, ground.tasks)
            )
        if task in found:
            raise ConfigError(
                f"{option} given twice for {'every task set' if task == '*' else task}",
                expected="one per task set",
            )
        found[task] = value
    return found


def _model(name: str) -> str:
    """A folder, as an absolute path, or a hub id."""
    return str(Path(name).resolve()) if Path(name).exists() else name
