"""The cache key is complete, and the committed results are those of the committed code and params.

The tests need neither data nor cache: DVC compares the files that exist with dvc.lock.
"""

import csv
import json
import re

import numpy as np
import pytest
import yaml
from dvc.repo import Repo

from fashion_cnn.commands import repair
from fashion_cnn.project.catalog import CNNS
from project import ROOT, SCRIPTS, code_deps, copy_of_project, git, sections_read

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # warnings of DVC's dependencies
]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return copy_of_project(tmp_path_factory.mktemp("committed"))


def changed(project) -> dict[str, set[str]]:
    """The changed code and params of each stage that DVC would rerun because of them."""
    with Repo(str(project)) as repo:
        status = repo.status()
    found = {}
    for stage, changes in status.items():
        items = set()
        for change in changes:
            if change == "changed command":
                items.add("command")
            elif isinstance(change, dict):
                for path, state in change.get("changed deps", {}).items():
                    if path == "params.yaml":
                        items |= set(state)
                    elif path.startswith(("stages/", "fashion_cnn/")):
                        items.add(path)
        if items:
            found[stage.rpartition(":")[2]] = items  # without the path of a dvc.yaml elsewhere
    return found


@pytest.mark.committed
def test_committed_results_are_current(project):
    assert changed(project) == {}, "code or params changed: run `make repro` and commit dvc.lock and metrics"
    with Repo(str(project)) as repo:
        status = repo.status()
    # Data and models are not in git; every metrics file is, and it is the one that dvc.lock names. For a
    # missing output, DVC reports the output or its cache, depending on what it has seen on this machine.
    for changes in status.values():
        for change in changes:
            for kind in ("changed outs", "changed deps"):
                for path, state in change.get(kind, {}).items():
                    assert path.split("/")[0] in ("data", "models", "page"), path
                    assert state in ("deleted", "not in cache"), path
    lock = yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    with Repo(str(project)) as repo:
        assert sorted(lock) == sorted(stage.name for stage in repo.index.stages)
    made = {out["path"]: out["md5"] for stage in lock.values() for out in stage["outs"]}
    for stage in lock.values():
        for dep in stage["deps"]:
            assert made.get(dep["path"], dep["md5"]) == dep["md5"], dep["path"]


def read(path: str) -> list[dict[str, str]]:
    with (ROOT / path).open() as file:
        return list(csv.DictReader(file))


@pytest.mark.committed
def test_lesson_answers():
    """The answers of the lesson agree with the committed results."""
    answers = " ".join((ROOT / "docs/lesson.md").read_text().split())

    pairs = [(row["actual"], row["predicted"]) for row in read("metrics/evaluate_cnn/original_confusion.csv")]
    of_shirts = pairs.count(("Shirt", "T-shirt/top")), pairs.count(("T-shirt/top", "Shirt"))
    moved = json.loads((ROOT / "metrics/evaluate_cnn/original.json").read_text())
    [left] = [row["shift_x"] for row in moved["shifts"] if row["pixels"] == -4]
    last = read("metrics/train_cnn/augmented.csv")[-1]
    for words in (
        f"The mean over the first epoch is {float(read('metrics/train_toy_cnn.csv')[0]['train_loss']):.3f}",
        "Shirts are read as T-shirts ({} of 1,000) and T-shirts as shirts ({} of 1,000)".format(*of_shirts),
        f"The CNN classifies {100 * moved['test_accuracy']:.0f} % of the test images correctly",
        f"{100 * left:.0f} % (n = 5,000)",
        f"validation images ({100 * float(last['val_accuracy']):.1f} %) than on its own training images "
        f"({100 * float(last['train_accuracy']):.1f} %)",
    ):
        assert words in answers, words


@pytest.mark.committed
def test_model_card():
    """The model card shows the committed results."""
    rows = {
        "unmodified": [],
        "shifted by ±3 px": [],
        "rotated by ±15°": [],
        "lowest recall of any class (Shirt)": [],
    }
    for images in ("original", "augmented"):
        test = json.loads((ROOT / f"metrics/evaluate_cnn/{images}.json").read_text())
        classes = read(f"metrics/evaluate_cnn/{images}_per_class.csv")
        recall, name = min((float(row["recall"]), row["class"]) for row in classes)
        assert name == "Shirt"
        names = ("test_accuracy", "test_accuracy_shift_3px", "test_accuracy_rotation_15deg")
        for cells, value in zip(rows.values(), [*(test[one] for one in names), recall], strict=True):
            cells.append(f"{100 * value:.1f} %")
    card = (ROOT / "docs/model_card.md").read_text()
    for row, cells in rows.items():
        assert f"| {row} | {' | '.join(cells)} |" in card


def seed_runs() -> list[dict[str, str]]:
    return read("benchmarks/seeds.csv")


@pytest.mark.committed
def test_readme_table():
    """The README's table is that of the committed runs, recomputed by NumPy."""
    lines = []
    for metric in ("test_accuracy", "test_accuracy_shift_3px", "test_accuracy_rotation_15deg"):
        cells = []
        for images in ("original", "augmented"):
            values = 100 * np.array([float(run[metric]) for run in seed_runs() if run["images"] == images])
            cells.append(f"{values.mean():.1f} ± {values.std(ddof=1):.1f} %")
        lines.append(tuple(cells))
    cell = r"([\d.]+ ± [\d.]+ %)"
    assert re.findall(rf"\| {cell} \| {cell} \|", (ROOT / "README.md").read_text()) == lines


