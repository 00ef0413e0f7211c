"""Which code a recipe brings, and from where.

Code in the recipe's own folder came with the recipe, and runs with it. Code from anywhere else
runs only when the user says so: a recipe could name a file that was never meant for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from posttrain.core.errors import ConfigError
from posttrain.recipe import Recipe
from posttrain.run.plan import model_path


@dataclass(frozen=True, slots=True)
class CodeFile:
    """Code that a run of a recipe executes: a file, or the code of a model."""

    user: str  # what runs it, in words
    name: str  # the file, links resolved; or the model
    foreign: bool  # it is not in the recipe's folder

    @property
    def words(self) -> str:
        """For people."""
        where = ", outside the recipe's folder: needs --trust-code" if self.foreign else ""
        return f"{self.user} runs {self.name}{where}"


def code_of_recipe(recipe: Recipe, *, root: Path) -> Iterator[CodeFile]:
    """The code that a recipe brings. Nothing is run to know it.

    Raises:
        TaskError: a file of code is missing or is not Python.
    """
    home = root.resolve()
    for name, spec in recipe.tasks.items():
        for file in map(Path.resolve, spec.code(root)):
            inside = file.is_relative_to(home)
            shown = file.relative_to(home) if inside else file
            yield CodeFile(f"task set {name}", str(shown), foreign=not inside)
    if recipe.remote_code is not None:
        model = Path(model_path(recipe.remote_code, root)).expanduser()
        inside = model.is_dir() and model.resolve().is_relative_to(home)
        yield CodeFile("the model", f"code of {recipe.remote_code}", foreign=not inside)


def check_trust(recipe: Recipe, *, root: Path, trust_code: bool) -> None:
    """Refuse code from outside the recipe's folder, unless the user trusts it.

    Args:
        recipe: the configuration.
        root: its folder.
        trust_code: what the user says.

    Raises:
        ConfigError: code from elsewhere, and no trust; names it.
    """
    if trust_code:
        return
    foreign = [c for c in code_of_recipe(recipe, root=root) if c.foreign]
    if foreign:
        raise ConfigError(
            f"{'; '.join(f'{c.user} runs {c.name}' for c in foreign)}: outside the recipe's "
            f"folder {root.resolve()}",
            expected="code in the recipe's folder, or your consent",
            fix="read that code, then add --trust-code (in Python: trust_code=True)",
        )
