"""Bring the tracked runs in line with dvc.lock, metrics and experiments.

Stages report as they run. But DVC restores results from its cache without running stages, a store may be
new or was unreachable, and the evaluation of a training repeated to the same bytes is skipped. A second
sync changes nothing.
"""

import hashlib
import io
import json
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from fashion_cnn.commands.dvc_experiments import Experiment, experiments
from fashion_cnn.commands.history import file_at, weights_at
from fashion_cnn.commands.mend_lock import LOCK, parse_lock
from fashion_cnn.lesson.results import NUMBER, TOY_CURVE, read_table, read_weights_sha256
from fashion_cnn.project.catalog import TOY, TRAININGS, Training
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.files import numbers, read_json, write_text
from fashion_cnn.project.outbox import outboxes
from fashion_cnn.project.provenance import NOT_CODE, GitError, git, git_diff, git_tags
from fashion_cnn.tracking import runs
from fashion_cnn.tracking.sender import send_left_over
from fashion_cnn.tracking.store import Store, StoreError, as_store_error, connect, shown, store_url

PLOTS, PAGE = "plot_results", "build_page"
SEEN = Path(".dvc/tmp/synced")
CODE, RUNS = ("stages/", "fashion_cnn/"), (".py", ".js", ".css", ".html")  # as .dvcignore has it
Origin = Callable[[], tuple[dict, str | None]]  # tags of a run, and the uncommitted changes of its code


def main(is_quiet: bool = False) -> None:
    """Send what was missed, then compare the trainings of experiments and of dvc.lock with their runs.

    `is_quiet`: say nothing of runs that are up to date.
    """
    if not LOCK.exists():
        raise StageError(f"{LOCK}: not found; run from the repository root, after `dvc repro`")
    stages = read_stages(LOCK.read_bytes())
    trainings = [training for name, training in TRAININGS.items() if name in stages]
    results = [read_results(training, stages) for training in trainings]
    with as_store_error():
        store = connect()
        for fault in send_left_over(store):
            print(f"sync: {fault}")
        sync_experiments(store)  # first: runs of an experiment that is checked out are the experiment's
        for result in results:
            stage = result.training.stage
            found = runs.find_runs(store, weights_sha256=result.weights_sha256, dvc_stage=stage)
            target, origin = next(iter(found), None), partial(_origin_of_tree, stages[stage])
            for run_id, changes in sync_runs(store, result, found, target, origin, replace=True).items():
                if changes or not is_quiet:
                    print(f"sync: {stage}, run {run_id}: {', '.join(changes) or 'up to date'}")


def main_if_new() -> None:
    """The same, unless the last time saw these results, experiments and store: it takes seconds."""
    left = any(outboxes().glob("[!.]*"))
    if left or not SEEN.exists() or SEEN.read_text(encoding="utf-8") != _seen():
        main(is_quiet=True)
        write_text(SEEN, _seen())


def _seen() -> str:
    """A digest of dvc.lock, of DVC's experiments, and of which store it is."""
    url = store_url()
    path = Path(shown(url))  # of a server, it does not exist
    store = f"{url} {path.stat().st_ino if path.exists() else 0}"
    try:
        references = git("for-each-ref", "refs/exps")
    except GitError:  # without a repository there are none
        references = b""
    return hashlib.sha256(store.encode() + LOCK.read_bytes() + references).hexdigest()


class Results(NamedTuple):
    """What there is of one training, read and checked; paths are from the current folder."""

    training: Training
    weights_sha256: str
    params: dict[str, object]
    curve: list[dict]
    metrics: dict[str, float]  # beside the curve
    reports: dict[str, list[Path]]  # files by the later stage that wrote them
    lock: dict  # the entries of dvc.lock


def read_stages(content: bytes) -> dict:
    """The entries of a dvc.lock. Raises StageError if it is damaged, or an entry lacks outputs."""
    lock = parse_lock(content)
    if lock is None:
        raise StageError(f"{LOCK}: damaged, expected it as DVC writes it; `dvc status` says where")
    for name, stage in lock["stages"].items():  # a file cut between two entries is one that DVC still reads
        expected = _files_of(TRAININGS[name]) if name in TRAININGS else set()
        found = {out["path"]: out.get("md5") for out in stage.get("outs", [])}
        if not found or not all(found.values()) or not expected <= found.keys():
            raise StageError(f"{LOCK}: {name} lacks outputs; `dvc repro` completes it")
    return lock["stages"]


def read_results(training: Training, stages: dict) -> Results:
    """Read what dvc.lock names of a training. Raises StageError if a file is missing or another one."""
    for out in stages[training.stage]["outs"]:
        _check(out)
    curve = read_table(training.curve, TOY_CURVE, others=NUMBER)
    metrics = numbers(read_json(training.metrics))
    names, reports = _reports(training, stages), {}
    for name in names:
        files = [file for out in stages[name]["outs"] for file in _files(_check(out))]
        if name == PLOTS:
            files = [file for file in files if file.stem in training.figures]
        if all(file.exists() for file in files):  # the page may be in the DVC cache alone
            reports[name.split("@")[0]] = files
    return Results(
        training,
        read_weights_sha256(training.metrics),
        _params(training, stages),
        curve,
        {name: value for name, value in metrics.items() if name not in curve[0]},
        reports,
        {name: stages[name] for name in (training.stage, *names)},
    )


