"""DVC's experiments: which there are, when each was made, and what was changed for it."""

from typing import NamedTuple

from fashion_cnn.commands.history import file_at
from fashion_cnn.project.params import PARAMS_PATH
from fashion_cnn.project.provenance import git
from fashion_cnn.tracking.runs import params_in


class Experiment(NamedTuple):
    """An experiment, as DVC keeps it in git."""

    name: str
    baseline: str  # the commit that it was made from
    reference: str


def experiments() -> list[Experiment]:
    """The experiments of all commits, oldest first. Raises GitError."""
    listed = git("for-each-ref", "--sort=committerdate", "--format=%(refname)", "refs/exps/??/*/*")
    parts = [line.split("/") for line in listed.decode().splitlines()]
    return [
        Experiment(name, first + rest, f"refs/exps/{first}/{rest}/{name}") for *_, first, rest, name in parts
    ]


def committed_at(reference: str) -> str:
    """When a commit or an experiment was made, in local time to the minute."""
    return (
        git("log", "-1", "--format=%cd", "--date=format-local:%m-%d %H:%M", reference, "--").decode().strip()
    )


def changed_params(baseline: str, reference: str | None = None) -> dict[str, object]:
    """The params of an experiment, or of the working tree, that differ from those of `baseline`."""
    content = file_at(reference, PARAMS_PATH) if reference else PARAMS_PATH.read_bytes()
    before = params_in(file_at(baseline, PARAMS_PATH) or b"")
    return {name: value for name, value in params_in(content or b"").items() if before.get(name) != value}
