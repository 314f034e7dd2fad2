"""The sides of a comparison: results of the working tree, git revisions, DVC experiments and MLflow runs."""

import csv
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from fashion_cnn.commands.dvc_state import experiments, parse_lock
from fashion_cnn.project.catalog import RUN_ID, TRAININGS, Training
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.files import md5_of, numbers
from fashion_cnn.project.repository import LOCK, GitError, file_at, git

WORKSPACE = "workspace"
# Returns the content of a file of the project, or None if there is no such file.
Reader = Callable[[Path], bytes | None]


@dataclass(frozen=True)
class Result:
    """The results of one training."""

    source: str  # the name that selected it
    training: str
    weights_sha256: str
    seed: int | None
    metrics: dict[str, float]
    labels: list[str]  # of each test image; empty without an evaluation
    predictions: list[str]  # likewise
    moved_images: int  # how many test images were shifted and rotated


def read_side(side: str) -> dict[str, list[Result]]:
    """The results that `side` names, by training; those of the same weights count once.

    `side` is workspace, an experiment, a git revision, an MLflow run, or several with commas, and may end in
    @original or @augmented. Raises StageError if it is none of these, or has no results.
    """
    named, _, images = side.rpartition("@")
    if is_a_name(side) or images not in {training.images for training in TRAININGS.values()}:
        named, images = side, ""
    names = [named] if is_a_name(named) else named.split(",")
    found: dict[str, dict[str, Result]] = {}
    for source in (source for name in names for source in sources(name.strip())):
        for result in results_of(source):
            if images in ("", TRAININGS[result.training].images):
                found.setdefault(result.training, {}).setdefault(result.weights_sha256, result)
    if not found:
        raise StageError(f"{side}: no results there, expected metrics/ as `dvc repro` writes it")
    return {training: list(results.values()) for training, results in found.items()}


def is_a_name(side: str) -> bool:
    """Whether a side as a whole names an experiment or a revision, as `a,b` and `x@original` may."""
    try:
        return bool(re.search("[,@]", side) and commit_of(side))
    except StageError:
        return False


def sources(name: str) -> list[str]:
    """The experiments that a pattern matches; any other name unchanged."""
    if not re.search(r"[*?\[]", name):
        return [name]
    if found := sorted({one.name for one in experiments() if fnmatchcase(one.name, name)}):
        return found
    raise StageError(f"{name}: matches no experiment; `fashion-cnn compare` lists them")


def results_of(source: str) -> list[Result]:
    """The results of one source. Raises StageError if it does not exist, or its files are damaged."""
    if re.fullmatch(RUN_ID, source):
        return [result_of_run(source)]
    if source == WORKSPACE:
        return results_in(source, lambda path: path.read_bytes() if path.is_file() else None)
    revision = commit_of(source)
    return results_in(source, lambda path: file_at(revision, path))


def commit_of(name: str) -> str:
    """The commit of an experiment (HEAD's, or else the newest, if several have the name) or a revision."""
    try:
        head = git("rev-parse", "HEAD").decode().strip()
        # The name HEAD always means git's.
        named = [one for one in reversed(experiments()) if one.name == name != "HEAD"]
        named.sort(key=lambda one: one.baseline != head)  # HEAD's first, then the newest
        if named:
            return named[0].reference
        return git("rev-parse", "--verify", "--end-of-options", f"{name}^{{commit}}").decode().strip()
    except GitError as error:
        raise StageError(
            f"{name}: expected {WORKSPACE}, an experiment, a git revision or a run of MLflow ({error})"
        ) from None


