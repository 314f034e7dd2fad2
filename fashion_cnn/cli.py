"""The command fashion-cnn. A command imports what it needs when it runs, so help and errors are quick."""

import re
from pathlib import Path

import click

from fashion_cnn.project.catalog import DEFAULT_CNN, RUN_ID
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.process import run_stage, start, use_own_code

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


class InProject(click.Command):
    """A command that works on the project in the current folder."""

    def invoke(self, ctx):
        """Run it if the current folder is the project that has this code."""
        here, stages, code = Path.cwd(), Path("dvc.yaml"), Path("fashion_cnn")
        if not stages.is_file() or "python -m stages." not in stages.read_text(encoding="utf-8"):
            raise StageError(f"{here}: no dvc.yaml of fashion-cnn here; run this in the project's folder")
        if code.exists() and not code.samefile(Path(__file__).parent):
            raise StageError(
                f"{here}: this command runs the code of {Path(__file__).parents[1]}; `make setup` here makes "
                ".venv/bin/fashion-cnn for this folder"
            )
        return super().invoke(ctx)


class Commands(click.Group):
    """The group of all commands."""

    command_class = InProject


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def cli() -> None:
    """Run the pipeline, look at results, compare them, and use the trained CNNs.

    `dvc exp run -S train_cnn.epochs=10` runs the pipeline with other params, as an experiment.
    """


@cli.command()
def repro() -> None:
    """Run the pipeline, both CNNs at once; only what changed reruns. The same as `make repro`."""
    from fashion_cnn.commands import repro

    repro.main()


@cli.command()
@click.argument("a", required=False)
@click.argument("b", required=False)
@as_json
def compare(a: str | None, b: str | None, as_json: bool) -> None:
    """Is B better than A, worse, or not significantly different?

    A and B are each one of: workspace, a DVC experiment, a git revision, the id of an MLflow run. A comma or
    a pattern selects several, such as 'slow-*' for the seeds of a setting; @original or @augmented at the end
    selects only that training. A single side is compared with HEAD. Without arguments, this lists all
    experiments.
    """
    from fashion_cnn.commands import compare

    if a is None:
        compare.list_all(as_json)
    else:
        compare.main(*("HEAD", a) if b is None else (a, b), as_json)


@cli.command()
def back() -> None:
    """Return from experiments to the committed params and results, without training again.

    Restores params.yaml, dvc.lock and metrics/ from the last commit, and reattaches HEAD if a killed
    experiment left it detached. Code is not touched, and experiments are kept: `dvc exp apply NAME`.
    """
    from fashion_cnn.commands import back

    back.main()


@cli.command()
def baseline() -> None:
    """Commit params.yaml, dvc.lock and metrics/: later results are compared with these."""
    from fashion_cnn.commands import back

    back.commit_results()


@cli.command()
@click.argument("name", required=False, shell_complete=lambda *given: recipe_names(given[-1]))
def recipe(name: str | None) -> None:
    """List the recipes, or run one as a DVC experiment named after it.

    A recipe is a few params that belong together. DVC writes them into params.yaml, as with every experiment;
    `fashion-cnn back` restores it.
    """
    from fashion_cnn.commands import recipe

    if name is None:
        recipe.list_all()
    else:
        recipe.main(name)


def recipe_names(start: str) -> list[str]:
    """The names of the recipes that begin with `start`."""
    from fashion_cnn.commands.recipe import recipes

    return [name for name in recipes() if name.startswith(start)]


def check_model(model: str, names: str) -> None:
    """Raise StageError, before torch is imported, unless `model` matches `names` or is a file of weights."""
    if not re.fullmatch(names, model):
        from fashion_cnn.commands.repair import check_weights

        check_weights(Path(model))


@cli.command()
@click.argument("model", default=str(DEFAULT_CNN.weights))
@click.option("--level", default=0.05, show_default=True, help="Level of McNemar's test, between 0 and 1.")
@click.option("--dry-run", is_flag=True, help="Print the decision, and change nothing.")
def promote(model: str, level: float, dry_run: bool) -> None:
    """Register a CNN in MLflow, and make it the champion if it is significantly better.

    MODEL is a file of weights (default: models/cnn_augmented.safetensors) or the id of an MLflow run. It
    becomes a version of the registered model fashion-cnn. It gets the alias champion if there is none yet, or
    if it classifies more val images correctly than the champion, among those that neither was trained on, and
    McNemar's exact test gives a p below the level. The test split is not read.
    """
    check_model(model, RUN_ID)
    if not 0 < level < 1:
        raise StageError(f"--level is {level}, expected a number between 0 and 1")
    start()
    from fashion_cnn.commands import promote

    promote.main(model, level, dry_run)


@cli.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE…",
                type=click.Path(exists=True, dir_okay=False, path_type=Path))  # fmt: skip
@click.option("--model", help="A file of weights, the id of a run, a version, or champion (the default).")
@click.option("--show", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER",
              help="Write the network's input images there.")  # fmt: skip
@as_json
def predict(files: tuple[Path, ...], model: str | None, show: Path | None, as_json: bool) -> None:
    """Name the garment in pictures: the three most probable classes of each.

    A picture is first converted to the network's input format: grey, light on black, 28×28. It should show
    one garment, upright, on a plain background; a line reports anything doubtful. A missing file stops the
    command before it starts; a file that is not a picture gets an error line, and the rest are processed.
    Without a champion, models/cnn_augmented.safetensors is used.
    """
    if model:
        check_model(model, rf"champion|\d+|{RUN_ID}")
    start()
    from fashion_cnn.commands import predict

    predict.main(files, model, show, as_json)


@cli.command()
def page() -> None:
    """Open the page that shows what happens inside the trained CNNs."""
    from fashion_cnn.commands import page

    page.main()


@cli.command()
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True)
def ui(port: int) -> None:
    """Run sync, then open MLflow's table of trainings."""
    start()
    from fashion_cnn.commands import ui

    ui.main(port)


@cli.command()
def sync() -> None:
    """Bring MLflow's runs in line with dvc.lock, metrics and experiments.

    Stages report as they run. But DVC restores results from its cache without running stages, and the store
    may be new or have been unreachable. A second sync changes nothing.
    """
    start()
    from fashion_cnn.commands import sync

    sync.main()


@cli.command()
@click.argument("what")
@as_json
def trace(what: str, as_json: bool) -> None:
    """Where does a result come from, and how is it restored?

    WHAT is the id of an MLflow run, a file of weights, the SHA-256 of weights, or a git commit.
    """
    from fashion_cnn.commands import trace

    trace.main(what, as_json)


def main() -> None:
    """Run the command that the command line names, and end the process."""
    use_own_code()
    run_stage(_run)


def _run() -> None:
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except click.Abort:  # Ctrl-C
        raise KeyboardInterrupt from None
