"""Run DVC, and read what it keeps: dvc.lock, the results of a commit, and experiments."""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from ruamel.yaml import YAML, YAMLError
from voluptuous import Invalid

from fashion_cnn.project.catalog import TRAININGS
from fashion_cnn.project.errors import StageError, StoreError
from fashion_cnn.project.files import weights_digest
from fashion_cnn.project.process import DVC, die_with_parent
from fashion_cnn.project.repository import LOCK, file_at, git


class Experiment(NamedTuple):
    """An experiment, as DVC keeps it in git."""

    name: str
    baseline: str  # the commit that it was made from
    reference: str
    time: int  # when it was made, in seconds


def run_dvc(*arguments: str, **more) -> subprocess.CompletedProcess:
    """Run DVC; it dies with this process, or its stage would outlive a killed command."""
    return subprocess.run([*DVC, *arguments], check=False, preexec_fn=die_with_parent, **more)


def experiments() -> list[Experiment]:
    """The experiments of all commits, oldest first. Raises GitError."""
    form = "--format=%(refname) %(committerdate:unix)"
    listed = git("for-each-ref", "--sort=committerdate", form, "refs/exps/??/*/*").decode()
    found = []
    for reference, time in map(str.split, listed.splitlines()):
        *_, first, rest, name = reference.split("/")
        found.append(Experiment(name, first + rest, reference, int(time)))
    return found


@contextmanager
def left_out_if_damaged(experiment: Experiment) -> Iterator[None]:
    """Report a damaged experiment instead of stopping; a StoreError is still raised."""
    try:
        yield
    except StoreError:
        raise
    except StageError as error:
        what = f"{experiment.name}: {str(error).partition('; ')[0]}"
        drop = shlex.join(["dvc", "exp", "remove", "--", experiment.name])
        print(f"left out experiment {what}; `{drop}` drops it", file=sys.stderr)


def files_at(references: list[str], path: str | Path) -> Iterator[bytes | None]:
    """A file's content in each of many commits, read by one process, or None. Raises GitError."""
    names = "".join(f"{one}:./{path}\n" for one in references)
    answer = BytesIO(git("cat-file", "--batch", stdin=names.encode()))
    for _ in references:
        head = answer.readline().split()  # the object, its kind and its size, or the name and "missing"
        if head[-1] == b"missing":
            yield None
        else:
            yield answer.read(int(head[-1]) + 1)[:-1]  # a line feed follows the content


def weights_at(reference: str) -> dict[str, str]:
    """The SHA-256 of the weights of each training for which a commit or an experiment has results.

    Raises StageError if a file of metrics is damaged.
    """
    found = {}
    for name, training in TRAININGS.items():
        content = file_at(reference, training.metrics)
        if content is None:
            continue
        try:
            metrics = json.loads(content)
        except ValueError:
            metrics = None
        if not (digest := weights_digest(metrics)):
            raise StageError(
                f"{training.metrics} of {reference}: no weights_sha256, expected it as a stage writes it"
            )
        found[name] = digest
    return found


def read_lock() -> dict:
    """The content of dvc.lock. Raises StageError if it is not what DVC writes."""
    if lock := parse_lock(LOCK.read_bytes()):
        return lock
    raise StageError(f"{LOCK}: not what DVC writes; `git restore {LOCK}` restores the committed one")


def parse_lock(content: bytes) -> dict | None:
    """Parse the content of a dvc.lock; None if it is not what DVC writes."""
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA  # takes a third of a second, and few commands need it

    try:
        lock = YAML(typ="safe").load(content.decode())  # as DVC does
        COMPILED_LOCKFILE_SCHEMA(lock)
    except (YAMLError, UnicodeDecodeError, Invalid):
        return None
    return lock if "stages" in lock else None  # DVC accepts a file without them
