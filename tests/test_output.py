"""Standard output and error that are closed, unread or full: the work completes with the right exit code."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from project import STAGES

pytestmark = pytest.mark.slow

# A stage that prints more than a pipe holds, shows a bar, works, and prints again.
STAGE = """
import os, sys
from pathlib import Path
from tqdm import tqdm
from fashion_cnn.project.errors import StageError
from fashion_cnn.project.process import run_stage

def main():
    for line in tqdm(range(5000), mininterval=0):
        print("line", line, "of what a stage prints")
    with open("done", "w") as file:
        os.system("echo what a program started here prints")
        file.write("all")
    print("last line")
    if "fail" in sys.argv:
        raise StageError("the fault")

run_stage(main)
"""


def sh(folder: Path, command: str) -> subprocess.CompletedProcess:
    """Run `command` in bash, as a person would; its exit code is that of the first program that failed."""
    script = f"python() {{ '{sys.executable}' \"$@\"; }}; set -o pipefail; {command}"
    return subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(workspace):
    (workspace / "stage.py").write_text(STAGE)
    return workspace


UNREAD = [">&-", "2>&-", ">&- 2>&- <&-", "| head -0", "2>&1 | head -0", "2> >(head -0)", "2>/dev/full"]


@pytest.mark.parametrize("output", UNREAD)
def test_unread_output(folder, output):
    """A stage does not fail if nobody reads its output."""
    done = sh(folder, f"python stage.py {output}")
    assert done.returncode == 0, done.stderr[-1000:]
    assert not [line for line in done.stderr.splitlines() if line.startswith(("error", "Traceback"))]
    assert (folder / "done").read_text() == "all"


@pytest.mark.parametrize("output", [*UNREAD, ">/dev/full"])
def test_failure_keeps_exit_code(folder, output):
    """A real failure keeps its exit code and its error line."""
    done = sh(folder, f"python stage.py fail {output}")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert (folder / "done").read_text() == "all"
    if "2>" not in output:
        assert done.stderr.splitlines()[-1] == "error: the fault"


@pytest.mark.parametrize("command", ["stage.py", "-m fashion_cnn trace --help"])
def test_full_disk(folder, command):
    """A full disk behind the output is reported when the work is done."""
    done = sh(folder, f"python {command} >/dev/full")
    assert done.stderr.splitlines()[-1] == "error: standard output: No space left on device"
    assert done.returncode == 1
    assert (folder / "done").exists() == (command == "stage.py")


def test_unread_training(workspace):
    """A training is complete even if nobody reads its output."""
    path = workspace / "params.yaml"
    path.write_text(path.read_text().replace("epochs: 2000", "epochs: 20"))
    done = sh(workspace, f"cd '{workspace}'; for s in build_toy_tensors train_toy_cnn; do "
              f"python '{STAGES}'/$s.py 2>&1 | head -0 || exit; done")  # fmt: skip
    assert done.returncode == 0
    assert (workspace / "metrics/train_toy_cnn.json").exists()


MEND = (
    "from fashion_cnn.project.process import run_stage; from fashion_cnn.commands.repair import mend_lock;"
    "run_stage(mend_lock)"
)


def test_unread_mend_lock(workspace):
    """A damaged lock is mended even if nobody reads the report on it."""
    (workspace / "dvc.lock").write_text("schema: '2.0'\nsta")
    done = sh(workspace, f'python -c "{MEND}" | head -0')
    assert (done.returncode, done.stderr) == (0, "")
    assert not (workspace / "dvc.lock").exists()


def test_line_buffered_pipe(workspace):
    """A line arrives as soon as it is printed, even in a pipe."""
    code = (
        "import time; from fashion_cnn.project.process import run_stage;"
        "run_stage(lambda: (print('at once'), time.sleep(20)))"
    )
    command, buffered = [sys.executable, "-c", code], {**os.environ, "PYTHONUNBUFFERED": ""}
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=buffered) as process:
        assert process.stdout.readline() == b"at once\n"
        assert time.monotonic() - began < 20
        process.kill()