def sync_runs(store: Store, results: Results, found: list, target, origin: Origin, replace: bool) -> dict:
    """Complete the runs of a training's weights, or make one; returns what was added, by the runs' ids.

    What the training made goes to `target`, one of `found`: the others may be of other code. What later
    stages wrote goes to all. `replace`: whether it takes the place of what was sent earlier.
    """
    client, training = store.client, results.training
    tags, diff = origin() if target is None or runs.lacks_origin(target) else ({}, None)
    name = runs.run_name(training.stage, tags, results.params)
    if target is None:
        run_id = runs.stand_in(store, training.stage, results.weights_sha256, tags, diff, name)
    else:
        run_id = target.info.run_id
        if tags or (runs.lacks_origin(target) and target.info.status == "RUNNING"):  # left by a kill
            runs.add_origin(client, run_id, tags, diff, name)
    when = runs.now()
    sent = {
        "made": target is None,
        "commit": target is not None and bool(tags),
        "params": runs.log_params(client, run_id, results.params),
        "curve": runs.log_missing_epochs(client, run_id, results.curve, when),
        "model": _sync_model(client, run_id, training),
        "metrics": runs.log_new_metrics(client, run_id, results.metrics, when),
    }
    changes = {run_id: [name for name, was_sent in sent.items() if was_sent]}
    for one in {run_id, *(run.info.run_id for run in found)}:
        added = [stage for stage in results.reports if _sync_report(client, one, stage, results, replace)]
        if added:
            changes[one] = changes.get(one, []) + added
    if _sync_lock(client, run_id, results, replace):
        changes[run_id].append("dvc.lock")
    return changes


def sync_experiments(store: Store) -> None:
    """Complete the runs of DVC's experiments by what git has: they may never be checked out here."""
    try:
        found = experiments()
    except GitError as error:
        print(f"sync: did not look for experiments: {error}")
        return
    known = defaultdict(list)
    for run in runs.find_runs(store) if found else []:
        known[run.data.tags.get("dvc_stage"), run.data.tags.get("weights_sha256")].append(run)
    before = cache(_weights_before)
    made: dict[Experiment, list] = {}
    newest: dict[tuple, Experiment] = {}
    for experiment in found:
        with _left_out(experiment):
            committed = before(experiment.baseline)
            made[experiment] = [one for one in _weights_at(experiment.reference) if one not in committed]
            newest |= dict.fromkeys(made[experiment], experiment)
    for experiment, weights in made.items():
        left = {}
        for one in weights:
            own = [run for run in known[one] if run.data.tags.get("dvc_exp_name") == experiment.name]
            own.sort(key=lambda run: run.data.tags.get("git_commit") != experiment.baseline)
            nobodys = [run for run in known[one] if runs.lacks_origin(run)]
            target = next(iter(own or nobodys), None)
            if not own and (newest[one] is not experiment or (known[one] and not nobodys)):
                continue  # another training's run will do
            if target is None or runs.synced_tag("dvc_lock") not in target.data.tags:
                left[TRAININGS[one[0]]] = known[one], target
        if left:
            with _left_out(experiment):
                _sync_experiment(store, experiment, left)


def _weights_at(reference: str) -> list[tuple[str, str]]:
    """The stages of all trainings that a commit has results of, each with the SHA-256 of its weights."""
    found = {name: weights_at(reference, training) for name, training in TRAININGS.items()}
    return [(name, weights) for name, weights in found.items() if weights]


def _weights_before(baseline: str) -> list[tuple[str, str]]:
    """Those of the commit of an experiment, or of HEAD if this clone does not have it, or it is damaged."""
    try:
        return _weights_at(baseline)
    except StageError:
        return _weights_at("HEAD")


@contextmanager
def _left_out(experiment: Experiment) -> Iterator[None]:
    """Name an experiment that is damaged instead of stopping; a fault of the store stops."""
    try:
        yield
    except StoreError:
        raise
    except StageError as error:
        name, what = experiment.name, str(error).partition("; ")[0]
        print(f"sync: left out experiment {name}: {what}; `dvc exp remove {name}` drops it")


def _sync_experiment(store: Store, experiment: Experiment, left: dict[Training, tuple[list, Any]]) -> None:
    lock = file_at(experiment.reference, LOCK)
    if lock is None:
        raise StageError(f"{LOCK}: not in the experiment, expected beside its metrics")
    stages = read_stages(lock)
    tags, diff = _origin_of(experiment)
    with _metrics_of(experiment):
        for results in [read_results(training, stages) for training in left if training.stage in stages]:
            known, target = left[results.training]
            changes = sync_runs(store, results, known, target, lambda: (tags, diff), replace=False)
            for run_id, added in changes.items():
                if added:
                    said = f"{', '.join(added)} of experiment {experiment.name}"
                    print(f"sync: {results.training.stage}, run {run_id}: {said}")


