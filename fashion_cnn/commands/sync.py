"""Bring the tracked runs in line with dvc.lock, metrics and experiments.

Stages record what they do. But DVC restores results from its cache without running stages, the store may be
new or have been unreachable, and DVC skips the evaluation of a training that gave the same bytes again. So
this makes the same records from what DVC and git have. A second sync changes nothing.
"""

import hashlib
import io
import json
import tempfile
import zipfile
from collections import defaultdict
from contextlib import suppress
from functools import cache
from pathlib import Path

from fashion_cnn.commands.dvc_state import (
    Experiment,
    experiments,
    left_out_if_damaged,
    parse_lock,
    weights_at,
)
from fashion_cnn.lesson.results import NUMBER, TOY_CURVE, read_table, read_weights_sha256
from fashion_cnn.project.catalog import TOY, TRAININGS, Training
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.files import md5_of, numbers, read_json, write_text
from fashion_cnn.project.record import DIFF, Record, now_ms, records_folder
from fashion_cnn.project.repository import CODE, CODE_ENDS, LOCK, NOT_CODE, GitError, code_state, file_at, git
from fashion_cnn.tracking import runs
from fashion_cnn.tracking.follower import send_left_over
from fashion_cnn.tracking.store import Store, as_store_error, connect, shown, store_url

PLOT_STAGE, PAGE_STAGE = "plot_results", "build_page"
SEEN = Path(".dvc/tmp/synced")


def main(is_quiet: bool = False) -> None:
    """Send the records that stages left, then bring in line the runs of experiments and of dvc.lock.

    `is_quiet`: print nothing about runs that are up to date.
    """
    with as_store_error():
        store = connect()
        for fault in send_left_over(store):
            print(f"sync: {fault}")
    if not LOCK.exists():
        raise StageError(f"{LOCK}: not found; run from the repository root, after `dvc repro`")
    entries = read_entries(LOCK.read_bytes())
    here, now = code_state(), now_ms()
    with tempfile.TemporaryDirectory() as scratch:
        found = {}
        for name in [name for name in TRAININGS if name in entries]:
            origin = here if _is_code_of(entries[name]) else ({}, b"")
            found[name] = records_of(TRAININGS[name], entries, Path(), Path(scratch), origin, now)
        sync_experiments(store)  # goes first: runs of a checked-out experiment are the experiment's
        for name, records in found.items():
            changes = write(store, records)
            new = {run_id: added for run_id, added in changes.items() if added}
            if not new and not is_quiet:
                new = {next(iter(changes)): ["up to date"]}
            for run_id, added in new.items():
                print(f"sync: {name}, run {run_id}: {', '.join(added)}")


def main_if_new() -> None:
    """The same, but only if results, experiments or store have changed: it takes seconds."""
    left = any(records_folder().glob("[!.]*"))
    if left or not SEEN.exists() or SEEN.read_text(encoding="utf-8") != _seen():
        main(is_quiet=True)
        write_text(SEEN, _seen())


def _seen() -> str:
    """A digest of dvc.lock, of DVC's experiments, and of the store's identity."""
    url = store_url()
    path = Path(shown(url))  # for a server, it does not exist
    store = f"{url} {path.stat().st_ino if path.exists() else 0}"
    try:
        references = git("for-each-ref", "refs/exps")
    except GitError:  # without a repository there are none
        references = b""
    return hashlib.sha256(store.encode() + LOCK.read_bytes() + references).hexdigest()


def write(store: Store, records: list[Record], only_missing: bool = False) -> dict[str, list[str]]:
    """Bring runs in line with several records of a training, the training's own first."""
    changes: dict[str, list[str]] = {}
    with as_store_error():
        for record in records:
            for run_id, added in runs.bring_in_line(store, record, only_missing).items():
                changes[run_id] = changes.get(run_id, []) + added
    return changes


def read_entries(content: bytes) -> dict:
    """The entries of a dvc.lock. Raises StageError if it is damaged, or an entry lacks outputs."""
    lock = parse_lock(content)
    if lock is None:
        raise StageError(f"{LOCK}: damaged, expected it as DVC writes it; `dvc status` says where")
    for name, stage in lock["stages"].items():  # DVC still reads a file cut between two entries
        expected = {str(path) for path in TRAININGS[name].outputs} if name in TRAININGS else set()
        found = {out["path"]: out.get("md5") for out in stage.get("outs", [])}
        if not found or not all(found.values()) or not expected <= found.keys():
            raise StageError(f"{LOCK}: {name} lacks outputs; `dvc repro` completes it")
    return lock["stages"]


