"""Print where a run, a model file, a digest or a commit comes from, and how to restore it."""

import json
import re
import shlex
from pathlib import Path

from fashion_cnn.commands.dvc_state import weights_at
from fashion_cnn.project.catalog import RUN_ID, TRAININGS
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.files import sha256_of
from fashion_cnn.project.repository import GitError, git
from fashion_cnn.tracking.runs import IMAGES, NEWEST
from fashion_cnn.tracking.store import connect


def main(what: str, as_json: bool) -> None:
    """Find the runs of what was asked for, and print their lineage."""
    store = connect()
    searches = [
        store.client.search_runs(store.experiments, query, order_by=NEWEST) for query in queries(what)
    ]
    found = {run.info.run_id: run for runs in searches for run in runs}
    if not found:
        raise StageError(
            f"{what}: no run found; expected a run id, a file of weights, its SHA-256 or a commit"
        )
    traces = [trace(store.client, run) for run in found.values()]
    print(json.dumps(traces, indent=2) if as_json else "\n\n".join(map(words, traces)))


def queries(what: str) -> list[str]:
    """The MLflow searches for the runs of `what`. Raises StageError if `what` is not recognized."""
    if Path(what).is_file():
        return [f"tags.weights_sha256 = '{sha256_of(Path(what))}'"]
    if re.fullmatch("[0-9a-f]{64}", what):
        return [f"tags.weights_sha256 = '{what}'"]
    if re.fullmatch(RUN_ID, what):
        return [f"attributes.run_id = '{what}'"]
    try:
        commit = git("rev-parse", "--verify", "--end-of-options", f"{what}^{{commit}}").decode().strip()
    except GitError as error:
        raise StageError(f"{what}: expected a run id, a file, a SHA-256 or a git commit ({error})") from None
    # Runs of this commit's code, and runs whose results it holds: a kept experiment ran on its parent.
    held = set(weights_at(commit).values())
    return [
        f"tags.git_commit = '{commit}'",
        *(f"tags.weights_sha256 = '{sha256}'" for sha256 in sorted(held)),
    ]


def trace(client, run) -> dict:
    """All that ties `run` to code, data and params."""
    tags = {
        name: value for name, value in run.data.tags.items() if not name.startswith(("mlflow.", "synced_"))
    }
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    lock = None
    if "dvc.lock.json" in artifacts:
        path = Path(client.download_artifacts(run.info.run_id, "dvc.lock.json"))
        lock = json.loads(path.read_text(encoding="utf-8"))
    return {
        **tags,
        "run_id": run.info.run_id,
        "status": run.info.status,
        "params": run.data.params,
        "dvc_lock": lock,
        "restore": restore(run, tags, "uncommitted.diff" in artifacts),
    }


def restore(run, tags: dict, has_diff: bool) -> list[str]:
    """The commands that restore the run's results, from the DVC cache if it has them.

    Params and tags come from a store that others may write to, so values are quoted, and what no stage writes
    is left out, with a comment.
    """
    if tags.get("dvc_stage") not in TRAININGS:
        return [f"# no command: dvc_stage is {one_line(tags.get('dvc_stage'))}, expected a training"]
    commands, commit = list[str](), tags.get("git_commit", "")
    if re.fullmatch("[0-9a-f]{40}", commit):
        commands.append(f"git checkout {commit}")
    elif commit:
        commands.append(f"# left out: the commit {one_line(commit)}, expected 40 hexadecimal digits")
    # A run that began dirty and was resumed after a commit is clean, and keeps its first diff.
    if tags.get("git_dirty") == "true" and has_diff:
        commands.append(f"mlflow artifacts download -r {run.info.run_id} -a uncommitted.diff -d .")
        commands.append("git apply uncommitted.diff")
    elif tags.get("git_dirty") == "true":
        commands.append("# the run had uncommitted changes, which it does not record")
    changes = []
    for name, value in sorted(run.data.params.items()):
        if not re.fullmatch(r"\w+(\.\w+)*", name) or one_line(value) != value:
            commands.append(f"# left out: the param {one_line(name)}, which no stage writes like this")
        elif name != IMAGES:
            changes += ["-S", f"{name}={'null' if value == 'None' else value}"]  # earlier versions: None
    return [*commands, shlex.join(["dvc", "exp", "run", *changes, tags["dvc_stage"]])]


def one_line(value: object) -> str:
    """A value in one line, without escape sequences, which could make a terminal show something else."""
    text = str(value)
    return text if text.isprintable() else json.dumps(text)


def words(trace: dict) -> str:
    """The trace as text."""
    dirty = {"true": ", with uncommitted changes", "false": ", clean"}.get(trace.get("git_dirty", ""), "")
    machine = ", ".join(trace[name] for name in ("torch", "cpu_capability", "gpu") if name in trace)
    lines = [
        f"run {trace['run_id']} of {trace.get('dvc_stage', 'no stage')}, {trace['status']}",
        f"  weights     {trace.get('weights_sha256', 'none')}",
        f"  commit      {trace.get('git_commit', 'none')}{dirty}",
        f"  experiment  {trace.get('dvc_exp_name', 'none: `dvc repro` or the script alone')}",
        f"  made with   {machine}",
    ]
    if trace.get("stand_in"):
        lines.append("  stand-in    holds results of weights whose training was not recorded in this store")
    for name, value in sorted(trace["params"].items()):
        lines.append(f"  param       {name} = {value}")
    for stage, entry in (trace["dvc_lock"] or {}).items():
        for kind in ("deps", "outs"):
            for item in entry.get(kind, []):
                lines.append(f"  {kind:<11} {stage}: {item.get('path')} {item.get('md5')}")
    if not trace["dvc_lock"]:
        lines.append("  dvc.lock    not recorded yet; `fashion-cnn sync` records it")
    lines += ["  to restore it:", *(f"    {command}" for command in trace["restore"])]
    return "\n".join(map(one_line, lines))
