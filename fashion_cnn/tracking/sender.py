"""Follow the outbox of a stage, and write what it holds into MLflow.

Usage: python -m fashion_cnn.tracking.sender FOLDER. The stage starts it, with a pipe as standard input that
closes when the stage ends, however it ends. Prints one line: what was sent, or why it was not.
"""

import json
import os
import select
import shutil
import signal
import sys
from contextlib import suppress
from getpass import getuser
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from fashion_cnn.project.errors import StageError
from fashion_cnn.project.files import read_json, write_text
from fashion_cnn.project.outbox import ALIVE, EVENTS, outboxes
from fashion_cnn.project.process import run_stage
from fashion_cnn.tracking import runs
from fashion_cnn.tracking.store import StoreError, connect, reason, shown, store_faults, store_name, store_url

LATER = "`fashion-cnn sync` sends the rest"
GONE = ".gone-"  # the prefix of an outbox that is being deleted
STATE = "sent.json"  # in an outbox: how far it has come
LOOK = 0.3  # seconds between looks at the outbox
PAUSE = 3  # seconds after a store could not be reached


def main() -> None:
    """Send the stage's events until it ends, then the rest, and print the result."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends at once; what is not sent stays in the outbox
    folder, ended = Path(sys.argv[1]), False
    lines: list[str] | None = None
    while True:
        last = ended  # nothing is written into the outbox after this attempt
        try:
            store = connect()
            answer_stage("")
            if lines is None:  # once, and first: a training may resume a run that an earlier one began
                lines = send_left_over(store, folder)
            fault = follow(store, folder)
        except StoreError as error:
            fault = str(error)
            answer_stage(fault)
        if not fault or last:
            break
        ended = stage_has_ended(PAUSE)
    for line in [*(lines or []), f"{fault}; {LATER}" if fault else f"MLflow: sent to {shown(store_url())}"]:
        print(line)


def answer_stage(fault: str) -> None:
    """Tell a stage that waits for it, once, why the store cannot be used, or by an empty line that it can."""
    if os.environ.pop("REQUIRE_MLFLOW", None):
        print(fault, flush=True)


def stage_has_ended(seconds: float) -> bool:
    """Whether the pipe from the stage is closed; waits at most `seconds` for that."""
    return bool(select.select([sys.stdin], [], [], seconds)[0])


def follow(store, folder: Path) -> str | None:
    """Send the stage's events until it has ended; returns the fault that stopped this, in a line."""
    while True:
        ended = stage_has_ended(LOOK)
        try:
            fault = send(store, folder, wait=10 if ended else 0)
        except Timeout:
            fault = f"MLflow: another process is sending {folder}" if ended else None
        if fault or ended:
            return fault


def send_left_over(store, own: Path | None = None) -> list[str]:
    """Send what earlier stages have left, oldest first; returns a line for each that could not be sent."""
    for gone in outboxes().glob(f"{GONE}*"):  # a kill stopped its deletion
        shutil.rmtree(gone, ignore_errors=True)
    lines = []
    for folder in sorted(path for path in outboxes().glob("[!.]*") if path.is_dir() and path != own):
        with suppress(Timeout):  # another process is sending it
            if fault := send(store, folder, wait=10):
                lines.append(f"{fault}; to drop it, delete {folder}")
    return lines


def send(store, folder: Path, wait: float = 0) -> str | None:
    """Send what an outbox holds and the store lacks; delete it when its stage has ended.

    Returns the fault that stopped this, in a line. Raises Timeout if another process holds the outbox for
    more than `wait` seconds.
    """
    try:
        with FileLock(folder / "sender.lock", timeout=wait):
            return Delivery(store, folder).send(wait=min(wait, 1))
    except FileNotFoundError:  # another sender was faster
        if folder.exists():
            raise
        return None


