"""Bring the tracked runs in line with dvc.lock, metrics and params. Usage: make sync.

Stages report as they run. But DVC restores results from its cache without running stages, a store may be
new or was unreachable, and the evaluation of a training repeated to the same bytes is skipped. A second
`make sync` changes nothing.
"""

import hashlib
import json
import sys
from pathlib import Path

from ruamel.yaml import YAML

from mend_lock import LOCK, read_lock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "stages"))
sys.path.insert(0, str(ROOT))

from dvc_experiments import experiments
from history import file_at, weights_at
from lib.reporting.provenance import GitError, git_diff, git_tags
from lib.results import NUMBER, TOY_CURVE, read_table, read_weights_sha256
from lib.stage.errors import StageError
from lib.stage.files import numbers, read_json
from lib.stage.process import run_stage
from lib.trainings import TOY, TRAININGS, Training
from tracking import runs
from tracking.sender import send_left_over
from tracking.store import Store, as_store_error, connect

PLOTS, PAGE = "plot_results", "build_page"


def main() -> None:
    """Send what was missed, then compare every training in dvc.lock with its run."""
    if not LOCK.exists():
        raise StageError(f"{LOCK}: not found; run from the repository root, after `dvc repro`")
    lock = read_lock()
    if lock is None:
        raise StageError(f"{LOCK}: damaged, expected it as DVC writes it; `dvc status` says where")
    stages = lock["stages"]
    trainings = [training for name, training in TRAININGS.items() if name in stages]
    for name, stage in stages.items():  # a file cut between two entries is one that DVC still reads
        expected = _files_of(TRAININGS[name]) if name in TRAININGS else set()
        found = {out["path"] for out in stage.get("outs", []) if "md5" in out}
        if not found or not expected <= found:
            raise StageError(f"{LOCK}: {name} lacks outputs; `dvc repro` completes it")
    with as_store_error():
        store = connect()
        for fault in send_left_over(store):
            print(f"sync: {fault}")
        for training in trainings:
            run_id, changes = sync_training(store, training, stages)
            print(f"sync: {training.stage}, run {run_id}: {', '.join(changes) or 'up to date'}")
        record_experiments(store)


def sync_training(store: Store, training: Training, stages: dict) -> tuple[str, list[str]]:
    """Complete one training's run; returns its id and what was added."""
    stage, name, client = stages[training.stage], training.stage, store.client
    for out in stage["outs"]:
        _check(out)
    weights_sha256 = read_weights_sha256(training.metrics)
    metrics = read_json(training.metrics)
    del metrics["weights_sha256"]
    changes = []
    run_id = runs.find_run(store, weights_sha256=weights_sha256, dvc_stage=name)
    if run_id is None:
        code = {dep["path"]: dep["md5"] for dep in stage["deps"] if dep["path"].startswith("stages/")}
        is_here = all(
            Path(path).exists() and _md5(Path(path), "*.py") == digest for path, digest in code.items()
        )
        tags = git_tags() if is_here else {}  # the present tree holds the code that made them
        diff = git_diff() if tags.get("git_dirty") == "true" else None
        run_id = runs.stand_in(store, name, weights_sha256, tags, diff)
        changes.append("made")
    changes += ["params"] if runs.log_params(client, run_id, _params(training, stages)) else []
    changes += _sync_curve(client, run_id, training.curve)
    changes += _sync_model(client, run_id, name, training.weights)
    for report in _reports(training, stages):
        paths = [path for out in stages[report]["outs"] for path in _files(_check(out))]
        if report == PLOTS:
            paths = [path for path in paths if path.stem in training.figures]
        if all(path.exists() for path in paths):  # the page may be in the DVC cache alone
            changes += _sync_report(client, run_id, report, metrics, paths)
    return run_id, changes + _sync_lock(client, run_id, training, stages)


def record_experiments(store: Store) -> None:
    """Give runs of `dvc exp run` the dvc.lock of their experiment, which may never be checked out here."""
    try:
        found = experiments()
    except GitError as error:
        print(f"sync: did not look for experiments: {error}")
        return
    for experiment in found:
        stages = YAML(typ="safe").load(file_at(experiment.reference, LOCK) or b"stages: {}")["stages"]
        for name, training in TRAININGS.items():
            weights_sha256 = weights_at(experiment.reference, training)
            if name not in stages or weights_sha256 is None:  # it may have run other stages
                continue
            run_id = runs.find_run(store, weights_sha256=weights_sha256, dvc_stage=name)
            if run_id and runs.synced_tag("dvc_lock") not in store.client.get_run(run_id).data.tags:
                _sync_lock(store.client, run_id, training, stages)
                print(f"sync: {name}, run {run_id}: dvc.lock of experiment {experiment.name}")


