"""Mutated inputs, full disks, and no pickle anywhere. `make soak` runs many more mutations."""

import subprocess
import sys

import pytest

import mutations
from project import ROOT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("mutate", [mutations.params, mutations.idx, mutations.weights])
def test_mutated_inputs(mutate, tmp_path):
    """Mutated inputs are read, or refused with a one-line error."""
    lost = [seed for seed in range(80) if not mutations.survives(mutate, seed, tmp_path)]
    assert lost == []


@pytest.mark.parametrize("limit", [0, 1])
def test_full_disk(workspace, limit):
    """A full disk gives a one-line error, and the earlier file stays.

    A file size limit stands in for a full disk: both fail in the middle of a write.
    """
    (workspace / "data").mkdir()
    (workspace / "data/toy.safetensors").write_text("earlier")
    code = (
        "import resource, runpy, sys;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        "runpy.run_path(sys.argv[1] + '/build_toy_tensors.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(ROOT / "stages")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "File too large" in done.stderr
    assert (workspace / "data/toy.safetensors").read_text() == "earlier"
    assert [path.name for path in (workspace / "data").iterdir()] == ["toy.safetensors"]


def test_file_in_place_of_folder(workspace):
    """A file in place of an output folder gives a one-line error."""
    (workspace / "data").write_text("in the way")
    command = [sys.executable, str(ROOT / "stages/build_toy_tensors.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "data" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["both"], ["original", "augmented"]])
def test_wrong_argument(workspace, arguments):
    """A wrong argument gives a one-line error."""
    command = [sys.executable, str(ROOT / "stages/train_cnn.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "expected one of original, augmented" in done.stderr
    assert done.stderr.count("\n") == 1
