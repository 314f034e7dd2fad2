"""Follow the records of a stage, and bring MLflow's runs in line with them.

Usage: python -m fashion_cnn.tracking.follower FOLDER. The stage starts it, and holds a lock in the folder
until the stage ends, however it ends. The follower prints where the runs are, or what is missing.
"""

import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from fashion_cnn.project.errors import StoreError
from fashion_cnn.project.files import write_text
from fashion_cnn.project.process import run_stage
from fashion_cnn.project.record import RECORD, WEIGHTS, read_record, records_folder
from fashion_cnn.project.stage_records import ALIVE, LATER
from fashion_cnn.tracking import runs
from fashion_cnn.tracking.models import packed_code
from fashion_cnn.tracking.store import as_store_error, connect, reason, shown, store_name, store_url

SENDING, STORE = "follower.lock", "store.txt"  # next to the records; STORE names their store
LOOK = 0.3  # seconds between polls of the records
PAUSE = 3  # seconds before a retry, as when the store is unreachable


def main() -> None:
    """Bring runs in line until the stage has ended, then once more, and print the outcome."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # exit at once; the records stay
    # The stage reads standard output, so what libraries print, such as SQL, goes to standard error.
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    folder, seen = Path(sys.argv[1]), dict[Path, bytes]()
    packed_code()
    store, lines = None, list[str]()
    while True:
        ended = has_ended(folder)  # checked before the records are read, so that no change is missed
        try:
            if store is None:
                # This is read only once, because a copy with its team.env may be deleted meanwhile.
                os.environ["MLFLOW_TRACKING_URI"] = store_url()
                store = connect()
                # Leftovers are sent first, because a training may resume a run that one of them began.
                lines = send_left_over(store, folder)
            fault = send(store, folder, ended, seen)
        except StoreError as error:
            fault = str(error)
        if ended:
            break
        if fault:
            store = None
        time.sleep(PAUSE if fault else LOOK)
    lines += [f"{fault}; {LATER}" if fault else f"MLflow: sent to {shown(store_url())}"]
    with suppress(BrokenPipeError), answer:  # the stage may have stopped waiting
        answer.write("\n".join(lines) + "\n")


def has_ended(folder: Path) -> bool:
    """Whether the stage that keeps the records in a folder has ended, however it ended."""
    try:
        with FileLock(folder / ALIVE, timeout=0):
            return True
    except Timeout:
        return False


def send_left_over(store, own: Path | None = None) -> list[str]:
    """Send the records that earlier stages left; returns a line for each that could not be sent.

    Trainings come first, then the rest, each by time: a later stage's report belongs to its training's run.
    """
    left = [path for path in records_folder().glob("[!.]*") if path.is_dir() and path != own]
    left.sort(key=lambda path: (not any(path.glob(f"*/{WEIGHTS}")), path.name))
    lines = []
    for folder in left:
        try:
            if has_ended(folder) and (fault := send(store, folder, True, {})):
                lines.append(f"{fault}; to drop it, delete {folder}")
        except StoreError as error:  # these records must wait
            lines.append(str(error))
        except (OSError, ValueError) as error:  # unreadable, such as the file of another user
            lines.append(f"MLflow: {folder}: {reason(error)}; to drop it, delete {folder}")
    return lines


def send(store, folder: Path, ended: bool, seen: dict[Path, bytes]) -> str | None:
    """Bring runs in line with a stage's records that `seen` lacks; if it has ended, delete them.

    Returns a record's fault as one line. Raises StoreError if another process keeps sending the records for
    more than ten seconds, or they are for another store.
    """
    try:
        with FileLock(folder / SENDING, timeout=10 if ended else 0):
            return _send(store, folder, ended, seen)
    except Timeout:
        if ended:
            raise StoreError(f"MLflow: another process is sending {folder}") from None
        return None
    except FileNotFoundError:  # another process was faster
        if folder.exists():
            raise
        return None


def _send(store, folder: Path, ended: bool, seen: dict[Path, bytes]) -> str | None:
    named, here, faults = folder / STORE, store_name(), []
    if not named.exists():
        write_text(named, here)
    elif (other := named.read_text(encoding="utf-8")) != here:
        raise StoreError(
            f"MLflow: begun in another store, {other}; `fashion-cnn sync` there sends the records"
        )
    for path in sorted(folder.glob(f"*/{RECORD}")):
        content = path.read_bytes()
        if content == seen.get(path) and not ended:
            continue
        if fault := _send_record(store, path, ended):
            faults.append(fault)
            continue
        seen[path] = content
        if ended:
            path.unlink()  # before its files: without some, it would be a different record
    if ended and not faults:
        shutil.rmtree(folder, ignore_errors=True)  # if killed here, the next run deletes the rest
    return faults[0] if faults else None


def _send_record(store, path: Path, ended: bool) -> str | None:
    try:
        with as_store_error():
            record = read_record(path)
            if ended and record.status == "RUNNING":  # the stage was killed
                record.status = "KILLED"
            runs.bring_in_line(store, record)
    except StoreError as error:
        return str(error)
    except Exception as error:  # a damaged record, or one of another version, must not stop the rest
        return f"MLflow: {path}: {type(error).__name__}: {reason(error)}"
    return None


if __name__ == "__main__":
    run_stage(main)