def records_of(
    training: Training, entries: dict, root: Path, scratch: Path, origin: tuple[dict, bytes], when: int
) -> list[Record]:
    """Records of a training in dvc.lock and of the later stages that read it; its files are below `root`.

    `origin` is the code that made it, as code_state returns it. Raises StageError if a file in
    metrics/ is missing, or differs from dvc.lock.
    """
    for out in entries[training.stage]["outs"]:
        _check(root, out)
    curve = read_table(root / training.curve, TOY_CURVE, others=NUMBER)
    metrics = numbers(read_json(root / training.metrics))
    later = _reports(training, entries)
    (folder := scratch / training.stage).mkdir()
    lock, diff = folder / runs.LOCK_FILE, folder / DIFF
    lock.write_text(json.dumps({name: entries[name] for name in (training.stage, *later)}, indent=2))
    diff.write_bytes(origin[1])
    own = Record(
        training=training.stage,
        weights_sha256=read_weights_sha256(root / training.metrics),
        dvc_lock=hashlib.sha256(json.dumps(entries[training.stage]).encode()).hexdigest()[:32],
        tags=origin[0],
        params=_params(training, entries),
        rows=curve,
        metrics={name: value for name, value in metrics.items() if name not in curve[0]},
        begun=when,
        ended=when,
        files={lock.name: lock},
        weights=root / training.weights if (root / training.weights).exists() else None,
        diff=diff if origin[1] else None,
    )
    return [own, *(_report(own, name, entries[name], root) for name in later)]


def _report(own: Record, name: str, entry: dict, root: Path) -> Record:
    """What a later stage reports about the training of a record."""
    paths = [path for out in entry["outs"] for path in _files(_check(root, out))]
    if name == PLOT_STAGE:
        paths = [path for path in paths if path.stem in TRAININGS[own.training].figures]
    metrics: dict = {}
    for path in paths:
        metrics |= numbers(read_json(path)) if path.suffix == ".json" else {}
    files = {f"{name.partition('@')[0]}/{path.name}": path for path in paths}
    return Record(
        training=own.training,
        weights_sha256=own.weights_sha256,
        metrics=metrics,
        begun=own.begun,
        ended=own.ended,
        files=files if all(path.exists() for path in paths) else {},  # the page may be only in DVC's cache
    )


def sync_experiments(store: Store) -> None:
    """Complete the runs of DVC's experiments from git, because they may never be checked out here."""
    try:
        found = experiments()
    except GitError as error:
        print(f"sync: did not look for experiments: {error}")
        return
    known = defaultdict(list)
    with as_store_error():
        tracked = runs.find_runs(store) if found else []
    for run in tracked:
        known[run.data.tags.get("dvc_stage"), run.data.tags.get("weights_sha256")].append(run)
    before, taken = cache(_weights_before), set()
    for experiment in reversed(found):  # of several with the same weights, the newest gets the run
        with left_out_if_damaged(experiment):
            left = []
            for one in weights_at(experiment.reference).items():
                own = runs.of_experiment(known[one], experiment.name, experiment.baseline)
                is_first = one not in taken and (own or not known[one])
                is_named = own and own[0].data.tags.get("dvc_exp_name") == experiment.name
                if one in before(experiment.baseline).items() or not (is_first or is_named):
                    continue  # another training's run will do
                taken.add(one)
                if not own or runs.DVC_LOCK not in own[0].data.tags:
                    left.append(TRAININGS[one[0]])
            if left:
                _sync_experiment(store, experiment, left)


def _weights_before(baseline: str) -> dict[str, str]:
    """The weights at an experiment's commit, or at HEAD if this clone lacks it, or it is damaged."""
    for reference in (baseline, "HEAD"):
        with suppress(StageError):
            return weights_at(reference)
    return {}