def results_in(source: str, read: Reader) -> list[Result]:
    """The results in metrics/ and dvc.lock."""
    stages = load(source, LOCK, read, lambda text: parse_lock(text.encode()), {}).get("stages", {})
    found = []
    for training in TRAININGS.values():
        metrics = load(source, training.metrics, read, json.loads, {})
        if not metrics:
            continue
        if not isinstance(metrics.get("weights_sha256"), list):
            raise StageError(f"{training.metrics} of {source}: names no weights, expected weights_sha256")
        params = stages.get(training.stage, {}).get("params", {}).get("params.yaml", {})
        seed = params.get(training.section, {}).get("seed", params.get(f"{training.section}.seed"))
        # If a training ran without its evaluation, in an experiment or by hand, dvc.lock has an evaluation of
        # other weights.
        outs = stages.get(training.stage, {}).get("outs", [])
        evaluated = digest_of(training.weights, stages.get(training.evaluation, {}).get("deps", []))
        is_evaluated = digest_of(training.weights, outs) == evaluated and digest_of(
            training.metrics, outs
        ) in (None, md5_of(read(training.metrics) or b""))
        found.append(
            with_evaluation(
                source, training, metrics["weights_sha256"][0], seed, numbers(metrics),
                read if is_evaluated else nothing,
            )
        )  # fmt: skip
    return found


def nothing(_: Path) -> None:
    """The reader of a source that has no files."""


def digest_of(path: Path, entries: list[dict]) -> str | None:
    """The digest of a file among the deps or outs of a stage in dvc.lock."""
    return next((entry["md5"] for entry in entries if entry["path"] == str(path)), None)


def result_of_run(run_id: str) -> Result:
    """The result of an MLflow run, to which sync adds what it lacks. Raises StageError if there is none."""
    from fashion_cnn.tracking import runs
    from fashion_cnn.tracking.store import as_store_error, connect

    with as_store_error():
        store = connect()
        if not (run := runs.find_run(store, run_id)):
            raise StageError(
                f"{run_id}: no run of this id in MLflow, expected one that `fashion-cnn ui` shows"
            )
        client = store.client
        training = TRAININGS.get(run.data.tags.get("dvc_stage", ""))
        if training is None or "weights_sha256" not in run.data.tags:
            raise StageError(f"{run_id}: a run in state {run.info.status}, expected a finished training")
        folder = training.evaluation.partition("@")[0]
        has = {Path(file.path).name for file in client.list_artifacts(run_id, folder)}

        def read(path: Path) -> bytes | None:
            if path.name not in has:
                return None
            return Path(client.download_artifacts(run_id, f"{folder}/{path.name}")).read_bytes()

        seed = run.data.params.get(f"{training.section}.seed")
        weights_sha256 = run.data.tags["weights_sha256"]
        return with_evaluation(run_id, training, weights_sha256, seed and int(seed), run.data.metrics, read)


def with_evaluation(
    source: str, training: Training, weights_sha256: str, seed: int | None, metrics: dict, read: Reader
) -> Result:
    """The result of a training, with its evaluation's results if there are any."""
    evaluation = load(source, training.evaluated, read, json.loads, {})
    rows = load(source, training.confusion, read, confusion_rows, [])
    return Result(
        source=source,
        training=training.stage,
        weights_sha256=weights_sha256,
        seed=seed,
        metrics=metrics | numbers(evaluation),
        labels=[actual for actual, _ in rows],
        predictions=[predicted for _, predicted in rows],
        moved_images=evaluation.get("shifts", [{"n": 0}])[0]["n"],
    )


def load(source: str, path: Path, read: Reader, parse: Callable, default):
    """A file's content as `parse` reads it, or `default` if there is none. Raises StageError if damaged."""
    if (content := read(path)) is None:
        return default
    try:
        found = parse(content.decode("utf-8"))
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        raise StageError(f"{path} of {source}: {reason}; expected it as a stage writes it") from None
    if not isinstance(found, type(default)):
        raise StageError(f"{path} of {source}: empty or cut short, expected it as a stage or DVC writes it")
    return found


def confusion_rows(text: str) -> list[tuple[str, str]]:
    """The label and prediction of each image."""
    header, *rows = csv.reader(text.splitlines())
    if header != ["actual", "predicted"]:
        raise ValueError(f"the columns are {', '.join(header)}")
    return [(actual, predicted) for actual, predicted in rows]