def _origin_of(experiment: Experiment) -> tuple[dict, str | None]:
    """Tags of the runs of an experiment, and the changes of code that it was made with."""
    name, baseline = {"dvc_exp_name": experiment.name}, experiment.baseline
    try:  # diff-tree, since the user's settings colour what `git diff` prints, or change its paths
        options = ("-p", "--binary", "--no-ext-diff")
        diff = git("diff-tree", *options, baseline, experiment.reference, "--", ".", *NOT_CODE)
    except GitError:  # again a clone of few commits
        return name, None
    tags = name | {"git_commit": baseline, "git_dirty": str(bool(diff)).lower()}
    return tags, diff.decode("latin-1") if diff else None


def _origin_of_tree(stage: dict) -> tuple[dict, str | None]:
    """The same of the working tree, if it holds the code that made a stage's results."""
    code = {dep["path"]: dep["md5"] for dep in stage.get("deps", []) if dep["path"].startswith(CODE)}
    is_here = all(Path(path).exists() and _md5(Path(path), RUNS) == digest for path, digest in code.items())
    tags = git_tags() if is_here else {}
    return tags, git_diff() if tags.get("git_dirty") == "true" else None


@contextmanager
def _metrics_of(experiment: Experiment) -> Iterator[None]:
    """Stand in a folder with the metrics that git has of an experiment."""
    archive = git("archive", "--format=zip", experiment.reference, "--", "metrics")
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(io.BytesIO(archive)).extractall(folder)
        with chdir(folder):
            yield


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
    return all(made.get(dep["path"], dep.get("md5")) == dep.get("md5") for dep in stage.get("deps", []))


def _params(training: Training, stages: dict) -> dict:
    """The params in dvc.lock under their paths; of a training on copies, those that made the copies, too."""
    stage, copies = stages[training.stage], stages.get("augment_images")
    readers = [stage]
    if training.images == "augmented" and copies and _has_read(stage, [copies]):
        readers.append(copies)
    params: dict[str, object] = {}
    for reader in readers:
        for name, section in reader.get("params", {}).get("params.yaml", {}).items():
            if isinstance(section, dict):
                params |= {f"{name}.{leaf}": value for leaf, value in section.items()}
            else:  # dvc.yaml once named paths, not sections
                params[name] = section
    return params


def _sync_model(client, run_id: str, training: Training) -> bool:
    """Log the model to a run that has none; needs the weights, which only the DVC cache may have."""
    if not training.weights.exists() or runs.ready_models(client, client.get_run(run_id)):
        return False
    runs.log_model(client, run_id, training.stage, training.weights)
    return True


def _sync_report(client, run_id: str, stage: str, results: Results, replace: bool) -> bool:
    """Attach what a later stage wrote about the training."""
    files = results.reports[stage]
    metrics: dict[str, float] = {}
    for file in files:
        if file.suffix == ".json":
            metrics |= numbers(read_json(file))
    content = b"".join(file.read_bytes() for file in files)
    return _once(
        client, run_id, stage, content, lambda: replace,
        lambda: runs.log_report(client, run_id, stage, metrics, files, runs.now()),
    )  # fmt: skip


def _sync_lock(client, run_id: str, results: Results, replace: bool) -> bool:
    """Attach the entries of dvc.lock, unless the run has those of another training to the same weights."""
    name, stage, lock = "dvc.lock.json", results.training.stage, json.dumps(results.lock, indent=2)

    def is_ours() -> bool:
        if name not in [one.path for one in client.list_artifacts(run_id)]:
            return True
        with tempfile.TemporaryDirectory() as folder:
            has = Path(client.download_artifacts(run_id, name, folder)).read_bytes()
        try:
            return json.loads(has)[stage] == results.lock[stage]
        except (ValueError, LookupError, TypeError):  # none that sync wrote
            return True

    return _once(
        client, run_id, "dvc_lock", lock.encode(), lambda: replace and is_ours(),
        lambda: client.log_text(run_id, lock, name),
    )  # fmt: skip


def _once(client, run_id: str, name: str, content: bytes, may_replace: Callable, send: Callable) -> bool:
    """Call `send` unless a tag of the run says that it was called: for this content, or for any other."""
    digest = hashlib.sha256(content).hexdigest()
    sent = client.get_run(run_id).data.tags.get(runs.synced_tag(name))
    if sent == digest or (sent and not may_replace()):
        return False
    send()
    client.set_tag(run_id, runs.synced_tag(name), digest)
    return True


def _md5(path: Path, ends: str | tuple[str, ...] = "") -> str:
    """DVC's digest of a file, or of the files in a folder whose names end so."""
    if path.is_file():
        return hashlib.md5(path.read_bytes()).hexdigest()
    files = sorted(file for file in path.rglob("*") if file.name.endswith(ends) and file.is_file())
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
