"""Mutated inputs, full disks, and no pickle anywhere. `make soak` runs many more mutations."""

import subprocess
import sys

import pytest

import mutations
from project import ROOT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("mutate", [mutations.params, mutations.idx, mutations.weights])
def test_mutated_inputs_are_read_or_refused_in_one_line(mutate, tmp_path):
    lost = [seed for seed in range(80) if not mutations.survives(mutate, seed, tmp_path)]
    assert lost == []


@pytest.mark.parametrize("limit", [0, 1])
def test_a_disk_without_room_is_one_line_and_the_earlier_file_stays(workspace, limit):
    """A file size limit stands in for a full disk: both fail in the middle of a write."""
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


def test_an_output_folder_that_is_a_file_is_one_line(workspace):
    (workspace / "data").write_text("in the way")
    command = [sys.executable, str(ROOT / "stages/build_toy_tensors.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "data" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["both"], ["original", "augmented"]])
def test_a_wrong_argument_is_one_line(workspace, arguments):
    command = [sys.executable, str(ROOT / "stages/train_cnn.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "expected one of original, augmented" in done.stderr
    assert done.stderr.count("\n") == 1
