"""Bring the tracked runs in line with dvc.lock, metrics and params. Usage: make sync.

Stages log as they run, but DVC restores results from its cache without running them, stores are new
or away, and a training repeated to the same bytes leaves its evaluation skipped. Run again, this
changes nothing.
"""

import hashlib
import json
import sys
from pathlib import Path

from mend_lock import LOCK, read_lock
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "stages"))
sys.path.insert(0, str(ROOT))

from tracking import runs
from tracking.sender import send_left_over
from tracking.store import connect, told_in_one_line

from lib.errors import StageError, run_stage
from lib.files import numbers, read_json
from lib.lineage import GitError, git, git_diff, git_tags
from lib.results import NUMBER, TOY_CURVE, read_table, read_weights_sha256


def main() -> None:
    """Send what was missed, then compare every training in dvc.lock with its run."""
    if not LOCK.exists():
        raise StageError(f"{LOCK}: not found; run from the repository root, after `dvc repro`")
    lock = read_lock()
    if lock is None:
        raise StageError(f"{LOCK}: damaged, expected it as DVC writes it; `dvc status` says where")
    stages = lock["stages"]
    for name, stage in stages.items():  # a file cut between two entries is one that DVC still reads
        found = {Path(out["path"]).suffix for out in stage.get("outs", []) if "md5" in out}
        if not found or (name in trainings(stages) and len(found) < 3):
            raise StageError(f"{LOCK}: {name} lacks outputs, expected all of them; `dvc repro` completes it")
    with told_in_one_line():
        client, experiment_id = connect()
        for fault in send_left_over((client, experiment_id)):
            print(f"sync: {fault}")
        for training in trainings(stages):
            run_id, changes = sync_training(client, experiment_id, training, stages)
            print(f"sync: {training}, run {run_id}: {', '.join(changes) or 'up to date'}")
        record_experiments(client, experiment_id)


def trainings(stages: dict) -> list[str]:
    """The stages of dvc.lock that are a run each."""
    return [name for name in stages if name.startswith("train_")]


def sync_training(client, experiment_id: str, training: str, stages: dict) -> tuple[str, list[str]]:
    """Complete one training's run; returns its id and what was added."""
    outs = {Path(out["path"]).suffix: _checked(out) for out in stages[training]["outs"]}
    weights_sha256 = read_weights_sha256(outs[".json"])
    metrics = read_json(outs[".json"])
    del metrics["weights_sha256"]
    changes = []
    run_id = runs.find_run(client, experiment_id, weights_sha256=weights_sha256, dvc_stage=training)
    if run_id is None:
        code = {dep["path"]: dep["md5"] for dep in stages[training]["deps"] if dep["path"].endswith(".py")}
        is_here = all(Path(path).exists() and _md5(Path(path)) == digest for path, digest in code.items())
        tags = git_tags() if is_here else {}  # the present tree holds the code that made them
        diff = git_diff() if tags.get("git_dirty") == "true" else None
        run_id = runs.stand_in(client, experiment_id, training, weights_sha256, tags, diff)
        changes.append("made")
    params = stages[training]["params"]["params.yaml"]
    if training == "train_cnn@augmented":  # its run has the params that made the copies, too
        params = params | stages["augment_images"]["params"]["params.yaml"]
    changes += _sync_params(client, run_id, params)
    changes += _sync_curve(client, run_id, outs[".csv"])
    changes += _sync_model(client, run_id, training, outs[".safetensors"])
    for stage, is_about in _reports(training).items():
        if stage in stages:
            files = [
                file for out in stages[stage]["outs"] for file in _files(_checked(out)) if is_about(file)
            ]
            changes += _sync_report(client, run_id, stage, metrics, files)
    return run_id, changes + _sync_lock(client, run_id, training, stages)


def record_experiments(client, experiment_id: str) -> None:
    """Give runs of `dvc exp run` the dvc.lock of their experiment, which may never be checked out here."""
    try:
        references = git("for-each-ref", "--format=%(refname)", "refs/exps/??/*/*").decode().split()
    except GitError as error:
        print(f"sync: no experiments looked for: {error}")
        return
    for reference in references:
        stages = YAML(typ="safe").load(_committed(reference, LOCK) or b"stages: {}")["stages"]
        for training in trainings(stages):
            [path] = [out["path"] for out in stages[training]["outs"] if out["path"].endswith(".json")]
            metrics = _committed(reference, path)
            if metrics is None:  # an experiment that ran other stages may lack it
                continue
            [weights_sha256] = json.loads(metrics)["weights_sha256"]
            run_id = runs.find_run(client, experiment_id, weights_sha256=weights_sha256, dvc_stage=training)
            if run_id and runs.synced_tag("dvc_lock") not in client.get_run(run_id).data.tags:
                _sync_lock(client, run_id, training, stages)
                name = reference.rpartition("/")[2]
                print(f"sync: {training}, run {run_id}: dvc.lock of experiment {name}")


def _committed(reference: str, path: str | Path) -> bytes | None:
    """A file of an experiment; None if the experiment has no such file."""
    if not git("ls-tree", reference, "--", str(path)):
        return None
    return git("show", f"{reference}:./{path}")


def _reports(training: str) -> dict:
    """The stages that report on a training, with which of their files are about it."""
    if training == "train_toy_cnn":
        return {"verify_manual_conv": lambda _: True, "plot_results": lambda file: file.stem == "toy_loss"}
    evaluation = training.replace("train_cnn", "evaluate_cnn")
    return {evaluation: lambda _: True, "plot_results": lambda file: file.stem != "toy_loss"}


def _sync_params(client, run_id: str, params: dict) -> list[str]:
    has = client.get_run(run_id).data.params
    missing = {name: params[name] for name in params if name not in has}
    runs.log_params(client, run_id, missing)
    return ["params"] if missing else []


def _sync_curve(client, run_id: str, path: Path) -> list[str]:
    rows = read_table(path, TOY_CURVE, others=NUMBER)
    return ["curve"] if runs.log_missing_epochs(client, run_id, rows, runs.now()) else []


def _sync_model(client, run_id: str, training: str, weights: Path) -> list[str]:
    """Log the model to a run that has none; needs the weights, which only the DVC cache may have."""
    if not weights.exists() or runs.has_model(client, client.get_run(run_id)):
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


def _sync_lock(client, run_id: str, training: str, stages: dict) -> list[str]:
    names = [name for name in (training, *_reports(training)) if name in stages]
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


def _md5(path: Path) -> str:
    """DVC's digest of a file or folder."""
    if path.is_file():
        return hashlib.md5(path.read_bytes()).hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    entries = [{"md5": _md5(file), "relpath": file.relative_to(path).as_posix()} for file in files]
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode()).hexdigest() + ".dir"


def _files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


def _checked(out: dict) -> Path:
    """The path of an output in dvc.lock, whose content must be the one that dvc.lock names."""
    path = Path(out["path"])
    if path.exists() and _md5(path) != out["md5"]:
        raise StageError(f"{path}: not what dvc.lock says; `dvc repro` brings both together")
    if not path.exists() and path.parts[0] == "metrics":
        raise StageError(f"{path}: not found, expected as in dvc.lock; `dvc repro` makes it")
    return path


if __name__ == "__main__":
    run_stage(main)
