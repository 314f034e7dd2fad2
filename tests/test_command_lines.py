"""Values that reach a shell: the Makefile's folder and Python, and the commands that trace prints."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fashion_cnn.cli import cli
from fashion_cnn.commands import trace
from fashion_cnn.project.errors import StageError
from project import ROOT

ODD = 'it\'s "$(touch ran)" `touch ran` & ;x'


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "MAKEFLAGS")}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def stand_in(path: Path) -> None:
    """Write a program that prints its arguments; for `-m venv`, it installs itself as .venv's Python."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "#!/bin/sh\n"
        'echo "called with: $*"\n'
        '[ "$2" != venv ] || { mkdir -p .venv/bin && cp "$0" .venv/bin/python; }\n'
    )
    path.chmod(0o755)


@pytest.fixture
def folder(tmp_path):
    """A copy of the project's Makefile in a folder with an odd name."""
    folder = tmp_path / ODD
    folder.mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("requirements.lock", "requirements-imgaug.lock"):
        (folder / name).touch()
    return folder


def test_folder_name_not_executed(folder):
    """`make` does not execute commands in the folder's name."""
    stand_in(folder / ".venv/bin/python")
    (folder / ".venv/ready").write_text(f"{folder}\n")
    done = make(folder, "repro")
    assert (done.returncode, done.stderr) == (0, "")
    assert "called with: -m fashion_cnn repro" in done.stdout
    assert not (folder / "ran").exists()


@pytest.fixture
def no_uv(tmp_path, monkeypatch):
    """Make uv fail, so that pip is used; the stand-in for Python answers in its place."""
    (uv := tmp_path / "no uv/uv").parent.mkdir()
    uv.write_text("#!/bin/sh\nexit 1\n")
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", f"{uv.parent}:{os.environ['PATH']}")


def test_copied_environment_rebuilt(folder, tmp_path, no_uv):
    """`make` rebuilds an environment that was copied with its folder.

    The environment names the original folder, so that folder's code would run.
    """
    stand_in(folder / ".venv/bin/python")
    (folder / ".venv/ready").write_text(f"{folder}\n")
    stand_in(tmp_path / "bin/python3")
    copy = shutil.copytree(folder, tmp_path / "copy")
    done = make(copy, "repro", f"PYTHON={tmp_path / 'bin/python3'}")
    assert (done.returncode, done.stderr) == (0, ".venv was made in another folder and will be rebuilt\n")
    assert "called with: -m venv .venv" in done.stdout
    assert (copy / ".venv/ready").read_text() == f"{copy}\n"
    assert "called with: -m venv" not in make(copy, "repro").stdout
    assert "called with: -m venv" not in make(folder, "repro").stdout


def test_python_name_not_executed(folder, no_uv):
    """`make` does not execute commands in the name of the Python that it is given."""
    stand_in(folder / ODD)
    done = make(folder, "setup", f"PYTHON=./{ODD.replace('$', '$$')}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "called with: -m venv .venv" in done.stdout
    assert "called with: -m pip install" in done.stdout
    assert not (folder / "ran").exists()


def test_old_python(folder):
    """`make setup` names a Python that is too old."""
    old = folder / "old python"
    code = "import collections, sys; v = collections.namedtuple('v', 'a b'); sys.version_info = v(3, 9);"
    old.write_text(f'#!/bin/sh\nexec python3 -c "{code} sys.version = \'3.9.1 x\'; exec(sys.argv[1])" "$2"\n')
    old.chmod(0o755)
    done = make(folder, "setup", "PYTHON=./old python")
    assert done.returncode
    assert "error: ./old python is Python 3.9.1, expected 3.11 or newer: make PYTHON=" in done.stderr


def restored(params: dict, **tags: str) -> list[str]:
    """The commands that trace prints for a run."""
    run = SimpleNamespace(data=SimpleNamespace(params=params), info=SimpleNamespace(run_id="ab" * 16))
    return trace.restore(run, {"dvc_stage": "train_toy_cnn"} | tags, has_diff=False)


def test_trace_quotes_commands():
    """The commands that `trace` prints are quoted."""
    params = {"train_cnn.device": ODD, "split.train_size": "null", "split.seed": "0", "train_images": "55000"}
    [checkout, run] = restored(params, git_commit="0a" * 20)
    assert checkout == f"git checkout {'0a' * 20}"
    assert shlex.split(run) == [
        *["dvc", "exp", "run", "-S", "split.seed=0", "-S", "split.train_size=null"],
        *["-S", f"train_cnn.device={ODD}", "train_toy_cnn"],
    ]


def test_trace_omits_other_files_params():
    """`trace` leaves out params of files other than params.yaml."""
    assert restored({"dvc.yaml:stages.x.cmd": "rm -rf ~"})[1:] == ["dvc exp run train_toy_cnn"]


@pytest.mark.parametrize("value", ["1\n    rm -rf ~", "\x1b[2K1", "\u202e1"])
def test_trace_values_cannot_forge_lines(value):
    """A value from the store cannot forge a line of what `trace` prints."""
    for lines in (restored({"split.seed": value}), restored({value: "1"}), restored({}, git_commit=value)):
        assert lines[0].startswith("# left out: ")
        assert lines[1:] == ["dvc exp run train_toy_cnn"]
        assert lines[0].isprintable()
    [line] = restored({}, dvc_stage=value)
    assert line.startswith("# no command: dvc_stage is ")
    assert line.isprintable()
    known = {
        "run_id": "1",
        "dvc_stage": "s",
        "status": "FINISHED",
        "params": {},
        "dvc_lock": {},
        "restore": [],
    }
    for name in ("dvc_stage", "git_commit", "dvc_exp_name", "torch"):
        told = trace.words({**known, name: value})
        assert all(line.isprintable() for line in told.splitlines())
        assert len(told.splitlines()) == 7


def test_refuse_folder_without_project(tmp_path, monkeypatch):
    """A command refuses a folder that is not the project."""
    (tmp_path / "dvc.yaml").write_text("stages:\n  other:\n    cmd: python other.py\n")
    for folder in (tmp_path / "empty", tmp_path):
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        with pytest.raises(StageError, match=f"^{folder}: no dvc.yaml of fashion-cnn here"):
            cli(["back"], standalone_mode=False)


def test_refuse_copy_with_other_code(workspace):
    """A command refuses a copy of the project if it would run the code of another one."""
    (workspace / "fashion_cnn").mkdir()
    with pytest.raises(
        StageError, match=f"^{workspace}: this command runs the code of {ROOT}; `make setup` here"
    ):
        cli(["back"], standalone_mode=False)


def test_help_needs_no_project(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli(["back", "--help"], standalone_mode=False)
    assert "Return from experiments" in capsys.readouterr().out


@pytest.mark.parametrize("level", ["0", "1", "nan"])
def test_level_range(workspace, level):
    """`--level` takes only numbers between 0 and 1."""
    with pytest.raises(StageError, match=f"^--level is {float(level)}, expected a number between 0 and 1$"):
        cli(["promote", "params.yaml", "--level", level], standalone_mode=False)


def test_stages_use_own_python(tmp_path):
    """Stages run with the Python that runs the command.

    This holds without an activated environment, and with a setting that would import other code.
    """
    code = "import os, shutil; from fashion_cnn import cli; cli.run_stage = lambda run: None; cli.main();"
    code += "print(shutil.which('python'), 'PYTHONSAFEPATH' in os.environ)"
    settings = {"PATH": "/usr/bin:/bin", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=settings, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(Path(sys.executable).parent / "python"), "False"], done.stderr