def _files_of(training: Training) -> set[str]:
    return {str(path) for path in (training.weights, training.curve, training.metrics)}


def _reports(training: Training, stages: dict) -> list[str]:
    """The stages of dvc.lock that report on a training, and not on an earlier one."""
    about_it = [training.evaluation, PLOTS, *([] if training is TOY else [PAGE])]
    makers = [stages[name] for name in (training.stage, training.evaluation) if name in stages]
    return [name for name in about_it if name in stages and _has_read(stages[name], makers)]


def _has_read(stage: dict, makers: list[dict]) -> bool:
    """Whether a stage ran with what others have made by now: dvc.lock keeps it until it runs again."""
    made = {out["path"]: out.get("md5") for maker in makers for out in maker.get("outs", [])}
    return all(made.get(dep["path"], dep.get("md5")) == dep.get("md5") for dep in stage["deps"])


def _params(training: Training, stages: dict) -> dict:
    """The params in dvc.lock under their paths; of a training on copies, those that made the copies, too."""
    readers = [training.stage]
    if training.images == "augmented" and _has_read(stages[training.stage], [stages["augment_images"]]):
        readers.append("augment_images")
    sections = [section for name in readers for section in stages[name]["params"]["params.yaml"].items()]
    if not all(isinstance(section, dict) for _, section in sections):  # from before dvc.yaml named sections
        raise StageError(f"{LOCK}: params of {training.stage} are no sections; `dvc repro` writes them anew")
    return {f"{name}.{leaf}": value for name, section in sections for leaf, value in section.items()}


def _sync_curve(client, run_id: str, path: Path) -> list[str]:
    rows = read_table(path, TOY_CURVE, others=NUMBER)
    return ["curve"] if runs.log_missing_epochs(client, run_id, rows, runs.now()) else []


def _sync_model(client, run_id: str, training: str, weights: Path) -> list[str]:
    """Log the model to a run that has none; needs the weights, which only the DVC cache may have."""
    if not weights.exists() or runs.ready_models(client, client.get_run(run_id)):
        return []
    runs.log_model(client, run_id, training, weights)
    return ["model"]


def _sync_report(client, run_id: str, stage: str, metrics: dict, files: list[Path]) -> list[str]:
    """Attach what a later stage wrote about the training, and the training's own `metrics`."""
    name = stage.split("@")[0]
    for file in files:
        if file.suffix == ".json":
            metrics |= numbers(read_json(file))

    def send():
        runs.log_report(client, run_id, name, metrics, files, runs.now())

    return _once(client, run_id, name, b"".join(file.read_bytes() for file in files), send)


def _sync_lock(client, run_id: str, training: Training, stages: dict) -> list[str]:
    names = [training.stage, *_reports(training, stages)]
    lock = json.dumps({name: stages[name] for name in names}, indent=2)
    return _once(
        client, run_id, "dvc_lock", lock.encode(), lambda: client.log_text(run_id, lock, "dvc.lock.json")
    )


def _once(client, run_id: str, name: str, content: bytes, send) -> list[str]:
    """Call `send` unless a tag of the run says that it was called for this content."""
    digest = hashlib.sha256(content).hexdigest()
    if client.get_run(run_id).data.tags.get(runs.synced_tag(name)) == digest:
        return []
    send()
    client.set_tag(run_id, runs.synced_tag(name), digest)
    return [name]


def _md5(path: Path, names: str = "*") -> str:
    """DVC's digest of a file, or of the files in a folder whose names match."""
    if path.is_file():
        return hashlib.md5(path.read_bytes()).hexdigest()
    files = sorted(file for file in path.rglob(names) if file.is_file())
    entries = [{"md5": _md5(file), "relpath": file.relative_to(path).as_posix()} for file in files]
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode()).hexdigest() + ".dir"


def _files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


def _check(out: dict) -> Path:
    """The path of an output in dvc.lock. Raises StageError if its content is not the one named there."""
    path = Path(out["path"])
    if path.exists() and _md5(path) != out["md5"]:
        raise StageError(f"{path}: differs from dvc.lock; `dvc repro` writes both again")
    if not path.exists() and path.parts[0] == "metrics":
        raise StageError(f"{path}: not found, expected as in dvc.lock; `dvc repro` makes it")
    return path


if __name__ == "__main__":
    run_stage(main)