def _sync_experiment(store: Store, experiment: Experiment, left: list[Training]) -> None:
    lock = file_at(experiment.reference, LOCK)
    if lock is None:
        raise StageError(f"{LOCK}: not in the experiment, expected next to its metrics")
    entries, origin = read_entries(lock), _origin_of(experiment)
    archive = git("archive", "--format=zip", experiment.reference, "--", "metrics")
    with tempfile.TemporaryDirectory() as folder:
        root, scratch = Path(folder, "experiment"), Path(folder)
        zipfile.ZipFile(io.BytesIO(archive)).extractall(root)
        for training in left:
            if training.stage not in entries:
                continue
            records = records_of(training, entries, root, scratch, origin, 1000 * experiment.time)
            for run_id, added in write(store, records, only_missing=True).items():
                if added:
                    said = f"{', '.join(added)} of experiment {experiment.name}"
                    print(f"sync: {training.stage}, run {run_id}: {said}")


def _origin_of(experiment: Experiment) -> tuple[dict, bytes]:
    """Tags for the runs of an experiment, and the code changes that it ran with."""
    name, baseline = {"dvc_exp_name": experiment.name}, experiment.baseline
    try:  # diff-tree, because the user's settings may colour what `git diff` prints, or change its paths
        options = ("-p", "--binary", "--no-ext-diff")
        diff = git("diff-tree", *options, baseline, experiment.reference, "--", ".", *NOT_CODE)
    except GitError:  # a shallow clone lacks the baseline
        return name, b""
    return name | {"git_commit": baseline, "git_dirty": str(bool(diff)).lower()}, diff


def _is_code_of(entry: dict) -> bool:
    """Whether the working tree holds the code that a stage ran with."""
    code = {dep["path"]: dep["md5"] for dep in entry.get("deps", []) if dep["path"].startswith(CODE)}
    return all(Path(path).exists() and _md5(Path(path), CODE_ENDS) == digest for path, digest in code.items())


def _reports(training: Training, entries: dict) -> list[str]:
    """The stages of dvc.lock that report on this training, and not on an earlier one."""
    about_it = [training.evaluation, PLOT_STAGE, *([] if training is TOY else [PAGE_STAGE])]
    makers = [entries[name] for name in (training.stage, training.evaluation) if name in entries]
    return [name for name in about_it if name in entries and _has_read(entries[name], makers)]


def _has_read(entry: dict, makers: list[dict]) -> bool:
    """Whether a stage ran with the makers' current outputs; its entry in dvc.lock stays until it reruns."""
    made = {out["path"]: out.get("md5") for maker in makers for out in maker.get("outs", [])}
    return all(made.get(dep["path"], dep.get("md5")) == dep.get("md5") for dep in entry.get("deps", []))


def _params(training: Training, entries: dict) -> dict:
    """A training's params in dvc.lock, by path; with augmented images, also the params that made them."""
    entry, copies = entries[training.stage], entries.get("augment_images")
    readers = [entry]
    if training.images == "augmented" and copies and _has_read(entry, [copies]):
        readers.append(copies)
    params: dict[str, object] = {}
    for reader in readers:
        for name, section in reader.get("params", {}).get("params.yaml", {}).items():
            if isinstance(section, dict):
                params |= {f"{name}.{leaf}": value for leaf, value in section.items()}
            else:  # dvc.yaml once named paths, not sections
                params[name] = section
    return params


def _md5(path: Path, ends: str | tuple[str, ...] = "") -> str:
    """DVC's digest of a file, or of the files in a folder whose names end in `ends`."""
    if path.is_file():
        return md5_of(path.read_bytes())
    files = sorted(file for file in path.rglob("*") if file.name.endswith(ends) and file.is_file())
    entries = [{"md5": _md5(file), "relpath": file.relative_to(path).as_posix()} for file in files]
    return md5_of(json.dumps(entries, sort_keys=True).encode()) + ".dir"


def _files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


def _check(root: Path, out: dict) -> Path:
    """The path of an output in dvc.lock. Raises StageError if its content differs from the digest there."""
    path = root / out["path"]
    if path.exists() and _md5(path) != out["md5"]:
        raise StageError(f"{out['path']}: differs from dvc.lock; `dvc repro` writes both again")
    if not path.exists() and out["path"].startswith("metrics/"):
        raise StageError(f"{out['path']}: not found, expected as in dvc.lock; `dvc repro` makes it")
    return path
