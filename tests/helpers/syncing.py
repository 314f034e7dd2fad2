"""Killing `fashion-cnn sync`, and what the store says once a later sync has completed."""

import shutil
import time
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus

from crash import Started
from fashion_cnn.tracking.runs import ready_models
from pipeline import tool, tracked_runs
from recovery import Trial, next_log


class Store:
    """A file of SQLite beside the project, a copy of `template` or a new one; artifacts are in mlruns/."""

    def __init__(self, project: Path, name: str, template: Path | None):
        self.project, self.path = project, project.parent / "stores" / f"{name}.db"
        self.is_new = template is None
        self.path.parent.mkdir(exist_ok=True)
        if template:
            shutil.copy(template, self.path)
        self.uri = f"sqlite:///{self.path}"

    def sync(self) -> float:
        """Run `fashion-cnn sync` to its end; returns its seconds."""
        began = time.monotonic()
        tool(self.project, "sync", MLFLOW_TRACKING_URI=self.uri)
        return time.monotonic() - began

    def says(self) -> dict[str, list[dict]]:
        """All that it says about the runs of each training, but for ids and times of new runs."""
        client, said = MlflowClient(self.uri), {}
        for run in tracked_runs(self.project, store=self.uri):
            tags = {name: value for name, value in run.data.tags.items() if not name.startswith("mlflow.")}
            curve = [
                (metric.step, metric.value)
                for name in run.data.metrics
                for metric in client.get_metric_history(run.info.run_id, name)
            ]
            said.setdefault(run.info.run_name, []).append(
                {
                    "status": run.info.status,
                    "end": None if self.is_new else run.info.end_time,
                    "params": run.data.params,
                    "metrics": run.data.metrics,
                    "curve": sorted(curve),
                    "tags": tags,
                    "model": bool(ready_models(client, run)),
                    "artifacts": sorted(file.path for file in client.list_artifacts(run.info.run_id)),
                }
            )
        return said


def finished_without_models(project: Path) -> Path:
    """A store of finished runs whose models failed and that were never synced, so that sync has work."""
    store = Store(project, "finished", project / "mlflow.db")
    client = MlflowClient(store.uri)
    for run in tracked_runs(project, store=store.uri):
        for output in run.outputs.model_outputs:
            client.finalize_logged_model(output.model_id, LoggedModelStatus.FAILED)
        for tag in [name for name in run.data.tags if name.startswith("synced_")]:
            client.delete_tag(run.info.run_id, tag)
    return store.path


def kill_sync(store: Store, delay: float, expected: dict) -> Trial | None:
    """Kill a sync after `delay` seconds, complete one, and compare; None if it had ended before."""
    log = next_log(store.project)
    started = Started(store.project, log, "-m", "fashion_cnn", "sync", MLFLOW_TRACKING_URI=store.uri)
    time.sleep(delay)
    if started.ended():
        return None
    started.process.kill()
    started.process.wait()
    trial = Trial(f"sync to a store {store.path.stem} after {delay:.1f} s")
    again = Started(
        store.project,
        log.with_suffix(".again.log"),
        "-m",
        "fashion_cnn",
        "sync",
        MLFLOW_TRACKING_URI=store.uri,
    )
    if again.process.wait():
        trial.lose(f"the second sync fails: {again.printed()[-300:]}")
    elif differences := differing(store.says(), expected):
        trial.lose(f"not what an undisturbed sync says: {', '.join(differences)}")
    return trial


def differing(said: dict, expected: dict) -> list[str]:
    """What differs, each as the training and the name of the value; the status with its value."""
    if {name: len(runs) for name, runs in said.items()} != {
        name: len(runs) for name, runs in expected.items()
    }:
        return [f"{len(runs)} runs of {name}" for name, runs in said.items()]
    return [
        f"{name} {what}"
        for name, [run] in said.items()
        for what, value in run.items()
        if value != expected[name][0][what]
    ]
