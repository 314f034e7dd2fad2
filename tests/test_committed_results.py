"""The cache key is complete, and the committed results are those of the committed code and params.

Needs neither data nor cache: DVC compares what is there with dvc.lock.
"""

import csv
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml
from conftest import ROOT, code_deps, copy_of_project, stage_definitions
from dvc.repo import Repo

from lib.params import Params, leaves, parse_params

pytestmark = pytest.mark.filterwarnings("ignore")  # DVC's dependencies warn about themselves

LEAVES = [
    f"{name}.{leaf}" for name, field in Params.model_fields.items() for leaf in field.annotation.model_fields
]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "stages").rglob("*.py"))
TWICE = ("train_cnn", "evaluate_cnn")

# Which stages a section of params.yaml reruns by itself; what depends on their outputs follows.
SECTIONS = {
    "fetch": ["fetch_fashion_mnist"],
    "split": ["train_cnn"],
    "augment_images": ["augment_images"],
    "train_toy_cnn": ["train_toy_cnn"],
    "verify_manual_conv": ["verify_manual_conv"],
    "train_cnn": ["train_cnn"],
    "evaluate_cnn": ["evaluate_cnn"],
    "plot_results": ["plot_results"],
}

ALL = list(stage_definitions())
LOGGING = ["train_toy_cnn", "verify_manual_conv", "train_cnn", "evaluate_cnn", "plot_results"]
TORCH = ["train_toy_cnn", "verify_manual_conv", "train_cnn", "evaluate_cnn"]
IMAGES = ["train_cnn", "evaluate_cnn"]
PARAMS = [name for name in ALL if name != "build_toy_tensors"]
# Which stages each file of stages/lib/ reruns by itself.
LIBRARY = {
    "__init__": ALL,
    "arguments": [*IMAGES, "plot_results"],
    "augmentation": ["augment_images"],
    "checkpoints": ["train_cnn"],
    "copies": ["augment_images", "train_cnn", "plot_results"],
    "cuda_graph": ["train_cnn"],
    "errors": ALL,
    "evaluation": ["evaluate_cnn"],
    "figures": ["plot_results"],
    "files": ALL,
    "idx": ["fetch_fashion_mnist", "augment_images", "verify_manual_conv", *IMAGES, "plot_results"],
    "inference": IMAGES,
    "lineage": LOGGING,
    "manual_conv": ["verify_manual_conv"],
    "models": TORCH,
    "outbox": LOGGING,
    "params": PARAMS,
    "params_faults": PARAMS,
    "process": ALL,
    "repairs": ["augment_images"],
    "results": ["plot_results"],
    "runtime": ["augment_images", *TORCH],
    "source_kinds": ["fetch_fashion_mnist"],
    "sources": ["fetch_fashion_mnist"],
    "splits": ["train_cnn"],
    "toy": ["train_toy_cnn"],
    "training": ["train_cnn"],
    "verification": ["verify_manual_conv"],
    "walkthrough": ["verify_manual_conv"],
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return copy_of_project(tmp_path_factory.mktemp("committed"))


def changed(project) -> dict[str, set[str]]:
    """For each stage that DVC would rerun for its own sake: the code and params that changed."""
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
                    elif path.startswith("stages/"):
                        items.add(path)
        if items:
            found[stage.rpartition(":")[2]] = items  # named by its dvc.yaml, where that is elsewhere
    return found


@pytest.fixture(scope="module")
def stale(project):
    """What is changed before a test changes anything: nothing, unless dvc.lock is behind."""
    return changed(project)


def with_change(stale: dict[str, set[str]], stages: list[str], item: str) -> dict[str, set[str]]:
    names = [f"{name}@{images}" for name in stages if name in TWICE for images in ("original", "augmented")]
    names += [name for name in stages if name not in TWICE]
    return stale | {name: {item} | stale.get(name, set()) for name in names}


@pytest.mark.committed
def test_committed_results_are_current(project):
    assert changed(project) == {}, "code or params changed: run `make repro` and commit dvc.lock and metrics"
    with Repo(str(project)) as repo:
        status = repo.status()
    # Data and models are not in git; every metrics file is, and is the one that dvc.lock names. Where an
    # output is away, DVC says so of the output or of its cache, by what it has seen on this machine.
    for changes in status.values():
        for change in changes:
            for kind in ("changed outs", "changed deps"):
                for path, state in change.get(kind, {}).items():
                    assert path.split("/")[0] in ("data", "models"), path
                    assert state in ("deleted", "not in cache"), path
    lock = yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    with Repo(str(project)) as repo:
        assert sorted(lock) == sorted(stage.name for stage in repo.index.stages)
    made = {out["path"]: out["md5"] for stage in lock.values() for out in stage["outs"]}
    for stage in lock.values():
        for dep in stage["deps"]:
            assert made.get(dep["path"], dep["md5"]) == dep["md5"], dep["path"]


def seed_runs() -> list[dict[str, str]]:
    with (ROOT / "benchmarks/seeds.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.committed
def test_the_readmes_table_is_that_of_the_committed_runs():
    """Computed once more, by NumPy."""
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
def test_the_committed_results_are_the_run_of_their_seed(images):
    [run] = [run for run in seed_runs() if (run["seed"], run["images"]) == ("0", images)]
    for stage in ("train_cnn", "evaluate_cnn"):
        metrics = json.loads((ROOT / f"metrics/{stage}/{images}.json").read_text())
        metrics = {name: value for name, value in metrics.items() if not isinstance(value, list)}
        assert {name: run[name] for name in metrics} == {name: str(value) for name, value in metrics.items()}


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_changed_param_reruns_the_stages_that_read_it(project, stale, leaf):
    path = project / "params.yaml"
    before = path.read_text()
    params = yaml.safe_load(before)
    section, name = leaf.split(".")
    value = params[section][name]
    params[section][name] = [*value, "more"] if isinstance(value, list) else f"{value}x"
    path.write_text(yaml.safe_dump(params))
    found = changed(project)
    path.write_text(before)
    assert found == with_change(stale, SECTIONS[section], leaf)


@pytest.mark.parametrize("file", FILES)
def test_a_changed_file_reruns_the_stages_that_import_it(project, stale, file):
    path = project / file
    before = path.read_text()
    path.write_text(before + "\n# changed\n")
    name = path.stem
    found = changed(project)
    path.write_text(before)
    stages = LIBRARY[name] if path.parent.name == "lib" else [name]
    assert found == with_change(stale, stages, file)


def test_the_tables_name_every_section_and_file():
    assert list(SECTIONS) == list(Params.model_fields)
    assert sorted(LIBRARY) == sorted(path.stem for path in (ROOT / "stages/lib").glob("*.py"))
    for stage in ALL:
        used = {
            path.split("/")[-1][:-3] for path in code_deps(ROOT / f"stages/{stage}.py") if "/lib/" in path
        }
        assert used == {name for name, stages in LIBRARY.items() if stage in stages}, stage


def test_every_leaf_of_the_file_is_in_the_models():
    with_values = parse_params(ROOT / "params.yaml")
    assert sorted(leaves(with_values)) == sorted(LEAVES)


def test_a_lock_file_in_conflict_is_left_to_a_person(project):
    path = project / "dvc.lock"
    whole = path.read_text()
    path.write_text("<<<<<<< HEAD\n" + whole + "=======\n>>>>>>> other\n")
    conflict = path.read_text()
    mended = subprocess.run([sys.executable, str(ROOT / "tools/mend_lock.py")], cwd=project, check=False)
    assert mended.returncode == 1
    assert path.read_text() == conflict
    path.write_text(whole)


@pytest.mark.parametrize("cut", [slice(0), slice(12), slice(-6), slice(2, None)])
def test_a_lock_file_cut_short_is_taken_away_and_a_whole_one_is_not(project, cut):
    path = project / "dvc.lock"
    whole = path.read_text()
    mend = [sys.executable, str(ROOT / "tools/mend_lock.py")]
    assert subprocess.run(mend, cwd=project, check=False).returncode == 1
    assert path.read_text() == whole
    path.write_text(whole[cut])
    assert subprocess.run(mend, cwd=project, check=False, capture_output=True).returncode == 0
    assert not path.exists()
    path.write_text(whole)


@pytest.mark.parametrize("cut", ["", '{"write": {"/project/models/toy'])
def test_dvcs_list_of_readers_and_writers_cut_short_is_taken_away_and_a_whole_one_is_not(project, cut):
    path = project / ".dvc/tmp/rwlock"
    path.parent.mkdir(parents=True, exist_ok=True)
    mend = [sys.executable, str(ROOT / "tools/mend_lock.py")]
    path.write_text("{}")
    assert subprocess.run(mend, cwd=project, check=False).returncode == 1
    assert path.exists()
    path.write_text(cut)
    assert subprocess.run(mend, cwd=project, check=False, capture_output=True).returncode == 0
    assert not path.exists()
    assert (project / "dvc.lock").exists()