class Delivery:
    """One outbox on its way into the store."""

    def __init__(self, store, folder: Path):
        self.mlflow, self.client = store, store.client
        self.folder = folder
        try:
            begun = read_json(folder / STATE)
        except (FileNotFoundError, StageError):  # missing or damaged: all may be sent twice
            begun = {}
        self.store = begun.get("store", store_name())
        self.sent, self.run_id = begun.get("sent", 0), begun.get("run_id", "")
        self.was_finished = begun.get("was_finished", False)  # the run, before this training repeated it

    def send(self, wait: float) -> str | None:
        """Send the events that are new; a run that the store has lost is made again, with all of them.

        Waits for `wait` seconds for the end of the stage, as a pipe and a lock need not close at once.
        """
        if self.store != store_name():
            return f"MLflow: a run begun in another store, {self.store}, where `fashion-cnn sync` ends it"
        ended = self.stage_has_ended(wait)  # before the events are read, so that none comes after
        try:
            events = self.events()
            if not ended and len(events) == self.sent:
                return None
            lost = self.run_id and not runs.has_run(self.mlflow, self.run_id)
            if lost or self.sent > len(events):
                self.sent, self.run_id = 0, ""
            for event in events[self.sent :]:
                self.write(event)
                self.sent += 1
                self.save()
            if ended and self.run_id and events[-1]["event"] != "end":
                self.write({"event": "end", "status": "KILLED", "time": events[-1]["time"]})
        # The store, a damaged outbox, or one of another version: no fault of one may stop the others.
        except Exception as error:
            if isinstance(error, StoreError):
                return str(error)
            if isinstance(error, store_faults()):
                return f"MLflow store {shown(store_url())}: {reason(error)}"
            return f"MLflow: {self.folder}: {type(error).__name__}: {reason(error)}"
        if ended:  # under another name first, since another sender may be waiting for its lock
            gone = self.folder.rename(self.folder.with_name(f"{GONE}{self.folder.name}"))
            shutil.rmtree(gone, ignore_errors=True)
        return None

    def stage_has_ended(self, wait: float) -> bool:
        """Whether nobody writes into the outbox any more."""
        try:
            with FileLock(self.folder / ALIVE, timeout=wait):
                return True
        except Timeout:
            return False

    def events(self) -> list[dict]:
        """All events so far; a line without an end is one that is being written."""
        if not (self.folder / EVENTS).exists():  # killed at its very start
            return []
        lines = (self.folder / EVENTS).read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def save(self) -> None:
        """Keep how far this has come, for another sender."""
        state = {"store": self.store, "sent": self.sent, "run_id": self.run_id}
        write_text(self.folder / STATE, json.dumps(state | {"was_finished": self.was_finished}) + "\n")

    def write(self, event: dict) -> None:
        """Write one event into the store; all that is done here may be done twice."""
        client, run_id = self.client, self.run_id
        match event:
            case {"event": "begin"}:
                self.begin(event)
            case {"event": "dataset"}:
                runs.log_dataset(
                    client, run_id, event["name"], event["digest"], event["source"], event["sizes"]
                )
            case {"event": "epochs"}:
                runs.log_missing_epochs(client, run_id, event["rows"], event["time"])
            case {"event": "metrics"}:
                runs.log_new_metrics(client, run_id, event["metrics"], event["time"])
            case {"event": "model"}:
                client.set_tag(run_id, "weights_sha256", event["weights_sha256"])
                client.log_text(run_id, event["summary"], "layers.txt")
                training = client.get_run(run_id).data.tags["dvc_stage"]
                example = np.array(event["example"], np.float32)
                runs.log_model(client, run_id, training, self.folder / event["weights"], example)
            case {"event": "end"}:
                if not self.was_finished:
                    client.set_terminated(run_id, event["status"], event["time"])
            case {"event": "report"}:
                self.report(event)
            case _:
                raise ValueError(f"unknown event {str(event)[:100]}")

    def begin(self, event: dict) -> None:
        """Open the run of a training: that which it resumes or an earlier try has made, or a new one."""
        client, tags = self.client, event["tags"]
        self.run_id = runs.find_run(self.mlflow, training=tags["training"]) or ""
        self.was_finished = bool(self.run_id) and runs.is_finished(client, self.run_id)
        if self.run_id and not self.was_finished:
            client.update_run(self.run_id, status="RUNNING")
            for name, value in tags.items():
                client.set_tag(self.run_id, name, value)
        elif not self.run_id:
            script = f"stages/{event['stage'].partition('@')[0]}.py"
            source = {"mlflow.source.name": script, "mlflow.source.type": "LOCAL", "mlflow.user": getuser()}
            name = runs.run_name(event["stage"], tags, event["params"])
            self.run_id = runs.create_run(self.mlflow, event["stage"], name, tags | source, event["time"])
            client.set_tag(self.run_id, "mlflow.note.content", runs.NOTE.format(self.run_id))
        runs.log_params(client, self.run_id, event["params"])
        runs.log_diff(client, self.run_id, event["diff"])
        # For the model: takes seconds, during which the stage trains; later, a trial's clone may be gone.
        import fashion_cnn.models.cnns  # noqa: F401

    def report(self, event: dict) -> None:
        """Write what a later stage says about weights into all runs that trained them, or into a new one."""
        stage, training, weights = event["stage"], event["training"], event["weights_sha256"]
        found = runs.find_runs(self.mlflow, weights_sha256=weights, dvc_stage=training)
        ids = [run.info.run_id for run in found]
        if not ids:
            # An experiment may report on weights that its commit has; `fashion-cnn sync` finds out.
            is_known = "dvc_exp_name" not in event["tags"]
            origin = (event["tags"], event["diff"]) if is_known else ({}, None)
            ids = [runs.stand_in(self.mlflow, training, weights, *origin)]
        files = [self.folder / name for name in event["files"]]
        for run_id in ids:
            runs.log_report(self.client, run_id, stage, event["metrics"], files, event["time"])
            # So that no older experiment takes its place.
            self.client.set_tag(run_id, runs.synced_tag(stage), "reported")


if __name__ == "__main__":
    run_stage(main)
