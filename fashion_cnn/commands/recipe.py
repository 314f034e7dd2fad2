"""Run a recipe, a few params that belong together, as a DVC experiment named after it."""

import shlex
import sys
from pathlib import Path

from pydantic import ValidationError

from fashion_cnn.commands.dvc_state import experiments, run_dvc
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.params import Params, as_yaml, explain, load_params, read_yaml

RECIPES = Path("recipes")


def recipes() -> dict[str, Path]:
    """The files of the recipes, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def list_all() -> None:
    """List the recipes."""
    print("\n".join(f"{name:<12}{purpose(path)}" for name, path in recipes().items()))
    print("\nrun one    fashion-cnn recipe NAME")


def main(name: str) -> None:
    """Run a recipe."""
    settings = read_recipe(name)
    if name in [experiment.name for experiment in experiments()]:
        raise StageError(
            f"{name}: there is an experiment of this name; `dvc exp apply {shlex.quote(name)}` restores it, "
            f"`dvc exp remove {shlex.quote(name)}` deletes it"
        )
    asked = command(name, settings)
    print(shlex.join(["dvc", *asked]), flush=True)
    sys.exit(run_dvc(*asked).returncode)


def command(name: str, settings: dict[str, object]) -> list[str]:
    """The arguments of DVC that run an experiment with these params."""
    asked = ["exp", "run", "--name", name]
    for where, value in settings.items():
        asked += ["-S", f"{where}={as_yaml(value)}"]
    return asked


def read_recipe(name: str) -> dict[str, object]:
    """The params of a recipe, {"train_cnn.epochs": 4, …}. Raises StageError if it is not a recipe."""
    if not (path := recipes().get(name)):
        names = ", ".join(recipes()) or "it is empty"
        raise StageError(f"{name}: no recipe of this name, expected one of {RECIPES}/: {names}")
    recipe, params = read_yaml(path), load_params().model_dump()
    if not isinstance(recipe, dict) or not all(isinstance(section, dict) for section in recipe.values()):
        raise StageError(f"{path}: expected sections of params.yaml, each with some of its keys")
    for section, changes in recipe.items():
        params[section] = params.get(section, {}) | changes
    try:
        Params.model_validate(params)
    except ValidationError as error:
        raise StageError(f"{path}: {explain(error)}") from None
    if not any(recipe.values()):
        raise StageError(f"{path}: changes nothing, expected a param and its value")
    return {f"{name}.{key}": value for name, changes in recipe.items() for key, value in changes.items()}


def purpose(path: Path) -> str:
    """The first line of a recipe, a comment."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[0].removeprefix("# ") if lines and lines[0].startswith("# ") else ""
