"""Every command of the README and of docs/walkthrough.md, run in order in a copy with small params."""

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import SMALL, dvc, environment, set_params
from project import ROOT, copy_of_project, git

pytestmark = pytest.mark.committed

# Commands that are not run: the set-up, all tests, the UI (it does not end), and the reader's own picture.
LEFT_OUT = ("make test", "fashion-cnn ui", ". .venv/bin/activate", "fashion-cnn predict picture.png")
# Replacements that make the pages' commands quick.
QUICK = {
    "range(0,5)": "range(0,2)",
    "split.train_size=6000": "split.train_size=500",
    "queue start": "queue start --jobs 2",
}
MAKE = f"""make() {{
    command make -o .venv/ready ACTIVATE='PATH="{Path(sys.executable).parent}:$$PATH"' "$@"
}}
fashion-cnn() {{
    python -m fashion_cnn "$@"
}}
"""


def commands(page: str) -> list[str]:
    """The commands in a page's console blocks, without their comments."""
    blocks = re.findall(r"^```console\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [shlex.join(shlex.split(line, comments=True)) if "'" not in line else line for line in lines]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = copy_of_project(tmp_path_factory.mktemp("docs") / "a project")
    set_params(folder, SMALL)
    fast = folder / "recipes/fast.yaml"
    quick = fast.read_text().replace("tta_views: 6", "tta_views: 2").replace("epochs: 10", "epochs: 2")
    fast.write_text(quick)
    (folder / "dvc.lock").unlink()
    git(folder, "commit", "--quiet", "--all", "--message", "small params")
    run(folder, "make repro")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "results")
    return folder


def run(folder: Path, written: str) -> str:
    command = written
    for words, quick in QUICK.items():
        command = command.replace(words, quick)
    done = subprocess.run(
        ["bash", "-c", MAKE + command], cwd=folder, env=environment(), text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}"
    if written == "dvc queue start":
        wait_for_queue(folder)
    return done.stdout


def wait_for_queue(folder: Path) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        rows = dvc(folder, "queue", "status").stdout
        if "Queued" not in rows and "Running" not in rows:
            assert "Failed" not in rows, rows
            return
        time.sleep(3)
    raise AssertionError(rows)


def run_page(folder: Path, page: str) -> dict[str, str]:
    """What each command of the page prints."""
    found = commands(page)
    assert len(found) > 5
    return {command: run(folder, command) for command in found if not command.startswith(LEFT_OUT)}


def test_walkthrough_commands(project):
    """The walkthrough's commands run from the first to the last."""
    told = run_page(project, "docs/walkthrough.md")
    assert "train_cnn@original" in told["fashion-cnn compare HEAD slow"]
    seeds = told["fashion-cnn compare 'base-*' 'slow-*'"]
    assert "2 seeds, paired by seed, Student's t" in " ".join(seeds.split())
    assert re.search(r"slow-2 +.*learning_rate=0\.0005", told["fashion-cnn compare"])
    first, second = (
        told[f"fashion-cnn promote models/cnn_{name}.safetensors"] for name in ("augmented", "original")
    )
    assert "there is no champion yet" in first
    assert "McNemar's exact test" in second
    assert "docs/boot.png: " in told["fashion-cnn predict docs/boot.png"]
    assert git(project, "status", "--porcelain", "--", "params.yaml", "dvc.lock", "metrics") == ""


def test_readme_commands(project):
    """The README's commands run."""
    dvc(project, "exp", "remove", "slow", check=False)  # the walkthrough made one of that name
    told = run_page(project, "README.md")
    assert "restored from the last commit" in told["fashion-cnn back"]
    assert "A  HEAD" in told["fashion-cnn compare HEAD workspace"]