@pytest.mark.committed
@pytest.mark.parametrize("images", ["original", "augmented"])
def test_results_match_run_of_seed(images):
    """The committed results are those of the committed run with their seed."""
    [run] = [run for run in seed_runs() if (run["seed"], run["images"]) == ("0", images)]
    for stage in ("train_cnn", "evaluate_cnn"):
        metrics = json.loads((ROOT / f"metrics/{stage}/{images}.json").read_text())
        metrics = {name: value for name, value in metrics.items() if not isinstance(value, list)}
        assert {name: run[name] for name in metrics} == {name: str(value) for name, value in metrics.items()}


@pytest.mark.committed
def test_recipes_table():
    """The table of recipes is that of the committed runs, recomputed by NumPy."""
    with (ROOT / "benchmarks/ladder.csv").open() as file:
        runs = list(csv.DictReader(file))
    lines = []
    for name in dict.fromkeys(run["rung"] for run in runs):
        mine = [run for run in runs if run["rung"] == name]
        shares = [float(run["seconds"]) / float(run["own_loop_seconds"]) for run in mine]
        cells = [name, mine[0]["epochs"], f"{np.median(shares):.2f}"]
        for metric in ("test_accuracy", "shifts_up_to_4px", "rotations_up_to_15deg"):
            values = 100 * np.array([float(run[metric]) for run in mine])
            spread = f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.2f}{spread} %")
        lines.append(f"| {' | '.join(cells)} | {len(mine)} |")
    table = (ROOT / "docs/recipes.md").read_text().split("|---|---|---|---|---|---|---|\n")[1]
    assert table.split("\n\n")[0].splitlines() == lines


def test_rerun_for_own_changes(project):
    """A stage reruns for its own code and params, and for no others.

    Every file and every value changes at once; each stage must list exactly its own.
    """
    for path in [*(project / "stages").glob("[!_]*.py"), *(project / "fashion_cnn").rglob("*.py")]:
        path.write_text(path.read_text() + "\n# changed\n")
    path = project / "params.yaml"
    params = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({name: dict.fromkeys(params[name], "changed") for name in params}))
    found = changed(project)
    git(project, "restore", ".")
    instances = {name: [name] for name in SCRIPTS}
    instances |= {name: [f"{name}@{images}" for images in CNNS] for name in ("train_cnn", "evaluate_cnn")}
    own = {name: code_deps(name) | sections_read(name) for name in SCRIPTS}
    assert found == {instance: own[name] for name in SCRIPTS for instance in instances[name]}


@pytest.mark.parametrize("name", ["style.css", "page.html", "draw.js"])
def test_page_rerun(project, name):
    """DVC writes the page again if a file that it is made of changes."""
    before = changed(project).get("build_page", set())
    path = project / "fashion_cnn/page" / name
    path.write_text(path.read_text() + "\n")
    assert changed(project)["build_page"] == before | {"fashion_cnn/page"}
    git(project, "restore", ".")


def test_no_other_rerun(project):
    """Changes of other files rerun no stage.

    These are the follower, the schema, the tools, and what an editor or Python leaves next to the code.
    """
    before = changed(project)
    package = project / "fashion_cnn"
    files = [path for folder in ("tracking", "commands") for path in (package / folder).glob("*.py")]
    for path in [*files, package / "schema.py"]:
        path.write_text(path.read_text() + "\n# changed\n")
    for name in ("project/.files.py.swp", "training/__pycache__/loop.cpython-311.pyc", "models/notes.txt"):
        path = package / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("left behind")
    (package / "training/.#loop.py").symlink_to("somebody@somewhere")  # an unsaved edit in Emacs
    assert changed(project) == before
    git(project, "restore", ".")
    git(project, "clean", "--force", "-d", "-x", "--quiet", "fashion_cnn")


def test_mend_lock_leaves_conflict(project, monkeypatch):
    """`mend_lock` leaves a dvc.lock with a merge conflict to a person."""
    monkeypatch.chdir(project)
    path = project / "dvc.lock"
    whole = path.read_text()
    path.write_text("<<<<<<< HEAD\n" + whole + "=======\n>>>>>>> other\n")
    conflict = path.read_text()
    assert not repair.mend_lock()
    assert path.read_text() == conflict
    path.write_text(whole)


@pytest.mark.parametrize("cut", [slice(0), slice(12), slice(-12), slice(2, None)])
def test_mend_truncated_lock(project, cut, monkeypatch):
    """`mend_lock` restores the committed dvc.lock if the file was cut short, and keeps a whole one."""
    monkeypatch.chdir(project)
    path = project / "dvc.lock"
    whole = path.read_text()
    assert not repair.mend_lock()
    assert path.read_text() == whole
    path.write_text(whole[cut])
    assert repair.mend_lock()
    assert path.read_text() == whole


@pytest.mark.parametrize("cut", ["", '{"write": {"/project/models/toy'])
def test_mend_truncated_rwlock(project, cut, monkeypatch):
    """`mend_rwlock` deletes DVC's list of readers and writers if it was cut short, and keeps a whole one."""
    monkeypatch.chdir(project)
    path = project / ".dvc/tmp/rwlock"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    assert not repair.mend_rwlock()
    assert path.exists()
    path.write_text(cut)
    assert repair.mend_rwlock()
    assert not path.exists()
    assert (project / "dvc.lock").exists()
