"""Which code a recipe brings, and from where.

Code in the recipe's own folder came with the recipe, and runs with it. Code from anywhere else
runs only when the user says so: a recipe could name a file that was never meant for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from posttrain.core.errors import ConfigError
from posttrain.recipe import Recipe
from posttrain.run.plan import model_path


def foreign_code(recipe: Recipe, *, root: Path) -> Iterator[str]:
    """Code that a recipe runs and that is not in its folder, in words: links count as what they
    lead to.

    Raises:
        TaskError: a file of code is missing or is not Python.
    """
    home = root.resolve()
    for name, spec in recipe.tasks.items():
        for file in spec.code(root):
            if not file.resolve().is_relative_to(home):
                yield f"task set {name} runs {file.resolve()}"
    if recipe.remote_code is not None:
        model = Path(model_path(recipe.remote_code, root)).expanduser()
        if not (model.is_dir() and model.resolve().is_relative_to(home)):
            yield f"the model runs code of {recipe.remote_code}"


def check_trust(recipe: Recipe, *, root: Path, trust_code: bool) -> None:
    """Refuse code from outside the recipe's folder, unless the user trusts it.

    Args:
        recipe: the configuration.
        root: its folder.
        trust_code: what the user says.

    Raises:
        ConfigError: code from elsewhere, and no trust; names it.
    """
    foreign = [] if trust_code else list(foreign_code(recipe, root=root))
    if foreign:
        raise ConfigError(
            f"{'; '.join(foreign)}: outside the recipe's folder {root.resolve()}",
            expected="code in the recipe's folder, or your consent",
            fix="read that code, then add --trust-code (in Python: trust_code=True)",
        )
